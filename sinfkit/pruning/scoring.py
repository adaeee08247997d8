"""Score filters for sets of classes; found again in the cache of the next fit."""

from __future__ import annotations

import functools
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from joblib import Memory
from sklearn.utils.validation import check_memory
from torch import Tensor, fx

from ..criteria.activations import Statistics, collect, taylor_scores
from ..criteria.brain_surgeon import Consumer, costs_in_order, gather_consumers
from ..criteria.feature_maps import MAX_IMAGES, STATISTICS, map_statistics
from ..criteria.registry import CRITERIA, Criterion, LayerData
from ..data.calibration import Calibration
from ..graph.cuts import batch_norm_behind, observation_nodes
from ..slicing.groups import ChannelGroup
from ..utils.jobs import Rows
from .recipe import Recipe, removal_order

__all__ = ["ClassSamples", "Scored", "gather", "group_scores", "score", "score_classes", "selected"]

_CONSUMER_IMAGES = 2_000  # for second moments of what layers read: many positions in each image
_DECOMPOSED = frozenset({"map_rank", "map_independence"})
# Fields of a group, not of its layers: one of them stands for all.
_PER_GROUP = frozenset({"consumers", "consumer_features"})


@dataclass(frozen=True)
class Scored:
    """Filter scores of one set of classes, low for those that go first.

    `layers` and `groups` have shape (n_channels,), by layer and by name of the group.  `losses`, of
    shape (n_units,) and by group, are there where layers are compared by them: what is lost when so
    many have gone, see `sinfkit.criteria.costs_in_order`; not for groups of unknown consumers.
    """

    layers: dict[str, np.ndarray]
    groups: dict[str, np.ndarray]
    losses: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassSamples:
    """The samples of one set of classes, for criteria: n of them, in one order throughout.

    Shapes: `y` (n,), `pooled` (n, n_channels * pool_size ** 2), `weight` (n,).
    """

    y: np.ndarray
    outputs: Sequence[int]
    pooled: Mapping[str, Tensor]
    batches: Callable[[np.ndarray], Iterable[Tensor]]
    weight: Tensor
    seed: int = 0

    def drawn(self, n: int) -> tuple[np.ndarray, Tensor]:
        """Rows of at most `n` samples, and their weights."""
        rows = np.random.default_rng(self.seed).permutation(len(self.y))[:n]
        return rows, self.weight[torch.as_tensor(rows)]

    def labelled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches, each with its classes."""
        y, start = torch.as_tensor(self.y), 0
        for x in self.batches(np.arange(len(self.y))):
            yield x, y[start : start + len(x)].to(x.device)
            start += len(x)


def score_classes(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    samples: ClassSamples,
    recipe: Recipe,
    losses: bool | None = None,
) -> Scored:
    """Score the filters of some groups: the criterion is called with the record of each layer.

    `losses` says whether it is measured what consumers lose; by default as the recipe has it.
    """
    needs, options = recipe.criterion.needs, recipe.options
    losses = recipe.measures_losses if losses is None else losses
    nodes = observation_nodes(graph, [layer for group in groups for layer in group.layers])
    collected = _collected(graph, groups, nodes, samples, needs)
    consumers: dict[str, list[Consumer]] = {}
    if losses or "consumers" in needs:  # one pass serves both
        rows, counts = samples.drawn(_CONSUMER_IMAGES)
        consumers = gather_consumers(
            graph,
            groups,
            samples.batches(rows),
            n_images=len(rows),
            outputs=samples.outputs,
            seed=samples.seed,
            sample_weight=counts,
        )
    if "consumers" in needs:
        for name, found in consumers.items():
            collected[name]["consumers"] = tuple(found)
    record = _records(graph, groups, samples, needs, collected)
    by_layer: dict[str, np.ndarray] = {}
    for group in groups:
        layers = group.layers[:1] if needs & _PER_GROUP else group.layers
        by_layer |= {layer: recipe.criterion(record(layer), **options) for layer in layers}
        by_layer |= {layer: by_layer[group.name] for layer in group.layers if layer not in by_layer}
    by_group, lost = group_scores(groups, by_layer, nodes), {}
    if losses:
        lost = {
            group.name: costs_in_order(
                consumers[group.name], removal_order(by_group[group.name], group.n_runs)
            )
            for group in groups
            if consumers[group.name]
        }
    return Scored(by_layer, by_group, lost)


def group_scores(
    groups: Sequence[ChannelGroup], scores: Mapping[str, np.ndarray], nodes: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Give each group the mean of its layers' normalised scores, of shape (n_channels,).

    Layers that are observed at the same node (both operands of a residual sum) count once.
    """
    joined = {}
    for group in groups:
        by_node: dict[str, list[np.ndarray]] = {}
        for layer in group.layers:
            total = np.abs(scores[layer]).sum()
            normal = scores[layer] / total if total > 0 else scores[layer]
            by_node.setdefault(nodes.get(layer, layer), []).append(normal)
        joined[group.name] = np.mean([np.mean(s, axis=0) for s in by_node.values()], axis=0)
    return joined


