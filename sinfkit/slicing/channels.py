"""Groups of channels, and a network's copy without some of them.

All positions refer to the original network, and every tensor is indexed once, whatever the number
of groups that run through it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from ..graph.nodes import CONVOLUTIONS, LAYERS, is_layer
from ..graph.tracing import copy_sharing_weights

# What `narrow` can narrow. Batch-norm, PReLU and depthwise convolution count as outputs only.
NARROWABLE = (*LAYERS, _NormBase, nn.PReLU)


@dataclass(frozen=True, eq=False)
class Member:
    """Where a group's channels sit in one module: position ``index[i]`` holds ``channel[i]``.

    Sides are "in" and "out" of a module, or say what else goes by the number of channels: an axis
    of a parameter, a size that is written out in the graph, outputs that a mask sets to zero,
    channels "along" which a module without weights for each works (softmax).
    """

    module: str
    side: str
    index: np.ndarray
    channel: np.ndarray
    length: int = 0  # of the side, where it is no module's


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together, in all the layers that they run through."""

    name: str
    layers: tuple[str, ...]
    n_channels: int
    n_runs: int = 1
    consumers: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    is_output: bool = False
    reason_unsliceable: str = ""
    _members: tuple[Member, ...] = field(default=(), repr=False, compare=False)

    @property
    def has_parts(self) -> bool:
        """Whether some of the channels go a way of their own."""
        return len({m.channel.tobytes() for m in self._members}) > 1

    def with_every_part(self, kept: np.ndarray) -> np.ndarray:
        """Kept channels and, of each part that goes a way of its own, the first if none is kept."""
        parts = {m.channel.tobytes(): m.channel for m in self._members}
        for part in parts.values():
            if not np.isin(part, kept).any():
                run = self.n_channels // self.n_runs
                kept = np.union1d(kept, np.arange(part.min() % run, self.n_channels, run))
        return kept


@dataclass(frozen=True, eq=False)
class Sliced:
    """A physically smaller network, and what was kept of the original one."""

    model: nn.Module
    support: dict[str, np.ndarray]
    removed_inputs: dict[str, np.ndarray]
    norm_support: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: np.ndarray | None = None
    zeroed: dict[str, np.ndarray] = field(default_factory=dict)
    along: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()  # modules of branches that give nothing

    def after(self, earlier: Sliced) -> Sliced:
        """The same in terms of what `earlier` was sliced from; this was from ``earlier.model``."""
        removed = {}
        for name in earlier.removed_inputs.keys() | self.removed_inputs.keys():
            none = np.zeros(0, dtype=np.int64)
            before, now = (part.removed_inputs.get(name, none) for part in (earlier, self))
            n_left = width(self.model.get_submodule(name), "in")
            left = np.delete(np.arange(n_left + len(before) + len(now)), before)
            removed[name] = np.union1d(before, left[now])
        outputs = earlier.outputs
        if self.outputs is not None:
            outputs = self.outputs if outputs is None else outputs[self.outputs]
        return Sliced(
            self.model,
            _composed(earlier.support, self.support),
            removed,
            _composed(earlier.norm_support, self.norm_support),
            outputs,
            earlier.zeroed | self.zeroed,
            _composed(earlier.along, self.along),
        )


