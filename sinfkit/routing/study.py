"""What is known about the base network: found out once, for every network that is built."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from joblib import delayed
from torch import Tensor, fx

from ..criteria.activations import Statistics
from ..data.calibration import Calibration
from ..data.validation import Images, mean
from ..graph.cost import count_macs, fold_batch_norm
from ..graph.cuts import CutPoint, layer_names, observation_nodes, split
from ..pruning.costs import CostModel, network_cost
from ..pruning.layer_times import LayerTime, fit_layer_times
from ..pruning.recipe import Recipe, sliceable
from ..pruning.scoring import Scored, gather, score, selected
from ..slicing.groups import ChannelGroup
from ..utils.device import in_pieces
from ..utils.jobs import Rows, Shared, run, with_shared
from .config import RoutingConfig

# Fields of `LayerData` that are there without a further pass over the samples.
_COLLECTED = frozenset(
    {"name", "features", "consumer_features", "y", "weight", "norm_scale", "norm_gain"}
    | {"n_groups", "n_classes", "generator", "sample_weight"}
)


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples for one purpose: rows `index` of `X`, of classes `y`, which count `weight` times."""

    X: Images
    index: np.ndarray
    y: np.ndarray
    weight: np.ndarray | None = None

    def some(self, rows: np.ndarray) -> Samples:
        """Some of them, by their places."""
        weight = None if self.weight is None else self.weight[rows]
        return Samples(self.X, self.index[rows], self.y[rows], weight)

    def mean(self, values: np.ndarray) -> float:
        """Mean over the samples."""
        return mean(values, self.weight)


