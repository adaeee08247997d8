"""Structured optimal brain surgeon: what removing a channel costs the layers that read it.

A layer that loses inputs can make up for part of them by new weights on the others. The optimal
brain surgeon (Hassibi and Stork, 1992) knows how much: with the second moments of the inputs, both
the best new weights and the error that stays have a closed form. Taken for whole channels, and
greedily, it ranks a layer's filters by what they do to the layers behind. No labels, no gradients.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..graph.cuts import batch_norm_behind, layer_names
from ..graph.nodes import CONVOLUTIONS
from ..repair.moments import (
    MAX_INPUTS,
    MAX_ROWS,
    damped_cholesky,
    gather_moments,
    measurable,
    n_blocks,
)
from ..repair.ridge import double
from ..slicing.channels import ChannelGroup
from ..utils.params import warn

__all__ = [
    "Consumer",
    "costs_in_order",
    "gather_consumers",
    "removal_costs",
    "weigh_outputs",
]

_DAMPING = 1e-2  # of the mean second moment: what few samples do not show is not free to remove
_IN_ORDER = 32  # channels for which one look at all of them serves, where their order is given
_POOL = 8  # channels, at least, that one look at all of them serves


@dataclass(frozen=True)
class Consumer:
    """A layer that reads a group's channels.

    Shapes: `gram` (n_blocks, n_inputs, n_inputs), `weight` (n_blocks, n_outputs, n_inputs),
    `columns` (k, size).
    """

    name: str
    gram: Tensor
    weight: Tensor
    columns: tuple[tuple[np.ndarray, np.ndarray], ...]
    noise: float = 0.0
    _inverses: dict[int, tuple[Tensor, float]] = field(default_factory=dict, repr=False)

    @property
    def n_outputs(self) -> int:
        """Outputs in all blocks."""
        return self.weight.shape[0] * self.weight.shape[1]

    def inverse(self, block: int) -> tuple[Tensor, float]:
        """Inverse of a block's damped covariance, and the damping.

        Computed once for all groups that the layer reads: they share `_inverses`.
        """
        if block not in self._inverses:
            gram = self.gram[block]
            damping = float(_DAMPING * gram.diagonal().mean() + self.noise)
            factor, damping = damped_cholesky(gram, damping)
            self._inverses[block] = torch.cholesky_inverse(factor), damping
        return self._inverses[block]


def gather_consumers(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Tensor],
    *,
    n_images: int,
    outputs: Sequence[int] | None = None,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
    sample_weight: Tensor | None = None,
) -> dict[str, list[Consumer]]:
    """Gather the input covariances of all layers that read the channels of some groups.

    Shapes: `batches` (n, ...), `sample_weight` (n_images,).
    """
    modules = dict(graph.named_modules())
    calls = measurable(graph)
    members = [m for group in groups for m in group._members if m.side == "in"]
    readers = list(dict.fromkeys(m.module for m in members if m.module in calls))
    moments = gather_moments(
        graph,
        readers,
        batches,
        n_images=n_images,
        max_rows=max_rows,
        seed=seed,
        sample_weight=sample_weight,
    )
    wide = [name for name in readers if name not in moments]
    if wide:
        warn(
            f"Criterion 'obs' leaves out what {', '.join(wide)} would lose: more than "
            f"{MAX_INPUTS} inputs."
        )
    inverses: dict[str, dict[int, tuple[Tensor, float]]] = {name: {} for name in moments}
    gains = norm_gains(graph)
    last = layer_names(graph)[-1]
    found: dict[str, list[Consumer]] = {}
    for group in groups:
        found[group.name] = []
        for member in group._members:
            if member.side != "in" or member.module not in moments:
                continue
            layer = modules[member.module]
            weight = double(layer.weight.detach()).flatten(1)
            if member.module in gains:
                weight = weight * gains[member.module].to(weight)[:, None]
            if member.module == last and outputs is not None:
                weight = weight[list(outputs)]
                weight = weight - weight.mean(0) if len(weight) > 1 else weight
            weight = weight.unflatten(0, (n_blocks(layer), -1))
            name, known = member.module, moments[member.module]
            for even in _as_often(member.channel):
                columns = _columns(layer, member.index[even], member.channel[even])
                found[group.name].append(
                    Consumer(name, known.covariance, weight, columns, known.noise, inverses[name])
                )
    return found


def removal_costs(consumers: Sequence[Consumer], n_channels: int, n_groups: int = 1) -> Tensor:
    """Share of the consumers' output variance lost for good with each channel and all lower ones.

    Removing inputs k of covariance ``H`` loses ``tr W_k ([H^-1]_kk)^-1 W_k'`` and leaves ``W - W_k
    ([H^-1]_kk)^-1 [H^-1]_k:`` (Hassibi and Stork 1992; for groups Kurtic et al. 2023): the cheapest
    goes, and costs are taken again.  `n_groups` runs lose the same local indices.
    """
    run = n_channels // n_groups
    problems = _problems(consumers, run)
    score = torch.zeros(n_channels, dtype=torch.float64)
    if not problems:
        return score
    left, lost = np.arange(run), 0.0
    while len(left):
        costs = _sum_of_costs(problems)[left]
        order = np.argsort(costs, kind="stable")
        size = max(_POOL, len(left) // 10)
        pool, rest = left[order[:size]], costs[order[size:]]
        # A channel's cost rises while others leave (unless it only corrected one of them): while
        # the cheapest of the pool costs less than the cheapest outside did, it goes next.
        limit = float(rest[0]) if len(rest) else float("inf")
        out = []
        for unit, cost in _one_by_one([problem.corner(pool) for problem in problems], pool, limit):
            lost += cost
            score[unit::run] = lost
            out.append(unit)
        for problem in problems:
            problem.remove(np.array(out))
        left = np.setdiff1d(left, out)
    return score


def costs_in_order(consumers: Sequence[Consumer], order: np.ndarray) -> np.ndarray:
    """What is lost for good while a group's channels leave in a given order.

    Shapes: `order` (n_units,), returns (n_units,).
    """
    lost = np.zeros(len(order))
    problems = _problems(consumers, len(order))
    if not problems:
        return lost
    for start in range(0, len(order), _IN_ORDER):
        pool = order[start : start + _IN_ORDER]
        # Of the inverse, only the corner of those that leave next is kept up to date one by one.
        corners = [problem.corner(pool) for problem in problems]
        for i, unit in enumerate(pool, start):
            lost[i] = _sum_of_costs(corners)[unit]
            for corner in corners:
                corner.remove(np.array([unit]))
        for problem in problems:
            problem.remove(pool)
    return np.cumsum(lost)


def weigh_outputs(
    consumers: Sequence[Consumer], importance: Mapping[str, Tensor]
) -> list[Consumer]:
    """Let losses of some of a consumer's outputs count more than those of others.

    `importance`: by consumer, what a squared error of each output is multiplied with, of shape
    (n_outputs,); only ratios matter, and those of consumers that are not named count alike.
    """
    weighed = []
    for consumer in consumers:
        counts = importance.get(consumer.name)
        if counts is not None and bool((counts > 0).any()):
            rows = double(counts / counts.max()).sqrt().reshape(consumer.weight.shape[:2])
            rows = rows.to(consumer.weight.device)
            consumer = replace(consumer, weight=consumer.weight * rows[:, :, None])
        weighed.append(consumer)
    return weighed


def _problems(consumers: Sequence[Consumer], run: int) -> list[_Problem]:
    """The blocks of consumers that channels can leave, each with its share in a loss."""
    problems = [
        _Problem(consumer, block, run)
        for consumer in consumers
        for block in range(len(consumer.gram))
        if len(consumer.columns[block][1])
    ]
    totals = {consumer.name: 0.0 for consumer in consumers}
    for problem in problems:
        totals[problem.name] += problem.variance
    problems = [problem for problem in problems if totals[problem.name] > 0]
    for problem in problems:
        problem.share = 1.0 / totals[problem.name]
    return problems


def _sum_of_costs(problems: Sequence[_Problem]) -> np.ndarray:
    """What the removal of each unit would lose now, over all consumers."""
    return torch.stack([problem.costs() for problem in problems]).sum(0).numpy()


def _one_by_one(
    problems: list[_Problem], pool: np.ndarray, limit: float
) -> Iterator[tuple[int, float]]:
    """Take units out of small problems, the cheapest first, as long as that costs no more."""
    left = list(pool)
    while left:
        costs = _sum_of_costs(problems)[left]
        best = int(np.argmin(costs))
        if costs[best] > limit and len(left) < len(pool):
            return
        unit = left.pop(best)
        yield int(unit), float(costs[best])
        for problem in problems:
            problem.remove(np.array([unit]))


class _Problem:
    """One block of one consumer, while channels leave it."""

    share = 1.0  # of a loss in the consumer's variance
    _columns: Tensor

    def __init__(self, consumer: Consumer, block: int, run: int) -> None:
        self.name, self._run = consumer.name, run
        gram, weight = consumer.gram[block], consumer.weight[block]
        inverse, damping = consumer.inverse(block)
        size = float(weight.square().sum())
        self.variance = float((weight @ gram * weight).sum())
        if self.variance <= 2 * consumer.noise * size:
            self.variance = 0.0  # rounding is all there is
        else:
            self.variance += damping * size
        columns, channels = consumer.columns[block]
        units = channels % run
        order = np.argsort(units, kind="stable")
        self._units = torch.as_tensor(np.unique(units))
        # Inputs that carry other groups' channels stay: of the inverse, only the corner is needed.
        self._inverse, self._weight = inverse, weight
        self._narrow(torch.as_tensor(columns[order].reshape(len(self._units), -1)))

    def costs(self) -> Tensor:
        """Of each unit that is left, the share that its removal would lose; 0 for the others."""
        lost = torch.zeros(self._run, dtype=torch.float64)
        if len(self._units) == 0:
            return lost
        columns = self._columns.to(self._inverse.device)
        cells = self._inverse[columns[:, :, None], columns[:, None, :]]
        weight = self._weight[:, columns].permute(1, 2, 0)
        each = (torch.linalg.solve(cells, weight) * weight).sum((1, 2)).cpu()
        return lost.index_add_(0, self._units, each.clamp_min(0.0) * self.share)

    def remove(self, units: np.ndarray) -> None:
        """Take units out, and refit the weights on the others."""
        out = torch.as_tensor(np.isin(self._units.numpy(), units))
        gone = self._columns[out].flatten()
        rows = self._inverse[gone]
        carried = torch.linalg.solve(rows[:, gone], rows)
        self._weight.addmm_(self._weight[:, gone], carried, alpha=-1.0)
        self._inverse.addmm_(rows.T, carried, alpha=-1.0)  # zero where they were
        self._columns, self._units = self._columns[~out], self._units[~out]
        if self._columns.numel() < 0.7 * len(self._inverse):
            self._narrow(self._columns)

    def corner(self, units: np.ndarray) -> _Problem:
        """The same for some units only: enough for what they cost while others of them leave."""
        small = copy.copy(self)
        own = torch.as_tensor(np.isin(self._units.numpy(), units))
        small._units = self._units[own]
        small._narrow(self._columns[own])
        return small

    def _narrow(self, columns: Tensor) -> None:
        """Keep only some inputs, a row of them for each unit; as copies, which may be changed."""
        inside = columns.flatten()
        self._inverse = self._inverse[inside][:, inside]
        self._weight = self._weight[:, inside]
        self._columns = torch.arange(len(inside)).reshape(columns.shape)


def _as_often(channels: np.ndarray) -> list[np.ndarray]:
    """Places of the channels that occur once, of those that occur twice, and so on."""
    _, places, counts = np.unique(channels, return_inverse=True, return_counts=True)
    return [counts[places] == n for n in np.unique(counts)]


def _columns(
    layer: nn.Module, index: np.ndarray, channel: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """For each block of a layer, the inputs of each channel, and the channels."""
    cells = 1
    if isinstance(layer, CONVOLUTIONS):
        cells = math.prod(layer.kernel_size)
        per_block = layer.in_channels // layer.groups
    else:
        assert isinstance(layer, nn.Linear)
        per_block = layer.in_features
    blocks = []
    for block in range(n_blocks(layer)):
        here = index // per_block == block
        local, channels = index[here] % per_block, channel[here]
        order = np.argsort(channels, kind="stable")
        names, counts = np.unique(channels, return_counts=True)
        if len(set(counts)) > 1:
            raise ValueError("the channels of a group do not have equally many inputs")
        places = local[order].reshape(len(names), int(counts[0]) if len(counts) else 0)
        inputs = places[:, :, None] * cells + np.arange(cells)
        blocks.append((inputs.reshape(len(names), -1), names))
    return tuple(blocks)


def norm_gains(graph: fx.GraphModule) -> dict[str, Tensor]:
    """What the batch-norm that follows a layer multiplies its outputs with."""
    modules = dict(graph.named_modules())
    gains = {}
    for layer, name in batch_norm_behind(graph).items():
        norm = modules[name]
        if norm.running_var is not None and norm.num_features == len(modules[layer].weight):
            gain = (double(norm.running_var) + norm.eps).rsqrt()
            gains[layer] = gain if norm.weight is None else gain * double(norm.weight.detach())
    return gains
