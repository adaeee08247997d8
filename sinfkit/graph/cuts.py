"""Where a network can be observed, and where it can be cut in two.

Everything here reads or builds ``torch.fx`` graphs; nothing computes with data.  Layers keep the
qualified names that they have in the user's model.
"""

from __future__ import annotations

import operator
import os.path
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .nodes import (
    ALONG_ROWS,
    Layer,
    called_layer,
    called_module,
    function_name,
    is_activation,
    is_addition,
    is_arithmetic,
    is_batch_size,
    is_identity,
    is_norm,
    is_pool,
    is_shape_query,
    is_station,
    n_channels,
    samples_in,
    samples_of,
    unpacks,
)
from .tracing import new_graph


@dataclass(frozen=True)
class CutPoint:
    """A place where a network can be cut in two, because just one tensor is live."""

    name: str
    node: str


def layer_names(gm: fx.GraphModule) -> list[str]:
    """Names of a network's layers."""
    return list(
        dict.fromkeys(str(n.target) for n in gm.graph.nodes if called_layer(gm, n) is not None)
    )


def find_layer(gm: fx.GraphModule, name: str) -> str:
    """The layer with a given name, or the first one of a given module."""
    names = layer_names(gm)
    for layer in names:
        if _lies_in(layer, name):
            return layer
    raise ValueError(f"The network has no layer {name!r}. Its layers: {', '.join(names)}.")


def batch_norm_behind(gm: fx.GraphModule) -> dict[str, str]:
    """Map each layer to the batch-norm that alone reads its output, where one does."""
    found = {}
    for node in gm.graph.nodes:
        norm = called_module(gm, node)
        if not isinstance(norm, _BatchNorm):
            continue
        source = node.all_input_nodes[0]
        if source.op == "call_module" and len(source.users) == 1:
            if called_layer(gm, source) is not None:
                found[str(source.target)] = str(node.target)
    return found


def output_layer(gm: fx.GraphModule, n_outputs: int) -> str:
    """Name of the layer that computes a network's outputs."""
    stations = [n for n in gm.graph.nodes if is_station(gm, n)]
    if not stations:
        raise ValueError(
            "The network has no convolution or Linear layer, so no outputs to choose from."
        )
    name = str(stations[-1].target)
    layer = called_layer(gm, stations[-1])
    whole = f"The network must end in a Linear layer or 1 x 1 convolution with {n_outputs} outputs"
    if layer is None:
        raise ValueError(
            f"{whole}, but it ends in {name!r}, which torch.fx cannot look into. Move the last "
            "layer out of it."
        )
    pointwise = isinstance(layer, nn.Linear) or (
        set(layer.kernel_size) == {1} and layer.groups == 1
    )
    if not pointwise or n_channels(layer) != n_outputs:
        raise ValueError(f"{whole}, but its last layer, {name!r}, is {layer}.")
    return name


def passes_on(layer: nn.Module) -> bool:
    """Whether a layer gives its inputs, all scaled alike, or a zero beside its only one."""
    if not isinstance(layer, nn.Linear) or layer.bias is not None:
        return False
    weight = layer.weight.detach()
    if weight.shape[1] == 1:
        return weight.flatten().tolist() == [0, 1]
    return weight.shape[0] == weight.shape[1] and bool(
        (weight == weight[0, 0] * torch.eye(len(weight)).to(weight)).all()
    )


def feature_layer(gm: fx.GraphModule, output: str) -> str:
    """The layer that reads a network's features: its output layer, or one that it passes on."""
    if passes_on(gm.get_submodule(output)):
        node = gm.graph.find_nodes(op="call_module", target=output)[0].all_input_nodes[0]
        while is_identity(gm, node) or function_name(node) in ("reshape", "squeeze", "view"):
            node = node.all_input_nodes[0]
        if isinstance(called_layer(gm, node), nn.Linear):
            return str(node.target)
    return output


def cut_points(gm: fx.GraphModule) -> list[CutPoint]:
    """All places where a network can be cut in two.

    Parameters
    ----------
    gm : GraphModule
        From `trace`.

    Returns
    -------
    list of CutPoint
        In the order of execution.  Each has at least one layer before and one after it, and no
        layer on both sides.

    Notes
    -----
    Between two layers there may be several nodes with one live tensor.  The cut comes after the
    norm and the activation, and after pooling and dropout that follow directly, so that the
    tensor is small; it comes before flattening, so that a feature map stays one.

    A cut after a plain layer has that layer's name.  Where branches join (a residual sum, a
    concatenation, a gate) it has the name of the smallest module that holds the layers since the
    cut before, if that module ends there (``"layer2.3"``), and else that of the layer executed
    last.  Trailing parts that are no numbers are left out where that makes no difference
    (``"features.3"`` for ``"features.3.conv"``).

    Examples
    --------
    >>> from torch import nn
    >>> from sinfkit.graph import trace
    >>> gm = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    >>> cut_points(gm)
    [CutPoint(name='0', node='_1')]
    """
    nodes = list(gm.graph.nodes)
    stations = [node for node in nodes if is_station(gm, node)]
    is_single = set(_single_live(nodes))
    segments: dict[int, list[fx.Node]] = {}  # by the number of stations before
    n_before = 0
    for node in nodes:
        n_before += n_before < len(stations) and node is stations[n_before]
        if node in is_single and 0 < n_before < len(stations):
            segments.setdefault(n_before, []).append(node)

    names: dict[fx.Node, str] = {}
    start = 0
    for stop, candidates in segments.items():
        place = _moved_on(gm, candidates, nodes)
        if candidates[0] is stations[stop - 1]:
            names[place] = str(candidates[0].target)
        else:
            names[place] = _joined_name(stations, start, stop)
        start = stop
    return [CutPoint(names[p], p.name) for p in _with_own_modules(gm, list(names))]


