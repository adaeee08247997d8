"""From a model to a graph of its operations that is known to compute the same."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import operator
import random
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import SlicingWarning
from ..utils.device import full_float32, is_out_of_memory
from ..utils.params import warn
from .attention import plain_attention
from .nodes import (
    ancestors,
    called_layer,
    called_module,
    function_name,
    holds_layers,
    is_identity,
    is_layer,
    is_shape_query,
    out_of_place,
    samples_of,
)
from .plain import made_plain
from .recording import NeedsDataError, Recorder, Replayer, UntraceableError, output_of
from .writes import Writes

Module = TypeVar("Module", bound=nn.Module)


def copy_sharing_weights(module: Module) -> Module:
    """Copy a module tree but not its tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    # What a hook has computed from parameters (weight norm) cannot be copied at all.
    tensors += [v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def trace(model: nn.Module, example: Tensor | None = None) -> fx.GraphModule:
    """Turn a model into a graph of its operations.

    Parameters
    ----------
    model : nn.Module
        Takes one tensor (further arguments of ``forward`` keep their defaults) and returns one, or
        an object with the field ``logits``.  Left as it is.
    example : Tensor of shape (n, ...), optional
        An input that it accepts, of which the first row is used.  With it, code that looks at
        shapes and types can be followed, and what was recorded is compared with the model.

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
    Layers that compute what a plain one does (padding, activation or a computed weight inside,
    hooks) become plain ones with their names, and dropout in functions becomes modules, so that
    training mode brings it back.

    An operation that overwrites its argument (``nn.ReLU(inplace=True)``, ``x += y``) is replaced
    by the one that does not, and whatever reads the argument later reads the result instead, as
    it would have done.  A module that writes into a *view* (a slice, a chunk) that is read later
    stays whole, given an `example`; without one this is not recognised.
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
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a scripted or traced module; give the module it was made from.")
    opaque: frozenset[str] = frozenset()
    while True:
        gm, lost = _traced(model, example, opaque)
        if not lost:
            break
        # What a module writes into a view is not lost where it stays one node.
        more = {next((name for name in reversed(who) if name not in opaque), "") for who in lost}
        if "" in more:  # the model as a whole cannot be one node
            raise ValueError(f"The model could not be followed. {_WRITES}")
        opaque |= more
    found = opaque_modules(gm)
    if found:
        warn(
            f"Layers inside {', '.join(found)} stay whole: torch.fx cannot look into "
            f"{'these modules' if len(found) > 1 else 'this module'}.",
            SlicingWarning,
        )
    return gm


def _traced(
    model: nn.Module, example: Tensor | None, opaque: frozenset[str]
) -> tuple[fx.GraphModule, list[tuple[str, ...]]]:
    """A model's graph, and by which modules writes are made that are lost in it."""
    root = copy_sharing_weights(model).eval()
    plain_attention(root)
    graph, writes = _record(root, example, opaque)
    result = graph.find_nodes(op="output")[0].args[0]
    if not isinstance(result, fx.Node):
        raise ValueError(
            f"{type(model).__name__}.forward must return one tensor, but it returns "
            f"{type(result).__name__} of several or of none. Wrap the model in a module that picks "
            "the logits."
        )
    made_plain(root, graph)
    gm = fx.GraphModule(root.eval(), graph)
    _make_functional(gm)
    lost = writes.lost(gm.graph)
    for node in gm.graph.find_nodes(op="call_method", target="view"):
        if not node.kwargs and not any(isinstance(a, torch.dtype) for a in node.args):
            node.target = "reshape"  # which does not mind in what order axes lie in memory
    gm.graph.eliminate_dead_code()
    return fx.GraphModule(gm, _renumbered(gm.graph), class_name=type(model).__name__).eval(), lost


def of_torch_alone(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares no weights, and that torch loads where sinfkit is not installed.

    While it loads, torch computes with buffers at once, and numbers that hang on the samples (how
    many there are) are not known: buffers that meet such numbers get a zero that is not either.
    """
    gm = copy.deepcopy(gm)
    # How it was traced is of no use any more, and names a class of sinfkit.
    gm.__dict__.pop("_tracer_cls", None)
    gm.graph._tracer_cls = None
    samples = gm.graph.find_nodes(op="placeholder")[0]
    buffers = dict(gm.named_buffers())
    numbers: set[fx.Node] = set()
    made_of: dict[fx.Node, set[fx.Node]] = {}
    for node in list(gm.graph.nodes):
        sources = node.all_input_nodes
        constant = [source for source in sources if source in made_of]
        if is_shape_query(node) or (sources and numbers.issuperset(sources)):
            numbers.add(node)
        elif node.op == "get_attr" and str(node.target) in buffers:
            made_of[node] = {node}
        elif constant and node.op != "call_module":
            if numbers.isdisjoint(sources):
                if len(constant) == len(sources):
                    made_of[node] = set().union(*(made_of[source] for source in constant))
                continue
            for buffer in set().union(*(made_of[source] for source in constant)):
                _hang_on(gm.graph, buffer, samples, buffers[str(buffer.target)].dtype)
    gm.recompile()
    return gm


def _hang_on(graph: fx.Graph, buffer: fx.Node, samples: fx.Node, dtype: torch.dtype) -> None:
    """Add a zero, made from the samples, to a buffer, once."""
    if any(user.meta.get("hangs") for user in buffer.users):
        return
    with graph.inserting_after(buffer):
        zero = graph.call_method("new_zeros", (samples, ()), {"dtype": dtype})
    with graph.inserting_after(zero):
        added = graph.call_function(
            operator.or_ if dtype == torch.bool else operator.add, (buffer, zero)
        )
    added.meta["hangs"] = True
    buffer.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)


def opaque_modules(gm: fx.GraphModule) -> list[str]:
    """Names of the parts of a traced model that hold layers out of reach."""
    modules = {str(n.target): m for n in gm.graph.nodes if (m := called_module(gm, n)) is not None}
    return [name for name, m in modules.items() if not is_layer(m) and holds_layers(m)]


def new_graph() -> fx.Graph:
    """An empty graph whose module can be pickled, whatever functions it calls."""
    return fx.Graph(tracer_cls=Replayer)


def _record(
    root: nn.Module, example: Tensor | None, opaque: frozenset[str]
) -> tuple[fx.Graph, Writes]:
    """Record a module's graph; what cannot be traced becomes one node."""
    if isinstance(root, fx.GraphModule) and root.graph._tracer_cls is Replayer:
        graph = Replayer().trace(root)
        for new, old in zip(graph.nodes, root.graph.nodes, strict=True):
            _keep_place(new, old)
        return graph, Writes()
    # Without data first, in a moment whatever the size of the images.
    places = [torch.device("meta")] if example is not None else []
    if example is not None and not example.is_meta:
        places.append(example.device)
    while True:
        batches, twin = [], root
        if example is not None:
            row = example.detach()[:1].to(places[0])
            batches = [row.expand(n, *row.shape[1:]).clone() for n in (2, 3)]
            twin = on_meta(root) if row.is_meta else copy_sharing_weights(root)
            twin.eval()
        recorder = Recorder(opaque, batches, twin)
        attributes = [(module, dict(vars(module))) for module in root.modules()]
        try:
            graph = recorder.trace(root)
            if recorder.swallowed:
                # It went on without what it had asked for, perhaps another way than with it.
                raise _swallowed(recorder)
            _check_stateless(root, graph)
            return graph, recorder.writes
        except UntraceableError as failure:
            opaque |= {failure.name}
        except Exception as error:
            if isinstance(error, NeedsDataError) and len(places) > 1:
                places = places[1:]
                continue
            hooked = f"{_hooked(root)} " if _hooked(root) else ""
            raise ValueError(
                f"torch.fx cannot trace {type(root).__name__}.forward ({error}). {hooked}Give the "
                "network as nn.Sequential(prefix, rest) of two halves; that can always be traced, "
                "and the half that cannot be looked into stays whole."
            ) from error
        finally:
            for module, kept in attributes:  # where forward notes what it has seen, it is a proxy
                for key, value in list(vars(module).items()):
                    if isinstance(value, fx.Proxy):
                        vars(module)[key] = kept.get(key)


def _swallowed(recorder: Recorder) -> Exception:
    """What an error becomes that a module has caught."""
    if recorder.batches and recorder.batches[0].is_meta:
        return NeedsDataError("a value was asked for")
    name = next(iter(recorder.swallowed))
    return UntraceableError(name) if name else ValueError("its control flow depends on the samples")


def _check_stateless(root: nn.Module, graph: fx.Graph) -> None:
    """Raise where a forward that was recorded has changed a buffer that its answer hangs on.

    Other attributes are set by torch itself (masks of pruning), or to be looked at.
    """
    changed = {
        f"{name}.{key}".lstrip(".")
        for name, module in root.named_modules()
        for key, value in module._buffers.items()
        if isinstance(value, fx.Proxy)
    }
    for node in ancestors(graph.find_nodes(op="output")[0]) if changed else ():
        if node.op == "get_attr" and node.target in changed:
            raise ValueError(f"it keeps state from call to call, in {node.target!r}")


def on_meta(root: nn.Module) -> nn.Module:
    """A copy of a module without data."""

    def empty(tensor: Tensor) -> Tensor:
        new = tensor.detach().to("meta")
        return nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new

    tensors = [*root.parameters(), *root.buffers()]
    tensors += [v for m in root.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    return copy.deepcopy(root, {id(tensor): empty(tensor) for tensor in tensors})


def _make_functional(gm: fx.GraphModule) -> None:
    """Replace what overwrites its argument by what does not."""
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    # Not what lies inside of others that stay whole, which are to do what they did.
    overwriting = {name for name in called if getattr(gm.get_submodule(name), "inplace", False)}
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
        node.meta["out_of_place"] = overwrites
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
        _keep_place(env[node], node)
    return new


def _keep_place(new: fx.Node, old: fx.Node) -> None:
    """Note where samples lie in a value that is the same."""
    if "samples" in old.meta:
        new.meta["samples"] = old.meta["samples"]


_N_SAMPLES = 4
_STATISTICS = (
    "It may have a batch-norm with track_running_stats=False, or take a mean over the batch: its "
    "answers would change with batch_size. Train it with running statistics, or set them from data."
)
# Of the largest value. Graph and network run the same kernels on the same tensors.
_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def check_traced(
    graph: fx.GraphModule,
    module: nn.Module,
    X: Tensor,
    fresh: Callable[[], nn.Module] | None = None,
) -> None:
    """Compare a graph with the module it was traced from, on a few real samples.

    Raises ValueError, with what is likely to be the cause, if they differ, if the answer for a
    sample depends on the others of its batch, or if that of a `fresh` copy of the module depends on
    what it was asked first. `X` is of shape (n, ...), normalised.
    """
    X = X[:_N_SAMPLES]
    _check_parts(graph, X)
    if fresh is not None:
        _check_first(fresh().eval(), module, X)
    try:
        _check(graph, module, X)
        return
    except ValueError as error:
        found = error
    # Rounding, which deep networks may amplify beyond any tolerance, is far less in float64.
    wide = None if X.dtype == torch.float64 else _widened(graph, module)
    if wide is not None:
        with contextlib.suppress(RuntimeError, ValueError):
            _check(*wide, X.double())
            return
    raise found


def _check_evaluation(graph: fx.GraphModule) -> None:
    """Raise where eval() has left a part in training mode."""
    training = [name for name, part in graph.named_modules() if part.training and name]
    if training:
        raise ValueError(
            f"{training[0]!r} stays in training mode after eval(), where its answers may depend on "
            "the batch or on random draws. Let its train(mode) set `training`."
        )


def _check_parts(graph: fx.GraphModule, X: Tensor) -> None:
    """Raise where layers see samples in several parts that do not lie side by side."""
    wanted = [
        node
        for node in graph.graph.nodes
        if samples_of(node)[1] > 1
        and any(called_layer(graph, other) is not None for other in (node, *node.users))
    ]
    if not wanted or len(X) < 2:
        return
    with torch.inference_mode(), full_float32():
        alone, together = (_values(graph, x.clone(), wanted) for x in (X[:1], X))
    for node in wanted:
        axis, parts = samples_of(node)
        if not close(together[node].movedim(axis, 0)[:parts], alone[node].movedim(axis, 0)):
            raise ValueError(
                "The model puts several forms of its samples into one batch, all samples in the "
                "first form and then all in the next, as torch.cat([x, x.flip(-1)]) does. Give "
                "the network inside, and average its answers outside."
            )


def _values(graph: fx.GraphModule, x: Tensor, wanted: list[fx.Node]) -> dict[fx.Node, Tensor]:
    """Values of some nodes."""
    found: dict[fx.Node, Tensor] = {}

    class Watched(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in wanted:
                found[n] = value
            return value

    Watched(graph).run(x)
    return found


def _check_first(fresh: nn.Module, module: nn.Module, X: Tensor) -> None:
    """Raise where a module answers by what it was given in its first call."""
    with torch.inference_mode(), full_float32():
        wanted = output_of(module, X)
        with contextlib.suppress(Exception):
            # Of another sign and another mean.
            other = X[-1:] if looks_up(module) else 3 * X.abs().amax() - 2 * X[:1]
            output_of(fresh, other)
        found = output_of(fresh, X)
    if not close(found, wanted) and not _drawing(module, X)[1]:
        raise ValueError(
            "The model keeps something of the samples that it is asked about first, and answers by "
            "it later. Compute it from the sample, or set it once for all in a buffer."
        )


def _widened(graph: fx.GraphModule, module: nn.Module) -> tuple[fx.GraphModule, nn.Module] | None:
    """Copies in float64; None where there are none."""
    try:
        return copy.deepcopy(graph).double(), copy.deepcopy(module).double()
    except (RuntimeError, TypeError):
        return None


def _check(graph: fx.GraphModule, module: nn.Module, X: Tensor) -> None:
    """Raise ValueError where a graph is not its module, or samples depend on each other."""
    with torch.inference_mode(), full_float32():
        first = output_of(module, X)
        again, draws = _drawing(module, X)
        if draws or not close(first, again):
            raise ValueError(
                "The model gives another answer when it is asked again: its forward draws random "
                "numbers, or keeps state from call to call, in eval mode. Seed the draw with the "
                "input or take it out; switch Monte Carlo dropout off."
            )
        found = graph(X.clone())
    _check_alone(module, X, first)
    if not close(found, first):
        raise ValueError(
            "The model could not be followed: the graph recorded from its forward gives other "
            f"answers than the model itself (off by {difference(found, first):.2g} of the "
            f"largest). {_cause(module)}"
        )
    if len(X) > 1:
        with torch.inference_mode(), full_float32():
            alone = torch.cat([graph(x) for x in X.clone().split(1)])
        if not close(alone, first):
            raise ValueError(
                "The model could not be followed: what was recorded from its forward depends on "
                f"the others of a batch, unlike the model itself. {_cause(module)}"
            )
    _check_evaluation(graph)


def _drawing(module: nn.Module, X: Tensor) -> tuple[Tensor, bool]:
    """Answers, and whether random numbers were drawn for them, however seldom they matter.

    Others may draw at the same time, in threads of their own, but not three times in a row.
    """
    for _ in range(3):
        with _Draws() as draws:
            before = random.getstate(), _numpy_state()
            answers = output_of(module, X)
            moved = before != (random.getstate(), _numpy_state())
        if draws.found:
            return answers, True
        if not moved:
            return answers, False
    return answers, True


def _numpy_state() -> tuple[Any, ...]:
    """State of the generator behind ``np.random.rand`` and its like."""
    state: Any = np.random.get_state()  # noqa: NPY002
    return state[0], state[1].tobytes(), *state[2:]


class _Draws(TorchDispatchMode):
    """Notes whether an operation draws from torch's own generator, in this thread."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            self.found |= _draws(func, args, kwargs)
        return func(*args, **kwargs)


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation that may draw does so with its arguments."""
    signature = func._schema.arguments
    given = {a.name: a.default_value for a in signature if a.has_default_value()}
    given |= {a.name: value for a, value in zip(signature, args, strict=False)} | kwargs
    switches = [given[key] for key in ("train", "training") if key in given]
    shares = [given[key] for key in ("p", "dropout", "dropout_p") if key in given]
    return all(switches) and (not shares or bool(shares[0]))


def looks_up(module: nn.Module) -> bool:
    """Whether a network takes rows by their numbers: no GPU forgives it numbers out of range."""
    if isinstance(module, fx.GraphModule):
        return any(function_name(node) == "embedding" for node in module.graph.nodes)
    return any(isinstance(part, (nn.Embedding, nn.EmbeddingBag)) for part in module.modules())


_LOUD = 8.0  # times as large as the samples: what mates of a sample may be


def _check_alone(module: nn.Module, X: Tensor, together: Tensor) -> None:
    """Raise where samples get other answers alone, or among loud ones, than `together`."""
    if len(X) < 2:
        return
    with torch.inference_mode(), full_float32():
        try:
            alone = torch.cat([output_of(module, x) for x in X.split(1)])
        except Exception as error:  # a network may raise what it likes
            if is_out_of_memory(error):
                raise
            raise ValueError(f"The model cannot take one sample alone. {_STATISTICS}") from error
        among = _among_loud(module, X, together)
    for others in (alone, among):
        if not close(others, together):
            raise ValueError(
                "The model's answer for a sample depends on the others of its batch (by "
                f"{difference(others, together):.2g} of the largest). {_STATISTICS}"
            )


def _among_loud(module: nn.Module, X: Tensor, together: Tensor) -> Tensor:
    """Answers for samples behind mates that are far larger: a maximum over the batch shows there.

    Where such mates are no input, what was `together`.
    """
    if looks_up(module):
        return together
    for loud in (X * _LOUD, -X * _LOUD):
        try:
            found = output_of(module, torch.cat([loud, X]))[len(X) :]
        except Exception as error:  # a network may raise what it likes
            if is_out_of_memory(error):
                raise
            continue
        if bool(torch.isfinite(found[torch.isfinite(together)]).all()) and not close(
            found, together
        ):
            return found
    return together


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    if found.shape != wanted.shape:
        return False
    same = torch.isfinite(wanted) == torch.isfinite(found)
    most = _TOLERANCES.get(wanted.dtype, 1e-4)
    if not bool(same.all()) or difference(found, wanted) > most:
        return False
    # Near 0 and 1 probabilities hide what their logits show.
    return not _are_probabilities(wanted) or difference(_log(found), _log(wanted)) <= most


def _are_probabilities(outputs: Tensor) -> bool:
    """Whether the rows of outputs (n, n_classes) are shares that add up to 1."""
    if outputs.ndim != 2 or outputs.shape[1] < 2 or not outputs.is_floating_point():
        return False
    sums = outputs.double().sum(1)
    return bool((outputs >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all())


def _log(shares: Tensor) -> Tensor:
    """Logarithms, of which those of numbers without full precision are all the same."""
    return shares.double().clamp_min(torch.finfo(shares.dtype).tiny).log()


_MASKED = 1e4  # times below the best class: this says "never", and is no scale for the others


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference of two outputs, relative to the largest value.

    Classes that are masked by a number such as -1e9 count neither as different nor as large, while
    they stay so.
    """
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = found.double(), wanted.double()
    usual = torch.isfinite(wanted)
    if wanted.ndim == 2 and wanted.shape[1] > 1:
        usual &= ~(_masked(found) & _masked(wanted))
    if not bool(usual.any()):
        return 0.0
    gap = (found - wanted)[usual].abs().max()
    largest = wanted[usual].abs().max().clamp_min(1e-12)
    return float(gap / largest)


def _masked(outputs: Tensor) -> Tensor:
    """Which classes can never be the best: far below it, as seen from the second best."""
    best = outputs.nan_to_num(nan=-math.inf).topk(2, 1)[0]
    scale = best.abs().amax(1, keepdim=True).clamp_min(1.0)
    return outputs < best[:, :1] - _MASKED * scale


def _cause(module: nn.Module) -> str:
    """What is likely to have been lost."""
    return _hooked(module) or f"{_WRITES} Or it uses something that is computed once outside of it."


def _hooked(module: nn.Module) -> str:
    """What to do about hooks and the like, if there are any."""
    hooked = [
        name or "the model itself"
        for name, part in module.named_modules()
        if part._forward_hooks
        or part._forward_pre_hooks
        or "forward" in vars(part)
        or (not isinstance(part, fx.GraphModule) and type(part).__call__ is not nn.Module.__call__)
    ]
    if not hooked:
        return ""
    return (
        f"It has hooks, a forward set on the object or a __call__ of its own at "
        f"{', '.join(hooked[:3])}: put what they do into the forward of the module's class."
    )


_WRITES = (
    "Its forward seems to write in place into a view (a slice, a chunk, out=): write y = f(x) "
    "instead of f_(x[...]), and concatenate."
)
