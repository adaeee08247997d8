"""Means with intervals from a hierarchical bootstrap: clusters, and images within them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REPEATS = 2000


@dataclass(frozen=True)
class Estimate:
    """Means of several columns with their intervals, all in the unit of the values.

    Attributes
    ----------
    mean : ndarray of shape (n_columns,)
        Mean over clusters of each cluster's mean over images.
    low, high : ndarray of shape (n_columns,)
        95 % interval: between 2.5 and 97.5 % of the resampled means.
    at_least, at_most : ndarray of shape (n_columns,)
        One-sided 95 % bounds: 5 and 95 %.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    at_least: np.ndarray
    at_most: np.ndarray


def bootstrap(values: Sequence[np.ndarray], repeats: int = REPEATS, seed: int = 0) -> np.ndarray:
    """Resampled means.

    Parameters
    ----------
    values : sequence of ndarray of shape (n_images, n_columns) or (n_images,)
        One array per cluster; rows are images, in any number. For a paired comparison, the
        differences. Values of one image under several calibration resamples or seeds are averaged
        before, so that their spread is part of an image's value.
    repeats : int, default=2000
    seed : int, default=0

    Returns
    -------
    ndarray of shape (repeats, n_columns)
        In each repeat as many clusters as there are are drawn with replacement, and within each
        of those drawn as many images as it has; all columns see the same draws.
    """
    columns = [_two_axes(v) for v in values]
    if not columns or min(len(v) for v in columns) == 0:
        raise ValueError("there must be a cluster, and an image in each")
    counts = _counts(tuple(len(v) for v in columns), repeats, seed)
    total = np.zeros((repeats, columns[0].shape[1]))
    start = 0
    for own in columns:
        total += counts[:, start : start + len(own)] @ own / len(own)
        start += len(own)
    return total / len(columns)


@functools.lru_cache(maxsize=2)
def _counts(sizes: tuple[int, ...], repeats: int, seed: int) -> np.ndarray:
    """How often each repeat draws each image of clusters of these sizes.

    Kept, since a page compares hundreds of answers to the same images.
    """
    rng = np.random.default_rng(seed)
    n = len(sizes)
    drawn = rng.integers(n, size=(repeats, n))
    counts = np.zeros((repeats, sum(sizes)), dtype=np.float32)
    start = 0
    for k, size in enumerate(sizes):
        repeat = np.repeat(np.arange(repeats), (drawn == k).sum(1))
        own = rng.multinomial(size, np.full(size, 1 / size), size=len(repeat))
        np.add.at(counts[:, start : start + size], repeat, own)
        start += size
    return counts


def estimate(values: Sequence[np.ndarray], repeats: int = REPEATS, seed: int = 0) -> Estimate:
    """Mean over clusters with its interval; see `bootstrap` for the parameters."""
    mean = np.mean([_two_axes(v).mean(0) for v in values], axis=0)
    points = np.percentile(bootstrap(values, repeats, seed), [2.5, 97.5, 5, 95], axis=0)
    return Estimate(mean, *points)


def _two_axes(values: np.ndarray) -> np.ndarray:
    """Values with an axis of columns."""
    values = np.asarray(values, dtype=np.float64)
    return values[:, None] if values.ndim == 1 else values