def find_cut(gm: fx.GraphModule, name: str) -> CutPoint:
    """The cut with a given name, or the one that closes a given layer or module."""
    cuts = cut_points(gm)
    named = [cut for cut in cuts if cut.name == name]
    if named:
        return named[0]
    order = {node.name: i for i, node in enumerate(gm.graph.nodes)}
    inside = [
        order[n.name] for n in gm.graph.nodes if is_station(gm, n) and _lies_in(n.target, name)
    ]
    closing = [cut for cut in cuts if inside and order[cut.node] >= inside[-1]]
    if closing:
        return closing[0]
    problem = "cannot be cut after" if inside else "has no layer or module"
    possible = ", ".join(cut.name for cut in cuts) or "nowhere"
    raise ValueError(f"The network {problem} {name!r}. It can be cut after: {possible}.")


def sides(graph: fx.GraphModule, cut: CutPoint) -> tuple[list[str], list[str]]:
    """Names of the layers before and behind a cut."""
    names, before = layer_names(graph), set()
    for node in graph.graph.nodes:
        before.add(str(node.target))
        if node.name == cut.node:
            break
    return [n for n in names if n in before], [n for n in names if n not in before]


def split(gm: fx.GraphModule, cut: CutPoint) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a network in two.

    Parameters
    ----------
    gm : GraphModule
        From `trace`.
    cut : CutPoint
        From `cut_points` or `find_cut` of the same network.

    Returns
    -------
    prefix, rest : GraphModule
        ``rest(prefix(x))`` computes what ``gm(x)`` does.  Both share their submodules with `gm`,
        each has only those that it runs, and the names of submodules and nodes are the same
        (those of nodes until a half is pickled or traced).

    Raises
    ------
    ValueError
        If the network has no such cut.

    Notes
    -----
    What can be computed anew, such as the number of samples, does not cross the cut.

    Examples
    --------
    >>> from torch import nn
    >>> from sinfkit.graph import trace
    >>> gm = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    >>> prefix, rest = split(gm, find_cut(gm, "0"))
    >>> layer_names(prefix), layer_names(rest)
    (['0'], ['2'])
    """
    nodes = list(gm.graph.nodes)
    place = next((n for n in nodes if n.name == cut.node), None)
    if place is None or place not in _single_live(nodes):
        raise ValueError(f"{cut} is not a place where this network can be cut.")
    free = _recomputable(nodes)
    at = nodes.index(place)

    front = new_graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in nodes[: at + 1]:
        env[node] = front.node_copy(node, env.__getitem__)
    front.output(env[place])

    back = new_graph()
    entry = back.placeholder("x")
    env = {place: entry}

    def value(node: fx.Node) -> fx.Node:
        """A node's counterpart in the rest; computed anew if it lies before the cut."""
        if node not in env:
            if is_batch_size(node):
                env[node] = back.call_method("size", (entry, 0))
            else:
                env[node] = back.node_copy(node, value)
        return env[node]

    for node in nodes[at + 1 :]:
        if node not in free:
            env[node] = back.node_copy(node, value)
    return _finished(gm, front), _finished(gm, back)


def penultimate(gm: fx.GraphModule, output: str) -> fx.GraphModule:
    """The network up to the input of its output layer."""
    graph = new_graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and node.target == output:
            graph.output(env[node.all_input_nodes[0]])
            return _finished(gm, graph)
        env[node] = graph.node_copy(node, env.__getitem__)
    raise ValueError(f"The network has no layer {output!r}.")


