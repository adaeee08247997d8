"""Records what a model does, while it runs on a real example.

torch.fx follows a model's Python code with proxies in place of tensors, and fails where the code
asks a proxy for a fact: its shape, its type, how many parts a split gave. Here each proxy carries
the values that it has for a batch of two samples and for one of three. Facts on which both agree
are told; where they differ, or hang on the samples' values, the code is refused.

``torch.export`` would follow more code, but returns a flat list of kernels: layers, their names and
their modules, which everything else here is built on, would be gone, and so would dropout.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.fx._symbolic_trace
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..utils.recording import RECORDING, OwnThreadTracer
from .autograd import without_autograd
from .nodes import ALONG_ROWS, function_name, is_layer, is_switched, samples_in
from .writes import Writes, tensors_in, version

__all__ = ["EVAL", "NeedsDataError", "Recorder", "Replayer", "UntraceableError"]

# They make tensors, or ask for a real True or False, and would refuse proxies.
_STRICT = (
    "arange batch_norm dropout empty eye full linspace ones rand randint randn tensor zeros".split()
)
# What they make does not depend on values, and if not on the number of samples, is a constant.
_FACTORIES = frozenset(
    "arange empty eye full linspace ones zeros new_empty new_full new_ones new_zeros".split()
)
# Sizes in these are written out where they do not depend on the number of samples.
_SIZED = frozenset("expand getitem reshape repeat split unflatten view".split())
# What these read of a tensor is known before it is computed.
_FACTS = frozenset(
    "shape ndim dtype device layout is_cpu is_cuda is_meta is_nested is_sparse is_quantized "
    "requires_grad names itemsize "
    "nbytes size dim ndimension numel nelement stride element_size is_floating_point is_complex "
    "is_contiguous get_device type storage_offset".split()
)


# torch.fx wants a proxy of these.
_OF_MATH = frozenset(f for f in vars(math).values() if callable(f))

# Parts of torch that hold layers, whose code can be followed.
_LOOKED_INTO = (
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
)


class _Eval(int):
    """The False of eval mode, to be told from any other where it arrives in a graph."""

    def __repr__(self) -> str:
        return "False"


EVAL = _Eval(0)


class UntraceableError(Exception):
    """Tracing failed inside the named submodule."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class NeedsDataError(Exception):
    """Values could not be computed on the meta device."""


