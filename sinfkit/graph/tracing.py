"""From a model to a graph of its operations, by torch.fx, without touching the model."""

from __future__ import annotations

import copy
import dis
import inspect
import operator
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from ..utils.params import caller_level
from .nodes import called_module, holds_layers, is_identity, is_layer, is_shape_query, out_of_place

__all__ = ["trace"]

Module = TypeVar("Module", bound=nn.Module)


def copy_sharing_weights(module: Module) -> Module:
    """Copy a module tree but not its tensors.

    Parameters
    ----------
    module : nn.Module
        Left as it is.

    Returns
    -------
    nn.Module
        A deep copy in which every parameter and buffer *is* the one of `module`.  Modes, attributes
        and submodules of the copy can be changed freely; writing into a tensor changes both.

    Examples
    --------
    >>> from torch import nn
    >>> layer = nn.Linear(3, 2)
    >>> twin = copy_sharing_weights(layer)
    >>> twin is layer, twin.weight is layer.weight
    (False, True)
    """
    tensors = [*module.parameters(), *module.buffers()]
    # What a hook has computed from parameters (weight norm) cannot be copied at all.
    tensors += [v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def trace(model: nn.Module) -> fx.GraphModule:
    """Turn a model into a graph of its operations.

    Parameters
    ----------
    model : nn.Module
        Takes one tensor (further arguments of ``forward`` keep their defaults) and returns one.
        Left as it is.

    Returns
    -------
    torch.fx.GraphModule
        Computes what `model` computes in eval mode, with the same parameters and buffers.  Its
        submodules keep their qualified names.  No operation in it overwrites its argument.  It can
        be copied, pickled and traced again; the names of its nodes survive all three.

    Raises
    ------
    TypeError
        If `model` is no ``nn.Module``.
    ValueError
        If the model's own ``forward`` cannot be traced, for instance because its control flow
        depends on values; or if it returns anything but one tensor.

    Warns
    -----
    UserWarning
        If a part of the model cannot be looked into and holds layers: they stay whole.  All such
        parts are named in one warning.

    Notes
    -----
    An operation that overwrites its argument (``nn.ReLU(inplace=True)``, ``x += y``) is replaced
    by the one that does not, and whatever reads the argument later reads the result instead, as
    it would have done.  Writing into a *view* (a slice, a chunk) is not recognised.
    An ``assert`` about the input, for instance its shape, is taken to hold and left out.

    Examples
    --------
    >>> from torch import nn
    >>> gm = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)))
    >>> [node.name for node in gm.graph.nodes]
    ['x', '_0', '_1', '_2', 'output']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    root = copy_sharing_weights(model).eval()
    graph = _record(root)
    result = graph.find_nodes(op="output")[0].args[0]
    if not isinstance(result, fx.Node):
        raise ValueError(
            f"{type(model).__name__}.forward must return one tensor, but it returns "
            f"{type(result).__name__} of several or of none. Wrap the model in a module that picks "
            "the logits."
        )
    gm = fx.GraphModule(root, graph)
    _make_functional(gm)
    gm.graph.eliminate_dead_code()
    gm = fx.GraphModule(gm, _renumbered(gm.graph), class_name=type(model).__name__).eval()
    opaque = opaque_modules(gm)
    if opaque:
        warnings.warn(
            f"Layers inside {', '.join(opaque)} stay whole: torch.fx cannot look into "
            f"{'these modules' if len(opaque) > 1 else 'this module'}.",
            UserWarning,
            stacklevel=caller_level(),
        )
    return gm


def opaque_modules(gm: fx.GraphModule) -> list[str]:
    """Names of the parts of a traced model that hold layers out of reach.

    Parameters
    ----------
    gm : GraphModule
        From `trace`.

    Returns
    -------
    list of str
        Qualified names, in the order of first execution.

    Examples
    --------
    >>> from torch import nn
    >>> opaque_modules(trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU())))
    []
    """
    modules = {str(n.target): m for n in gm.graph.nodes if (m := called_module(gm, n)) is not None}
    return [name for name, m in modules.items() if not is_layer(m) and holds_layers(m)]


def new_graph() -> fx.Graph:
    """An empty graph whose module can be pickled, whatever functions it calls."""
    return fx.Graph(tracer_cls=_Replayer)


class _Untraceable(Exception):
    """Tracing failed inside the named submodule."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Proxy(fx.Proxy):
    """A proxy that records ``x += y`` as what it is; torch.fx takes it for ``x = x + y``."""

    def _record(self, function: Callable[..., Any], other: Any) -> fx.Proxy:
        """Record the call of an in-place operator."""
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._record(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._record(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._record(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._record(operator.itruediv, other)


class _Tracer(fx.Tracer):
    """A tracer that gives the root one argument and says where it failed."""

    def __init__(self, opaque: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.opaque = opaque

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Any, list[Any]]:
        """One placeholder; torch.fx would make one of every optional argument, too."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.opaque
            or isinstance(m, (nn.Conv2d, nn.Linear))
            or super().is_leaf_module(m, module_qualified_name)
        )

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Let asserted conditions pass; others would be control flow, which is refused."""
        frame = inspect.currentframe()
        while frame is not None and frame.f_globals.get("__name__") in (__name__, "torch.fx.proxy"):
            frame = frame.f_back
        passing = None if frame is None else _asserted(frame)
        return super().to_bool(obj) if passing is None else passing

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except _Untraceable:
            raise
        except Exception as error:
            name = self.path_of_module(m)
            if self.is_leaf_module(m, name):  # then it is the caller who did something odd
                raise
            raise _Untraceable(name) from error


def _asserted(frame: FrameType) -> bool | None:
    """The value that lets the condition pass that a frame is just testing in an ``assert``."""
    # Depending on Python's version the condition is tested by the jump or just before it.
    skipped = ("CACHE", "COMPARE_OP", "NOT_TAKEN", "TO_BOOL")
    code = [i for i in dis.get_instructions(frame.f_code) if i.opname not in skipped]
    at = next(n for n, i in enumerate(code) if i.offset >= frame.f_lasti)
    test = code[at]
    if not test.opname.endswith(("IF_TRUE", "IF_FALSE")):
        return None
    jumps = test.opname.endswith("IF_TRUE")
    if _raises_assertion(code[at + 1]):
        return jumps
    target = next(i for i in code if i.offset >= test.argval)
    return not jumps if _raises_assertion(target) else None


def _raises_assertion(instruction: dis.Instruction) -> bool:
    """Whether an ``assert`` that fails goes on with an instruction."""
    return instruction.opname == "LOAD_ASSERTION_ERROR" or instruction.argrepr == "AssertionError"


class _Replayer(_Tracer):
    """A tracer for code that torch.fx itself has written, as unpickling needs it.

    Whatever function such code calls was one node of the graph and has to become one again.  The
    tracer of torch.fx knows this of torch's own functions only and would look into the others.
    """

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        kind: Any = type(root)
        called = tuple(filter(inspect.isfunction, kind.forward.__globals__.values()))
        fx.Tracer.__init__(self, autowrap_functions=called)
        return super().trace(root, concrete_args)


def _record(root: nn.Module) -> fx.Graph:
    """Record a module's graph; what cannot be traced becomes one node."""
    tracer = _Replayer if isinstance(root, fx.GraphModule) else _Tracer
    opaque: frozenset[str] = frozenset()
    while True:
        try:
            return tracer(opaque).trace(root)
        except _Untraceable as failure:
            opaque |= {failure.name}
        except Exception as error:
            raise ValueError(
                f"torch.fx cannot trace {type(root).__name__}.forward ({error}). Give the network "
                "as nn.Sequential(prefix, rest) of two halves; that can always be traced, and the "
                "half that cannot be looked into stays whole."
            ) from error


def _make_functional(gm: fx.GraphModule) -> None:
    """Replace what overwrites its argument by what does not."""
    overwriting = {
        name for name, m in gm.named_modules(remove_duplicate=False) if getattr(m, "inplace", False)
    }
    for name in overwriting:
        gm.get_submodule(name).inplace = False  # type: ignore[assignment]
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    # Nodes that may share one tensor: an eval-mode dropout returns its very argument.
    same: dict[fx.Node, list[fx.Node]] = {}
    numbers: set[fx.Node] = set()  # sizes and what is computed from them cannot be overwritten
    for node in list(gm.graph.nodes):
        same[node] = [node]
        sources = node.all_input_nodes
        if is_shape_query(node) or (sources and numbers.issuperset(sources)):
            numbers.add(node)
        overwrites = node.op == "call_module" and node.target in overwriting
        if node.op in ("call_function", "call_method"):
            overwrites = _switch_off(node)
        if overwrites and sources and sources[0] not in numbers:
            for old in same[sources[0]]:
                for user in [user for user in old.users if order[user] > order[node]]:
                    user.replace_input_with(old, node)
        elif is_identity(gm, node):
            same[sources[0]].append(node)
            same[node] = same[sources[0]]


def _switch_off(node: fx.Node) -> bool:
    """Make a function or method node out-of-place; return whether it was in-place."""
    plain = out_of_place(node.target)
    if plain is not None:
        node.target = plain
        return True
    if node.op != "call_function":
        return False
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin; torch's have no `inplace`
        return False
    if "inplace" not in names:
        return False
    at = names.index("inplace")
    if at < len(node.args):
        was_on = bool(node.args[at])
        node.update_arg(at, False)
    else:
        was_on = bool(node.kwargs.get("inplace", False))
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    return was_on


def _renumbered(graph: fx.Graph) -> fx.Graph:
    """Copy a graph with fresh names, so that unpickling, which traces again, gives the same."""
    new = new_graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args = fx.map_arg(node.args, env.__getitem__)
        kwargs = fx.map_arg(node.kwargs, env.__getitem__)
        env[node] = new.create_node(node.op, node.target, args, kwargs)
    return new
