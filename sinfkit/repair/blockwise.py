"""Block-wise reconstruction: each part of a sliced network learns what the dense part gives.

Least squares fits one layer at a time, distillation all of them at once.  Between the two: from one
place where the network can be cut to the next, the weights take small steps towards the dense
network's values there, on the inputs that the parts before, already trained, really give (for
rounded weights: Li et al., "BRECQ", arXiv 2102.05426).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..graph.cuts import channel_axis, cut_points, source_layer, split
from ..utils.device import in_pieces

_MEMORY = 2**30  # bytes of values between parts
_NOTHING = 1e-9  # errors that are rounding
_AT_ONCE = 64  # samples that run through a part without gradients


@dataclass(frozen=True)
class Part:
    """What lies between two cuts: dense and sliced, and the channels of the dense one that stay."""

    dense: fx.GraphModule
    sliced: fx.GraphModule
    kept: Tensor
    axis: int

    def fits(self, dense: Tensor, sliced: Tensor) -> bool:
        """Whether the values of both networks can be compared."""
        if dense.ndim != sliced.ndim or int(self.kept.max()) >= dense.shape[self.axis]:
            return False
        return self.wanted(dense).shape == sliced.shape

    def wanted(self, value: Tensor) -> Tensor:
        """Of the dense part's values, those that the sliced one has as well."""
        return value.index_select(self.axis, self.kept)


def parts_of(
    dense: fx.GraphModule, sliced: fx.GraphModule, support: Mapping[str, np.ndarray], x: Tensor
) -> list[Part]:
    """The parts of a network before its last cut; `x` (n, ...) are some samples.

    A cut where the two networks' channels cannot be told to be the same is left out.
    """
    found: list[Part] = []
    common = {cut.node for cut in cut_points(sliced)}
    rests, values = (dense, sliced), (x, x)
    with torch.no_grad():
        for cut in cut_points(dense):
            layer = source_layer(dense, cut.node)
            if cut.node not in common or layer is None or layer not in support:
                continue
            fronts, behind = zip(*(split(rest, cut) for rest in rests), strict=True)
            kept = torch.as_tensor(support[layer], device=x.device)
            part = Part(fronts[0], fronts[1], kept, channel_axis(dense, cut.node))
            whole, small = (front(value) for front, value in zip(fronts, values, strict=True))
            if not part.fits(whole, small):
                continue
            found.append(part)
            rests, values = behind, (whole, small)
    return found


def reconstruct(
    parts: Sequence[Part],
    x: Tensor,
    weight: Tensor,
    steps: int,
    batch_size: int,
    rate: Callable[[float], float],
    generator: torch.Generator,
) -> Iterator[float]:
    """Train the sliced part of each of `parts` in place, in order.

    `x` (n, ...) are the samples, `weight` (n,) how much each counts, on the CPU; `rate` maps the
    share of a part's steps that are done to the size of the next one.  Yields the error of each
    part: squared, relative to the variance of what is wanted.
    """
    dtype = _dtype(parts, x)
    dense, small = x, x.to(dtype)
    for part in parts:
        with torch.no_grad():
            dense = _all(part.dense, dense)
        wanted = part.wanted(dense).to(dtype)
        scale = wanted.var().clamp_min(torch.finfo(dtype).tiny)
        with torch.no_grad():
            now = _all(part.sliced, small)
        error = float((now - wanted).square().mean() / scale)
        parameters = [p for p in part.sliced.parameters() if p.is_floating_point()]
        if error < _NOTHING or not parameters or not steps:
            small = now
            yield error
            continue
        adam = torch.optim.Adam(parameters)
        for step in range(steps):
            for group in adam.param_groups:
                group["lr"] = rate((step + 0.5) / steps)
            rows = torch.multinomial(weight, min(batch_size, len(x)), generator=generator)
            rows = rows.to(x.device)
            loss = (part.sliced(small[rows]) - wanted[rows]).square().mean() / scale
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
        with torch.no_grad():
            small = _all(part.sliced, small)
        yield float((small - wanted).square().mean() / scale)


def affordable(parts: Sequence[Part], x: Tensor) -> int:
    """How many samples' values between parts, of both networks, take a bounded memory."""
    most, dense, small = x[:1].numel(), x[:1], x[:1].to(_dtype(parts, x))
    with torch.no_grad():
        for part in parts:
            dense, small = part.dense(dense), part.sliced(small)
            most = max(most, dense.numel() + 2 * small.numel())
    return max(1, _MEMORY // (2 * most * small.element_size()))


def _dtype(parts: Sequence[Part], x: Tensor) -> torch.dtype:
    """Type of what is trained, which may be finer than that of the dense network."""
    return next((p.dtype for part in parts for p in part.sliced.parameters()), x.dtype)


def _all(part: nn.Module, x: Tensor) -> Tensor:
    """A part's values for all samples."""
    return torch.cat(list(in_pieces(part, x.split(_AT_ONCE))))
