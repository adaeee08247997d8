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

    Shapes: `weight` (n_classes, n_features), `bias` (n_classes,).
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

    Shapes: `log_posterior` (n_held_out, n_classes).
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

    Shapes: `features` (n_samples, n_features), `codes` (n_samples,), `held_out` (n_held_out,
    n_features), `held_out_codes` (n_held_out,), `weight` (n_samples,), `held_out_weight`
    (n_held_out,).
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

    Shapes: `log_posterior` (n_samples, n_classes), `class_clusters` (n_classes,).
    """
    p = log_posterior.exp()
    out = p.new_zeros(len(p), n_clusters)
    return out.index_add_(1, class_clusters, p)


def fuse(
    log_router: Tensor, logits: Tensor, members: Tensor, router_weight: float | Tensor
) -> Tensor:
    """Join the router's posterior with a subgraph's answer.

    Shapes: `log_router` (n_samples, n_classes), `logits` (n_samples, n_classes), `members`
    (n_samples, n_classes), returns (n_samples, n_classes).
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

    A sample below the threshold takes the fallback's answer. A smaller threshold sends fewer
    samples there, and so is faster.

    Shapes: `confidence` (n_samples,), `routed_correct, fallback_correct` (n_samples,), `weight`
    (n_samples,).
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

    Shapes: `confidence` (n_samples,), `early_correct, later_correct` (n_samples,), `weight`
    (n_samples,).
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
