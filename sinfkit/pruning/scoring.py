"""From samples to a smaller network: score filters, choose, slice, check, repair.

The steps that `DCSPruner` takes once for a whole network, and `SINFClassifier` once per cluster for
the part behind the cut.  Nothing here knows about estimators.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx

from ..criteria.activations import MAX_POOL_SIZE, Statistics, taylor_scores
from ..criteria.brain_surgeon import Consumer, costs_in_order, gather_consumers, norm_gains
from ..criteria.dfpc import gather_couplings
from ..criteria.feature_maps import MAX_IMAGES, STATISTICS, map_statistics
from ..criteria.registry import Criterion, LayerData, get_criterion
from ..graph.cuts import batch_norm_behind
from ..repair.sequential import REPAIRS
from ..slicing.groups import ChannelGroup, check_sliced, slice_channels
from ..utils.params import caller_level, check_choice, check_integer, check_number, naming
from .costs import UNITS
from .schedules import SCHEDULES, n_removed, removal_order, removal_ratios, select_top

__all__ = [
    "Recipe",
    "Scored",
    "choose_channels",
    "group_scores",
    "make_recipe",
    "score_classes",
    "score_layers",
    "sliceable",
]

_LAST_RATIO = 0.5
_LARGEST_RATIO = 0.9  # a budget, not this, shall say how much goes
_CONSUMER_IMAGES = 2_000  # for second moments of what layers read: many positions in each image
_DECOMPOSED = frozenset({"map_rank", "map_independence"})
# Of a group, not of its layers: one of them stands for all.
_PER_GROUP = frozenset({"consumers", "consumer_features", "couplings"})


@dataclass(frozen=True)
class Recipe:
    """How to prune: everything but the network and the samples.

    Attributes
    ----------
    criterion : Criterion
    options : mapping
        Keyword arguments of the criterion (penalty ...), only those that it knows.
    schedule : str
    min_ratio, max_ratio : float
        Fraction of filters removed from the first and the last group.  With ``"global"``
        `max_ratio` is the largest fraction that any group may lose.
    pool_size : int
    repair : str
    budget : float or None
        With ``"global"``: fraction of the base's cost that may stay.
    budget_unit : str
        One of `sinfkit.pruning.UNITS`.
    max_accuracy_drop : float or None
        With ``"iterative"``: accuracy that may be lost on held-out samples.
    round_to : int
        Channels that stay are a multiple of it.
    """

    criterion: Criterion
    schedule: str
    min_ratio: float
    max_ratio: float
    pool_size: int
    repair: str
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None
    budget_unit: str = "macs"
    max_accuracy_drop: float | None = None
    round_to: int = 1

    @property
    def measures_losses(self) -> bool:
        """Whether layers are compared by what their readers lose, which the scores do not say."""
        return self.schedule == "global" and not self.criterion.cumulative


def make_recipe(
    criterion: str | Callable[..., Any],
    schedule: str,
    min_ratio: float,
    max_ratio: float | None,
    pool_size: int,
    repair: str,
    options: Mapping[str, Any],
    budget: float | None = None,
    budget_unit: str = "macs",
    max_accuracy_drop: float | None = None,
    round_to: int = 1,
    *,
    searched: bool = False,
) -> Recipe:
    """Check the pruning parameters and put them together.

    A `max_ratio` of None is 0.9 for the schedule ``"global"`` and 0.5 for the others.  The schedule
    ``"iterative"`` is for callers that give `max_accuracy_drop`; ``"global"`` without a budget for
    those that have one `searched`.

    Raises
    ------
    ValueError
        For an unknown criterion, schedule, repair or unit, a ratio outside [0, 1), `max_ratio`
        below `min_ratio`, a `pool_size` or `round_to` below 1, or a budget that is out of range,
        missing where the schedule needs it, or given where it has no effect.
    """
    found = get_criterion(criterion)
    if max_ratio is None:
        at_once = isinstance(schedule, str) and schedule == "global"
        max_ratio = _LARGEST_RATIO if at_once else _LAST_RATIO
    for name, value in (("min_ratio", min_ratio), ("max_ratio", max_ratio)):
        check_number(name, value, "[0, 1)")
    schedules = (*SCHEDULES, "global", *(("iterative",) if max_accuracy_drop is not None else ()))
    check_choice("schedule", schedule, schedules)
    if max_ratio < min_ratio and schedule in ("linear", "geometric"):
        raise ValueError(f"max_ratio={max_ratio} is below min_ratio={min_ratio}.")
    if schedule == "global" and budget is None and not searched:
        raise ValueError(
            "schedule='global' needs a budget, the fraction of the base's cost that may stay; "
            "got budget=None."
        )
    if schedule != "global" and budget is not None:
        raise ValueError(
            f"budget has an effect with schedule='global' only, got budget={budget!r} with "
            f"schedule={schedule!r}."
        )
    check_number("budget", budget, "(0, 1]", optional=True)
    check_choice("budget_unit", budget_unit, UNITS)
    check_number("max_accuracy_drop", max_accuracy_drop, "[0, 1]", optional=True)
    check_choice("repair", repair, REPAIRS)
    check_integer("pool_size", pool_size, high=MAX_POOL_SIZE)
    check_integer("round_to", round_to)
    if round_to > 1 and schedule == "iterative":
        raise ValueError("round_to has no effect with schedule='iterative'.")
    known = {name: value for name, value in options.items() if name in found.options}
    return Recipe(
        found,
        schedule,
        min_ratio,
        max_ratio,
        int(pool_size),
        repair,
        known,
        budget,
        budget_unit,
        max_accuracy_drop,
        int(round_to),
    )


def check_weighted(recipe: Recipe, weight: np.ndarray) -> None:
    """Raise where samples count differently and the criterion knows only whole ones."""
    if not recipe.criterion.weighted and (weight != 1).any():
        raise ValueError(
            f"criterion {recipe.criterion.name!r} takes no sample_weight. Choose another, fit "
            "without weights, or (a function) say in its attribute `needs` that it uses "
            "'sample_weight'."
        )


def sliceable(
    groups: Sequence[ChannelGroup], within: Iterable[str] | None = None
) -> list[ChannelGroup]:
    """Select the groups that a schedule counts: hidden, can be sliced, wholly inside `within`.

    Parameters
    ----------
    groups : sequence of ChannelGroup
        All groups of the network, in forward order.
    within : iterable of str, optional
        Names of the layers that may lose filters; default all.  A group with a layer, or a
        consumer, outside stays whole: its channels cross the cut.

    Returns
    -------
    list of ChannelGroup
    """
    allowed = None if within is None else set(within)
    chosen = []
    for group in groups:
        if group.is_output or group.n_channels < 2:
            continue
        if allowed is not None and not allowed.issuperset((*group.layers, *group.consumers)):
            continue
        if group.whole:
            continue
        chosen.append(group)
    return chosen


def warn_about_whole(groups: Sequence[ChannelGroup], within: Iterable[str] | None = None) -> None:
    """Name, in one warning, the layers that stay whole because they cannot be sliced."""
    allowed = None if within is None else set(within)
    reasons = [
        f"{group.name} ({group.whole})"
        for group in groups
        if group.whole
        and not group.is_output
        and (allowed is None or allowed.intersection(group.layers))
    ]
    if reasons:
        warnings.warn(
            "Some layers cannot be sliced and stay whole: " + "; ".join(reasons) + ".",
            UserWarning,
            stacklevel=caller_level(),
        )


def score_layers(
    graph: fx.GraphModule,
    layers: Sequence[str],
    features: Mapping[str, Tensor],
    y: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    collected: Mapping[str, Mapping[str, Any]] | None = None,
    runs: Mapping[str, int] | None = None,
    sample_weight: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """Score every filter of every layer.

    Parameters
    ----------
    graph : GraphModule
        Supplies the weights.
    layers : sequence of str
    features : mapping of str to Tensor of shape (n_samples, n_channels * pool_size ** 2)
        Pooled activations of each layer on the samples of the classes in question.
    y : int Tensor of shape (n_samples,)
        Their classes, 0..k-1.
    recipe : Recipe
    seed : int
        Seed of the criterion's generator (``"random"``).
    collected : mapping of str to mapping, optional
        By layer, further fields of its `LayerData`.
    runs : mapping of str to int, optional
        `ChannelGroup.n_groups` of each layer; default 1.
    sample_weight : Tensor of shape (n_samples,), optional
        How many times each sample counts. Default: once.

    Returns
    -------
    dict of str to ndarray of shape (n_channels,)
        Low scores go first.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = dict(graph.named_modules())
    norms, gains = batch_norm_behind(graph), norm_gains(graph)
    n_classes = int(y.max()) + 1 if len(y) else 0
    scores = {}
    for layer in layers:
        weight = modules[layer].weight.detach()
        n_channels = len(weight)
        norm = norms.get(layer)
        pooled = features.get(layer)
        data = LayerData(
            name=layer,
            features=None if pooled is None else pooled.reshape(len(pooled), n_channels, -1),
            y=y,
            sample_weight=sample_weight,
            weight=weight,
            norm_scale=None if norm is None else modules[norm].weight,  # None without scales
            norm_gain=gains.get(layer, torch.ones(n_channels, dtype=torch.float64)),
            n_groups=1 if runs is None else runs[layer],
            n_classes=n_classes,
            generator=generator,
            **({} if collected is None else collected.get(layer, {})),
        )
        given = recipe.criterion.function(data, **recipe.options)
        if not isinstance(given, (Tensor, np.ndarray, list, tuple)):
            raise TypeError(
                f"The criterion returned {type(given).__name__} for layer {layer!r}; one score for "
                f"each of its {n_channels} filters is needed."
            )
        with naming("criterion"):
            try:
                score = torch.as_tensor(given).detach().cpu().to(torch.float64)
            except RuntimeError as error:
                raise TypeError(f"The scores of layer {layer!r} are no numbers: {error}") from error
        if score.shape != (n_channels,):
            raise ValueError(
                f"The criterion returned shape {tuple(score.shape)} for layer {layer!r}; one score "
                f"for each of its {n_channels} filters is needed."
            )
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"The criterion gave NaN or infinity for a filter of layer {layer!r}.")
        scores[layer] = score.numpy()
    return scores


