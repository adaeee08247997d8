"""What a filter's feature maps say about it: their rank, their independence, how often they are 0.

The statistics behind the criteria HRank, CHIP and APoZ. None of them needs labels or gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, fx

from ..graph.cuts import channel_axis, samples_first, with_capture
from ..repair.ridge import double

__all__ = [
    "MAX_IMAGES",
    "STATISTICS",
    "map_independence",
    "map_rank",
    "map_statistics",
    "map_zeros",
]

# A decomposition for each map or image is dear, and the means settle early: HRank's authors found
# that ranks hardly depend on the images, and took 500 of them.
MAX_IMAGES = 500

_CELLS = 2**23  # numbers in double precision that are decomposed at once
_STEP, _N_STEPS = 0.4, 46  # of the integral: from 1e-8 to 1e8 times the largest singular value


def map_rank(maps: Tensor) -> Tensor:
    """Rank of each map of (n, C, H, W), seen as a matrix; shape (n, C), float64 (HRank)."""
    return double(torch.linalg.matrix_rank(maps))


def map_zeros(maps: Tensor) -> Tensor:
    """Share of the positions at which a channel does not fire; (n, C, H, W) to (n, C) (APoZ)."""
    silent = maps <= 0
    return double(silent.sum((2, 3))) / max(silent[0, 0].numel(), 1)


def map_independence(maps: Tensor) -> Tensor:
    r"""Drop of the nuclear norm of all maps of an image without one of them: (n, C) (CHIP).

    Not by C decompositions but by one, :math:`A' A = V d V'` of rows :math:`a_i`, and an integral:
    with :math:`z = V' a_i` the drop is :math:`\frac 1 \pi \int_0^\infty -\log(1 - \sum_j z_j^2 /
    (d_j + s^2)) ds`.  On a logarithmic grid of s the trapezoidal rule converges exponentially.
    """
    rows = double(maps.flatten(2))
    if rows.shape[1] <= rows.shape[2]:
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        values = values.clamp_min(0.0)
        parts = vectors.square() * values[:, None]
    else:
        values, vectors = torch.linalg.eigh(rows.mT @ rows)
        values = values.clamp_min(0.0)
        parts = (rows @ vectors).square()
    largest = values[:, -1:]
    unit = torch.where(largest > 0, largest, 1.0)
    grid = torch.arange(-_N_STEPS, _N_STEPS + 1, dtype=rows.dtype, device=rows.device)
    s = (_STEP * grid).exp()
    leverage = (parts / unit[:, None]) @ (1.0 / ((values / unit)[:, :, None] + s.square()))
    # What is independent of all other rows reaches 1 as s goes to 0; rounding must not pass it.
    heights = -torch.log1p(-leverage.clamp(0.0, 1.0 - torch.finfo(s.dtype).eps))
    return (heights @ s) * (_STEP / math.pi) * unit.sqrt()


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "map_rank": map_rank,
    "map_independence": map_independence,
    "map_zeros": map_zeros,
}
"""What `map_statistics` averages over images, by name."""


def map_statistics(
    gm: fx.GraphModule,
    batches: Iterable[Tensor],
    nodes: Mapping[str, str],
    names: Collection[str],
    sample_weight: Tensor | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Means over images of some of the `STATISTICS`, in one pass; shape (n_channels,) each.

    `nodes` maps keys of the caller's choice to nodes, as from `observation_nodes`.  Beside the
    means stands ``"map_range"``: the largest activation minus the smallest.  (n, C) counts as maps
    of one position, (n, T, C) and (n, C, T) as maps of T rows and one column, and volumes slice by
    slice.
    """
    # Layers that are added up are observed at one node: look at it once.
    first_key = {node: key for key, node in reversed(list(nodes.items()))}
    wanted = {key: node for node, key in first_key.items()}
    axes = {key: channel_axis(gm, node) for key, node in wanted.items()}
    rows = {key: samples_first(gm, node) for key, node in wanted.items()}
    totals: dict[str, dict[str, Tensor]] = {key: {} for key in wanted}
    limits: dict[str, tuple[Tensor, Tensor]] = {}
    weights: list[Tensor] = []

    def add(key: str, value: Tensor) -> None:
        maps = _as_maps(rows[key](value), axes[key])
        low, high = maps.amin((0, 2, 3)), maps.amax((0, 2, 3))
        if key in limits:
            low, high = torch.minimum(low, limits[key][0]), torch.maximum(high, limits[key][1])
        limits[key] = low, high
        size = max(1, _CELLS // maps[0].numel())
        here = double(weights[-1]).to(maps.device)
        for part, weight in zip(maps.split(size), here.split(size), strict=True):
            for name in names:
                total = weight @ STATISTICS[name](part)
                totals[key][name] = totals[key].get(name, 0.0) + total

    watched, start = with_capture(gm, wanted, add), 0
    with torch.inference_mode():
        for batch in batches:
            if len(batch):
                stop = start + len(batch)
                own = torch.ones(len(batch)) if sample_weight is None else sample_weight[start:stop]
                weights.append(own)
                watched(batch)
                start = stop
    if not weights:
        raise ValueError("there is no sample to compute statistics of feature maps from")
    size = float(torch.cat(weights).double().sum())
    found = {
        key: {name: total.cpu() / size for name, total in totals[key].items()}
        | {"map_range": double(limits[key][1]).cpu() - double(limits[key][0]).cpu()}
        for key in wanted
    }
    return {key: found[first_key[node]] for key, node in nodes.items()}


def _as_maps(value: Tensor, axis: int) -> Tensor:
    """Activations as (n, C, H, W), of at least single precision."""
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    if axis == -1:
        value = value.movedim(-1, 1)
    if value.dim() > 4:  # volumes: slice by slice
        return value.flatten(2, -2)
    return value.reshape(*value.shape, *[1] * (4 - value.dim()))
