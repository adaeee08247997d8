"""Networks without their code: an architecture by name, and parts told by what differs from it.

A part (prefix, subgraph, smaller network) has the graph of the base network's part, with narrower
layers.  Of its tensors only those are stored that are not the base's; the widths of its layers
follow from the tensors' shapes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import NotPlainError, StorageError
from ..frozen import baked, unwrapped
from ..graph.heads import logits_graph
from ..graph.nodes import CONVOLUTIONS, LAYERS, called_module, function_name
from ..graph.tracing import copy_sharing_weights
from ..repair.low_rank import NARROW, WIDE, insert_factors
from ..slicing.blocks import cut_out, find_blocks
from ..slicing.channels import NARROWABLE, is_depthwise, multiplies, narrow, width
from ..utils.device import float_type
from ..zoo import networks as models
from .container import fits
from .plain import take

__all__ = ["describe"]

CUSTOM = "custom"
_LARGEST = 2**20  # classes or channels of an architecture
_WIDEST = 64.0
_NORMS = (_NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_SLICED = (*NARROWABLE, *_NORMS)
_SIZED = frozenset("expand getitem reshape split unflatten view".split())
_MOST_NUMBERS = 2**24  # of one sample, to run a network on it
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What each architecture that is known by name takes, apart from `n_classes`.
_OPTIONS = {
    "vgg16": ("width", "in_channels"),
    "vgg19": ("width", "in_channels"),
    "resnet50": ("width", "in_channels", "stem"),
    "default": ("input_shape",),
}


def describe(module: nn.Module) -> dict[str, Any]:
    """Name a network's architecture with what builds it again, or say that it is "custom"."""
    options = getattr(module, "architecture", None)
    if isinstance(options, dict) and options.get("name") in _OPTIONS:
        twin = _build(options)
        # It may have been changed since; the text has every layer's options.
        if _shapes(twin) == _shapes(module) and repr(twin) == repr(module):
            return options
    kind = type(module)
    return {"name": CUSTOM, "class": f"{kind.__module__}.{kind.__qualname__}"}


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def build(options: Any, factory: Callable[[], nn.Module] | None) -> nn.Module:
    """Build an architecture; its weights are on the meta device, or what `factory` gave."""
    if factory is not None:
        module = factory()
        if not isinstance(module, nn.Module):
            raise TypeError(f"factory must return a torch.nn.Module, got {type(module).__name__}.")
        return copy_sharing_weights(baked(unwrapped(module))).eval()  # it may belong to someone
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise StorageError("The manifest names no architecture.")
    name = options["name"]
    if name == CUSTOM:
        raise StorageError(
            f"It holds a network of class {options.get('class')!r:.120}, which sinfkit cannot "
            "build by itself. Pass factory=..., a function that returns such a network."
        )
    if name not in _OPTIONS or set(options) != {"name", "n_classes", *_OPTIONS[name]}:
        raise StorageError(f"The manifest describes the unknown architecture {name!r:.40}.")
    given = options["input_shape"] if name == "default" else [options["in_channels"]]
    sizes = [options["n_classes"], *(given if isinstance(given, list) else [None])]
    right = all(type(n) is int and 1 <= n <= _LARGEST for n in sizes)
    if name == "default":
        right = right and len(given) in (1, 3)
    else:
        width = options["width"]
        right = right and type(width) in (int, float) and 0 < width <= _WIDEST
    if name == "resnet50":
        right = right and isinstance(options["stem"], str) and options["stem"] in ("cifar", "half")
    if not right:
        raise StorageError(f"The manifest has options that {name} cannot have.")
    return _build(options).eval()


