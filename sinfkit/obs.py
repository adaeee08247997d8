"""Structured optimal brain surgeon: what removing a channel costs the layers that read it.

A layer that loses inputs can make up for part of them by new weights on the others. The optimal
brain surgeon (Hassibi and Stork, 1992) knows how much: with the second moments of the inputs, both
the best new weights and the error that stays have a closed form. Taken for whole channels, and
greedily, it ranks a layer's filters by what they do to the layers behind. No labels, no gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from ._channels import ChannelGroup
from ._ridge import double
from ._sites import padding, sample_patches
from .graph import batch_norm_behind, with_capture

__all__ = ["Consumer", "gather_consumers", "removal_costs"]

MAX_ROWS = 20_000
_DAMPING = 1e-2  # of the mean second moment: what few samples do not show is not free to remove
_STEP = 0.05  # share of the channels left that one step removes


@dataclass(frozen=True)
class Consumer:
    """A layer that reads a group's channels.

    Attributes
    ----------
    name : str
        Qualified name of the layer.
    gram : Tensor of shape (n_blocks, n_inputs, n_inputs)
        Covariance of what the layer multiplies with its weights, float64; one block for each group
        of a grouped convolution.
    weight : Tensor of shape (n_blocks, n_outputs, n_inputs)
        Its weights, float64, each output times the gain of the batch-norm behind it.
    columns : tuple of (int ndarray of shape (k, size), int ndarray of shape (k,))
        For each block: the inputs that carry a channel, a row for each of k channels, and which
        channels of the group these are.
    """

    name: str
    gram: Tensor
    weight: Tensor
    columns: tuple[tuple[np.ndarray, np.ndarray], ...]


def gather_consumers(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    batches: Iterable[Tensor],
    *,
    n_images: int,
    outputs: Sequence[int] | None = None,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
) -> dict[str, list[Consumer]]:
    """Gather the input covariances of all layers that read the channels of some groups.

    Parameters
    ----------
    graph : GraphModule
        From `trace`, in eval mode.
    groups : sequence of ChannelGroup
        Those to be ranked.
    batches : iterable of Tensor of shape (n, ...)
        Inputs, normalised, on the network's device; read once.
    n_images : int
        How many they are in all.
    outputs : sequence of int, optional
        The network's outputs that stay, where it loses some: the other rows of the output layer do
        not count, nor what is common to those that stay, which no answer depends on.
    max_rows : int, default=20000
        Positions that enter a covariance, spread evenly over the images, at least one of each.
    seed : int, default=0
        Of the positions.

    Returns
    -------
    dict of str to list of Consumer
        By group name. A layer that is called more than once is left out.
    """
    modules = dict(graph.named_modules())
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    readers = {
        member.module
        for group in groups
        for member in group._members
        if member.side == "in" and len(calls.get(member.module, ())) == 1
    }
    sources = {name: calls[name][0].all_input_nodes[0].name for name in readers}
    wanted: dict[str, list[str]] = {}
    for name, source in sources.items():
        wanted.setdefault(source, []).append(name)
    moments: dict[str, _Moments] = {}
    generator = torch.Generator().manual_seed(seed)
    per_image = max(1, max_rows // max(n_images, 1))

    def add(source: str, value: Tensor) -> None:
        for name in wanted[source]:
            layer = modules[name]
            assert isinstance(layer, (nn.Conv2d, nn.Linear))
            n_positions = _n_positions(layer, value)
            order = torch.rand((len(value), n_positions), generator=generator)
            where = order.topk(min(per_image, n_positions), dim=1).indices.to(value.device)
            rows = sample_patches(value, layer, where).flatten(0, 1)
            moments.setdefault(name, _Moments()).add(rows, _n_blocks(layer))

    watched = with_capture(graph, {source: source for source in wanted}, add)
    with torch.inference_mode():
        for batch in batches:
            watched(batch)

    gains = _gains(graph)
    last = [name for name in calls if isinstance(modules[name], (nn.Conv2d, nn.Linear))][-1]
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
                weight = weight - weight.mean(0)
            weight = weight.unflatten(0, (_n_blocks(layer), -1))
            columns = _columns(layer, member.index, member.channel)
            covariance = moments[member.module].covariance()
            found[group.name].append(Consumer(member.module, covariance, weight, columns))
    return found


def removal_costs(consumers: Sequence[Consumer], n_channels: int, n_groups: int = 1) -> Tensor:
    r"""Rank a group's channels by what their removal costs the layers that read them.

    Parameters
    ----------
    consumers : sequence of Consumer
    n_channels : int
    n_groups : int, default=1
        Runs of channels that lose the same local indices, see `ChannelGroup`.

    Returns
    -------
    Tensor of shape (n_channels,)
        For each channel the share of its consumers' output variance (summed over consumers) that is
        lost for good when it and all channels of lower score are gone and the weights on the others
        are the best there are. Zeros where there is no consumer.

    Notes
    -----
    With inputs of covariance :math:`H` and weights :math:`W`, removing the inputs :math:`k` and
    refitting the others loses :math:`\operatorname{tr} W_k ([H^{-1}]_{kk})^{-1} W_k'`, and leaves
    :math:`W - W_k ([H^{-1}]_{kk})^{-1} [H^{-1}]_{k:}` (Hassibi and Stork, NIPS 1992; for groups of
    weights: Kurtic, Frantar and Alistarh, NeurIPS 2023). The channels with the lowest loss are
    removed, a twentieth of those left at a time, and the losses taken again.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from sinfkit.obs import Consumer, removal_costs
    >>> x = torch.randn(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> x = torch.cat([x, x[:, :1] * 2], 1)         # the third input repeats the first
    >>> columns = ((np.arange(3)[:, None], np.arange(3)),)
    >>> consumer = Consumer("next", x.T.cov()[None], torch.ones(1, 1, 3).double(), columns)
    >>> cost = removal_costs([consumer], 3)
    >>> int(cost.argmin()), float(cost.min()) < 0.01
    (0, True)
    """
    run = n_channels // n_groups
    problems = [
        _Problem(consumer, block, run)
        for consumer in consumers
        for block in range(len(consumer.gram))
        if len(consumer.columns[block][1])
    ]
    score = torch.zeros(n_channels, dtype=torch.float64)
    if not problems:
        return score
    totals = {consumer.name: 0.0 for consumer in consumers}
    for problem in problems:
        totals[problem.name] += problem.variance
    left = np.arange(run)
    lost = 0.0
    while len(left):
        each = torch.zeros(run, dtype=torch.float64)
        for problem in problems:
            if totals[problem.name] > 0:
                each += problem.costs() / totals[problem.name]
        n_out = max(1, int(_STEP * len(left)))
        out = left[np.argsort(each.numpy()[left], kind="stable")[:n_out]]
        joint = sum(
            problem.remove(out) / totals[problem.name]
            for problem in problems
            if totals[problem.name] > 0
        )
        for i, unit in enumerate(out):
            score[unit::run] = lost + joint * (i + 1) / len(out)
        lost += joint
        left = np.setdiff1d(left, out)
    return score


class _Problem:
    """One block of one consumer, while channels leave it.

    Parameters
    ----------
    consumer : Consumer
    block : int
    run : int
        Channels ``u, u + run, ...`` leave together, as unit u.
    """

    def __init__(self, consumer: Consumer, block: int, run: int) -> None:
        self.name, self._run = consumer.name, run
        gram, weight = consumer.gram[block], consumer.weight[block]
        damping = _DAMPING * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
        gram = gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self.variance = float((weight @ gram * weight).sum())
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self._weight = weight.clone()
        columns, channels = consumer.columns[block]
        self._columns, self._units = torch.as_tensor(columns), torch.as_tensor(channels % run)

    def costs(self) -> Tensor:
        """Of each unit that is left, what its removal would lose; 0 for the others."""
        columns = self._columns.to(self._inverse.device)
        cells = self._inverse[columns[:, :, None], columns[:, None, :]]
        weight = self._weight[:, columns].permute(1, 2, 0)
        lost = (torch.linalg.solve(cells, weight) * weight).sum((1, 2)).cpu()
        return torch.zeros(self._run, dtype=lost.dtype).index_add_(0, self._units, lost)

    def remove(self, units: np.ndarray) -> float:
        """Take units out, refit the weights on the others, and return what is lost."""
        out = torch.as_tensor(np.isin(self._units.numpy(), units))
        gone = self._columns[out].flatten()
        stays = torch.ones(len(self._inverse), dtype=torch.bool)
        stays[gone] = False
        rows, weight = self._inverse[gone], self._weight[:, gone]
        core = torch.linalg.solve(rows[:, gone], torch.cat([weight.T, rows[:, stays]], 1))
        solved, carried = core[:, : len(weight)], core[:, len(weight) :]
        lost = float((weight.T * solved).sum())
        self._weight = self._weight[:, stays] - weight @ carried
        self._inverse = self._inverse[stays][:, stays] - rows[:, stays].T @ carried
        place = torch.cumsum(stays, 0) - 1
        self._columns, self._units = place[self._columns[~out]], self._units[~out]
        return max(lost, 0.0)


class _Moments:
    """Sums over rows, of which a covariance is made."""

    def __init__(self) -> None:
        self._n, self._sum, self._products = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor, n_blocks: int) -> None:
        """Take rows of shape (n_rows, n_blocks * n_inputs) in."""
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        blocks = rows.unflatten(1, (n_blocks, -1)).transpose(0, 1)
        self._n += len(rows)
        self._sum = self._sum.to(rows.device) + double(blocks.sum(1))
        self._products = self._products.to(rows.device) + double(blocks.mT @ blocks)

    def covariance(self) -> Tensor:
        """Of shape (n_blocks, n_inputs, n_inputs)."""
        mean = self._sum / self._n
        return self._products / self._n - mean[:, :, None] * mean[:, None, :]


def _n_blocks(layer: nn.Module) -> int:
    """Groups of a convolution."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def _n_positions(layer: nn.Conv2d | nn.Linear, value: Tensor) -> int:
    """Positions of a layer's output for one row of its input."""
    if isinstance(layer, nn.Linear):
        return value[0].numel() // value.shape[-1]
    left, right, top, bottom = padding(layer)
    count = 1
    for axis, size in enumerate((value.shape[2] + top + bottom, value.shape[3] + left + right)):
        extent = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        count *= (size - extent) // layer.stride[axis] + 1
    return int(count)


def _columns(
    layer: nn.Module, index: np.ndarray, channel: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """For each block of a layer, the inputs of each channel, and the channels."""
    cells = 1
    if isinstance(layer, nn.Conv2d):
        cells = layer.kernel_size[0] * layer.kernel_size[1]
        per_block = layer.in_channels // layer.groups
    else:
        assert isinstance(layer, nn.Linear)
        per_block = layer.in_features
    blocks = []
    for block in range(_n_blocks(layer)):
        here = index // per_block == block
        local, channels = index[here] % per_block, channel[here]
        order = np.argsort(channels, kind="stable")
        names, counts = np.unique(channels, return_counts=True)
        places = local[order].reshape(len(names), -1) if len(set(counts)) == 1 else None
        if places is None:
            raise ValueError("the channels of a group do not have equally many inputs")
        inputs = places[:, :, None] * cells + np.arange(cells)
        blocks.append((inputs.reshape(len(names), -1), names))
    return tuple(blocks)


def _gains(graph: fx.GraphModule) -> dict[str, Tensor]:
    """What the batch-norm that follows a layer multiplies its outputs with."""
    modules = dict(graph.named_modules())
    gains = {}
    for layer, name in batch_norm_behind(graph).items():
        norm = modules[name]
        if norm.running_var is not None:
            gains[layer] = (
                double(norm.weight.detach()) * (double(norm.running_var) + norm.eps).rsqrt()
            )
    return gains
