"""Closed-form repair of a physically sliced network: no gradients, no labels, a few images.

Slicing filters out of a network shifts and distorts what every later layer receives. Given
calibration images, each remaining layer can be corrected against the dense network, front to
back, with linear algebra alone. Nothing here is from the SINF paper, which leaves a subgraph as
it was sliced (that is ``method="none"``); the corrections are this package's choice:

``"mean"``
    What was removed contributed a constant on average: it goes into the bias.
``"match"``
    Each kept channel gets back its dense mean and standard deviation (REPAIR, Jordan et al.,
    ICLR 2023, with the dense network as reference).
``"least_squares"``
    Each layer is refitted, by ridge regression towards its old weights, to the dense layer's
    output from the inputs that it really gets in the sliced network (asymmetric reconstruction:
    Zhang et al., TPAMI 2016; He et al., ICCV 2017).
``"static_least_squares"``
    The same for the inputs that stay of those that it had in the dense network, see
    `sinfkit.repair.static`. The sliced network is never run.

For the others, both networks are walked side by side, one node at a time, so every layer's inputs
are computed exactly once and already carry the repairs in front of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..errors import SlicingWarning
from ..graph.nodes import CONVOLUTIONS, samples_of
from ..slicing.channels import Sliced
from ..utils.params import warn
from .moments import gather_moments
from .ridge import double, fit_ridge
from .static import shrunk_layers, static_least_squares
from .walk import Lockstep, Site, find_site, graph_of, sample, sample_patches

__all__ = ["REPAIRS", "RepairSettings", "affordable_images", "repair"]

REPAIRS = ("none", "mean", "match", "least_squares", "static_least_squares")
ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)

_HELD_OUT = 0.2  # of the images
_MIN_ROWS = 20_000
_FEWEST = 16  # images that take part, however large they are
_RATIOS = (1 / 3, 3.0)  # to which "match" clips what it multiplies a channel with
_CONSTANT = 1e-12  # a variance below this much of the mean square is rounding


@dataclass(frozen=True)
class RepairSettings:
    """How `repair` corrects a network."""

    method: str = "least_squares"
    max_rows: int | None = None
    alphas: Sequence[float] = ALPHAS
    batch_size: int = 256
    seed: int = 0
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.method not in REPAIRS:
            raise ValueError(f"method must be one of {', '.join(REPAIRS)}; got {self.method!r}.")
        if not self.alphas or min(self.alphas) <= 0:
            raise ValueError(f"alphas must be positive numbers, at least one; got {self.alphas!r}.")
        for name, value in (
            ("max_rows", self.max_rows),
            ("batch_size", self.batch_size),
            ("max_bytes", self.max_bytes),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value!r}.")

    def rows_of(self, n_images: int) -> int:
        """Positions per layer."""
        return max(_MIN_ROWS, 5 * n_images) if self.max_rows is None else self.max_rows


@torch.inference_mode(False)
@torch.no_grad()
def repair(
    dense: fx.GraphModule,
    sliced: Sliced,
    X: Tensor,
    settings: RepairSettings = RepairSettings(),  # noqa: B008 (frozen)
    *,
    X_sliced: Tensor | None = None,
    sample_weight: np.ndarray | None = None,
) -> dict[str, float]:
    """Correct the layers of a sliced network against the dense one, in place.

    Parameters
    ----------
    dense : torch.fx.GraphModule
        The network before slicing, traced, in evaluation mode. Not changed.
    sliced : Sliced
        The same graph with filters removed. Its model is corrected in place, but only by giving its
        modules new parameters and buffers: tensors shared with other networks are never written
        to. It may be half of a network, if `dense` is that half.
    X : Tensor of shape (n_images, ...)
        Calibration input of `dense`, normalised and on its device. Labels are not needed.
        Activations are held for one or two layers at a time, in both networks, within
        ``settings.max_bytes`` where 16 images need no more: an early layer, whose maps are large,
        may see fewer images than a late one.
    settings : RepairSettings
    X_sliced : Tensor of shape (n_images, ...), default=None
        Input of the sliced network where it differs from `X`, for the same images (a sliced prefix
        in front). None: `X`. The static form does not look at it.
    sample_weight : ndarray of shape (n_images,), optional
        How many times each image counts, larger than 0. Default: once.

    Returns
    -------
    dict of str to float
        Layer name to what remains of its error after the repair: ``||Y - Yhat||^2 / ||Y - mean
        Y||^2``, summed over channels, where Y is the dense layer's output (behind its batch-norm,
        before the non-linearity) at the kept channels. 0 where nothing differs. For least
        squares on the held-out images, otherwise on all. The static form predicts it, see
        `sinfkit.repair.static_least_squares`.

    Raises
    ------
    ValueError
        If the graphs do not correspond, a network is in training mode, or the inputs do not fit.

    Warns
    -----
    UserWarning
        For layers that are used more than once or have reparametrised weights: left as sliced.

    Notes
    -----
    Least squares solves, per layer, with kept-channel patches X and dense outputs Y, both centred::

        W = W0 + ((X'X + a I)^-1 X'(Y - X W0'))',  a = alpha mean(diag X'X),  b = mean Y - W mean X

    The bias goes into the layer, or into the running mean of a batch-norm behind a layer without
    bias. At a residual addition, the branch that is executed last is fitted to the dense sum minus
    the other, already sliced, operand.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from sinfkit.graph import trace
    >>> from sinfkit.repair import repair
    >>> from sinfkit.slicing import slice_channels
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval().requires_grad_(False)
    >>> net[0].weight[2] = net[0].weight[0] + net[0].weight[1]  # redundant: remove it
    >>> dense, X = trace(net), torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> sliced = slice_channels(dense, X[:1], {"0": [0, 1]})
    >>> errors = repair(dense, sliced, X)
    >>> bool((dense(X) - sliced.model(X)).abs().max() < 1e-3)
    True
    """
    X_sliced = X if X_sliced is None else X_sliced
    if len(X) == 0 or len(X) != len(X_sliced):
        raise ValueError(
            f"X and X_sliced must hold the same images, at least one; got {len(X)} and "
            f"{len(X_sliced)}."
        )
    if sample_weight is not None and sample_weight.shape != (len(X),):
        raise ValueError(
            f"sample_weight must hold one number for each of the {len(X)} images; got shape "
            f"{sample_weight.shape}."
        )
    weight = torch.as_tensor(np.ones(len(X)) if sample_weight is None else sample_weight)
    if settings.method == "static_least_squares":
        return _from_moments(dense, sliced, X, settings, weight)
    walk = Lockstep(dense, graph_of(sliced), X, X_sliced, settings.batch_size, 0)
    affordable = _affordable(dense, walk.sliced, X, X_sliced, settings.max_bytes)
    walk.join(min(affordable.values()))
    rows = _Rows(walk.n_images, settings, weight)
    errors: dict[str, float] = {}
    skipped: list[str] = []
    for node in walk.nodes:
        name = str(node.target)
        layer = walk.layer(node)
        # Along channels: other positions than the dense one.
        if layer is None or name in sliced.along or name in sliced.left_out:
            walk.run(node)
            continue
        if affordable[node.name] > walk.n_images:
            walk.join(affordable[node.name])
            rows = _Rows(walk.n_images, settings, weight)
        site = find_site(walk, node, layer, sliced.support.get(name))
        if walk.inputs_agree(node) and (site.other is None or walk.agree(site.other)):
            walk.run(node)
            errors[name] = 0.0
        elif not walk.called_once(node):
            walk.run(node)
            skipped.append(name)
        else:
            errors[name] = _corrected(site, settings, rows, weight)
    if skipped and settings.method != "none":
        warn(
            f"Layers that are used more than once stay as they were sliced: "
            f"{', '.join(dict.fromkeys(skipped))}.",
            SlicingWarning,
        )
    return errors


def _from_moments(
    dense: fx.GraphModule,
    sliced: Sliced,
    X: Tensor,
    settings: RepairSettings,
    weight: Tensor,
) -> dict[str, float]:
    """Refit from the moments of the dense network; the sliced one is not run."""
    moments = gather_moments(
        dense,
        shrunk_layers(dense, graph_of(sliced)),
        X.split(settings.batch_size),
        n_images=len(X),
        max_rows=settings.rows_of(len(X)),
        seed=settings.seed,
        sample_weight=weight,
    )
    return static_least_squares(dense, sliced, moments)


def _corrected(site: Site, settings: RepairSettings, rows: _Rows, weight: Tensor) -> float:
    """Pass a layer and correct it; return what is left of its error."""
    name = str(site.node.target)
    if site.layer is site.walk.module(site.node, "dense"):
        raise ValueError(
            f"The layer {name!r} is one module in both networks, so a repair would change the "
            "dense one as well. Trace the sliced network from a copy."
        )
    if settings.method == "least_squares":
        error = _least_squares(site, rows, settings.alphas)
    else:
        error = _match_moments(site, settings.method, weight)
    if not math.isfinite(error):
        raise ValueError(
            f"The inputs or outputs of the layer {name!r} are not finite numbers. Look for NaN or "
            "infinity in X and in the networks' weights."
        )
    return error


def _affordable(
    dense: fx.GraphModule, sliced: fx.GraphModule, X: Tensor, X_sliced: Tensor, max_bytes: int
) -> dict[str, int]:
    """How many images may take part at each node, by its name: never fewer than before."""
    sizes = [_Sizes(dense), _Sizes(sliced)]
    with torch.inference_mode():
        sizes[0].run(X[:1])
        sizes[1].run(X_sliced[:1])
    nodes = list(sliced.graph.nodes)
    last_use = {source: i for i, node in enumerate(nodes) for source in node.all_input_nodes}
    n_bytes = [sum(side.of.get(node.name, 0) for side in sizes) for node in nodes]
    held = np.zeros(len(nodes))
    for i, node in enumerate(nodes):
        held[i : last_use.get(node, i) + 1] += n_bytes[i]
    most = np.clip(max_bytes // np.maximum(held, 1), min(_FEWEST, len(X)), len(X)).astype(int)
    most = np.minimum.accumulate(most[::-1])[::-1]  # what is let in stays
    return {node.name: int(n) for node, n in zip(nodes, most, strict=True)}


def affordable_images(
    graph: fx.GraphModule, example: Tensor, wanted: int, max_bytes: int = 2 * 2**30
) -> int:
    """How many of the wanted images a repair may take, at least 64.

    One layer's values of all of them stay within `max_bytes`. `example`: one input, (1, ...).
    """
    values = _Sizes(graph)
    with torch.inference_mode():
        values.run(example)
    return min(wanted, max(64, max_bytes // max(*values.of.values(), 1)))


class _Sizes(fx.Interpreter):
    """Runs a network and notes the sizes of its values, in bytes, by name of the node."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.of: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "get_attr":
            self.of[n.name] = value.numel() * value.element_size()
        return value


def _match_moments(site: Site, method: str, weight: Tensor) -> float:
    """Pass a layer whose channels are scaled and shifted (or left alone); return its error."""
    walk, layer = site.walk, site.layer
    sums = torch.zeros(7, len(site.kept), dtype=torch.float64, device=site.gain.device)
    n = 0.0
    both = zip(walk.advance(site.node, "dense"), walk.advance(site.node, "sliced"), strict=True)
    for (chunk, dense), (_, now) in both:
        own, target = site.targets(dense, chunk)
        axes = [axis for axis in range(now.ndim) if axis != site.axis % now.ndim]
        products = (own, own * own, now, now * now, target, target * target, target * now)
        counts = weight[walk.images[chunk]]
        samples, parts = samples_of(site.node)
        shape = [1] * now.ndim
        shape[samples] = -1
        along = counts.to(now).repeat_interleave(parts).reshape(shape)
        sums += torch.stack([_total(product * along, axes) for product in products])
        n += now.numel() // (len(counts) * len(site.kept)) * float(counts.sum())
    own, own2, now, now2, target, target2, cross = sums / n

    ratio, shift = torch.ones_like(own), torch.zeros_like(own)
    if method == "match":
        variance, wanted = now2 - now.square(), own2 - own.square()
        ratio = (wanted.clamp(min=0) / variance).sqrt().clamp(*_RATIOS)
        ratio = torch.where(variance > _CONSTANT * (now2 + own2), ratio, 1.0)
    if method != "none":
        shift = target - ratio * now
        bias = 0.0 if layer.bias is None else double(layer.bias)
        scaled = double(layer.weight) * ratio.reshape(-1, *[1] * (layer.weight.ndim - 1))
        here = site.install(scaled, shift + (ratio - 1) * bias)
        added = shift if here else torch.zeros_like(shift)
        walk.amend(
            site.node,
            lambda y: y * site.along_channels(ratio, y) + site.along_channels(added, y),
        )
    square = target2 + ratio**2 * now2 + shift**2
    square += 2 * (ratio * shift * now - ratio * cross - shift * target)
    gain = site.gain.square()
    return _relative(
        float((square * gain).sum()),
        float(((target2 - target.square()) * gain).sum()),
        float((target2 * gain).sum()),
    )


def _least_squares(site: Site, rows: _Rows, alphas: Sequence[float]) -> float:
    """Pass a layer whose weights are refitted; return its error on the held-out images."""
    layer = site.layer
    X, Y = _gather(site, rows)
    n_groups, n_rows, _ = X.shape
    n_train = n_rows * rows.n_train // len(rows.place)
    weight = site.gain.square().reshape(n_groups, -1)
    held = Y[:, n_train:] if n_train < n_rows else Y
    counts = rows.counts(n_rows).to(Y.device)
    own = counts[-held.shape[1] :].to(held)
    centred = held - (own @ held / own.sum())[:, None]
    spread, power = (float((double(own @ y.square()) * weight).sum()) for y in (centred, held))
    del centred

    old = layer.weight.reshape(n_groups, -1, X.shape[2])
    Y -= X @ old.to(X).mT
    if layer.bias is not None:
        Y -= layer.bias.to(Y).reshape(n_groups, 1, -1)
    fit = fit_ridge(X, Y, n_train, alphas, weight, counts)
    del X, Y, held
    site.install((double(old) + fit.coef.mT).reshape(layer.weight.shape), fit.intercept.flatten())
    for _ in site.walk.advance(site.node, "sliced"):
        pass
    return _relative(fit.error, spread, power)


def _gather(site: Site, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Pass a layer in the dense network; return inputs and targets, held-out images last.

    Of shape (groups, rows, inputs of a group) and (groups, rows, outputs of a group).
    """
    walk, layer = site.walk, site.layer
    n_groups = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
    widths = n_groups * layer.weight[0].numel(), len(layer.weight)
    where, gathered = torch.empty(0), []
    for chunk, dense in walk.advance(site.node, "dense"):
        _, target = site.targets(dense, chunk)
        source = site.node.all_input_nodes[0]
        inputs = walk.value(source, "sliced", chunk).movedim(samples_of(source)[0], 0)
        target = target.movedim(samples_of(site.node)[0], 0)
        place = rows.place[walk.images[chunk]]
        if chunk == 0:
            where = rows.draw(target.numel() // (len(place) * len(site.kept))).to(target.device)
            dtype = torch.promote_types(target.dtype, torch.float32)
            gathered = [target.new_empty(*where.shape, width, dtype=dtype) for width in widths]
        here = where[walk.images[chunk]]
        gathered[0][place] = sample_patches(inputs, layer, here).to(dtype)
        gathered[1][place] = sample(target, layer, here).to(dtype)
    X, Y = (part.flatten(0, 1).unflatten(1, (n_groups, -1)).transpose(0, 1) for part in gathered)
    return X, Y


class _Rows:
    """Which positions of which images enter a regression, and which images are held out."""

    def __init__(self, n_images: int, settings: RepairSettings, weight: Tensor) -> None:
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._per_image = max(1, settings.rows_of(n_images) // n_images)
        # Place of each image in the regression; the last ones are held out.
        self.place = torch.randperm(n_images, generator=self._generator)
        self.n_train = n_images - round(_HELD_OUT * n_images)
        self._weight = weight[:n_images]

    def counts(self, n_rows: int) -> Tensor:
        """How many times each row of the regression counts."""
        placed = torch.empty_like(self._weight).index_copy_(0, self.place, self._weight)
        return placed.repeat_interleave(n_rows // len(placed))

    def draw(self, n_positions: int) -> Tensor:
        """Positions for each image, of shape (n_images, n_drawn)."""
        shape = len(self.place), n_positions
        if n_positions <= self._per_image:
            return torch.arange(n_positions).expand(shape)
        order = torch.rand(shape, generator=self._generator)
        return order.topk(self._per_image, dim=1).indices


def _total(values: Tensor, axes: list[int]) -> Tensor:
    """Sum over axes, in float64."""
    return (values.cpu() if values.device.type == "mps" else values).sum(axes, dtype=torch.float64)


def _relative(error: float, spread: float, power: float) -> float:
    """An error relative to a spread, which rounding keeps from being exactly zero."""
    floor = max(_CONSTANT * power, torch.finfo(torch.float64).tiny)
    return max(error, 0.0) / max(spread, floor)
