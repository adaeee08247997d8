"""Samples and labels: checked, matched with the network, read in batches."""

from .calibration import Batcher, Calibration, check_order, match_classes, warn_if_mismatched
from .images import LazyImages, images_of, with_labels
from .validation import (
    hold_out,
    validate_weight,
    validate_X,
    validate_y,
)

__all__ = [
    "Batcher",
    "Calibration",
    "LazyImages",
    "check_order",
    "hold_out",
    "images_of",
    "match_classes",
    "validate_X",
    "validate_weight",
    "validate_y",
    "warn_if_mismatched",
    "with_labels",
]
