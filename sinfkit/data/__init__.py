"""Samples and labels: checked, matched with the network, read in batches."""

from .calibration import Batcher, Calibration
from .validation import (
    hold_out,
    match_classes,
    validate_weight,
    validate_y,
    warn_if_mismatched,
)

__all__ = [
    "Batcher",
    "Calibration",
    "hold_out",
    "match_classes",
    "validate_weight",
    "validate_y",
    "warn_if_mismatched",
]
