"""Two networks with the same graph, computed side by side, one node at a time.

All images pass a node before any passes the next, so that a layer can be changed between seeing
its inputs and computing its output, and no input is computed twice. Values are kept in chunks and
dropped chunk by chunk after their last use: little more than one layer's input or output is held
per network. Where both networks compute the same, it is computed and held once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ._ops import called_module, is_layer

Side = Literal["dense", "sliced"]


@dataclass
class _Value:
    """A node's value in both networks, in chunks; one and the same list where they agree."""

    dense: list[Any] = field(default_factory=list)
    sliced: list[Any] = field(default_factory=list)


class Lockstep:
    """A walk over two networks that have the same graph.

    Each node of `nodes` is to be passed in order: by `run`, or by `advance` for the dense network
    and then for the sliced one.

    Parameters
    ----------
    dense, sliced : GraphModule
        From `trace`, with the same nodes; only weights and widths differ.
    X, X_sliced : Tensor of shape (n_images, ...)
        Their inputs; the same object if they do not differ.
    batch_size : int
        Images per chunk.

    Attributes
    ----------
    sliced : GraphModule
    nodes : list of fx.Node
        Nodes of the sliced network, without its output.
    images : list of slice
        The images of each chunk.

    Raises
    ------
    ValueError
        If the graphs have different nodes, several inputs, or modules in training mode.
    """

    def __init__(
        self,
        dense: fx.GraphModule,
        sliced: fx.GraphModule,
        X: Tensor,
        X_sliced: Tensor,
        batch_size: int,
    ) -> None:
        self.sliced = sliced
        self._networks = {"dense": dense, "sliced": sliced}
        self._interpreters = {side: fx.Interpreter(gm) for side, gm in self._networks.items()}
        self._twins = twins(dense, sliced)
        self.nodes = [node for node in sliced.graph.nodes if node.op != "output"]
        self.images = [slice(i, i + batch_size) for i in range(0, len(X), batch_size)]
        self._inputs = _Value([X[part] for part in self.images])
        self._inputs.sliced = (
            self._inputs.dense if X_sliced is X else [X_sliced[part] for part in self.images]
        )
        self._values: dict[fx.Node, _Value] = {}
        self._calls = Counter(node.target for node in self.nodes if node.op == "call_module")
        last_use = {source: node for node in self.nodes for source in node.all_input_nodes}
        self._finished_by: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for source, node in last_use.items():
            self._finished_by[node].append(source)

    def layer(self, node: fx.Node) -> nn.Conv2d | nn.Linear | None:
        """The sliced network's layer that a node calls, if it calls one."""
        module = called_module(self.sliced, node)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and is_layer(module):
            return module
        return None

    def module(self, node: fx.Node, side: Side) -> nn.Module | None:
        """The module that a node (of the sliced network) calls, in one of the networks."""
        return called_module(self._networks[side], self._own(node, side))

    def called_once(self, node: fx.Node) -> bool:
        """Whether no other node calls the module that a node calls."""
        return self._calls[node.target] == 1

    def agree(self, node: fx.Node) -> bool:
        """Whether both networks are known to have the same value at a node."""
        value = self._values[node]
        return value.dense is value.sliced

    def inputs_agree(self, node: fx.Node) -> bool:
        """Whether both networks are known to have the same inputs at a node."""
        return all(self.agree(source) for source in node.all_input_nodes)

    def known(self, node: fx.Node) -> bool:
        """Whether a node's value has been computed and is still held."""
        return node in self._values

    def value(self, node: fx.Node, side: Side, chunk: int) -> Any:
        """One chunk of a value that is held."""
        return getattr(self._values[node], side)[chunk]

    def run(self, node: fx.Node) -> None:
        """Compute a node in both networks."""
        if node.op == "placeholder":
            self._values[node] = self._inputs
        elif self.inputs_agree(node) and self._same_operation(node):
            for _ in self.advance(node, "sliced"):
                pass
            self._values[node].dense = self._values[node].sliced
        else:
            for _ in zip(self.advance(node, "dense"), self.advance(node, "sliced"), strict=True):
                pass

    def advance(self, node: fx.Node, side: Side) -> Iterator[tuple[int, Any]]:
        """Compute a node in one network.

        Inputs that are not used again are dropped chunk by chunk, those of `side` only.

        Yields
        ------
        chunk : int
            Which of `images`.
        value : Tensor or any other
            What the node computed for them.
        """
        chunks = getattr(self._values.setdefault(node, _Value()), side)
        own = self._own(node, side)
        compute = getattr(self._interpreters[side], own.op)
        finished = [
            source
            for source in self._finished_by[node]
            if side == "sliced" or not self.agree(source)  # else the sliced network needs it, too
        ]
        for i in range(len(self.images)):
            inputs = {source: self.value(source, side, i) for source in node.all_input_nodes}
            if side == "dense":
                inputs = {self._twins[source]: value for source, value in inputs.items()}
            args, kwargs = fx.map_arg((own.args, own.kwargs), inputs.__getitem__)
            chunks.append(compute(own.target, args, kwargs))
            del inputs, args, kwargs
            for source in finished:
                getattr(self._values[source], side)[i] = None
            yield i, chunks[i]
        if side == "sliced":
            for source in finished:
                del self._values[source]

    def amend(self, node: fx.Node, change: Callable[[Tensor], Tensor]) -> None:
        """Change the value that the sliced network has at a node."""
        chunks = self._values[node].sliced
        for i, value in enumerate(chunks):
            chunks[i] = change(value)

    def _own(self, node: fx.Node, side: Side) -> fx.Node:
        """A node's counterpart in one of the networks."""
        return node if side == "sliced" else self._twins[node]

    def _same_operation(self, node: fx.Node) -> bool:
        """Whether a node computes the same in both networks from the same inputs."""
        if node.op == "get_attr":
            dense, sliced = (
                self._interpreters[side].get_attr(self._own(node, side).target, (), {})
                for side in ("dense", "sliced")
            )
            return dense is sliced or _equal([dense], [sliced])
        if node.op == "call_module":
            dense, sliced = self.module(node, "dense"), self.module(node, "sliced")
            return _equal(_tensors(dense), _tensors(sliced))
        return True


def twins(dense: fx.GraphModule, sliced: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """From each node of the sliced network to that of the dense one."""
    nodes = [list(gm.graph.nodes) for gm in (dense, sliced)]
    described = [[(node.op, node.name, str(node.target)) for node in side] for side in nodes]
    if described[0] != described[1]:
        here = next((b for a, b in zip(*described, strict=False) if a != b), "the number of nodes")
        raise ValueError(
            f"The dense and the sliced network have different graphs, first at {here}. Both must "
            "be traced from the same model, and cut at the same place."
        )
    if [node.op for node in nodes[1]].count("placeholder") != 1:
        raise ValueError("The networks must have one input, a tensor.")
    for gm in (dense, sliced):
        training = [name for name, module in gm.named_modules() if module.training]
        if training:
            raise ValueError(
                f"The networks must be in evaluation mode, but {training[0] or 'one'!r} is in "
                "training mode. Call eval()."
            )
    return dict(zip(nodes[1], nodes[0], strict=True))


def _tensors(module: nn.Module | None) -> list[Any]:
    """All parameters and buffers of a module."""
    return [] if module is None else [*module.parameters(), *module.buffers()]


def _equal(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether tensors are the same or hold the same numbers."""
    return len(ours) == len(theirs) and all(
        a is b or (isinstance(a, Tensor) and a.shape == b.shape and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )
