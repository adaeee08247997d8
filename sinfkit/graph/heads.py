"""One logit for each class, whatever it is that a network ends in.

A softmax or sigmoid at the end is left out. Probabilities that come about in another way (the mean
of several, say) get their logarithm behind them, and a single number a zero beside it. Where the
last layer is none whose outputs are the classes', a linear layer that changes nothing follows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from ..utils.device import full_float32
from ..utils.params import warn
from .cuts import output_layer
from .nodes import called_layer, called_module, function_name, is_identity, is_shape_query
from .tracing import close, on_meta, trace

__all__ = ["ENDINGS", "logits_graph", "with_logits"]

# What a network returns, and how often its numbers go into natural logarithms.
_SCALES = {
    "logits": 1.0,
    "logarithms to base 10": math.log(10),
    "logarithms to base 2": math.log(2),
    "probabilities": 1.0,
}
SINGLE = ("one logit", "one probability")  # for each sample
ENDINGS = (*_SCALES, *SINGLE)
_ADDED = "outputs"

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
_PLACES = frozenset("flip gather getitem index_select permute roll select t transpose".split())


def logits_graph(module: nn.Module, example: Tensor, ending: str) -> fx.GraphModule:
    """A network's graph with one logit for each class; the network's `ending` is known."""
    gm = trace(module, example)
    with_logits(gm, example, ending)
    return gm


def with_logits(gm: fx.GraphModule, samples: Tensor, ending: str = "") -> str:
    """Let a graph, which is changed, return one logit for each class.

    `samples`, of shape (n, ...), show what it returned before, unless `ending` says so: one of
    `ENDINGS`, which is told. On the meta device they show nothing, and a softmax is believed.
    ValueError where a number may be a logit as well as a probability.
    """
    with torch.inference_mode(), full_float32():
        head = _leave_out_head(gm, samples)
        _leave_out_shapes(gm, samples)
        gm.graph.eliminate_dead_code()
        gm.recompile()
        outputs = _answers(gm, samples)
        if not ending and outputs.numel() == len(samples):
            plain = head == "sigmoid" or _is_of_layer(gm)
            ending = "one logit" if plain else _told_by_one(outputs.double())
        ending = ending or _told_by(outputs.double())
        _end(gm, outputs, ending)
    return ending


def _answers(gm: fx.GraphModule, samples: Tensor) -> Tensor:
    """What a graph gives; only its shape and type on the meta device."""
    found: Tensor = nn.Module.__call__(on_meta(gm) if samples.is_meta else gm, samples)
    return found


def _end(gm: fx.GraphModule, outputs: Tensor, ending: str) -> None:
    """Put behind a graph what makes logits of its outputs."""
    n = 1 if ending in SINGLE else outputs.shape[1]
    if ending == "logits" and _ends_in_layer(gm, n):
        return
    weight = torch.eye(n) * _SCALES[ending] if n > 1 else torch.tensor([[0.0], [1.0]])
    layer = nn.Linear(n, len(weight), bias=False, device="meta").eval()
    where = next((p.device for p in gm.parameters()), outputs.device)
    layer.weight = nn.Parameter(weight.to(where, outputs.dtype), requires_grad=False)
    name = _ADDED
    while hasattr(gm, name):
        name += "_"
    gm.add_module(name, layer)
    output = gm.graph.find_nodes(op="output")[0]
    node = last = output.args[0]
    info = torch.finfo(outputs.dtype)
    with gm.graph.inserting_before(output):
        if n == 1:
            node = gm.graph.call_method("reshape", (node, -1, 1))
        if ending == "one probability":
            node = gm.graph.call_function(torch.logit, (node, info.eps))
        elif ending == "probabilities":
            node = gm.graph.call_method("clamp", (node, info.tiny))
            node = gm.graph.call_method("log", (node,))
        node = gm.graph.call_module(name, (node,))
    output.replace_input_with(last, node)
    gm.recompile()


def _ends_in_layer(gm: fx.GraphModule, n: int) -> bool:
    """Whether the outputs are those of the last layer, in its order."""
    try:
        name = output_layer(gm, n)
    except ValueError:
        return False
    behind = list(reversed(gm.graph.nodes))
    behind = behind[: next(i for i, node in enumerate(behind) if node.target == name)]
    return not any(function_name(node) in _PLACES and not _of_shape(node) for node in behind)


def _is_of_layer(gm: fx.GraphModule) -> bool:
    """Whether a graph gives what a layer gives, and nothing has come between."""
    node = gm.graph.find_nodes(op="output")[0].args[0]
    while function_name(node) in _SHAPES | _PLACES or is_identity(gm, node):
        node = node.all_input_nodes[0]
    return called_layer(gm, node) is not None


def _of_shape(node: fx.Node) -> bool:
    """Whether a node takes a number out of a shape."""
    return all(map(is_shape_query, node.all_input_nodes))


_ROUNDING = 5e-3  # of a sum of probabilities, in half precision


def _told_by(outputs: Tensor) -> str:
    """What numbers are, one for each class, of which those for no sample say that they are logits.

    Probabilities may be percentages; of numbers that cannot be told from odd logits a warning says
    what they may be.
    """
    if not bool(torch.isfinite(outputs).all()):
        return "logits"
    sums = outputs.sum(1)
    # Rows that are all the same have the same sum, whatever they are made of.
    vary = (outputs - outputs.mean(0)).abs().max() > 3 * (sums - sums.mean()).abs().max()
    one = (sums.mean() - 1).abs() < _ROUNDING
    even = ((sums / sums.mean() - 1).abs() < _ROUNDING).all()
    if bool((outputs >= 0).all() & even & (vary | one)):
        return "probabilities"
    for base in (10, 2):
        values = base**outputs
        # Where a class is sure, the logarithms to all bases look the same.
        unsure = bool((values.amax(1) < 0.9).any())
        if unsure and bool(((values.sum(1) - 1).abs() < _ROUNDING).all()):
            return f"logarithms to base {base}"
    if bool((outputs >= 0).all()) and float(outputs.max()) > 0:
        warn(
            "None of the model's outputs is below 0, which is rare among logits: their softmax is "
            "taken. If they are probabilities or evidence already, return the logarithm instead."
        )
    return "logits"


def _told_by_one(outputs: Tensor) -> str:
    """What a single number for each sample is, that of the second class."""
    low, high = float(outputs.min()), float(outputs.max())
    if not (0 <= low < high <= 1):
        return "one logit"
    if low < 0.5 < high:
        return "one probability"
    raise ValueError(
        f"The model returns one number per sample, from {low:.3g} to {high:.3g}: it may be the "
        "logit of the second class, or its probability. Return two, one per class: "
        "torch.cat([torch.zeros_like(z), z], 1) of a logit z, torch.cat([1 - p, p], 1) of a "
        "probability."
    )


def _leave_out_shapes(gm: fx.GraphModule, samples: Tensor) -> None:
    """Leave out, at the end of a graph, what gives the shape and type that it was given."""
    output = gm.graph.find_nodes(op="output")[0]
    while isinstance(node := output.args[0], fx.Node) and function_name(node) in _SHAPES:
        source = node.all_input_nodes[0]
        before = _answers(gm, samples)
        output.replace_input_with(node, source)
        gm.recompile()
        found = _answers(gm, samples)
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (
            before.shape,
            before.dtype,
        ):
            output.replace_input_with(source, node)
            gm.recompile()
            return


def _leave_out_head(gm: fx.GraphModule, samples: Tensor) -> str:
    """Let what reads a head, down to its last one, read the logits; the head is told.

    Where the head on the logits does not give what it gave, it is over something else, and stays.
    """
    output = gm.graph.find_nodes(op="output")[0]
    found: list[tuple[fx.Node, str]] = []
    node = output.args[0]
    while isinstance(node, fx.Node) and node.all_input_nodes:
        kind = _kind(gm, node)
        if kind is not None:
            found.append((node, kind))
        elif not (function_name(node) in _SHAPES | _PLACES or is_identity(gm, node)):
            break
        if kind in ("softmax", "log_softmax", "sigmoid"):
            break
        node = node.all_input_nodes[0]
    heads = [kind for _, kind in reversed(found)]
    if not heads or heads[0] == "log":  # of something else than a softmax
        return ""
    before = _answers(gm, samples)
    changed: list[tuple[fx.Node, fx.Node, fx.Node]] = []
    for head, _ in reversed(found):
        source = head.all_input_nodes[0]
        for user in list(head.users):
            user.replace_input_with(head, source)
            changed.append((user, source, head))
    gm.recompile()
    if samples.is_meta or close(_applied(heads, _answers(gm, samples)), before):
        return heads[0]
    for user, source, head in reversed(changed):
        user.replace_input_with(source, head)
    gm.recompile()
    return ""


def _applied(heads: list[str], logits: Tensor) -> Tensor:
    """What heads make of logits, the first one first."""
    for kind in heads:
        if kind == "log":
            logits = logits.log()
        else:
            logits = logits.sigmoid() if kind == "sigmoid" else getattr(logits, kind)(-1)
    return logits


def _kind(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """Which head a node is, if any."""
    module = called_module(gm, node)
    if module is not None:
        return _MODULES.get(type(module))
    return _FUNCTIONS.get(function_name(node))