def group_scores(
    groups: Sequence[ChannelGroup], scores: Mapping[str, np.ndarray], nodes: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Give each group the mean of its layers' normalised scores.

    Layers whose activation is the same tensor (both operands of a residual sum) count once.

    Parameters
    ----------
    groups : sequence of ChannelGroup
    scores : mapping of str to ndarray of shape (n_channels,)
        By layer.
    nodes : mapping of str to str
        The graph node at which each layer is observed.

    Returns
    -------
    dict of str to ndarray of shape (n_channels,)
        By group name.
    """
    joined = {}
    for group in groups:
        by_node: dict[str, list[np.ndarray]] = {}
        for layer in group.layers:
            if layer in scores:
                total = np.abs(scores[layer]).sum()
                normal = scores[layer] / total if total > 0 else scores[layer]
                by_node.setdefault(nodes.get(layer, layer), []).append(normal)
        joined[group.name] = np.mean([np.mean(s, axis=0) for s in by_node.values()], axis=0)
    return joined


def choose_channels(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, np.ndarray],
    recipe: Recipe,
    widths: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Apply the schedule: which channels of each group stay.

    Parameters
    ----------
    groups : sequence of ChannelGroup
        In forward order; the schedule counts them.
    scores : mapping of str to ndarray of shape (n_channels,)
        By group name.
    recipe : Recipe
    widths : mapping of str to int, optional
        How many channels of each group stay, by group name, where the schedule is not a function
        of depth; for ``"global"`` see `sinfkit.pruning.shared_widths`.

    Returns
    -------
    dict of str to int ndarray
        Sorted indices of the channels kept, by group name.

    Raises
    ------
    ValueError
        If the schedule needs `widths` and there are none.
    """
    if widths is not None:
        return {g.name: select_top(scores[g.name], widths[g.name], g.n_groups) for g in groups}
    if recipe.schedule not in SCHEDULES:
        raise ValueError(
            f"schedule={recipe.schedule!r} cannot be used here; choose one of {tuple(SCHEDULES)}."
        )
    ratios = removal_ratios(len(groups), recipe.schedule, recipe.min_ratio, recipe.max_ratio)
    keep = {}
    for group, ratio in zip(groups, ratios, strict=True):
        n_kept = group.n_channels - n_removed(float(ratio), group.n_channels, group.n_groups)
        # Upwards: more than the ratio asks for never goes.
        multiple = math.lcm(recipe.round_to, group.n_groups)
        n_kept = min(-(-n_kept // multiple) * multiple, group.n_channels)
        keep[group.name] = select_top(scores[group.name], n_kept, group.n_groups)
    return keep


@dataclass(frozen=True)
class Scored:
    """Filter scores of one set of classes.

    Attributes
    ----------
    layers, groups : dict of str to ndarray of shape (n_channels,)
        Scores by layer, and by name of the group.
    losses : dict of str to ndarray of shape (n_units,)
        Where layers are compared by them, by name of the group: what is lost when so many channels
        have gone, those of the lowest score first; see `sinfkit.criteria.costs_in_order`.  A group
        whose readers are not known has none.
    """

    layers: dict[str, np.ndarray]
    groups: dict[str, np.ndarray]
    losses: dict[str, np.ndarray] = field(default_factory=dict)


def score_classes(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    nodes: Mapping[str, str],
    statistics: Statistics,
    index: np.ndarray,
    y: np.ndarray,
    recipe: Recipe,
    *,
    outputs: Sequence[int],
    batches: Callable[[np.ndarray], Iterable[Tensor]],
    seed: int,
    weight: np.ndarray | None = None,
) -> Scored:
    """Score filters for one set of classes.

    Parameters
    ----------
    graph : GraphModule
    groups : sequence of ChannelGroup
        Those to score.
    nodes : mapping of str to str
        Where each layer is observed.
    statistics : Statistics
        Pooled activations of all samples.
    index : int ndarray
        The samples of these classes.
    y : int ndarray of the same length
        Their classes, 0..k-1.
    recipe : Recipe
    outputs : sequence of int
        The network's outputs for the classes 0..k-1.
    batches : callable
        Normalised batches of the samples with the given indices.
    seed : int
    weight : ndarray of shape (n_samples,), optional
        How many times each of the samples `index` counts. Default: once.

    Returns
    -------
    Scored
    """
    needs = recipe.criterion.needs
    sample_weight = None if weight is None else torch.as_tensor(weight)
    layers = [layer for group in groups for layer in group.layers]
    rows = torch.as_tensor(index)
    features = {
        layer: statistics.pooled[layer][rows]
        for layer in layers
        if "features" in needs and layer in statistics.pooled
    }
    collected = _collect(
        graph,
        groups,
        nodes,
        index,
        y,
        needs,
        outputs=outputs,
        batches=batches,
        seed=seed,
        weight=sample_weight,
    )
    if "consumer_features" in needs:
        pooled = statistics.pooled
        for group in groups:
            # Of these groups only: what else was observed must not matter.
            names = set(group.consumers).intersection(layers, pooled)
            observed = {name: pooled[name][rows] for name in names}
            collected[group.name]["consumer_features"] = observed
    if needs & _PER_GROUP:
        layers = [group.name for group in groups]
    by_layer = score_layers(
        graph,
        layers,
        features,
        torch.as_tensor(y),
        recipe,
        seed=seed,
        collected=collected,
        runs={layer: group.n_groups for group in groups for layer in group.layers},
        sample_weight=sample_weight,
    )
    for group in groups:
        by_layer |= {layer: by_layer.get(layer, by_layer[group.name]) for layer in group.layers}
    by_group, losses = group_scores(groups, by_layer, nodes), {}
    if recipe.measures_losses:
        readers = _consumers(graph, groups, index, outputs, batches, seed, sample_weight)
        losses = {
            group.name: costs_in_order(
                readers[group.name], removal_order(by_group[group.name], group.n_groups)
            )
            for group in groups
            if readers[group.name]
        }
    return Scored(by_layer, by_group, losses)


def _consumers(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    index: np.ndarray,
    outputs: Sequence[int],
    batches: Callable[[np.ndarray], Iterable[Tensor]],
    seed: int,
    weight: Tensor | None,
) -> dict[str, list[Consumer]]:
    """The layers that read the groups, with second moments from some of the samples."""
    sample, counts = _drawn(_CONSUMER_IMAGES, index, seed, weight)
    return gather_consumers(
        graph,
        groups,
        batches(sample),
        n_images=len(sample),
        outputs=outputs,
        seed=seed,
        sample_weight=counts,
    )


def _drawn(
    n: int, index: np.ndarray, seed: int, weight: Tensor | None
) -> tuple[np.ndarray, Tensor | None]:
    """At most so many of the samples, and their weights."""
    order = np.random.default_rng(seed).permutation(len(index))[:n]
    return index[order], None if weight is None else weight[torch.as_tensor(order)]


def _collect(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    nodes: Mapping[str, str],
    index: np.ndarray,
    y: np.ndarray,
    needs: Collection[str],
    *,
    outputs: Sequence[int],
    batches: Callable[[np.ndarray], Iterable[Tensor]],
    seed: int,
    weight: Tensor | None = None,
) -> dict[str, dict[str, Any]]:
    """Gather what a criterion needs beside features and weights: fields of `LayerData` by layer."""
    layers = [layer for group in groups for layer in group.layers]
    collected: dict[str, dict[str, Any]] = {layer: {} for layer in layers}

    def places() -> dict[str, str]:
        return {layer: nodes[layer] for layer in layers}

    for name, power in (("taylor", 1), ("taylor_squared", 2)):
        if name in needs:
            labelled = _labelled(batches(index), torch.as_tensor(y))
            scores = taylor_scores(
                graph, labelled, places(), list(outputs), power=power, sample_weight=weight
            )
            for layer, score in scores.items():
                collected[layer][name] = score
    wanted = [name for name in STATISTICS if name in needs]
    if wanted or "map_range" in needs:
        # Zeros are cheap to count; what takes decompositions is taken of some images.
        decomposed = _DECOMPOSED.intersection(wanted)
        sample, counts = _drawn(MAX_IMAGES, index, seed, weight) if decomposed else (index, weight)
        for layer, found in map_statistics(
            graph, batches(sample), places(), wanted, counts
        ).items():
            collected[layer] |= found
    if "consumers" in needs:
        consumers = _consumers(graph, groups, index, outputs, batches, seed, weight)
        for group in groups:
            collected[group.name]["consumers"] = tuple(consumers[group.name])
    if "couplings" in needs:
        example = next(iter(batches(index[:1])))
        for name, couplings in gather_couplings(graph, groups, example).items():
            collected[name]["couplings"] = couplings
    return collected


def _labelled(batches: Iterable[Tensor], y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair each batch with its labels."""
    start = 0
    for x in batches:
        yield x, y[start : start + len(x)].to(x.device)
        start += len(x)


def extract(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    keep: Mapping[str, np.ndarray],
    samples: Tensor,
    outputs: Sequence[int] | None = None,
) -> tuple[fx.GraphModule, dict[str, np.ndarray]]:
    """Slice a copy of the network and check it against the masked one.

    Parameters
    ----------
    graph : GraphModule
        The dense network; it is not changed.
    groups : sequence of ChannelGroup
        All groups of the network.
    keep : mapping of str to int ndarray
        Channels kept, by group name; the output layer's group keeps the rows of the classes.
    samples : Tensor of shape (n, ...)
        Real samples, normalised, for the check.
    outputs : sequence of int, optional
        The network's outputs that were kept.

    Returns
    -------
    small : GraphModule
        The sliced network.
    support : dict of str to int ndarray
        Output channels kept, by layer.

    Raises
    ------
    SlicingError
        If the sliced network answers differently from the masked one.
    """
    sliced = slice_channels(graph, samples[:1], keep, groups=groups)
    check_sliced(graph, sliced, samples, keep_outputs=outputs)
    # A graph goes in, so a graph comes out.
    return cast(fx.GraphModule, sliced.model), sliced.support
