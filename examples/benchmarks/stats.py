"""Means with intervals. A unit is what could have been another one: an image, or a cluster."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True)
class Estimate:
    """A mean over units with its 95 % interval; NaN bounds with fewer than two units."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """In percentage points, with sign."""
        text = f"{100 * self.mean:+.2f}"
        if np.isnan(self.low):
            return text
        return f"{text} [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


def estimate(values: np.ndarray) -> Estimate:
    """Mean of one value for each unit, with Student's interval.

    Values of a unit under several draws of calibration images are averaged before: shape
    (n_draws, n_units) or (n_units,).
    """
    units = np.atleast_2d(np.asarray(values, dtype=np.float64)).mean(0)
    mean, n = float(units.mean()), len(units)
    if n < 2:
        return Estimate(mean, float("nan"), float("nan"))
    half = float(student.ppf(0.975, n - 1) * units.std(ddof=1) / n**0.5)
    return Estimate(mean, mean - half, mean + half)


def spread(draws: np.ndarray) -> str:
    """Least and most over draws, in percentage points."""
    return f"{100 * np.min(draws):+.2f} to {100 * np.max(draws):+.2f}"
