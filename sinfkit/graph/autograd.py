"""Code that torch would hand to its autograd engine, which takes no proxies, called as it is.

Functions with a backward of their own, and parts that are computed twice to save memory.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.autograd.function import FunctionCtx

__all__ = ["without_autograd"]

_FUNCTION: Any = torch.autograd.Function
_APPLY: Any = inspect.getattr_static(_FUNCTION, "apply")
_CHECKPOINT: Any = torch.utils.checkpoint
_GENERATORS = (
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)


@contextlib.contextmanager
def without_autograd(root: nn.Module) -> Iterator[None]:
    """While a module is recorded, let ``apply`` and ``checkpoint`` run what they are given."""
    plain = [(home, name, home[name]) for home, name in _looked_up_before(root)]
    generators = {
        name: vars(_CHECKPOINT)[name] for name in _GENERATORS if name in vars(_CHECKPOINT)
    }
    try:
        _FUNCTION.apply = classmethod(_applied)
        for home, name, apply in plain:
            home[name] = functools.partial(_applied, apply.__self__)
        for name in generators:
            setattr(_CHECKPOINT, name, _nothing_around)
        yield
    finally:
        _FUNCTION.apply = _APPLY
        for home, name, apply in plain:
            home[name] = apply
        vars(_CHECKPOINT).update(generators)


def _looked_up_before(root: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where ``swish = Swish.apply`` keeps torch's own apply, which proxies would crash."""
    own = [kind for kind in _FUNCTION.__subclasses__() if not kind.__module__.startswith("torch.")]
    if not own:
        return
    forwards = [getattr(type(module).forward, "__globals__", {}) for module in root.modules()]
    homes = [vars(sys.modules[kind.__module__]) for kind in own if kind.__module__ in sys.modules]
    for home in {id(h): h for h in (*homes, *forwards, *map(vars, root.modules()))}.values():
        for name, value in list(home.items()):
            if getattr(value, "__name__", "") == "apply" and isinstance(
                getattr(value, "__self__", None), type(_FUNCTION)
            ):
                yield home, name


def _applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.autograd.Function.apply`, but forward itself where a proxy is given."""
    if not any(issubclass(type(a), fx.Proxy) for a in (*args, *kwargs.values())):
        return _APPLY.__get__(None, cls)(*args, **kwargs)
    if cls is _CHECKPOINT.CheckpointFunction:
        function, _, *rest = args
        return function(*rest)
    if cls.setup_context is not _FUNCTION.setup_context:  # then forward gets no context
        return cls.forward(*args, **kwargs)
    context: Any = FunctionCtx()
    context.needs_input_grad = (False,) * len(args)
    return cls.forward(context, *args, **kwargs)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    """What surrounds the call of a function that is not computed twice."""
    yield
