"""Where a network can be observed, and where it can be cut in two.

Everything here reads or builds ``torch.fx`` graphs; nothing computes with data.  Layers keep the
qualified names that they have in the user's model.
"""

from __future__ import annotations

import operator
import os.path
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from ._ops import (
    called_module,
    is_activation,
    is_addition,
    is_arithmetic,
    is_batch_size,
    is_identity,
    is_layer,
    is_norm,
    is_pool,
    is_shape_query,
    is_station,
    n_channels,
    unpacks,
)
from ._tracing import copy_sharing_weights, opaque_modules, trace

__all__ = [
    "CutPoint",
    "channel_axis",
    "copy_sharing_weights",
    "cut_points",
    "find_cut",
    "layer_names",
    "observation_nodes",
    "opaque_modules",
    "output_layer",
    "split",
    "trace",
    "with_capture",
]


@dataclass(frozen=True)
class CutPoint:
    """A place where a network can be cut in two, because just one tensor is live.

    Attributes
    ----------
    name : str
        Qualified name of the layer before the cut or, where several branches join, of the module
        that ends there.  No two cuts of a network have the same.
    node : str
        Name of the graph node whose value crosses the cut.
    """

    name: str
    node: str


def layer_names(gm: fx.GraphModule) -> list[str]:
    """Names of a network's layers.

    Parameters
    ----------
    gm : GraphModule
        From `trace`.

    Returns
    -------
    list of str
        Every ``Conv2d`` and ``Linear`` in the order of first execution, which need not be the one
        of definition.  Layers inside opaque modules are missing.

    Examples
    --------
    >>> from torch import nn
    >>> layer_names(trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))))
    ['0', '2']
    """
    return list(dict.fromkeys(str(n.target) for n in gm.graph.nodes if _layer(gm, n) is not None))


def output_layer(gm: fx.GraphModule, n_outputs: int) -> str:
    """Name of the layer that computes a network's outputs.

    Parameters
    ----------
    gm : GraphModule
        From `trace`.
    n_outputs : int
        Width of the network's output, one per class.

    Returns
    -------
    str
        The last layer: a ``Linear`` or a 1 x 1 convolution with `n_outputs` output channels.

    Raises
    ------
    ValueError
        If the last layer is none such.

    Examples
    --------
    >>> from torch import nn
    >>> output_layer(trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))), 2)
    '2'
    """
    stations = [n for n in gm.graph.nodes if is_station(gm, n)]
    if not stations:
        raise ValueError("The network has no Conv2d or Linear layer, so no outputs to choose from.")
    name = str(stations[-1].target)
    layer = _layer(gm, stations[-1])
    whole = f"The network must end in a Linear or 1 x 1 Conv2d layer with {n_outputs} outputs"
    if layer is None:
        raise ValueError(
            f"{whole}, but it ends in {name!r}, which torch.fx cannot look into. Move the last "
            "layer out of it."
        )
    pointwise = isinstance(layer, nn.Linear) or (layer.kernel_size == (1, 1) and layer.groups == 1)
    if not pointwise or n_channels(layer) != n_outputs:
        raise ValueError(f"{whole}, but its last layer, {name!r}, is {layer}.")
    return name


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
    >>> gm = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    >>> cut_points(gm)
    [CutPoint(name='0', node='_1')]
    """
    nodes = list(gm.graph.nodes)
    free = _recomputable(gm.graph)
    stations = [n for n in nodes if is_station(gm, n)]
    segments: dict[int, list[fx.Node]] = {}
    n_before = 0
    single = set(_single_live(nodes, free))
    for node in nodes:
        n_before += node in stations
        if node in single and 0 < n_before < len(stations):
            segments.setdefault(n_before, []).append(node)

    cuts: dict[str, CutPoint] = {}
    previous = 0
    for n_before, candidates in segments.items():
        first = candidates[0]
        place = _moved_on(gm, candidates, nodes)
        if first is stations[n_before - 1]:
            name = str(first.target)
        else:
            name = _joined_name(stations, previous, n_before)
        previous = n_before
        if name not in cuts and not _shares_parameters(gm, nodes, place):
            cuts[name] = CutPoint(name, place.name)
    return list(cuts.values())


def find_cut(gm: fx.GraphModule, name: str) -> CutPoint:
    """The cut with a given name, or the one that closes a given layer or module.

    Parameters
    ----------
    gm : GraphModule
        From `trace`.
    name : str
        Name of a cut, or qualified name of a layer or of a module with layers: then the first cut
        that leaves all of it before the cut.

    Returns
    -------
    CutPoint

    Raises
    ------
    ValueError
        If there is no such cut; the message lists those there are.

    Examples
    --------
    >>> from torch import nn
    >>> body = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    >>> find_cut(trace(nn.Sequential(body, nn.Linear(3, 2))), "0").name
    '0.2'
    """
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
        each has only those that it runs, and the names of submodules and nodes are the same.

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
    >>> gm = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    >>> prefix, rest = split(gm, find_cut(gm, "0"))
    >>> layer_names(prefix), layer_names(rest)
    (['0'], ['2'])
    """
    nodes = list(gm.graph.nodes)
    place = next((n for n in nodes if n.name == cut.node), None)
    free = _recomputable(gm.graph)
    if place is None or place not in _single_live(nodes, free):
        raise ValueError(f"{cut} is not a place where this network can be cut.")
    at = nodes.index(place)

    front = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in nodes[: at + 1]:
        env[node] = front.node_copy(node, env.__getitem__)
    front.output(env[place])

    back = fx.Graph()
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


