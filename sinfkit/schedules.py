"""How many filters to remove from each layer, and which of them stay."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["SCHEDULES", "n_removed", "removal_ratios", "select_kept"]


def _linear(depth: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Interpolate the fraction removed."""
    return low + (high - low) * depth


def _geometric(depth: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Interpolate the logarithm of the fraction kept."""
    return 1.0 - (1.0 - low) * ((1.0 - high) / (1.0 - low)) ** depth


def _uniform(depth: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Remove the larger fraction everywhere."""
    return np.full_like(depth, high)


SCHEDULES: dict[str, Callable[[NDArray[np.float64], float, float], NDArray[np.float64]]] = {
    "linear": _linear,
    "geometric": _geometric,
    "uniform": _uniform,
}
"""Schedules by name: functions of relative depth in [0, 1], smallest and largest ratio."""


def removal_ratios(
    n_layers: int, schedule: str = "linear", min_ratio: float = 0.1, max_ratio: float = 0.5
) -> NDArray[np.float64]:
    r"""Fraction of filters to remove from each layer, growing with depth.

    Parameters
    ----------
    n_layers : int
        Number of layers (dependency groups) in forward order that lose filters.
    schedule : {"linear", "geometric", "uniform"}, default="linear"
        With the relative depth :math:`t` from 0 (first layer) to 1 (last):

        - ``"linear"``: :math:`r = r_M + (r_L - r_M) t`;
        - ``"geometric"``: interpolates the fraction kept,
          :math:`1 - r = (1 - r_M) ((1 - r_L) / (1 - r_M))^t`;
        - ``"uniform"``: `max_ratio` everywhere, `min_ratio` is not used.
    min_ratio : float, default=0.1
        Fraction removed from the first layer, in [0, 1).
    max_ratio : float, default=0.5
        Fraction removed from the last layer, in [0, 1), not below `min_ratio`. A single layer
        loses this fraction.

    Returns
    -------
    ndarray of shape (n_layers,)
        Ratios in [0, 1), float64.

    Raises
    ------
    ValueError
        If `n_layers` is negative, the schedule is unknown, a ratio is outside [0, 1), or
        `max_ratio` is below `min_ratio`.

    Notes
    -----
    That more is removed from later layers, between two ratios that the user chooses, is stated by
    the paper on semantic inference (arXiv:2310.01259); the formulas are this package's choice.

    Examples
    --------
    >>> from sinfkit.schedules import removal_ratios
    >>> removal_ratios(3, "linear", 0.1, 0.5)
    array([0.1, 0.3, 0.5])
    >>> removal_ratios(1, "linear", 0.1, 0.5)
    array([0.5])
    """
    if n_layers < 0:
        raise ValueError(f"n_layers must not be negative, got {n_layers}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {sorted(SCHEDULES)}, got {schedule!r}")
    for name, ratio in (("min_ratio", min_ratio), ("max_ratio", max_ratio)):
        _check_ratio(name, ratio)
    if schedule != "uniform" and max_ratio < min_ratio:
        raise ValueError(
            f"max_ratio must not be below min_ratio, got min_ratio={min_ratio} and "
            f"max_ratio={max_ratio}; the last layer loses at least as much as the first"
        )
    depth = np.linspace(0.0, 1.0, n_layers) if n_layers > 1 else np.ones(n_layers)
    return SCHEDULES[schedule](depth, float(min_ratio), float(max_ratio))


def n_removed(ratio: float, n: int, multiple: int = 1) -> int:
    """Count of filters that a layer loses.

    Parameters
    ----------
    ratio : float
        Fraction to remove, in [0, 1).
    n : int
        Filters in the layer, at least 1.
    multiple : int, default=1
        The count is rounded down to a multiple of this, which divides `n`: the number of groups
        of a grouped convolution.

    Returns
    -------
    int
        ``floor(ratio * n + 1e-9)``, rounded down to a multiple, and at most ``n - multiple``, so
        that one filter (of each group) stays.

    Raises
    ------
    ValueError
        If `ratio` is outside [0, 1), `n` is below 1, or `multiple` does not divide `n`.

    Examples
    --------
    >>> from sinfkit.schedules import n_removed
    >>> n_removed(0.3, 64), n_removed(0.3, 10), n_removed(0.99, 4), n_removed(0.3, 64, 4)
    (19, 3, 3, 16)
    """
    _check_ratio("ratio", ratio)
    if n < 1:
        raise ValueError(f"a layer has at least one filter, got n={n}")
    if multiple < 1 or n % multiple:
        raise ValueError(f"multiple must divide the number of filters, got {multiple} and n={n}")
    # 0.29 * 100 is 28.999999999999996 in floating point, and 29 filters are meant.
    count = int(np.floor(ratio * n + 1e-9))
    return min(count - count % multiple, n - multiple)


def select_kept(scores: ArrayLike, ratio: float, n_groups: int = 1) -> NDArray[np.int64]:
    """Indices of the filters that stay when the lowest scores go.

    Parameters
    ----------
    scores : array-like of shape (n_filters,)
        One score per filter, low for the least useful. Of equal scores, the one with the higher
        index goes first.
    ratio : float
        Fraction to remove, in [0, 1); see `n_removed` for the count.
    n_groups : int, default=1
        Number of equal, consecutive groups of filters that must all lose the same local indices,
        as on both sides of a grouped convolution. Local indices are ranked by their sum of scores.

    Returns
    -------
    ndarray of shape (n_kept,)
        Sorted indices, int64.

    Raises
    ------
    ValueError
        If the scores are not one-dimensional, hold NaN, or do not split into `n_groups`; or the
        ratio is outside [0, 1).

    Examples
    --------
    >>> from sinfkit.schedules import select_kept
    >>> select_kept([0.3, 0.1, 0.3, 0.2], 0.5)
    array([0, 2])
    >>> select_kept([5, 1, 2, 1, 2, 4], 0.34, n_groups=2)  # sums of scores: 6, 3, 6
    array([0, 2, 3, 5])
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"scores must be one-dimensional, got shape {values.shape}")
    if np.isnan(values).any():
        where = np.flatnonzero(np.isnan(values))[:5].tolist()
        raise ValueError(f"scores must not be NaN, but are for filters {where}")
    removed = n_removed(ratio, len(values), n_groups) // n_groups
    per_group = len(values) // n_groups
    ranked = values.reshape(n_groups, per_group).sum(0)
    # A stable sort of the negated scores puts the lower of two tied indices first.
    local = np.sort(np.argsort(-ranked, kind="stable")[: per_group - removed])
    return (np.arange(n_groups)[:, None] * per_group + local).ravel().astype(np.int64)


def _check_ratio(name: str, ratio: float) -> None:
    """Raise unless the ratio lies in [0, 1); NaN does not."""
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {ratio}")