def _build(options: Mapping[str, Any]) -> nn.Module:
    """Build a known architecture, without weights."""
    given = {key: value for key, value in options.items() if key != "name"}
    # Initialisers draw from the global generator, even where there are no values.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if options["name"] == "default":
            return models.default_network(**given, random_state=0)
        builders = {"vgg16": models.vgg16, "vgg19": models.vgg19, "resnet50": models.resnet50}
        return builders[options["name"]](**given)


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """A network's tensors by name, tied ones once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise NotPlainError(f"The network keeps {name!r} in its state, which is no tensor.")
        floating = tensor.is_floating_point()
        if not fits(tensor) or (floating and tensor.dtype not in _FLOATS):
            raise NotPlainError(
                f"The network's {name!r} is a tensor of {tensor.dtype}, which cannot be stored."
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def fill_base(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a network its stored weights, in place."""
    names: dict[int, str] = {}
    full = {}
    types = set()
    for name, own in module.state_dict(keep_vars=True).items():
        first = names.setdefault(id(own), name)
        if first not in state:
            raise StorageError(f"The base network needs {first!r:.80}, which the file has not got.")
        tensor = state[first]
        if tensor.shape != own.shape:
            raise StorageError(
                f"The base network's {name!r:.80} has shape {tuple(own.shape)}, and the file has "
                f"{tuple(tensor.shape)}."
            )
        if tensor.is_floating_point() != own.is_floating_point():
            raise StorageError(f"The file has {name!r:.80} as {tensor.dtype}.")
        if tensor.is_floating_point():
            types.add(tensor.dtype)
            if tensor.dtype not in _FLOATS or not bool(torch.isfinite(tensor).all()):
                raise StorageError(f"The base network's {name!r:.80} is not finite.")
        elif tensor.dtype != own.dtype:
            raise StorageError(f"The file has {name!r:.80} as {tensor.dtype}.")
        full[name] = tensor
    unknown = state.keys() - set(names.values())
    if unknown:
        raise StorageError(
            f"The file has {min(unknown)!r:.80}, which the base network has not got."
        )
    mixed = len({t.dtype for t in module.state_dict().values() if t.is_floating_point()}) > 1
    if len(types) > 1 and not mixed:
        raise StorageError("The base network's weights have more than one type.")
    module.load_state_dict(full, assign=True)


def traced(module: nn.Module, shape: Sequence[int], ending: str) -> fx.GraphModule:
    """Trace a network that takes samples of a shape, as when it was fitted; see `graph.heads`.

    That parts of it stay whole was said then.
    """
    example = probe(shape, module)[:1]
    # A file may say anything, and in networks known by name nothing depends on values.
    if math.prod(shape) > _MOST_NUMBERS or describe(module)["name"] != CUSTOM:
        example = example.to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits_graph(module, example, ending)


def probe(shape: Sequence[int], module: nn.Module) -> Tensor:
    """Two samples whose logits tell whether a network is the same: never two the same."""
    wave = torch.sin(torch.arange(1, 2 * math.prod(shape) + 1, dtype=torch.float64))
    where = next((p.device for p in module.parameters()), torch.device("cpu"))
    return wave.reshape(2, *shape).to(where, float_type(module))


