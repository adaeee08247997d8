"""All subgraphs as one network: grouped convolutions over stacked weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..graph.tracing import trace

__all__ = ["StackedSubgraphs", "gather_slots"]

_CHANNELWISE = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class StackedSubgraphs(nn.Module):
    """Several networks of equal structure and widths, which run side by side in one pass.

    Parameters
    ----------
    subgraphs : sequence of nn.Module
        Chains of ``Conv2d`` without groups, ``Linear``, ``ReLU``, pooling, ``Flatten`` and
        batch-norm.  Their weights are copied.

    Raises
    ------
    ValueError
        If they have another structure, or differ.
    """

    def __init__(self, subgraphs: Sequence[nn.Module]) -> None:
        super().__init__()
        chains = [_chain(subgraph) for subgraph in subgraphs]
        if len({len(chain) for chain in chains}) != 1:
            raise ValueError(_differ("their number of layers"))
        self.n = len(chains)
        self.layers = nn.Sequential(*(_stack(layers) for layers in zip(*chains, strict=True)))
        self.requires_grad_(False).eval()

    def forward(self, h: Tensor) -> Tensor:
        """Run each network on its own rows.

        Parameters
        ----------
        h : Tensor of shape (capacity, n_networks, channels, ...)

        Returns
        -------
        Tensor of shape (capacity, n_networks, n_outputs)
        """
        return self.layers(h.flatten(1, 2)).unflatten(1, (self.n, -1))


class _StackedLinear(nn.Module):
    """One linear layer for each block of features."""

    bias: Tensor | None

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        bias = None
        if layers[0].bias is not None:
            bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers])[:, None])
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (capacity, n_networks * n_in) to (capacity, n_networks * n_out)."""
        blocks = x.unflatten(1, (len(self.weight), -1)).transpose(0, 1)
        out = torch.bmm(blocks, self.weight)
        out = out if self.bias is None else out + self.bias
        return out.transpose(0, 1).flatten(1)


def gather_slots(branch: Tensor, order: Tensor, n_clusters: int, capacity: int) -> Tensor:
    """Say which run fills which place of the padded batch; the host need not wait for it.

    Parameters
    ----------
    branch : int Tensor of shape (n_runs,)
    order : int Tensor of shape (n_runs,)
        The runs sorted by branch.
    n_clusters, capacity : int

    Returns
    -------
    int Tensor of shape (capacity, n_clusters)
        Runs; places that stay free hold some other cluster's run.
    """
    bounds = torch.arange(n_clusters, device=branch.device)
    start = torch.searchsorted(branch[order], bounds)
    place = start + torch.arange(capacity, device=branch.device)[:, None]
    return order[place.clamp_max(len(order) - 1)]


def _chain(module: nn.Module) -> list[nn.Module]:
    """The layers of a network that is a chain, in order."""
    gm = module if isinstance(module, fx.GraphModule) else trace(module)
    layers: list[nn.Module] = []
    last: fx.Node | None = None
    for node in gm.graph.nodes:
        if node.op != "placeholder" and (node.all_input_nodes != [last]):
            raise ValueError(_unfit(f"{node.name!r} does not read what the layer before it gives"))
        last = node
        if node.op in ("placeholder", "output"):
            continue
        layer = _layer(gm, node)
        if not isinstance(layer, _NOTHING):
            layers.append(layer)
    return layers


def _layer(gm: fx.GraphModule, node: fx.Node) -> nn.Module:
    """The layer that a node is; a ValueError for those that cannot be stacked."""
    if node.op == "call_module":
        layer = gm.get_submodule(str(node.target))
        kinds: tuple[Any, ...] = (nn.Conv2d, nn.Linear, nn.Flatten, *_CHANNELWISE, *_NOTHING)
        fits = type(layer) in (*kinds, *_BATCH_NORMS)
        if isinstance(layer, nn.Conv2d):
            fits = fits and layer.groups == 1 and layer.padding_mode == "zeros"
        if isinstance(layer, nn.Flatten):
            fits = fits and (layer.start_dim, layer.end_dim) == (1, -1)
        if isinstance(layer, _BATCH_NORMS):
            fits = fits and layer.running_mean is not None
        if fits:
            return layer
        raise ValueError(_unfit(f"{node.target!r} is {layer}"))
    if node.target in (F.relu, torch.relu):
        return nn.ReLU()
    if node.target is torch.flatten and node.args[1:] == (1,) and not node.kwargs:
        return nn.Flatten()
    raise ValueError(_unfit(f"it calls {node.target}"))


def _stack(layers: Sequence[Any]) -> nn.Module:
    """One layer that does what several do, each on its own block of channels."""
    first = layers[0]
    if len({(type(layer), repr(layer)) for layer in layers}) != 1:
        raise ValueError(_differ(" and ".join(sorted({repr(layer) for layer in layers}))))
    if isinstance(first, nn.Linear):
        return _StackedLinear(layers)
    if not isinstance(first, (nn.Conv2d, *_BATCH_NORMS)):
        return first
    n = len(layers)
    if isinstance(first, nn.Conv2d):
        stacked: nn.Module = nn.Conv2d(
            n * first.in_channels,
            n * first.out_channels,
            first.kernel_size,  # type: ignore[arg-type]
            first.stride,  # type: ignore[arg-type]
            first.padding,  # type: ignore[arg-type]
            first.dilation,  # type: ignore[arg-type]
            groups=n,
            bias=first.bias is not None,
            device="meta",
        )
    else:
        stacked = type(first)(n * first.num_features, first.eps, affine=first.affine, device="meta")
    states = [layer.state_dict() for layer in layers]
    state = {
        name: torch.cat([one[name] for one in states]) if tensor.ndim else tensor
        for name, tensor in states[0].items()
    }
    stacked.load_state_dict(state, assign=True)
    return stacked


def _unfit(what: str) -> str:
    return (
        "padded=True needs subgraphs that are chains of Conv2d (groups=1), Linear, ReLU, pooling, "
        f"Flatten and batch-norm, but {what}. Leave padded=False."
    )


def _differ(what: str) -> str:
    return (
        "padded=True needs subgraphs of equal structure and widths, and clusters of equally many "
        f"classes; these differ: {what}. Leave padded=False."
    )