def _records(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    samples: ClassSamples,
    needs: frozenset[str],
    collected: Mapping[str, Mapping[str, Any]],
) -> Callable[[str], LayerData]:
    """What makes the record of a layer from all that a pass has collected."""
    n_groups = {layer: group.n_runs for group in groups for layer in group.layers}
    modules = dict(graph.named_modules())
    norms = batch_norm_behind(graph)
    generator = torch.Generator().manual_seed(samples.seed)

    def record(layer: str) -> LayerData:
        weight = modules[layer].weight.detach()
        n_channels, norm = len(weight), norms.get(layer)
        pooled = samples.pooled.get(layer) if "features" in needs else None
        return LayerData(
            name=layer,
            features=None if pooled is None else pooled.reshape(len(pooled), n_channels, -1),
            y=torch.as_tensor(samples.y),
            sample_weight=samples.weight,
            weight=weight,
            norm_scale=None if norm is None else modules[norm].weight,  # None without scales
            n_groups=n_groups[layer],
            n_classes=int(samples.y.max()) + 1 if len(samples.y) else 0,
            generator=generator,
            **collected[layer],
        )

    return record


def _collected(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    nodes: Mapping[str, str],
    samples: ClassSamples,
    needs: frozenset[str],
) -> dict[str, dict[str, Any]]:
    """Gather what a criterion needs beside features and weights: fields of the record by layer."""
    layers = [layer for group in groups for layer in group.layers]
    found: dict[str, dict[str, Any]] = {layer: {} for layer in layers}
    if "taylor" in needs:
        outputs, labelled = list(samples.outputs), samples.labelled()
        scores = taylor_scores(graph, labelled, nodes, outputs, sample_weight=samples.weight)
        for layer, values in scores.items():
            found[layer]["taylor"] = values
    wanted = [name for name in STATISTICS if name in needs]
    if wanted or "map_range" in needs:
        # Zeros are cheap to count; what takes decompositions is taken of some images.
        rows, counts = np.arange(len(samples.y)), samples.weight
        if _DECOMPOSED.intersection(wanted):
            rows, counts = samples.drawn(MAX_IMAGES)
        maps = map_statistics(graph, samples.batches(rows), nodes, wanted, counts)
        for layer, means in maps.items():
            found[layer] |= means
    if "consumer_features" in needs:
        for group in groups:
            # Of these groups only: what else was observed must not matter.
            names = set(group.consumers).intersection(layers, samples.pooled)
            observed = {name: samples.pooled[name] for name in names}
            found[group.name]["consumer_features"] = observed
    return found


def gather(
    calibration: Calibration,
    nodes: dict[str, str],
    pool_size: int | dict[str, int],
    memory: Any,
) -> Statistics:
    """Collect the statistics of all samples in one pass, or find them in the cache."""
    if not _stores(memory):
        return _gather(None, calibration, nodes, pool_size)
    cached = check_memory(memory).cache(_gather, ignore=["calibration"])
    return _call(cached, calibration.key, calibration, nodes, pool_size)


