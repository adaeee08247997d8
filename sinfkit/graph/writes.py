"""Which writes into tensors a graph without them would lose, whatever the samples are.

``x[:, :2].clamp_(max=6)`` changes `x` as well, which is read later: an operation that overwrites
nothing cannot take its place. Samples do not show it where they stay below 6, but memory does:
while a network is recorded, each tensor is known by the elements of its memory that it shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .nodes import ancestors, is_shape_query

__all__ = ["Writes", "version"]


@dataclass(frozen=True)
class _Place:
    """Some elements of one piece of memory."""

    memory: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """Behind the last element."""
        steps = zip(self.size, self.stride, strict=True)
        return self.start + sum((n - 1) * step for n, step in steps) + 1

    def overlaps(self, other: _Place) -> bool:
        """Whether an element belongs to both."""
        if self == other:
            return True
        taken = torch.zeros(max(self.end, other.end), dtype=torch.bool)
        taken.as_strided(self.size, self.stride, self.start).fill_(True)
        return bool(taken.as_strided(other.size, other.stride, other.start).any())


@dataclass
class Writes:
    """What shares memory with what, and who writes, by the nodes of a graph that is recorded."""

    _places: dict[fx.Node, list[_Place]] = field(default_factory=dict)
    _written: list[tuple[fx.Node, _Place, tuple[str, ...]]] = field(default_factory=list)
    _pieces: int = 0

    def note(
        self,
        node: fx.Node,
        value: Any,
        inputs: list[tuple[fx.Node, Any]],
        versions: list[list[int]],
        stack: tuple[str, ...],
    ) -> None:
        """Take down a node: its value, the nodes it reads with theirs, and who calls it.

        `versions` are those of the tensors in each input, before the node was computed.
        """
        known: dict[int, int] = {}
        for source, held in inputs:
            for tensor, place in zip(tensors_in(held), self._places.get(source, ()), strict=False):
                known[_memory(tensor)] = place.memory
        self._places[node] = []
        for tensor in tensors_in(value):
            memory = known.get(_memory(tensor))
            if memory is None:
                memory = self._pieces = self._pieces + 1
            start = int(tensor.storage_offset())
            place = _Place(memory, tuple(tensor.shape), tensor.stride(), start)
            self._places[node].append(place)
        for (source, held), before in zip(inputs, versions, strict=True):
            places = self._places.get(source, [])
            for tensor, place, old in zip(tensors_in(held), places, before, strict=False):
                if version(tensor) != old and tensor.numel():
                    self._written.append((node, place, stack))

    def lost(self, graph: fx.Graph) -> list[tuple[str, ...]]:
        """Who makes writes that are lost in a graph, whose in-place operations were replaced.

        What still writes, into memory that nobody reads later, gets a copy of its own.
        """
        order = {node: i for i, node in enumerate(graph.nodes)}
        output = graph.find_nodes(op="output")[0]
        live = {output} | ancestors(output)
        found = []
        for writer, place, stack in self._written:
            if writer not in order:
                continue
            stale = any(
                reader in live and order[reader] > order[writer]
                for node in self._readable(order, place, writer)
                for reader in node.users
                if not self._only_views(reader, place.memory)
            )
            stays = writer in live and not writer.meta.get("out_of_place")
            if stale and not stays:
                found.append(stack)
            elif stays:
                self._protect(graph, writer, place, stale=stale)
        return found

    def _readable(
        self, order: dict[fx.Node, int], written: _Place, writer: fx.Node
    ) -> Iterator[fx.Node]:
        """Nodes that show an element that was written, but not what was written there."""
        new = {writer}
        for node in order:
            shared = [p for p in self._places.get(node, ()) if p.memory == written.memory]
            if not shared or node is writer:
                continue
            if any(source in new for source in node.all_input_nodes):
                new.add(node)
            elif any(p.overlaps(written) for p in shared):
                yield node

    def _only_views(self, reader: fx.Node, memory: int) -> bool:
        """Whether a reader reads no values, or shows the same memory itself."""
        if is_shape_query(reader):
            return True
        writes = any(reader is writer for writer, _, _ in self._written)
        return not writes and any(p.memory == memory for p in self._places.get(reader, ()))

    def _protect(self, graph: fx.Graph, writer: fx.Node, place: _Place, *, stale: bool) -> None:
        """Let a node that writes do so into a copy; of the samples, where others read it too."""
        sources = [graph.find_nodes(op="placeholder")[0]] if stale else writer.all_input_nodes
        for source in sources:
            if not any(p.memory == place.memory for p in self._places.get(source, ())):
                continue
            readers = list(source.users) if stale else [writer]
            with graph.inserting_after(source):
                copied = graph.call_method("clone", (source,))
            for reader in readers:
                reader.replace_input_with(source, copied)


def version(tensor: Tensor) -> int:
    """A number that a write into a tensor changes."""
    return 0 if tensor.is_inference() else tensor._version


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in a value of a node."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
