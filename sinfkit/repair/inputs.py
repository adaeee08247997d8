"""Which of the dense network's inputs the layers of a sliced network still read.

A sliced network tells its widths, not what it kept. Its layers' kept OUTPUTS are known; here they
are followed through pooling, flattening, concatenation and sums to the layers that read them, by
putting labels in place of the layers' outputs and looking where they arrive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..graph.nodes import called_layer, is_activation, is_identity, is_norm
from .walk import output_size

__all__ = ["kept_inputs"]

# Of integers up to so many, sums over feature maps are exact: labels that meet in a sum or a mean
# give the same number in both networks, whatever the order of summation.
_LABELS = 2**40


@dataclass(frozen=True)
class Inputs:
    """What a layer of a sliced network reads.

    Attributes
    ----------
    kept : int ndarray
        Input channels (or features) of the dense layer that are still there, sorted.
    n_axes : int
        Axes of the input.
    """

    kept: np.ndarray
    n_axes: int


def kept_inputs(
    dense: fx.GraphModule,
    sliced: fx.GraphModule,
    support: Mapping[str, np.ndarray],
    shape: torch.Size,
) -> dict[str, Inputs]:
    """Find which inputs each layer of a sliced network kept.

    Parameters
    ----------
    dense, sliced : GraphModule
        With the same nodes.
    support : mapping of str to ndarray of int
        Kept output channels by layer; layers that are not listed kept all of theirs.
    shape : torch.Size
        Of an input of both, with any number of rows.

    Returns
    -------
    dict of str to Inputs
        By layer. A layer is left out where its inputs cannot be told, as where channels are
        weighted and added on the way.
    """
    labels: dict[str, Tensor] = {}
    before = _Labels(dense, labels, {})
    after = _Labels(sliced, labels, support)
    start = _draw((1, *shape[1:]), 0)
    with torch.inference_mode():
        before.run(start)
        after.run(start)
    found = {}
    for name, now in after.arrived.items():
        then = before.arrived[name]
        kept = np.flatnonzero(np.isin(then, now))
        if np.array_equal(then[kept], now):
            found[name] = Inputs(kept, after.n_axes[name])
    return found


class _Labels(fx.Interpreter):
    """Runs a network in which every layer gives labels; what does not mix channels is left out.

    Parameters
    ----------
    gm : GraphModule
    labels : dict
        Labels of the dense layers' outputs by node, drawn where they are missing.
    support : mapping of str to ndarray of int
    """

    def __init__(
        self, gm: fx.GraphModule, labels: dict[str, Tensor], support: Mapping[str, np.ndarray]
    ) -> None:
        super().__init__(gm)
        self._labels, self._support = labels, support
        self.arrived: dict[str, np.ndarray] = {}
        self.n_axes: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        gm = self.module
        assert isinstance(gm, fx.GraphModule)
        layer = called_layer(gm, n)
        if layer is not None:
            return self._layer(n, layer, self.env[n.all_input_nodes[0]])
        if is_activation(gm, n) or is_identity(gm, n) or is_norm(gm, n):
            # Rectified, labels of negative channels would be lost.
            return self.env[n.all_input_nodes[0]]
        return super().run_node(n)

    def _layer(self, node: fx.Node, layer: nn.Conv2d | nn.Linear, value: Tensor) -> Tensor:
        """Note what arrives at a layer, and give the labels of its outputs."""
        name = str(node.target)
        if isinstance(layer, nn.Conv2d):
            axis, size = 1, output_size(layer, value.shape[2:])
            shape = (len(value), len(layer.weight), *size)
            self.arrived[name] = value[0, :, 0, 0].numpy()
        else:
            axis, shape = -1, (*value.shape[:-1], len(layer.weight))
            self.arrived[name] = value.flatten(0, -2)[0].numpy()
        self.n_axes[name] = value.ndim
        if node.name not in self._labels:
            self._labels[node.name] = _draw(shape, len(self._labels) + 1)
        labels = self._labels[node.name]
        if name in self._support:
            labels = labels.index_select(axis, torch.as_tensor(self._support[name]))
        return labels

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Modules with weights of their own compute in their precision, where these lie."""
        weight = next(self.fetch_attr(target).parameters(), None)
        if weight is None:
            return super().call_module(target, args, kwargs)
        args, kwargs = fx.node.map_aggregate(
            (args, kwargs), lambda a: a.to(weight) if isinstance(a, Tensor) else a
        )
        value = super().call_module(target, args, kwargs)
        return fx.node.map_aggregate(value, _on_host)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _on_host(super().get_attr(target, args, kwargs))


def _on_host(value: Any) -> Any:
    """Floating point numbers in float64, on the host."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.double() if value.is_floating_point() else value


def _draw(shape: tuple[int, ...], seed: int) -> Tensor:
    """Labels, next to certainly all different."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, _LABELS, shape, generator=generator).double()
