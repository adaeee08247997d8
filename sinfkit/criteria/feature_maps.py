"""What a filter's feature maps say about it: their rank, their independence, how often they are 0.

The statistics behind the criteria HRank, CHIP and APoZ. None of them needs labels or gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, fx

from ..graph.cuts import channel_axis, with_capture
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
    """Rank of each feature map, seen as a matrix of its rows and columns.

    Parameters
    ----------
    maps : Tensor of shape (n, C, H, W)
        Activations of n images, in single or double precision.

    Returns
    -------
    Tensor of shape (n, C)
        0 .. min(H, W), float64. Singular values below ``max(H, W)`` times the precision of the
        largest one count as 0.

    Notes
    -----
    HRank (Lin et al., CVPR 2020) scores a filter by the mean over images.

    Examples
    --------
    >>> import torch
    >>> from sinfkit.criteria import map_rank
    >>> maps = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 2.0], [2.0, 4.0]], [[0.0] * 2] * 2])
    >>> map_rank(maps[None]).tolist()
    [[2.0, 1.0, 0.0]]
    """
    return double(torch.linalg.matrix_rank(maps))


def map_independence(maps: Tensor) -> Tensor:
    r"""Drop of the nuclear norm of all maps of an image when one of them is set to zero.

    Parameters
    ----------
    maps : Tensor of shape (n, C, H, W)
        Activations of n images.

    Returns
    -------
    Tensor of shape (n, C)
        At least 0, float64; exact to about 1e-6 of the image's largest singular value.

    Notes
    -----
    With :math:`A` of shape (C, H W), a row for each channel, CHIP (Sui et al., NeurIPS 2021) scores
    channel i by the mean over images of :math:`\lVert A \rVert_* - \lVert A_{-i} \rVert_*`, where
    :math:`A_{-i}` has zeros in row i.

    That asks for C decompositions of each image. This function takes one, of the smaller of
    :math:`A A'` and :math:`A' A`, and an integral. Removing the row :math:`a'` takes :math:`a a'`
    from :math:`A' A`, whose eigenvalues :math:`d_j` are the squared singular values; with
    :math:`z_j` the components of a along its eigenvectors, the drop is

    .. math:: \frac{1}{\pi} \int_0^\infty
              -\log\Bigl(1 - \sum_j \frac{z_j^2}{d_j + s^2}\Bigr) \, ds ,

    which follows from :math:`\det(K + s^2 I - a a') = \det(K + s^2 I) (1 - a' (K + s^2 I)^{-1} a)`
    and :math:`\pi \sqrt d = \int_0^\infty 2 d / (d + s^2) \, ds`. On a logarithmic grid of s the
    trapezoidal rule converges exponentially.

    Examples
    --------
    >>> import torch
    >>> from sinfkit.criteria import map_independence
    >>> maps = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])[None, :, None]
    >>> map_independence(maps).round(decimals=4).tolist()   # orthogonal: each row's own length
    [[3.0, 2.0, 0.0]]
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


