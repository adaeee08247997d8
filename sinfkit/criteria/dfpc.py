"""DFPC: how much a channel can carry from the layers that give it to those that read it.

A score that needs weights and sizes only: no data, no labels. One for each group of channels that
can only be removed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..graph.cuts import with_capture
from ..graph.nodes import called_layer
from ..repair.ridge import double
from ..repair.walk import Layer, padding
from ..slicing.channels import ChannelGroup, Member
from .brain_surgeon import norm_gains

__all__ = ["gather_couplings", "inflow", "outflow"]


def inflow(layer: Layer, size: tuple[int, ...], gain: Tensor | None = None) -> Tensor:
    r"""Most that a layer can put on each position of its output.

    Parameters
    ----------
    layer : Conv2d or Linear
    size : tuple of int
        Height and width of its input; not looked at for a linear layer.
    gain : Tensor of shape (C,), optional
        What the batch-norm behind multiplies its outputs with.

    Returns
    -------
    Tensor of shape (C, H, W)
        For inputs of at most 1 in absolute value, the bound of the output without bias: the sum of
        the absolute weights that touch the input there, times the absolute gain. H and W are 1 for
        a linear layer.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from sinfkit.criteria import inflow
    >>> layer = nn.Conv2d(1, 1, 3, padding=1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 0, 0], [1, -2, 4], [0, 0, 0]]))
    >>> inflow(layer, (1, 3)).tolist()          # the outer weights fall over the border
    [[[6.0, 7.0, 3.0]]]
    """
    size_of = double(layer.weight.detach()).abs()
    if isinstance(layer, nn.Linear):
        flow = size_of.sum(1)[:, None, None]
    else:
        kernel = size_of.sum(1, keepdim=True)
        flow = _convolved(kernel.new_ones(1, *size), layer, kernel)
    return flow if gain is None else flow * gain.to(flow).abs()[:, None, None]


def outflow(layer: Layer, flow: Tensor, index: np.ndarray, channel: np.ndarray) -> Tensor:
    """Most that a layer can make of what comes to it in each channel.

    Parameters
    ----------
    layer : Conv2d or Linear
        That reads the channels.
    flow : Tensor of shape (C, H, W)
        Bound of each channel at each position of the layer's input.
    index, channel : int ndarray
        Input ``index[i]`` of the layer carries ``channel[i]``. A channel has several inputs of a
        linear layer behind a flattened map.

    Returns
    -------
    Tensor of shape (C,)
        Sum over the layer's outputs and their positions of the absolute weights times the flow.

    Examples
    --------
    >>> import numpy as np, torch
    >>> from torch import nn
    >>> from sinfkit.criteria import outflow
    >>> layer = nn.Linear(2, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -3.0], [2.0, 0.0]]))
    >>> outflow(layer, torch.tensor([[[10.0]], [[1.0]]]), np.arange(2), np.arange(2)).tolist()
    [30.0, 3.0]
    """
    flow = double(flow)
    size_of = double(layer.weight.detach()).abs()
    order = np.lexsort((index, channel))
    inputs = torch.as_tensor(index[order], device=flow.device)
    carried = torch.as_tensor(channel[order], device=flow.device)
    if isinstance(layer, nn.Linear):
        cells = size_of.sum(0)[inputs]
        grid = _grid(len(inputs) // len(flow), flow)
        if grid is None:
            cells = torch.zeros_like(flow[:, 0, 0]).index_add_(0, carried, cells)
            return cells * flow.mean((1, 2))
        return (cells.view(len(flow), -1) * F.adaptive_avg_pool2d(flow, grid).flatten(1)).sum(1)
    per_input = size_of.unflatten(0, (layer.groups, -1)).sum(1).flatten(0, 1)[inputs]
    kernel = flow.new_zeros(len(flow), *per_input.shape[1:]).index_add_(0, carried, per_input)
    return _convolved(flow, layer, kernel[:, None]).sum((1, 2))


def gather_couplings(
    graph: fx.GraphModule, groups: Sequence[ChannelGroup], example: Tensor
) -> dict[str, tuple[Tensor, ...]]:
    r"""What each channel can carry, for each pair of a layer that gives it and one that reads it.

    Parameters
    ----------
    graph : GraphModule
        From `trace`, in eval mode.
    groups : sequence of ChannelGroup
        Those to be ranked.
    example : Tensor of shape (1, ...)
        An input, on the network's device: only its size matters.

    Returns
    -------
    dict of str to tuple of Tensor of shape (n_channels,)
        By group name, one tensor for each pair. Their sum is the group's score.

    Notes
    -----
    Narshana, Murti and Bhattacharyya (DFPC, ICLR 2023) score coupled channels without data, by an
    upper bound of the error that the layers that read them would make. The code that they released
    for ResNets writes layers as matrices of absolute values, :math:`|M_a|` for a layer that gives
    the channels, :math:`|D_a|` for the batch-norm behind it and :math:`|M_b|` for a layer that
    reads them, and adds up, over all pairs with b behind a,

    .. math:: \sum_{\text{entries}} |M_b|_{:, i} \, \bigl(|D_a| |M_a|\bigr)_{i, :} ,

    where i stands for the positions of channel i. Biases, means and the norm behind b do not count.
    That is what is computed here, borders, strides and padding included, by convolutions instead of
    matrices.

    Our reading, where that code is made for one architecture: "behind" is in order of execution;
    where the map shrinks between a and b, what comes through is averaged, whatever the pooling (the
    code does so in front of the classifier, and leaves the stem's max-pooling out); a depthwise
    convolution counts as a further layer that gives the channels. DFPC removes one channel at a
    time, of all layers' lowest, and scores again; here all are scored once, and the schedule says
    how many leave each group.
    """
    modules = dict(graph.named_modules())
    calls: dict[str, list[int]] = {}
    inputs: dict[str, str] = {}
    for place, node in enumerate(graph.graph.nodes):
        if called_layer(graph, node) is not None:
            calls.setdefault(str(node.target), []).append(place)
            inputs.setdefault(str(node.target), node.all_input_nodes[0].name)
    sizes: dict[str, tuple[int, ...]] = {}
    wanted = {layer for group in groups for layer in (*group.layers, *group.consumers)} & set(calls)
    watched = with_capture(
        graph,
        {layer: inputs[layer] for layer in wanted},
        lambda layer, value: sizes.update({layer: tuple(value.shape[2:])}),
    )
    with torch.inference_mode():
        watched(example)

    gains = norm_gains(graph)
    found = {}
    for group in groups:
        pairs = []
        for giver in group.layers:
            flow = inflow(modules[giver], sizes[giver], gains.get(giver))
            for member in group._members:
                if _reads(member, calls) and calls[member.module][-1] > calls[giver][0]:
                    reader = modules[member.module]
                    here = flow
                    if isinstance(reader, nn.Conv2d):
                        height, width = sizes[member.module]
                        here = F.adaptive_avg_pool2d(flow, (height, width))
                    pairs.append(outflow(reader, here, member.index, member.channel))
        found[group.name] = tuple(pair.cpu() for pair in pairs)
    return found


def _reads(member: Member, calls: dict[str, list[int]]) -> bool:
    return member.side == "in" and member.module in calls


def _convolved(flow: Tensor, layer: nn.Conv2d, kernel: Tensor) -> Tensor:
    """Convolve each channel by its own kernel, or a single map by all; (C, H, W) in and out."""
    # What is padded by other than zeros is as large as what is inside.
    border = 0.0 if layer.padding_mode == "zeros" else 1.0
    padded = F.pad(flow, padding(layer), value=border)
    return F.conv2d(padded[None], kernel, None, layer.stride, 0, layer.dilation, len(flow))[0]


def _grid(n_cells: int, flow: Tensor) -> tuple[int, int] | None:
    """Height and width of a flattened map of so many cells, in the proportions of another."""
    height, width = flow.shape[1:]
    rows = isqrt(max(1, n_cells * height // width))
    return (rows, n_cells // rows) if rows * (n_cells // rows) == n_cells else None
