"""Physical slicing of channels.

Removing a filter also removes its batch-norm entries, the inputs of every layer that reads it, and
the same channel of all that it is added to. `find_groups` says which channels can only leave
together, `slice_channels` builds the smaller network, and `check_sliced` proves it equal to the
masked one.

Channels of a traced network, which is all that the estimators slice, are followed by `Follower`.
Those of any other module are followed through torch-pruning's dependency graph, and this is the
only file that knows it. torch-pruning supplies the graph: its nodes, what each triggers in which
other, and how channels are renumbered on the way. Following a group through it, and slicing, are
done here. Its own ``get_pruning_group`` need not end where reshapes form a loop; its ``prune``
works in place, one group after the other, so that later groups are mapped through sizes that no
longer hold, takes wrong inputs of grouped convolutions, and thaws frozen weights.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..graph.nodes import is_layer
from .assembly import followed_groups
from .channels import (
    NARROWABLE,
    ChannelGroup,
    Member,
    Sliced,
    assemble,
    checked_indices,
    is_depthwise,
    take_out,
    width,
)
from .verify import check_sliced, try_groups

if TYPE_CHECKING:
    import torch_pruning as tp

__all__ = [
    "ChannelGroup",
    "Sliced",
    "check_sliced",
    "find_groups",
    "slice_channels",
]

# Without parameters torch-pruning would pass by them, and they mix so weakly that a trial might.
_MIXERS = (nn.LocalResponseNorm, nn.CrossMapLRN2d)


def find_groups(model: nn.Module, example: Tensor, output_layer: str) -> list[ChannelGroup]:
    """Find which channels of a network can only be removed together.

    Each executed layer (`Conv2d` or `Linear`) is in exactly one group. Groups that look fit for
    slicing are tried: half of their channels are removed and the result is compared with the masked
    network. So whatever does not follow a narrower layer (a width written out in a reshape,
    normalisation over channels, a channel shuffle) is found, and left whole.

    Parameters
    ----------
    model : nn.Module
        Any module that maps one tensor to one tensor, also a `torch.fx.GraphModule`, whose opaque
        submodules are then left whole. It is not changed.
    example : Tensor of shape (n, ...)
        An input that the network accepts, on its device. One row is used.
    output_layer : str
        Qualified name of the layer whose channels are the network's outputs.

    Returns
    -------
    list of ChannelGroup
        In the order in which the network executes the first layer of each.

    Raises
    ------
    ValueError
        If `output_layer` is not an executed layer; if the network fails on `example`, or gives
        anything but one tensor of finite values.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from sinfkit.slicing import find_groups
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> for group in find_groups(net, torch.zeros(1, 3, 8, 8), "3"):
    ...     print(group.name, group.n_channels, group.consumers, group.is_output)
    0 8 ('3',) False
    3 10 () True
    """
    if isinstance(model, fx.GraphModule):
        found = followed_groups(model, example)
    else:
        trace = _trace(model, example)
        found = []
        covered: set[str] = set()
        for layer in trace.layers:
            if layer not in covered:
                found.append(_read_group(trace, layer))
                covered.update(found[-1].layers)
    layers = [layer for group in found for layer in group.layers]
    if output_layer not in layers:
        raise ValueError(
            f"output_layer must be a layer that the model executes ({', '.join(layers)}); "
            f"got {output_layer!r}."
        )
    groups: list[ChannelGroup] = []
    for group in found:
        is_output = output_layer in group.layers
        if group.is_output and not is_output:
            why = "its channels reach the network's output past the output layer"
            group = replace(group, reason_unsliceable=group.reason_unsliceable or why)
        groups.append(replace(group, is_output=is_output))
    able = [group for group in groups if not group.reason_unsliceable]
    reasons = {group.name: group.reason_unsliceable for group in groups}
    reasons |= try_groups(model, able, example)
    return [replace(group, reason_unsliceable=reasons[group.name]) for group in groups]


def slice_channels(
    model: nn.Module,
    example: Tensor,
    keep: Mapping[str, Sequence[int] | np.ndarray],
    *,
    groups: Sequence[ChannelGroup] | None = None,
) -> Sliced:
    """Build a network that holds only the channels to be kept.

    Parameters
    ----------
    model : nn.Module
        The network. It is not changed.
    example : Tensor of shape (n, ...)
        An input that the network accepts, on its device. Not used where `groups` are given.
    keep : mapping of str to array-like of int
        Group name -> kept ORIGINAL channels. Groups that are not named keep all of theirs. The
        network's outputs come out in the order given, all other channels sorted.
    groups : sequence of ChannelGroup, default=None
        What `find_groups` gave for this network. It saves tracing the network again, where many
        subgraphs are cut from one, and tells what must stay whole; without it only part of that is
        known beforehand, and `check_sliced` tells the rest.

    Returns
    -------
    Sliced
        The smaller network, in the mode of `model`, and what it kept.

    Raises
    ------
    ValueError
        If a group does not exist or must stay whole; if its indices are empty, repeated, out of
        range, or leave the runs of a grouped convolution unequal.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from sinfkit.slicing import slice_channels
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> sliced = slice_channels(net, torch.zeros(1, 3, 8, 8), {"0": [0, 2, 5], "3": [9, 1]})
    >>> sliced.model[0].out_channels, sliced.model[3].in_features
    (3, 108)
    >>> sliced.support["3"]
    array([9, 1])
    """
    if groups is None and isinstance(model, fx.GraphModule):
        groups = followed_groups(model, example)
    if groups is None:
        trace = _trace(model, example)
        layers = trace.layers
        found = {name: _read_group(trace, name) for name in keep if name in layers}
    else:
        layers = [n for group in groups for n in (*group.layers, *group.carried)]
        found = {layer: group for group in groups for layer in group.layers}
    chosen: list[tuple[ChannelGroup, np.ndarray]] = []
    for name, indices in keep.items():
        if name not in found:
            raise ValueError(
                f"keep names {name!r}, which is not a layer that the model executes: "
                f"{', '.join(layers)}."
            )
        group = found[name]
        if group.name != name:
            raise ValueError(
                f"keep names {name!r}, whose channels belong to the group {group.name!r}; name "
                "that one."
            )
        kept = checked_indices(group, indices)
        if not np.array_equal(kept, np.arange(group.n_channels)):
            chosen.append((group, kept))
    return take_out(model, layers, chosen)


class _Place(NamedTuple):
    """A position in a module, and the channel of a group that it holds (torch-pruning's names)."""

    idx: int
    root_idx: int


@dataclass(frozen=True, eq=False)
class _Trace:
    """What one forward pass of a private copy of the network showed."""

    graph: tp.DependencyGraph | None
    failure: str  # why there is no graph
    modules: dict[str, nn.Module]  # of the copy
    names: dict[Any, str]  # of its modules, its parameters and its input
    calls: dict[str, int]  # narrowable module -> how often it was executed, in order
    opaque: dict[str, str]  # narrowable module inside an opaque leaf of a GraphModule -> that leaf

    @property
    def layers(self) -> list[str]:
        """Layers in order of first execution."""
        return [name for name in self.calls if is_layer(self.modules[name])]

    @property
    def widest(self) -> int:
        """Largest number of channels on any side of a layer or batch-norm."""
        sides = ("in", "out")
        return max((width(self.modules[n], s) for n in self.calls for s in sides), default=0)


def _trace(model: nn.Module, example: Tensor) -> _Trace:
    """Run a copy of the network under autograd, from which torch-pruning reads the graph."""
    if not isinstance(example, Tensor) or example.ndim < 2 or not example.is_floating_point():
        raise ValueError("example must be a floating-point tensor of shape (n, ...).")
    # Two rows: a forward pass may squeeze a single one away.
    shape = (2, *example.shape[1:])
    with torch.inference_mode(False), torch.enable_grad():
        try:  # Without data, in a moment whatever the size of the images.
            return _trace_at(model, torch.empty(shape, dtype=example.dtype, device="meta"))
        except Exception:  # It looks at values, or makes tensors of its own.
            try:
                return _trace_at(model, example.detach()[:1].expand(shape).clone())
            except Exception as error:
                raise ValueError(f"The model fails on the example input: {error}") from error


def _trace_at(model: nn.Module, example: Tensor) -> _Trace:
    """Trace on the device of the example."""
    # Only here: where timm is installed, torch-pruning imports it, and that takes seconds.
    import torch_pruning as tp

    def private(tensor: Tensor) -> Tensor:
        # Autograd passes by frozen weights, so each gets a stand-in that is not.
        new = tensor.detach().to(example.device)
        learned = isinstance(tensor, nn.Parameter) and new.is_floating_point()
        return nn.Parameter(new) if learned else new

    tensors = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): private(tensor) for tensor in tensors})
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.PReLU) and child.num_parameters == 1:
                # It takes the single slope for an operand, and infers the width from that.
                setattr(module, name, nn.LeakyReLU())
    # torch-pruning does not know the input; as a parameter, it becomes a node of the graph.
    entry = nn.Parameter(example)
    modules = dict(twin.named_modules())
    names: dict[Any, str] = {module: name for name, module in modules.items()}
    names |= {parameter: f"the parameter {name!r}" for name, parameter in twin.named_parameters()}
    names[entry] = "the network's input"
    calls: dict[str, int] = {}

    def count(module: nn.Module, args: Any) -> None:
        calls[names[module]] = calls.get(names[module], 0) + 1

    for module in modules.values():
        if isinstance(module, NARROWABLE):
            module.register_forward_pre_hook(count)

    ran = False

    def forward(twin: nn.Module, x: Tensor) -> Tensor:
        nonlocal ran
        output = twin(x.clone())  # a leaf could not be overwritten in place
        if not isinstance(output, Tensor):
            raise TypeError(f"it must return one tensor, not {type(output).__name__}")
        ran = True
        return output

    graph, failure = tp.DependencyGraph(), ""
    try:
        with warnings.catch_warnings():
            # What torch-pruning does not understand shows in the trials; what the forward pass
            # has to say, it says whenever it runs.
            warnings.simplefilter("ignore")
            graph.build_dependency(
                twin,
                entry,
                forward_fn=forward,
                unwrapped_parameters=[(entry, 1)],
                customized_pruners={kind: tp.ops.DummyPruner() for kind in _MIXERS},
                verbose=False,
            )
    except Exception as error:
        if not ran:
            raise
        graph, failure = None, f"torch-pruning cannot follow the network's channels ({error})"
    opaque = {}
    if isinstance(model, fx.GraphModule):
        leaves = {str(node.target) for node in model.graph.nodes if node.op == "call_module"}
        for name in calls.keys() - leaves:
            opaque[name] = next((leaf for leaf in leaves if name.startswith(leaf + ".")), name)
    return _Trace(graph, failure, modules, names, calls, opaque)