def map_zeros(maps: Tensor) -> Tensor:
    """Fraction of the positions at which a channel does not fire.

    Parameters
    ----------
    maps : Tensor of shape (n, C, H, W)
        Activations of n images.

    Returns
    -------
    Tensor of shape (n, C)
        In [0, 1], float64.

    Notes
    -----
    Hu et al. (2016) average it over images: APoZ, the average percentage of zeros behind a ReLU.
    Negative values, which a ReLU does not leave, count as zeros too.

    Examples
    --------
    >>> import torch
    >>> from sinfkit.criteria import map_zeros
    >>> map_zeros(torch.tensor([[[[0.0, 1.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 3.0]]]])).tolist()
    [[0.5, 0.25]]
    """
    silent = maps <= 0
    return double(silent.sum((2, 3))) / max(silent[0, 0].numel(), 1)


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
    """Gather statistics of feature maps in one pass.

    Parameters
    ----------
    gm : GraphModule
        From `trace`, in eval mode.
    batches : iterable of Tensor of shape (n, ...)
        Inputs, normalised, on the network's device; read once.
    nodes : mapping of str to str
        From a key of the caller's choice to the name of a node, as from `observation_nodes`.
    names : collection of str
        Keys of `STATISTICS`.
    sample_weight : Tensor of shape (n_samples,), optional
        How many times each image counts, in the order of the batches. Default: once.

    Returns
    -------
    dict of str to dict of str to Tensor of shape (n_channels,)
        For each key and name the mean over images, and, as ``"map_range"``, the largest activation
        of all images and positions minus the smallest: 0 for a channel that is always the same.
        Float64, on the CPU.

    Raises
    ------
    ValueError
        If there is no sample, or the network has no such node.

    Notes
    -----
    A linear layer's activation of shape (n, C) counts as maps of one position, and one of shape
    (n, T, C) as maps of T rows and one column. Their rank is 0 or 1.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from sinfkit.criteria import map_statistics
    >>> from sinfkit.graph import observation_nodes, trace
    >>> gm = trace(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)))
    >>> nodes = observation_nodes(gm, ["0"])
    >>> found = map_statistics(gm, torch.randn(10, 1, 6, 6).split(4), nodes, ["map_rank"])
    >>> found["0"]["map_rank"].shape, sorted(found["0"])
    (torch.Size([3]), ['map_range', 'map_rank'])
    """
    # Layers that are added up are observed at one node: look at it once.
    first_key = {node: key for key, node in reversed(list(nodes.items()))}
    wanted = {key: node for node, key in first_key.items()}
    axes = {key: channel_axis(gm, node) for key, node in wanted.items()}
    totals: dict[str, dict[str, Tensor]] = {key: {} for key in wanted}
    limits: dict[str, tuple[Tensor, Tensor]] = {}
    n_samples = 0
    here: Tensor | None = None

    def add(key: str, value: Tensor) -> None:
        maps = _as_maps(value, axes[key])
        low, high = maps.amin((0, 2, 3)), maps.amax((0, 2, 3))
        if key in limits:
            low, high = torch.minimum(low, limits[key][0]), torch.maximum(high, limits[key][1])
        limits[key] = low, high
        size = max(1, _CELLS // maps[0].numel())
        weights = None if here is None else here.to(maps.device).split(size)
        for i, part in enumerate(maps.split(size)):
            for name in names:
                values = STATISTICS[name](part)
                total = values.sum(0) if weights is None else weights[i].to(values) @ values
                totals[key][name] = totals[key].get(name, 0.0) + total

    watched = with_capture(gm, wanted, add)
    with torch.inference_mode():
        for batch in batches:
            if len(batch):
                if sample_weight is not None:
                    here = sample_weight[n_samples : n_samples + len(batch)]
                watched(batch)
                n_samples += len(batch)
    if n_samples == 0:
        raise ValueError("there is no sample to compute statistics of feature maps from")
    size = n_samples if sample_weight is None else float(sample_weight.double().sum())
    found = {
        key: {name: total.cpu() / size for name, total in totals[key].items()}
        | {"map_range": double(limits[key][1]).cpu() - double(limits[key][0]).cpu()}
        for key in wanted
    }
    return {key: found[first_key[node]] for key, node in nodes.items()}


def _as_maps(value: Tensor, axis: int) -> Tensor:
    """Activations as (n, C, H, W), of at least single precision."""
    if value.dim() not in (2, 3, 4):
        raise ValueError(
            f"activations of shape {tuple(value.shape)} are no feature maps; they must have 2 to 4 "
            "axes"
        )
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    if value.dim() == 3 or (value.dim() == 4 and axis == -1):
        value = value.movedim(-1, 1)
    return value.reshape(*value.shape, *[1] * (4 - value.dim()))
