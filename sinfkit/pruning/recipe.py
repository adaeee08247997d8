"""How to prune: what few users set, how much each layer loses, and which of its channels stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from torch import Tensor, fx

from ..criteria.activations import MAX_POOL_SIZE
from ..criteria.registry import Criterion, get_criterion
from ..errors import OutOfReachError
from ..repair.distillation import Distillation
from ..repair.sequential import REPAIRS
from ..slicing.groups import ChannelGroup, Sliced, check_sliced, slice_channels
from ..utils.params import check_choice, check_flag, check_integer, check_number


class PruningOptions(BaseEstimator):
    """What few users of `DCSPruner` need to set.

    Parameters
    ----------
    budget_unit : {"macs", "params", "latency"}, default="macs"
        With ``schedule="global"``, what a budget counts: multiply-accumulates, parameters, or time,
        measured on this machine with `batch_size` samples at a time.  Measured times are noisy.
    round_to : int or "auto", default=1
        The number of filters that stay in a layer is a multiple of it, rounded up: odd widths can
        be slow.  With ``schedule="global"`` layers whose own width is no multiple
        are left as they come; ``schedule="iterative"`` does not round.  ``"auto"``: with
        ``schedule="global"`` the largest of 16, 8 and 4 that divides the layer's width and is at
        most an eighth of it (4: a quarter), where the budget allows it; otherwise 1.
    first_layer : str, optional
        Layers before it stay whole.
    drop_blocks : bool, default=True
        With ``schedule="global"``, whether whole residual branches may be left out as well, where
        that loses less than filters do: networks become less deep, and faster for a single sample.
    max_ratio : float, optional
        With ``schedule="global"``, the largest share of its filters that any layer may lose, in
        [0, 1).  Default: 0.9, and 0.95 where the budget is searched.
    penalty : float, default=3.0
        Ridge penalty of the probe behind DCS.
    pool_size : int, default=1
        Activations are averaged to ``pool_size x pool_size`` before they are scored.
    repair_samples : int, default=4000
        At most so many of the samples are used for the repair (drawn with `random_state`); every
        sample is scored.  Fewer where one layer's activations of all would exceed 2 GiB, and in
        early layers where those of base and smaller network would exceed 1 GiB.
    validation_fraction : float, default=0.2
        Share of the samples of each class, in [0, 1), that is held out to see what accuracy is
        lost.  0: none, then nothing is said about it; with a search or ``schedule="iterative"`` an
        error.  A search holds out up to half of the samples, where fewer can certify nothing.
    n_jobs : int, optional
        Inside ``joblib.parallel_config`` with a backend of processes: workers that predict chunks
        of `X`.  ``fit`` is one job.
    memory : str, joblib.Memory or None
        Where to cache the activations' statistics and the filters' scores between fits.
    allow_unsliceable : bool, default=False
        Whether to go on where less than 5 % of the multiplications can be sliced.

    Examples
    --------
    >>> from sinfkit import DCSPruner, PruningOptions
    >>> DCSPruner(budget=0.5, options=PruningOptions(round_to=8))
    DCSPruner(budget=0.5, options=PruningOptions(round_to=8))
    """

    def __init__(
        self,
        *,
        budget_unit: Literal["macs", "params", "latency"] = "macs",
        round_to: int | Literal["auto"] = 1,
        first_layer: str | None = None,
        drop_blocks: bool = True,
        max_ratio: float | None = None,
        penalty: float = 3.0,
        pool_size: int = 1,
        repair_samples: int = 4000,
        validation_fraction: float = 0.2,
        n_jobs: int | None = None,
        memory: Any = None,
        allow_unsliceable: bool = False,
    ) -> None:
        self.budget_unit = budget_unit
        self.round_to = round_to
        self.first_layer = first_layer
        self.drop_blocks = drop_blocks
        self.max_ratio = max_ratio
        self.penalty = penalty
        self.pool_size = pool_size
        self.repair_samples = repair_samples
        self.validation_fraction = validation_fraction
        self.n_jobs = n_jobs
        self.memory = memory
        self.allow_unsliceable = allow_unsliceable


if TYPE_CHECKING:
    from .costs import CostModel


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
    r"""Share of the filters to remove from each of `n_layers`, in forward order; shape (n_layers,).

    With the relative depth :math:`t` from 0 to 1, ``"linear"`` is :math:`r_M + (r_L - r_M) t`,
    ``"geometric"`` interpolates what is kept, :math:`(1 - r_M) ((1 - r_L) / (1 - r_M))^t`, and
    ``"uniform"`` is `max_ratio` everywhere; a single layer loses `max_ratio`.  That more is removed
    from later layers is stated by the paper (arXiv:2310.01259); the formulas are our choice.
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
    """Filters that a layer of `n` loses: ``floor(ratio * n + 1e-9)``, and at least one stays.

    Rounded down to a `multiple`, of which one stays, where a grouped convolution asks for it.
    """
    _check_ratio("ratio", ratio)
    if n < 1:
        raise ValueError(f"a layer has at least one filter, got n={n}")
    if multiple < 1 or n % multiple:
        raise ValueError(f"multiple must divide the number of filters, got {multiple} and n={n}")
    # 0.29 * 100 is 28.999999999999996 in floating point, and 29 filters are meant.
    count = int(np.floor(ratio * n + 1e-9))
    return min(count - count % multiple, n - multiple)