def observation_nodes(gm: fx.GraphModule, layers: Iterable[str]) -> dict[str, str]:
    """Where the activations of layers are to be observed.

    Parameters
    ----------
    gm : GraphModule
        From `trace`, or a half from `split`.
    layers : iterable of str
        Names of layers, as in `layer_names`.

    Returns
    -------
    dict of str to str
        From the name of a layer to that of the node whose value is its activation: after norm and
        activation function and, where the layer ends the branch of a residual block, after the
        addition and its norm and activation function; before pooling, flattening and
        concatenation.  Layers that are added up share one node.  The value has as many channels
        as the layer, along `channel_axis`.

    Raises
    ------
    ValueError
        If a name is no layer of the network.

    Notes
    -----
    A layer that is called several times is observed at its first call.

    Examples
    --------
    >>> from torch import nn
    >>> gm = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    >>> observation_nodes(gm, ["0", "2"])
    {'0': '_1', '2': '_2'}
    """
    calls: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if _layer(gm, node) is not None:
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
    """Axis of a node's value that holds the channels.

    Parameters
    ----------
    gm : GraphModule
        From `trace`, or a half from `split`.
    node : str
        Name of a node.

    Returns
    -------
    int
        -1 where the channels come from a ``Linear`` layer, which maps the last axis whatever the
        rank; otherwise 1.

    Examples
    --------
    >>> from torch import nn
    >>> gm = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    >>> channel_axis(gm, "_1")
    -1
    """
    return -1 if isinstance(_source_layer(gm, _named(gm, node)), nn.Linear) else 1


def with_capture(
    gm: fx.GraphModule, nodes: Mapping[str, str], fn: Callable[[str, Tensor], None]
) -> fx.GraphModule:
    """A network that shows values to a function while it computes.

    Parameters
    ----------
    gm : GraphModule
        From `trace`, or a half from `split`.
    nodes : mapping of str to str
        From a key of the caller's choice to the name of a node.
    fn : callable
        Called as ``fn(key, value)`` right after the node is computed.  The network keeps a value
        no longer than it would without the call.

    Returns
    -------
    GraphModule
        Computes what `gm` does and shares its submodules.  Meant to be used at once: it holds
        `fn`, so it can be pickled only if `fn` can.

    Raises
    ------
    ValueError
        If the network has no such node.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> gm = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    >>> shapes = {}
    >>> watched = with_capture(gm, {"hidden": "_1"}, lambda k, v: shapes.update({k: v.shape}))
    >>> watched(torch.zeros(5, 4)).shape, shapes
    (torch.Size([5, 2]), {'hidden': torch.Size([5, 3])})
    """
    keys: dict[fx.Node, list[str]] = {}
    for key, name in nodes.items():
        keys.setdefault(_named(gm, name), []).append(key)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    captures: list[_Capture] = []
    for node in gm.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        for key in keys.get(node, ()):
            graph.call_module(f"{_CAPTURES}.{len(captures)}", (env[node],))
            captures.append(_Capture(key, fn))
    root = nn.Module()
    root.__dict__.update(gm.__dict__)
    root._modules = {**gm._modules, _CAPTURES: nn.ModuleList(captures)}
    return fx.GraphModule(root, graph, class_name=type(gm).__name__).eval()


