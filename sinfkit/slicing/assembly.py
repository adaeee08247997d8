"""Groups of channels of a traced network, from where its channels go."""

from __future__ import annotations

import numpy as np
from torch import Tensor, fx

from ..graph.nodes import called_module, is_layer, n_channels
from .channels import ChannelGroup, Member, is_depthwise
from .follow import Follower

__all__ = ["followed_groups"]


def followed_groups(gm: fx.GraphModule, example: Tensor) -> list[ChannelGroup]:
    """The groups of a traced network, in order of execution, not tried yet."""
    follower = Follower(gm, example)
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
        if roots & self.products:
            for name in names:
                if set(self.produced[name].tolist()) & self.products:
                    found.append(
                        member(name, "zero", self.produced[name], len(self.produced[name]))
                    )
        return [one for one in found if one is not None]
