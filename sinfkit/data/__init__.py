"""Samples and labels: checked, matched with the network, read in batches."""

from .validation import (
    Batcher,
    hold_out,
    match_classes,
    validate_weight,
    validate_y,
    warn_if_mismatched,
)

__all__ = [
    "Batcher",
    "hold_out",
    "match_classes",
    "validate_weight",
    "validate_y",
    "warn_if_mismatched",
]
