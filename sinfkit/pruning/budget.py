"""How wide each layer may be, so that a whole network keeps to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import isotonic_regression
from torch import Tensor, fx

from ..graph.cost import paired_latency
from ..slicing.groups import ChannelGroup, slice_channels
from .costs import CostModel, network_cost
from .layer_times import fit_layer_times
from .recipe import Recipe, choose_channels
from .schedules import OutOfReachError, marginal_losses, widths_within
from .scoring import Scored

__all__ = ["Budgeted", "budgeted_widths", "shared_widths", "tighten"]

_REPEATS = 15  # rounds of a measurement
_BISECTIONS = 5


@dataclass(frozen=True)
class Budgeted:
    """Channels left in each group, by name, and the network's cost over that of the base."""

    widths: dict[str, int]
    cost_ratio: float


def shared_widths(
    groups: Sequence[ChannelGroup],
    scored: Sequence[Scored],
    cost: CostModel,
    recipe: Recipe,
    budget: float | None = None,
) -> dict[str, int]:
    """One width for each group, for one or several clusters, that keeps to a budget.

    `scored` has one entry for each cluster; `groups` are those of `cost`.  Clusters keep different
    filters but equally many, so that one compiled graph serves all.  What the n-th removal costs is
    the mean over clusters of what each one's own costs; one that makes cheaper ones possible is
    taken together with them (the lower convex hull of `Scored.losses`).
    """
    budget = recipe.budget if budget is None else budget
    if budget is None:
        raise ValueError("schedule='global' needs a budget, the fraction of the cost that stays.")
    losses = [np.mean([_losses(group, one, recipe) for one in scored], axis=0) for group in groups]
    widths = widths_within(losses, cost, budget, recipe.max_ratio)
    return {group.name: int(n) for group, n in zip(groups, widths, strict=True)}


def _losses(group: ChannelGroup, scored: Scored, recipe: Recipe) -> NDArray[np.float64]:
    """Comparable losses of one group, one entry for all channels that have to go together."""
    losses = _each(group, scored, recipe)
    together = recipe.round_to // math.gcd(recipe.round_to, group.n_runs)
    # A layer whose own width is no multiple has no widths to round to.
    return losses if len(losses) % together else losses.reshape(-1, together).sum(1)


def _each(group: ChannelGroup, scored: Scored, recipe: Recipe) -> NDArray[np.float64]:
    """Comparable losses of one group, from scores of one set of classes."""
    try:
        if group.name in scored.losses:
            return isotonic_regression(np.diff(scored.losses[group.name], prepend=0.0))
        if recipe.criterion.cumulative:
            scores = scored.layers[group.name]
            # A group whose readers are unknown was ranked by L1 norm, in shares that add up to 1.
            if abs(scores.sum() - 1) > 1e-9:
                return marginal_losses(scores, group.n_runs, cumulative=True)
        return marginal_losses(scored.groups[group.name], group.n_runs)
    except ValueError as error:
        raise ValueError(f"Layer {group.name!r}: {error}.") from error


def budgeted_widths(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    chosen: Sequence[ChannelGroup],
    scored: Scored,
    recipe: Recipe,
    batch: Tensor,
    others: Mapping[str, np.ndarray],
    budget: float,
) -> Budgeted:
    """Find the widths of one network under a budget; OutOfReachError where there are none.

    `groups` are all of the network's, `chosen` those that may be narrowed, `others` the channels
    kept of other groups, by name.  A latency is measured on the whole of `batch` (n, ...) at once.
    """
    unit = recipe.budget_unit
    times = fit_layer_times(graph, groups, chosen, batch) if unit == "latency" else None
    kept = {name: len(channels) for name, channels in others.items()}
    cost = network_cost(graph, groups, chosen, batch, unit, kept=kept, times=times)
    if unit != "latency":
        widths = shared_widths(chosen, [scored], cost, recipe, budget)
        return Budgeted(widths, cost.total(list(widths.values())) / cost.base)

    def measure(modelled: float) -> float:
        widths = shared_widths(chosen, [scored], cost, recipe, modelled)
        keep = choose_channels(chosen, scored.groups, recipe, widths) | dict(others)
        small = slice_channels(graph, batch[:1], keep, groups=groups).model
        functions: dict[str, Callable[[], Any]] = {
            "base": lambda: graph(batch),
            "small": lambda: small(batch),
        }
        return paired_latency(functions, repeats=_REPEATS).ratio("small", "base")

    modelled, measured = tighten(measure, budget)
    return Budgeted(shared_widths(chosen, [scored], cost, recipe, modelled), measured)


def tighten(
    measure: Callable[[float], float], budget: float, n_bisections: int = _BISECTIONS
) -> tuple[float, float]:
    """Find the largest budget in a model that keeps to a budget in truth.

    `measure` maps the first to the true cost ratio, or raises OutOfReachError.  `budget` is tried
    first; then the interval between too wide and narrow enough is halved, `n_bisections` times.
    Returns the budget in the model, and the true ratio.
    """
    measured = measure(budget)
    if measured <= budget:
        return budget, measured
    low, high = 0.0, budget
    best: tuple[float, float] | None = None
    fastest = measured
    for _ in range(n_bisections):
        modelled = (low + high) / 2
        try:
            measured = measure(modelled)
        except OutOfReachError:
            low = modelled  # no network is so small
            continue
        fastest = min(fastest, measured)
        if measured <= budget:
            low, best = modelled, (modelled, measured)
        else:
            high = modelled
    if best is None:
        raise OutOfReachError(
            f"budget={budget:g} cannot be met: the fastest network that was measured takes "
            f"{fastest:.2f} of the base's time. Choose a larger budget or max_ratio."
        )
    return best
