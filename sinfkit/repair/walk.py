"""A layer under repair: what its output runs into, and how its inputs and outputs are sampled."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..graph.nodes import (
    CONVOLUTIONS,
    LAYERS,
    Convolution,
    Layer,
    called_module,
    is_addition,
    is_identity,
    is_layer,
    is_shape_query,
)
from ..slicing.channels import Sliced
from .ridge import double

__all__ = ["Lockstep"]

Side = Literal["dense", "sliced"]


@dataclass
class _Value:
    """A node's value in both networks, in chunks; one and the same list where they agree."""

    dense: list[Any] = field(default_factory=list)
    sliced: list[Any] = field(default_factory=list)


class Lockstep:
    """A walk over two networks that have the same graph; only weights and widths differ.

    Each node of `nodes`, those of the sliced network without its output, is to be passed in order:
    by `run`, or by `advance` for the dense network and then for the sliced one. Values are held in
    chunks of images (`images`), which are the first `n_images` of X; others may `join` later.
    """

    def __init__(
        self,
        dense: fx.GraphModule,
        sliced: fx.GraphModule,
        X: Tensor,
        X_sliced: Tensor,
        batch_size: int,
        n_images: int | None = None,
    ) -> None:
        self.sliced = sliced
        self._X, self._batch_size = {"dense": X, "sliced": X_sliced}, batch_size
        self._networks = {"dense": dense, "sliced": sliced}
        self._interpreters = {side: fx.Interpreter(gm) for side, gm in self._networks.items()}
        self._twins = twins(dense, sliced)
        self.nodes = [node for node in sliced.graph.nodes if node.op != "output"]
        self.images: list[slice] = []
        self._inputs = _Value()
        if X_sliced is X:
            self._inputs.sliced = self._inputs.dense
        self._values: dict[fx.Node, _Value] = {}
        self._passed: list[fx.Node] = []
        self._same: set[fx.Node] = set()  # of these, where both networks had the same value
        self._calls = Counter(node.target for node in self.nodes if node.op == "call_module")
        last_use = {source: node for node in self.nodes for source in node.all_input_nodes}
        self._finished_by: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for source, node in last_use.items():
            self._finished_by[node].append(source)
        self.join(len(X) if n_images is None else n_images)

    @property
    def n_images(self) -> int:
        """How many images take part."""
        return self.images[-1].stop if self.images else 0

    def join(self, n_images: int) -> None:
        """Let more images take part, `n_images` in all: they pass what the others have passed.

        Where values are large, few can; a repair that takes them up later still sees them all.
        """
        while (start := self.n_images) < n_images:
            self.images.append(slice(start, min(start + self._batch_size, n_images)))
            inputs = {side: X[self.images[-1]] for side, X in self._X.items()}
            self._inputs.dense.append(inputs["dense"])
            if self._inputs.sliced is not self._inputs.dense:
                self._inputs.sliced.append(inputs["sliced"])
            held: dict[Side, dict[fx.Node, Any]] = {"dense": {}, "sliced": {}}
            for node in self._passed:
                for side, values in held.items():
                    if node.op == "placeholder":
                        values[node] = inputs[side]
                    elif side == "sliced" and node in self._same:
                        values[node] = held["dense"][node]
                    else:
                        values[node] = self._compute(node, side, values)
                for source in self._finished_by[node]:
                    for values in held.values():
                        del values[source]
            for node, value in self._values.items():
                if value is not self._inputs:
                    value.dense.append(held["dense"][node])
                    if value.sliced is not value.dense:
                        value.sliced.append(held["sliced"][node])

    def layer(self, node: fx.Node) -> Layer | None:
        """The sliced network's layer that a node calls, if it calls one."""
        module = called_module(self.sliced, node)
        if isinstance(module, LAYERS) and is_layer(module):
            return module
        return None

    def module(self, node: fx.Node, side: Side) -> nn.Module | None:
        """The module that a node (of the sliced network) calls, in one of the networks."""
        return called_module(self._networks[side], self._own(node, side))

    def called_once(self, node: fx.Node) -> bool:
        """Whether no other node calls the module that a node calls."""
        return self._calls[node.target] == 1

    def agree(self, node: fx.Node) -> bool:
        """Whether both networks are known to have the same value at a node."""
        value = self._values[node]
        return value.dense is value.sliced

    def inputs_agree(self, node: fx.Node) -> bool:
        """Whether both networks are known to have the same inputs at a node."""
        return all(self.agree(source) for source in node.all_input_nodes)

    def known(self, node: fx.Node) -> bool:
        """Whether a node's value has been computed and is still held."""
        return node in self._values

    def value(self, node: fx.Node, side: Side, chunk: int) -> Any:
        """One chunk of a value that is held."""
        return getattr(self._values[node], side)[chunk]

    def run(self, node: fx.Node) -> None:
        """Compute a node in both networks."""
        if node.op == "placeholder":
            self._values[node] = self._inputs
            self._passed.append(node)
            if self.agree(node):
                self._same.add(node)
        elif self.inputs_agree(node) and self._same_operation(node):
            for _ in self.advance(node, "sliced"):
                pass
            self._values[node].dense = self._values[node].sliced
            self._same.add(node)
        else:
            for _ in zip(self.advance(node, "dense"), self.advance(node, "sliced"), strict=True):
                pass

    def advance(self, node: fx.Node, side: Side) -> Iterator[tuple[int, Any]]:
        """Compute a node in one network; yield the chunk's number and value.

        Inputs that are not used again are dropped chunk by chunk, those of `side` only.
        """
        chunks = getattr(self._values.setdefault(node, _Value()), side)
        finished = [
            source
            for source in self._finished_by[node]
            if side == "sliced" or not self.agree(source)  # else the sliced network needs it, too
        ]
        for i in range(len(self.images)):
            inputs = {source: self.value(source, side, i) for source in node.all_input_nodes}
            chunks.append(self._compute(node, side, inputs))
            del inputs
            for source in finished:
                getattr(self._values[source], side)[i] = None
            yield i, chunks[i]
        if side == "sliced":
            for source in finished:
                del self._values[source]
            self._passed.append(node)

    def amend(self, node: fx.Node, change: Callable[[Tensor], Tensor]) -> None:
        """Change the value that the sliced network has at a node."""
        chunks = self._values[node].sliced
        for i, value in enumerate(chunks):
            chunks[i] = change(value)

    def _compute(self, node: fx.Node, side: Side, inputs: Mapping[fx.Node, Any]) -> Any:
        """A node's value in one of the networks, from those of the nodes that it reads."""
        own = self._own(node, side)
        if side == "dense":
            inputs = {self._twins[source]: inputs[source] for source in node.all_input_nodes}
        args, kwargs = fx.map_arg((own.args, own.kwargs), inputs.__getitem__)
        return getattr(self._interpreters[side], own.op)(own.target, args, kwargs)

    def _own(self, node: fx.Node, side: Side) -> fx.Node:
        """A node's counterpart in one of the networks."""
        return node if side == "sliced" else self._twins[node]

    def _same_operation(self, node: fx.Node) -> bool:
        """Whether a node computes the same in both networks from the same inputs."""
        if node.op == "get_attr":
            dense, sliced = (
                self._interpreters[side].get_attr(self._own(node, side).target, (), {})
                for side in ("dense", "sliced")
            )
            return dense is sliced or _equal([dense], [sliced])
        if node.op == "call_module":
            dense, sliced = self.module(node, "dense"), self.module(node, "sliced")
            return _equal(_tensors(dense), _tensors(sliced))
        return True


