"""Layers that compute the same as a plain one become plain ones, on a traced network.

A convolution that pads itself or standardises its weights, a batch-norm with an activation inside,
a weight under a parametrisation or a call of ``F.linear`` all show as a call of torch's function
with weights that do not depend on the samples. Each becomes a plain module with these weights.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .nodes import ancestors, function_name
from .recording import EVAL

__all__ = ["made_plain"]

_CONVOLUTION = "input weight bias stride padding dilation groups".split()
_SIGNATURES: dict[Any, list[str]] = {
    F.conv1d: _CONVOLUTION,
    F.conv2d: _CONVOLUTION,
    F.conv3d: _CONVOLUTION,
    F.linear: "input weight bias".split(),
    F.batch_norm: "input running_mean running_var weight bias training momentum eps".split(),
    F.layer_norm: "input normalized_shape weight bias eps".split(),
    F.group_norm: "input num_groups weight bias eps".split(),
    F.dropout: "input p training inplace".split(),
    F.dropout1d: "input p training inplace".split(),
    F.dropout2d: "input p training inplace".split(),
    F.dropout3d: "input p training inplace".split(),
    F.alpha_dropout: "input p training inplace".split(),
    F.feature_alpha_dropout: "input p training inplace".split(),
    torch.dropout: "input p train".split(),
}
_SIGNATURES |= {
    torch.batch_norm: "input weight bias running_mean running_var training momentum eps _".split(),
    torch.layer_norm: "input normalized_shape weight bias eps _".split(),
    torch.group_norm: "input num_groups weight bias eps _".split(),
}
_CONVOLUTIONS: dict[Any, Any] = {F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d}
_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
    torch.dropout: nn.Dropout,
}
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_HOMES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
)
_RANDOM = frozenset(
    "alpha_dropout bernoulli binomial cauchy dropout dropout1d dropout2d dropout3d exponential "
    "feature_alpha_dropout feature_dropout geometric gumbel_softmax log_normal multinomial normal "
    "poisson rand rand_like randint randint_like randn randn_like random randperm rrelu "
    "uniform".split()
)


def made_plain(root: nn.Module, graph: fx.Graph) -> None:
    """Replace calls of torch's functions with constant weights by plain modules.

    `root`, a private copy, gets the modules; they take the name, and share the parameters, of the
    module whose place they take.
    """
    _look_up(root, graph)
    _products(graph, _Constants(root, graph))
    constants = _Constants(root, graph)
    taken = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    _softmaxes(root, graph, taken)
    made: dict[Any, str] = {}
    replaced: set[str] = set()
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _SIGNATURES:
            continue
        arguments = _by_name(node)
        source = arguments.get("input")
        if not isinstance(source, fx.Node) or constants.is_constant(source):
            continue
        module = _plain(node.target, arguments, constants)
        if module is None:
            continue
        home, is_own = _home(node, arguments)
        key = (home, *map(_identity, (node.target, *arguments.items())))
        if key not in made or isinstance(module, tuple(_DROPOUTS.values())):
            made[key] = _install(root, module, home, taken, replaces=is_own)
            replaced.add(made[key])
        with graph.inserting_before(node):
            call = graph.call_module(made[key], (source,))
        call.meta = node.meta
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if "sizes" in node.meta:  # parts need not stay of equal size
            sizes, dim = node.meta["sizes"]
            node.target = "split" if node.op == "call_method" else torch.split
            node.args, node.kwargs = (node.args[0], sizes, dim), {}
        elif "shape" in node.meta:
            _sum_for_mean(graph, node)
    for node in reversed(list(graph.nodes)):
        if not node.users and constants.is_constant(node):
            graph.erase_node(node)
    _keep_parameters(root, graph, constants, replaced)
    for node in graph.nodes:  # what else asked whether the network is in training
        node.args = fx.node.map_aggregate(node.args, lambda a: False if a is EVAL else a)
        node.kwargs = fx.node.map_aggregate(node.kwargs, lambda a: False if a is EVAL else a)


def _keep_parameters(
    root: nn.Module, graph: fx.Graph, constants: _Constants, replaced: set[str]
) -> None:
    """Let nodes still read what modules that were replaced had beside weight and bias."""
    for node in graph.find_nodes(op="get_attr"):
        path, _, leaf = str(node.target).rpartition(".")
        if not any(f"{path}.".startswith(f"{name}.") for name in replaced):
            continue
        value = constants.value(node)
        try:
            home = root.get_submodule(path)
        except AttributeError:
            home, path = root, ""
        if getattr(home, leaf, None) is value:
            continue
        while hasattr(home, leaf):
            leaf += "_"
        if isinstance(value, nn.Parameter):
            home.register_parameter(leaf, value)
        else:
            home.register_buffer(leaf, value)
        node.target = f"{path}.{leaf}".lstrip(".")


class _Constants:
    """Values of a graph that do not depend on its input."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self._root = root
        self._values: dict[fx.Node, Any] = {}
        self._known: set[fx.Node] = set()
        for node in graph.nodes:
            name = function_name(node)
            inputs = node.all_input_nodes
            computed = node.op == "call_module" or (
                node.op in ("call_function", "call_method") and inputs
            )
            if "told" in node.meta:  # the type of the input, say
                self._known.add(node)
                self._values[node] = node.meta["told"]
            elif node.op == "get_attr":
                self._known.add(node)
                self._values[node] = operator.attrgetter(str(node.target))(root)
            elif computed and self._known.issuperset(inputs) and name not in _RANDOM:
                self._known.add(node)

        own = {t.untyped_storage().data_ptr() for t in (*root.parameters(), *root.buffers())}
        for node in graph.nodes:  # what is written into a copy of a parameter would be lost
            if node in self._known and node.op == "call_method" and _overwrites(str(node.target)):
                target = self._of(node.args[0])
                if target.untyped_storage().data_ptr() not in own:
                    self._of(node)

    def is_constant(self, value: Any) -> bool:
        """Whether an argument is no node, or one with a known value."""
        found: list[fx.Node] = []
        fx.node.map_arg(value, found.append)
        return self._known.issuperset(found)

    def value(self, argument: Any) -> Any:
        """An argument with values in place of nodes."""
        return fx.node.map_arg(argument, self._of)

    def _of(self, node: fx.Node) -> Any:
        if node not in self._values:
            run = fx.Interpreter(self._root, garbage_collect_values=False, graph=_only(node))
            args, kwargs = self.value((node.args, node.kwargs))
            args, kwargs = fx.node.map_aggregate(
                (args, kwargs), lambda a: False if a is EVAL else a
            )
            with torch.no_grad():
                self._values[node] = getattr(run, node.op)(node.target, args, kwargs)
        return self._values[node]