class Replayer(OwnThreadTracer):
    """A tracer for code that torch.fx itself has written, as unpickling needs it.

    Whatever module or function such code calls was one node of the graph and becomes one again.
    The tracer of torch.fx knows this of torch's own functions only and would look into the others.
    """

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        """Record the graph."""
        kind: Any = type(root)
        called = tuple(filter(inspect.isfunction, kind.forward.__globals__.values()))
        fx.Tracer.__init__(self, autowrap_functions=called)
        with RECORDING, _proxies_accepted(self):
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every module is."""
        return True

    # Or they would be computed with at once, which numbers that are not known yet do not allow.
    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Use our own."""
        return _Symbol(node, self)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Any, list[Any]]:
        """One placeholder; torch.fx would make one of every optional argument, too."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]


class Recorder(Replayer):
    """A tracer for anybody's modules."""

    def __init__(self, opaque: frozenset[str], batches: list[Tensor], twin: nn.Module) -> None:
        super().__init__()
        self.opaque = opaque
        self.batches = batches
        self.twin = twin
        self.writes = Writes()
        self.swallowed: set[str] = set()
        self._computing = False

    def trace(
        self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None
    ) -> fx.Graph:
        """Record the graph."""
        hidden = _nothing_hidden(bool(self.batches))
        plain = without_autograd(root) if isinstance(root, nn.Module) else contextlib.nullcontext()
        with RECORDING, torch.no_grad(), plain, _proxies_accepted(self), hidden:
            return OwnThreadTracer.trace(self, root, concrete_args)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Any, list[Any]]:
        """The module is called with its hooks, and of what it returns the logits are taken."""
        x = self.create_proxy("placeholder", "x", (), {})
        if self.batches:
            x._held = tuple(self.batches)
            self.writes.note(x.node, x._held[0], [], [], ())
        self.root.training = EVAL  # type: ignore[assignment]
        return lambda module, x: _logits(module._call_impl(x)), [self.root, x]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Plain layers, what torch supplies, and what cannot be followed."""
        if module_qualified_name in self.opaque:
            return True
        if _is_hooked(m) or _computes_weight(m) or isinstance(m, _LOOKED_INTO):
            return False
        return (
            is_layer(m)
            or is_switched(m)
            or super(Replayer, self).is_leaf_module(m, module_qualified_name)
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Use our own, with values where there are any."""
        return _Proxy(node, self) if self.batches else _Symbol(node, self)

    def is_mine(self) -> bool:
        """Whether it is the thread that records which asks, and not for a value."""
        return not self._computing and super().is_mine()

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Look into a module, or record its call; say where it failed."""
        if not self.is_mine():
            return forward(*args, **kwargs)
        try:
            name = self.path_of_module(m)
        except NameError:  # made on the spot, of nothing or of installed ones
            return forward(*args, **kwargs)
        if not self.is_leaf_module(m, name):
            m.training = EVAL  # type: ignore[assignment]
        try:
            return fx.Tracer.call_module(self, m, forward, args, kwargs)
        except (UntraceableError, NeedsDataError):
            raise
        except Exception as error:
            if self.is_leaf_module(m, name):  # then it is the caller who did something odd
                raise
            raise UntraceableError(name) from error

    def create_arg(self, a: Any) -> Any:
        """Take a proxy's node, whatever it passes for."""
        # First of all: a proxy may pass for a tensor or an integer.
        if isinstance(a, np.generic):  # whose name is not known where the graph is run
            a = a.item()
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *rest: Any,
        **more: Any,
    ) -> Any:
        """Create a node and, where the values of its arguments are known, compute its own."""
        if self.batches:
            if target is torch._assert:
                return None
            name = target if kind == "call_method" else getattr(target, "__name__", "")
            if name in _FACTORIES and kind in ("call_method", "call_function"):
                made = self._made(name, args, kwargs)
                if made is not None:
                    return made
            elif name in _SIZED and kind in ("call_method", "call_function"):
                args = (args[0], *_mapped(args[1:], _written))
                kwargs = _mapped(kwargs, _written)
            elif target is F.scaled_dot_product_attention and kwargs.get("scale") is None:
                held = args[0]._held if isinstance(args[0], _Proxy) else None
                kwargs = {**kwargs, "scale": held[0].shape[-1] ** -0.5} if held else kwargs
            args, kwargs = _mapped((args, kwargs), _factor)
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if not self.batches or not isinstance(proxy, _Proxy) or kind in ("placeholder", "output"):
            return proxy
        inputs: list[_Proxy] = []
        _mapped((args, kwargs), lambda a: _noted(a, inputs))
        if any(given._held is None for given in inputs):
            return proxy
        proxy._constant = kind == "get_attr" or bool(inputs) and all(p._constant for p in inputs)
        versions = [[version(t) for t in tensors_in(given._held[0])] for given in inputs]
        self._computing = True
        try:
            proxy._held = tuple(
                self._value(kind, target, *_at(i, (args, kwargs))) for i in range(len(self.batches))
            )
        except Exception as error:
            if self.batches[0].is_meta:
                self.refuse(str(error))
                raise NeedsDataError(str(error)) from error
            raise
        finally:
            self._computing = False
        proxy._from_data = _holds_numbers(proxy._held[0]) and any(
            given._from_data
            or (
                isinstance(given._held[0], Tensor)
                and not given._constant
                and not _is_fact(kind, target, args)
            )
            for given in inputs
            if given._held
        )
        value, called = proxy._held[0], function_name(proxy.node)
        proxy._of_count = self._by_count(proxy._held, inputs, kind, target, args, kwargs)
        known = [(given.node, given._held[0]) for given in inputs]
        self.writes.note(proxy.node, value, known, versions, tuple(self._callers()))
        if _factor(proxy) is not proxy and target not in _OF_MATH:
            self.graph.erase_node(proxy.node)
            return value
        if isinstance(value, Tensor):
            proxy.node.meta["n_axes"] = value.ndim
            place = samples_in(value.shape, proxy._held[1].shape)
            if place not in (None, ALONG_ROWS):
                proxy.node.meta["samples"] = place
            if called == "mean" and hasattr(inputs[0]._held[0], "ndim"):
                proxy.node.meta["shape"] = inputs[0]._held[0].shape
        elif called in ("chunk", "split", "tensor_split"):
            dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
            sizes = [[part.shape[dim] for part in parts] for parts in proxy._held]
            if sizes[0] == sizes[1]:
                proxy.node.meta["sizes"] = sizes[0], dim
        elif isinstance(value, torch.dtype | torch.device):
            proxy.node.meta["told"] = value
        return proxy

    def _made(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The tensor that a function makes of facts, which is a constant; None for others."""
        given: list[Any] = []
        rest = args[1:] if name.startswith("new_") else args
        _mapped((rest, kwargs), lambda a: _noted(a, given))
        like = args[0] if name.startswith("new_") else None
        for one in (*given, *([like] if isinstance(like, fx.Proxy) else [])):
            if not isinstance(one, _Proxy) or one._held is None or one._from_data:
                return None
        if not all(one._is_steady() for one in given):
            return None
        rest, kwargs = _at(0, (rest, kwargs))
        where = next((t.device for t in self.root.parameters()), torch.device("cpu"))
        if kwargs.get("device") is not None:
            kwargs["device"] = where
        self._computing = True
        try:
            if like is None:
                return getattr(torch, name)(*rest, **kwargs)
            kind = like._held[0].dtype if isinstance(like, _Proxy) else like.dtype
            return getattr(torch.empty(0, dtype=kind, device=where), name)(*rest, **kwargs)
        finally:
            self._computing = False

    def _value(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one node."""
        if kind == "get_attr":
            return operator.attrgetter(target)(self.twin)
        if kind == "call_module":
            return self.twin.get_submodule(target)(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    def _by_count(
        self,
        held: tuple[Any, ...],
        inputs: list[_Proxy],
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Callable[[int], Any] | None:
        """A node's number for any number of samples; None where it is the same, or no number."""
        if not _is_number(held[0]):
            return None
        if any(isinstance(given._held[0], Tensor) for given in inputs if given._held):
            if held[0] == held[1] or not _is_fact(kind, target, args):
                return None
            return functools.partial(_on_line, *held[:2])
        if all(given._of_count is None for given in inputs):
            return None

        def at(n: int) -> Any:
            return self._value(kind, target, *_mapped((args, kwargs), lambda a: _for_count(a, n)))

        try:
            steady = held[0] == held[1] and all(at(n) == held[0] for n in _COUNTS)
        except ArithmeticError:
            steady = False
        return None if steady else at

    def _callers(self) -> list[str]:
        """Names of the modules that are running, outermost first."""
        return [name for name, _ in self.module_stack.values()]

    def refuse(self, why: str) -> fx.proxy.TraceError:
        """An error for code that asks for what is not known; should it catch it, that is noted."""
        self.swallowed.add((self._callers() or [""])[-1])
        return fx.proxy.TraceError(why)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Let asserted conditions pass; others would be control flow, which is refused."""
        frame = inspect.currentframe()
        while frame is not None and frame.f_globals.get("__name__") in (__name__, "torch.fx.proxy"):
            frame = frame.f_back
        passing = None if frame is None else _asserted(frame)
        return super().to_bool(obj) if passing is None else passing


class _Symbol(fx.Proxy):
    """A proxy that records ``x += y`` as what it is; torch.fx takes it for ``x = x + y``."""

    def _augmented(self, function: Callable[..., Any], other: Any) -> fx.Proxy:
        """Record the call of an in-place operator."""
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._augmented(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._augmented(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._augmented(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._augmented(operator.itruediv, other)


class _Proxy(_Symbol):
    """A proxy that passes for its value where the value's kind matters."""

    tracer: Any
    _held: Any = None  # its values, one for each batch, if they are known
    _constant = False  # computed from parameters and buffers alone
    _from_data = False  # a number read out of the samples
    _of_count: Callable[[int], Any] | None = None  # a number, for any number of samples

    @property
    def __class__(self) -> Any:
        return type(self) if self._held is None else type(self._held[0])

    @__class__.setter
    def __class__(self, kind: Any) -> None:
        raise TypeError("a proxy stays one")

    def __getattr__(self, k: str) -> Any:
        if k.startswith("__array"):
            raise AttributeError(k)
        if self._held is None or k.startswith("__"):
            return super().__getattr__(k)
        if k in ("_is_param", "_is_buffer"):
            return False
        if k == "ndim":  # a plain number, since it may be the key of a dict
            return self._held[0].ndim
        value = getattr(self._held[0], k)
        if callable(value) or isinstance(value, nn.Module):
            return super().__getattr__(k)
        return self.tracer.create_proxy("call_function", getattr, (self, k), {})

    def _told(self, kind: Callable[[Any], Any], *, of_tensors: bool = False) -> Any:
        """A fact about the value that is the same whatever the samples and their number."""
        if self._held is None or self._from_data:
            raise self.tracer.refuse("its value depends on the samples")
        data = isinstance(self._held[0], Tensor) and not self._constant and not of_tensors
        first, *others = (None if data else kind(value) for value in self._held)
        count = self._of_count
        if (
            data
            or any(other != first for other in others)
            or (count is not None and any(kind(count(n)) != first for n in _COUNTS))
        ):
            raise self.tracer.refuse("its value depends on the samples or on their number")
        return first

    def _is_steady(self) -> bool:
        """Whether a number is one and the same for any number of samples."""
        return bool(self._held[0] == self._held[1]) and self._of_count is None

    def __bool__(self) -> bool:
        before = set(self.tracer.swallowed)
        try:
            return bool(self._told(bool))
        except fx.proxy.TraceError:
            passing = bool(self.tracer.to_bool(self))
        self.tracer.swallowed = before
        return passing

    def __int__(self) -> int:
        return int(self._told(int))

    def __str__(self) -> str:
        return self._text(str)

    def __format__(self, format_spec: str) -> str:
        return self._text(lambda value: format(value, format_spec))

    def _text(self, kind: Callable[[Any], str]) -> str:
        """Text for a number that is known; for others, which are printed, any."""
        if self._held is None or not _is_number(self._held[0]):
            return repr(self)
        before = set(self.tracer.swallowed)
        try:
            return str(self._told(kind))
        except fx.proxy.TraceError:
            self.tracer.swallowed = before
            return repr(self)

    def __index__(self) -> int:
        return int(self._told(operator.index))

    def __float__(self) -> float:
        return float(self._told(float))

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.asarray(self._told(lambda value: value), dtype=dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **more: Any) -> Any:
        tensors = any(isinstance(a, Tensor) for a in inputs)
        names = {"multiply": "mul", "subtract": "sub", "divide": "truediv", "power": "pow"}
        name = names.get(ufunc.__name__, ufunc.__name__)
        if tensors and len(inputs) == 2 and hasattr(operator, name):
            return getattr(operator, name)(
                *(a.item() if isinstance(a, np.generic) else a for a in inputs)
            )
        known = (np.asarray(a) if isinstance(a, fx.Proxy) else a for a in inputs)
        return getattr(ufunc, method)(*known, **more)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __len__(self) -> int:
        return int(self._told(len, of_tensors=True))

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])  # type: ignore[index]

    def __contains__(self, item: Any) -> bool:
        return any(item is one or bool(item == one) for one in self)


def _holds_numbers(value: Any) -> bool:
    """Whether a value is a number, or a container of something else than tensors."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return any(map(_holds_numbers, value))
    return not isinstance(value, Tensor) and value is not None


# Numbers of samples for which a number is to be the same; it is recorded for two and three.
_COUNTS = (1, *range(4, 34), 64, 65, 100, 127, 128, 255, 256, 500, 512, 1000, 1024, 4096)


def _is_number(value: Any) -> bool:
    """Whether a value is a number, or a tuple of some, as a shape is."""
    if isinstance(value, tuple):
        return all(isinstance(part, bool | int | float) for part in value)
    return isinstance(value, bool | int | float)


def _on_line(two: Any, three: Any, n: int) -> Any:
    """What is so much for two samples, and so much for three, for `n`."""
    if isinstance(two, tuple):
        return torch.Size([_on_line(a, b, n) for a, b in zip(two, three, strict=True)])
    return two + (n - 2) * (three - two)


def _for_count(a: Any, n: int) -> Any:
    """A proxy's number for `n` samples."""
    if isinstance(a, _Proxy):
        return a._held[0] if a._of_count is None else a._of_count(n)
    return a


def _noted(a: Any, into: list[Any]) -> Any:
    """Add a proxy to a list."""
    if isinstance(a, fx.Proxy):
        into.append(a)
    return a


def _at(i: int, arguments: Any) -> Any:
    """Arguments with the values of the i-th batch, and without the sign of eval mode."""

    def value(a: Any) -> Any:
        if isinstance(a, _Proxy):
            return a._held[i]
        return False if a is EVAL else a

    return _mapped(arguments, value)


def _written(a: Any) -> Any:
    """A number in place of a proxy, where it is one and the same for any number of samples."""
    if not isinstance(a, _Proxy) or not a._held or a._from_data:
        return a
    if isinstance(a._held[0], tuple):  # a shape
        return tuple(_written(a[i]) for i in range(len(a._held[0])))  # type: ignore[index]
    return a._held[0] if type(a._held[0]) is int and a._is_steady() else a


def _factor(a: Any) -> Any:
    """A fraction that is one and the same for any samples: it is not to follow the channels."""
    if not isinstance(a, _Proxy) or not a._held or type(a._held[0]) is not float:
        return a
    return a if a._from_data or not a._is_steady() else a._held[0]


def _mapped(a: Any, value: Callable[[Any], Any]) -> Any:
    """Apply a function within tuples, lists, dicts and slices."""
    if isinstance(a, fx.Proxy):
        return value(a)
    if isinstance(a, tuple):
        parts = tuple(_mapped(part, value) for part in a)
        return type(a)(*parts) if hasattr(a, "_fields") else parts
    if isinstance(a, list):
        return [_mapped(part, value) for part in a]
    if isinstance(a, dict):
        return {key: _mapped(part, value) for key, part in a.items()}
    if isinstance(a, slice):
        return slice(*(_mapped(part, value) for part in (a.start, a.stop, a.step)))
    return value(a)


def _is_fact(kind: str, target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a node reads what is known of a tensor before it is computed."""
    if target is getattr:
        return args[1] in _FACTS
    return (target if kind == "call_method" else getattr(target, "__name__", "")) in _FACTS


def _is_hooked(module: nn.Module) -> bool:
    """Whether a module does more, or something else, than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _computes_weight(module: nn.Module) -> bool:
    """Whether a layer's weight is not a parameter, as under weight norm."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return isinstance(module, kinds) and "weight" not in module._parameters


def _logits(output: Any) -> Any:
    """Of what a model returns, a proxy of the class scores."""
    values = output._held if isinstance(output, _Proxy) else None
    is_tensor = isinstance(output, fx.Proxy) and (values is None or isinstance(values[0], Tensor))
    return output if is_tensor else logits_of(output)


@contextlib.contextmanager
def _proxies_accepted(tracer: Replayer) -> Iterator[None]:
    """While tracing, let functions of torch take proxies that would refuse them."""

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not tracer.is_mine():
                return function(*args, **kwargs)
            proxies: list[Any] = []
            _mapped([*args, *kwargs.values()], lambda a: _noted(a, proxies))
            if proxies:
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    plain = {name: getattr(torch, name) for name in _STRICT}
    count = builtins.len

    def counted(a: Any) -> Any:
        """How many samples there are is recorded; ``len`` itself could give a number only."""
        if not issubclass(type(a), _Proxy) or not isinstance(a, Tensor):
            return count(a)
        number: Any = a.size(0)
        return int(number) if number._is_steady() else number

    try:
        for name, function in plain.items():
            setattr(torch, name, recording(function))
        builtins.len = counted
        yield
    finally:
        builtins.len = count
        for name, function in plain.items():
            setattr(torch, name, function)


@contextlib.contextmanager
def _nothing_hidden(able: bool) -> Iterator[None]:
    """Look into functions that others declared as too hard for torch.fx to follow."""
    declared: dict[Any, Any] = torch.fx._symbolic_trace._wrapped_fns_to_patch
    kept = dict(declared)
    try:
        if able:
            declared.clear()
        yield
    finally:
        declared.update(kept)


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


def output_of(module: nn.Module, X: Tensor) -> Tensor:
    """The logits that a module gives for samples that it may overwrite."""
    given = module(X.clone())
    found: Tensor = given if isinstance(given, Tensor) else logits_of(given)
    return found


def logits_of(output: Any) -> Any:
    """Of a model's output, the class scores: the field "logits", or the only element."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    if found is None and isinstance(output, dict | tuple | list) and len(output) == 1:
        found = next(iter(output.values() if isinstance(output, dict) else output))
    return output if found is None else found
