"""Where the channels of each layer go, followed through a traced network.

Every axis of every value has labels: which channel of which layer sits at each position, or none.
Layers give new labels and consume old ones; what works element by element joins those that meet;
what only moves values (reshape, split, concatenation) is run on the labels themselves. Labels that
are joined can only leave together. What is not known pins the labels that reach it, so that it
costs their group and nothing else.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ..graph.nodes import (
    CONVOLUTIONS,
    Layer,
    called_layer,
    called_module,
    function_name,
    holds_layers,
    is_activation,
    is_identity,
    is_pool,
    is_shape_query,
)
from ..graph.tracing import on_meta
from .channels import groups_of, is_depthwise, multiplies

__all__ = ["Follower"]

Axes = list[np.ndarray | None]

_MOVES = frozenset(
    "cat channel_shuffle chunk clone concat concatenate contiguous detach embedding expand "
    "expand_as flatten flip float getitem half moveaxis movedim narrow pad permute pixel_shuffle "
    "pixel_unshuffle repeat repeat_interleave reshape reshape_as roll select split squeeze stack "
    "swapaxes swapdims t tensor_split tile to transpose type_as unbind unflatten unsqueeze "
    "view view_as".split()
)
_ELEMENTWISE = frozenset(
    "abs add addcdiv addcmul bernoulli clamp clip cos div divide erf exp float_power floor "
    "floordiv lerp log masked_fill maximum minimum mul multiply neg pow reciprocal relu round "
    "rsqrt rsub sigmoid sign sin sqrt square sub subtract tanh true_divide truediv where".split()
)
_REDUCTIONS = frozenset(
    "amax amin linalg_norm linalg_vector_norm logsumexp max mean min norm prod std sum var "
    "vector_norm".split()
)
_SUMS = frozenset(
    "linalg_norm linalg_vector_norm norm sum vector_norm".split()
)  # zeros add nothing
_MOVING_MODULES = (
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.modules.padding._CircularPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
)
# Modules that look across the channels, and have no weights for them.
_ALONG = (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.LocalResponseNorm)
_SIZES = frozenset("expand reshape unflatten view".split())


_NEEDED: Any = object()


class UnclearError(Exception):
    """A form of call that is not known."""


class Follower:
    """Follows the channels of a network."""

    def __init__(self, gm: fx.GraphModule, example: Tensor) -> None:
        self.gm = gm
        self.produced: dict[str, np.ndarray] = {}
        self.consumed: dict[str, np.ndarray] = {}
        self.places: list[tuple[str, str, np.ndarray]] = []
        self.products: list[np.ndarray] = []
        self.outputs: list[np.ndarray] = []
        self._parents: list[int] = []
        self._pins: list[tuple[int, str]] = []
        self._axes: dict[Any, Any] = {}
        self._calls = Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_module")
        self._values = _values(gm, example)
        for node in gm.graph.nodes:
            self._axes[node] = self._visit(node)

    # Labels ---------------------------------------------------------------------------------------

    def fresh(self, n: int) -> np.ndarray:
        """New labels."""
        start = len(self._parents)
        self._parents.extend(range(start, start + n))
        return np.arange(start, start + n)

    def root(self, label: int) -> int:
        """What stands for all that a label is joined with."""
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    def roots(self, labels: np.ndarray) -> np.ndarray:
        """Those of several labels; -1 where there is none."""
        return np.array([self.root(a) if a >= 0 else -1 for a in labels.tolist()], dtype=np.int64)

    def join(self, some: np.ndarray, others: np.ndarray, why: str) -> None:
        """Labels that meet; where only one side has any, it cannot leave."""
        if some is others:
            return
        for a, b in zip(some.tolist(), others.tolist(), strict=True):
            if a < 0 or b < 0:
                if max(a, b) >= 0:
                    self._pins.append((max(a, b), why))
            else:
                a, b = self.root(a), self.root(b)
                self._parents[max(a, b)] = min(a, b)

    def pin(self, labels: np.ndarray | None, why: str) -> None:
        """Keep channels for good."""
        if labels is not None:
            self._pins.extend((a, why) for a in labels.tolist() if a >= 0)

    def even_out(self) -> None:
        """Join channels until those of each layer come in equal runs, where that can be."""
        again = True
        while again:
            again = False
            for labels in self.produced.values():
                run = _run(self.roots(labels))
                for row in labels.reshape(-1, run)[1:] if run else ():
                    if not np.array_equal(self.roots(row), self.roots(labels[:run])):
                        self.join(labels[:run], row, "its channels are split unevenly")
                        again = True

    def pinned(self) -> dict[int, str]:
        """Why labels cannot leave, by root."""
        reasons: dict[int, str] = {}
        for label, why in self._pins:
            reasons.setdefault(self.root(label), why)
        return reasons

    # Nodes ----------------------------------------------------------------------------------------

    def _visit(self, node: Any) -> Any:
        """The labels of a node's value: for each axis, or for each part of a tuple."""
        value: Any = self._values.get(node)
        if node.op == "placeholder":
            return [None] * value.ndim
        if node.op == "get_attr":
            return self._of_attribute(node)
        if node.op == "output":
            for source in node.all_input_nodes:
                self.outputs += [labels for labels in self._flat(source) if labels is not None]
            return None
        if is_shape_query(node) or not _holds_tensors(value):
            return None
        module = called_module(self.gm, node)
        try:
            if module is not None:
                return self._of_module(node, module)
            return self._of_function(node, function_name(node))
        except UnclearError:
            return self._unknown(node)

    def _of_attribute(self, node: Any) -> Axes | None:
        """A parameter is sliced along with the channels that it meets."""
        value = self._values.get(node)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None if not isinstance(value, Tensor) else [None] * value.ndim
        axes: Axes = []
        for axis, n in enumerate(value.shape):
            labels = self.fresh(n) if n > 1 else None
            axes.append(labels)
            if labels is not None:
                self.places.append((str(node.target), f"axis {axis}", labels))
        return axes

    def _of_module(self, node: Any, module: nn.Module) -> Any:
        name = str(node.target)
        source = node.all_input_nodes[0]
        axes, shape = self._axes[source], self._values[node]
        layer = called_layer(self.gm, node)
        if layer is not None:
            return self._of_layer(node, layer, axes)
        if isinstance(module, _NormBase) or (
            isinstance(module, nn.PReLU) and module.num_parameters > 1
        ):
            if isinstance(module, _InstanceNorm):
                for labels in axes[2:]:
                    self.pin(labels, f"its channels are positions for {name!r}")
            return self._along(name, axes, 1)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            if len(module.normalized_shape) > 1:
                return self._over_positions(node, len(module.normalized_shape))
            return self._along(name, axes, -1)
        if isinstance(module, nn.GroupNorm):
            labels = axes[1]
            if labels is not None:
                self._in_runs(labels, module.num_groups)
            return self._along(name, axes, 1)
        if is_activation(self.gm, node) or is_identity(self.gm, node):
            return axes
        if isinstance(module, nn.GLU):
            return self._halves(axes, module.dim)
        if isinstance(module, _ALONG):
            return self._along(name, axes, getattr(module, "dim", 1), "along")
        if is_pool(self.gm, node) or isinstance(module, nn.Upsample):
            return [*axes[:2], *[None] * (shape.ndim - 2)] if shape.ndim > 2 else axes
        if isinstance(module, nn.modules.padding._ConstantPadNd):
            return self._padded(node, module.padding)
        if isinstance(module, _MOVING_MODULES):
            return self._moved(node, lambda x: module(x))
        if holds_layers(module):
            return self._unknown(
                node, f"its channels run through {name!r}, which torch.fx cannot look into"
            )
        return self._unknown(node)

    def _over_positions(self, node: Any, n_axes: int) -> Axes:
        """A normalisation over several axes, which leaves those before them alone."""
        axes = self._axes[node.all_input_nodes[0]]
        if any(labels is not None for labels in axes[-n_axes:]):
            return cast(Axes, self._unknown(node))
        return axes

    def _of_layer(self, node: Any, layer: Layer, axes: Axes) -> Axes:
        name, out = str(node.target), len(layer.weight)
        channels = 1 if isinstance(layer, CONVOLUTIONS) else len(axes) - 1
        if isinstance(layer, CONVOLUTIONS) and len(axes) != 2 + len(layer.kernel_size):
            return self._unknown(node)
        given = axes[channels]
        if self._calls[name] > 1:
            why = (
                f"its channels run through the {type(layer).__name__} {name!r}, which is executed "
                f"{self._calls[name]} times"
            )
            self.pin(given, why)
            self.produced.setdefault(name, self.fresh(out))
            self.pin(self.produced[name], why)
        elif is_depthwise(layer):
            labels = given if given is not None else np.full(out, -1)
            self.produced[name] = self.fresh(out)
            self.join(self.produced[name], labels, "the network's input is one of its channels")
            self.consumed[name] = labels
        elif isinstance(layer, CONVOLUTIONS) and multiplies(layer):
            self.produced[name] = self.fresh(out)
            if given is None:
                given = np.full(layer.groups, -1)
            else:
                self.consumed[name] = given
            several = np.repeat(given, out // layer.groups)
            self.join(self.produced[name], several, "the network's input is one of its channels")
        else:
            if given is not None:
                self.consumed[name] = given
            self.produced[name] = self.fresh(out)
            runs = groups_of(layer)
            if runs > 1:
                self._in_runs(self.produced[name], runs)
                if given is not None:
                    self._in_runs(given, runs)
        rest = list(axes)
        for axis in range(2, len(axes)) if isinstance(layer, CONVOLUTIONS) else ():
            before, after = (self._values[n].shape[axis] for n in (node.all_input_nodes[0], node))
            if isinstance(layer, nn.Conv1d) and layer.stride == (1,) and before == after:
                self._along(name, axes, axis, "along")  # channels in a row, as in ECA
            else:
                self.pin(axes[axis], f"its channels are positions for {name!r}")
                rest[axis] = None
        if isinstance(layer, nn.Linear):
            for axis in range(channels):  # channels that mix tokens, each for itself
                self._along(name, axes, axis, "along")
        rest[channels] = self.produced[name]
        return rest

    def _in_runs(self, labels: np.ndarray, runs: int) -> None:
        """The same channels leave each of several equal runs."""
        parts = labels.reshape(runs, -1)
        for part in parts[1:]:
            self.join(parts[0], part, "a grouped layer reads constants beside its channels")

    def _along(self, name: str, axes: Axes, axis: int, side: str = "out") -> Axes:
        """A module with one weight for each channel, or none, that gives what it is given."""
        labels = axes[axis]
        if labels is not None:
            if self._calls[name] > 1:
                self.pin(labels, f"its channels run through {name!r}, which is executed twice")
            self.places.append((name, side, labels))
        return axes

    def _halves(self, axes: Axes, dim: int) -> Axes:
        """One half of the channels gates the other."""
        labels, found = axes[dim], list(axes)
        if labels is not None:
            found[dim], gates = np.split(labels, 2)
            self.join(labels[: len(gates)], gates, "its channels meet values that stay")
        return found

    def _of_function(self, node: Any, name: str) -> Any:
        if name in ("cat", "concat", "concatenate"):
            return self._concatenated(node)
        if name == "pad" and _given(node, 2, "mode", "constant") == "constant":
            return self._padded(node, _given(node, 1, "pad"))
        if name == "getattr" and node.args[1] in ("T", "mT"):
            return self._moved(node, getattr)
        if name in _MOVES:
            return self._moved_function(node, name)
        if name in ("softmax", "log_softmax"):
            axes = self._axes[_given(node, 0, "input")]
            self.pin(axes[self._number(node, 1, "dim")], "its channels run through a softmax")
            return axes
        if name == "glu":
            return self._halves(
                self._axes[_given(node, 0, "input")], self._number(node, 1, "dim", -1)
            )
        if name in ("max", "min") and any(n in self._axes for n in node.all_input_nodes[1:]):
            return self._elementwise(node)
        if name in _REDUCTIONS:
            return self._reduced(node)
        if name == "normalize":
            axes = self._axes[_given(node, 0, "input")]
            labels = axes[self._number(node, 2, "dim", 1)]
            self.products += [labels] if labels is not None else []
            return axes
        if "pool" in name or name in ("interpolate", "upsample"):
            axes, n = self._axes[_given(node, 0, "input")], self._values[node].ndim
            return [*axes[:2], *[None] * (n - 2)]
        if name in ("matmul", "bmm"):
            return self._product(node)
        if name == "scaled_dot_product_attention":
            return self._attention(node)
        if name == "einsum":
            return self._einsum(node)
        if name in _ELEMENTWISE or is_activation(self.gm, node) or is_identity(self.gm, node):
            return self._elementwise(node)
        return self._unknown(node)

    def _elementwise(self, node: Any) -> Axes:
        """Axes that are broadcast against each other meet."""
        found: Axes = [None] * self._values[node].ndim
        widths = list(self._values[node].shape)
        known: list[bool] = [False] * len(found)
        for source in node.all_input_nodes:
            value = self._values.get(source)
            if not isinstance(value, Tensor):
                continue
            axes = self._axes[source]
            for back in range(1, value.ndim + 1):
                if value.shape[-back] != widths[-back] or widths[-back] == 1:
                    continue
                mine, at = axes[-back], len(found) - back
                if not known[at]:
                    found[at], known[at] = mine, True
                elif mine is not None or found[at] is not None:
                    none = np.full(widths[-back], -1)
                    held = found[at]
                    first = none if held is None else held
                    other = none if mine is None else mine
                    self.join(first, other, "its channels meet values that stay")
                    found[at] = None if held is None or mine is None else first
        return found

    def _reduced(self, node: Any) -> Any:
        """A mean or sum over axes: over channels it would change with them."""
        axes, value = list(self._axes[_given(node, 0, "input")]), self._values[node]
        at = 2 if "norm" in function_name(node) else 1
        dims = _given(node, at, "dim", None)
        every = range(len(axes)) if dims is None else [dims] if isinstance(dims, int) else dims
        if not all(isinstance(d, int) for d in every):
            raise UnclearError
        gone = {d % len(axes) for d in every}
        for axis in gone:
            if axes[axis] is not None and function_name(node) in _SUMS:
                self.products.append(axes[axis])
            else:
                self.pin(axes[axis], f"its channels are reduced by {function_name(node)}")
        keeps = (value if isinstance(value, Tensor) else value[0]).ndim == len(axes)
        left = [None if a in gone else labels for a, labels in enumerate(axes)]
        if not keeps:
            left = [labels for a, labels in enumerate(axes) if a not in gone]
        return left if isinstance(value, Tensor) else [left for _ in value]

    def _product(self, node: Any) -> Axes:
        """A product of two matrices: what is summed over meets."""
        one, other = _given(node, 0, "input"), _given(node, 1, "other", node.kwargs.get("mat2"))
        a, b = self._axes[one], self._axes[other]
        if len(a) < 2 or len(b) < 2:
            raise UnclearError
        self._meet(a[-1], b[-2], self._values[one].shape[-1])
        return [*self._batched(a[:-2], b[:-2]), a[-2], b[-1]]

    def _meet(self, some: np.ndarray | None, others: np.ndarray | None, n: int) -> None:
        """Axes that are multiplied and summed over."""
        if some is None and others is None:
            return
        none = np.full(n, -1)
        some, others = none if some is None else some, none if others is None else others
        self.join(some, others, "its channels are multiplied with values that stay")
        self.products.append(np.where(some >= 0, some, others))

    def _batched(self, a: Axes, b: Axes) -> Axes:
        """Leading axes of two factors."""
        if len(a) != len(b):
            for labels in (*a, *b):
                self.pin(labels, "its channels are the batch of a product")
            return [None] * max(len(a), len(b))
        for some, others in zip(a, b, strict=True):
            if some is not None or others is not None:
                self.pin(some, "its channels are the batch of a product")
                self.pin(others, "its channels are the batch of a product")
        return [None] * len(a)

    def _attention(self, node: Any) -> Axes:
        """Queries and keys meet over their dimensions, weights and values over tokens."""
        parts = [_given(node, i, name) for i, name in enumerate(("query", "key", "value"))]
        q, k, v = (self._axes[part] for part in parts)
        n = self._values[parts[0]].shape[-1]
        self._meet(q[-1], k[-1], n)
        for labels in (q[-2], k[-2], v[-2]):
            self.pin(labels, "its channels are the tokens of attention")
        self._batched(self._batched(q[:-2], k[:-2]), v[:-2])
        if node.kwargs.get("scale") is None:
            self.pin(q[-1], "its attention is scaled by their number")
        return [*q[:-1], v[-1]]

    def _einsum(self, node: Any) -> Axes:
        """The same by letters."""
        equation, *operands = node.args
        inputs, arrow, output = str(equation).replace(" ", "").partition("->")
        if not arrow or "." in inputs or not all(isinstance(o, fx.Node) for o in operands):
            raise UnclearError
        found: dict[str, Any] = {}
        where: Counter[str] = Counter()
        for letters, operand in zip(inputs.split(","), operands, strict=True):
            for letter, labels, n in zip(
                letters, self._axes[operand], self._values[operand].shape, strict=True
            ):
                where[letter] += 1
                if letter not in found:
                    found[letter] = labels
                elif letter in output:
                    if labels is not None or found[letter] is not None:
                        self.pin(labels, "its channels are the batch of a product")
                        self.pin(found[letter], "its channels are the batch of a product")
                else:
                    self._meet(found[letter], labels, n)
        for letter, labels in found.items():
            if letter not in output and where[letter] == 1:
                self.pin(labels, "its channels are summed")
        return [found[letter] for letter in output]

    def _concatenated(self, node: Any) -> Axes:
        """Channels of one part after those of the other; along all other axes they meet."""
        parts = _given(node, 0, "tensors")
        if isinstance(parts, fx.Node):  # all of a split
            values, axes = list(self._values[parts]), self._axes[parts]
        else:
            values, axes = [self._values[p] for p in parts], [self._axes[p] for p in parts]
        dim = self._number(node, 1, "dim", node.kwargs.get("axis", 0)) % values[0].ndim
        found: Axes = []
        for axis in range(values[0].ndim):
            several = [
                np.full(value.shape[axis], -1) if one[axis] is None else one[axis]
                for one, value in zip(axes, values, strict=True)
            ]
            known = [one[axis] is not None for one in axes]
            if axis == dim:
                found.append(np.concatenate(several) if any(known) else None)
                continue
            for other in several[1:] if any(known) else ():
                self.join(several[0], other, "its channels meet values that stay")
            found.append(several[0] if all(known) else None)
        return found

    def _number(self, node: Any, position: int, name: str, default: Any = _NEEDED) -> int:
        """An argument that is a number."""
        return self._known(_given(node, position, name, default))

    def _known(self, number: Any) -> int:
        """A number that is written out, or computed from sizes."""
        found = self._values.get(number) if isinstance(number, fx.Node) else number
        if not isinstance(found, int):
            raise UnclearError
        return found

    def _padded(self, node: Any, sizes: Any) -> Axes:
        """Constants before and behind what there is, from the last axis on."""
        axes = list(self._axes[_given(node, 0, "input")])
        sizes = [self._known(n) for n in sizes]
        if min(sizes, default=0) < 0:
            raise UnclearError
        for i in range(len(sizes) // 2):
            before, behind = sizes[2 * i : 2 * i + 2]
            labels = axes[-1 - i]
            if labels is not None and (before or behind):
                none = [np.full(n, -1) for n in (before, behind)]
                axes[-1 - i] = np.concatenate([none[0], labels, none[1]])
        return axes

    def _moved_function(self, node: Any, name: str) -> Any:
        if name == "getitem" and not isinstance(self._values[node.args[0]], Tensor):
            return self._axes[node.args[0]][node.args[1]]
        if name in ("float", "half", "to", "type_as", "contiguous", "clone", "detach"):
            return self._axes[node.args[0]]
        if node.op == "call_method":
            found = self._moved(node, lambda x, *a, **k: getattr(x, str(node.target))(*a, **k))
        else:
            found = self._moved(node, node.target)
        self._note_sizes(node, name, found)
        return found

    def _moved(self, node: Any, run: Callable[..., Any]) -> Any:
        """Run an operation on labels: one axis of its inputs after the other."""
        sources = [n for n in node.all_input_nodes if isinstance(self._values.get(n), Tensor)]
        value = self._values[node]
        parts = [value] if isinstance(value, Tensor) else list(value)
        found: list[Axes] = [[None] * part.ndim for part in parts]
        for axis in range(max(self._values[s].ndim for s in sources)):
            given_axes = (self._axes[s] for s in sources)
            if not any(axis < len(a) and a[axis] is not None for a in given_axes):
                continue

            def given(n: fx.Node, axis: int = axis) -> Any:
                known: Any = self._values[n]
                if not isinstance(known, Tensor):
                    return known
                if not known.is_floating_point():
                    return self._constant(n)
                shape = torch.Size(known.shape)
                labels: Any = self._axes[n][axis] if axis < known.ndim else None
                if labels is None:
                    return torch.zeros(shape, dtype=torch.float64)
                along = [1] * known.ndim
                along[axis] = -1
                ids = torch.from_numpy(labels.astype(np.float64) + 1)
                return ids.reshape(along).expand(shape).contiguous()  # or it has no view

            args, kwargs = fx.map_arg((node.args, node.kwargs), given)
            try:
                with torch.no_grad():
                    result = run(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise UnclearError from error
            for axes, ids in zip(
                found, [result] if isinstance(result, Tensor) else result, strict=True
            ):
                self._read(axes, ids)
        return found[0] if isinstance(value, Tensor) else found

    def _constant(self, node: fx.Node) -> Tensor:
        """A tensor of positions or flags, which the graph holds itself."""
        if node.op != "get_attr":
            raise UnclearError
        found: Tensor = operator.attrgetter(str(node.target))(self.gm)
        return found.cpu()

    def _read(self, axes: Axes, ids: Tensor) -> None:
        """Say along which axis labels lie now."""
        first = [ids.narrow(a, 0, 1) for a in range(ids.ndim)]
        varying = [a for a in range(ids.ndim) if bool((ids != first[a]).any())]
        if not varying:  # a single channel, which stays where it is a part of its own
            return
        axis = varying[-1]
        rows = ids.movedim(axis, -1).reshape(-1, ids.shape[axis])
        profile = rows[0].numpy().astype(np.int64) - 1
        if len(varying) > 1:  # split in two: the same channels leave each of the parts
            for row in torch.unique(rows, dim=0).numpy().astype(np.int64) - 1:
                self.join(profile, row, "its channels are split unevenly")
        if axes[axis] is not None:
            self.pin(axes[axis], "two kinds of channels share an axis")
            self.pin(profile, "two kinds of channels share an axis")
        axes[axis] = profile

    def _note_sizes(self, node: Any, name: str, found: Any) -> None:
        """Sizes that are written out in the graph, and change with the channels."""
        if name in _SIZES:
            for axis, labels in enumerate(found):
                if labels is not None:
                    self.places.append((node.name, f"size {axis}", labels))
        elif name in ("split", "chunk"):
            dim = self._number(node, 2, "dim", 0)
            for part, axes in enumerate(found):
                if axes[dim] is not None:
                    self.places.append((node.name, f"part {part}", axes[dim]))
        elif name == "getitem":
            axes = self._axes[node.args[0]]
            for place, axis, one in _indexed(node.args[1], len(axes)):
                labels = axes[axis]
                if labels is None or one == slice(None):
                    continue
                if isinstance(one, slice) and one.step in (None, 1):
                    self.places.append((node.name, f"slice {place}", labels))
                    self.places.append((node.name, "kept", labels[one]))
                else:
                    self.pin(labels, "the forward pass takes a part of its channels")
        elif name not in ("cat", "concat", "stack", "permute", "transpose", "flatten", "unsqueeze"):
            moved = {
                "narrow",
                "select",
                "roll",
                "flip",
                "pad",
                "tile",
                "repeat",
                "repeat_interleave",
                "channel_shuffle",
                "pixel_shuffle",
                "pixel_unshuffle",
                "tensor_split",
            }
            if name in moved:
                for source in node.all_input_nodes:
                    for before in self._flat(source):
                        now = [labels for labels in _every(found) if labels is not None]
                        if before is None:
                            continue
                        if not any(np.array_equal(before, labels) for labels in now):
                            self.pin(before, f"its channels are moved by {name}")

    def _flat(self, node: Any) -> list[np.ndarray | None]:
        """All labels of a node's value."""
        return list(_every(self._axes.get(node)))

    def _unknown(self, node: Any, why: str = "") -> Any:
        """Whatever reaches a node that is not known stays."""
        module = called_module(self.gm, node)
        what = function_name(node) or node.target
        if module is not None:
            what = f"the {type(module).__name__} {node.target!r}, which is not sliced"
        why = why or f"its channels run through {what}"
        for source in node.all_input_nodes:
            for labels in self._flat(source):
                self.pin(labels, why)
        value = self._values.get(node)
        if isinstance(value, Tensor):
            return [None] * value.ndim
        if isinstance(value, (tuple, list)):
            return [[None] * v.ndim if isinstance(v, Tensor) else None for v in value]
        return None


def _given(node: Any, position: int, name: str, default: Any = _NEEDED) -> Any:
    """An argument of a call, by position or by name."""
    found = node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
    if found is _NEEDED:
        raise UnclearError
    return found


def _indexed(index: Any, n_axes: int) -> Iterator[tuple[int, int, Any]]:
    """The parts of an index: which one, of which axis, and what is asked for there."""
    parts = index if isinstance(index, tuple) else (index,)
    axis = 0
    for place, part in enumerate(parts):
        if part is Ellipsis:
            axis = n_axes - sum(p is not None for p in parts[place + 1 :])
        elif part is not None:
            yield place, axis, part
            axis += 1


def _run(roots: np.ndarray) -> int:
    """Largest number of channels whose repetition keeps apart what is not joined; 0 if none."""
    n = len(roots)
    for run in range(len(np.unique(roots)), 1, -1):
        if n % run == 0:
            columns = [set(column.tolist()) for column in roots.reshape(-1, run).T]
            if sum(map(len, columns)) == len(set().union(*columns)):
                return run
    return 0


def _every(axes: Any) -> Iterable[np.ndarray | None]:
    """All labels in nested lists."""
    if isinstance(axes, np.ndarray) or axes is None:
        yield axes
    else:
        for part in axes:
            yield from _every(part)


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a tensor, or a tuple of them."""
    if isinstance(value, (tuple, list)):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


class _Shapes(fx.Interpreter):
    """Runs a network and keeps every value, on the meta device."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Keep what a node gives."""
        value = super().run_node(n)
        self.values[n] = _shape_only(value)
        return value


def _shape_only(value: Any) -> Any:
    """A value without data."""
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return (
            type(value)(map(_shape_only, value))
            if type(value) in (tuple, list)
            else [_shape_only(v) for v in value]
        )
    return value


def _values(gm: fx.GraphModule, example: Tensor) -> dict[Any, Any]:
    """The value of each node for two samples, without data."""
    x = example.detach()[:1]
    with torch.no_grad():
        try:
            twin: Any = on_meta(gm)
            run = _Shapes(twin)
            run.run(x.to("meta").expand(2, *x.shape[1:]))
            nodes = dict(zip(twin.graph.nodes, gm.graph.nodes, strict=True))
            return {nodes[node]: value for node, value in run.values.items()}
        except Exception:  # no form of it on the meta device
            run = _Shapes(gm)
            run.run(x.expand(2, *x.shape[1:]).clone())
            return run.values