def _read_group(trace: _Trace, layer: str) -> ChannelGroup:
    """Read the group of a layer's outputs; ``is_output`` tells whether it reaches the output."""
    root = trace.modules[layer]
    alone = ChannelGroup(layer, (layer,), width(root, "out"))
    if trace.graph is None:
        return replace(alone, reason_unsliceable=trace.failure)
    if root not in trace.graph.module2node:
        return replace(
            alone, reason_unsliceable="no gradient comes back to it from the network's output"
        )
    places, broken_off = _follow(trace.graph, root, trace.widest)
    obstacles: list[str] = []
    members: list[Member] = []
    is_output = False
    for (node, handler), pairs in places.items():
        obstacles.append(_obstacle(trace, node))
        side = "in" if handler.__name__ == "prune_in_channels" else "out"
        is_output |= node.type.name == "OUTPUT" or (side == "out" and not node.outputs)
        name = trace.names.get(node.module, "")
        if name in trace.calls:
            index, channel = np.array(sorted(pairs), dtype=np.int64).T
            members.append(Member(name, side, index, channel))
    if broken_off:
        obstacles.append("its channels are reshaped in a way that torch-pruning cannot follow")
    alone = replace(alone, is_output=is_output)
    executed = {name: trace.modules[name] for name in trace.calls}
    return assemble(alone, members, executed, [why for why in obstacles if why])


