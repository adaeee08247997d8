"""Who leaves at the route predictor, who takes the fallback, what is right then, what it costs.

One rule for all that ask: the choice of a place for the predictor, the choice of thresholds, and
the account of a finished network.  It is that of `SINFNetwork.branches`, on arrays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..data.validation import mean
from ..inference.router import choose_exit, choose_threshold


@dataclass(frozen=True)
class Signals:
    """What is known of n images at the route predictor and behind it; arrays of shape (n,).

    `sure` is the log-probability of the predictor's likeliest class, `confidence` the probability
    of its likeliest cluster.  `base`, `early`, `routed` and `fallback` tell whether the base, that
    class, the cluster's subgraph and the fallback are right.  Costs are fractions of the base's.
    """

    base: np.ndarray
    sure: np.ndarray
    early: np.ndarray
    confidence: np.ndarray
    routed: np.ndarray
    fallback: np.ndarray
    routed_cost: np.ndarray
    fallback_cost: np.ndarray
    shared_cost: float
    weight: np.ndarray | None = None

    @property
    def can_fall_back(self) -> bool:
        """Whether the fallback is another way than the routed one."""
        return self.fallback is not self.routed


@dataclass(frozen=True)
class Gates:
    """Thresholds: images at least so sure leave (None: none do), less confident ones fall back."""

    exit: float | None = None
    confidence: float = 0.0


@dataclass(frozen=True)
class Passage:
    """Which way n images took, whether they are right there, and the means over all of them."""

    leaves: np.ndarray
    falls: np.ndarray
    right: np.ndarray
    exit_share: float
    fallback_share: float
    drop: float
    drop_error: float
    cost: float


def let_through(signals: Signals, gates: Gates) -> Passage:
    """Send images through the gates: who leaves does not fall back."""
    leaves = np.zeros(len(signals.sure), dtype=bool)
    if gates.exit is not None:
        leaves = signals.sure >= math.log(max(gates.exit, 1e-30))
    falls = (signals.confidence < gates.confidence) & ~leaves
    right = np.where(leaves, signals.early, np.where(falls, signals.fallback, signals.routed))
    cost = np.where(falls, signals.fallback_cost, signals.routed_cost) * ~leaves
    lost, weight = signals.base.astype(float) - right, signals.weight
    drop, n_images = mean(lost, weight), len(lost) if weight is None else weight.sum()
    return Passage(
        leaves,
        falls,
        right,
        mean(leaves, weight),
        mean(falls, weight),
        drop,
        float((mean((lost - drop) ** 2, weight) / n_images) ** 0.5),
        signals.shared_cost + mean(cost, weight),
    )


def choose_gates(
    signals: Signals,
    exit_threshold: float | str | None,
    confidence_threshold: float | str,
    max_drop: float,
) -> Gates:
    """Take the thresholds that are given; set those that are "auto" so that `max_drop` is kept."""
    target = mean(signals.base, signals.weight) - max_drop
    if isinstance(confidence_threshold, str):
        confidence_threshold = choose_threshold(
            signals.confidence,
            signals.routed,
            signals.fallback,
            target=target,
            weight=signals.weight,
        )
    if not isinstance(exit_threshold, str):
        return Gates(exit_threshold, confidence_threshold)
    without = let_through(signals, Gates(None, confidence_threshold))
    threshold = choose_exit(
        np.exp(signals.sure), signals.early, without.right, target=target, weight=signals.weight
    )
    return Gates(threshold if threshold <= 1 else None, confidence_threshold)