def select_top(scores: ArrayLike, n_kept: int, n_groups: int = 1) -> NDArray[np.int64]:
    """Sorted indices, int64, of the `n_kept` filters of the highest scores, shape (n_filters,).

    Of equal scores, the one with the higher index goes first.  In a group of several equal runs,
    all lose the same local indices, which are ranked by their sum of scores.
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
    """Local indices in the order in which they go; `select_top` keeps the last ones."""
    units = _by_unit(_checked(scores), n_groups)
    return np.argsort(-units.sum(0), kind="stable")[::-1].astype(np.int64)


def marginal_losses(
    scores: ArrayLike, n_groups: int = 1, cumulative: bool = False
) -> NDArray[np.float64]:
    """What each removal costs, in the order of removal, comparable between layers.

    Shares of the scores' total; or, where a score is `cumulative` (it says what is lost when this
    filter AND all of lower score are gone), the differences.  One entry for each set of filters
    that go together.  Scores that are all zero say nothing, and all filters count alike.
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

    `losses` are those of `marginal_losses` for each group of `cost`; of none goes more than
    `max_ratio`.  Returns the channels left, int64 of shape (n_groups,): a smaller budget follows
    the same way further.  OutOfReachError, which says what `max_ratio` would do, if there are none.
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
    """Count the filters whose score exceeds `factor` times the layer's mean; at least `n_groups`.

    The rule of TVSPrune (Murti, Narshana and Bhattacharyya, ICLR 2023).
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


UNITS = ("macs", "params", "latency")
"""What a budget may be counted in."""
Schedule = Literal["global", "linear", "geometric", "uniform", "iterative"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to prune: everything but the network and the samples; checked when it is made."""

    criterion: Any
    schedule: Schedule = "global"
    pruning_ratios: tuple[float, float] = (0.1, 0.5)
    budget: float | None = None
    budget_unit: Literal["macs", "params", "latency"] = "macs"
    max_ratio: float = 0.9  # a budget, not this, shall say how much goes
    round_to: int | Literal["auto"] = 1
    drop_blocks: bool = True
    penalty: float = 3.0
    pool_size: int = 1
    repair: str = "least_squares"
    repair_samples: int = 4000
    distill: Distillation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "criterion", get_criterion(self.criterion))
        check_choice("schedule", self.schedule, get_args(Schedule))
        object.__setattr__(self, "pruning_ratios", _ratios(self.pruning_ratios))
        first, last = self.pruning_ratios
        if last < first and self.schedule in ("linear", "geometric"):
            raise ValueError(
                f"pruning_ratios must not fall from the first to the last layer, got "
                f"{self.pruning_ratios!r}."
            )
        check_number("budget", self.budget, "(0, 1]", optional=True)
        if self.schedule != "global" and self.budget is not None:
            raise ValueError(
                f"budget has an effect with schedule='global' only, got budget={self.budget!r} "
                f"with schedule={self.schedule!r}."
            )
        check_choice("budget_unit", self.budget_unit, UNITS)
        check_number("max_ratio", self.max_ratio, "[0, 1)")
        if isinstance(self.round_to, str):
            check_choice("round_to", self.round_to, ("auto",))
        else:
            check_integer("round_to", self.round_to)
        if self.round_to not in (1, "auto") and self.schedule == "iterative":
            raise ValueError("round_to has no effect with schedule='iterative'.")
        check_flag("drop_blocks", self.drop_blocks)
        check_number("penalty", self.penalty, "(0, inf)")
        check_integer("pool_size", self.pool_size, high=MAX_POOL_SIZE)
        check_choice("repair", self.repair, REPAIRS)
        check_integer("repair_samples", self.repair_samples)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the criterion, of those that it knows."""
        scorer: Criterion = self.criterion
        return {"penalty": self.penalty} if "penalty" in scorer.options else {}

    @property
    def searches(self) -> bool:
        """Whether the size is to be searched."""
        return self.schedule == "global" and self.budget is None

    @property
    def measures_losses(self) -> bool:
        """Whether layers are compared by what their consumers lose, which no score says."""
        return self.schedule == "global" and not self.criterion.cumulative

    def check_weights(self, weight: np.ndarray) -> None:
        """Raise where samples count differently and the criterion knows only whole ones."""
        if not self.criterion.weighted and (weight != 1).any():
            raise ValueError(
                f"criterion {self.criterion.name!r} takes no sample_weight. Choose another, fit "
                "without weights, or (a function) say in its attribute `needs` that it uses "
                "'sample_weight'."
            )


def _ratios(value: Any) -> tuple[float, float]:
    """Two ratios in [0, 1), or a ValueError that says what is wrong with them."""
    try:
        first, last = value
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"pruning_ratios must be two numbers, for the first and the last layer; got {value!r}."
        ) from error
    for ratio in (first, last):
        check_number("pruning_ratios", ratio, "[0, 1)")
    return float(first), float(last)


def sliceable(
    groups: Sequence[ChannelGroup], within: Iterable[str] | None = None
) -> list[ChannelGroup]:
    """Select the groups that a schedule counts: hidden, can be sliced, wholly inside `within`.

    A group with a layer, or a consumer, outside stays whole: its channels cross the border.
    """
    allowed = None if within is None else set(within)
    return [
        group
        for group in groups
        if not (group.is_output or group.n_channels < 2 or group.reason_unsliceable)
        and (allowed is None or allowed.issuperset((*group.layers, *group.consumers)))
    ]


def choose_channels(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, np.ndarray],
    recipe: Recipe,
    widths: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Apply the schedule: the sorted channels of each group that stay, by group name.

    `groups` are in forward order; `scores`, of shape (n_channels,) each, and `widths` go by group
    name.  Widths say how many stay where the schedule is not a function of depth.
    """
    if widths is not None:
        return {g.name: _select(g, scores[g.name], widths[g.name]) for g in groups}
    if recipe.schedule not in SCHEDULES:
        raise ValueError(
            f"schedule={recipe.schedule!r} cannot be used here; choose one of {tuple(SCHEDULES)}."
        )
    ratios = removal_ratios(len(groups), recipe.schedule, *recipe.pruning_ratios)
    keep = {}
    for group, ratio in zip(groups, ratios, strict=True):
        n_kept = group.n_channels - n_removed(float(ratio), group.n_channels, group.n_runs)
        # Upwards: more than the ratio asks for never goes.
        rounded = 1 if isinstance(recipe.round_to, str) else recipe.round_to
        multiple = math.lcm(rounded, group.n_runs)
        n_kept = min(-(-n_kept // multiple) * multiple, group.n_channels)
        keep[group.name] = _select(group, scores[group.name], n_kept)
    return keep


def _select(group: ChannelGroup, scores: np.ndarray, n_kept: int) -> np.ndarray:
    """The best channels of a group; at least one of each part of it that a layer takes alone."""
    kept = group.with_every_part(select_top(scores, n_kept, group.n_runs))
    run = group.n_channels // group.n_runs
    for local in removal_order(scores, group.n_runs):  # no more than were asked for, if that can be
        if len(kept) <= n_kept:
            break
        fewer = np.setdiff1d(kept, np.arange(local, group.n_channels, run))
        if len(group.with_every_part(fewer)) == len(fewer):
            kept = fewer
    return kept


def extract(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    keep: Mapping[str, np.ndarray],
    samples: Tensor,
    outputs: Sequence[int] | None = None,
) -> Sliced:
    """Slice a copy of the network, and check it against the masked one on real samples.

    `groups` are all of the network's; `keep` has channels by group name, those of the output
    layer's group being `outputs`.  Raises SlicingError where they differ.
    """
    sliced = slice_channels(graph, samples[:1], keep, groups=groups)
    check_sliced(graph, sliced, samples, keep_outputs=outputs)
    return sliced
