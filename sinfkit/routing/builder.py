"""Builds a routed network by a plan, and tells what it gives on the held-out samples."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..criteria.discriminability import average
from ..graph.cost import paired_latency
from ..graph.cuts import CutPoint, split
from ..inference.forms import fast_form
from ..inference.measure import base_for_timing, branch_costs
from ..inference.network import (
    Route,
    RouteFit,
    SINFNetwork,
    cluster_posterior,
    fit_route_predictor,
    fuse,
)
from ..pruning.layer_times import expected_seconds
from ..pruning.recipe import extract
from ..repair.distillation import Lesson, distill
from ..repair.walk import graph_of
from ..utils.device import in_pieces
from ..utils.params import naming
from .assembly import (
    Prefix,
    Subgraph,
    assemble,
    build_prefix,
    build_subgraphs,
    lower_rank,
    pooled_output,
    routed_samples,
)
from .clusters import Clusters, Grouping, group_classes
from .gates import Gates, Outcome, Passage, Signals, choose_gates, let_through
from .study import Plan, Samples, Size, Study

ROUTER_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
TEMPERATURES = tuple(float(t) for t in np.geomspace(0.5, 4.0, 13))


@dataclass(frozen=True)
class HeldOut:
    """What the branches of a routed network say on n held-out samples.

    `log_posterior` has shape (n, n_classes), `cluster` and `confidence` (n,), and `logits`, the
    routed subgraph's without temperature, (n, n_classes).
    """

    log_posterior: Tensor
    cluster: Tensor
    confidence: Tensor
    logits: Tensor


def observe(network: SINFNetwork, batches: Iterable[Tensor]) -> HeldOut:
    """Route normalised samples and run each one's own cluster."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        h = network.prefix(x)
        route = network.route_features(h)
        logits = network.branch_logits(h, route.cluster)
        return route.log_posterior, route.cluster, route.confidence, logits

    with torch.inference_mode():
        columns = zip(*in_pieces(run, batches), strict=True)
        return HeldOut(*(torch.cat(column).cpu() for column in columns))


def fallback_answers(network: SINFNetwork, batches: Iterable[Tensor]) -> np.ndarray:
    """Predicted classes of normalised samples that all take the fallback."""

    def answer(x: Tensor) -> Tensor:
        h = network.prefix(x)
        route = network.route_features(h)
        unsure = replace(route, confidence=torch.full_like(route.confidence, -1.0))
        return network.process(h, unsure).argmax(1).cpu()

    with torch.inference_mode():
        return torch.cat(list(in_pieces(answer, batches))).numpy()


def choose_weight(
    held: HeldOut,
    codes: np.ndarray,
    answered: Tensor,
    weights: Sequence[float],
    sample_weight: np.ndarray | None = None,
) -> tuple[float, Tensor]:
    """Choose the router's weight and one temperature per subgraph by held-out log loss.

    `answered` (n_clusters, n_classes) are the classes that each subgraph answers.  A temperature
    is fitted on the samples whose class is among them, and 1 where there are fewer than ten.
    """
    y = torch.as_tensor(codes)
    members = answered[held.cluster]
    open_ = members.gather(1, y[:, None])[:, 0]
    counts = None if sample_weight is None else torch.as_tensor(sample_weight)
    best: tuple[float, float, Tensor] | None = None
    for weight in weights:
        temperatures = torch.ones(len(answered), dtype=held.logits.dtype)
        losses = []
        for t in TEMPERATURES:
            joint = held.logits / t + weight * held.log_posterior
            log_p = torch.log_softmax(joint.masked_fill(~members, -torch.inf), 1)
            losses.append(-log_p.gather(1, y[:, None])[:, 0])
        table = torch.stack(losses)
        for c in range(len(answered)):
            rows = open_ & (held.cluster == c)
            if counts is not None and float(counts[rows].sum()) >= 10:
                mean = table[:, rows].to(counts) @ counts[rows]
                temperatures[c] = TEMPERATURES[int(mean.argmin())]
            elif counts is None and int(rows.sum()) >= 10:
                temperatures[c] = TEMPERATURES[int(table[:, rows].mean(1).argmin())]
        fused = _fused(held, answered, temperatures, weight)
        each = -fused.gather(1, y[:, None]).clamp_min(1e-12).log()
        loss = float(each.mean() if counts is None else average(each, counts.to(each)))
        if best is None or loss < best[0]:
            best = (loss, weight, temperatures)
    assert best is not None
    return best[1], best[2]


def routed_answers(
    held: HeldOut, answered: Tensor, temperatures: Tensor, weight: float
) -> np.ndarray:
    """Predicted classes where every sample takes its own cluster's subgraph."""
    return _fused(held, answered, temperatures, weight).argmax(1).numpy()


