"""Which classes belong together: pure functions from pooled features to groups of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..criteria.discriminability import average, centred, fit_probe
from ..errors import ArgumentError
from ..utils.params import naming, warn

METHODS = ("confusion", "activation", "given")
# A probe with less is nearly certain of everything, says little of what is alike, and takes long:
# its systems become ill-conditioned, the more so the more classes there are.
_LEAST_PENALTY = 3e-3


@dataclass(frozen=True)
class Grouping:
    """How to group classes: the parameters of a `SemanticClusterer` that say so."""

    method: str = "confusion"
    mapping: Any = None
    n_clusters: int | None = None
    max_cluster_size: int | None = None
    pool_size: int = 2


@dataclass(frozen=True)
class Clusters:
    """Classes in groups.

    `class_clusters` (n_classes,) is the cluster of each class, `names` (n_clusters,) the clusters'
    names, and `affinity` (n_classes, n_classes) how much two classes belong together.
    """

    class_clusters: np.ndarray
    names: np.ndarray
    affinity: np.ndarray


def group_classes(
    grouping: Grouping,
    classes: np.ndarray,
    features: Tensor,
    codes: np.ndarray,
    penalty: float,
    seed: int,
    weight: np.ndarray | None = None,
) -> Clusters:
    """Group `classes` by pooled features (n_samples, n_features) of samples of classes `codes`.

    `penalty` is that of the probe which routes; the one that measures confusion takes no less than
    is needed for its probabilities to say what is alike.
    """
    if grouping.method == "activation":
        affinity = activation_affinity(features, codes, weight)
    else:
        penalty = max(penalty, _LEAST_PENALTY)
        affinity = confusion_affinity(features, codes, penalty, seed, weight)
    if grouping.method == "given":
        with naming("mapping"):
            class_clusters, names = read_mapping(grouping.mapping, classes)
        return Clusters(class_clusters, names, affinity)
    n_classes = len(classes)
    n_clusters = grouping.n_clusters or max(1, round(n_classes**0.5))
    if n_clusters > n_classes:
        warn(
            f"n_clusters={n_clusters} is more than the {n_classes} classes; each class is a "
            "cluster of its own."
        )
        n_clusters = n_classes
    limit = grouping.max_cluster_size or math.ceil(1.5 * n_classes / n_clusters)
    return Clusters(agglomerate(affinity, n_clusters, limit), np.arange(n_clusters), affinity)


def read_mapping(mapping: Any, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn a mapping into cluster numbers.

    Shapes: `classes` (n_classes,), returns (n_classes,), returns (n_clusters,).
    """
    if not isinstance(mapping, Mapping) or not mapping:
        raise ArgumentError(
            "mapping must be a dict: {class: cluster} or {cluster: [class, ...]}, and not empty.",
            "mapping",
        )
    collections = (list, tuple, set, frozenset, np.ndarray)
    pairs: list[tuple[Any, Any]] = []
    for key, value in mapping.items():
        pairs += [(c, key) for c in value] if isinstance(value, collections) else [(key, value)]
    cluster_of: dict[Any, Any] = {}
    for label, name in pairs:
        if label in cluster_of:
            raise ArgumentError(f"mapping names class {label!r} twice.", "mapping")
        cluster_of[label] = name
    missing = [c for c in classes.tolist() if c not in cluster_of]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ArgumentError(
            f"mapping has no cluster for class(es) {', '.join(map(repr, missing[:5]))}{more}.",
            "mapping",
        )
    names, clusters = np.unique(
        np.array([cluster_of[c] for c in classes.tolist()]), return_inverse=True
    )
    return clusters.astype(np.int64), names


