"""Convolutions whose weights lie in memory as the CPU's library wants them.

PyTorch brings a convolution's weights into oneDNN's own layout each time it runs.  That takes the
same time for any number of samples, and a routed network runs its subgraphs on few samples each.
Here it is done once, and a ReLU behind a convolution runs inside of it.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

__all__ = ["PrepackedConv2d", "can_prepack", "fits", "group_size", "prepacked"]

M = TypeVar("M", bound=nn.Module)

_TYPES = (torch.float32, torch.bfloat16)
_RELUS = (torch.relu, functional.relu, torch.nn.functional.relu_)
_EXACT = 16  # up to so many samples a group keeps its size
_SAMPLES = 16  # that the layout is chosen for; it serves other numbers as well


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether PyTorch and the processor know weights of a type in oneDNN's layout."""
    operations = ("_convolution_pointwise", "_reorder_convolution_weight")
    if not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in operations):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def group_size(n: int) -> int:
    """Round a group's size up by less than an eighth: 1, 16, 17, 100 to 1, 16, 18, 104.

    The first pass of each size prepares each convolution anew, and oneDNN remembers only so many.
    """
    if n <= _EXACT:
        return n
    step = 2 ** ((n - 1).bit_length() - 4)
    return -(-n // step) * step


class PrepackedConv2d(nn.Module):
    """A convolution with a ReLU behind it or without, for prediction on the CPU.

    Parameters are shared with `conv`; of its weights there is a copy from the first call on.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.activation = "relu" if relu else "none"
        assert not isinstance(conv.padding, str)
        self._geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        for name, child in conv.named_children():  # called by name: a padding of its own, say
            self.add_module(name, child)
        # Not a buffer: it can neither be stored nor moved.
        self._packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a batch of shape (n_samples, channels, height, width)."""
        if x.ndim != 4:  # oneDNN would say that it has no such primitive, as if memory were short
            raise RuntimeError(f"a convolution takes batches with 4 axes, got {tuple(x.shape)}.")
        if self._packed is None:
            # The layout hangs on the size of the images, which no weight tells.
            size = [_SAMPLES, *x.shape[1:]]
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            self._packed = reorder(self.weight.detach(), *self._geometry, size)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, self.bias, *self._geometry, self.activation, [], ""
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_packed": None}


def prepacked(module: M) -> M:
    """Copy a module, in eval mode and on the CPU, with the convolutions prepacked that can be.

    Those are the ones inside of what `torch.fx` has traced.  All parameters are shared.
    """
    if isinstance(module, fx.GraphModule):
        return _graph_prepacked(module)  # type: ignore[return-value]
    twin = copy.copy(module)
    twin._modules = {
        name: child if child is None else prepacked(child)
        for name, child in module._modules.items()
    }
    return twin


def _graph_prepacked(module: fx.GraphModule) -> fx.GraphModule:
    """The same for a traced module."""
    memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
    twin: fx.GraphModule = copy.deepcopy(module, memo)
    modules = dict(twin.named_modules())
    uses: dict[str, list[fx.Node]] = {}
    for node in twin.graph.nodes:
        if node.op == "call_module" and fits(modules[node.target]):
            uses.setdefault(node.target, []).append(node)
    for name, nodes in uses.items():
        # A layer that is called twice has one weight, but maybe two sizes of images.
        if len(nodes) > 1:
            continue
        (node,) = nodes
        relus = [user for user in node.users if _is_relu(user, modules)]
        fused = len(relus) == len(node.users) == 1
        conv = modules[name]
        assert isinstance(conv, nn.Conv2d)
        twin.set_submodule(name, PrepackedConv2d(conv, fused))
        if fused:
            relus[0].replace_all_uses_with(node)
            twin.graph.erase_node(relus[0])
    twin.recompile()
    return twin.eval()


def fits(module: nn.Module) -> bool:
    """Whether a module is a convolution that oneDNN has."""
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.weight.dtype in _TYPES
        and module.weight.device.type == "cpu"
    )


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU  # type: ignore[index]
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in _RELUS
