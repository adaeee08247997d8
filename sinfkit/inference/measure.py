"""What base and result answer, cost and take, measured side by side."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.calibration import Batcher
from ..data.images import Images
from ..data.validation import check_answers
from ..graph.cost import Latency, count_macs, count_parameters, fold_batch_norm, paired_latency
from ..graph.recording import output_of
from ..graph.tracing import trace
from ..promise import count_discordant
from ..utils.device import channels_last, in_pieces
from .forms import fast_form
from .network import SINFNetwork
from .report import ClusterRow, Promise, PruningReport, SINFReport

__all__ = ["base_for_timing", "branch_costs", "make_pruning_report", "make_report"]


def make_report(
    network: SINFNetwork,
    base: nn.Module,
    batcher: Batcher,
    X: Images,
    codes: np.ndarray,
    class_clusters: np.ndarray,
    cluster_names: np.ndarray,
    *,
    route_layer: str,
    promise: Promise | None,
    distilled_epochs: int,
    latency_batch: int,
    repeats: int,
) -> SINFReport:
    """Measure the base and the routed network on the same samples, of classes `codes`.

    `repeats` pairs are timed on `latency_batch` samples; 0 for none.
    """
    clusters = torch.as_tensor(class_clusters)
    truth = clusters[torch.as_tensor(codes)]
    seen = _observe(network, base, batcher, X, truth)
    members = clusters == truth[:, None]
    y = torch.as_tensor(codes)
    base_right = seen.base.argmax(1) == y
    restricted_right = seen.base.masked_fill(~members, -torch.inf).argmax(1) == y
    subgraph_right = seen.true_logits.masked_fill(~members, -torch.inf).argmax(1) == y
    routed_right = seen.answers.argmax(1) == y
    route_right = seen.cluster == truth

    example = batcher.load(X[:1])
    costs = branch_costs(network, example)
    branch_macs, branch_parameters = costs["macs"], costs["parameters"]
    rows = []
    for c, name in enumerate(cluster_names.tolist()):
        own = truth == c
        has_subgraph = network.subgraph(c) is not None
        rows.append(
            ClusterRow(
                name,
                int((clusters == c).sum()),
                int(own.sum()),
                _mean(base_right[own]),
                _mean(restricted_right[own]),
                _mean(subgraph_right[own]) if has_subgraph else float("nan"),
                _mean(routed_right[own]),
                _mean(route_right[own]),
                costs["shared_macs"] + branch_macs[c],
            )
        )
    share = seen.runs / len(codes)
    discordant = count_discordant(base_right.numpy(), routed_right.numpy())
    ways = _ways(network, seen)
    return SINFReport(
        base_accuracy=_mean(base_right),
        accuracy=_mean(routed_right),
        lost=discordant.lost,
        gained=discordant.gained,
        n_samples=len(codes),
        base_macs=count_macs(base, network.normalise(example))[0],
        macs=costs["shared_macs"] + float(share @ branch_macs),
        base_parameters=count_parameters(base),
        parameters=count_parameters(network),
        base_bytes=held_bytes(base),
        bytes=held_bytes(network),
        latency=_time(network, base, batcher.load(X[:latency_batch]), repeats),
        latency_batch=latency_batch,
        promise=promise,
        distilled_epochs=distilled_epochs,
        # The true route also rules out the other clusters' classes.
        oracle_accuracy=_mean(seen.oracle.masked_fill(~members, 0).argmax(1) == y),
        route_accuracy=_mean(route_right),
        base_route_accuracy=_mean(clusters[seen.base.argmax(1)] == truth),
        **{f"{way}_share": _mean(taken) for way, taken in ways.items()},
        fallback=network.fallback,
        active_parameters=costs["shared_parameters"] + float(share @ branch_parameters),
        route_layer=route_layer,
        clusters=rows,
    )


def make_pruning_report(
    model: nn.Module,
    base: nn.Module,
    batcher: Batcher,
    X: Images,
    codes: np.ndarray,
    outputs: np.ndarray,
    *,
    promise: Promise | None,
    distilled_epochs: int,
    latency_batch: int,
    repeats: int,
) -> PruningReport:
    """Measure the base and the smaller network on the same samples, of classes `codes`.

    `outputs` are the base's outputs for the classes, which alone are open to it.
    """
    columns = torch.as_tensor(outputs)

    def look(x: Tensor) -> tuple[Tensor, Tensor]:
        answers = output_of(base, x)[:, columns.to(x.device)]
        return answers.argmax(1).cpu(), model(x).argmax(1).cpu()

    with torch.inference_mode():
        pieces = list(in_pieces(look, batcher(X)))
    y = torch.as_tensor(codes)
    base_right, right = (torch.cat(answers) == y for answers in zip(*pieces, strict=True))
    discordant = count_discordant(base_right.numpy(), right.numpy())
    example = batcher.normalise(batcher.load(X[:1]))
    latency = None
    if repeats:
        x = batcher.normalise(batcher.load(X[:latency_batch]))
        own = x.clone()  # the base may write into what it is given
        fast_base, fast = fast_form(base, own.clone), fast_form(model, lambda: x)
        latency = paired_latency(
            {"base": lambda: fast_base(own), "result": lambda: fast(x)}, repeats=repeats
        )
    return PruningReport(
        base_accuracy=_mean(base_right),
        accuracy=_mean(right),
        lost=discordant.lost,
        gained=discordant.gained,
        n_samples=len(codes),
        base_macs=count_macs(base, example)[0],
        macs=count_macs(model, example)[0],
        base_parameters=count_parameters(base),
        parameters=count_parameters(model),
        base_bytes=held_bytes(base),
        bytes=held_bytes(model),
        latency=latency,
        latency_batch=latency_batch,
        promise=promise,
        distilled_epochs=distilled_epochs,
    )


def held_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; what layers share counts once."""
    storages = (t.untyped_storage() for t in (*module.parameters(), *module.buffers()))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _time(network: SINFNetwork, base: nn.Module, x: Tensor, repeats: int) -> Latency | None:
    """Paired times of base and routed network, both in the form in which they predict."""
    if not repeats:
        return None
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    fast_base, fast = base_for_timing(network, base, x), fast_form(network, lambda: x)
    return paired_latency(
        {"base": lambda: fast_base(x), "result": lambda: fast(x)}, repeats=repeats
    )


