"""Means and covariances of what layers multiply with their weights, gathered in one pass.

They are all that closed-form pruning needs to know about the images: what a layer loses with some
of its inputs, and the best weights on the others, are functions of the dense weights and these
moments alone (`sinfkit.criteria.brain_surgeon`, `sinfkit.repair.static`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..graph.cuts import with_capture
from ..graph.nodes import CONVOLUTIONS, Layer, called_layer, samples_of
from .ridge import double
from .walk import output_size, sample_patches

__all__ = ["MAX_INPUTS", "Moments", "gather_moments"]

MAX_INPUTS = 10_000  # a covariance of more would not fit into memory, nor its inverse into a day
MAX_ROWS = 20_000


@dataclass(frozen=True)
class Moments:
    """First and second moments of a layer's inputs, and what follows for its outputs.

    Shapes: `mean` (n_blocks, n_inputs), `covariance` (n_blocks, n_inputs, n_inputs), `variance`
    (n_blocks, n_outputs).
    """

    mean: Tensor
    covariance: Tensor
    variance: Tensor
    noise: float = 0.0
    n_axes: int = 2


def gather_moments(
    graph: fx.GraphModule,
    layers: Iterable[str],
    batches: Iterable[Tensor],
    *,
    n_images: int,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
    sample_weight: Tensor | None = None,
) -> dict[str, Moments]:
    """Gather the moments of what some layers read, from one pass over normalised batches.

    Layers that are called more than once, or read more than 10,000 inputs, are left out; `max_rows`
    positions are spread evenly over the images, of which there are `n_images`.
    Shapes: `batches` (n, ...), `sample_weight` (n_images,).
    """
    calls = measurable(graph)
    names = [name for name in dict.fromkeys(layers) if name in calls]
    modules = {name: layer_of(graph, calls[name]) for name in names}
    names = [name for name in names if modules[name].weight[0].numel() <= MAX_INPUTS]
    wanted: dict[str, list[str]] = {}
    for name in names:
        wanted.setdefault(calls[name].all_input_nodes[0].name, []).append(name)
    places = {n.name: samples_of(n) for n in graph.graph.nodes}
    sums = {name: _Sums() for name in names}
    generator = torch.Generator().manual_seed(seed)
    per_image = max(1, max_rows // max(n_images, 1))
    here: Tensor | None = None

    def add(source: str, value: Tensor) -> None:
        axis, parts = places[source]
        value = value.movedim(axis, 0)
        for name in wanted[source]:
            layer = modules[name]
            n_positions = _n_positions(layer, value) * parts
            order = torch.rand((len(value) // parts, n_positions), generator=generator)
            where = order.topk(min(per_image, n_positions), dim=1).indices.to(value.device)
            rows = sample_patches(value, layer, where).flatten(0, 1)
            weight = None if here is None else here.to(rows).repeat_interleave(where.shape[1])
            sums[name].add(rows, n_blocks(layer), weight)
            sums[name].n_axes = value.ndim

    watched = with_capture(graph, {source: source for source in wanted}, add)
    with torch.inference_mode():
        start = 0
        for batch in batches:
            if sample_weight is not None:
                here = sample_weight[start : start + len(batch)]
                start += len(batch)
            watched(batch)
    # One after the other, so that sums and covariances of all layers never stand side by side.
    return {name: sums.pop(name).moments(modules[name]) for name in names}


def measurable(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """The call of each layer that is called exactly once."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if called_layer(graph, node) is not None:
            calls.setdefault(str(node.target), []).append(node)
    return {name: nodes[0] for name, nodes in calls.items() if len(nodes) == 1}


def layer_of(graph: fx.GraphModule, node: fx.Node) -> Layer:
    """The layer that a node is known to call."""
    layer = called_layer(graph, node)
    assert layer is not None
    return layer


def n_blocks(layer: nn.Module) -> int:
    """Groups of a convolution; 1 for other layers."""
    return layer.groups if isinstance(layer, CONVOLUTIONS) else 1


def damped_cholesky(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Factor a covariance with `damping` on its diagonal, or more where that is too little.

    Returns the lower triangle, and what was added.
    """
    tiny = torch.finfo(gram.dtype).tiny ** 0.5
    for _ in range(10):
        damped = gram.clone()
        damped.diagonal().add_(max(damping, tiny))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        damping *= 10.0
    return factor, damping


class _Sums:
    """Sums over rows, of which moments are made."""

    def __init__(self) -> None:
        self._n: int | float = 0
        self.n_axes = 2
        self._shift, self._sum, self._products = (torch.zeros(()) for _ in range(3))

    def add(self, rows: Tensor, n_blocks: int, weight: Tensor | None = None) -> None:
        """Take rows of shape (n_rows, n_blocks * n_inputs) in, and how often each counts."""
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        blocks = rows.unflatten(1, (n_blocks, -1)).transpose(0, 1)
        if self._n == 0:
            # Whatever the shift, the covariance is the same; near the mean, rounding is small.
            self._shift = blocks.mean(1, keepdim=True)
            self._eps = torch.finfo(blocks.dtype).eps
        blocks = blocks - self._shift
        weighed = blocks if weight is None else blocks * weight[:, None]
        total, products = double(weighed.sum(1)), double(weighed.mT @ blocks)
        self._sum = self._sum.to(total.device) + total
        self._products = self._products.to(products.device) + products
        self._n += len(rows) if weight is None else float(double(weight).sum())

    def moments(self, layer: Layer) -> Moments:
        """Of all rows so far."""
        mean = self._sum / self._n
        covariance = self._products / self._n - mean[:, :, None] * mean[:, None, :]
        shift = double(self._shift)
        noise = float((10 * self._eps) ** 2 * shift.square().mean())
        weight = double(layer.weight.detach()).flatten(1).unflatten(0, (len(mean), -1))
        variance = ((weight @ covariance) * weight).sum(2).clamp_min(0.0)
        return Moments(mean + shift[:, 0], covariance, variance, noise, self.n_axes)


def _n_positions(layer: Layer, value: Tensor) -> int:
    """Positions of a layer's output for one row of its input."""
    if isinstance(layer, nn.Linear):
        return value[0].numel() // value.shape[-1]
    return math.prod(output_size(layer, value.shape[2:]))
