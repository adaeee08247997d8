"""Statistics and scores: computed once, and found again in the cache of the next fit."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from joblib import Memory
from sklearn.utils.validation import check_memory

from ..criteria.activations import Statistics, collect
from ..criteria.registry import CRITERIA
from ..data.calibration import Calibration, progress
from ..graph.cuts import observation_nodes
from ..slicing.groups import ChannelGroup
from ..utils.jobs import Rows
from .scoring import Recipe, Scored, score_classes


def gather(
    calibration: Calibration,
    nodes: dict[str, str],
    pool_size: int | dict[str, int],
    memory: Any,
    verbose: int,
) -> Statistics:
    """Collect the statistics of all samples in one pass, or find them in the cache."""
    if not _stores(memory):
        return _collect(None, calibration, nodes, pool_size, verbose)
    cached = check_memory(memory).cache(_collect, ignore=["calibration", "verbose"])
    return cached(calibration.key, calibration, nodes, pool_size, verbose)


def _stores(memory: Any) -> bool:
    """Whether a cache keeps anything; if not, keys, for which samples are hashed, are spared."""
    memory = check_memory(memory)
    return not (isinstance(memory, Memory) and memory.location is None)


def _collect(
    key: tuple[Any, ...] | None,
    calibration: Calibration,
    nodes: dict[str, str],
    pool_size: int | dict[str, int],
    verbose: int,
) -> Statistics:
    """One pass over all samples; `key` stands, in a cache, for what cannot be hashed."""
    batcher = calibration.batcher
    total = -(-len(calibration.X) // batcher.batch_size)
    batches = progress(batcher(calibration.X), "Activations", verbose, total)
    return collect(calibration.graph, batches, nodes, pool_size)


def score(
    calibration: Calibration,
    groups: Sequence[ChannelGroup],
    statistics: Statistics,
    index: np.ndarray,
    classes: np.ndarray,
    recipe: Recipe,
    memory: Any,
    rows: Rows | None = None,
) -> Scored:
    """Score filters for a set of classes, or find the scores in the cache.

    Parameters
    ----------
    calibration : Calibration
    groups : sequence of ChannelGroup
        Those to score.
    statistics : Statistics
        Of `gather`, where the criterion needs activations.
    index : int ndarray
        The samples of these classes.
    classes : int ndarray
        Ascending positions in ``calibration.table.classes``.
    recipe : Recipe
        Its ratios and repair do not matter, nor does its schedule beyond ``measures_losses``.
    memory : str, joblib.Memory or None
    rows : Rows, optional
        The samples, where `calibration` is without them.

    Returns
    -------
    Scored
    """
    criterion = recipe.criterion
    # A function of the user's may depend on what no cache can see.
    if CRITERIA.get(criterion.name) is not criterion or not _stores(memory):
        return _score(None, calibration, groups, statistics, index, classes, recipe, rows)
    key: tuple[Any, ...] = (
        *calibration.key,
        criterion.name,
        recipe.measures_losses,
        sorted(recipe.options.items()),
        recipe.pool_size,
        calibration.seed,
        [group.name for group in groups],
        index,
        calibration.y_encoded[index],
        calibration.table.outputs[classes],
        calibration.weight[index],
    )
    cached = check_memory(memory).cache(
        _score,
        ignore=["calibration", "groups", "statistics", "index", "classes", "recipe", "rows"],
    )
    return cached(key, calibration, groups, statistics, index, classes, recipe, rows)


def selected(
    statistics: Statistics, groups: Sequence[ChannelGroup], index: np.ndarray
) -> Statistics:
    """What scoring these groups on these samples needs of the statistics, for a job elsewhere."""
    names = {name for group in groups for name in (*group.layers, *group.consumers)}
    # Layers that are observed at one node share a tensor, which shall travel once.
    rows = {id(v): Rows(v, index) for k, v in statistics.pooled.items() if k in names}
    pooled: Any = {k: rows[id(v)] for k, v in statistics.pooled.items() if k in names}
    return Statistics(pooled, statistics.logits[:0])


def _score(
    key: tuple[Any, ...] | None,
    calibration: Calibration,
    groups: Sequence[ChannelGroup],
    statistics: Statistics,
    index: np.ndarray,
    classes: np.ndarray,
    recipe: Recipe,
    rows: Rows | None,
) -> Scored:
    """Score filters for a set of classes; `key` stands, in a cache, for what cannot be hashed."""
    layers = [layer for group in groups for layer in group.layers]
    return score_classes(
        calibration.graph,
        groups,
        observation_nodes(calibration.graph, layers),
        statistics,
        index,
        np.searchsorted(classes, calibration.y_encoded[index]),
        recipe,
        outputs=calibration.table.outputs[classes].tolist(),
        batches=functools.partial(calibration.batcher, calibration.X if rows is None else rows),
        seed=calibration.seed,
        weight=calibration.weights(index),
    )