def _overwrites(method: str) -> bool:
    """Whether a method changes its tensor."""
    return method.endswith("_") and not method.endswith("__")


def _only(node: fx.Node) -> fx.Graph:
    """Any graph: the interpreter is asked for single nodes only."""
    return node.graph


def _by_name(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call that a signature names."""
    names = _SIGNATURES[node.target]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _plain(function: Any, arguments: dict[str, Any], constants: _Constants) -> nn.Module | None:
    """The module that computes what a call does; None where there is none."""
    rest = {name: value for name, value in arguments.items() if name != "input"}
    if function in _DROPOUTS:
        switched = rest.get("training", rest.get("train")) is EVAL
        p = rest.get("p", 0.5)
        return _DROPOUTS[function](p) if switched and isinstance(p, float | int) else None
    if not constants.is_constant(rest):
        return None
    rest = constants.value(rest)
    weight, bias = rest.get("weight"), rest.get("bias")
    module: Any
    if function in _CONVOLUTIONS:
        if not isinstance(weight, Tensor):
            return None
        groups = rest.get("groups", 1)
        module = _CONVOLUTIONS[function](
            weight.shape[1] * groups,
            len(weight),
            tuple(weight.shape[2:]),
            stride=_tuple(rest.get("stride", 1)),
            padding=_tuple(rest.get("padding", 0)),
            dilation=_tuple(rest.get("dilation", 1)),
            groups=groups,
            bias=bias is not None,
            device="meta",
        )
    elif function is F.linear:
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return None
        out, inputs = weight.shape
        module = nn.Linear(inputs, out, bias=bias is not None, device="meta")
    elif function in (F.batch_norm, torch.batch_norm):
        mean, axes = rest["running_mean"], arguments["input"].meta.get("n_axes")
        if (
            rest.get("training", False) not in (False, 0)
            or mean is None
            or axes not in _BATCH_NORMS
        ):
            return None
        module = _BATCH_NORMS[axes](
            len(mean), eps=rest.get("eps", 1e-5), affine=weight is not None, device="meta"
        )
        if weight is not None and bias is None:
            bias = torch.zeros_like(weight)
        module.running_mean, module.running_var = mean, rest["running_var"]
        module.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    elif function in (F.layer_norm, torch.layer_norm):
        module = nn.LayerNorm(
            rest["normalized_shape"],
            rest.get("eps", 1e-5),
            elementwise_affine=weight is not None,
            bias=bias is not None,
            device="meta",
        )
    else:
        if weight is None:
            return None
        module = nn.GroupNorm(rest["num_groups"], len(weight), rest.get("eps", 1e-5), device="meta")
        bias = torch.zeros_like(weight) if bias is None else bias
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            setattr(module, name, _parameter(value))
    return module.eval()


def _look_up(root: nn.Module, graph: fx.Graph) -> None:
    """Embeddings as functions of their weights, which are sliced as parameters are."""
    for node in list(graph.nodes):
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Embedding) and module.max_norm is None:
            with graph.inserting_before(node):
                weight = graph.get_attr(f"{node.target}.weight")
                found = graph.call_function(F.embedding, (node.args[0], weight))
            node.replace_all_uses_with(found)
            graph.erase_node(node)


_MATMULS = (torch.matmul, torch.mm, operator.matmul, "matmul", "mm")


def _products(graph: fx.Graph, constants: _Constants) -> None:
    """Products with a matrix of constants as linear functions of it."""
    for node in list(graph.nodes):
        source, matrix, turned, bias = None, None, True, None
        if node.target in _MATMULS and len(node.args) == 2 and not node.kwargs:
            source, matrix = node.args
        elif node.target in (torch.addmm, "addmm") and len(node.args) == 3 and not node.kwargs:
            bias, source, matrix = node.args
        elif node.target is torch.einsum and len(node.args) == 3:
            source, matrix, turned = _contracted(node, constants)
        if not isinstance(source, fx.Node) or not isinstance(matrix, fx.Node):
            continue
        if constants.is_constant(source) or not constants.is_constant((matrix, bias)):
            continue
        weight, added = constants.value((matrix, bias))
        plain = weight.layout is torch.strided and weight.is_floating_point() and weight.ndim == 2
        if not plain or (added is not None and added.ndim != 1):
            continue
        with graph.inserting_before(node):
            if turned:
                matrix = graph.call_method("t", (matrix,))
            made = graph.call_function(F.linear, (source, matrix, bias))
        made.meta = node.meta
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _contracted(call: fx.Node, constants: _Constants) -> tuple[Any, Any, bool]:
    """Samples, matrix, and whether it is to be turned, of an einsum over the last axis."""
    equation, one, other = call.args
    inputs, _, output = str(equation).replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    if constants.is_constant(one):
        one, other, first, second = other, one, second, first
    lead, last = first[:-1], first[-1:]
    out = second.replace(last, "", 1)
    right = len(second) == 2 and len(out) == 1 and last and out not in first
    if not right or last in lead or output != lead + out:
        return None, None, False
    return one, other, second[0] == last


def _softmaxes(root: nn.Module, graph: fx.Graph, taken: set[str]) -> None:
    """Softmax as a module, which can be told to look at a part of the channels."""
    for node in list(graph.nodes):
        if node.target in (F.softmax, torch.softmax, "softmax") and not node.kwargs.get("dtype"):
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            if isinstance(dim, int) and len(node.args) < 3:
                name = _install(root, nn.Softmax(dim), _home(node, {})[0], taken)
                with graph.inserting_before(node):
                    call = graph.call_module(name, (node.all_input_nodes[0],))
                call.meta = node.meta
                node.replace_all_uses_with(call)
                graph.erase_node(node)


def _sum_for_mean(graph: fx.Graph, node: fx.Node) -> None:
    """A mean over one axis that stays, by a number that does not change where channels leave."""
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if isinstance(dim, tuple | list) and len(dim) == 1:
        dim = dim[0]
    keeps = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    if isinstance(dim, int) and keeps is True:
        with graph.inserting_before(node):
            total = graph.call_function(torch.sum, (node.all_input_nodes[0], dim, True))
            mean = graph.call_function(operator.mul, (total, 1 / node.meta["shape"][dim]))
        for new in (total, mean):
            new.meta |= {key: node.meta[key] for key in ("samples",) if key in node.meta}
        node.replace_all_uses_with(mean)
        graph.erase_node(node)


def _tuple(value: Any) -> Any:
    """A list as a tuple."""
    return tuple(value) if isinstance(value, list | torch.Size) else value


def _parameter(value: Tensor) -> nn.Parameter:
    """The parameter itself, or a new one with a computed value."""
    if isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def _identity(value: Any) -> Any:
    """What tells one argument from another."""
    if isinstance(value, tuple):
        return tuple(map(_identity, value))
    return value.name if isinstance(value, fx.Node) else repr(value)


def _home(node: fx.Node, arguments: dict[str, Any]) -> tuple[str, bool]:
    """Name of the module whose parameter a call uses, or else of that whose code makes it.

    And whether the call can stand for that module: where its weight comes of that one's.
    """
    weight = arguments.get("weight")
    stack = list(node.meta.get("nn_module_stack", {}).values())
    home = str(stack[-1][0]) if stack else ""
    if not isinstance(weight, fx.Node):
        return home, True
    path, _, leaf = str(weight.target).rpartition(".")
    if weight.op == "get_attr" and leaf == "weight" and path:
        return path, True
    read = ("get_attr", "call_module")  # a parametrisation is a module
    used = {f"{n.target}." for n in ancestors(weight) | {weight} if n.op in read}
    of_weight = tuple(
        f"{home}.{name}" for name in ("weight.", "weight_", "parametrizations.weight.")
    )
    return home, any(name.startswith(of_weight) for name in used)


def _install(
    root: nn.Module, module: nn.Module, home: str, taken: set[str], *, replaces: bool = True
) -> str:
    """Put a module where the one is that it replaces, or under the one that calls it."""
    old = root.get_submodule(home)
    if replaces and home and home not in taken and isinstance(old, _HOMES):
        for name, child in old.named_children():
            if name != "parametrizations" and not hasattr(module, name):
                module.add_module(name, child)
        name = home
    else:
        kind = type(module).__name__.lower()
        name = f"{home}.{kind}" if home else kind
        n = 1
        while name in taken or _exists(root, name):
            n += 1
            name = f"{home}.{kind}{n}" if home else f"{kind}{n}"
    taken.add(name)
    path, _, leaf = name.rpartition(".")
    root.get_submodule(path).add_module(leaf, module)
    return name


def _exists(root: nn.Module, name: str) -> bool:
    """Whether a module has an attribute or a part of a name."""
    path, _, leaf = name.rpartition(".")
    return hasattr(root.get_submodule(path), leaf)