_CAPTURES = "_sinfkit_captures"


class _Capture(nn.Module):
    """Shows its input to a function."""

    def __init__(self, key: str, fn: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.key, self.fn = key, fn

    def forward(self, value: Tensor) -> None:
        """Call the function; return nothing, so that nothing is kept."""
        self.fn(self.key, value)


def _layer(gm: fx.GraphModule, node: fx.Node) -> nn.Conv2d | nn.Linear | None:
    """The layer that a node calls, if it calls one."""
    module = called_module(gm, node)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and is_layer(module):
        return module
    return None


def _named(gm: fx.GraphModule, name: str) -> fx.Node:
    """The node with a name."""
    for node in gm.graph.nodes:
        if node.name == name:
            return node
    raise ValueError(f"The graph has no node {name!r}.")


def _finished(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module for part of a graph, with only the submodules that it runs."""
    part = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    part.graph.eliminate_dead_code()
    part.delete_all_unused_submodules()
    part.recompile()
    return part.eval()


def _lies_in(target: object, path: str) -> bool:
    """Whether a qualified name is a path or lies under it."""
    return target == path or str(target).startswith(path + ".")


def _recomputable(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that need not cross a cut: parameters, batch size, and what follows from them."""
    free: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        derived = node.op in ("call_function", "call_method") and sources
        if node.op == "get_attr" or is_batch_size(node) or (derived and free.issuperset(sources)):
            free.add(node)
    for node in reversed(graph.nodes):  # the input's shape, if only the number of samples is read
        if is_shape_query(node) and free.issuperset(node.users):
            free.add(node)
    return free


def _single_live(nodes: Sequence[fx.Node], free: set[fx.Node]) -> list[fx.Node]:
    """Nodes after which their own value, a tensor, is all that the rest of the graph needs."""
    order = {node: i for i, node in enumerate(nodes)}
    last_use = {n: max((order[u] for u in n.users if u not in free), default=-1) for n in nodes}
    live: set[fx.Node] = set()
    found = []
    for i, node in enumerate(nodes):
        if node not in free and last_use[node] > i:
            live.add(node)
        live = {n for n in live if last_use[n] > i}
        if live == {node} and not any(unpacks(user) for user in node.users):
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


def _shares_parameters(gm: fx.GraphModule, nodes: Sequence[fx.Node], place: fx.Node) -> bool:
    """Whether parameters are used on both sides of a cut."""
    at = nodes.index(place)
    sides = []
    for side in (nodes[: at + 1], nodes[at + 1 :]):
        modules = (called_module(gm, n) for n in side)
        used = {id(p) for m in modules if m is not None for p in m.parameters()}
        used |= {id(operator.attrgetter(str(n.target))(gm)) for n in side if n.op == "get_attr"}
        sides.append(used)
    return bool(sides[0] & sides[1])


def _readers(node: fx.Node) -> list[fx.Node]:
    """Nodes that use a node's values, not only its shape."""
    return [user for user in node.users if not is_shape_query(user)]


def _activation_of(gm: fx.GraphModule, layer: fx.Node) -> fx.Node:
    """The node whose value is the activation of a layer that another node calls."""
    place = ahead = layer
    while True:
        readers = _readers(ahead)
        if len(readers) != 1 or readers[0].all_input_nodes.count(ahead) != 1:
            return place
        before, ahead = ahead, readers[0]
        if is_identity(gm, ahead):  # looked through, never stopped at
            continue
        if is_addition(ahead):
            other = next(a for a in ahead.all_input_nodes if a is not before)
            source, own = _source_layer(gm, other), _layer(gm, layer)
            assert own is not None
            if source is not None and n_channels(source) != n_channels(own):
                return place  # broadcast
        elif not (is_norm(gm, ahead) or is_activation(gm, ahead)):
            return place
        place = ahead


def _source_layer(gm: fx.GraphModule, node: fx.Node) -> nn.Conv2d | nn.Linear | None:
    """A layer whose channels a node's value has, if one can be told."""
    layer = _layer(gm, node)
    if layer is not None:
        return layer
    if is_addition(node):
        sources = (_source_layer(gm, n) for n in node.all_input_nodes)
        return next((s for s in sources if s is not None), None)
    if is_norm(gm, node) or is_activation(gm, node) or is_pool(gm, node) or is_identity(gm, node):
        return _source_layer(gm, node.all_input_nodes[0])
    return None
