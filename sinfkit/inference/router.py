"""The semantic route predictor, which says what cluster an input belongs to.

The predictor is a probe on the prefix's pooled output.  It is fitted on the fine classes, and its
posterior is summed over each cluster's classes: it has seen finer distinctions than a probe fitted
on the clusters themselves, and its fine-class posterior is worth having again when the subgraph has
answered (our choice; the paper states a small classifier on the clusters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..criteria.activations import pool
from ..criteria.discriminability import average
from ..criteria.probe import Probe, fit_probe

__all__ = [
    "RoutePredictor",
    "choose_exit",
    "choose_threshold",
    "cluster_posterior",
    "fit_route_predictor",
    "fuse",
]

PENALTIES = (0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)


class RoutePredictor(nn.Module):
    """Pooled features of the prefix to log-probabilities of the fine classes.

    Parameters
    ----------
    weight : Tensor of shape (n_classes, n_features)
    bias : Tensor of shape (n_classes,)
    pool_size : int
        Feature maps are averaged to ``pool_size x pool_size``; `n_features` counts all of them.
    """

    def __init__(self, weight: Tensor, bias: Tensor, pool_size: int) -> None:
        super().__init__()
        self.pool_size = pool_size
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        """Map the prefix's output to log-posteriors of shape (n_samples, n_classes)."""
        # float32 or wider whatever the network computes in: a route must not hang on rounding.
        return self.of_pooled(pool(h, self.pool_size).to(self.weight.dtype))

    def of_pooled(self, features: Tensor) -> Tensor:
        """The same from pooled features, of shape (n_samples, n_features)."""
        return torch.log_softmax(features @ self.weight.T + self.bias, 1)


@dataclass(frozen=True)
class RouteFit:
    """A fitted route predictor and how well it does on held-out samples.

    Attributes
    ----------
    predictor : RoutePredictor
    penalty : float
        Ridge penalty with the smallest held-out log loss.
    log_posterior : Tensor of shape (n_held_out, n_classes)
        The predictor's answers on the held-out samples.
    """

    predictor: RoutePredictor
    penalty: float
    log_posterior: Tensor


def fit_route_predictor(
    features: Tensor,
    codes: np.ndarray,
    held_out: Tensor,
    held_out_codes: np.ndarray,
    *,
    pool_size: int,
    penalties: Sequence[float] = PENALTIES,
    weight: np.ndarray | None = None,
    held_out_weight: np.ndarray | None = None,
) -> RouteFit:
    """Fit the probe on the fine classes; the penalty is chosen on held-out samples.

    Parameters
    ----------
    features : Tensor of shape (n_samples, n_features)
        The prefix's output, pooled by `sinfkit.criteria.pool` with `pool_size`.
    codes : ndarray of shape (n_samples,)
        Fine classes, 0..K-1, each present.
    held_out : Tensor of shape (n_held_out, n_features)
    held_out_codes : ndarray of shape (n_held_out,)
    pool_size : int
    penalties : sequence of float
        Candidates for ``mean cross-entropy + penalty * ||W||^2`` on standardised features, in
        falling order; the search stops where the held-out log loss rises.
    weight : ndarray of shape (n_samples,), optional
        How many times each sample counts. Default: once.
    held_out_weight : ndarray of shape (n_held_out,), optional

    Returns
    -------
    RouteFit
    """
    dtype = features.dtype
    counts = None if weight is None else torch.as_tensor(weight).to(features)
    mean = average(features, counts)
    if counts is None:
        std = features.std(0, correction=0)
    else:
        std = average((features - mean).square(), counts).sqrt()
    std = torch.where(std > 1e-7 * std.max().clamp_min(1e-30), std, torch.ones_like(std))
    train, test = (features - mean) / std, (held_out - mean) / std
    y = torch.as_tensor(codes, device=features.device)
    y_test = torch.as_tensor(held_out_codes, device=features.device)
    best: tuple[float, float, Tensor, Tensor] | None = None
    probe: Probe | None = None
    for penalty in sorted(penalties, reverse=True):
        # Enough digits for a route; the last ones cost most of the time.
        probe = fit_probe(
            train, y, penalty=penalty, tol=1e-3, dtype=dtype, start=probe, sample_weight=counts
        )
        losses = -torch.log_softmax(probe.logits(test), 1).gather(1, y_test[:, None])
        if held_out_weight is None:
            loss = float(losses.mean())
        else:
            loss = float(average(losses, torch.as_tensor(held_out_weight).to(losses)))
        if best is not None and loss > best[0]:
            break
        coef = probe.coef / std
        bias = probe.intercept - (coef * mean).sum(1)
        best = (loss, penalty, coef, bias)
    assert best is not None
    _, penalty, coef, bias = best
    predictor = RoutePredictor(coef.to(dtype), bias.to(dtype), pool_size)
    return RouteFit(predictor, penalty, predictor.of_pooled(held_out))


def cluster_posterior(log_posterior: Tensor, class_clusters: Tensor, n_clusters: int) -> Tensor:
    """Sum class probabilities over each cluster.

    Parameters
    ----------
    log_posterior : Tensor of shape (n_samples, n_classes)
    class_clusters : int Tensor of shape (n_classes,)
        Cluster of each class.
    n_clusters : int

    Returns
    -------
    Tensor of shape (n_samples, n_clusters)
    """
    p = log_posterior.exp()
    out = p.new_zeros(len(p), n_clusters)
    return out.index_add_(1, class_clusters, p)