def graph_of(sliced: Sliced) -> fx.GraphModule:
    """The graph of a sliced network."""
    if not isinstance(sliced.model, fx.GraphModule):
        raise TypeError(
            f"sliced.model must be a torch.fx.GraphModule, got {type(sliced.model).__name__}: "
            "slice a traced network."
        )
    return sliced.model


def twins(dense: fx.GraphModule, sliced: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """From each node of the sliced network to that of the dense one."""
    nodes = [list(gm.graph.nodes) for gm in (dense, sliced)]
    described = [[(node.op, node.name, str(node.target)) for node in side] for side in nodes]
    if described[0] != described[1]:
        here = next((b for a, b in zip(*described, strict=False) if a != b), "the number of nodes")
        raise ValueError(
            f"The dense and the sliced network have different graphs, first at {here}. Both must "
            "be traced from the same model, and cut at the same place."
        )
    if [node.op for node in nodes[1]].count("placeholder") != 1:
        raise ValueError("The networks must have one input, a tensor.")
    for gm in (dense, sliced):
        training = [name for name, module in gm.named_modules() if module.training]
        if training:
            raise ValueError(
                f"The networks must be in evaluation mode, but {training[0] or 'one'!r} is in "
                "training mode. Call eval()."
            )
    return dict(zip(nodes[1], nodes[0], strict=True))


def _tensors(module: nn.Module | None) -> list[Any]:
    """All parameters and buffers of a module."""
    return [] if module is None else [*module.parameters(), *module.buffers()]


def _equal(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether tensors are the same or hold the same numbers."""
    return len(ours) == len(theirs) and all(
        a is b or (isinstance(a, Tensor) and a.shape == b.shape and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


_TINY = 1e-3  # batch-norm scales that are not divided by, relative to the layer's largest


@dataclass
class Site:
    """A layer of the sliced network, and what its output runs into.

    `kept`: the dense layer's channels that it still has; `norm`: the batch-norm that alone consumes
    it, `gain` what that multiplies each channel with; `other`: the value that it is added to, where
    that is known by now.
    """

    walk: Lockstep
    node: fx.Node
    layer: Layer
    kept: Tensor
    norm: _BatchNorm | None = None
    other: fx.Node | None = None

    def __post_init__(self) -> None:
        self.gain = torch.ones_like(double(self.kept))
        if self.norm is not None:
            assert self.norm.running_var is not None
            self.gain = (double(self.norm.running_var) + self.norm.eps).rsqrt()
            if self.norm.weight is not None:
                self.gain = self.gain * double(self.norm.weight)
        self._faint = self.gain.abs() <= _TINY * self.gain.abs().max()
        self._gap_sum = torch.zeros_like(self.gain)
        self._n_positions = 0

    @property
    def axis(self) -> int:
        """Axis of the channels in the layer's output."""
        return 1 if isinstance(self.layer, CONVOLUTIONS) else -1

    def along_channels(self, values: Tensor, like: Tensor) -> Tensor:
        """One number per channel, shaped to be broadcast over an output of the layer."""
        shape = [1] * like.ndim
        shape[self.axis] = -1
        return values.to(like).reshape(shape)

    def targets(self, dense: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """What the dense layer gave at the kept channels (own), and what this one should give.

        The target makes up for the error of the value that it will be added to. Where the
        batch-norm's gain is next to nothing, that would take a huge correction: there `install`
        corrects only the mean of the sum.
        """
        own = dense.index_select(self.axis, self.kept)
        if self.other is None:
            return own, own
        other = self.walk.value(self.other, "dense", chunk)
        theirs = self.walk.value(self.other, "sliced", chunk)
        if other.shape != dense.shape or theirs.shape != own.shape:  # broadcast
            self.other = None
            return own, own
        gap = other.index_select(self.axis, self.kept) - theirs
        self._gap_sum += double(gap.movedim(self.axis, -1).flatten(0, -2).sum(0))
        self._n_positions += gap.numel() // len(self.kept)
        inverse = torch.where(self._faint, 0.0, 1 / self.gain)
        return own, own + gap * self.along_channels(inverse, gap)

    def install(self, weight: Tensor, shift: Tensor) -> bool:
        """Give the layer a new weight and shift its output, one number per channel; as new tensors.

        Returns whether the layer's own output is shifted; else a batch-norm's running mean is.
        """
        norm = self.norm
        if norm is not None and norm.bias is not None and self.other is not None:
            lift = torch.where(self._faint, self._gap_sum / self._n_positions, 0.0)
            norm.bias = _parameter(norm.bias + lift.to(norm.bias), norm.bias)
        return install(self.layer, norm, weight, shift)


def find_site(walk: Lockstep, node: fx.Node, layer: Layer, kept: np.ndarray | None) -> Site:
    """Look at what follows the layer that a node calls, which the walk is about to pass.

    `kept`: the dense layer's channels that it still has; None for all.
    """
    dense = walk.module(node, "dense")
    assert isinstance(dense, LAYERS)
    kept = checked_support(str(node.target), kept, dense, layer)
    place, consumer = node, _only_consumer(node)
    norm = None
    if consumer is not None:
        norm = _foldable_norm(walk, node, consumer)
        if norm is not None:
            place, consumer = consumer, _only_consumer(consumer)
    while consumer is not None and is_identity(walk.sliced, consumer):
        place, consumer = consumer, _only_consumer(consumer)
    other = None
    if consumer is not None and is_addition(consumer) and not consumer.kwargs:
        other = next((source for source in consumer.all_input_nodes if source is not place), place)
        # Where it is known it is held until the sum; what it is the same as may be let go before.
        while not walk.known(other) and is_identity(walk.sliced, other):
            other = other.all_input_nodes[0]
        other = other if walk.known(other) else None
    return Site(walk, node, layer, torch.as_tensor(kept, device=layer.weight.device), norm, other)


def checked_support(name: str, kept: np.ndarray | None, dense: Layer, sliced: Layer) -> np.ndarray:
    """The dense layer's channels that a sliced layer still has; all of them if `kept` is None."""
    n_dense, n_sliced = len(dense.weight), len(sliced.weight)
    kept = np.arange(n_dense) if kept is None else np.asarray(kept)
    if kept.shape != (n_sliced,) or kept.min() < 0 or kept.max() >= n_dense:
        raise ValueError(
            f"support of {name!r} must be {n_sliced} channels below {n_dense}, one for each "
            f"channel of the sliced layer; got {kept}."
        )
    return kept


def install(layer: Layer, norm: _BatchNorm | None, weight: Tensor, shift: Tensor) -> bool:
    """Give a layer a new weight and shift its output, with tensors of their own.

    Returns whether the layer's own output is shifted (one number per channel); else the running
    mean of the batch-norm that alone consumes it is.
    """
    layer.weight = _parameter(weight, layer.weight)
    if layer.bias is None and norm is not None:
        assert norm.running_mean is not None
        norm.running_mean = norm.running_mean - shift.to(norm.running_mean)
        return False
    bias = shift if layer.bias is None else double(layer.bias) + shift
    layer.bias = _parameter(bias, layer.weight)
    return True


def _foldable_norm(walk: Lockstep, node: fx.Node, consumer: fx.Node) -> _BatchNorm | None:
    """The batch-norm that a node calls, if it only scales and shifts a layer's channels."""
    norm = walk.module(consumer, "sliced")
    if (
        not isinstance(norm, _BatchNorm)
        or norm.running_var is None
        or not walk.called_once(consumer)
    ):
        return None
    inputs = walk.value(node.all_input_nodes[0], "sliced", 0)
    per_feature = isinstance(walk.layer(node), CONVOLUTIONS) or inputs.ndim == 2
    return norm if per_feature else None


def sample(values: Tensor, layer: Layer, where: Tensor) -> Tensor:
    """Take a layer's outputs at some positions: of shape (n, n_drawn, n_channels).

    `where`, of shape (n, n_drawn), counts through the maps and their positions of each of n images.
    """
    if isinstance(layer, CONVOLUTIONS):
        return values.movedim(1, -1)[_places(where, len(values), values.shape[2:])]
    images = torch.arange(len(where), device=where.device)[:, None]
    return values.reshape(len(where), -1, values.shape[-1])[images, where]


def sample_patches(values: Tensor, layer: Layer, where: Tensor) -> Tensor:
    """Take what a layer multiplies with its weights, at some positions of its OUTPUT (`sample`).

    Of shape (n, n_drawn, n_inputs x kernel cells), in the order of the weights. Only what is
    sampled is copied.
    """
    if isinstance(layer, nn.Linear):
        return sample(values, layer, where)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    values = F.pad(values, padding(layer), mode=mode)
    n_axes = len(layer.kernel_size)
    for axis in range(n_axes):
        step = layer.dilation[axis]
        extent = step * (layer.kernel_size[axis] - 1) + 1
        values = values.unfold(2 + axis, extent, layer.stride[axis])[..., ::step]
    places = _places(where, len(values), values.shape[2 : 2 + n_axes])
    return values.movedim(1, 1 + n_axes)[places].flatten(2)


def output_size(layer: Convolution, size: Sequence[int]) -> list[int]:
    """Size of a convolution's output along each axis, from that of its input."""
    sides, found = padding(layer), []
    for axis, length in enumerate(size):
        extent = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        at = 2 * (len(size) - 1 - axis)
        found.append((length + sides[at] + sides[at + 1] - extent) // layer.stride[axis] + 1)
    return found


def padding(layer: Convolution) -> list[int]:
    """Padding of a convolution before and behind each axis, the last axis first."""
    if not isinstance(layer.padding, str):
        return [n for n in reversed(layer.padding) for _ in range(2)]
    if layer.padding == "valid":
        return [0, 0] * len(layer.kernel_size)
    sides = []
    for step, size in zip(reversed(layer.dilation), reversed(layer.kernel_size), strict=True):
        total = step * (size - 1)
        sides += [total // 2, total - total // 2]
    return sides


def _places(where: Tensor, n_maps: int, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Map and position along each axis, of positions that are counted image by image."""
    first = torch.arange(0, n_maps, n_maps // len(where), device=where.device)[:, None]
    along = []
    for n in reversed(sizes):
        along.append(where % n)
        where = where // n
    return (first + where, *reversed(along))


def _only_consumer(node: fx.Node) -> fx.Node | None:
    """The only node that uses the values of another, not just its shape."""
    consumers = [user for user in node.users if not is_shape_query(user)]
    return consumers[0] if len(consumers) == 1 else None


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    """A new parameter, of the kind of another."""
    return nn.Parameter(value.to(like).contiguous(), requires_grad=like.requires_grad)