def confusion_affinity(
    features: Tensor,
    codes: np.ndarray,
    penalty: float,
    seed: int,
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """How often a probe confuses two classes, measured on samples that it was not fitted on.

    Shapes: `features` (n_samples, n_features), `codes` (n_samples,), `weight` (n_samples,),
    returns (n_classes, n_classes).
    """
    n_classes = int(codes.max()) + 1
    rng = np.random.default_rng(seed)
    half = np.zeros(len(codes), dtype=bool)
    for k in range(n_classes):
        rows = rng.permutation(np.flatnonzero(codes == k))
        half[rows[: len(rows) // 2]] = True
    counts = None if weight is None else torch.as_tensor(weight).to(features)
    x = (features - average(features, counts)).to(features.dtype)
    spread = x.std(0, correction=0) if counts is None else average(x.square(), counts).sqrt()
    x = x / spread.clamp_min(1e-12 + 1e-7 * float(x.abs().max()))
    y = torch.as_tensor(codes, device=features.device)
    given = np.zeros((n_classes, n_classes))
    if np.bincount(codes[half], minlength=n_classes).min() == 0:
        folds = [(np.ones_like(half), np.ones_like(half))]  # too few samples to part
    else:
        folds = [(half, ~half), (~half, half)]
    for train, test in folds:
        a, b = torch.as_tensor(train), torch.as_tensor(test)
        part = None if counts is None else counts[a]
        probe = fit_probe(x[a], y[a], penalty=penalty, tol=1e-2, dtype=x.dtype, sample_weight=part)
        p = torch.softmax(probe.logits(x[b]), 1)
        if counts is not None:
            p = p * counts[b][:, None]
        sums = torch.zeros(n_classes, n_classes, dtype=p.dtype).index_add_(0, y[b].cpu(), p.cpu())
        given += sums.numpy()
    given /= np.bincount(codes, weights=weight, minlength=n_classes)[:, None]
    return (given + given.T) / 2


def activation_affinity(
    features: Tensor, codes: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """How alike two classes' mean activations are.

    Shapes: `features` (n_samples, n_features), `codes` (n_samples,), `weight` (n_samples,),
    returns (n_classes, n_classes).
    """
    n_classes = int(codes.max()) + 1
    x = features.to(torch.float64).cpu()
    y = torch.as_tensor(codes)
    counts = None if weight is None else torch.as_tensor(weight)
    weighed = x if counts is None else x * counts[:, None]
    means = torch.zeros(n_classes, x.shape[1], dtype=x.dtype).index_add_(0, y, weighed)
    means /= torch.bincount(y, counts, minlength=n_classes)[:, None]
    if counts is None:
        spread = x.std(0, correction=0)
    else:
        # As far as rounding lets one tell: what is constant has no spread.
        spread = average(centred(x, counts).square(), counts).sqrt()
    signature = (means - means.mean(0)) / torch.where(spread > 0, spread, torch.inf)
    signature = torch.nn.functional.normalize(signature, dim=1)
    return ((1 + signature @ signature.T) / 2).clamp(0, 1).numpy()


def agglomerate(affinity: np.ndarray, n_clusters: int, max_size: int | None = None) -> np.ndarray:
    """Agglomerative clustering, average linkage, with a limit on the clusters' sizes.

    Shapes: `affinity` (n_classes, n_classes), returns (n_classes,).
    """
    n = len(affinity)
    limit = n if max_size is None else max_size
    if n_clusters * limit < n:
        raise ValueError(
            f"{n_clusters} clusters of at most {limit} classes cannot hold {n} classes. Raise "
            "n_clusters or max_cluster_size."
        )
    a = affinity.astype(float).copy()
    np.fill_diagonal(a, 0.0)
    members: list[list[int]] = [[i] for i in range(n)]
    total = a.copy()  # summed affinity between clusters
    while len(members) > n_clusters:
        sizes = np.array([len(m) for m in members])
        mean = total / np.outer(sizes, sizes)
        mean[sizes[:, None] + sizes[None, :] > limit] = -np.inf
        np.fill_diagonal(mean, -np.inf)
        i, j = sorted(divmod(int(np.argmax(mean)), len(members)))
        if np.isfinite(mean[i, j]):
            members[i] += members[j]
            total[i] += total[j]
            total[:, i] += total[:, j]
            gone = j
        else:
            gone = int(np.argmin(sizes))
            homeless = members[gone]
            for label in homeless:
                room = [c for c in range(len(members)) if c != gone and len(members[c]) < limit]
                best = max(room, key=lambda c: a[label, members[c]].mean())
                members[best].append(label)
            total = np.array([[a[np.ix_(p, q)].sum() for q in members] for p in members])
        del members[gone]
        total = np.delete(np.delete(total, gone, 0), gone, 1)
    labels = np.empty(n, dtype=np.int64)
    for c, group in enumerate(sorted(members, key=min)):
        labels[group] = c
    return labels