def describe_part(
    name: str, reference: fx.GraphModule, part: nn.Module, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Say how a part differs from the base's; what is new goes to `tensors`.

    The entry has the names ``stored`` of tensors of its own, and ``ranks``, the number of outputs
    in between of layers that have become two; where blocks are left out, their last layers as
    ``dropped``.  NotPlainError if it has another graph.
    """
    ranks = _ranks(part)
    dropped = _dropped(part, reference)
    try:
        reference = insert_factors(without_blocks(reference, dropped), ranks)
    except ValueError as error:
        raise NotPlainError(f"The {name} cannot be built again: {error}") from error
    sizes = _sizes(part, reference) if isinstance(part, fx.GraphModule) else None
    if sizes is None:
        raise NotPlainError(
            f"The {name} does not run the same operations as that part of the base network, so "
            "that it cannot be built from it again."
        )
    known, own = reference.state_dict(), part.state_dict()
    if missing := known.keys() - own.keys():
        raise NotPlainError(f"The {name} has lost its {min(missing)!r}.")
    stored: list[str] = []
    for key, tensor in own.items():
        tensor, base = tensor.cpu(), known.get(key)
        if base is not None and tensor.dtype == base.dtype and torch.equal(tensor, base):
            continue
        if not fits(tensor):
            raise NotPlainError(
                f"The {name}'s {key!r} is of {tensor.dtype}, which cannot be stored."
            )
        stored.append(key)
        tensors[f"{name}/{key}"] = tensor
    entry: dict[str, Any] = {"stored": stored, "ranks": ranks, "sizes": sizes}
    return {**entry, "dropped": dropped} if dropped else entry


def _dropped(part: nn.Module, reference: fx.GraphModule) -> list[str]:
    """The last layers of the blocks that a part does without."""
    modules = dict(part.named_modules())
    blocks = find_blocks(reference, None)
    return [block.last for block in blocks if not any(name in modules for name in block.modules)]


def without_blocks(reference: fx.GraphModule, dropped: Sequence[str]) -> fx.GraphModule:
    """The base's graph without some blocks, told by their last layers; ValueError if unknown."""
    if not dropped:
        return reference
    blocks = {block.last: block for block in find_blocks(reference, None)}
    if unknown := set(dropped) - blocks.keys():
        raise ValueError(f"no residual block ends in {min(unknown)!r:.80}")
    reference = copy_sharing_weights(reference)
    cut_out(reference, [blocks[last] for last in dict.fromkeys(dropped)])
    return reference


def _ranks(part: nn.Module) -> dict[str, int]:
    """Layers that have become two, with the number of outputs in between."""
    found = {}
    for name, module in part.named_modules():
        children = dict(module.named_children())
        if set(children) == {NARROW, WIDE} and isinstance(children[NARROW].weight, Tensor):
            found[name] = len(children[NARROW].weight)
    return found


def _sizes(part: fx.GraphModule, reference: fx.GraphModule) -> dict[str, list[int]] | None:
    """Numbers that are written out in a graph and differ, by node; None if more than that does."""
    if _program(part) != _program(reference):
        return None
    both = zip(part.graph.nodes, reference.graph.nodes, strict=True)
    pairs = ((_numbers(part, own), _numbers(reference, base)) for own, base in both)
    return {str(i): own for i, (own, base) in enumerate(pairs) if own != base}


def _numbers(gm: fx.GraphModule, node: fx.Node) -> list[int]:
    """Sizes and positions among the arguments of a call that reshapes or takes parts.

    Of a norm without weights, which would tell it, the number of channels.
    """
    module = called_module(gm, node)
    if isinstance(module, _NORMS) and not module.state_dict():
        return [width(module, "out")]
    found: list[int] = []
    if function_name(node) in _SIZED:
        fx.node.map_aggregate(node.args, lambda a: found.append(a) if type(a) is int else None)
    return found


def _write_numbers(name: str, part: fx.GraphModule, sizes: Any) -> None:
    """Write others into a graph."""
    nodes = list(part.graph.nodes)
    for position, numbers in sizes.items():
        known = isinstance(position, str) and position.isdecimal() and len(position) < 10
        at = int(position) if known else len(nodes)
        right = at < len(nodes) and isinstance(numbers, list) and len(numbers) > 0
        right = right and len(numbers) == len(_numbers(part, nodes[at]))
        module = called_module(part, nodes[at]) if right else None
        right = right and all(type(n) is int and abs(n) <= 2**31 for n in numbers)
        right = right and (module is None or 1 <= numbers[0] <= width(module, "out"))
        if not right:
            raise StorageError(f"The manifest's entry for the {name} has sizes that do not fit.")
        if module is not None:
            narrow(module, np.arange(numbers[0]), None)
            continue
        rest = iter(numbers)
        written = fx.node.map_aggregate(
            nodes[at].args,
            lambda a, rest=rest: next(rest) if type(a) is int else a,  # type: ignore[misc]
        )
        assert isinstance(written, tuple)
        nodes[at].args = written
    if sizes:
        part.recompile()


def _program(gm: fx.GraphModule) -> list[Any]:
    """What a graph does, whatever its nodes are called and which sizes are written out."""
    place = {node: i for i, node in enumerate(gm.graph.nodes)}

    def argument(node: fx.Node, value: Any) -> Any:
        if function_name(node) in _SIZED:
            value = fx.node.map_aggregate(value, lambda a: "n" if type(a) is int else a)
        # A size is a list here and a tuple there, which says the same.
        return repr(_tuples(fx.map_arg(value, lambda node: f"%{place[node]}")))

    rows = []
    for node in gm.graph.nodes:
        target = node.target if node.op != "placeholder" else "x"
        kind = type(gm.get_submodule(str(target))) if node.op == "call_module" else None
        rows.append((node.op, target, kind, argument(node, node.args), argument(node, node.kwargs)))
    return rows


def _tuples(value: Any) -> Any:
    """The same with tuples for lists."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(part) for part in value)
    return value


class PartReader:
    """Builds parts from their descriptions and a file's tensors, within `max_bytes` for all.

    `used` receives the names of the tensors taken.  `shared` is where the base's tensors lie, which
    parts share with each other; what was computed from them, by folding, each part has for itself.
    """

    def __init__(self, tensors: Mapping[str, Tensor], used: set[str], max_bytes: int) -> None:
        self.tensors, self.used, self.left = tensors, used, max_bytes
        self.shared: set[int] = set()

    def read(self, name: str, reference: fx.GraphModule, entry: Any) -> fx.GraphModule:
        """Build one part; it shares with `reference` what equals it."""
        stored, ranks, sizes, dropped = _checked_entry(name, entry)
        try:
            reference = insert_factors(without_blocks(reference, dropped), ranks)
        except ValueError as error:
            raise StorageError(f"The {name}: {error}") from error
        known = reference.state_dict()
        own = {key: take(f"{name}/{key}", self.tensors, self.used) for key in stored}
        part = copy_sharing_weights(reference)
        _write_numbers(name, part, sizes)
        free = {str(node.target) for node in part.graph.nodes if node.op == "get_attr"}
        modules = dict(part.named_modules())
        for key in own:
            module = modules.get(key.rpartition(".")[0])
            new_bias = isinstance(module, LAYERS) and key.endswith(".bias")
            if module is None or (key not in known and not new_bias):
                raise StorageError(f"The base network has no {key!r:.80} for the {name}.")
        # Before anything is allocated.
        self.left -= sum((own[key] if key in own else base).nbytes for key, base in known.items())
        if self.left < 0:
            raise StorageError(
                "Its networks take more memory than max_bytes allows; pass a larger max_bytes to "
                "load, if you trust the file."
            )
        for key, base in known.items():
            if key not in own and base.data_ptr() not in self.shared:
                own[key] = base.clone()
        for key, value in own.items():
            path, _, attribute = key.rpartition(".")
            module, base = modules[path], known.get(key)
            _check_tensor(f"The {name}'s {key!r:.80}", value, base, module, key in free)
            if attribute in module._buffers:
                module._buffers[attribute] = value
            else:
                module._parameters[attribute] = nn.Parameter(value, requires_grad=False)
        for path in {key.rpartition(".")[0] for key in own}:
            _fit_widths(f"The {name}'s {path!r:.80}", modules[path])
        return part


def _checked_entry(
    name: str, entry: Any
) -> tuple[list[str], dict[str, int], dict[str, Any], list[str]]:
    """What `describe_part` wrote."""
    if not isinstance(entry, dict) or set(entry) - {"dropped"} != {"stored", "ranks", "sizes"}:
        raise StorageError(f"The manifest's entry for the {name} is not stored, ranks and sizes.")
    stored, ranks, sizes = entry["stored"], entry["ranks"], entry["sizes"]
    dropped = entry.get("dropped", [])
    if not isinstance(dropped, list) or not all(isinstance(last, str) for last in dropped):
        raise StorageError(f"The manifest's entry for the {name} has blocks that are no names.")
    right = isinstance(stored, list) and all(isinstance(key, str) for key in stored)
    right = right and len(set(stored)) == len(stored) and isinstance(ranks, dict)
    right = right and isinstance(sizes, dict)
    if not right or not all(type(rank) is int for rank in ranks.values()):
        raise StorageError(f"The manifest's entry for the {name} is malformed.")
    return stored, ranks, sizes, dropped


def _check_tensor(
    what: str, value: Tensor, base: Tensor | None, module: nn.Module, is_free: bool
) -> None:
    """Type and shape of a part's tensor: as the base's, or narrower where layers can be."""
    dtype = base.dtype if base is not None else next(module.parameters()).dtype
    if value.dtype != dtype:
        raise StorageError(f"{what} is of {value.dtype}, not of {dtype}.")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise StorageError(f"{what} is not finite.")
    if base is None:
        return
    shape, largest = tuple(value.shape), tuple(base.shape)
    if is_free and len(shape) == len(largest):  # of no layer, but used by the graph itself
        if all(1 <= n <= most for n, most in zip(shape, largest, strict=True)):
            return
    if isinstance(module, _SLICED) and len(shape) == len(largest):
        narrower = all(1 <= n <= most for n, most in zip(shape[:2], largest[:2], strict=True))
        if narrower and shape[2:] == largest[2:]:
            return
    if shape != largest:
        raise StorageError(f"{what} has shape {shape}, and the base network's has {largest}.")


def _fit_widths(what: str, module: nn.Module) -> None:
    """Let a layer's numbers of channels say what its tensors have."""
    if not isinstance(module, _SLICED):
        return
    tensors = [
        t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
    ]
    vectors = {len(t) for t in tensors if t.ndim == 1}
    if isinstance(module, LAYERS):
        out, inputs = (int(n) for n in module.weight.shape[:2])
        vectors.add(out)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = out, inputs
        elif is_depthwise(module):
            module.in_channels = module.out_channels = module.groups = out
        elif multiplies(module):
            each = module.out_channels // module.groups
            module.out_channels, module.in_channels, module.groups = out, out // each, out // each
        else:
            module.out_channels, module.in_channels = out, inputs * module.groups
            if out % module.groups:
                raise StorageError(f"{what} has a number of channels that its groups do not share.")
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        if vectors and len(module.normalized_shape) == 1:
            module.normalized_shape = (min(vectors),)
    elif isinstance(module, nn.GroupNorm):
        if vectors and min(vectors) % module.num_groups:
            raise StorageError(f"{what} has a number of channels that its groups do not share.")
        module.num_channels = min(vectors, default=module.num_channels)
    elif vectors:
        attribute = "num_features" if isinstance(module, _NormBase) else "num_parameters"
        setattr(module, attribute, min(vectors))
    if len(vectors) > 1:
        raise StorageError(f"{what} has tensors of different lengths.")


class _Shapes(fx.Interpreter):
    """Runs a graph without data, and checks what the meta device does not."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        wanted = None
        if isinstance(module, CONVOLUTIONS):
            wanted, axis = module.in_channels, 1
        elif isinstance(module, nn.Linear):
            wanted, axis = module.in_features, -1
        elif isinstance(module, _NormBase):
            wanted, axis = module.num_features, 1
        elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
            wanted, axis = module.num_parameters, 1
        if wanted is not None and args and args[0].shape[axis] != wanted:
            raise StorageError(
                f"{target!r:.80} takes {wanted} channels, and gets {int(args[0].shape[axis])}."
            )
        return super().call_module(target, args, kwargs)


def output_of(what: str, gm: fx.GraphModule, x: Tensor, is_custom: bool) -> Tensor:
    """What a graph gives for an input on the meta device: its shape, without any computation.

    Code of a factory need not run there (it may hold tensors that are no buffers): where it
    fails, it is run in earnest.
    """
    twin = copy_sharing_weights(gm)
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                bare = torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(bare, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="meta")
    try:
        with torch.inference_mode():
            found = _Shapes(twin).run(x)
    except StorageError as error:
        raise StorageError(f"The {what} does not fit together: {error}") from error
    except Exception as error:
        try:
            if not is_custom:
                raise
            with torch.inference_mode():
                found = gm(torch.zeros(x.shape, dtype=x.dtype))
        except Exception:
            raise StorageError(f"The {what} cannot run: {error}") from error
    if not isinstance(found, Tensor):
        raise StorageError(f"The {what} gives no tensor.")
    return found.to("meta")
