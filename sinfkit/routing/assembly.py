"""The parts of a routed network: prefix, subgraphs, and how they are put together."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..criteria.activations import pool
from ..data.calibration import Calibration, stack
from ..graph.cost import fold_batch_norm
from ..graph.cuts import CutPoint, layer_names, sides, split
from ..inference.network import Normalise, RouteFit, SINFNetwork, cluster_posterior, own_classes
from ..pruning.costs import shared_widths
from ..pruning.recipe import choose_channels, extract
from ..pruning.scoring import Scored
from ..repair.low_rank import factorize
from ..repair.sequential import RepairSettings, affordable_images, repair
from ..repair.walk import graph_of
from ..slicing.blocks import Block, leave_out, silenced
from ..utils.device import channels_last, in_pieces
from ..utils.jobs import Rows, run_with
from ..utils.pickling import Packed, pack
from .study import Size, Study

Classes = Sequence[np.ndarray]  # of each cluster, as positions

_CROSSING_BYTES = 2**29  # of all that a subgraph's repair is given, on either side
_FEW_ROUTED = 64  # samples, too few to repair a subgraph with


@dataclass(frozen=True)
class Prefix:
    """What lies before the cut.

    `keep` has the channels kept, by group, of the groups that it has to do with; `widths` how many
    stay in each group behind the cut, where one budget decides about both sides.
    """

    module: fx.GraphModule
    keep: dict[str, np.ndarray] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Subgraph:
    """One cluster's part: from the prefix's output to the logits of the classes it answers.

    `scores`, `support` and `repair_error` go by layer.
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


def build_prefix(study: Study, cut: CutPoint, size: Size, n_clusters: int) -> Prefix:
    """Slice what lies before the cut, for all classes, and refit it to the dense prefix.

    Where one budget decides about both sides, it is kept to by what all classes would lose.
    """
    calibration, recipe = study.calibration, study.config.prefix
    dense, groups = study.halves(cut)[0], study.prefix_groups(cut)
    if not groups:
        return Prefix(dense)
    (scored,) = study.score(groups, [study.classes], recipe)
    widths: dict[str, int] = {}
    if study.config.shares_budget:
        cost = study.cost(groups, {}, cut, size, n_clusters)
        widths = shared_widths(groups, [scored], cost, recipe, size.budget)
        behind = {group.name for group in study.groups(cut)[1]}
        groups = [group for group in groups if group.name not in behind]
        if not groups:
            return Prefix(dense, {}, widths)
    keep = choose_channels(groups, scored.groups, recipe, widths or None)
    sample = _repair_sample(study, dense)
    samples = calibration.batcher.stacked(calibration.X, sample)
    small = extract(calibration.graph, calibration.groups, keep, samples[:64])
    module = split(graph_of(small), cut)[0]
    blocks = study.blocks(size, module)
    part = silenced(replace(small, model=module), blocks)
    repair(
        dense,
        part,
        samples,
        _repair_settings(calibration, recipe.repair),
        sample_weight=calibration.weights(sample),
    )
    return Prefix(graph_of(leave_out(part, blocks)), keep, widths)


def lower_rank(study: Study, prefix: Prefix, cut: CutPoint, share: float) -> Prefix:
    """Turn the prefix's layers into products of two, so that `share` of its cost stays."""
    calibration = study.calibration
    sample = _repair_sample(study, study.halves(cut)[0])
    module = factorize(
        prefix.module,
        share,
        calibration.batcher.stacked(calibration.X, sample),
        weight=calibration.weights(sample),
        batch_size=calibration.batcher.batch_size,
        seed=calibration.seed,
    )
    return replace(prefix, module=module)


def _repair_sample(study: Study, prefix: fx.GraphModule) -> np.ndarray:
    """The samples on which a prefix is repaired."""
    wanted = study.config.prefix.repair_samples
    n_images = affordable_images(prefix, study.calibration.example, wanted)
    return study.rng().permutation(study.fit.index)[:n_images]


