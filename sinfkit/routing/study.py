"""How to route, and what is known about the base network: found out once, for all that is built."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor, fx

from ..criteria.activations import Statistics
from ..data.calibration import Calibration
from ..data.images import Images
from ..data.validation import mean
from ..graph.cost import fold_batch_norm
from ..graph.cuts import CutPoint, layer_names, observation_nodes, sides, split
from ..pruning.costs import CostModel, network_cost
from ..pruning.depth import Depth
from ..pruning.layer_times import LayerTime, fit_layer_times
from ..pruning.recipe import Recipe, removal_ratios, sliceable
from ..pruning.scoring import Scored, gather, score, selected
from ..pruning.search import Builder as WholeBuilder
from ..repair.distillation import Distillation
from ..slicing.blocks import Block, blocks_in
from ..slicing.groups import ChannelGroup
from ..utils.device import channels_last, in_pieces
from ..utils.jobs import Rows, run_with
from ..utils.params import check_choice, check_number, naming
from ..utils.progress import Progress
from .clusters import Grouping

BUDGETS = (0.9, 0.8, 0.63, 0.5, 0.4, 0.32, 0.25, 0.2, 0.16)
"""Budgets that a search goes through, from careful to bold: mostly a fifth less in each step."""
_FIRST = 4  # tried first: two fifths of the multiplications stay
Answers = Literal["all", "cluster"]
Fallback = Literal["none", "base", "top2"]


class RoutingOptions(BaseEstimator):
    """What few users of `SINFClassifier` need to set.

    Parameters
    ----------
    answers : {"all", "cluster"}, default="all"
        Which classes a subgraph answers: every class, repaired on the samples that are routed to
        it, rightly or not; or those of its cluster, repaired on samples of these (the paper's form:
        a sample on the wrong route is lost).
    exit_threshold : float, "auto" or None, default="auto"
        Samples of which the route predictor gives one class at least this probability leave there,
        with its answer.  None: no sample leaves.  ``"auto"``: the smallest that keeps the promise.
    confidence_threshold : float or "auto", default="auto"
        Samples whose route confidence is below it take the fallback.  ``"auto"``: the smallest that
        keeps the promise.  It has no effect, and must be ``"auto"``, with ``fallback="none"``.
    router_weight : float or "auto", default="auto"
        Exponent of the router's posterior in the product with the subgraph's, see
        `sinfkit.inference.fuse`.  ``"auto"``: chosen by held-out log loss.
    validation_fraction : float, default=0.2
        Share of the calibration samples that is held out for the automatic choices, where ``fit``
        is not given samples for them.
    prefix_low_rank : float or "auto", default="auto"
        Share of the sliced prefix's multiplications that stay when its layers become products of
        two with fewer outputs in between, see `sinfkit.repair.factorize`; on top of what slicing
        saves.  1 leaves the layers as they are.  ``"auto"``: a search tries a half, and keeps it
        where that serves its goal; without a search 1.
    n_jobs : int, optional
        Threads that score and build subgraphs; inside ``joblib.parallel_config``, workers.

    Examples
    --------
    >>> from sinfkit import RoutingOptions, SINFClassifier
    >>> SINFClassifier(options=RoutingOptions(answers="cluster"))
    SINFClassifier(options=RoutingOptions(answers='cluster'))
    """

    def __init__(
        self,
        *,
        answers: Answers = "all",
        exit_threshold: float | Literal["auto"] | None = "auto",
        confidence_threshold: float | Literal["auto"] = "auto",
        router_weight: float | Literal["auto"] = "auto",
        validation_fraction: float = 0.2,
        prefix_low_rank: float | Literal["auto"] = "auto",
        n_jobs: int | None = None,
    ) -> None:
        self.answers = answers
        self.exit_threshold = exit_threshold
        self.confidence_threshold = confidence_threshold
        self.router_weight = router_weight
        self.validation_fraction = validation_fraction
        self.prefix_low_rank = prefix_low_rank
        self.n_jobs = n_jobs


@dataclass(frozen=True)
class Size:
    """How much of a network may stay.

    `budget`: cost of prefix and one subgraph as a fraction of the base's (None: ratios decide);
    `low_rank`: share of the sliced prefix's multiplications that stay when its layers become
    products of two, where 1 leaves them as they are.
    """

    budget: float | None = None
    low_rank: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What to build: where to cut, how to group the classes, how much to remove."""

    cut: CutPoint
    grouping: Grouping
    size: Size


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How to route: everything but the network, the samples and the clusters."""

    subgraphs: Recipe
    prefix: Recipe
    answers: Answers = "all"
    fallback: Fallback = "none"
    exit_threshold: float | Literal["auto"] | None = "auto"
    confidence_threshold: float | Literal["auto"] = "auto"
    router_weight: float | Literal["auto"] = "auto"
    prefix_low_rank: float | Literal["auto"] = "auto"
    validation_fraction: float = 0.2
    max_accuracy_drop: float = 0.01
    confidence: float = 0.9
    target_speedup: float | None = None
    distill: Distillation | None = None
    n_jobs: int | None = None
    memory: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_choice("answers", self.answers, get_args(Answers))
        check_choice("fallback", self.fallback, get_args(Fallback))
        for name, interval, optional in (
            ("exit_threshold", "[0, 1]", True),
            ("confidence_threshold", "[0, 1]", False),
            ("router_weight", "[0, inf)", False),
            ("prefix_low_rank", "(0, 1]", False),
        ):
            value = getattr(self, name)
            if isinstance(value, str):
                check_choice(name, value, ("auto",))
            else:
                check_number(name, value, interval, optional=optional)
        check_number("validation_fraction", self.validation_fraction, "(0, 1)")
        if self.fallback == "none" and self.confidence_threshold != "auto":
            raise ValueError("options.confidence_threshold has no effect with fallback='none'.")
        check_number("max_accuracy_drop", self.max_accuracy_drop, "[0, 1]")
        check_number("confidence", self.confidence, "(0, 1)")
        check_number("target_speedup", self.target_speedup, "[1, inf)", optional=True)

    @property
    def shares_budget(self) -> bool:
        """Whether prefix and subgraphs keep to one budget together."""
        return self.prefix.schedule == "global"

    @property
    def prunes_prefix(self) -> bool:
        """Whether ratios of the prefix's own remove anything."""
        return bool(removal_ratios(2, self.prefix.schedule, *self.prefix.pruning_ratios).any())

    @property
    def searches_size(self) -> bool:
        """Whether the budget is left to the search."""
        return self.subgraphs.schedule == "global" and self.subgraphs.budget is None

    @property
    def sizes(self) -> list[Size]:
        """What to choose from, from careful to bold: one size where the user has said it."""
        low_rank = 1.0 if isinstance(self.prefix_low_rank, str) else float(self.prefix_low_rank)
        budgets = BUDGETS if self.searches_size else (self.subgraphs.budget,)
        return [Size(budget, low_rank) for budget in budgets]

    @property
    def first(self) -> int:
        """Number of the size that is tried first."""
        return _FIRST if self.searches_size else 0

    @property
    def middle_size(self) -> Size:
        """The size that is tried first."""
        return self.sizes[self.first]


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
    progress: Progress
    depth: Depth = field(default_factory=Depth)
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

    def prefix_groups(self, cut: CutPoint) -> list[ChannelGroup]:
        """What is scored for all classes: the prefix's groups, and those that share its budget."""
        early, late = self.groups(cut)
        if not self.config.shares_budget:
            return early if self.config.prunes_prefix else []
        both = sliceable(self.calibration.groups, layer_names(self.calibration.graph))
        if self.config.fallback == "base":
            # Behind the prefix the dense tail must find the channels that it was trained with.
            known = {group.name for group in (*early, *late)}
            both = [group for group in both if group.name in known]
        return both

    def gather(self, cuts: Sequence[CutPoint]) -> Tensor:
        """Collect in one pass what criteria ask for at any of the cuts; return the base's logits.

        The logits, of shape (n_samples, n_outputs), are of all calibration samples.
        """
        calibration, config = self.calibration, self.config
        self.progress.doing("reads the samples")
        layers: dict[str, None] = {}
        for cut in cuts:
            late, first = self.groups(cut)[1], self.prefix_groups(cut)
            for groups, recipe in ((late, config.subgraphs), (first, config.prefix)):
                if recipe.criterion.needs & {"features", "consumer_features"}:
                    for group in groups:
                        layers |= dict.fromkeys(group.layers)
        nodes = observation_nodes(calibration.graph, layers)
        self._statistics = gather(calibration, nodes, config.subgraphs.pool_size, config.memory)
        self.progress.done()
        return self._statistics.logits

    def score_prefixes(self, cuts: Sequence[CutPoint]) -> None:
        """Score for all classes, before anything is built: every size asks for that."""
        self.progress.doing("scores the filters")
        with naming("prefix_pruner"):
            for cut in cuts:
                if groups := self.prefix_groups(cut):
                    self.score(groups, [self.classes], self.config.prefix)
        self.progress.done()

    def find_depth(self, cut: CutPoint) -> None:
        """Choose which residual blocks go, once for all networks: as for one without clusters.

        Only where one budget decides about both sides of the cut.
        """
        config, recipe = self.config, self.config.prefix
        if not (config.shares_budget and recipe.drop_blocks and config.subgraphs.drop_blocks):
            return
        assert config.middle_size.budget is not None and self._statistics is not None
        groups = self.prefix_groups(cut)
        (scored,) = self.score(groups, [self.classes], recipe)
        recipe = replace(recipe, budget_unit=config.subgraphs.budget_unit)
        known = (scored, self._statistics, self.fit.index, self.progress)
        builder = WholeBuilder(self.calibration, recipe, groups, *known)
        builder.find_depth(config.middle_size.budget, self.choose.index)
        self.depth = builder.depth

    def blocks(self, size: Size, part: fx.GraphModule) -> list[Block]:
        """The residual blocks that a part of the network does without in a size."""
        return blocks_in(part, self.depth.at(size.budget))

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
        calibration, memory = self.calibration, self.config.memory
        names = tuple(group.name for group in groups)
        keys = [(names, tuple(classes), recipe.criterion, losses) for classes in sets]
        new = {key: s for key, s in zip(keys, sets, strict=True) if key not in self._scores}
        if new:
            assert self._statistics is not None, "gather comes first"
            jobs = []
            reads = losses or not recipe.criterion.needs <= _COLLECTED
            for classes in new.values():
                index = self.fit.index[np.isin(self.fit.y, classes)]
                statistics = selected(self._statistics, groups, index)
                rows = Rows(calibration.X, index if reads else index[:1])
                jobs.append((groups, statistics, index, classes, recipe, memory, rows, losses))
            found = run_with(calibration, score, jobs, self.config.n_jobs)
            self._scores |= zip(new, found, strict=True)
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
        size: Size,
        n_clusters: int,
    ) -> CostModel:
        """What widths of some groups cost in a size, in the recipe's unit."""
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
            macs=self.calibration.macs[1],
            left_out={name for block in self.depth.at(size.budget) for name in block.modules},
        )


def _folded(graph: fx.GraphModule) -> fx.GraphModule:
    """A network in the form in which routed networks run."""
    twin = copy.deepcopy(fold_batch_norm(graph)).eval()
    return channels_last(twin)