def base_for_timing(network: SINFNetwork, base: nn.Module, sample: Tensor) -> nn.Module:
    """Bring the base into SINF's fastest form; `sample` is a batch before normalisation."""
    # A copy: folding shares what it need not fold, and the layout is about to change.
    folded = copy.deepcopy(fold_batch_norm(trace(base, network.normalise(sample[:1]))))
    if sample.ndim == 4:
        folded = channels_last(folded)
    fast = fast_form(folded.eval(), lambda: network.normalise(sample))
    return nn.Sequential(network.normalise, fast).eval()


def branch_costs(network: SINFNetwork, example: Tensor) -> dict[str, Any]:
    """Multiplications and parameters of the shared part and of each branch, for one sample.

    Shapes: `example` (1, ...).
    """
    x = network.normalise(example)
    with torch.inference_mode():
        h = network.prefix(x)
    n = network.n_clusters
    macs, parameters = np.zeros(n + 2), np.zeros(n + 2)
    for c in range(n + 1):
        branch = network.rest if c == n else network.subgraph(c)
        if branch is not None:
            macs[c], parameters[c] = count_macs(branch, h)[0], count_parameters(branch)
    return {
        "shared_macs": count_macs(network.prefix, x)[0] + network.router.weight.numel(),
        "shared_parameters": count_parameters(network.prefix) + count_parameters(network.router),
        "macs": macs,
        "parameters": parameters,
    }


@dataclass(frozen=True)
class _Seen:
    """All answers on the report samples."""

    base: Tensor
    answers: Tensor
    oracle: Tensor
    true_logits: Tensor
    cluster: Tensor
    confidence: Tensor
    leaves: Tensor
    runs: np.ndarray  # runs of each branch


def _observe(
    network: SINFNetwork, base: nn.Module, batcher: Batcher, X: Images, truth: Tensor
) -> _Seen:
    """One pass: base, SINF, SINF with the true route, the true cluster's subgraph."""

    def look(raw: Tensor, own: Tensor) -> tuple[Tensor, ...]:
        x = network.normalise(raw)
        h = network.prefix(x)
        route = network.route_features(h)
        own = own.to(x.device)
        certain = torch.full_like(route.confidence, 2.0)
        oracle = replace(route, cluster=own, confidence=certain)
        rows, branch = network.branches(route)
        leaves = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        leaves[rows[branch == network.n_clusters + 1]] = True
        seen = (
            output_of(base, x)[:, network.outputs],
            network.process(h, route),
            network.process(h, oracle),
            network.branch_logits(h, own),
            route.cluster,
            route.confidence,
            leaves,
            branch,
        )
        return tuple(value.cpu() for value in seen)

    with torch.inference_mode():
        pieces = list(in_pieces(look, batcher.raw(X), truth))
    *columns, branches = zip(*pieces, strict=True)
    runs = np.bincount(torch.cat(branches).numpy(), minlength=network.n_clusters + 2)
    base_logits, answers, forced, own_logits, cluster, confidence, left = map(torch.cat, columns)
    check_answers(answers)
    return _Seen(base_logits, answers, forced, own_logits, cluster, confidence, left, runs)


def _mean(right: Tensor) -> float:
    return float(right.double().mean()) if len(right) else float("nan")


def _ways(network: SINFNetwork, seen: _Seen) -> dict[str, Tensor]:
    """Which samples took which way: each is in exactly one."""
    fallback = (seen.confidence < network.threshold) & ~seen.leaves
    if network.fallback == "none":
        fallback = torch.zeros_like(fallback)
    has_subgraph = torch.tensor(
        [network.subgraph(c) is not None for c in range(network.n_clusters)]
    )[seen.cluster]
    inside = ~seen.leaves & ~fallback
    return {
        "exit": seen.leaves,
        "alone": inside & ~has_subgraph,
        "subgraph": inside & has_subgraph,
        "fallback": fallback,
    }
