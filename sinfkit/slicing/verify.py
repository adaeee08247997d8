"""Comparison of sliced networks with masked ones.

A mask sets a removed channel to zero where it is consumed, at the input of a layer. Zero after a
batch-norm would not do: a residual sum, or a batch-norm before the convolution, fills it again.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import SlicingError
from ..graph.nodes import CONVOLUTIONS
from ..graph.tracing import copy_sharing_weights, looks_up, trace
from ..utils.device import full_float32
from .channels import ChannelGroup, Sliced, narrow, take_out

# Rounding moves outputs by about 1e-6 of their largest value, a wrong index by about 1. In between
# lie weak dependencies between channels (local response normalisation), to be noticed as well.
_TRIAL_TOLERANCE = 3e-5


def try_groups(model: nn.Module, groups: Sequence[ChannelGroup], example: Tensor) -> dict[str, str]:
    """Slice half of every group; give the reasons of those that do not equal the mask."""
    rng = np.random.default_rng(0)
    x = precision(model, example[:1])
    # An example may be blank; noise as strong as it varies wakes the channels. Not numbers of rows.
    noise = torch.from_numpy(rng.standard_normal((2, *example.shape[1:]))).to(x)
    numbers = looks_up(model) and bool((x == x.round()).all())
    x = x + (0.0 if numbers else float(x.std(correction=0)) or 1.0) * noise
    dense = Comparison(model, Sliced(model, {}, {}))
    with exact_inference(x):
        if not torch.isfinite(run(dense.masked, x.clone())).all():
            raise ValueError(
                "The model gives values that are not finite: check its weights and the scale of X."
            )
    halves = {group.name: _half(group, rng) for group in groups}
    reasons: dict[str, str] = {}
    accepted: list[ChannelGroup] = []

    def settle(candidates: Sequence[ChannelGroup]) -> None:
        """Accept the candidates if they pass together; else look for those that do not."""
        if not candidates:
            return
        tried = [(group, halves[group.name]) for group in (*accepted, *candidates)]
        why = _trial(model, tried, x)
        if not why:
            accepted.extend(candidates)
        elif len(candidates) == 1:
            reasons[candidates[0].name] = why
        else:
            settle(candidates[: len(candidates) // 2])
            settle(candidates[len(candidates) // 2 :])

    settle(groups)
    return reasons


def _half(group: ChannelGroup, rng: np.random.Generator) -> np.ndarray:
    """Choose half of the channels, the same in each run; outputs in mixed order."""
    run = group.n_channels // group.n_runs
    local = rng.permutation(run)[: (run + 1) // 2]
    if not group.is_output or group.consumers:
        local = np.sort(local)
    half = (np.arange(group.n_runs)[:, None] * run + local).ravel()
    return half if group.is_output else group.with_every_part(half)


def _trial(model: nn.Module, tried: list[tuple[ChannelGroup, np.ndarray]], x: Tensor) -> str:
    """Say why slicing these groups does not equal masking them; nothing if it does."""
    try:
        sliced = take_out(model, [], tried)
        difference = Comparison(model, sliced).of_outputs(x, sliced.outputs)
        if difference > _TRIAL_TOLERANCE:  # deep networks may amplify rounding as much
            wide = Comparison(model, sliced, torch.float64)
            difference = wide.of_outputs(x.double(), sliced.outputs)
    except Exception as error:
        return f"the forward pass fails where it is narrower ({str(error).splitlines()[0]})"
    if difference <= _TRIAL_TOLERANCE:
        return ""
    return "its channels meet, or change places, outside of layers"


_MOST_IMAGES = 64
_CHUNK = 16  # images at a time: a wide network at a large image size needs memory


def check_sliced(
    dense: nn.Module,
    sliced: Sliced,
    X: Tensor,
    keep_outputs: Sequence[int] | np.ndarray | None = None,
    tol: float = 1e-4,
) -> float:
    """Compare a sliced network with the original one, masked.

    In the masked network each removed channel is set to zero where it is consumed: at the input of
    every layer that lost it. Both run in eval mode and in float32 without TF32 (in float64 if the
    model is). Outputs are compared on all images; the kept channels of every layer, as `sliced`
    states them, on the first two.

    Parameters
    ----------
    dense : nn.Module
        The original network, with the weights that were sliced. It is not changed.
    sliced : Sliced
        What `slice_channels` made of it, not yet repaired.
    X : Tensor of shape (n, ...)
        Inputs, of which the first 64 are used.
    keep_outputs : array-like of int, default=None
        Columns of the original's output that the sliced network gives, in order. None: those in
        ``sliced.outputs``.
    tol : float, default=1e-4
        Largest allowed max|difference| / max|masked output|.

    Returns
    -------
    float
        max|difference| / max|masked output|, the largest over chunks of the images.

    Raises
    ------
    SlicingError
        If the two differ by more than `tol`. It names the first layer that does.
    ValueError
        If `X` is empty.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from sinfkit.slicing import check_sliced, slice_channels
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    >>> check_sliced(net, slice_channels(net, X, {"0": [1, 3, 6]}), X) <= 1e-4
    True
    """
    if len(X) == 0:
        raise ValueError("X is empty; the comparison needs images.")
    kept = sliced.outputs if keep_outputs is None else np.asarray(keep_outputs)
    names = {*sliced.norm_support, *sliced.along}
    if not names <= dict(dense.named_modules()).keys():  # those of functions are in the graph only
        dense = trace(dense, X)
    comparison = Comparison(dense, sliced)
    X = precision(dense, X[:_MOST_IMAGES])
    try:
        difference = comparison.of_outputs(X, kept)
        if tol < difference < math.inf and X.dtype == torch.float32:
            comparison = Comparison(dense, sliced, torch.float64)  # rounding, it may be
            X = X.double()
            difference = comparison.of_outputs(X, kept)
    except (RuntimeError, IndexError):  # shapes that do not fit; the layers show where
        difference = math.nan
    # In a network that agrees, a hidden layer may be a little further off than the outputs are.
    allowed = 10 * tol if difference <= tol else tol
    supports = {**sliced.support, **sliced.norm_support}
    layer, how = comparison.first_difference(X[:2], supports, allowed)
    if difference <= tol and not layer:
        return difference
    where = f"The first layer that differs is {layer!r}: {how}." if layer else "No layer differs."
    raise SlicingError(
        f"The sliced and the masked network differ by {difference:.2g} of the largest output "
        f"(allowed: {tol:g}). {where}",
        layer,
    )


class Comparison:
    """A masked and a sliced network, both private copies in eval mode."""

    def __init__(
        self, dense: nn.Module, sliced: Sliced, dtype: torch.dtype = torch.float32
    ) -> None:
        self.masked = _private(dense, dtype)
        self.small = _private(sliced.model, dtype)
        for name, removed in sliced.removed_inputs.items():
            self._zero(self.masked.get_submodule(name), torch.from_numpy(removed))
        for name, kept in sliced.norm_support.items():
            norm = self.masked.get_submodule(name)
            if not isinstance(norm, (_NormBase, nn.PReLU)):  # which see each channel alone
                small = copy_sharing_weights(norm)
                narrow(small, kept, None)
                self._restrict(norm, small, _channel_dim(norm), torch.from_numpy(kept))
        for name, kept in sliced.along.items():
            module = self.masked.get_submodule(name)
            if isinstance(module, nn.Linear):  # each of the channels for itself
                continue
            dim = -1 if isinstance(module, CONVOLUTIONS) else getattr(module, "dim", 1)
            small = copy_sharing_weights(module)
            self._restrict(module, small, dim, torch.from_numpy(kept))
        for name, removed in sliced.zeroed.items():  # last: copies are to be without this
            self._silence(self.masked.get_submodule(name), torch.from_numpy(removed))

    @staticmethod
    def _silence(layer: nn.Module, removed: Tensor) -> None:
        """Make a layer give zeros in place of its removed outputs."""

        def zero(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output.index_fill(_channel_dim(layer), removed.to(output.device), 0)

        layer.register_forward_hook(zero)

    @staticmethod
    def _restrict(module: nn.Module, small: nn.Module, dim: int, kept: Tensor) -> None:
        """Make what looks across channels look at those that are left, as `small` does."""

        def restrict(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            index = kept.to(output.device)
            some = small(args[0].index_select(dim, index))
            return torch.zeros_like(output).index_copy(dim, index, some)

        module.register_forward_hook(restrict)

    @staticmethod
    def _zero(layer: nn.Module, removed: Tensor) -> None:
        """Make a layer see zeros in place of its removed inputs."""

        def zero(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = args
            return x.index_fill(_channel_dim(layer), removed.to(x.device), 0), *rest

        layer.register_forward_pre_hook(zero)

    def of_outputs(self, X: Tensor, kept: np.ndarray | None) -> float:
        """Compute max|difference| / max|masked| over all images; nan where one is not finite.

        `kept` are the outputs that the sliced network gives; None: all.
        """
        values = []
        with exact_inference(X):
            for x in X.split(_CHUNK):
                reference, output = run(self.masked, x.clone()), run(self.small, x.clone())
                if kept is not None:
                    reference = reference.index_select(1, torch.from_numpy(kept).to(x.device))
                values.append(_relative(reference, output))
        return math.nan if any(map(math.isnan, values)) else max(values)

    def first_difference(
        self, x: Tensor, supports: Mapping[str, np.ndarray], tol: float
    ) -> tuple[str, str]:
        """Find the first module whose kept channels (`supports`) differ; say how, or nothing."""
        with exact_inference(x):
            reference = _record(self.masked, supports, x)
            output = _record(self.small, supports, x)
        for name, value in reference.items():
            if name not in output:
                return name, "it cannot be executed"
            dim = _channel_dim(self.masked.get_submodule(name))
            kept = torch.from_numpy(supports[name]).to(value.device)
            found = output[name].shape[dim]
            if found != len(kept):
                return name, f"it has {found} channels where {len(kept)} were to be kept"
            wanted = value.index_select(dim, kept)
            if wanted.shape != output[name].shape:  # other channels lie where it has positions
                continue
            difference = _relative(wanted, output[name])
            if not difference <= tol:
                return name, f"by {difference:.2g} of its largest value"
        return "", ""


def run(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module; a graph's own call would print a traceback where a trial fails."""
    output: Tensor = nn.Module.__call__(module, x)
    return output


