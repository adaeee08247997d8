"""What to build: places for the route predictor, numbers of clusters, sizes and ranks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, fx

from ..criteria.activations import collect
from ..errors import OutOfReachError, UnreachableShareError, UnsliceableError
from ..graph.cost import count_macs
from ..graph.cuts import CutPoint, cut_points, find_cut, layer_names, sides
from ..inference.network import cluster_posterior, fit_route_predictor, fuse
from ..pruning.costs import sliceable_share, what_stays_whole
from ..pruning.recipe import Recipe, choose_channels, sliceable
from ..slicing.groups import ChannelGroup, slice_channels
from ..utils.params import naming, warn
from ..utils.progress import about
from .builder import Builder, Built, set_gates
from .clusters import Clusters, Grouping, group_classes
from .gates import Outcome, Signals, Verdict, choose_gates, judge, let_through
from .study import Plan, Samples, Size, Study

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """What the search is for: the cheapest within a loss, or the most accurate at a speed."""

    max_drop: float
    speedup: float | None = None

    def reached(self, outcome: Outcome) -> bool:
        """Tell whether an outcome is within the limit."""
        if self.speedup is not None:
            return outcome.speedup >= self.speedup
        return outcome.drop <= self.max_drop + 1e-12

    def better(self, a: Outcome, b: Outcome) -> bool:
        """Tell whether `a` serves it better than `b`.

        Within the limit, the cheaper (for a speed: the more accurate) is better; outside, the one
        that is nearer to the limit.
        """
        inside = self.reached(a)
        if inside != self.reached(b):
            return inside
        if self.speedup is None:
            return a.cost < b.cost if inside else a.drop < b.drop
        return a.drop < b.drop if inside else a.speedup > b.speedup

    @property
    def away(self) -> int:
        """Which way, over sizes from careful to bold, leads away from the limit."""
        return 1 if self.speedup is None else -1


def hill_climb(
    choices: Sequence[T], start: int, target: Target
) -> Generator[T, Outcome, tuple[int, Outcome]]:
    """Find the best of choices, from careful to bold, over which the outcome has one summit.

    Yields one that is to be tried, and is sent what it gave; the first is number `start`.
    """
    best, found = start, (yield choices[start])
    for step in (1, -1):
        index = start + step
        while 0 <= index < len(choices):
            outcome = yield choices[index]
            if target.better(outcome, found):
                best, found = index, outcome
            elif target.reached(found) or step == target.away:
                break
            index += step
        if best != start and (target.reached(found) or step != target.away):
            break
    return best, found


_PROBE_SAMPLES = 5_000
# In times of a pass of the base over the samples: rough, of one run with a VGG16.
_PASSES_BEFORE, _PASSES_EACH, _PASSES_EPOCH = 8, 7, 3
_CLUSTERS = (1, 2, 5, 10, 20)  # tried where no number is given


@dataclass(frozen=True)
class Candidate:
    """A place for the route predictor, and what is expected of it on held-out samples.

    `n_clusters` is what was asked for; `route_accuracy` the share of samples whose cluster the
    probe predicts.  `accuracy` is that of the unpruned network (restricted to the routed cluster,
    where subgraphs answer no other classes), fused with the probe, fallback and exits included:
    what routing alone costs.  `macs` are the expected multiplications per sample after slicing.
    """

    cut: CutPoint
    n_clusters: int
    route_accuracy: float
    accuracy: float
    macs: float


def plan_networks(
    study: Study,
    groupings: Mapping[int, Grouping],
    route_layer: str | float,
) -> list[Plan]:
    """Where to cut and how many clusters to make: the most promising plan first.

    One plan for each number of clusters, with the cut that suits it best, of middle size.  Nothing
    is tried where there is nothing to choose.
    """
    graph, size = study.calibration.graph, study.config.middle_size
    if isinstance(route_layer, str) and route_layer != "auto":
        with naming("route_layer"):
            cuts = [find_cut(graph, route_layer)]
    else:
        cuts = usable_cuts(graph, cut_points(graph), study.calibration.output)
    if not cuts:
        raise ValueError(
            "The model has no place where it can be cut in two. Pass it as "
            "nn.Sequential(prefix, rest)."
        )
    if len(cuts) == 1 and len(groupings) == 1:
        return [Plan(cuts[0], next(iter(groupings.values())), size)]
    study.progress.doing("looks for a place to cut")
    few = some_of_each(study.fit, _PROBE_SAMPLES, study.rng())
    candidates = try_cuts(study, cuts, groupings, few)
    study.progress.done()
    reach = None if isinstance(route_layer, str) else float(route_layer)
    target = study.choose.mean(study.base_right(study.choose)) - study.config.max_accuracy_drop
    best: dict[int, Plan] = {}
    for found in rank_candidates(candidates, reach, target):
        best.setdefault(found.n_clusters, Plan(found.cut, groupings[found.n_clusters], size))
    return list(best.values())


def groupings_to_try(grouping: Grouping, n_classes: int) -> dict[int, Grouping]:
    """Groupings of several numbers of clusters, of two classes or more on average."""
    most = min(n_classes, max(2, n_classes // 2))
    return {n: replace(grouping, n_clusters=n) for n in _CLUSTERS if n <= most}


def some_of_each(samples: Samples, n: int, rng: np.random.Generator) -> Samples:
    """At most `n` of the samples, drawn by chance, but one of each class in any case."""
    order = rng.permutation(len(samples.y))
    first = np.unique(samples.y[order], return_index=True)[1]
    rows = np.concatenate((order[first], np.delete(order, first)[: max(n - len(first), 0)]))
    return samples.some(rows)


def usable_cuts(graph: fx.GraphModule, cuts: Sequence[CutPoint], output: str) -> list[CutPoint]:
    """Cuts with a hidden layer behind them, so that a subgraph has something to leave out."""
    return [cut for cut in cuts if set(sides(graph, cut)[1]) - {output}]


def rank_candidates(
    candidates: Sequence[Candidate], route_accuracy: float | None, target: float
) -> list[Candidate]:
    """Order the candidates, which come in forward order, the best first.

    Those that reach `route_accuracy` are in front, the earliest first (stated by the paper, with
    75 %).  Then those expected to keep the accuracy `target`, the cheapest first; then the rest,
    the most accurate first.  Warns where none reaches `route_accuracy`.
    """
    good = [c for c in candidates if c.accuracy >= target]
    poor = [c for c in candidates if c.accuracy < target]
    ranked = sorted(good, key=lambda c: (c.macs, -c.accuracy))
    ranked += sorted(poor, key=lambda c: -c.accuracy)
    if route_accuracy is None:
        return ranked
    early = [c for c in candidates if c.route_accuracy >= route_accuracy]
    if not early:
        best = ranked[0]
        warn(
            f"No layer predicts the cluster with {route_accuracy:.0%} accuracy on held-out "
            f"samples; {best.cut.name!r} ({best.route_accuracy:.0%}) is taken, which keeps the "
            "best accuracy for the time it saves. Fewer clusters, or clusters by confusion, route "
            "better."
        )
    return early + [c for c in ranked if c not in early]


def expected_macs(study: Study, cut: CutPoint, size: Size) -> tuple[float, float, float]:
    """Multiplications of prefix, subgraph and dense tail for one sample, as shares of the base's.

    Prefix and subgraph are sliced; the subgraph answers all classes.
    """
    config, (total, dense) = study.config, study.calibration.macs
    names = sides(study.calibration.graph, cut)
    before, tail = (sum(dense.get(name, 0) for name in part) / total for part in names)
    if config.shares_budget:
        assert size.budget is not None
        # Which layers will lose how much depends on scores that are not known yet.
        return size.budget * before, size.budget * tail, tail
    early, late = study.groups(cut)
    keep = first_channels(early, config.prefix)
    if size.budget is None:
        keep |= first_channels(late, config.subgraphs)
    graph, example = study.calibration.graph, study.calibration.example
    smaller = slice_channels(graph, example, keep, groups=study.calibration.groups).model
    sliced = count_macs(smaller, example)[1]
    prefix, subgraph = (sum(sliced.get(name, 0) for name in part) / total for part in names)
    if size.budget is not None:
        subgraph = max(size.budget - prefix, 0.0)
    return prefix, subgraph, tail


def first_channels(groups: Sequence[ChannelGroup], recipe: Recipe) -> dict[str, np.ndarray]:
    """As many channels as `recipe` keeps, whichever: enough to count multiplications."""
    zeros = {group.name: np.zeros(group.n_channels) for group in groups}
    return choose_channels(groups, zeros, recipe)


def try_cuts(
    study: Study, cuts: Sequence[CutPoint], groupings: Mapping[int, Grouping], few: Samples
) -> list[Candidate]:
    """Fit a probe behind each cut, on `few` samples, and estimate what routing there would give.

    Returns one candidate for each cut and each number of clusters, those of `groupings`.
    """
    nodes = {cut.name: cut.node for cut in cuts}
    pool_size = next(iter(groupings.values())).pool_size
    seen, held = (
        collect(study.calibration.graph, study.batches(samples), nodes, pool_size).pooled
        for samples in (few, study.choose)
    )
    found = []
    for cut in cuts:
        route = fit_route_predictor(
            seen[cut.name],
            few.y,
            held[cut.name],
            study.choose.y,
            pool_size=pool_size,
            weight=few.weight,
            held_out_weight=study.choose.weight,
        )
        macs = expected_macs(study, cut, study.config.middle_size)
        for n_clusters, grouping in groupings.items():
            with naming("clusterer"):
                clusters = group_classes(
                    grouping,
                    study.calibration.table.classes,
                    seen[cut.name],
                    few.y,
                    route.penalty,
                    study.calibration.seed,
                    few.weight,
                )
            found.append(estimate(study, cut, n_clusters, route.log_posterior, clusters, macs))
    return found


def estimate(
    study: Study,
    cut: CutPoint,
    n_clusters: int,
    log_posterior: Tensor,
    clusters: Clusters,
    macs: tuple[float, float, float],
) -> Candidate:
    """What routing by a probe is expected to give: subgraphs as good as the base, but smaller."""
    config, held = study.config, study.choose
    class_clusters = torch.as_tensor(clusters.class_clusters)
    posterior = cluster_posterior(log_posterior, class_clusters, len(clusters.names))
    confidence, chosen = posterior.max(1)
    members = (class_clusters == chosen[:, None]) | (config.answers == "all")
    routed = fuse(log_posterior, study.base_logits(held), members, 0.5).argmax(1).numpy() == held.y
    sure, early = (part.numpy() for part in log_posterior.max(1))
    prefix, subgraph, tail = macs
    base = config.fallback == "base"
    signals = Signals(
        study.base_right(held),
        sure,
        early == held.y,
        confidence.numpy(),
        routed,
        study.base_right(held) if base else routed,
        np.full(len(held.y), subgraph),
        np.full(len(held.y), tail if base else subgraph),
        prefix,
        held.weight,
    )
    # Given thresholds are for the finished network, whose subgraphs are worse than the base.
    exits = None if config.exit_threshold is None else "auto"
    passage = let_through(signals, choose_gates(signals, exits, "auto", config.max_accuracy_drop))
    return Candidate(
        cut,
        n_clusters,
        held.mean(chosen.numpy() == clusters.class_clusters[held.y]),
        held.mean(passage.right),
        passage.cost,
    )


_LOW_RANK = 0.5  # tried in a search; at three quarters, two layers take as long as the one


@dataclass(frozen=True)
class Kept:
    """The network that is kept, and what is known of its loss; None where it is the base itself."""

    built: Built
    verdict: Verdict | None


def announce(study: Study, n_plans: int) -> None:
    """Say, before anything is built, about what that takes."""
    if not study.progress.verbose:
        return
    calibration, config, n_sizes = study.calibration, study.config, len(study.config.sizes)
    n_networks = n_plans
    if n_sizes > 1:
        climb = 1 + max(config.first + 1, n_sizes - config.first - 1)
        again = climb if isinstance(config.prefix_low_rank, str) else 0
        n_networks += climb + again + n_sizes - config.first - 1
    n_epochs = 0
    if config.distill is not None:
        n_epochs = config.distill.epochs * (3 if config.searches_size else 1)
    seconds = calibration.pass_seconds()
    n_passes = _PASSES_BEFORE + _PASSES_EACH * n_networks + _PASSES_EPOCH * n_epochs
    study.progress.begin(
        f"up to {n_networks} network{'s' * (n_networks > 1)} on {len(calibration.X)} samples"
        + (f", up to {n_epochs} epochs of distillation" if n_epochs else "")
        + f"; that takes about as long as {n_passes} passes over them, of {about(seconds)} each: "
        f"{about(n_passes * seconds)}",
        n_networks + 3 + n_epochs,
    )


class Search:
    """What was tried, and the best of it."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.config = builder.study.config
        self.progress = builder.study.progress
        self.target = Target(self.config.max_accuracy_drop, self.config.target_speedup)
        self.best: Built | None = None
        self.beside: Built | None = None  # the next more careful one
        self.rows: list[dict[str, object]] = []
        self.missed: OutOfReachError | UnreachableShareError | None = None

    def run(self, plans: Sequence[Plan]) -> Built:
        """Try plans in several sizes, one after the other; return the best network."""
        proposals = self._proposals(plans)
        plan = next(proposals, None)
        while plan is not None:
            outcome = self._try(plan)
            try:
                plan = proposals.send(outcome)
            except StopIteration:
                plan = None
        if self.best is None:
            assert self.missed is not None
            raise self._nothing_sliced(self.missed)
        return self.best

    def _nothing_sliced(self, missed: Exception) -> Exception:
        """What to say where no size could be built; not of budgets that nobody has asked for."""
        if not isinstance(missed, OutOfReachError):
            return missed
        calibration = self.builder.study.calibration
        share = sliceable_share(calibration, sliceable(calibration.groups))
        text = what_stays_whole(calibration, layer_names(calibration.graph), share)
        return UnsliceableError(
            f"{text} Behind the places where the network can be cut, that is too little for any of "
            "the sizes that a search tries. pruner=DCSPruner(budget=0.95), or so, takes what is "
            "there."
        )

    def _proposals(self, plans: Sequence[Plan]) -> Generator[Plan, Outcome, None]:
        """What to build next, given what was built.

        The first plan climbs; the others start where it stopped, and become bolder as long as they
        are better than all before.  Then the best one's prefix gets a low rank, in the same size
        and, while that is better, in others.
        """
        config, target = self.config, self.target

        def sized(plan: Plan, **change: float) -> list[Plan]:
            return [replace(plan, size=replace(size, **change)) for size in config.sizes]

        index, found = yield from hill_climb(sized(plans[0]), config.first, target)
        for plan in plans[1:]:
            for i, bolder in enumerate(sized(plan)[index:], index):
                outcome = yield bolder
                if not target.better(outcome, found):
                    break
                index, found = i, outcome
        if self.best and config.searches_size and isinstance(config.prefix_low_rank, str):
            yield from hill_climb(sized(self.best.plan, low_rank=_LOW_RANK), index, target)

    def judged(self, built: Built) -> Kept:
        """Let samples that chose nothing decide about a network and its thresholds.

        In a search the next more careful size is judged beside it (and, where networks are trained,
        the next bolder one); the base itself is what is left where none keeps within the limit.
        """
        config, study = self.config, self.builder.study
        automatic = config.searches_size and config.target_speedup is None
        finalists = self._finalists(built) if automatic else [built]
        if config.distill is not None:
            finalists = [self._distilled(one) for one in finalists]
        signals = [self.builder.signals(one, study.certify) for one in finalists]
        if config.target_speedup is not None:
            config = replace(
                config,
                exit_threshold=finalists[0].gates.exit,
                confidence_threshold=finalists[0].gates.confidence
                if config.fallback != "none"
                else "auto",
            )
        verdict, within = judge([one.signals for one in finalists], signals, config)
        if not within and automatic:
            cut, pool_size = built.plan.cut, built.plan.grouping.pool_size
            return Kept(self.builder.base(cut, pool_size), None)
        kept = finalists[verdict.point.network]
        set_gates(kept.network, verdict.point.gates)
        return Kept(replace(kept, gates=verdict.point.gates), verdict)

    def _finalists(self, built: Built) -> list[Built]:
        """A network between the more careful size and, where training may reach it, the bolder."""
        finalists, careful = [built], self._beside(built.plan, -1)
        if careful is not None:
            self.progress.doing(_described(careful))
            finalists.insert(0, self.beside or self.builder.build(careful))
        bolder = None if self.config.distill is None else self._beside(built.plan, 1)
        if bolder is not None:
            self.progress.doing(_described(bolder))
            with contextlib.suppress(OutOfReachError, UnreachableShareError):
                finalists.append(self.builder.build(bolder))
        return finalists

    def _distilled(self, built: Built) -> Built:
        """A network after its training, which is noted as another one."""
        trained = self.builder.distilled(built, time_it=self.config.target_speedup is not None)
        self._note(trained)
        return trained

    def _beside(self, plan: Plan, step: int) -> Plan | None:
        """The same plan so many sizes further, if there is one: careful ones are before 0."""
        budgets = [size.budget for size in self.config.sizes]
        index = budgets.index(plan.size.budget) + step
        if not 0 <= index < len(budgets):
            return None
        return replace(plan, size=replace(plan.size, budget=budgets[index]))

    def _try(self, plan: Plan) -> Outcome:
        """Build one network, and remember it if it is the best so far, or next to that."""
        self.progress.doing(_described(plan))
        try:
            built = self.builder.build(plan, time_it=self.config.target_speedup is not None)
        except (OutOfReachError, UnreachableShareError) as error:
            if not self.config.searches_size:
                reach = isinstance(error, OutOfReachError)
                name = "pruner" if reach else "options.prefix_low_rank"
                raise type(error)(f"{name}: {error}") from error
            self.missed = self.missed or error
            return Outcome(drop=1.0, cost=math.inf, speedup=0.0)
        finally:
            self.progress.done()
        self._note(built)
        # Of all others the weights are let go.
        if self.best is None or self.target.better(built.outcome, self.best.outcome):
            beside = self._beside(plan, -1)
            known = (one for one in (self.best, self.beside) if one and one.plan == beside)
            self.beside, self.best = next(known, None), built
            cost, drop = built.passage.cost, built.outcome.drop
            self.progress.best(f"{cost:.0%} of the multiplications, {drop:.1%} lost")
        elif plan == self._beside(self.best.plan, -1):
            self.beside = built
        return built.outcome

    def _note(self, built: Built) -> None:
        """Write down what was tried."""
        outcome, plan, passage = built.outcome, built.plan, built.passage
        row: dict[str, object] = {
            "route_layer": plan.cut.name,
            "n_clusters": built.network.n_clusters,
            "budget": plan.size.budget,
            "low_rank": plan.size.low_rank,
            "accuracy_drop": outcome.drop,
            "relative_macs": passage.cost,
            "fallback_share": passage.fallback_share,
            "exit_share": passage.exit_share,
        }
        if built.distillation:
            row["divergence"] = built.distillation[-1]
        if not math.isnan(built.relative_time):
            row["relative_time"] = built.relative_time
        if not math.isnan(outcome.speedup):
            row["speedup"] = outcome.speedup
        self.rows.append(row)


def _described(plan: Plan) -> str:
    """A plan in a few words."""
    n, size = plan.grouping.n_clusters, plan.size
    text = f"cut at {plan.cut.name}" + ("" if n is None else f", {n} cluster{'s' * (n > 1)}")
    text += "" if size.budget is None else f", budget {size.budget:g}"
    return text + (f", prefix of rank {size.low_rank:g}" if size.low_rank < 1 else "")