def _composed(
    earlier: Mapping[str, np.ndarray], later: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Kept channels of kept channels, by module."""
    both = {name: kept[later[name]] for name, kept in earlier.items() if name in later}
    return {**earlier, **later, **both}


def checked_indices(group: ChannelGroup, indices: Any) -> np.ndarray:
    """Validate the kept channels of one group; sorted, unless they are the network's outputs."""
    kept, n, what = np.asarray(indices), group.n_channels, f"keep[{group.name!r}]"
    if kept.ndim != 1 or len(kept) == 0:
        raise ValueError(f"{what} must be a list of at least one channel; got {indices!r}.")
    if kept.dtype.kind not in "iu":
        raise ValueError(f"{what} must hold integer indices, not {kept.dtype}.")
    if kept.min() < 0 or kept.max() >= n:
        raise ValueError(f"{what} must lie in 0..{n - 1}; got {kept.min()}..{kept.max()}.")
    if len(np.unique(kept)) < len(kept):
        raise ValueError(f"{what} names a channel twice.")
    kept = kept.astype(np.int64)
    if not group.is_output:
        kept = np.sort(kept)
    if np.array_equal(kept, np.arange(n)):
        return kept
    if group.reason_unsliceable:
        raise ValueError(f"{what} must name all {n} channels: {group.reason_unsliceable}.")
    if group.consumers and (np.diff(kept) < 0).any():
        raise ValueError(f"{what} must be sorted: {group.consumers[0]!r} reads these outputs.")
    run = n // group.n_runs
    alive = np.zeros((group.n_runs, run), dtype=bool)
    alive[kept // run, kept % run] = True
    if (alive != alive[0]).any():
        raise ValueError(
            f"{what} must keep the same local indices in each of the {group.n_runs} runs of "
            f"{run} channels: a grouped convolution gives or takes them."
        )
    return kept


def take_out(
    model: nn.Module, layers: Sequence[str], chosen: list[tuple[ChannelGroup, np.ndarray]]
) -> Sliced:
    """Slice groups whose kept channels are valid, in a copy; `layers` are listed in the support."""
    model = copy_sharing_weights(model)
    modules = dict(model.named_modules())
    alive: dict[str, dict[str, np.ndarray]] = defaultdict(dict, {"out": {}, "in": {}})
    ordered: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    outputs = None
    for group, kept in chosen:
        stays = np.zeros(group.n_channels, dtype=bool)
        stays[kept] = True
        for member in group._members:
            module, side = member.module, member.side
            if module not in alive[side]:
                n = member.length or width(modules[module], side)
                alive[side][module] = np.ones(n, dtype=bool)
            alive[side][module][member.index[~stays[member.channel]]] = False
            whole = group.is_output and len(member.index) == group.n_channels
            if whole and (side == "out" or side.startswith("axis")):
                position = np.empty(group.n_channels, dtype=np.int64)
                position[member.channel] = member.index
                ordered[side][module] = position[kept]
        if group.is_output:
            outputs = kept
    kept_out = {name: np.flatnonzero(mask) for name, mask in alive["out"].items()}
    kept_out |= ordered["out"]
    kept_in = {name: np.flatnonzero(mask) for name, mask in alive["in"].items()}
    removed = {name: np.flatnonzero(~mask) for name, mask in alive["in"].items()}
    for name, mask in alive["out"].items():
        if is_depthwise(modules[name]):
            removed[name] = np.flatnonzero(~mask)
    norms = {name: kept for name, kept in kept_out.items() if not is_layer(modules[name])}
    support = {name: kept_out.get(name, np.arange(width(modules[name], "out"))) for name in layers}
    with torch.inference_mode(False):
        for name in kept_out.keys() | kept_in.keys():
            narrow(modules[name], kept_out.get(name), kept_in.get(name))
        written = {side: masks for side, masks in alive.items() if side not in ("in", "out")}
        zeroed = {n: np.flatnonzero(~m) for n, m in written.pop("zero", {}).items()}
        along = {n: np.flatnonzero(m) for n, m in written.pop("along", {}).items()}
        rewrite(model, written, ordered)
    return Sliced(model, support, removed, norms, outputs, zeroed, along)


def rewrite(
    model: nn.Module,
    alive: Mapping[str, Mapping[str, np.ndarray]],
    ordered: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Adapt what a graph has written out, in place: parameters, sizes of views, parts of splits.

    What is `ordered` goes by that in place of what is alive.
    """
    graph: Any = getattr(model, "graph", None)
    nodes: dict[str, Any] = {} if graph is None else {node.name: node for node in graph.nodes}
    parts: dict[str, dict[int, int]] = defaultdict(dict)
    for side, masks in alive.items():
        kind, _, number = side.partition(" ")
        for name, mask in masks.items():
            kept = np.flatnonzero(mask)
            if kind == "axis":
                path, _, leaf = name.rpartition(".")
                order = ordered.get(side, {}).get(name, kept)
                _select(model.get_submodule(path), leaf, order, dim=int(number))
            elif kind == "part":
                parts[name][int(number)] = len(kept)
            elif kind == "size":
                _resize(nodes[name], int(number), len(kept))
            elif kind == "slice":
                _shift(nodes[name], int(number), mask)
    for name, sizes in parts.items():
        node = nodes[name]
        given = node.args[1]
        if isinstance(given, int):
            raise ValueError("a split into equal parts cannot become unequal")
        new = [sizes.get(i, n) for i, n in enumerate(given)]
        node.args = (node.args[0], new, *node.args[2:])
    if isinstance(model, fx.GraphModule) and alive:
        model.recompile()


def _resize(node: Any, axis: int, n: int) -> None:
    """Write another size into a view."""
    rest = node.args[1:]
    if node.target in ("unflatten", torch.unflatten):
        dim, sizes = rest
        at = axis - dim
        node.args = (node.args[0], dim, [n if i == at else s for i, s in enumerate(sizes)])
        return
    packed = len(rest) == 1 and isinstance(rest[0], tuple | list)
    sizes = list(rest[0] if packed else rest)
    if not sizes or axis >= len(sizes):
        raise ValueError("a size that is not written out")
    if isinstance(sizes[axis], int) and sizes[axis] != -1:  # else it is computed, and follows
        sizes[axis] = n
    node.args = (node.args[0], tuple(sizes)) if packed else (node.args[0], *sizes)


def _shift(node: Any, at: int, alive: np.ndarray) -> None:
    """Write another range into a slice."""
    index = list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]
    given, (start, stop, _) = index[at], index[at].indices(len(alive))
    first, last = int(alive[:start].sum()), int(alive[:stop].sum())
    index[at] = slice(
        None if given.start is None else first, None if given.stop is None else last, given.step
    )
    node.args = (node.args[0], tuple(index) if len(index) > 1 else index[0])


def narrow(module: nn.Module, outputs: np.ndarray | None, inputs: np.ndarray | None) -> None:
    """Keep only some outputs, in the order given, and inputs, sorted, of a module; None: all.

    Tensors are replaced, never written into, so that modules that share them see no change.
    """
    if inputs is not None:
        if isinstance(module, CONVOLUTIONS):
            if 1 < module.groups == module.in_channels:  # each has outputs of its own
                module.groups = len(inputs)
            else:
                # The same local indices stay in every group, so those of the first serve all.
                local = inputs[inputs < module.in_channels // module.groups]
                _select(module, "weight", local, dim=1)
            module.in_channels = len(inputs)
        elif isinstance(module, nn.Linear):
            _select(module, "weight", inputs, dim=1)
            module.in_features = len(inputs)
    if outputs is None:
        return
    for name in ("weight", "bias", "running_mean", "running_var"):
        _select(module, name, outputs, dim=0)
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = (len(outputs),)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(outputs)
    if isinstance(module, CONVOLUTIONS):
        if is_depthwise(module):
            module.in_channels = module.groups = len(outputs)
        module.out_channels = len(outputs)
    elif isinstance(module, nn.Linear):
        module.out_features = len(outputs)
    elif isinstance(module, _NormBase):
        module.num_features = len(outputs)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(outputs)


def _select(module: nn.Module, name: str, kept: np.ndarray, dim: int) -> None:
    """Replace a parameter or buffer by a new one that holds only the kept entries."""
    old = getattr(module, name, None)
    if old is None:
        return
    new = old.detach().index_select(dim, torch.from_numpy(kept).to(old.device))
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(module, name, new)


def width(module: nn.Module, side: str) -> int:
    """Number of channels on one side, ``"in"`` or ``"out"``, of a module that can be narrowed."""
    if isinstance(module, CONVOLUTIONS):
        return module.in_channels if side == "in" else module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features if side == "in" else module.out_features
    if isinstance(module, _NormBase):
        return module.num_features
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return int(module.normalized_shape[-1])
    raise TypeError(f"{type(module).__name__} cannot be narrowed")


def is_depthwise(module: nn.Module) -> bool:
    """Whether output channel i of a convolution depends on its input channel i alone."""
    return (
        isinstance(module, CONVOLUTIONS)
        and 1 < module.groups == module.in_channels == module.out_channels
    )


def multiplies(module: nn.Module) -> bool:
    """Whether a convolution makes several outputs of each input alone."""
    return (
        isinstance(module, CONVOLUTIONS)
        and 1 < module.groups == module.in_channels < module.out_channels
    )


def groups_of(module: nn.Module) -> int:
    """Number of groups of channels of a convolution; 1 for all else, and where it is depthwise."""
    alone = is_depthwise(module) or multiplies(module)
    return module.groups if isinstance(module, CONVOLUTIONS) and not alone else 1
