"""The parts of a `SINFNetwork`: sliced prefix, subgraphs, and what they say on held-out samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..criteria.activations import pool
from ..criteria.discriminability import average
from ..data.calibration import Calibration
from ..graph.cuts import CutPoint, layer_names, split
from ..inference.network import SINFNetwork
from ..inference.router import fuse
from ..pruning.recipe import extract
from ..pruning.scoring import Scored
from ..repair.sequential import RepairSettings, repair
from ..repair.walk import graph_of
from ..utils.device import in_pieces
from ..utils.jobs import Rows
from ..utils.pickling import Packed, pack

__all__ = [
    "HeldOut",
    "ROUTER_WEIGHTS",
    "TEMPERATURES",
    "build_subgraph",
    "choose_weight",
    "pooled_output",
    "routed_answers",
]

ROUTER_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
TEMPERATURES = tuple(float(t) for t in np.geomspace(0.5, 4.0, 13))


def slice_prefix(
    calibration: Calibration,
    cut: CutPoint,
    keep: Mapping[str, np.ndarray],
    samples: Tensor,
    method: str,
    weight: np.ndarray | None = None,
) -> fx.GraphModule:
    """Slice what lies before the cut, for all classes, and refit it to the dense prefix.

    Parameters
    ----------
    calibration : Calibration
    cut : CutPoint
    keep : mapping of str to int ndarray
        Channels kept, by group.  Those of the last layer cross the cut: where they are among them,
        every subgraph has to do with the same ones, and the base's rest does not fit any more.
    samples : Tensor of shape (n, ...)
        Normalised samples for the check and the repair.
    method : str
        Of repair.
    weight : ndarray of shape (n,), optional
        How many times each sample counts.  Default: once.

    Returns
    -------
    GraphModule
    """
    graph = calibration.graph
    dense = split(graph, cut)[0]
    if not keep:
        return dense
    sliced = extract(graph, calibration.groups, keep, samples[:64])
    prefix = split(graph_of(sliced), cut)[0]
    settings = RepairSettings(
        method, batch_size=calibration.batcher.batch_size, seed=calibration.seed
    )
    repair(dense, replace(sliced, model=prefix), samples, settings, sample_weight=weight)
    return prefix


@dataclass(frozen=True)
class Subgraph:
    """One cluster's part of the network.

    Attributes
    ----------
    module : nn.Module
        From the prefix's output to the logits of the classes that it answers.
    scores : dict of str to ndarray
    support : dict of str to ndarray
    repair_error : dict of str to float
    """

    module: nn.Module
    scores: dict[str, np.ndarray]
    support: dict[str, np.ndarray]
    repair_error: dict[str, float]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "module": _packed(self.module)}

    def unpacked(self) -> Subgraph:
        """As it was before it came out of another process, with its module on the CPU."""
        # Not on arrival, which is another thread's: see `sinfkit.utils.Shared`.
        if isinstance(self.module, Packed):
            return replace(self, module=self.module.unpack())
        return self


@dataclass(frozen=True)
class SlicedPrefix:
    """A sliced prefix on its way to a job, which may be elsewhere."""

    module: nn.Module

    def __getstate__(self) -> dict[str, Any]:
        return {"module": _packed(self.module)}

    def on(self, device: torch.device) -> nn.Module:
        """Return the module, on the device."""
        return self.module.unpack(device) if isinstance(self.module, Packed) else self.module


def _packed(module: nn.Module | Packed) -> Packed:
    """A module as arrays, also where it has been sent on before anybody has unpacked it."""
    return module if isinstance(module, Packed) else pack(module)


def build_subgraph(
    calibration: Calibration,
    cut: CutPoint,
    keep: Mapping[str, np.ndarray],
    scored: Scored,
    outputs: np.ndarray,
    prefix: SlicedPrefix | None,
    method: str,
    rows: Rows,
    sample: np.ndarray,
) -> Subgraph:
    """Extract the subgraph of one cluster.

    Parameters
    ----------
    calibration : Calibration
    cut : CutPoint
    keep : mapping of str to int ndarray
        Channels kept, by group; of groups behind the cut, of those that cross it, and the output
        layer's.
    scored : Scored
        What they were chosen by.
    outputs : int ndarray
        The network's outputs for the classes that the subgraph answers.
    prefix : SlicedPrefix or None
        It feeds the subgraph; the dense one gives the repair's targets.  None: the dense one feeds
        the subgraph as well.
    method : str
        Of repair.
    rows : Rows
        The samples, of which `sample` are needed.
    sample : int ndarray
        Samples for the check and the repair.

    Returns
    -------
    Subgraph
    """
    graph, batcher = calibration.graph, calibration.batcher
    check = torch.cat(list(batcher(rows, sample[:64])))
    small = extract(graph, calibration.groups, keep, check, outputs.tolist())
    (dense, dense_rest), rest = split(graph, cut), split(graph_of(small), cut)[1]
    sliced = None if prefix is None else prefix.on(batcher.device)
    h_dense, h_sliced = [], []
    with torch.inference_mode():
        for x in batcher(rows, sample):
            h_dense.append(dense(x))
            if sliced is not None:
                h_sliced.append(sliced(x))
    error = repair(
        dense_rest,
        replace(small, model=rest),
        torch.cat(h_dense),
        RepairSettings(method, batch_size=batcher.batch_size, seed=calibration.seed),
        X_sliced=torch.cat(h_sliced) if h_sliced else None,
        sample_weight=calibration.weights(sample),
    )
    behind = set(layer_names(rest))
    kept = {k: v for k, v in small.support.items() if k in behind and k != calibration.output}
    return Subgraph(rest, scored.layers, kept, error)


def pooled_output(prefix: nn.Module, batches: Iterable[Tensor], pool_size: int) -> Tensor:
    """Run the prefix and keep the pooled output of every sample, on the host."""
    with torch.inference_mode():
        return torch.cat(list(in_pieces(lambda x: pool(prefix(x), pool_size).cpu(), batches)))


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

    def run(x: Tensor) -> tuple[Tensor, ...]:
        h = network.prefix(x)
        route = network.route_features(h)
        logits = network.branch_logits(h, route.cluster)
        return route.log_posterior, route.cluster, route.confidence, logits

    with torch.inference_mode():
        columns = zip(*in_pieces(run, batches), strict=True)
        return HeldOut(*(torch.cat(column).cpu() for column in columns))


def choose_weight(
    held: HeldOut,
    codes: np.ndarray,
    answered: Tensor,
    weights: Sequence[float],
    sample_weight: np.ndarray | None = None,
) -> tuple[float, Tensor]:
    """Choose the router's weight and one temperature per subgraph by held-out log loss.

    Parameters
    ----------
    held : HeldOut
    codes : int ndarray of shape (n_samples,)
    answered : bool Tensor of shape (n_clusters, n_classes)
        The classes that each subgraph answers.
    weights : sequence of float
        Candidates.
    sample_weight : ndarray of shape (n_samples,), optional
        How many times each sample counts.  Default: once.

    Returns
    -------
    weight : float
    temperatures : Tensor of shape (n_clusters,)
        Fitted on the samples whose class is among those that their subgraph answers; 1 where there
        are fewer than ten of them.
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