def _follow(
    graph: tp.DependencyGraph, root: nn.Module, widest: int
) -> tuple[dict[tuple[Any, Any], set[_Place]], bool]:
    """Follow a layer's outputs to all the places they reach, by node and pruning function.

    Also tells whether that was broken off: more channels in a node than any layer has.
    """
    places: dict[tuple[Any, Any], set[_Place]] = {}
    handler = graph.get_pruner_of_module(root).prune_out_channels
    start = {_Place(i, i) for i in range(width(root, "out"))}
    todo: list[tuple[Any, Any, set[_Place]]] = [(graph.module2node[root], handler, start)]
    while todo:
        node, handler, found = todo.pop()
        seen = places.setdefault((node, handler), set())
        fresh = found - seen
        seen |= fresh
        if len(seen) > widest:
            return places, True
        for dependency in node.dependencies if fresh else ():
            if dependency.is_triggered_by(handler):
                mapped: Any = fresh
                for mapping in dependency.index_mapping:
                    mapped = mapping(mapped) if mapping is not None else mapped
                if mapped:
                    todo.append((dependency.target, dependency.handler, set(mapped)))
    return places, False


def _takes_all(part: Any) -> bool:
    """Whether a slice is a plain colon, which older versions of torch record as well."""
    return bool(part.start == 0 and part.step == 1 and part.end >= 2**62)


def _obstacle(trace: _Trace, node: Any) -> str:
    """Say why channels that run through a node of the dependency graph cannot be sliced."""
    module, name = node.module, trace.names.get(node.module, "")
    if node.type.name == "PARAMETER":
        return f"its channels are tied to {name}"
    if node.type.name in ("SPLIT", "UNBIND"):
        return "the forward pass splits its channels"
    if node.type.name == "SLICE" and module.dim not in (2, 3) and not _takes_all(module):
        return "the forward pass takes a part of its channels"
    if module not in trace.names:
        return ""
    if name in trace.opaque:
        return f"its channels run through {trace.opaque[name]!r}, which torch.fx cannot look into"
    what = f"its channels run through the {type(module).__name__} {name!r}"
    if not isinstance(module, NARROWABLE):
        return f"{what}, which is not sliced"
    if "weight" not in module._parameters or (
        isinstance(module, (nn.Conv2d, nn.Linear)) and not is_layer(module)
    ):
        return f"{what}, whose weight is computed from others"
    if trace.calls[name] > 1:
        return f"{what}, which is executed {trace.calls[name]} times"
    if isinstance(module, nn.Conv2d) and 1 < module.groups == module.out_channels:
        if not is_depthwise(module):
            return f"{what}, which has one group for each output"
    return ""
