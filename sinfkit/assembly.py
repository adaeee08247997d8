"""The steps that turn a base network into a `SINFNetwork`: cut, prefix, subgraphs, calibration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ._base import Calibration
from .activations import Statistics, collect, pool
from .graph import CutPoint, layer_names, split
from .network import SINFNetwork
from .profiling import count_macs
from .repair import repair
from .routing import choose_threshold, cluster_posterior, fit_route_predictor, fuse
from .subgraph import Recipe, Scored, choose_channels, extract, score_classes, sliceable
from .surgery import ChannelGroup, slice_channels

Grouping = Callable[[Tensor, np.ndarray, Any], np.ndarray]
Batches = Callable[[np.ndarray], Iterable[Tensor]]

ROUTER_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
TEMPERATURES = tuple(float(t) for t in np.geomspace(0.5, 4.0, 13))


@dataclass(frozen=True)
class Candidate:
    """A place for the route predictor, and what is expected of it on held-out samples.

    Attributes
    ----------
    cut : CutPoint
    route_accuracy : float
        Share of samples whose cluster the probe predicts.
    accuracy : float
        Of the unpruned network restricted to the routed cluster, fused with the probe, fallback
        included: what routing alone costs.
    macs : float
        Expected multiplications per sample, after slicing and with the fallback.
    """

    cut: CutPoint
    route_accuracy: float
    accuracy: float
    macs: float


def usable_cuts(graph: fx.GraphModule, cuts: Sequence[CutPoint], output: str) -> list[CutPoint]:
    """Cuts with a hidden layer behind them, so that a subgraph has something to leave out."""
    names = set(layer_names(graph)) - {output}
    return [cut for cut in cuts if names - set(layer_names(split(graph, cut)[0]))]


def choose_cut(candidates: Sequence[Candidate], route_accuracy: float, target: float) -> Candidate:
    """Pick the place of the route predictor.

    Parameters
    ----------
    candidates : sequence of Candidate
        In forward order.
    route_accuracy : float
        The earliest candidate that reaches it is taken (stated by the paper, with 75 %).
    target : float
        Accuracy to keep.  Where no candidate routes well enough: of those whose expected accuracy
        reaches `target` the cheapest; if there is none, the most accurate.

    Returns
    -------
    Candidate
    """
    for candidate in candidates:
        if candidate.route_accuracy >= route_accuracy:
            return candidate
    good = [c for c in candidates if c.accuracy >= target]
    best = min(good, key=lambda c: c.macs) if good else max(candidates, key=lambda c: c.accuracy)
    warnings.warn(
        f"No layer predicts the cluster with {route_accuracy:.0%} accuracy on held-out samples; "
        f"{best.cut.name!r} ({best.route_accuracy:.0%}) is taken, which keeps the best accuracy "
        "for the time it saves. Fewer clusters, or clusters by confusion, route better.",
        UserWarning,
        stacklevel=4,
    )
    return best


def expected_macs(
    calibration: Calibration,
    cut: CutPoint,
    recipe: Recipe,
    prefix_ratio: float,
    unsure: float,
) -> float:
    """Multiplications per sample if `cut` were taken and a share `unsure` fell back to the base."""
    graph = calibration.graph
    inside, behind = sides(graph, cut)
    groups = calibration.groups
    prefix_groups, rest_groups = sliceable(groups, inside), sliceable(groups, behind)
    keep = first_channels(
        prefix_groups, replace(recipe, schedule="uniform", max_ratio=prefix_ratio)
    )
    keep |= first_channels(rest_groups, recipe)
    smaller = slice_channels(graph, calibration.example, keep, groups=groups).model
    dense = count_macs(graph, calibration.example)[1]
    sliced = count_macs(smaller, calibration.example)[1]
    prefix = sum(sliced.get(name, 0) for name in inside)
    rest = sum(sliced.get(name, 0) for name in behind)
    base = sum(dense.get(name, 0) for name in behind)
    return prefix + (1 - unsure) * rest + unsure * base


def first_channels(groups: Sequence[ChannelGroup], recipe: Recipe) -> dict[str, np.ndarray]:
    """As many channels as `recipe` keeps, whichever: enough to count multiplications."""
    zeros = {group.name: np.zeros(group.n_channels) for group in groups}
    return choose_channels(groups, zeros, recipe)


def sides(graph: fx.GraphModule, cut: CutPoint) -> tuple[list[str], list[str]]:
    """Names of the layers before and behind a cut."""
    names = layer_names(graph)
    inside = set(layer_names(split(graph, cut)[0]))
    return [n for n in names if n in inside], [n for n in names if n not in inside]


def try_cuts(
    calibration: Calibration,
    cuts: Sequence[CutPoint],
    recipe: Recipe,
    *,
    train: tuple[Iterable[Tensor], np.ndarray],
    held: tuple[Iterable[Tensor], np.ndarray],
    base_logits: Tensor,
    group_classes: Grouping,
    pool_size: int,
    prefix_ratio: float,
    fallback: str,
    target: float,
) -> list[Candidate]:
    """Fit a probe behind each cut and estimate what routing there would give.

    Parameters
    ----------
    calibration : Calibration
    cuts : sequence of CutPoint
    recipe : Recipe
    train, held : (batches, codes)
        Normalised batches and their classes, for the probes and for the estimates.
    base_logits : Tensor of shape (n_held_out, n_classes)
        The base's answers on the held-out samples.
    group_classes : callable
        ``(features, codes, route) -> class_clusters``.
    pool_size : int
    prefix_ratio : float
    fallback : str
    target : float
        Accuracy to keep; sets the confidence threshold of the estimate.

    Returns
    -------
    list of Candidate
    """
    nodes = {cut.name: cut.node for cut in cuts}
    seen = collect(calibration.graph, train[0], nodes, pool_size)
    unseen = collect(calibration.graph, held[0], nodes, pool_size)
    codes = held[1]
    base_correct = base_logits.argmax(1).numpy() == codes
    found = []
    for cut in cuts:
        route = fit_route_predictor(
            seen.pooled[cut.name],
            train[1],
            unseen.pooled[cut.name],
            codes,
            pool_size=pool_size,
        )
        class_clusters = group_classes(seen.pooled[cut.name], train[1], route)
        clusters = torch.as_tensor(class_clusters)
        n_clusters = int(class_clusters.max()) + 1
        confidence, chosen = cluster_posterior(route.log_posterior, clusters, n_clusters).max(1)
        members = clusters == chosen[:, None]
        fused = fuse(route.log_posterior, base_logits, members, 0.5)
        correct = fused.argmax(1).numpy() == codes
        unsure, accuracy = 0.0, float(correct.mean())
        if fallback == "base":
            threshold = choose_threshold(confidence.numpy(), correct, base_correct, target=target)
            below = confidence.numpy() < threshold
            unsure = float(below.mean())
            accuracy = float(np.where(below, base_correct, correct).mean())
        found.append(
            Candidate(
                cut,
                float(np.mean(chosen.numpy() == class_clusters[codes])),
                accuracy,
                expected_macs(calibration, cut, recipe, prefix_ratio, unsure),
            )
        )
    return found


def slice_prefix(
    calibration: Calibration,
    cut: CutPoint,
    groups: Sequence[ChannelGroup],
    nodes: dict[str, str],
    statistics: Statistics,
    index: np.ndarray,
    recipe: Recipe,
    batches: Batches,
    samples: Tensor,
) -> fx.GraphModule:
    """Slice what lies before the cut, for all classes, and refit it to the dense prefix's output.

    Parameters
    ----------
    calibration : Calibration
    cut : CutPoint
    groups : sequence of ChannelGroup
        Groups wholly before the cut; the last layer's channels cross it, so they are not among
        them and keep their meaning for every subgraph and for the base's rest.
    nodes : dict of str to str
    statistics : Statistics
    index : int ndarray
        Samples to score with.
    recipe : Recipe
    batches : callable
    samples : Tensor of shape (n, ...)
        Normalised samples for the check and the repair.

    Returns
    -------
    GraphModule
    """
    graph, table = calibration.graph, calibration.table
    dense = split(graph, cut)[0]
    if not groups or recipe.max_ratio == 0:
        return dense
    scored = score_classes(
        graph,
        groups,
        nodes,
        statistics,
        index,
        calibration.codes[index],
        recipe,
        outputs=table.outputs.tolist(),
        batches=batches,
        seed=calibration.seed,
    )
    keep = choose_channels(groups, scored.groups, recipe)
    small, support = extract(graph, calibration.groups, keep, samples[:64])
    prefix = split(small, cut)[0]
    repair(
        dense,
        prefix,
        support,
        samples,
        method=recipe.repair,
        batch_size=calibration.batcher.batch_size,
        seed=calibration.seed,
    )
    return prefix


@dataclass(frozen=True)
class Subgraph:
    """One cluster's part of the network.

    Attributes
    ----------
    module : nn.Module
        From the prefix's output to the cluster's logits.
    scores : dict of str to ndarray
    support : dict of str to ndarray
    repair_error : dict of str to float
    """

    module: nn.Module
    scores: dict[str, np.ndarray]
    support: dict[str, np.ndarray]
    repair_error: dict[str, float]


def build_subgraph(
    calibration: Calibration,
    cut: CutPoint,
    groups: Sequence[ChannelGroup],
    output_group: str,
    nodes: dict[str, str],
    statistics: Statistics,
    index: np.ndarray,
    classes: np.ndarray,
    prefixes: tuple[nn.Module, nn.Module],
    recipe: Recipe,
    batches: Batches,
    sample: np.ndarray,
) -> Subgraph:
    """Extract the subgraph of one cluster.

    Parameters
    ----------
    calibration : Calibration
    cut : CutPoint
    groups : sequence of ChannelGroup
        Groups wholly behind the cut.
    output_group : str
    nodes : dict of str to str
    statistics : Statistics
    index : int ndarray
        The cluster's samples, all of which are scored.
    classes : int ndarray
        The cluster's classes, ascending positions in ``table.classes``.
    prefixes : (dense, sliced)
        The sliced one feeds the subgraph; the dense one gives the repair's targets.
    recipe : Recipe
    batches : callable
    sample : int ndarray
        Samples for the check and the repair.

    Returns
    -------
    Subgraph
    """
    graph = calibration.graph
    outputs = calibration.table.outputs[classes]
    scored: Scored = score_classes(
        graph,
        groups,
        nodes,
        statistics,
        index,
        np.searchsorted(classes, calibration.codes[index]),
        recipe,
        outputs=outputs.tolist(),
        batches=batches,
        seed=calibration.seed,
    )
    keep = choose_channels(groups, scored.groups, recipe)
    keep[output_group] = outputs
    check = torch.cat(list(batches(sample[:64])))
    small, support = extract(graph, calibration.groups, keep, check, outputs.tolist())
    dense_rest, rest = split(graph, cut)[1], split(small, cut)[1]
    h_dense, h_sliced = [], []
    with torch.inference_mode():
        for x in batches(sample):
            h_dense.append(prefixes[0](x))
            h_sliced.append(h_dense[-1] if prefixes[1] is prefixes[0] else prefixes[1](x))
    error = repair(
        dense_rest,
        rest,
        support,
        torch.cat(h_dense),
        X_sliced=None if prefixes[1] is prefixes[0] else torch.cat(h_sliced),
        method=recipe.repair,
        batch_size=calibration.batcher.batch_size,
        seed=calibration.seed,
    )
    behind = set(layer_names(rest))
    kept = {k: v for k, v in support.items() if k in behind and k != calibration.output}
    return Subgraph(rest, scored.layers, kept, error)


def pooled_output(prefix: nn.Module, batches: Iterable[Tensor], pool_size: int) -> Tensor:
    """Run the prefix and keep the pooled output of every sample, on the host."""
    with torch.inference_mode():
        return torch.cat([pool(prefix(x), pool_size).cpu() for x in batches])


@dataclass(frozen=True)
class HeldOut:
    """What the branches of a routed network say on held-out samples.

    Attributes
    ----------
    log_posterior : Tensor of shape (n_samples, n_classes)
    cluster : int Tensor of shape (n_samples,)
    confidence : Tensor of shape (n_samples,)
    logits : Tensor of shape (n_samples, n_classes)
        The routed subgraph's, without temperature.
    """

    log_posterior: Tensor
    cluster: Tensor
    confidence: Tensor
    logits: Tensor


def observe(network: SINFNetwork, batches: Iterable[Tensor]) -> HeldOut:
    """Route normalised samples and run each one's own cluster."""
    parts = []
    with torch.inference_mode():
        for x in batches:
            h = network.prefix(x)
            route = network.route_features(h)
            logits = network.branch_logits(h, route.cluster)
            parts.append((route.log_posterior, route.cluster, route.confidence, logits))
    return HeldOut(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def choose_weight(
    held: HeldOut, codes: np.ndarray, class_clusters: Tensor, weights: Sequence[float]
) -> tuple[float, Tensor]:
    """Choose the router's weight and one temperature per subgraph by held-out log loss.

    Parameters
    ----------
    held : HeldOut
    codes : int ndarray of shape (n_samples,)
    class_clusters : int Tensor of shape (n_classes,)
    weights : sequence of float
        Candidates.

    Returns
    -------
    weight : float
    temperatures : Tensor of shape (n_clusters,)
        Fitted on the samples that were routed to the right cluster; 1 where there are fewer than
        ten of them.
    """
    y = torch.as_tensor(codes)
    n_clusters = int(class_clusters.max()) + 1
    right = class_clusters[y] == held.cluster
    members = class_clusters == held.cluster[:, None]
    best: tuple[float, float, Tensor] | None = None
    for weight in weights:
        temperatures = torch.ones(n_clusters, dtype=held.logits.dtype)
        losses = []
        for t in TEMPERATURES:
            joint = held.logits / t + weight * held.log_posterior
            log_p = torch.log_softmax(joint.masked_fill(~members, -torch.inf), 1)
            losses.append(-log_p.gather(1, y[:, None])[:, 0])
        table = torch.stack(losses)
        for c in range(n_clusters):
            rows = right & (held.cluster == c)
            if int(rows.sum()) >= 10:
                temperatures[c] = TEMPERATURES[int(table[:, rows].mean(1).argmin())]
        fused = fuse(
            held.log_posterior,
            held.logits / temperatures[held.cluster][:, None],
            members,
            weight,
        )
        loss = float(-fused.gather(1, y[:, None]).clamp_min(1e-12).log().mean())
        if best is None or loss < best[0]:
            best = (loss, weight, temperatures)
    assert best is not None
    return best[1], best[2]


def routed_answers(
    held: HeldOut, class_clusters: Tensor, temperatures: Tensor, weight: float
) -> np.ndarray:
    """Predicted classes where every sample takes its own cluster's subgraph."""
    members = class_clusters == held.cluster[:, None]
    logits = held.logits / temperatures[held.cluster][:, None]
    return fuse(held.log_posterior, logits, members, weight).argmax(1).numpy()
