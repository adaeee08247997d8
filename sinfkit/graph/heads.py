"""What stands behind the logits of a network: a softmax, log-softmax or sigmoid at its end."""

from __future__ import annotations

from torch import Tensor, fx, nn

from .fidelity import close
from .nodes import called_module, is_identity

__all__ = ["without_head"]

_MODULES = {nn.Softmax: "softmax", nn.LogSoftmax: "log_softmax", nn.Sigmoid: "sigmoid"}
_FUNCTIONS = {
    "softmax": "softmax",
    "log_softmax": "log_softmax",
    "sigmoid": "sigmoid",
    "expit": "sigmoid",
    "log": "log",
}
# They move numbers about and change none.
_SHAPES = frozenset("contiguous flatten reshape squeeze to float view".split())


def without_head(gm: fx.GraphModule, samples: Tensor | None = None) -> fx.GraphModule:
    """Leave out what turns logits into probabilities at the end of a graph, which is changed.

    With `samples`, of shape (n, ...), whether the head on the logits gives what it gave is checked,
    and the graph is left as it was where not: its softmax is over something else.
    """
    output = gm.graph.find_nodes(op="output")[0]
    found: list[tuple[fx.Node, str]] = []
    node = output.args[0]
    while isinstance(node, fx.Node) and node.all_input_nodes:
        kind = _kind(gm, node)
        if kind is not None:
            found.append((node, kind))
        elif not (_name(node) in _SHAPES or is_identity(gm, node)):
            break
        if kind in ("softmax", "log_softmax", "sigmoid"):
            break
        node = node.all_input_nodes[0]
    heads = [kind for _, kind in reversed(found)]
    if not heads or heads[0] == "log":  # of something else than a softmax
        return gm
    before = None if samples is None else gm(samples)
    changed: list[tuple[fx.Node, fx.Node, fx.Node]] = []
    for head, _ in reversed(found):
        source = head.all_input_nodes[0]
        for user in list(head.users):
            user.replace_input_with(head, source)
            changed.append((user, source, head))
    gm.recompile()
    if samples is not None and before is not None:
        if not close(_applied(heads, gm(samples)), before):
            for user, source, head in reversed(changed):
                user.replace_input_with(source, head)
            gm.recompile()
            return gm
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _applied(heads: list[str], logits: Tensor) -> Tensor:
    """What heads make of logits, the first one first."""
    for kind in heads:
        if kind == "log":
            logits = logits.log()
        else:
            logits = logits.sigmoid() if kind == "sigmoid" else getattr(logits, kind)(1)
    return logits


def _kind(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """Which head a node is, if any."""
    module = called_module(gm, node)
    if module is not None:
        return _MODULES.get(type(module))
    return _FUNCTIONS.get(_name(node))


def _name(node: fx.Node) -> str:
    """Name of the function or method that a node calls."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""
