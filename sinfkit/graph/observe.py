"""Which value of a graph is a layer's activation, and how to see it while the network computes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from .nodes import (
    called_layer,
    is_activation,
    is_addition,
    is_identity,
    is_norm,
    is_pool,
    is_shape_query,
    n_channels,
)
from .tracing import new_graph


def observation_nodes(gm: fx.GraphModule, layers: Iterable[str]) -> dict[str, str]:
    """Where the activations of layers are to be observed."""
    calls: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if called_layer(gm, node) is not None:
            calls.setdefault(str(node.target), node)
    places = {}
    for name in layers:
        if name not in calls:
            raise ValueError(
                f"The network has no layer {name!r} that can be observed. Its layers: "
                f"{', '.join(calls)}."
            )
        places[name] = _activation_of(gm, calls[name]).name
    return places


def channel_axis(gm: fx.GraphModule, node: str) -> int:
    """Axis of a node's value that holds the channels."""
    return -1 if isinstance(_source_layer(gm, _named(gm, node)), nn.Linear) else 1


def with_capture(
    gm: fx.GraphModule, nodes: Mapping[str, str], fn: Callable[[str, Tensor], None]
) -> fx.GraphModule:
    """A network that shows values to a function while it computes."""
    keys: dict[fx.Node, list[str]] = {}
    for key, name in nodes.items():
        keys.setdefault(_named(gm, name), []).append(key)
    graph = new_graph()
    env: dict[fx.Node, fx.Node] = {}
    parts: dict[str, Any] = {}
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        if node.op in ("call_module", "get_attr"):
            parts[str(node.target)] = operator.attrgetter(str(node.target))(gm)
        for key in keys.get(node, ()):
            capture = f"_capture_{len(parts)}"
            parts[capture] = _Capture(key, fn)
            graph.call_module(capture, (env[node],))
    return fx.GraphModule(parts, graph, class_name=type(gm).__name__).eval()


class _Capture(nn.Module):
    """Shows its input to a function."""

    def __init__(self, key: str, fn: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.key, self.fn = key, fn

    def forward(self, value: Tensor) -> None:
        """Call the function; return nothing, so that nothing is kept."""
        self.fn(self.key, value)


def _named(gm: fx.GraphModule, name: str) -> fx.Node:
    """The node with a name."""
    for node in gm.graph.nodes:
        if node.name == name:
            return node
    raise ValueError(f"The graph has no node {name!r}.")


def _consumers(node: fx.Node) -> list[fx.Node]:
    """Nodes that use a node's values, not only its shape."""
    return [user for user in node.users if not is_shape_query(user)]


def _activation_of(gm: fx.GraphModule, layer: fx.Node) -> fx.Node:
    """The node whose value is the activation of a layer that another node calls."""
    place = ahead = layer
    while True:
        consumers = _consumers(ahead)
        if len(consumers) != 1 or consumers[0].all_input_nodes.count(ahead) != 1:
            return place
        before, ahead = ahead, consumers[0]
        if is_identity(gm, ahead):  # looked through, never stopped at
            continue
        if is_addition(ahead):
            other = next(a for a in ahead.all_input_nodes if a is not before)
            source, own = _source_layer(gm, other), called_layer(gm, layer)
            assert own is not None
            if source is not None and n_channels(source) != n_channels(own):
                return place  # broadcast
        elif not (is_norm(gm, ahead) or is_activation(gm, ahead)):
            return place
        place = ahead


def _source_layer(gm: fx.GraphModule, node: fx.Node) -> nn.Conv2d | nn.Linear | None:
    """A layer whose channels a node's value has, if one can be told."""
    layer = called_layer(gm, node)
    if layer is not None:
        return layer
    if is_addition(node):
        sources = (_source_layer(gm, n) for n in node.all_input_nodes)
        return next((s for s in sources if s is not None), None)
    if is_norm(gm, node) or is_activation(gm, node) or is_pool(gm, node) or is_identity(gm, node):
        return _source_layer(gm, node.all_input_nodes[0])
    return None
