"""How much the route predictor has to say once a subgraph has answered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..criteria.discriminability import average
from ..inference.network import SINFNetwork
from ..inference.router import fuse
from ..utils.device import in_pieces

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
