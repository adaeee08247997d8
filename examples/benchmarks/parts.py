"""Where a routed network's time goes: part by part, and layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sinfkit.graph import count_macs, paired_latency, trace
from sinfkit.inference import SINFNetwork
from sinfkit.pruning import layer_seconds
from sinfkit.repair import factorized

PARTS = ("prefix", "router", "grouping", "subgraphs", "base's rest", "fusion")
_TURNS = 3  # of base and routed network, layer by layer


def split_cost(
    network: SINFNetwork, base: Callable[[Tensor], Any], x: Tensor, rounds: int
) -> dict[str, float]:
    """Seconds in each part, for one batch.

    Parameters
    ----------
    network : SINFNetwork
    base : callable
        Timed beside it.
    x : Tensor of shape (n_samples, ...)
        Not normalised.
    rounds : int

    Returns
    -------
    dict of str to float
        Medians over rounds: those of `PARTS`; ``"base"`` and ``"whole"``, each run in one piece;
        ``"rows"``, the share of the samples that take the base's rest.

    Notes
    -----
    Router: predictor, and the choice of branches. Grouping (sort, gather, scatter) is what
    running the subgraphs takes beyond the subgraphs by themselves, fusion what answering takes
    beyond that and the base's rest: differences within a round, which noise can make negative.
    """
    with torch.inference_mode():
        h = network.prefix(network.normalise(x))
        route = network.route_features(h)
        rows, branch = network.branches(route)
        taken = h if len(rows) == len(h) else h[rows]
        groups = [(c, taken[branch == c]) for c in range(network.n_clusters + 1)]
    run = [(network.subgraph(c), group) for c, group in groups[:-1] if len(group)]
    run = [(subgraph, group) for subgraph, group in run if subgraph is not None]
    routed = branch < network.n_clusters
    h_routed, own = taken[routed], branch[routed]
    below = groups[-1][1]
    rest = network.rest if len(below) else None
    functions: dict[str, Callable[[], Any]] = {
        "base": lambda: base(x),
        "whole": lambda: network(x),
        "prefix": lambda: network.prefix(network.normalise(x)),
        "router": lambda: network.branches(network.route_features(h)),
        "subgraphs": lambda: [subgraph(group) for subgraph, group in run],
        "base's rest": lambda: rest(below) if rest is not None else None,
        "grouped": lambda: network.branch_logits(h_routed, own) if len(own) else None,
        "answers": lambda: network.process(h, route),
    }
    seconds = paired_latency(functions, repeats=rounds).seconds
    measured = {
        **{name: seconds[name] for name in ("base", "whole", "prefix", "router")},
        "grouping": seconds["grouped"] - seconds["subgraphs"],
        "subgraphs": seconds["subgraphs"],
        "base's rest": seconds["base's rest"],
        "fusion": seconds["answers"] - seconds["grouped"] - seconds["base's rest"],
    }
    found = {name: float(np.median(times)) for name, times in measured.items()}
    return found | {"rows": len(below) / len(x)}


def by_layer(network: SINFNetwork, base: nn.Module, x: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Multiplications and seconds of each layer, in the base and in the routed network.

    Parameters
    ----------
    network : SINFNetwork
    base : nn.Module
        Folded, behind the normalisation.
    x : Tensor of shape (n_samples, ...)
        One batch, not normalised.
    rounds : int
        Passes that are measured.

    Returns
    -------
    list of dict
        In order of execution: ``layer``, ``base_macs``, ``macs`` (for one sample, mean over the
        batch), ``base_seconds``, ``seconds`` (for the batch, over all branches).  Two layers in the
        place of one count as that one.

    Notes
    -----
    Base and routed network take turns, but whole passes of them.
    """
    with torch.inference_mode():
        normalised = network.normalise(x)
        h = network.prefix(normalised)
        rows, branch = network.branches(network.route_features(h))
        taken = h if len(rows) == len(h) else h[rows]
    pieces: list[tuple[nn.Module, Tensor]] = [(network.prefix, normalised)]
    for c in range(network.n_clusters + 1):
        part = network.rest if c == network.n_clusters else network.subgraph(c)
        group = taken[branch == c]
        if part is not None and len(group):
            pieces.append((part, group))
    base_pieces = [(base, normalised)]
    macs = [_macs(own, len(x)) for own in (base_pieces, pieces)]
    times: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for _ in range(_TURNS):
        for own, into in zip((base_pieces, pieces), times, strict=True):
            into.append(_seconds(own, max(1, rounds // _TURNS)))
    return [
        {
            "layer": name,
            "base_macs": macs[0][name],
            "macs": macs[1][name],
            "base_seconds": float(np.median([t[name] for t in times[0]])),
            "seconds": float(np.median([t[name] for t in times[1]])),
        }
        for name in macs[0]
    ]


def _macs(pieces: list[tuple[nn.Module, Tensor]], n: int) -> dict[str, float]:
    """Multiplications of each layer for one sample, mean over `n`."""
    total: dict[str, float] = defaultdict(float)
    for module, batch in pieces:
        for name, macs in count_macs(module, batch[:1])[1].items():
            total[factorized(name)] += macs * len(batch) / n
    return total


def _seconds(pieces: list[tuple[nn.Module, Tensor]], repeats: int) -> dict[str, float]:
    """Seconds of each layer for its whole batch."""
    total: dict[str, float] = defaultdict(float)
    for module, batch in pieces:
        graph = module if isinstance(module, fx.GraphModule) else trace(module)
        for name, seconds in layer_seconds(graph, batch, repeats, warmup=1).items():
            total[factorized(name)] += seconds
    return total
