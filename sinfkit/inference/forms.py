"""The forms in which a network predicts: as it is, packed for the CPU, or in half precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..graph.cost import fold_batch_norm
from ..graph.nodes import is_switched
from ..utils.params import check_choice
from .network import SINFNetwork
from .prepacked import can_prepack, fits, group_size, prepacked

__all__ = ["HalfNetwork", "PackedModule", "PackedNetwork", "fast_form", "half_precision"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_TOLERANCE = 1e-4  # of the largest value; what float32 may round otherwise is far below
_ROWS = 4  # that both forms are compared on

# Each network's packed form, None where it has none, and the state that this was made from.
_FORMS: WeakKeyDictionary[nn.Module, tuple[Hashable, nn.Module | None]] = WeakKeyDictionary()


class PackedNetwork(SINFNetwork):
    """A routed network whose convolutions keep their weights as oneDNN wants them."""

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run what every sample passes, in the layout that the weights are packed for."""
        return super().features(_channels_last(x))

    def run_branch(self, branch: int, h: Tensor, index: Tensor) -> Tensor:
        """Run one branch on its rows, rounded up to one of few numbers of them."""
        n, module = len(index), self.branch(branch)
        if n == len(h):
            return module(h)
        padding = index[:1].expand(group_size(n) - n)
        return module(h[torch.cat((index, padding))])[:n]  # one copy gathers and pads


class PackedModule(nn.Module):
    """The same for a network without routes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's output for a batch."""
        out: Tensor = self.module(_channels_last(x))
        return out


class HalfNetwork(SINFNetwork):
    """A routed network in half precision; routes and probabilities keep the router's type."""

    dtype = torch.bfloat16

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        """Return class probabilities of samples before normalisation, in the router's type."""
        return super().forward(x)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run what every sample passes: the prefix's output, and the fine log-posterior."""
        h = self.prefix(self.normalise(x).to(self.dtype))
        return h, self.router(h)


def fast_form(module: nn.Module, example: Callable[[], Tensor]) -> nn.Module:
    """The form of a network that gives its answers in the least time; it may be `module` itself.

    It is made when it is first asked for, compared with `module` on `example()` (a batch), and
    made anew when weights, settings or device have changed since.  Not to be stored.
    """
    if module.training or _device(module).type != "cpu":
        return module
    state = _state(module)
    known = _FORMS.get(module)
    if known is None or known[0] != state:
        # Two threads may both make one; either is right.
        _FORMS[module] = known = state, _checked(module, example()[:_ROWS])
    return module if known[1] is None else known[1]


def half_precision(
    network: SINFNetwork, dtype: Literal["bfloat16", "float16"] = "bfloat16"
) -> HalfNetwork:
    """A copy of a routed network whose prefix, subgraphs and rest compute in half precision."""
    check_choice("dtype", dtype, _DTYPES)
    to = _DTYPES[dtype]
    packs = _device(network).type == "cpu" and can_prepack(to)

    def convert(part: nn.Module) -> nn.Module:
        half = copy.deepcopy(part).to(to)
        return prepacked(half) if packs else half

    half = network.rebuilt(HalfNetwork, convert)
    half.dtype = to
    return half


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _state(module: nn.Module) -> Hashable:
    """Tells whether a network is what it was: tensors, modules and settings."""
    tensors = (*module.parameters(), *module.buffers())
    return (
        tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors),
        tuple((id(m), bool(m._forward_hooks or m._forward_pre_hooks)) for m in module.modules()),
        module.settings() if isinstance(module, SINFNetwork) else (),
    )


def _checked(module: nn.Module, x: Tensor) -> nn.Module | None:
    """The packed form; None where there is none, or it would not answer the same."""
    modules = list(module.modules())
    if not can_prepack(torch.float32) or not any(fits(m) for m in modules):
        return None
    # Padding would change batch statistics, and a hook would not be called.
    if any(isinstance(m, _BatchNorm) and m.running_mean is None for m in modules):
        return None
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return None
    # Code that was not looked into may show, and write into, memory in the order of its axes.
    if any(_is_opaque(m) for m in modules):
        return None
    try:
        with torch.inference_mode():
            if isinstance(module, SINFNetwork):
                network = module.rebuilt(PackedNetwork, prepacked)
                return network if _same_parts(module, network, x) else None
            packed = PackedModule(prepacked(fold_batch_norm(module))).eval()
            return packed if _same(packed(x), module(x)) else None
    except (RuntimeError, ValueError):  # a view that only one layout allows, code without a trace
        return None


def _is_opaque(module: nn.Module) -> bool:
    """Whether a module's code is neither torch's nor ours."""
    if isinstance(module, fx.GraphModule) or is_switched(module):
        return False
    return not type(module).forward.__module__.startswith(("torch.", "sinfkit."))


def _same_parts(network: SINFNetwork, other: SINFNetwork, x: Tensor) -> bool:
    """Whether all parts agree, also those that none of the samples takes."""
    h, log_posterior = network.features(x)
    found, other_posterior = other.features(x)
    if not (_same(found, h) and _same(other_posterior, log_posterior)):
        return False
    branches = [c for c in range(network.n_clusters) if network.subgraph(c) is not None]
    branches += [] if network.rest is None else [network.n_clusters]
    return all(_same(other.branch(b)(h), network.branch(b)(h)) for b in branches)


def _same(found: Tensor, expected: Tensor) -> bool:
    if not expected.numel():
        return True
    scale = float(expected.abs().max())
    return torch.allclose(found, expected, rtol=0, atol=_TOLERANCE * scale, equal_nan=True)