def _repair_settings(calibration: Calibration, method: str) -> RepairSettings:
    batch_size = calibration.batcher.batch_size
    return RepairSettings(method, batch_size=batch_size, seed=calibration.seed)


def routed_samples(
    study: Study, features: Tensor, route: RouteFit, class_clusters: np.ndarray
) -> list[np.ndarray]:
    """The calibration samples that each cluster's subgraph is made for.

    `features` are the prefix's pooled output on the samples that fit.
    """
    fit, clusters = study.fit, torch.as_tensor(class_clusters)
    n_clusters = int(class_clusters.max()) + 1
    own = class_clusters[fit.y]
    if study.config.answers == "cluster":
        return [fit.index[own == c] for c in range(n_clusters)]
    # Whatever is sent there, rightly or not: that is what it will have to answer.
    log_posterior = route.predictor.of_pooled(features)
    sent = cluster_posterior(log_posterior, clusters, n_clusters).argmax(1).numpy()
    few = np.bincount(sent, weights=fit.weight, minlength=n_clusters) < _FEW_ROUTED
    return [fit.index[(sent == c) | ((own == c) & few[c])] for c in range(n_clusters)]


def build_subgraphs(
    study: Study,
    cut: CutPoint,
    size: Size,
    prefix: Prefix,
    clusters: Classes,
    scored: Sequence[Scored],
    routed: Sequence[np.ndarray],
) -> list[Subgraph | None]:
    """One subgraph per cluster, side by side where `n_jobs` says so; None for a single class.

    `clusters` has the classes of each, `scored` the scores of those of several classes.
    """
    calibration, config = study.calibration, study.config
    groups, (dense, tail) = study.groups(cut)[1], study.halves(cut)
    with torch.inference_mode():
        h = dense(calibration.example)
    n_images = affordable_images(tail, h, config.subgraphs.repair_samples, _CROSSING_BYTES)
    several = [c for c, classes in enumerate(clusters) if len(classes) > 1]
    widths = prefix.widths or None
    if widths is None and config.subgraphs.schedule == "global":
        widths = _widths(study, cut, size, prefix, clusters, scored) if scored else {}
    sliced = None if prefix.module is dense else SlicedPrefix(prefix.module)
    blocks = study.blocks(size, tail)
    crossing, rng, jobs = _crossing(study, cut, prefix), study.rng(), []
    for c, scores in zip(several, scored, strict=True):
        sample = rng.permutation(routed[c])[:n_images]
        outputs = calibration.table.outputs[_answered_by(study, clusters[c])]
        keep = choose_channels(groups, scores.groups, config.subgraphs, widths)
        keep |= crossing | {study.output_group: outputs}
        rows, repaired = Rows(calibration.X, sample), config.subgraphs.repair
        jobs.append((cut, keep, blocks, scores, outputs, sliced, repaired, rows, sample))
    subgraphs: list[Subgraph | None] = [None] * len(clusters)
    built = run_with(calibration, build_subgraph, jobs, config.n_jobs)
    for c, subgraph in zip(several, built, strict=True):
        subgraphs[c] = subgraph.unpacked()
    return subgraphs


def _widths(
    study: Study,
    cut: CutPoint,
    size: Size,
    prefix: Prefix,
    clusters: Classes,
    scored: Sequence[Scored],
) -> dict[str, int]:
    """One width per layer for all clusters: with the given prefix they keep to a budget."""
    groups, recipe = study.groups(cut)[1], study.config.subgraphs
    kept = {name: len(channels) for name, channels in prefix.keep.items()}
    kept[study.output_group] = max(len(_answered_by(study, own)) for own in clusters)
    cost = study.cost(groups, kept, cut, size, len(clusters))
    return shared_widths(groups, scored, cost, recipe, size.budget)


def _answered_by(study: Study, classes: np.ndarray) -> np.ndarray:
    """The classes that the subgraph of a cluster answers."""
    return classes if study.config.answers == "cluster" else study.classes