def _fused(held: HeldOut, answered: Tensor, temperatures: Tensor, weight: float) -> Tensor:
    """Probabilities where every sample takes its own cluster's subgraph."""
    logits = held.logits / temperatures[held.cluster][:, None]
    return fuse(held.log_posterior, logits, answered[held.cluster], weight)


@dataclass(frozen=True)
class Built:
    """A routed network, and what it gives on the held-out samples.

    `subgraphs` has None for a cluster of one class; `relative_time` is the expected time of a batch
    over the base's, by the model of the layers' times, and NaN unless costs are counted in it;
    `distillation` is the loss of each epoch.
    """

    plan: Plan
    clusters: Clusters
    network: SINFNetwork
    subgraphs: list[Subgraph | None]
    signals: Signals
    gates: Gates
    passage: Passage
    route_accuracy: float
    relative_time: float
    outcome: Outcome
    distillation: tuple[float, ...] = ()


@dataclass(eq=False)
class Builder:
    """Builds networks; prefixes that several of them share are built once."""

    study: Study
    _prefixes: dict[tuple[object, ...], Prefix] = field(default_factory=dict)

    def build(self, plan: Plan, *, time_it: bool = False) -> Built:
        """Build a network, choose its weights and thresholds, and count what it gives.

        `time_it` measures the speed-up on a batch of held-out samples.
        """
        study, cut, pool_size = self.study, plan.cut, plan.grouping.pool_size
        prefix = self._prefix(plan)
        features = pooled_output(prefix.module, study.batches(study.fit), pool_size)
        held = pooled_output(prefix.module, study.batches(study.choose), pool_size)
        route, clusters = fit_route(study, plan, features, held)
        members = [np.flatnonzero(clusters.class_clusters == c) for c in range(len(clusters.names))]
        several = [classes for classes in members if len(classes) > 1]
        recipe = study.config.subgraphs
        # With widths known, what consumers lose is not asked for.
        losses = False if prefix.widths or recipe.schedule != "global" else None
        scored = study.score(study.groups(cut)[1], several, recipe, losses)
        routed = routed_samples(study, features, route, clusters.class_clusters)
        subgraphs = build_subgraphs(study, cut, plan.size, prefix, members, scored, routed)
        network = assemble(
            study, cut, prefix.module, route.predictor, subgraphs, clusters.class_clusters
        )
        return self._tuned(plan, clusters, network, subgraphs, time_it)

    def distilled(self, built: Built, *, time_it: bool = False) -> Built:
        """A network trained on the samples that fit, if the study says so; else itself.

        Its route predictor is fitted anew to what the prefix says then; who belongs to which
        cluster stays.
        """
        study, pool_size = self.study, built.plan.grouping.pool_size
        if study.config.distill is None:
            return built
        network = copy.deepcopy(built.network)
        set_gates(network, Gates())
        losses = teach(study, network)
        features, held = (
            pooled_output(network.prefix, study.batches(part), pool_size)
            for part in (study.fit, study.choose)
        )
        network.router = fit_router(study, pool_size, features, held).predictor
        network.to(study.calibration.batcher.device)
        tuned = self._tuned(built.plan, built.clusters, network, built.subgraphs, time_it)
        return replace(tuned, distillation=tuple(losses))

    def _tuned(
        self,
        plan: Plan,
        clusters: Clusters,
        network: SINFNetwork,
        subgraphs: list[Subgraph | None],
        time_it: bool,
    ) -> Built:
        """Choose weights and thresholds, and count what the network gives."""
        study = self.study
        seen = observe(network, study.batches(study.choose))
        tune(study, network, seen)
        signals = read_signals(study, network, study.choose, seen)
        gates = choose_gates(
            signals,
            study.config.exit_threshold,
            study.config.confidence_threshold,
            study.config.max_accuracy_drop,
        )
        set_gates(network, gates)
        passage = let_through(signals, gates)
        timed = study.config.subgraphs.budget_unit == "latency"
        seconds = relative_time(study, network, seen) if timed else float("nan")
        cost = seconds if timed else passage.cost
        faster = speedup(study, network) if time_it else float("nan")
        right_route = seen.cluster.numpy() == clusters.class_clusters[study.choose.y]
        return Built(
            plan,
            clusters,
            network,
            subgraphs,
            signals,
            gates,
            passage,
            study.choose.mean(right_route),
            seconds,
            Outcome(passage.drop, cost, faster),
        )

    def signals(self, built: Built, samples: Samples) -> Signals:
        """What the gates need to know of other samples than those that choose."""
        set_gates(built.network, Gates())
        seen = observe(built.network, self.study.batches(samples))
        return read_signals(self.study, built.network, samples, seen)

    def base(self, cut: CutPoint, pool_size: int) -> Built:
        """The base itself as a routed network of one cluster, which answers what the base does."""
        study = self.study
        calibration, outputs = study.calibration, study.calibration.table.outputs
        plan = Plan(cut, Grouping(n_clusters=1, pool_size=pool_size), Size(1.0))
        whole = extract(
            calibration.graph,
            calibration.groups,
            {study.output_group: outputs},
            study.batch[:64],
            outputs.tolist(),
        )
        dense, tail = study.halves(cut)[0], split(graph_of(whole), cut)[1]
        features = pooled_output(dense, study.batches(study.fit), pool_size)
        choosing = pooled_output(dense, study.batches(study.choose), pool_size)
        route, clusters = fit_route(study, plan, features, choosing)
        subgraphs: list[Subgraph | None] = [Subgraph(tail, {}, {}, {})]
        network = assemble(study, cut, dense, route.predictor, subgraphs, clusters.class_clusters)
        network.router_weight = 0.0
        seen = observe(network, study.batches(study.choose))
        signals = read_signals(study, network, study.choose, seen)
        passage = let_through(signals, Gates())
        outcome = Outcome(passage.drop, 1.0)
        return Built(
            plan, clusters, network, subgraphs, signals, Gates(), passage, 1.0, 1.0, outcome
        )

    def _prefix(self, plan: Plan) -> Prefix:
        """The part before the cut, sliced for all classes, of the rank that is wanted."""
        config, size, n_clusters = self.study.config, plan.size, plan.grouping.n_clusters or 1
        key: tuple[object, ...] = (plan.cut,)
        if config.shares_budget:
            # A time has a call for each cluster.
            timed = config.subgraphs.budget_unit == "latency"
            key = (plan.cut, size.budget, n_clusters if timed else None)
        if key not in self._prefixes:
            self._prefixes[key] = build_prefix(self.study, plan.cut, size, n_clusters)
        if size.low_rank == 1:
            return self._prefixes[key]
        lower = (*key, size.low_rank)
        if lower not in self._prefixes:
            whole = self._prefixes[key]
            self._prefixes[lower] = lower_rank(self.study, whole, plan.cut, size.low_rank)
        return self._prefixes[lower]