def _finished(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module for part of a graph, with only the submodules and tensors that it uses."""
    part = fx.GraphModule(gm, graph)
    part.graph.eliminate_dead_code()
    # Once more: the first one has the parameters of the dead code, too.
    return fx.GraphModule(part, part.graph, class_name=type(gm).__name__).eval()


def _lies_in(target: object, path: str) -> bool:
    """Whether a qualified name is a path or lies under it."""
    return target == path or str(target).startswith(path + ".")


def _recomputable(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that need not cross a cut: parameters, batch size, and what follows from them."""
    free: set[fx.Node] = set()
    for node in nodes:
        sources = node.all_input_nodes
        derived = node.op in ("call_function", "call_method") and sources
        if node.op == "get_attr" or is_batch_size(node) or (derived and free.issuperset(sources)):
            free.add(node)
    for node in reversed(nodes):  # the input's shape, if only the number of samples is read
        if is_shape_query(node) and free.issuperset(node.users):
            free.add(node)
    return free


def _single_live(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Nodes after which their own value, a tensor, is all that the rest of the graph needs."""
    free = _recomputable(nodes)
    order = {node: i for i, node in enumerate(nodes)}
    last_use = {n: max((order[u] for u in n.users if u not in free), default=-1) for n in nodes}
    live: set[fx.Node] = set()
    found = []
    for i, node in enumerate(nodes):
        if node not in free and last_use[node] > i:
            live.add(node)
        live = {n for n in live if last_use[n] > i}
        whole = samples_of(node) == ALONG_ROWS
        if live == {node} and whole and not any(unpacks(user) for user in node.users):
            found.append(node)
    return found


def _moved_on(
    gm: fx.GraphModule, candidates: Sequence[fx.Node], nodes: Sequence[fx.Node]
) -> fx.Node:
    """The last of the candidates that norm, activation, pooling or dropout lead to."""
    place = candidates[0]
    for candidate in candidates[1:]:
        between = nodes[nodes.index(place) + 1 : nodes.index(candidate) + 1]
        if not all(
            n.op == "get_attr"
            or is_norm(gm, n)
            or is_activation(gm, n)
            or is_pool(gm, n)
            or is_identity(gm, n)
            or is_arithmetic(n)
            for n in between
        ):
            break
        place = candidate
    return place


def _joined_name(stations: Sequence[fx.Node], start: int, stop: int) -> str:
    """Name of a cut at which branches join; their layers are stations start, ..., stop - 1."""
    names = [str(n.target) for n in stations]
    inside, before, after = names[start:stop], names[:start], names[stop:]
    path = os.path.commonprefix([name.split(".")[:-1] for name in inside])
    if not path or _any_in(after, path):
        return inside[-1]
    while not path[-1].isdigit() and path[1:] and not _any_in(before + after, path[:-1]):
        path = path[:-1]
    return ".".join(path)


def _any_in(names: Iterable[str], path: Sequence[str]) -> bool:
    """Whether any of the modules lies in the one with a path."""
    return any(_lies_in(name, ".".join(path)) for name in names)


def _with_own_modules(gm: fx.GraphModule, places: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of the places where no module with parameters is called both before and after."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    calls: dict[int, list[int]] = {}
    for node, i in order.items():
        module = called_module(gm, node)
        for parameter in () if module is None else module.parameters():
            calls.setdefault(id(parameter), []).append(i)
    spans = [(at[0], at[-1]) for at in calls.values() if len(at) > 1]
    return [p for p in places if not any(first <= order[p] < last for first, last in spans)]


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


def source_layer(gm: fx.GraphModule, node: str) -> str | None:
    """Name of a layer whose channels a node's value has, if one can be told."""
    source = _source(gm, _named(gm, node))
    return None if source is None else str(source.target)


def samples_first(gm: fx.GraphModule, node: str) -> Callable[[Tensor], Tensor]:
    """What turns a node's value into one row for each sample; parts of one become positions."""
    (axis, parts), channels = samples_of(_named(gm, node)), channel_axis(gm, node)

    def change(value: Tensor) -> Tensor:
        value = value.movedim(axis, 0)
        if parts > 1:
            value = value.unflatten(0, (-1, parts))
            if channels == 1:
                value = value.movedim(1, 2)
                value = value.flatten(2, 3) if value.ndim > 3 else value
        return value

    return change


def one_row_each(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """What turns a module's value into one row for each sample, from one sample, (1, ...)."""
    two, three = (module(x.expand(n, *x.shape[1:])).shape for n in (2, 3))
    axis, parts = samples_in(two, three) or ALONG_ROWS

    def change(value: Tensor) -> Tensor:
        value = value.movedim(axis, 0)
        return value if parts == 1 else value.unflatten(0, (-1, parts)).mean(1)

    return change


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


def _source_layer(gm: fx.GraphModule, node: fx.Node) -> Layer | None:
    """A layer whose channels a node's value has, if one can be told."""
    source = _source(gm, node)
    return None if source is None else called_layer(gm, source)


def _source(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The call of a layer whose channels a node's value has, if one can be told."""
    if called_layer(gm, node) is not None:
        return node
    if is_addition(node):
        sources = (_source(gm, n) for n in node.all_input_nodes)
        return next((s for s in sources if s is not None), None)
    if is_norm(gm, node) or is_activation(gm, node) or is_pool(gm, node) or is_identity(gm, node):
        return _source(gm, node.all_input_nodes[0])
    return None
