"""The scale of pixels: what ``fit`` saw is what predictions must be given."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import ArgumentError
from ..frozen import FrozenModel

__all__ = ["Images", "check_normalisation", "match_range", "seen_range", "spread"]

Images = Any  # an array, a tensor, or LazyImages: rows can be asked for
Range = tuple[str, float, float]  # type, smallest and largest value

LOOKED_AT = 256  # samples, spread over all, that tell the scale of the others
_TIMES = 8  # as large as the largest value of `fit`: no brightness, another scale


def seen_range(X: Images) -> Range:
    """Type and range of samples, from some of them."""
    if X.dtype in (np.uint8, torch.uint8):
        return "uint8", 0.0, 255.0
    low, high = _range(X)
    return "float", low, high


def match_range(X: Images, seen: Range, *, whole: bool, look: bool = True) -> Images:
    """Give `X` the scale that ``fit`` saw, or raise where it has another one.

    `whole`: X came as integers other than uint8.  Where not `look`, values are not looked at.
    """
    kind, low, high = seen
    unit = kind == "uint8" or (low >= -0.1 and high <= 1.1)
    if X.dtype in (np.uint8, torch.uint8):
        if unit:
            return X
        raise _error(
            "X holds uint8, which is divided by 255, but in fit its values went from "
            f"{low:.4g} to {high:.4g} and were taken as they are. Pass them as in fit."
        )
    if not look:
        return X
    first, last = _range(X)
    if unit and (first < -0.1 or last > 1.1):
        bytes_ = _as_bytes(X) if whole or kind == "uint8" else None
        if bytes_ is not None:
            return bytes_
    if kind == "uint8":
        if first < -0.1 or last > 1.1:
            raise _error(
                f"X holds values from {first:.4g} to {last:.4g}, but in fit it was uint8, which is "
                "divided by 255. Pass uint8, or values from 0 to 1."
            )
        return X
    largest = max(abs(low), abs(high))
    now = max(abs(first), abs(last))
    negative = low >= 0 and first < -0.1 * now
    if negative or now > _TIMES * largest > 0:
        raise _error(
            f"X holds values from {first:.4g} to {last:.4g}, but in fit they went from {low:.4g} "
            f"to {high:.4g}. Pass them on the same scale"
            + (": uint8, or divided by 255." if unit else ".")
        )
    if low >= 0 and high > 64 and 0 <= first and 0 < last <= 1 and not whole:
        raise _error(
            f"X holds values up to {last:.4g}, but in fit they went up to {high:.4g}. Pass them on "
            "the same scale."
        )
    return X


def check_normalisation(frozen: FrozenModel, X: Images) -> None:
    """Raise if `mean` and `std` are for other channels, or another scale, than those of `X`."""
    if frozen.mean is None or frozen.std is None:
        return
    widths = {len(frozen.mean), len(frozen.std)} - {1}
    if widths and widths != {int(X.shape[1])}:
        last = X.ndim == 4 and widths == {int(X.shape[3])}
        raise ValueError(
            f"The mean and std of model are for {max(widths)} channels, but X has {X.shape[1]}."
            + (" X looks like NHWC; pass NCHW: X.transpose(0, 3, 1, 2)." if last else "")
        )
    if X.ndim < 3:
        return
    largest = max(map(abs, frozen.mean))
    if X.dtype in (np.uint8, torch.uint8):
        if largest > 1:
            raise ValueError(
                f"The mean of model is up to {largest:.4g}, but uint8 images are divided by 255 "
                "before it is subtracted: give mean and std on the scale from 0 to 1."
            )
        return
    low, high = _range(X)
    if low >= 0 and high > _TIMES and 0 < largest <= 1 and max(frozen.std) <= 1:
        raise ValueError(
            f"X holds values up to {high:.4g}, but mean and std of model are on the scale from 0 "
            "to 1. Pass uint8, or divide X by 255."
        )


def spread(X: Images, n: int) -> Images:
    """At most `n` of the samples, spread over all."""
    rows: Any = np.linspace(0, len(X) - 1, min(len(X), n)).astype(int)
    return X[torch.as_tensor(rows, device=X.device) if isinstance(X, torch.Tensor) else rows]


def _range(X: Images) -> tuple[float, float]:
    """Smallest and largest value of some samples."""
    some = spread(X, LOOKED_AT)
    return float(some.min()), float(some.max())


def _as_bytes(X: Images) -> Images | None:
    """The same values as uint8, or None where they are no bytes."""
    with np.errstate(invalid="ignore"):
        small: Any = X.to(torch.uint8) if isinstance(X, torch.Tensor) else X.astype(np.uint8)
    return small if bool((small == X).all()) else None


def _error(message: str) -> ArgumentError:
    return ArgumentError(message, "X")