def fit_route(
    study: Study, plan: Plan, features: Tensor, held: Tensor
) -> tuple[RouteFit, Clusters]:
    """Fit the route predictor on pooled features, and group the classes by them."""
    fit, calibration = study.fit, study.calibration
    route = fit_router(study, plan.grouping.pool_size, features, held)
    with naming("clusterer"):
        clusters = group_classes(
            plan.grouping,
            calibration.table.classes,
            features,
            fit.y,
            route.penalty,
            calibration.seed,
            fit.weight,
        )
    return route, clusters


def fit_router(study: Study, pool_size: int, features: Tensor, held: Tensor) -> RouteFit:
    """Fit the route predictor on pooled features of the samples that fit and that choose."""
    fit, choose = study.fit, study.choose
    return fit_route_predictor(
        features,
        fit.y,
        held,
        choose.y,
        pool_size=pool_size,
        weight=fit.weight,
        held_out_weight=choose.weight,
    )


_CLOSED = -1e4  # logit of a class that a subgraph does not answer


def teach(study: Study, network: SINFNetwork) -> list[float]:
    """Train prefix and subgraphs, in place, each subgraph on what is routed to it before."""
    calibration, fit, how = study.calibration, study.fit, study.config.distill
    assert how is not None
    graph, outputs = calibration.graph, calibration.table.outputs.tolist()
    clusters = network.class_clusters[torch.as_tensor(fit.y, device=network.class_clusters.device)]
    if study.config.answers == "all":
        with torch.inference_mode():
            sent = in_pieces(
                lambda x: network.route_features(network.prefix(x)).cluster, study.batches(fit)
            )
            clusters = torch.cat(list(sent))
    # A cluster of one class has no subgraph: the router's answer stands.
    several = torch.tensor([network.subgraph(c) is not None for c in range(network.n_clusters)])
    kept = np.flatnonzero(several[clusters.cpu()].numpy())
    index, clusters = fit.index[kept], clusters[torch.as_tensor(kept, device=clusters.device)]

    def closed(logits: Tensor, places: Tensor) -> Tensor:
        members = network.answered[clusters[places.to(clusters.device)]]
        return logits.masked_fill(~members, _CLOSED)

    def answer(x: Tensor, places: Tensor) -> Tensor:
        branch = clusters[places.to(clusters.device)]
        return closed(network.branch_logits(network.prefix(x), branch), places)

    parts: list[nn.Module] = [network.subgraphs]
    if network.fallback != "base":  # the base's rest reads the prefix, too
        parts.append(network.prefix)
    lesson = Lesson(
        student=nn.ModuleList(parts),
        answer=answer,
        teach=lambda x, places: closed(graph(x)[:, outputs], places),
        read=lambda places: calibration.batcher.at(fit.X, index[places]),
        weight=np.ones(len(kept)) if fit.weight is None else fit.weight[kept],
    )
    return distill(lesson, how, calibration.seed, study.progress)