def precision(model: nn.Module, x: Tensor) -> Tensor:
    """Bring inputs to where and how `Comparison` runs a model: float64, or else float32."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), x)
    double = weight.dtype == torch.float64
    return x.detach().to(weight.device, torch.float64 if double else torch.float32)


@contextlib.contextmanager
def exact_inference(x: Tensor) -> Iterator[None]:
    """Compute without gradients, and in the very precision of the tensors."""
    with torch.inference_mode(), full_float32(), torch.autocast(x.device.type, enabled=False):
        yield


def _private(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Copy a module, sharing its tensors, except those of less precision than `dtype`."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): _widened(tensor, dtype) for tensor in tensors}).eval()


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Leave a tensor as it is, unless it is of less precision."""
    if not tensor.is_floating_point() or tensor.dtype.itemsize >= dtype.itemsize:
        return tensor
    wide = tensor.detach().to(dtype)
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


def _channel_dim(module: nn.Module) -> int:
    """Which dimension of a module's input and output holds the channels."""
    if isinstance(module, CONVOLUTIONS):
        return -1 - len(module.kernel_size)
    return -1 if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm)) else 1


def _relative(masked: Tensor, small: Tensor) -> float:
    """Compute max|difference| / max|masked|; nan where values are not finite or shapes differ."""
    if masked.shape != small.shape:
        return math.nan
    largest = float(masked.abs().max())
    difference = float((masked - small).abs().max())
    return difference / largest if largest > 0 else difference


def _record(model: nn.Module, names: Mapping[str, Any], x: Tensor) -> dict[str, Tensor]:
    """Record the named modules' outputs, in order of execution, up to where the network fails."""
    values: dict[str, Tensor] = {}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Tensor) -> None:
            if name not in values:
                values[name] = output.clone()  # an activation may overwrite it in place

        return record

    handles = [model.get_submodule(name).register_forward_hook(recorder(name)) for name in names]
    with contextlib.suppress(RuntimeError):
        run(model, x.clone())
    for handle in handles:
        handle.remove()
    return values
