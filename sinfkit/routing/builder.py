"""Builds routed networks of several cuts, clusters and sizes from one set of statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from joblib import delayed
from torch import Tensor, fx, nn

from ..criteria.activations import Statistics
from ..data.calibration import Calibration, progress
from ..data.validation import Images, mean
from ..errors import OutOfReachError, UnreachableShareError
from ..graph.cost import count_macs, fold_batch_norm, paired_latency
from ..graph.cuts import CutPoint, observation_nodes, split
from ..inference.forms import fast_form
from ..inference.measure import base_for_timing, branch_costs
from ..inference.network import Normalise, Route, SINFNetwork, own_classes
from ..inference.router import (
    RouteFit,
    choose_exit,
    choose_threshold,
    cluster_posterior,
    fit_route_predictor,
)
from ..pruning.budget import shared_widths
from ..pruning.costs import CostModel, network_cost
from ..pruning.layer_times import LayerTime, expected_seconds, fit_layer_times
from ..pruning.recipe import Recipe, choose_channels, sliceable
from ..pruning.scoring import Scored, gather, score, selected
from ..repair.low_rank import factorize
from ..repair.sequential import affordable_images
from ..slicing.groups import ChannelGroup
from ..utils.device import in_pieces
from ..utils.jobs import Rows, Shared, run, with_shared
from ..utils.params import naming
from .assembly import (
    ROUTER_WEIGHTS,
    SlicedPrefix,
    Subgraph,
    build_subgraph,
    choose_weight,
    observe,
    pooled_output,
    routed_answers,
    slice_prefix,
)
from .clusters import Clusters, Grouping, group_classes
from .placement import sides
from .search import Outcome, Size

ANSWERS = ("all", "cluster")
# Fields of `LayerData` that are there without a further pass over the samples.
_COLLECTED = frozenset(
    {"name", "features", "consumer_features", "y", "weight", "norm_scale", "norm_gain"}
    | {"n_groups", "n_classes", "generator"}
)
_FEW_ROUTED = 64  # samples, too few to repair a subgraph with


@dataclass(frozen=True)
class Settings:
    """What holds for every network that is built.

    Attributes
    ----------
    recipe, prefix_recipe : Recipe
        For the subgraphs and for the prefix; a plan's size replaces their ratios.
    repair_samples : int
    answers : str
        One of `ANSWERS`.
    exit_threshold : float, "auto" or None
    router_weight, confidence_threshold : float or "auto"
    fallback : str
    top_k : int
    max_accuracy_drop : float
    n_jobs : int or None
    memory : str, joblib.Memory or None
    verbose : int
    """

    recipe: Recipe
    prefix_recipe: Recipe
    repair_samples: int
    answers: str
    exit_threshold: float | str | None
    router_weight: float | str
    confidence_threshold: float | str
    fallback: str
    top_k: int
    max_accuracy_drop: float
    n_jobs: int | None
    memory: Any
    verbose: int


@dataclass(frozen=True)
class Held:
    """Held-out samples: rows `index` of `X`, of classes `codes`, which count `weight` times."""

    X: Images
    index: np.ndarray
    codes: np.ndarray
    weight: np.ndarray | None = None

    def mean(self, values: np.ndarray) -> float:
        """Mean over the samples."""
        return mean(values, self.weight)


@dataclass(frozen=True)
class Plan:
    """What to build: where to cut, how to group the classes, how much to remove."""

    cut: CutPoint
    grouping: Grouping
    size: Size


@dataclass(frozen=True)
class Built:
    """A routed network, and what it gives on the held-out samples.

    Attributes
    ----------
    plan : Plan
    clusters : Clusters
    network : SINFNetwork
    subgraphs : list of Subgraph or None
        None for a cluster of one class.
    route_accuracy : float
    fallback_share, exit_share : float
        Shares of held-out samples below the confidence threshold, and of those that leave at the
        route predictor.
    drop_error : float
        Standard error of the outcome's drop in accuracy.
    relative_macs : float
        Expected multiplications per sample, as a fraction of the base's.
    relative_time : float
        Expected time of a batch, as a fraction of the base's, by the model of the layers' times;
        NaN unless costs are counted in it.
    outcome : Outcome
    """

    plan: Plan
    clusters: Clusters
    network: SINFNetwork
    subgraphs: list[Subgraph | None]
    route_accuracy: float
    fallback_share: float
    exit_share: float
    drop_error: float
    relative_macs: float
    relative_time: float
    outcome: Outcome


@dataclass(frozen=True)
class Prefix:
    """What lies before the cut.

    Attributes
    ----------
    module : GraphModule
    keep : dict of str to int ndarray
        Channels kept, by group, of the groups that it has to do with.
    widths : dict of str to int
        Channels that stay in each group behind the cut, where one budget decides about both sides.
    """

    module: fx.GraphModule
    keep: dict[str, np.ndarray] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)


@dataclass
class Builder:
    """Builds networks; whatever several of them share is computed once.

    Attributes
    ----------
    calibration : Calibration
    index : int ndarray
        The samples that score, fit and repair.
    held : Held
    settings : Settings
    """

    calibration: Calibration
    index: np.ndarray
    held: Held
    settings: Settings
    _statistics: Statistics | None = None
    _scores: dict[Any, Scored] = field(default_factory=dict)
    _prefixes: dict[Any, Prefix] = field(default_factory=dict)
    _times: dict[str, LayerTime] | None = None
    _base_logits: Tensor | None = None

    def batches(self, index: np.ndarray) -> Iterable[Tensor]:
        """Normalised batches of calibration samples."""
        return self.calibration.batcher(self.calibration.X, index)

    def held_batches(self) -> Iterable[Tensor]:
        """Normalised batches of the held-out samples."""
        return self.calibration.batcher(self.held.X, self.held.index)

    @property
    def base_logits(self) -> Tensor:
        """The base's answers on the held-out samples, one column per class."""
        if self._base_logits is None:
            with torch.inference_mode():
                graph = self.calibration.graph
                rows = list(in_pieces(lambda x: graph(x).cpu(), self.held_batches()))
            self._base_logits = torch.cat(rows)[:, torch.as_tensor(self.calibration.table.outputs)]
        return self._base_logits

    @property
    def base_right(self) -> np.ndarray:
        """Whether the base is right on each held-out sample."""
        return self.base_logits.argmax(1).numpy() == self.held.codes

    @property
    def target(self) -> float:
        """Accuracy to keep on the held-out samples."""
        return self.held.mean(self.base_right) - self.settings.max_accuracy_drop

    def gather(self, plans: Sequence[Plan]) -> Statistics:
        """Collect, in one pass, what the criteria ask for in any of the plans."""
        graph, settings = self.calibration.graph, self.settings
        layers: dict[str, None] = {}
        for plan in plans:
            inside, behind = sides(graph, plan.cut)
            parts = [(behind, settings.recipe)]
            shared = plan.size.prefix_ratio is None
            parts.append((inside + behind if shared else inside, settings.prefix_recipe))
            for part, recipe in parts:
                if recipe.criterion.needs & {"features", "consumer_features"}:
                    for group in sliceable(self.calibration.groups, part):
                        layers |= dict.fromkeys(group.layers)
        nodes = observation_nodes(graph, layers)
        self._statistics = gather(
            self.calibration, nodes, settings.recipe.pool_size, settings.memory, settings.verbose
        )
        return self._statistics

    def build(self, plan: Plan, *, time_it: bool = False) -> Built:
        """Build a network, choose its threshold, and see how it does on the held-out samples.

        Parameters
        ----------
        plan : Plan
        time_it : bool, default=False
            Measure the speed-up on a batch of held-out samples.

        Returns
        -------
        Built
        """
        codes = self.calibration.y_encoded
        grouping = plan.grouping
        prefix = self._prefix(plan.cut, plan.size, int(grouping.n_clusters or 1))
        features = pooled_output(
            prefix.module,
            progress(self.batches(self.index), "Routes", self.settings.verbose),
            grouping.pool_size,
        )
        route = fit_route_predictor(
            features,
            codes[self.index],
            pooled_output(prefix.module, self.held_batches(), grouping.pool_size),
            self.held.codes,
            pool_size=grouping.pool_size,
            weight=self.calibration.weights(self.index),
            held_out_weight=self.held.weight,
        )
        with naming("clusterer"):
            clusters = group_classes(
                grouping,
                self.calibration.table.classes,
                features,
                codes[self.index],
                route.penalty,
                self.calibration.seed,
                self.calibration.weights(self.index),
            )
        routed = self._routed(features, route, clusters.class_clusters)
        subgraphs = self._subgraphs(plan, prefix, clusters.class_clusters, routed)
        network = self._network(
            plan.cut, prefix.module, route.predictor, subgraphs, clusters.class_clusters
        )
        return self._judged(plan, clusters, network, subgraphs, time_it)

    def _score(self, groups: list[ChannelGroup], classes: np.ndarray, recipe: Recipe) -> Scored:
        """Filter scores for a set of classes; the same for every ratio."""
        return self._score_each(groups, [classes], recipe)[0]

    def _score_each(
        self, groups: list[ChannelGroup], sets: Sequence[np.ndarray], recipe: Recipe
    ) -> list[Scored]:
        """Filter scores for several sets of classes, those that are new side by side."""
        calibration, memory = self.calibration, self.settings.memory
        names = tuple(g.name for g in groups)
        which = id(recipe.criterion.function), recipe.measures_losses
        keys = [(names, tuple(classes), *which) for classes in sets]
        new = {key: s for key, s in zip(keys, sets, strict=True) if key not in self._scores}
        if new:
            assert self._statistics is not None, "gather comes first"
            shared, jobs = Shared(calibration), []
            for classes in new.values():
                index = self.index[np.isin(calibration.y_encoded[self.index], classes)]
                statistics = selected(self._statistics, groups, index)
                rows = Rows(calibration.X, index if _reads_samples(recipe) else index[:1])
                jobs.append(
                    delayed(with_shared)(
                        score, shared, groups, statistics, index, classes, recipe, memory, rows
                    )
                )
            # A single one, as the prefix's of all classes, does not pay the way.
            call, arguments, options = jobs[0]
            scored = (
                run(jobs, self.settings.n_jobs) if len(jobs) > 1 else [call(*arguments, **options)]
            )
            self._scores |= zip(new, scored, strict=True)
        return [self._scores[key] for key in keys]

    def _rng(self) -> np.random.Generator:
        """The same numbers for every network: what is built does not depend on what was tried."""
        return np.random.default_rng(self.calibration.seed)

    def _prefix(self, cut: CutPoint, size: Size, n_clusters: int = 1) -> Prefix:
        """The part before the cut, sliced for all classes."""
        shared = size.prefix_ratio is None
        timed = shared and self._unit == "latency"  # whose cost has a call for each cluster
        key = (
            cut.name,
            size.prefix_ratio,
            size.budget if shared else None,
            n_clusters if timed else None,
            size.low_rank,
        )
        if key not in self._prefixes:
            if size.low_rank < 1:
                prefix = self._prefix(cut, replace(size, low_rank=1.0), n_clusters)
                self._prefixes[key] = self._factorized(prefix, cut, size.low_rank)
            else:
                self._prefixes[key] = self._sliced_prefix(cut, size, n_clusters)
        return self._prefixes[key]

    def _dense_prefix(self, cut: CutPoint) -> fx.GraphModule:
        """The part before the cut as it is: one object, by which a whole prefix is told."""
        return self._prefix(cut, Size(0.0, 0.0, 0.0)).module

    def _sliced_prefix(self, cut: CutPoint, size: Size, n_clusters: int) -> Prefix:
        """Choose, slice and repair what lies before the cut."""
        calibration, recipe = self.calibration, self.settings.prefix_recipe
        if size.prefix_ratio == 0:
            return Prefix(split(calibration.graph, cut)[0])
        inside, behind = sides(calibration.graph, cut)
        groups, widths = sliceable(calibration.groups, inside), None
        everything = np.arange(len(calibration.table.classes))
        if size.prefix_ratio is not None:
            recipe = replace(recipe, pruning_ratios=(0.0, size.prefix_ratio))
        else:
            recipe = replace(recipe, schedule="global", max_ratio=size.max_ratio)
            late = {group.name for group in sliceable(calibration.groups, behind)}
            both = sliceable(calibration.groups, [*inside, *behind])
            if self.settings.fallback == "base":
                # Behind the prefix the dense rest must find the channels that it was trained with.
                early = {group.name for group in groups}
                both = [group for group in both if group.name in early | late]
            widths = self._shared_widths(both, cut, recipe, size, n_clusters)
            groups = [group for group in both if group.name not in late]
        dense = self._dense_prefix(cut)
        if not groups:
            return Prefix(dense, {}, widths or {})
        # Scored with those behind the cut, where they are: one pass serves both, for every cut.
        with naming("prefix_criterion"):
            scored = self._score(both if widths is not None else groups, everything, recipe)
        keep = choose_channels(groups, scored.groups, recipe, widths)
        sample = self._sample(dense)
        samples = torch.cat(list(self.batches(sample)))
        module = slice_prefix(
            calibration, cut, keep, samples, recipe.repair, calibration.weights(sample)
        )
        return Prefix(module, keep, widths or {})

    def _sample(self, prefix: fx.GraphModule) -> np.ndarray:
        """The samples on which a prefix is repaired."""
        wanted = self.settings.repair_samples
        n_images = affordable_images(prefix, self.calibration.example, wanted)
        return self._rng().permutation(self.index)[:n_images]

    def _factorized(self, prefix: Prefix, cut: CutPoint, share: float) -> Prefix:
        """The same with layers of low rank."""
        sample = self._sample(self._dense_prefix(cut))
        try:
            module = factorize(
                prefix.module,
                share,
                torch.cat(list(self.batches(sample))),
                weight=self.calibration.weights(sample),
                batch_size=self.calibration.batcher.batch_size,
                seed=self.calibration.seed,
            )
        except UnreachableShareError as error:
            raise OutOfReachError(f"prefix_low_rank: {error}") from error
        return replace(prefix, module=module)

    def _shared_widths(
        self,
        groups: list[ChannelGroup],
        cut: CutPoint,
        recipe: Recipe,
        size: Size,
        n_clusters: int,
    ) -> dict[str, int]:
        """Widths on both sides of the cut under one budget, by what all classes would lose."""
        everything = np.arange(len(self.calibration.table.classes))
        with naming("prefix_criterion"):
            scored = self._score(groups, everything, recipe)
        cost = self._cost(groups, {}, cut, n_clusters)
        return shared_widths(groups, [scored], cost, recipe, size.budget)

    @property
    def _unit(self) -> str:
        """What costs are counted in."""
        return self.settings.recipe.budget_unit

    @property
    def _batch(self) -> Tensor:
        """As many normalised samples as will be predicted at once."""
        return next(iter(self.batches(self.index[: self.calibration.batcher.batch_size])))

    @property
    def times(self) -> dict[str, LayerTime]:
        """What the layers take on this machine, in the form in which they will run."""
        if self._times is None:
            calibration = self.calibration
            groups, batch = calibration.groups, self._batch
            self._times = fit_layer_times(
                calibration.graph, groups, sliceable(groups), _fast(batch), form=_folded
            )
        return self._times

    def _cost(
        self, groups: list[ChannelGroup], kept: Mapping[str, int], cut: CutPoint, n_clusters: int
    ) -> CostModel:
        """What widths of some groups cost, in the recipe's unit."""
        graph, timed = self.calibration.graph, self._unit == "latency"
        return network_cost(
            graph,
            self.calibration.groups,
            groups,
            self._batch,
            self._unit,
            kept=kept,
            times=self.times if timed else None,
            # Each cluster's samples make a call of their own.
            calls=dict.fromkeys(sides(graph, cut)[1], n_clusters) if timed else None,
        )

    def _routed(
        self, features: Tensor, route: RouteFit, class_clusters: np.ndarray
    ) -> list[np.ndarray]:
        """The calibration samples that each cluster's subgraph is made for."""
        clusters = torch.as_tensor(class_clusters)
        n_clusters = int(class_clusters.max()) + 1
        own = class_clusters[self.calibration.y_encoded[self.index]]
        if self.settings.answers == "cluster":
            return [self.index[own == c] for c in range(n_clusters)]
        # Whatever is sent there, rightly or not: that is what it will have to answer.
        log_posterior = route.predictor.of_pooled(features)
        sent = cluster_posterior(log_posterior, clusters, n_clusters).argmax(1).numpy()
        weight = self.calibration.weights(self.index)
        few = np.bincount(sent, weights=weight, minlength=n_clusters) < _FEW_ROUTED
        return [self.index[(sent == c) | ((own == c) & few[c])] for c in range(n_clusters)]

    def _subgraphs(
        self,
        plan: Plan,
        prefix: Prefix,
        class_clusters: np.ndarray,
        routed: Sequence[np.ndarray],
    ) -> list[Subgraph | None]:
        """One subgraph per cluster, built side by side where `n_jobs` says so."""
        calibration, size = self.calibration, plan.size
        behind = sides(calibration.graph, plan.cut)[1]
        groups = sliceable(calibration.groups, behind)
        recipe = self.settings.recipe
        if recipe.schedule == "global":
            recipe = replace(recipe, max_ratio=size.max_ratio)
        else:
            recipe = replace(recipe, pruning_ratios=(size.min_ratio, size.max_ratio))
        dense, rest = self._dense_prefix(plan.cut), split(calibration.graph, plan.cut)[1]
        with torch.inference_mode():
            h = dense(calibration.example)
        n_images = affordable_images(rest, h, self.settings.repair_samples)
        clusters = [
            np.flatnonzero(class_clusters == c) for c in range(int(class_clusters.max()) + 1)
        ]
        widths = None
        if recipe.schedule == "global":
            if prefix.widths:
                widths = prefix.widths
                # Just ranks.
                recipe = replace(recipe, schedule="uniform", budget=None)
            else:
                widths = self._widths(groups, prefix, clusters, recipe, plan.cut, size)
        several = [c for c, classes in enumerate(clusters) if len(classes) > 1]
        scored = self._score_each(groups, [clusters[c] for c in several], recipe)
        sliced = None if prefix.module is dense else SlicedPrefix(prefix.module)
        rng, shared, jobs = self._rng(), Shared(calibration), []
        for c, scores in zip(several, scored, strict=True):
            sample = rng.permutation(routed[c])[:n_images]
            outputs = calibration.table.outputs[self._answered_by(clusters[c])]
            keep = self._keep(plan.cut, groups, scores, outputs, prefix, recipe, widths)
            jobs.append(
                delayed(with_shared)(
                    build_subgraph,
                    shared,
                    plan.cut,
                    keep,
                    scores,
                    outputs,
                    sliced,
                    recipe.repair,
                    Rows(calibration.X, sample),
                    sample,
                )
            )
        built = run(progress(jobs, "Subgraphs", self.settings.verbose), self.settings.n_jobs)
        subgraphs: list[Subgraph | None] = [None] * len(clusters)
        for c, subgraph in zip(several, built, strict=True):
            subgraphs[c] = subgraph.unpacked()
        return subgraphs

    def _widths(
        self,
        groups: list[ChannelGroup],
        prefix: Prefix,
        clusters: Sequence[np.ndarray],
        recipe: Recipe,
        cut: CutPoint,
        size: Size,
    ) -> dict[str, int]:
        """One width per layer for all clusters: with the given prefix they keep to a budget."""
        scored = self._score_each(groups, [own for own in clusters if len(own) > 1], recipe)
        if not scored:
            return {}
        kept = {name: len(channels) for name, channels in prefix.keep.items()}
        kept[self._output_group] = max(len(self._answered_by(own)) for own in clusters)
        cost = self._cost(groups, kept, cut, len(clusters))
        return shared_widths(groups, scored, cost, recipe, size.budget)

    @property
    def _output_group(self) -> str:
        return next(group.name for group in self.calibration.groups if group.is_output)

    def _answered_by(self, classes: np.ndarray) -> np.ndarray:
        """The classes that the subgraph of a cluster answers."""
        if self.settings.answers == "cluster":
            return classes
        return np.arange(len(self.calibration.table.classes))

    def _keep(
        self,
        cut: CutPoint,
        groups: list[ChannelGroup],
        scored: Scored,
        outputs: np.ndarray,
        prefix: Prefix,
        recipe: Recipe,
        widths: Mapping[str, int] | None,
    ) -> dict[str, np.ndarray]:
        """Choose the channels of one cluster's part, by group."""
        keep = choose_channels(groups, scored.groups, recipe, widths)
        behind = set(sides(self.calibration.graph, cut)[1])
        for group in self.calibration.groups:
            # What crosses the cut has lost the same channels for every cluster.
            if group.name in prefix.keep and behind.intersection((*group.layers, *group.consumers)):
                keep[group.name] = prefix.keep[group.name]
        keep[self._output_group] = outputs
        return keep

    def _network(
        self,
        cut: CutPoint,
        prefix: nn.Module,
        predictor: nn.Module,
        subgraphs: list[Subgraph | None],
        class_clusters: np.ndarray,
    ) -> SINFNetwork:
        """Put the parts together, batch-norms folded."""
        calibration, settings = self.calibration, self.settings
        frozen, dtype = calibration.frozen, calibration.batcher.dtype
        rest = None
        if settings.fallback == "base":
            rest = fold_batch_norm(split(calibration.graph, cut)[1])
        network = SINFNetwork(
            Normalise(
                None if frozen.mean is None else torch.tensor(frozen.mean, dtype=dtype),
                None if frozen.std is None else torch.tensor(frozen.std, dtype=dtype),
            ),
            fold_batch_norm(prefix),
            predictor,  # type: ignore[arg-type]
            [None if s is None else fold_batch_norm(s.module) for s in subgraphs],
            rest,
            torch.as_tensor(class_clusters),
            torch.as_tensor(calibration.table.outputs),
            torch.ones(len(subgraphs), dtype=dtype),
            router_weight=0.5,
            threshold=0.0,
            fallback=settings.fallback,
            top_k=settings.top_k,
            answered=own_classes(torch.as_tensor(class_clusters), len(subgraphs))
            | (settings.answers == "all"),
        )
        # A copy: what folding left as it was is the frozen model's own.
        network = copy.deepcopy(network).eval().requires_grad_(False)
        network = network.to(calibration.batcher.device)
        if calibration.example.ndim == 4:
            network = network.to(memory_format=torch.channels_last)
        return network

    def _judged(
        self,
        plan: Plan,
        grouped: Clusters,
        network: SINFNetwork,
        subgraphs: list[Subgraph | None],
        time_it: bool,
    ) -> Built:
        """Choose router weight, temperatures and thresholds, and count what the choice gives."""
        settings, codes = self.settings, self.held.codes
        held = observe(network, self.held_batches())
        clusters = network.class_clusters.cpu()
        automatic = settings.router_weight == "auto"
        weights = ROUTER_WEIGHTS if automatic else (float(settings.router_weight),)
        answered = network.answered.cpu()
        network.router_weight, temperatures = choose_weight(
            held, codes, answered, weights, self.held.weight
        )
        network.temperatures.copy_(temperatures)
        routed = routed_answers(held, answered, temperatures, network.router_weight) == codes
        right = routed
        if settings.fallback == "none" or network.n_clusters == 1:
            if settings.confidence_threshold != "auto":
                network.threshold = float(settings.confidence_threshold)
        else:
            network.threshold = 2.0  # above every confidence: everybody takes the fallback
            fallback = _answers(network, self.held_batches()) == codes
            if settings.confidence_threshold == "auto":
                network.threshold = choose_threshold(
                    held.confidence.numpy(),
                    routed,
                    fallback,
                    target=self.target,
                    weight=self.held.weight,
                )
            else:
                network.threshold = float(settings.confidence_threshold)
            right = np.where(held.confidence.numpy() < network.threshold, fallback, routed)
        sure, early = (part.numpy() for part in held.log_posterior.exp().max(1))
        if settings.exit_threshold == "auto":
            network.exit_threshold = choose_exit(
                sure, early == codes, right, target=self.target, weight=self.held.weight
            )
        elif settings.exit_threshold is not None:
            network.exit_threshold = float(settings.exit_threshold)
        leaves = sure >= network.exit_threshold
        right = np.where(leaves, early == codes, right)
        posterior = cluster_posterior(held.log_posterior, clusters, network.n_clusters)
        route = Route(held.log_posterior, posterior, held.cluster, held.confidence)
        rows, branch = (part.numpy() for part in network.branches(route))
        weight = self.held.weight
        runs = np.bincount(
            branch,
            weights=None if weight is None else weight[rows],
            minlength=network.n_clusters + 2,
        ) / (len(codes) if weight is None else weight.sum())
        raw = self.calibration.batcher.load(self.calibration.X[:1])
        costs = branch_costs(network, raw)
        base = count_macs(self.calibration.graph, self.calibration.example)[0]
        macs = (costs["shared_macs"] + float(runs @ costs["macs"])) / max(base, 1)
        timed = self._unit == "latency"
        seconds = self._relative_time(network, runs) if timed else float("nan")
        lost = self.base_right.astype(float) - right
        return Built(
            plan,
            grouped,
            network,
            subgraphs,
            self.held.mean((held.cluster == clusters[torch.as_tensor(codes)]).numpy()),
            self.held.mean((held.confidence.numpy() < network.threshold) & ~leaves),
            self.held.mean(leaves),
            self._standard_error(lost),
            macs,
            seconds,
            Outcome(
                self.held.mean(lost),
                seconds if timed else macs,
                self._speedup(network) if time_it else float("nan"),
            ),
        )

    def _relative_time(self, network: SINFNetwork, runs: np.ndarray) -> float:
        """Expected time of a batch over the base's, from the times of the layers."""
        n = self.calibration.batcher.batch_size
        branches = [network.subgraph(c) for c in range(network.n_clusters)] + [network.rest]
        parts: list[tuple[nn.Module, float]] = [(network.prefix, 1.0)]
        # Behind the clusters' stands the base's rest, then what leaves at the route predictor.
        for branch, share in zip(branches, runs[:-1], strict=True):
            if branch is not None:
                parts.append((branch, float(share)))
        base = sum(time.seconds(n) for time in self.times.values())
        return expected_seconds(parts, self.times, self.calibration.graph, n) / base

    def _standard_error(self, lost: np.ndarray) -> float:
        """Of the mean over the held-out samples."""
        weight = self.held.weight
        n_samples = len(lost) if weight is None else weight.sum()
        return float((self.held.mean((lost - self.held.mean(lost)) ** 2) / n_samples) ** 0.5)

    def _speedup(self, network: SINFNetwork) -> float:
        """Time of the base over that of the network on one batch, in turns."""
        batcher = self.calibration.batcher
        x = batcher.load(self.held.X[self.held.index[: batcher.batch_size]])
        base = base_for_timing(network, self.calibration.frozen.module(batcher.device), x)
        fast = fast_form(network, lambda: x)
        latency = paired_latency({"base": lambda: base(x), "sinf": lambda: fast(x)}, repeats=7)
        return 1.0 / latency.ratio("sinf", "base")


def _answers(network: SINFNetwork, batches: Iterable[Tensor]) -> np.ndarray:
    """Predicted classes for normalised batches."""

    def answer(x: Tensor) -> Tensor:
        h = network.prefix(x)
        return network.process(h, network.route_features(h)).argmax(1).cpu()

    with torch.inference_mode():
        return torch.cat(list(in_pieces(answer, batches))).numpy()


def _folded(graph: fx.GraphModule) -> fx.GraphModule:
    """A network in the form in which routed networks run."""
    twin = copy.deepcopy(fold_batch_norm(graph)).eval()
    rows = any(p.ndim == 4 for p in twin.parameters())
    return twin.to(memory_format=torch.channels_last) if rows else twin


def _fast(batch: Tensor) -> Tensor:
    """Images in the layout of `_folded` networks."""
    return batch.contiguous(memory_format=torch.channels_last) if batch.ndim == 4 else batch


def _reads_samples(recipe: Recipe) -> bool:
    """Whether scoring runs the network on samples, beside what `gather` has collected."""
    return recipe.measures_losses or not recipe.criterion.needs <= _COLLECTED