def tune(study: Study, network: SINFNetwork, seen: HeldOut) -> None:
    """Set the router's weight and the temperatures by what was seen."""
    given = study.config.router_weight
    weight, temperatures = choose_weight(
        seen,
        study.choose.y,
        network.answered.cpu(),
        ROUTER_WEIGHTS if isinstance(given, str) else (float(given),),
        study.choose.weight,
    )
    network.router_weight = weight
    network.temperatures.copy_(temperatures)


def read_signals(study: Study, network: SINFNetwork, samples: Samples, seen: HeldOut) -> Signals:
    """What the gates need to know of some samples."""
    y, temperatures = samples.y, network.temperatures.cpu()
    answers = routed_answers(seen, network.answered.cpu(), temperatures, network.router_weight)
    sure, early = (part.numpy() for part in seen.log_posterior.max(1))
    raw = study.calibration.batcher.load(study.calibration.X[:1])
    costs, base = branch_costs(network, raw), max(study.calibration.macs[0], 1)
    routed, cluster = answers == y, seen.cluster.numpy()
    cost = costs["macs"][cluster]
    fallback, fallback_cost = routed, cost
    if network.fallback != "none" and network.n_clusters > 1:
        fallback = fallback_answers(network, study.batches(samples)) == y
        if network.fallback == "base":
            fallback_cost = np.full(len(y), costs["macs"][network.n_clusters])
        else:
            posterior = network_posterior(network, seen)
            likely = posterior.topk(2, dim=1).indices.numpy()
            fallback_cost = costs["macs"][likely].sum(1)
    return Signals(
        study.base_right(samples),
        sure,
        early == y,
        seen.confidence.numpy(),
        routed,
        fallback,
        cost / base,
        fallback_cost / base,
        costs["shared_macs"] / base,
        samples.weight,
    )


def network_posterior(network: SINFNetwork, seen: HeldOut) -> Tensor:
    """Probability of each cluster, of shape (n_samples, n_clusters)."""
    return cluster_posterior(seen.log_posterior, network.class_clusters.cpu(), network.n_clusters)


def set_gates(network: SINFNetwork, gates: Gates) -> None:
    """Give a network its thresholds."""
    network.threshold = float(gates.confidence)
    network.exit_threshold = None if gates.exit is None else float(gates.exit)


def run_shares(study: Study, network: SINFNetwork, seen: HeldOut) -> np.ndarray:
    """Share of the held-out samples that run each branch of the network."""
    posterior = network_posterior(network, seen)
    route = Route(seen.log_posterior, posterior, seen.cluster, seen.confidence)
    rows, branch = (part.numpy() for part in network.branches(route))
    weight = np.ones(len(study.choose.y)) if study.choose.weight is None else study.choose.weight
    n = network.n_clusters + 2
    return np.bincount(branch, weights=weight[rows], minlength=n) / weight.sum()


def relative_time(study: Study, network: SINFNetwork, seen: HeldOut) -> float:
    """Expected time of a batch over the base's, from the times of the layers."""
    n, runs = study.calibration.batcher.batch_size, run_shares(study, network, seen)
    branches = [network.subgraph(c) for c in range(network.n_clusters)] + [network.rest]
    parts: list[tuple[nn.Module, float]] = [(network.prefix, 1.0)]
    # Behind the clusters' stands the base's tail, then what leaves at the route predictor.
    for branch, share in zip(branches, runs[:-1], strict=True):
        if branch is not None:
            parts.append((branch, float(share)))
    base = sum(time.seconds(n) for time in study.times.values())
    return expected_seconds(parts, study.times, study.calibration.graph, n) / base


def speedup(study: Study, network: SINFNetwork) -> float:
    """Time of the base over that of the network on one batch, in turns."""
    batcher, held = study.calibration.batcher, study.choose
    x = batcher.load(held.X[held.index[: batcher.batch_size]])
    base = base_for_timing(network, study.calibration.frozen.module(batcher.device), x)
    fast = fast_form(network, lambda: x)
    latency = paired_latency({"base": lambda: base(x), "sinf": lambda: fast(x)}, repeats=7)
    return 1.0 / latency.ratio("sinf", "base")
