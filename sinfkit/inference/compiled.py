"""Networks as code and weights: compiled once per structure and size, run with any weights."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["bucket", "signature", "skeleton", "weights_of"]

Weights = Mapping[str, Tensor]

_SMALLEST = 8


def bucket(n: int) -> int:
    """The batch size that `n` samples are padded to: 1, 8, 16, 32 and so on.

    Examples
    --------
    >>> [bucket(n) for n in (1, 2, 8, 9, 200)]
    [1, 8, 8, 16, 256]
    """
    return n if n <= 1 else max(_SMALLEST, 1 << (n - 1).bit_length())


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name; a tensor with two names under the first of them."""
    return dict([*module.named_parameters(), *module.named_buffers()])


def skeleton(module: nn.Module) -> nn.Module:
    """Copy a module without its weights, for `torch.func.functional_call`."""
    memo: dict[int, Any] = {}
    for tensor in weights_of(module).values():
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(module, memo)


def signature(module: nn.Module) -> Hashable:
    """What two modules have in common that compute the same but for the values of their weights."""
    parts: list[Hashable] = []
    for name, part in module.named_modules(remove_duplicate=False):
        code = part.code if isinstance(part, fx.GraphModule) else f"{type(part)}"
        settings = tuple(
            (key, repr(value))
            for key, value in sorted(vars(part).items())
            if isinstance(value, (bool, int, float, str, tuple, type(None)))
        )
        # A tensor that is neither parameter nor buffer cannot be exchanged.
        own = tuple(id(value) for value in vars(part).values() if isinstance(value, Tensor))
        parts.append((name, code, settings, own))
    for name, tensor in weights_of(module).items():
        layout = (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)
        parts.append((name, *layout))
    return tuple(parts)


class CompiledCalls:
    """Calls of modules by compiled code, which modules of equal `signature` share.

    The weights are inputs of the code, so that it holds none of them.  Each structure and each
    shape of input is compiled once, as a whole: `torch.compile` raises where it would have to leave
    its graph, and nothing is traced again when only weights or values change.
    """

    def __init__(self) -> None:
        self._kinds: dict[Hashable, int] = {}
        self._skeletons: list[nn.Module] = []
        self._code: dict[Hashable, Callable[[Weights, Tensor], Any]] = {}

    @property
    def n_compiled(self) -> int:
        """Pieces of code so far."""
        return len(self._code)

    def kind(self, module: nn.Module) -> int:
        """Return the number of a module's kind, by which to call it."""
        number = self._kinds.setdefault(signature(module), len(self._skeletons))
        if number == len(self._skeletons):
            self._skeletons.append(skeleton(module))
        return number

    def __call__(self, kind: int, weights: Weights, x: Tensor) -> Any:
        """Run a kind of module with some module's weights on a batch."""
        place = (kind, x.shape, x.stride(), x.dtype, x.device)
        if place not in self._code:
            self._code[place] = _compile(self._skeletons[kind])
        return self._code[place](weights, x)


def _compile(module: nn.Module) -> Callable[[Weights, Tensor], Any]:
    """Compile the call of a skeleton."""

    def run(weights: Weights, x: Tensor) -> Any:
        return torch.func.functional_call(module, dict(weights), (x,))

    # Dynamo searches, and limits, what it has compiled by code object; so each gets its own.
    own = types.FunctionType(
        run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__
    )
    return torch.compile(own, fullgraph=True, dynamic=False)
