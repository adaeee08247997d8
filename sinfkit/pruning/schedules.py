"""How many filters to remove from each layer, and which of them stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from .costs import CostModel

from ..errors import OutOfReachError

__all__ = [
    "SCHEDULES",
    "marginal_losses",
    "n_above_mean",
    "n_removed",
    "removal_order",
    "removal_ratios",
    "select_kept",
    "select_top",
    "widths_within",
]


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
    >>> from sinfkit.pruning import removal_ratios
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
    >>> from sinfkit.pruning import n_removed
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
    >>> from sinfkit.pruning import select_kept
    >>> select_kept([0.3, 0.1, 0.3, 0.2], 0.5)
    array([0, 2])
    >>> select_kept([5, 1, 2, 1, 2, 4], 0.34, n_groups=2)  # sums of scores: 6, 3, 6
    array([0, 2, 3, 5])
    """
    values = _checked(scores)
    return select_top(values, len(values) - n_removed(ratio, len(values), n_groups), n_groups)


def select_top(scores: ArrayLike, n_kept: int, n_groups: int = 1) -> NDArray[np.int64]:
    """Indices of the filters of the highest scores.

    Parameters
    ----------
    scores : array-like of shape (n_filters,)
        As for `select_kept`.
    n_kept : int
        How many filters stay: a multiple of `n_groups`, at least one of each.
    n_groups : int, default=1
        As for `select_kept`.

    Returns
    -------
    ndarray of shape (n_kept,)
        Sorted indices, int64.

    Raises
    ------
    ValueError
        If `n_kept` is out of range or no multiple of `n_groups`; or the scores are not fit.

    Examples
    --------
    >>> from sinfkit.pruning import select_top
    >>> select_top([0.3, 0.1, 0.3, 0.2], 1)
    array([0])
    """
    values = _checked(scores)
    units = _by_unit(values, n_groups)
    if n_kept % n_groups or not n_groups <= n_kept <= len(values):
        raise ValueError(
            f"n_kept must be a multiple of {n_groups} up to {len(values)}, got {n_kept}"
        )
    # A stable sort of the negated scores puts the lower of two tied indices first.
    local = np.sort(removal_order(values, n_groups)[units.shape[1] - n_kept // n_groups :])
    return (np.arange(n_groups)[:, None] * units.shape[1] + local).ravel().astype(np.int64)


def removal_order(scores: ArrayLike, n_groups: int = 1) -> NDArray[np.int64]:
    """The order in which filters go: the lowest scores first, of equal ones the highest index.

    Parameters
    ----------
    scores : array-like of shape (n_filters,)
        As for `select_kept`.
    n_groups : int, default=1
        As for `select_kept`.

    Returns
    -------
    ndarray of shape (n_filters / n_groups,)
        Local indices, int64; `select_top` keeps the last ones.

    Raises
    ------
    ValueError
        As for `select_kept`.

    Examples
    --------
    >>> from sinfkit.pruning import removal_order
    >>> removal_order([0.3, 0.1, 0.3, 0.2])
    array([1, 3, 2, 0])
    """
    units = _by_unit(_checked(scores), n_groups)
    return np.argsort(-units.sum(0), kind="stable")[::-1].astype(np.int64)


def marginal_losses(
    scores: ArrayLike, n_groups: int = 1, cumulative: bool = False
) -> NDArray[np.float64]:
    """What each removal costs, in the order of removal, comparable between layers.

    Parameters
    ----------
    scores : array-like of shape (n_filters,)
        One score per filter, low for the least useful, not negative.
    n_groups : int, default=1
        As for `select_kept`: one entry for each set of filters that go together.
    cumulative : bool, default=False
        Whether a score says what is lost when this filter AND all of lower score are gone, as a
        share of something that layers have in common.  Then the differences are the losses.
        Otherwise the losses are the scores divided by their total: a filter stands for its share
        of the layer.

    Returns
    -------
    ndarray of shape (n_filters / n_groups,)
        Not negative; ascending unless `cumulative`.

    Raises
    ------
    ValueError
        If a score is negative, and for scores that are not fit for `select_kept`.

    Notes
    -----
    A layer whose scores are all zero says nothing about its filters, and each stands for an equal
    share.

    Examples
    --------
    >>> from sinfkit.pruning import marginal_losses
    >>> marginal_losses([3.0, 1.0, 4.0])
    array([0.125, 0.375, 0.5  ])
    >>> marginal_losses([0.25, 0.125, 1.0], cumulative=True)
    array([0.125, 0.125, 0.75 ])
    """
    units = _by_unit(_not_negative(scores), n_groups)
    if not units.any():
        return np.full(units.shape[1], 1.0 / units.shape[1])
    if cumulative:
        # The filters of one set go together, and all say what is lost then.
        return np.diff(np.sort(units.mean(0)), prepend=0.0)
    return np.sort(units.sum(0)) / units.sum()


def widths_within(
    losses: Sequence[NDArray[np.float64]], cost: CostModel, budget: float, max_ratio: float = 0.9
) -> NDArray[np.int64]:
    """Remove the filters that cost least for what they save, until a budget is met.

    Parameters
    ----------
    losses : sequence of ndarray
        For each group of `cost`, what each removal costs, in the order of removal; see
        `marginal_losses`.  Fewer entries than channels: so many channels go with each.
    cost : CostModel
    budget : float
        Fraction of ``cost.base`` that may stay, in (0, 1].
    max_ratio : float, default=0.9
        Largest fraction that any group may lose, in [0, 1); one entry always stays.

    Returns
    -------
    ndarray of shape (n_groups,)
        Channels left in each group, int64: the first widths on the way down that meet the budget,
        so that the last removal is the only one that was not needed in full.

    Raises
    ------
    ValueError
        If `budget` is not in (0, 1].
    OutOfReachError
        A ValueError: if `budget` cannot be met; the message says which `max_ratio` would do.

    Notes
    -----
    One filter after the other goes, that of the smallest loss divided by what its removal saves at
    the widths of that moment; of equal ones, that of the earliest group.  A smaller budget follows
    the same way further.

    Examples
    --------
    >>> import numpy as np
    >>> from sinfkit.pruning import CostModel
    >>> from sinfkit.pruning import widths_within
    >>> outputs, inputs = np.array([[0, 1, 0], [0, 0, 1]]), np.array([[3, 0, 0], [0, 1, 0]])
    >>> cost = CostModel(np.array([4, 4]), 0.0, np.ones(2), outputs, inputs, base=28.0)
    >>> losses = [np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.01, 0.09, 0.4, 0.5])]
    >>> widths_within(losses, cost, 0.75)  # 28 -> 24 -> 18
    array([3, 3])
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1], got {budget!r}.")
    units = np.array([len(loss) for loss in losses], dtype=np.int64)
    steps = cost.widths // np.maximum(units, 1)
    limit = budget * cost.base * (1 + 1e-9)  # rounding must not cost a filter
    caps = _caps(cost.widths, steps, max_ratio)
    least = cost.total(cost.widths - caps * steps)
    if least > limit:
        raise OutOfReachError(_out_of_reach(cost, steps, budget, limit, max_ratio, least))
    removed = np.zeros(len(units), dtype=np.int64)
    following = np.array([loss[0] for loss in losses])
    while cost.total(cost.widths - removed * steps) > limit:
        savings = cost.savings(cost.widths - removed * steps, steps)
        open_ = (removed < caps) & (savings > 0)
        price = np.full(len(units), np.inf)
        np.divide(following, savings, out=price, where=open_)
        best = int(np.argmin(price))
        removed[best] += 1
        if removed[best] < units[best]:
            following[best] = losses[best][removed[best]]
    return cost.widths - removed * steps


def n_above_mean(scores: ArrayLike, factor: float, n_groups: int = 1) -> int:
    """Count the filters whose score exceeds a fraction of the layer's mean.

    Parameters
    ----------
    scores : array-like of shape (n_filters,)
        Not negative, low for the least useful.
    factor : float
        The fraction, not negative.
    n_groups : int, default=1
        As for `select_kept`: sums of scores are compared with their mean.

    Returns
    -------
    int
        At least `n_groups`.

    Raises
    ------
    ValueError
        If a score or the factor is negative.

    Notes
    -----
    The rule of TVSPrune (Murti, Narshana and Bhattacharyya, ICLR 2023): what scores at most
    `factor` times the mean is removed.

    Examples
    --------
    >>> from sinfkit.pruning import n_above_mean
    >>> n_above_mean([1.0, 2.0, 3.0, 6.0], 0.5)  # the mean is 3
    3
    """
    units = _by_unit(_not_negative(scores), n_groups).sum(0)
    if not factor >= 0:
        raise ValueError(f"factor must not be negative, got {factor!r}")
    return n_groups * max(1, int((units > factor * units.mean()).sum()))


def _caps(
    widths: NDArray[np.int64], steps: NDArray[np.int64], max_ratio: float
) -> NDArray[np.int64]:
    """How many steps each group may lose."""
    pairs = zip(widths.tolist(), steps.tolist(), strict=True)
    return np.array([n_removed(max_ratio, n, step) // step for n, step in pairs], dtype=np.int64)


def _out_of_reach(
    cost: CostModel,
    steps: NDArray[np.int64],
    budget: float,
    limit: float,
    max_ratio: float,
    least: float,
) -> str:
    """Say why a budget cannot be met, and what would help."""
    message = (
        f"budget={budget:g} cannot be met: with max_ratio={max_ratio:g} removed from every layer, "
        f"{least / cost.base:.3g} of the cost stays."
    )
    for hundredths in range(int(max_ratio * 100) + 1, 100):
        widths = cost.widths - steps * _caps(cost.widths, steps, hundredths / 100)
        if cost.total(widths) <= limit:
            return f"{message} max_ratio={hundredths / 100} would do."
    return f"{message} No max_ratio is enough; choose a larger budget."


def _checked(scores: ArrayLike) -> NDArray[np.float64]:
    """The scores as a vector of numbers."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"scores must be one-dimensional, got shape {values.shape}")
    if np.isnan(values).any():
        where = np.flatnonzero(np.isnan(values))[:5].tolist()
        raise ValueError(f"scores must not be NaN, but are for filters {where}")
    return values


def _not_negative(scores: ArrayLike) -> NDArray[np.float64]:
    """The scores, if their shares of the total have a meaning."""
    values = _checked(scores)
    if len(values) and not 0 <= values.min() <= values.max() < np.inf:
        raise ValueError(
            f"scores must be finite and not negative for this schedule, but lie between "
            f"{values.min():.3g} and {values.max():.3g}"
        )
    return values


def _by_unit(values: NDArray[np.float64], n_groups: int) -> NDArray[np.float64]:
    """Scores of shape (n_groups, filters per group)."""
    if n_groups < 1 or len(values) == 0 or len(values) % n_groups:
        raise ValueError(
            f"n_groups must divide the number of filters, got {n_groups} and {len(values)} filters"
        )
    return values.reshape(n_groups, -1)


def _check_ratio(name: str, ratio: float) -> None:
    """Raise unless the ratio lies in [0, 1); NaN does not."""
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {ratio}")
