"""Residual branches that can be left out whole: fewer layers, where narrower ones save little.

While a smaller network is repaired, a branch that is to go gives zero, so that it still has the
base's graph; in the end the sum is replaced by its shortcut. Residual networks lose little without
some of their blocks (Veit, Wilber and Belongie, NeurIPS 2016), and less where what follows is
refitted (Wang and Wu, CVPR 2023, arXiv 2202.07861).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..graph.nodes import (
    ancestors,
    called_module,
    function_name,
    holds_layers,
    is_addition,
    is_identity,
    is_layer,
    is_norm,
)
from .channels import Sliced

__all__ = ["Block", "blocks_in", "find_blocks", "leave_out", "silenced"]

# What gives zero for zero, and moves values at most.
_MOVES = frozenset("flatten permute reshape roll squeeze transpose unsqueeze view".split())


@dataclass(frozen=True)
class Block:
    """A branch that `total` adds to `shortcut`, both names of nodes.

    `modules` serve the branch alone; with weights of zero, `last` makes the branch zero.
    """

    total: str
    shortcut: str
    last: str
    modules: tuple[str, ...]


def find_blocks(graph: fx.GraphModule, example: Tensor | None) -> list[Block]:
    """Find the residual branches of a traced network that have layers and end in one.

    In the order of execution. A sum counts if its other operand is what the branch was computed
    from, of the same shape. `example`: an input, (n, ...), of which one row is used; without one,
    shapes are not looked at.
    """
    shapes = _Shapes(graph)
    if example is not None:
        with torch.inference_mode():
            shapes.run(example[:1])
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    blocks = []
    for total in graph.graph.nodes:
        if not is_addition(total) or total.kwargs:
            continue
        a, b = total.args
        for branch, shortcut in ((a, b), (b, a)):
            inside = _serving(branch, total)
            source = shortcut
            while is_identity(graph, source):
                source = source.all_input_nodes[0]
            if not inside or source not in ancestors(branch):
                continue
            if not shapes.of.get(branch) == shapes.of.get(shortcut) == shapes.of.get(total):
                continue
            modules = [str(node.target) for node in inside if node.op == "call_module"]
            last = _last(graph, branch, inside)
            shared = any(calls[name] > 1 for name in modules)
            if last is not None and not shared and any(_has_layers(graph, m) for m in modules):
                blocks.append(Block(total.name, shortcut.name, last, tuple(modules)))
    return blocks


def blocks_in(part: fx.GraphModule, blocks: Iterable[Block]) -> list[Block]:
    """The same blocks as a part of their network has them, whose nodes may have other names."""
    wanted = {block.last for block in blocks}
    return [block for block in find_blocks(part, None) if block.last in wanted] if wanted else []


def silenced(sliced: Sliced, blocks: Iterable[Block]) -> Sliced:
    """Let the branches of some blocks give zero, in place; they are not to be repaired."""
    blocks = tuple(blocks)
    for block in blocks:
        module = sliced.model.get_submodule(block.last)
        for name, value in list(module.named_parameters(recurse=False)):
            # By new parameters: tensors are never written to.
            zero = nn.Parameter(torch.zeros_like(value), requires_grad=value.requires_grad)
            setattr(module, name, zero)
    return replace(sliced, left_out=frozenset(m for block in blocks for m in block.modules))


def leave_out(sliced: Sliced, blocks: Sequence[Block]) -> Sliced:
    """Take the branches out of the graph, in place; what their layers kept is forgotten."""
    if not blocks:
        return sliced
    graph = sliced.model
    assert isinstance(graph, fx.GraphModule)
    cut_out(graph, blocks)
    gone = {name for block in blocks for name in block.modules}

    def left(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: part for name, part in parts.items() if name not in gone}

    return Sliced(
        graph,
        left(sliced.support),
        left(sliced.removed_inputs),
        left(sliced.norm_support),
        sliced.outputs,
        left(sliced.zeroed),
        left(sliced.along),
    )


def cut_out(graph: fx.GraphModule, blocks: Iterable[Block]) -> None:
    """Replace sums by their shortcuts, in place, and forget what nothing uses any more."""
    nodes = {node.name: node for node in graph.graph.nodes}
    order = {name: i for i, name in enumerate(nodes)}
    # From the back: a shortcut may be the sum of the block before.
    for block in sorted(blocks, key=lambda block: order[block.total], reverse=True):
        nodes[block.total].replace_all_uses_with(nodes[block.shortcut])
        graph.graph.erase_node(nodes[block.total])
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


class _Shapes(fx.Interpreter):
    """Runs a network and notes the shapes of its values."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.of: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.of[n] = value.shape
        return value


def _serving(branch: fx.Node, total: fx.Node) -> set[fx.Node]:
    """The nodes that are used for a branch alone, which is used for a sum alone."""
    if set(branch.users) != {total}:
        return set()
    inside, node = {branch}, branch.prev
    while node.op != "root":
        if node.users and inside.issuperset(node.users) and node.op != "placeholder":
            inside.add(node)
        node = node.prev
    return inside


def _last(graph: fx.GraphModule, branch: fx.Node, inside: set[fx.Node]) -> str | None:
    """The layer or normalisation whose weights alone, being zero, make a branch zero."""
    node: object = branch
    while isinstance(node, fx.Node) and node in inside:
        module = called_module(graph, node)
        if module is not None and (is_layer(module) or is_norm(graph, node)):
            return str(node.target) if getattr(module, "weight", None) is not None else None
        if not (is_identity(graph, node) or function_name(node) in _MOVES or _scales(node)):
            return None
        node = next((a for a in node.all_input_nodes if a.op != "get_attr"), None)
    return None


def _scales(node: fx.Node) -> bool:
    """Whether a node multiplies with a parameter or a number."""
    if function_name(node) not in ("mul", "multiply") or len(node.args) != 2:
        return False
    return any(not isinstance(a, fx.Node) or a.op == "get_attr" for a in node.args)


def _has_layers(graph: fx.GraphModule, name: str) -> bool:
    return holds_layers(graph.get_submodule(name))
