"""Where to put the route predictor: candidates, what each is expected to give, and their order."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx

from ..criteria.activations import collect
from ..data.calibration import Calibration
from ..data.validation import mean
from ..graph.cost import count_macs
from ..graph.cuts import CutPoint, layer_names, split
from ..inference.router import (
    choose_exit,
    choose_threshold,
    cluster_posterior,
    fit_route_predictor,
    fuse,
)
from ..pruning.recipe import Recipe, choose_channels, sliceable
from ..slicing.groups import ChannelGroup, slice_channels
from ..utils.params import caller_level, naming
from .clusters import Grouping, group_classes
from .search import Size

__all__ = ["Candidate", "rank_candidates"]


@dataclass(frozen=True)
class Candidate:
    """A place for the route predictor, and what is expected of it on held-out samples.

    Attributes
    ----------
    cut : CutPoint
    n_clusters : int
        As asked for; what a given mapping has may differ.
    route_accuracy : float
        Share of samples whose cluster the probe predicts.
    accuracy : float
        Of the unpruned network (restricted to the routed cluster, where subgraphs answer no other
        classes), fused with the probe, fallback and exits included: what routing alone costs.
    macs : float
        Expected multiplications per sample, after slicing, with fallback and exits.
    """

    cut: CutPoint
    n_clusters: int
    route_accuracy: float
    accuracy: float
    macs: float


def usable_cuts(graph: fx.GraphModule, cuts: Sequence[CutPoint], output: str) -> list[CutPoint]:
    """Cuts with a hidden layer behind them, so that a subgraph has something to leave out."""
    names = set(layer_names(graph)) - {output}
    return [cut for cut in cuts if names - set(layer_names(split(graph, cut)[0]))]


def rank_candidates(
    candidates: Sequence[Candidate], route_accuracy: float | None, target: float
) -> list[Candidate]:
    """Order the places of the route predictor, the best first.

    Parameters
    ----------
    candidates : sequence of Candidate
        In forward order.
    route_accuracy : float or None
        Those that reach it come first, the earliest in front (stated by the paper, with 75 %).
        None leaves this rule out.
    target : float
        Accuracy to keep.  By it the others are ordered: first those whose expected accuracy
        reaches it, the cheapest in front; then the rest, the most accurate in front.

    Returns
    -------
    list of Candidate

    Warns
    -----
    UserWarning
        Where no candidate routes as well as `route_accuracy` demands.
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
        warnings.warn(
            f"No layer predicts the cluster with {route_accuracy:.0%} accuracy on held-out "
            f"samples; {best.cut.name!r} ({best.route_accuracy:.0%}) is taken, which keeps the "
            "best accuracy for the time it saves. Fewer clusters, or clusters by confusion, route "
            "better.",
            UserWarning,
            stacklevel=caller_level(),
        )
    return early + [c for c in ranked if c not in early]


def expected_macs(
    calibration: Calibration, cut: CutPoint, recipe: Recipe, size: Size
) -> tuple[float, float, float]:
    """Multiplications per sample of each part if the network were cut at `cut`.

    Returns
    -------
    prefix, subgraph, rest : float
        The sliced prefix, one sliced subgraph with all outputs, and the dense rest.
    """
    graph = calibration.graph
    inside, behind = sides(graph, cut)
    dense = count_macs(graph, calibration.example)[1]
    before, rest = (sum(dense.get(name, 0) for name in part) for part in (inside, behind))
    if size.prefix_ratio is None:
        assert size.budget is not None
        # Which layers will lose how much depends on scores that are not known yet.
        return size.budget * before, size.budget * rest, rest
    groups = calibration.groups
    early = replace(
        recipe, schedule="uniform", budget=None, pruning_ratios=(0.0, size.prefix_ratio)
    )
    keep = first_channels(sliceable(groups, inside), early)
    if size.budget is None:
        late = replace(recipe, pruning_ratios=(size.min_ratio, size.max_ratio))
        keep |= first_channels(sliceable(groups, behind), late)
    smaller = slice_channels(graph, calibration.example, keep, groups=groups).model
    sliced = count_macs(smaller, calibration.example)[1]
    prefix, subgraph = (
        float(sum(sliced.get(name, 0) for name in part)) for part in (inside, behind)
    )
    if size.budget is not None:
        subgraph = max(size.budget * (before + rest) - prefix, 0.0)
    return prefix, subgraph, rest


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
    train: tuple[Iterable[Tensor], np.ndarray, np.ndarray | None],
    held: tuple[Iterable[Tensor], np.ndarray, np.ndarray | None],
    base_logits: Tensor,
    groupings: Mapping[int, Grouping],
    size: Size,
    fallback: str,
    answers: str,
    exits: bool,
    target: float,
) -> list[Candidate]:
    """Fit a probe behind each cut and estimate what routing there would give.

    Parameters
    ----------
    calibration : Calibration
    cuts : sequence of CutPoint
    recipe : Recipe
    train, held : (batches, codes, weight)
        Normalised batches, their classes and how many times each sample counts (None: once), for
        the probes and for the estimates.
    base_logits : Tensor of shape (n_held_out, n_classes)
        The base's answers on the held-out samples.
    groupings : mapping of int to Grouping
        For each number of clusters to try: how the classes are grouped.
    size : Size
    fallback : str
    answers : str
        Whether a subgraph answers ``"all"`` classes or those of its ``"cluster"``.
    exits : bool
        Whether samples may leave at the probe.
    target : float
        Accuracy to keep; sets the thresholds of the estimate.

    Returns
    -------
    list of Candidate
        One for each cut and number of clusters.
    """
    nodes = {cut.name: cut.node for cut in cuts}
    pool_size = next(iter(groupings.values())).pool_size
    seen = collect(calibration.graph, train[0], nodes, pool_size)
    unseen = collect(calibration.graph, held[0], nodes, pool_size)
    codes, weight = held[1:]
    base_correct = base_logits.argmax(1).numpy() == codes
    found = []
    for cut in cuts:
        route = fit_route_predictor(
            seen.pooled[cut.name],
            train[1],
            unseen.pooled[cut.name],
            codes,
            pool_size=pool_size,
            weight=train[2],
            held_out_weight=weight,
        )
        prefix, subgraph, rest = expected_macs(calibration, cut, recipe, size)
        for n_clusters, grouping in groupings.items():
            with naming("clusterer"):
                class_clusters = group_classes(
                    grouping,
                    calibration.table.classes,
                    seen.pooled[cut.name],
                    train[1],
                    route.penalty,
                    calibration.seed,
                    train[2],
                ).class_clusters
            clusters = torch.as_tensor(class_clusters)
            posterior = cluster_posterior(
                route.log_posterior, clusters, int(class_clusters.max()) + 1
            )
            confidence, chosen = posterior.max(1)
            members = (clusters == chosen[:, None]) | (answers == "all")
            fused = fuse(route.log_posterior, base_logits, members, 0.5)
            correct = fused.argmax(1).numpy() == codes
            below = np.zeros(len(codes), dtype=bool)
            if fallback == "base":
                threshold = choose_threshold(
                    confidence.numpy(), correct, base_correct, target=target, weight=weight
                )
                below = confidence.numpy() < threshold
                correct = np.where(below, base_correct, correct)
            leaves = np.zeros(len(codes), dtype=bool)
            if exits:
                sure, early = (part.numpy() for part in route.log_posterior.exp().max(1))
                leaves = sure >= choose_exit(
                    sure, early == codes, correct, target=target, weight=weight
                )
                correct = np.where(leaves, early == codes, correct)
            unsure, routed = mean(below & ~leaves, weight), mean(~below & ~leaves, weight)
            found.append(
                Candidate(
                    cut,
                    n_clusters,
                    mean(chosen.numpy() == class_clusters[codes], weight),
                    mean(correct, weight),
                    prefix + routed * subgraph + unsure * rest,
                )
            )
    return found
