"""Recording with torch.fx beside other threads.

While torch.fx records a network, or loads a recorded one, it changes ``nn.Module`` itself: two
threads that did so at once would leave it changed, and what others run would be recorded, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.fx.graph_module
from torch import fx, nn

__all__ = ["RECORDING", "OwnThreadTracer", "reduce_graph_module"]

RECORDING = threading.RLock()


class OwnThreadTracer(fx.Tracer):
    """torch's tracer, blind to the modules that other threads run."""

    _thread = 0

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        """Record the graph."""
        self._thread = threading.get_ident()
        return super().trace(root, concrete_args)

    def is_mine(self) -> bool:
        """Whether it is the thread that records which asks."""
        return threading.get_ident() == self._thread

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record the call of a module."""
        if not self.is_mine():
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Record that a parameter is read."""
        if not self.is_mine():
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def reduce_graph_module(body: dict[str, Any], import_block: str) -> nn.Module:
    """What torch calls to load a graph that it has written, for a process with other threads."""
    plain = body.get("_tracer_cls") is None
    if plain:
        body = {**body, "_tracer_cls": OwnThreadTracer}
    module: nn.Module = torch.fx.graph_module.reduce_graph_module(body, import_block)
    if plain:
        vars(module).pop("_tracer_cls", None)
        graph: Any = module.graph
        graph._tracer_cls = None
    return module
