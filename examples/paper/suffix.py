"""The part of a network that is sliced, cut off from what comes before it.

A table evaluates thousands of sliced networks that differ only from some layer on. So the layers
before it run once per image; scores, slicing, repair and answers need only what lies behind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from study import BATCH, Study, frozen
from torch import Tensor, fx

from sinfkit.criteria import Statistics, collect
from sinfkit.graph import (
    cut_points,
    find_layer,
    layer_names,
    observation_nodes,
    output_layer,
    split,
    trace,
)
from sinfkit.pruning import Recipe, choose_channels, make_recipe, score_classes, sliceable
from sinfkit.repair import Moments, gather_moments, repair, static_least_squares
from sinfkit.slicing import check_sliced, find_groups, slice_channels

REPAIRS = ("none", "match", "static", "least_squares")


class Suffix:
    """A study's network from a given layer on.

    Parameters
    ----------
    study : Study
    first_layer : str, optional
        The first layer that loses filters; default: that of ``frozen.toml``. A made-up network
        has the same layers as a real one.

    Attributes
    ----------
    prefix : GraphModule or None
        What comes before the last cut in front of the layer; None if there is no such cut.
    graph : GraphModule
        The rest.
    groups : list of ChannelGroup
        Those that lose filters, in forward order.
    nodes : dict of str to str
        Where their layers are observed.
    """

    def __init__(self, study: Study, first_layer: str | None = None) -> None:
        self.study = study
        whole = trace(study.base.model.module(study.device))
        example = next(study.batches(study.X[:1]))
        output = output_layer(whole, len(study.class_names))
        first = find_layer(whole, first_layer or frozen()["first_layer"][study.base.network])
        names = layer_names(whole)
        groups = find_groups(whole, example, output)
        self.groups = sliceable(groups, names[names.index(first) :])
        self._output = next(group for group in groups if group.is_output)
        order = {node.name: i for i, node in enumerate(whole.graph.nodes)}
        at = next(i for i, node in enumerate(whole.graph.nodes) if node.target == first)
        before = [cut for cut in cut_points(whole) if order[cut.node] < at]
        self.prefix: fx.GraphModule | None = None
        self.graph = whole
        if before:
            self.prefix, self.graph = split(whole, before[-1])
        self.nodes = observation_nodes(self.graph, [k for g in self.groups for k in g.layers])
        self._checked = False

    def inputs(self, X: np.ndarray) -> Tensor:
        """What the part behind sees of some images."""
        with torch.no_grad():  # not inference mode: some scores need gradients behind
            return torch.cat(
                [x if self.prefix is None else self.prefix(x) for x in self.study.batches(X)]
            ).contiguous(memory_format=torch.channels_last)

    def keep(
        self, scores: Mapping[str, np.ndarray], low: float, high: float
    ) -> dict[str, np.ndarray]:
        """Channels of each group that stay when `low` to `high` of them go."""
        recipe = make_recipe("l1", "linear", low, high, 1, "none", {})
        return choose_channels(self.groups, scores, recipe)

    def sliced(
        self, keep: Mapping[str, np.ndarray], classes: np.ndarray, h: Tensor
    ) -> tuple[fx.GraphModule, dict[str, np.ndarray]]:
        """The smaller network, and the channels that each layer kept; the first one is checked."""
        groups = [*self.groups, self._output]
        small = slice_channels(
            self.graph, h[:1], {**keep, self._output.name: classes}, groups=groups
        )
        if not self._checked:
            check_sliced(self.graph, small, h[:64], keep_outputs=classes.tolist())
            self._checked = True
        return small.model, small.support  # type: ignore[return-value]


@dataclass
class Case:
    """One cluster with one draw of calibration images.

    Attributes
    ----------
    suffix : Suffix
    classes : ndarray
        The cluster's classes, ascending.
    h : Tensor
        What the suffix sees of the calibration images, all of which are scored.
    y : ndarray
        Their classes as positions in `classes`.
    seed : int
        Of the draw.
    """

    suffix: Suffix
    classes: np.ndarray
    h: Tensor
    y: np.ndarray
    seed: int
    _statistics: dict[int, Statistics] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def moments(self) -> dict[str, Moments]:
        """Covariances of what the layers behind the sliced ones read, for the static repair."""
        readers = [name for group in self.suffix.groups for name in group.consumers]
        batches = self.h.split(BATCH)
        return gather_moments(self.suffix.graph, readers, batches, n_images=len(self.h))

    @classmethod
    def of(cls, suffix: Suffix, cluster: str, resample: int, per_class: int) -> Case:
        """Draw the images of a cluster and run what lies before the suffix."""
        study = suffix.study
        classes = study.classes(cluster)
        rows = study.draw(classes, per_class, resample)
        h = suffix.inputs(study.X[rows])
        return cls(suffix, classes, h, np.searchsorted(classes, study.y[rows]), resample)

    def first(self, per_class: int) -> Tensor:
        """Inputs of the first images of each class: a smaller draw."""
        rows = [np.flatnonzero(self.y == k)[:per_class] for k in range(len(self.classes))]
        return self.h[torch.as_tensor(np.concatenate(rows), device=self.h.device)]

    def scores(
        self,
        criterion: str | Callable[..., Tensor],
        options: Mapping[str, Any] | None = None,
        *,
        pool: int = 1,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        """Filter scores by group."""
        recipe: Recipe = make_recipe(criterion, "linear", 0.0, 0.0, pool, "none", options or {})
        if pool not in self._statistics:
            graph = self.suffix.graph
            self._statistics[pool] = collect(graph, self.h.split(BATCH), self.suffix.nodes, pool)
        everything = np.arange(len(self.y))

        def batches(rows: np.ndarray) -> Iterator[Tensor]:
            whole = len(rows) == len(everything) and np.array_equal(rows, everything)
            h = self.h if whole else self.h[torch.as_tensor(rows, device=self.h.device)]
            return iter(h.split(BATCH))

        return score_classes(
            self.suffix.graph,
            self.suffix.groups,
            self.suffix.nodes,
            self._statistics[pool],
            everything,
            self.y,
            recipe,
            outputs=self.classes.tolist(),
            batches=batches,
            seed=1000 * self.seed + seed,
        ).groups


def answers(module: torch.nn.Module, h: Tensor, columns: Sequence[int] | None = None) -> np.ndarray:
    """The output that is largest, of all or of some."""
    with torch.inference_mode():
        logits = torch.cat([module(x) for x in h.split(BATCH)])
    return (logits if columns is None else logits[:, list(columns)]).argmax(1).cpu().numpy()


def mend(
    repaired: str, case: Case, small: fx.GraphModule, support: Mapping[str, np.ndarray]
) -> None:
    """Repair a sliced network in place.

    Parameters
    ----------
    repaired : {"none", "match", "static", "least_squares"}
        Key of `REPAIRS`: nothing, matched statistics, least squares from the dense network's
        moments, or least squares layer by layer.
    case : Case
        Supplies the images.
    small, support
        From `Suffix.sliced`.
    """
    if repaired == "static":
        static_least_squares(case.suffix.graph, small, support, case.moments, case.h[:1])
    elif repaired != "none":
        h = case.first(frozen()["images"][repaired])
        repair(case.suffix.graph, small, support, h, method=repaired, batch_size=BATCH)
