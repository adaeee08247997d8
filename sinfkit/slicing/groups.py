"""Physical slicing of channels.

Removing a filter also removes its batch-norm entries, the inputs of every layer that reads it, and
the same channel of all that it is added to. `find_groups` says which channels can only leave
together, `slice_channels` builds the smaller network, and `check_sliced` proves it equal to the
masked one. All three work on a traced network, whose channels `Follower` has followed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor, fx, nn

from ..graph.cuts import passes_on
from ..graph.nodes import called_module, is_layer, n_channels
from ..graph.tracing import trace
from .channels import ChannelGroup, Member, Sliced, checked_indices, is_depthwise, take_out
from .follow import Follower
from .verify import check_sliced, try_groups

__all__ = [
    "ChannelGroup",
    "Sliced",
    "check_sliced",
    "find_groups",
    "slice_channels",
]


def find_groups(model: nn.Module, example: Tensor, output_layer: str) -> list[ChannelGroup]:
    """Find which channels of a network can only be removed together.

    Each executed layer (`Conv2d` or `Linear`) is in exactly one group. Groups that look fit for
    slicing are tried: half of their channels are removed and the result is compared with the masked
    network. So whatever does not follow a narrower layer (a width written out in a reshape,
    normalisation over channels, a channel shuffle) is found, and left whole.

    Parameters
    ----------
    model : nn.Module
        A `torch.fx.GraphModule`, best from `sinfkit.graph.trace`; any other module is traced. Its
        opaque submodules are left whole. It is not changed.
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
    graph = _traced(model, example)
    found = _followed_groups(graph, example)
    layers = [layer for group in found for layer in group.layers]
    if output_layer not in layers:
        raise ValueError(
            f"output_layer must be a layer that the model executes ({', '.join(layers)}); "
            f"got {output_layer!r}."
        )
    groups: list[ChannelGroup] = []
    whole = passes_on(graph.get_submodule(output_layer))
    for group in found:
        is_output = output_layer in group.layers
        if not is_output and (group.is_output or (whole and output_layer in group.consumers)):
            why = "its channels reach the network's output past the output layer"
            group = replace(group, reason_unsliceable=group.reason_unsliceable or why)
        groups.append(replace(group, is_output=is_output))
    able = [group for group in groups if not group.reason_unsliceable]
    reasons = {group.name: group.reason_unsliceable for group in groups}
    reasons |= try_groups(graph, able, example)
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
        The network: a `torch.fx.GraphModule`; any other module is traced. It is not changed.
    example : Tensor of shape (n, ...)
        An input that the network accepts, on its device. Not used where `groups` are given and the
        network is traced.
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
        The smaller network, a `torch.fx.GraphModule` in the mode of `model`, and what it kept.

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
    >>> sliced.model.get_submodule("3")
    Linear(in_features=108, out_features=2, bias=True)
    >>> sliced.support["3"]
    array([9, 1])
    """
    graph = _traced(model, example)
    if groups is None:
        groups = _followed_groups(graph, example)
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
    sliced = take_out(graph, layers, chosen)
    if graph is not model:
        sliced.model.train(model.training)
    return sliced


def _traced(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """A network as a graph."""
    if not isinstance(example, Tensor) or example.ndim < 2 or not example.is_floating_point():
        raise ValueError("example must be a floating-point tensor of shape (n, ...).")
    return model if isinstance(model, fx.GraphModule) else trace(model, example)


def _followed_groups(gm: fx.GraphModule, example: Tensor) -> list[ChannelGroup]:
    """The groups of a traced network, in order of execution, not tried yet."""
    follower = Follower(gm, example)
    follower.even_out()
    produced = {name: follower.roots(labels) for name, labels in follower.produced.items()}
    everything = _Everything(gm, follower, produced)
    found = [everything.group(names) for names in _connected(produced)]
    return found + _hidden(gm)


def _hidden(gm: fx.GraphModule) -> list[ChannelGroup]:
    """Layers inside of what cannot be looked into: each a group that stays whole."""
    found = {}
    for node in gm.graph.nodes:
        module = called_module(gm, node)
        if module is None or is_layer(module):
            continue
        why = f"it lies in {node.target!r}, which torch.fx cannot look into"
        for inner, layer in module.named_modules(prefix=str(node.target)):
            if is_layer(layer):
                n = n_channels(layer)
                found[inner] = ChannelGroup(inner, (inner,), n, reason_unsliceable=why)
    return list(found.values())


def _connected(produced: dict[str, np.ndarray]) -> list[list[str]]:
    """Layers that share channels, in order of execution."""
    sets: list[tuple[set[int], list[str]]] = []
    for name, roots in produced.items():
        labels, names = set(roots.tolist()), [name]
        apart = []
        for others, theirs in sets:
            if labels & others:
                labels, names = labels | others, theirs + names
            else:
                apart.append((others, theirs))
        sets = [*apart, (labels, names)]
    order = {name: i for i, name in enumerate(produced)}
    found = [sorted(names, key=order.__getitem__) for _, names in sets]
    return sorted(found, key=lambda names: order[names[0]])


class _Everything:
    """What a follower found, in terms of what is joined."""

    def __init__(
        self, gm: fx.GraphModule, follower: Follower, produced: dict[str, np.ndarray]
    ) -> None:
        self.modules = dict(gm.named_modules())
        self.produced = produced
        self.consumed = {n: follower.roots(labels) for n, labels in follower.consumed.items()}
        self.places = [(n, side, follower.roots(labels)) for n, side, labels in follower.places]
        self.pins = follower.pinned()
        roots = [follower.roots(labels) for labels in follower.products]
        self.products = set(np.concatenate(roots).tolist()) if roots else set()
        outputs = [follower.roots(labels) for labels in follower.outputs]
        self.outputs = set(np.concatenate(outputs).tolist()) if outputs else set()

    def group(self, names: list[str]) -> ChannelGroup:
        """The group of layers that share channels."""
        roots = set(np.concatenate([self.produced[n] for n in names]).tolist())
        full = [n for n in names if set(self.produced[n].tolist()) == roots]
        first = self.produced[(full or names)[0]]
        layers = [n for n in full or names[:1] if np.array_equal(self.produced[n], first)]
        n_channels = len(first)
        run = len(np.unique(first))
        reasons = [why for root, why in self.pins.items() if root in roots]
        if not full:
            reasons.append("its channels are joined from those of several layers")
        elif n_channels % run or not np.array_equal(first, np.tile(first[:run], n_channels // run)):
            reasons.append("its channels are taken apart in a way that is not sliced")
        elif run == 1 < n_channels:
            reasons.append("a grouped convolution needs every one of its channels")
        members = list(self._members(names, roots, first))
        consumers = [n for n, labels in self.consumed.items() if roots & set(labels.tolist())]
        order = {name: i for i, name in enumerate(self.produced)}
        return ChannelGroup(
            layers[0],
            tuple(layers),
            n_channels,
            n_channels // run if n_channels % run == 0 else 1,
            tuple(sorted(consumers, key=lambda n: order.get(n, -1))),
            tuple(n for n in names if n not in layers),
            bool(roots & self.outputs),
            reasons[0] if reasons else "",
            tuple(members),
        )

    def _members(self, names: list[str], roots: set[int], first: np.ndarray) -> list[Member]:
        """All the places where the channels are."""
        channel_of = {root: i for i, root in reversed(list(enumerate(first.tolist())))}

        def member(name: str, side: str, labels: np.ndarray, length: int = 0) -> Member | None:
            if np.array_equal(labels, first):
                index = channel = np.arange(len(first))
            else:
                index = np.array([i for i, a in enumerate(labels.tolist()) if a in channel_of])
                channel = np.array([channel_of[labels[i]] for i in index.tolist()])
            return Member(name, side, index, channel, length) if len(index) else None

        found = [member(n, "out", self.produced[n]) for n in names]
        for name, labels in self.consumed.items():
            if not is_depthwise(self.modules[name]):
                found.append(member(name, "in", labels))
        for name, side, labels in self.places:
            found.append(member(name, side, labels, 0 if side == "out" else len(labels)))
        if roots & self.products:  # zero before a batch-norm is something else behind it
            norms = ((name, labels) for name, side, labels in self.places if side == "out")
            for name, labels in (*((n, self.produced[n]) for n in names), *norms):
                if set(labels.tolist()) & self.products:
                    found.append(member(name, "zero", labels, len(labels)))
        return [one for one in found if one is not None]