def fuse(
    log_router: Tensor, logits: Tensor, members: Tensor, router_weight: float | Tensor
) -> Tensor:
    """Join the router's posterior with a subgraph's answer.

    A class k of the cluster c that was run gets ``p(c)``, shared out in proportion to
    ``p_subgraph(k) * p_router(k) ** router_weight``; a class outside keeps the router's posterior,
    so that rows sum to 1 and no class gets probability 0.

    Parameters
    ----------
    log_router : Tensor of shape (n_samples, n_classes)
        Log-posterior of the route predictor.
    logits : Tensor of shape (n_samples, n_classes)
        The subgraph's logits in the columns of its classes, anything finite elsewhere.
    members : bool Tensor of shape (n_samples, n_classes)
        The classes of the cluster that was run for each row.
    router_weight : float

    Returns
    -------
    Tensor of shape (n_samples, n_classes)
        Probabilities.
    """
    joint = logits.to(log_router.dtype) + router_weight * log_router
    within = torch.softmax(joint.masked_fill(~members, -torch.inf), 1)
    posterior = log_router.exp()
    mass = (posterior * members).sum(1, keepdim=True)
    return torch.where(members, mass * within, posterior)


def choose_threshold(
    confidence: np.ndarray,
    routed_correct: np.ndarray,
    fallback_correct: np.ndarray,
    *,
    target: float,
    weight: np.ndarray | None = None,
) -> float:
    """Smallest confidence threshold whose accuracy reaches `target` on held-out samples.

    A sample below the threshold takes the fallback's answer.  A smaller threshold sends fewer
    samples there, and so is faster.

    Parameters
    ----------
    confidence : ndarray of shape (n_samples,)
        Route confidence of each held-out sample.
    routed_correct, fallback_correct : bool ndarray of shape (n_samples,)
        Whether the routed answer and the fallback's answer are right.
    target : float
        Accuracy to reach.
    weight : ndarray of shape (n_samples,), optional
        How many times each sample counts. Default: once.

    Returns
    -------
    float
        In [0, 1].  Where no threshold reaches `target`: the smallest whose accuracy is within one
        standard error (of the paired difference) of the best one's.  The last tenths of a point
        would send nearly every sample to the fallback, and lie within the noise.
    """
    order = np.argsort(confidence, kind="stable")
    ranked = confidence[order]
    gain = fallback_correct[order].astype(float) - routed_correct[order].astype(float)
    n_samples: int | float = len(order)
    if weight is not None:
        gain, n_samples = gain * weight[order], float(weight.sum())
    # accuracy[i]: the i least confident samples take the fallback.
    gained = np.concatenate(([0.0], np.cumsum(gain)))
    accuracy = _mean(routed_correct, weight) + gained / n_samples
    # A threshold of at most 1 cannot part equal confidences, nor doubt a certain route.
    possible = np.concatenate(([True], ranked[1:] > ranked[:-1], [ranked[-1] < 1]))
    reached = np.flatnonzero(possible & (accuracy >= target - 1e-12))
    if len(reached):
        index = int(reached[0])
    else:
        best = int(np.argmax(np.where(possible, accuracy, -np.inf)))
        changed = np.concatenate(([0.0], np.cumsum(np.abs(gain))))  # answers right in one alone
        short = gained[best] - gained
        error = np.sqrt(np.maximum(np.abs(changed[best] - changed) - short**2 / n_samples, 0.0))
        index = int(np.flatnonzero(possible & (short <= error))[0])
    if index == 0:
        return 0.0
    if index == len(ranked):
        return 1.0
    # Half way between neighbours, so that rounding does not move a sample across.
    return float((ranked[index - 1] + ranked[index]) / 2)


def choose_exit(
    confidence: np.ndarray,
    early_correct: np.ndarray,
    later_correct: np.ndarray,
    *,
    target: float,
    weight: np.ndarray | None = None,
) -> float:
    """Smallest probability at which samples may leave at the route predictor.

    The smaller the threshold, the more samples leave, and the faster the network is.

    Parameters
    ----------
    confidence : ndarray of shape (n_samples,)
        Of each held-out sample, the route predictor's probability of its most likely class.
    early_correct, later_correct : bool ndarray of shape (n_samples,)
        Whether the route predictor's class, and the answer of what comes behind it, are right.
    target : float
        Accuracy to keep.  Where even without exits it is not reached, the accuracy without exits
        is kept instead.
    weight : ndarray of shape (n_samples,), optional
        How many times each sample counts. Default: once.

    Returns
    -------
    float
        In [0, 1], or 2.0 where no sample may leave.

    Examples
    --------
    >>> import numpy as np
    >>> from sinfkit.inference import choose_exit
    >>> early, later = np.array([True, True, False]), np.array([True, True, True])
    >>> choose_exit(np.array([0.9, 0.7, 0.3]), early, later, target=1.0)
    0.5
    """
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order]
    gain = early_correct[order].astype(float) - later_correct[order].astype(float)
    n_samples: int | float = len(order)
    if weight is not None:
        gain, n_samples = gain * weight[order], float(weight.sum())
    # accuracy[i]: the i most confident samples leave.
    accuracy = _mean(later_correct, weight) + np.concatenate(([0.0], np.cumsum(gain))) / n_samples
    possible = np.concatenate(([True], ranked[1:] < ranked[:-1], [True]))
    reached = possible & (accuracy >= min(target, float(accuracy[0])) - 1e-12)
    index = int(np.flatnonzero(reached)[-1])
    if index == 0:
        return 2.0
    if index == len(ranked):
        return 0.0
    # Half way between neighbours, so that rounding does not move a sample across.
    return float((ranked[index - 1] + ranked[index]) / 2)


def _mean(values: np.ndarray, weight: np.ndarray | None) -> Any:
    """Mean over samples, of which some may count more than others."""
    return np.mean(values) if weight is None else np.average(values, weights=weight)
