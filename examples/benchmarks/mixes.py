"""Batches of a given composition by routed cluster."""

from __future__ import annotations

import numpy as np
import torch
from forms import batch_of
from numpy.typing import NDArray

from sinfkit.inference import SINFNetwork

MIXES = ("natural", "uniform", "single")
_IMAGES = 512  # at least so many are seen in a cell, in batches of the cell's size
_BATCHES = 5  # or so many batches, whatever their size


def n_batches(size: int, rounds: int) -> int:
    """How many batches take turns in a cell: a single image says nothing about the others."""
    return max(1, min(rounds, max(_BATCHES, _IMAGES // size)))


def routed_clusters(network: SINFNetwork, X: np.ndarray, device: torch.device) -> NDArray[np.int64]:
    """Cluster whose subgraph alone answers an image; -1 where something else runs too, or instead.

    Parameters
    ----------
    network : SINFNetwork
    X : uint8 ndarray of shape (n_samples, channels, height, width)
    device : torch.device

    Returns
    -------
    ndarray of shape (n_samples,)
    """
    found = []
    with torch.inference_mode():
        for start in range(0, len(X), 256):
            rows = np.arange(start, min(start + 256, len(X)))
            run, branch = network.branches(network.route(batch_of(X, rows).to(device)))
            own = torch.full((len(rows),), -1, dtype=branch.dtype, device=branch.device)
            own[run] = branch
            several = torch.bincount(run, minlength=len(rows)) > 1
            own[several | (own >= network.n_clusters)] = -1
            found.append(own.cpu().numpy())
    return np.concatenate(found)


def draw(
    mix: str, size: int, n: int, clusters: NDArray[np.int64], seed: int = 0
) -> list[NDArray[np.int64]]:
    """Rows of some batches.

    Parameters
    ----------
    mix : {"natural", "uniform", "single"}
        Images as they come; equally many of each cluster, and none that takes the fallback; all of
        one cluster, another one in each batch.
    size, n : int
        Images in a batch, and batches.
    clusters : int ndarray of shape (n_images,)
        From `routed_clusters`; for ``"natural"`` only its length counts.
    seed : int, default=0

    Returns
    -------
    list of int ndarray of shape (size,)
        An image may occur more than once, where there are too few.

    Raises
    ------
    ValueError
        If no image is routed to a subgraph.
    """
    rng = np.random.default_rng([seed, MIXES.index(mix), size])
    if mix == "natural":
        return [_choose(rng, np.arange(len(clusters)), size) for _ in range(n)]
    members = [np.flatnonzero(clusters == c) for c in np.unique(clusters[clusters >= 0])]
    if not members:
        raise ValueError("no image is answered by a subgraph alone: there is nothing to mix")
    batches = []
    for i in range(n):
        if mix == "single":
            batches.append(_choose(rng, members[i % len(members)], size))
            continue
        # Which clusters have one image more, where they do not go up, changes from batch to batch.
        share = np.bincount((np.arange(size) + i) % len(members), minlength=len(members))
        parts = [_choose(rng, own, k) for own, k in zip(members, share.tolist(), strict=True)]
        batches.append(rng.permutation(np.concatenate(parts)))
    return batches


def _choose(rng: np.random.Generator, rows: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    return rng.choice(rows, size, replace=size > len(rows))