def _stores(memory: Any) -> bool:
    """Whether a cache keeps anything; if not, keys, for which samples are hashed, are spared."""
    memory = check_memory(memory)
    return not (isinstance(memory, Memory) and memory.location is None)


def _gather(
    key: tuple[Any, ...] | None,
    calibration: Calibration,
    nodes: dict[str, str],
    pool_size: int | dict[str, int],
) -> Statistics:
    """One pass over all samples; `key` stands, in a cache, for what cannot be hashed."""
    return collect(calibration.graph, calibration.batcher(calibration.X), nodes, pool_size)


def score(
    calibration: Calibration,
    groups: Sequence[ChannelGroup],
    statistics: Statistics,
    index: np.ndarray,
    classes: np.ndarray,
    recipe: Recipe,
    memory: Any,
    rows: Rows | None = None,
    losses: bool | None = None,
) -> Scored:
    """Score filters for a set of classes, or find the scores in the cache.

    `statistics` come from `gather`, `index` are the samples of `classes` (ascending positions in
    ``calibration.table.classes``), `rows` hold the samples where `calibration` is without them.  Of
    the recipe, ratios, budget and repair do not matter.  `losses` is as in `score_classes`.
    """
    losses = recipe.measures_losses if losses is None else losses
    criterion: Criterion = recipe.criterion
    names = {name for group in groups for name in group.layers}
    observes = criterion.needs & {"features", "consumer_features"}
    wanted = names.intersection(statistics.pooled) if observes else ()
    rows_of = torch.as_tensor(index)
    batches = functools.partial(calibration.batcher, calibration.X if rows is None else rows)
    samples = ClassSamples(
        y=np.searchsorted(classes, calibration.y_encoded[index]),
        outputs=calibration.table.outputs[classes].tolist(),
        pooled={name: statistics.pooled[name][rows_of] for name in wanted},
        batches=lambda chosen: batches(index[chosen]),
        weight=torch.as_tensor(calibration.weight[index]),
        seed=calibration.seed,
    )
    # A function of the user's may depend on what no cache can see.
    if CRITERIA.get(criterion.name) is not criterion or not _stores(memory):
        return score_classes(calibration.graph, groups, samples, recipe, losses)
    key: tuple[Any, ...] = (
        *calibration.key,
        criterion.name,
        losses,
        sorted(recipe.options.items()),
        recipe.pool_size,
        calibration.seed,
        [group.name for group in groups],
        index,
        calibration.y_encoded[index],
        calibration.table.outputs[classes],
        calibration.weight[index],
    )
    ignore = ["graph", "groups", "samples", "recipe", "losses"]
    cached = check_memory(memory).cache(_score, ignore=ignore)
    return _call(cached, key, calibration.graph, groups, samples, recipe, losses)


def _score(
    key: tuple[Any, ...],
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    samples: ClassSamples,
    recipe: Recipe,
    losses: bool,
) -> Scored:
    """Score filters for a set of classes; `key` stands, in a cache, for what cannot be hashed."""
    return score_classes(graph, groups, samples, recipe, losses)


def _call(cached: Any, *args: Any) -> Any:
    """Call a function through its cache: a full disk costs the cache, not the result.

    joblib passes over results that it cannot write, but not over the function's own source.
    """
    try:
        return cached(*args)
    except OSError as error:
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_code is cached.func.__code__ for frame, _ in frames):
            raise  # it is the function's own
        warnings.warn(f"Unable to cache to disk: {error}", stacklevel=2)
        return cached.func(*args)


def selected(
    statistics: Statistics, groups: Sequence[ChannelGroup], index: np.ndarray
) -> Statistics:
    """What scoring these groups on these samples needs of the statistics, for a job elsewhere."""
    names = {name for group in groups for name in (*group.layers, *group.consumers)}
    # Layers that are observed at one node share a tensor, which shall travel once.
    rows = {id(v): Rows(v, index) for k, v in statistics.pooled.items() if k in names}
    pooled: Any = {k: rows[id(v)] for k, v in statistics.pooled.items() if k in names}
    return Statistics(pooled, statistics.logits[:0])