@dataclass(eq=False)
class Study:
    """A base network under study: samples to `fit` and repair, to `choose`, and to `certify`."""

    calibration: Calibration
    fit: Samples
    choose: Samples
    certify: Samples
    config: RoutingConfig
    _statistics: Statistics | None = None
    _scores: dict[Any, Scored] = field(default_factory=dict)

    @property
    def classes(self) -> np.ndarray:
        """All classes, as positions in ``calibration.table.classes``."""
        return np.arange(len(self.calibration.table.classes))

    def batches(self, samples: Samples) -> Iterable[Tensor]:
        """Normalised batches."""
        return self.calibration.batcher(samples.X, samples.index)

    def rng(self) -> np.random.Generator:
        """The same numbers for every network: what is built does not depend on what was tried."""
        return np.random.default_rng(self.calibration.seed)

    @functools.cached_property
    def batch(self) -> Tensor:
        """As many normalised samples as will be predicted at once."""
        return next(iter(self.batches(self.fit)))

    @functools.cached_property
    def macs(self) -> tuple[int, dict[str, int]]:
        """Multiplications of the base for one sample: all, and by layer."""
        return count_macs(self.calibration.graph, self.calibration.example)

    @functools.cache  # noqa: B019 (a study lives as long as a fit)
    def base_logits(self, samples: Samples) -> Tensor:
        """The base's answers on some samples, one column per class."""
        graph = self.calibration.graph
        with torch.inference_mode():
            rows = list(in_pieces(lambda x: graph(x).cpu(), self.batches(samples)))
        return torch.cat(rows)[:, torch.as_tensor(self.calibration.table.outputs)]

    def base_right(self, samples: Samples) -> np.ndarray:
        """Whether the base is right on each of some samples."""
        right: np.ndarray = self.base_logits(samples).argmax(1).numpy() == samples.y
        return right

    @functools.cached_property
    def output_group(self) -> str:
        """Name of the group of the network's outputs."""
        return next(group.name for group in self.calibration.groups if group.is_output)

    @functools.cache  # noqa: B019 (a study lives as long as a fit)
    def halves(self, cut: CutPoint) -> tuple[fx.GraphModule, fx.GraphModule]:
        """The dense network before and behind a cut."""
        return split(self.calibration.graph, cut)

    @functools.cache  # noqa: B019
    def groups(self, cut: CutPoint) -> tuple[list[ChannelGroup], list[ChannelGroup]]:
        """What can be sliced wholly before, and wholly behind, a cut."""
        before, behind = sides(self.calibration.graph, cut)
        groups = self.calibration.groups
        return sliceable(groups, before), sliceable(groups, behind)

    def gather(self, cuts: Sequence[CutPoint]) -> Tensor:
        """Collect in one pass what criteria ask for at any of the cuts; return the base's logits.

        The logits, of shape (n_samples, n_outputs), are of all calibration samples.
        """
        calibration, config = self.calibration, self.config
        layers: dict[str, None] = {}
        for cut in cuts:
            early, late = self.groups(cut)
            first = sliceable(calibration.groups) if config.shares_budget else early
            for groups, recipe in ((late, config.subgraphs), (first, config.prefix)):
                if recipe.criterion.needs & {"features", "consumer_features"}:
                    for group in groups:
                        layers |= dict.fromkeys(group.layers)
        nodes = observation_nodes(calibration.graph, layers)
        pool_size = config.subgraphs.pool_size
        found = gather(calibration, nodes, pool_size, config.memory, config.verbose)
        self._statistics = found
        return found.logits

    def score(
        self,
        groups: list[ChannelGroup],
        sets: Sequence[np.ndarray],
        recipe: Recipe,
        losses: bool | None = None,
    ) -> list[Scored]:
        """Score filters for several sets of classes, those that are new side by side.

        `losses` says whether it is measured what consumers lose, as the recipe has it by default:
        where only the order of the filters matters, that pass is spared.
        """
        losses = recipe.measures_losses if losses is None else losses
        calibration, config = self.calibration, self.config
        names = tuple(group.name for group in groups)
        keys = [(names, tuple(classes), recipe.criterion, losses) for classes in sets]
        new = {key: s for key, s in zip(keys, sets, strict=True) if key not in self._scores}
        if new:
            assert self._statistics is not None, "gather comes first"
            shared, jobs = Shared(calibration), []
            reads = losses or not recipe.criterion.needs <= _COLLECTED
            for classes in new.values():
                index = self.fit.index[np.isin(self.fit.y, classes)]
                statistics = selected(self._statistics, groups, index)
                rows = Rows(calibration.X, index if reads else index[:1])
                jobs.append(
                    delayed(with_shared)(
                        score,
                        shared,
                        groups,
                        statistics,
                        index,
                        classes,
                        recipe,
                        config.memory,
                        rows,
                        losses,
                    )
                )
            self._scores |= zip(new, run_here_if_one(jobs, config.n_jobs), strict=True)
        return [self._scores[key] for key in keys]

    @functools.cached_property
    def times(self) -> dict[str, LayerTime]:
        """What the layers take on this machine, in the form in which they will run."""
        groups, batch = self.calibration.groups, self.batch
        if batch.ndim == 4:
            batch = batch.contiguous(memory_format=torch.channels_last)
        graph = self.calibration.graph
        return fit_layer_times(graph, groups, sliceable(groups), batch, form=_folded)

    def cost(
        self,
        groups: list[ChannelGroup],
        kept: Mapping[str, int],
        cut: CutPoint,
        n_clusters: int,
    ) -> CostModel:
        """What widths of some groups cost, in the recipe's unit."""
        graph, unit = self.calibration.graph, self.config.subgraphs.budget_unit
        times = calls = None
        if unit == "latency":
            # Each cluster's samples make a call of their own.
            times, calls = self.times, dict.fromkeys(sides(graph, cut)[1], n_clusters)
        return network_cost(
            graph,
            self.calibration.groups,
            groups,
            self.batch,
            unit,
            kept=kept,
            times=times,
            calls=calls,
        )


def sides(graph: fx.GraphModule, cut: CutPoint) -> tuple[list[str], list[str]]:
    """Names of the layers before and behind a cut."""
    names, before = layer_names(graph), set()
    for node in graph.graph.nodes:
        before.add(str(node.target))
        if node.name == cut.node:
            break
    return [n for n in names if n in before], [n for n in names if n not in before]


def run_here_if_one(jobs: Sequence[Any], n_jobs: int | None) -> list[Any]:
    """Run jobs; a single one is not worth sending."""
    if len(jobs) > 1:
        return run(jobs, n_jobs)
    return [call(*arguments, **options) for call, arguments, options in jobs]


def _folded(graph: fx.GraphModule) -> fx.GraphModule:
    """A network in the form in which routed networks run."""
    twin = copy.deepcopy(fold_batch_norm(graph)).eval()
    rows = any(p.ndim == 4 for p in twin.parameters())
    return twin.to(memory_format=torch.channels_last) if rows else twin