def _crossing(study: Study, cut: CutPoint, prefix: Prefix) -> dict[str, np.ndarray]:
    """The channels left of what crosses the cut: the same for every cluster."""
    behind = set(sides(study.calibration.graph, cut)[1])
    return {
        group.name: prefix.keep[group.name]
        for group in study.calibration.groups
        if group.name in prefix.keep and behind.intersection((*group.layers, *group.consumers))
    }


def build_subgraph(
    calibration: Calibration,
    cut: CutPoint,
    keep: Mapping[str, np.ndarray],
    blocks: Sequence[Block],
    scored: Scored,
    outputs: np.ndarray,
    prefix: SlicedPrefix | None,
    method: str,
    rows: Rows,
    sample: np.ndarray,
) -> Subgraph:
    """Extract and repair the subgraph of one cluster: a job, which may run elsewhere.

    `keep` has channels by group, `outputs` the network's outputs that it answers; `blocks` are
    left out.  A sliced `prefix` feeds it, the dense one gives the repair's targets.  `sample` are
    the numbers of the samples that are needed, `rows` holds them.
    """
    graph, batcher = calibration.graph, calibration.batcher
    check = batcher.stacked(rows, sample[:64])
    small = extract(graph, calibration.groups, keep, check, outputs.tolist())
    (dense, dense_tail), tail = split(graph, cut), split(graph_of(small), cut)[1]
    sliced = None if prefix is None else prefix.on(batcher.device)

    def crossing(prefix: nn.Module) -> Tensor:
        with torch.no_grad():
            return stack(map(prefix, batcher(rows, sample)), len(sample))

    part = silenced(replace(small, model=tail), blocks)
    error = repair(
        dense_tail,
        part,
        crossing(dense),
        _repair_settings(calibration, method),
        X_sliced=None if sliced is None else crossing(sliced),
        sample_weight=calibration.weights(sample),
    )
    part = leave_out(part, blocks)
    behind = set(layer_names(tail))
    kept = {k: v for k, v in part.support.items() if k in behind and k != calibration.output}
    return Subgraph(graph_of(part), scored.layers, kept, error)


def pooled_output(prefix: nn.Module, batches: Iterable[Tensor], pool_size: int) -> Tensor:
    """Run the prefix and keep the pooled output of every sample, on the host."""
    with torch.inference_mode():
        return torch.cat(list(in_pieces(lambda x: pool(prefix(x), pool_size).cpu(), batches)))


def assemble(
    study: Study,
    cut: CutPoint,
    prefix: nn.Module,
    predictor: nn.Module,
    subgraphs: Sequence[Subgraph | None],
    class_clusters: np.ndarray,
) -> SINFNetwork:
    """Put the parts together, batch-norms folded; nobody leaves early or falls back yet."""
    calibration, config = study.calibration, study.config
    frozen, dtype = calibration.frozen, calibration.batcher.dtype
    clusters = torch.as_tensor(class_clusters)
    network = SINFNetwork(
        Normalise(
            None if frozen.mean is None else torch.tensor(frozen.mean, dtype=dtype),
            None if frozen.std is None else torch.tensor(frozen.std, dtype=dtype),
        ),
        fold_batch_norm(prefix),
        predictor,  # type: ignore[arg-type]
        [None if s is None else fold_batch_norm(s.module) for s in subgraphs],
        fold_batch_norm(study.halves(cut)[1]) if config.fallback == "base" else None,
        clusters,
        torch.as_tensor(calibration.table.outputs),
        torch.ones(len(subgraphs), dtype=dtype),
        router_weight=0.5,
        threshold=0.0,
        fallback=config.fallback,
        answered=own_classes(clusters, len(subgraphs)) | (config.answers == "all"),
    )
    # A copy: what folding left as it was is the frozen model's own.
    network = copy.deepcopy(network).eval().requires_grad_(False)
    network = network.to(calibration.batcher.device)
    if calibration.example.ndim == 4:
        network = channels_last(network)
    return network
