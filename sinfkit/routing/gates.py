"""Who leaves at the route predictor, who takes the fallback, and which thresholds are kept.

One rule for all that ask what is right then and what it costs: the choice of a place for the
predictor, the choice of thresholds, and the account of a finished network.  It is that of
`SINFNetwork.branches`, on arrays.

The images that choose put networks and thresholds in an order from careful to bold; images that
have chosen nothing certify as far as they can.  Along the way cost falls and loss rises: Pareto
testing (arXiv 2210.07913), a form of fixed-sequence testing (arXiv 2110.01052).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..data.validation import mean
from ..inference.network import choose_exit, choose_threshold
from ..promise import Certificate, certify, count_discordant, fixed_sequence
from .study import RoutingConfig


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


@dataclass(frozen=True)
class Outcome:
    """What a size gave on held-out samples."""

    drop: float
    cost: float
    speedup: float = float("nan")


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
    return Gates(threshold, confidence_threshold)


_LEVELS = 41  # shares of images that leave, or fall back, that are tried
_STEPS = 60  # at most so many are tested one after the other


@dataclass(frozen=True)
class Point:
    """Network number `network` with some thresholds, and what it does to the images that choose."""

    network: int
    gates: Gates
    passage: Passage


@dataclass(frozen=True)
class Verdict:
    """The point that is kept, and what images that chose nothing say about it.

    `passage` and `drop` are about these; where there are none, the choosing ones stand in.
    """

    point: Point
    passage: Passage
    certificate: Certificate

    @property
    def drop(self) -> float:
        """Accuracy lost on images that chose nothing."""
        return self.passage.drop


def judge(
    choosing: Sequence[Signals], certifying: Sequence[Signals], config: RoutingConfig
) -> tuple[Verdict, bool]:
    """Keep the boldest network and thresholds that are certified, or else seem within the limit.

    `choosing` and `certifying` have the signals of each network on the images of either purpose.
    Where not even the most careful seems within the limit, that one is returned, with False.
    """
    limit, confidence = config.max_accuracy_drop, config.confidence
    path = careful_to_bold(choosing, config)
    passages = [let_through(certifying[point.network], point.gates) for point in path]
    counts = [
        count_discordant(certifying[point.network].base, passage.right, certifying[0].weight)
        for point, passage in zip(path, passages, strict=True)
    ]
    index, certificate = fixed_sequence(counts, limit, confidence)
    if index is not None and certificate is not None:
        return Verdict(path[index], passages[index], certificate), True
    chosen = -1
    for i, point in enumerate(path):
        if passages[i].drop > limit + 1e-12:
            break
        if point.passage.drop <= limit + 1e-12:
            chosen = i
    kept = max(chosen, 0)
    own = certify(*counts[kept], limit, confidence)
    # Even where it alone would pass: it was not the first to be tested.
    return Verdict(path[kept], passages[kept], replace(own, certified=False)), chosen >= 0


def careful_to_bold(choosing: Sequence[Signals], config: RoutingConfig) -> list[Point]:
    """Networks and thresholds of which none is both cheaper and better; the safest first.

    Those beyond the limit by more than a standard error are left out.
    """
    points = [
        Point(i, gates, let_through(signals, gates))
        for i, signals in enumerate(choosing)
        for gates in gates_to_try(signals, config)
    ]
    points.sort(key=lambda p: (p.passage.drop + p.passage.drop_error, p.passage.cost))
    path = points[:1]
    for point in points[1:]:
        beyond = point.passage.drop - point.passage.drop_error > config.max_accuracy_drop + 1e-12
        if point.passage.cost < path[-1].passage.cost and not beyond:
            path.append(point)
    steps = np.linspace(0, len(path) - 1, min(_STEPS, len(path)))
    return [path[i] for i in steps.round().astype(int)]


def gates_to_try(signals: Signals, config: RoutingConfig) -> list[Gates]:
    """Thresholds between images that choose, by the share that they let leave or fall back."""
    exits: list[float | None] = [None]
    if isinstance(config.exit_threshold, str):
        exits += [float(t) for t in between(np.exp(signals.sure.astype(float))) if t > 0]
    else:
        exits = [config.exit_threshold]
    confidences = [0.0]
    if not isinstance(config.confidence_threshold, str):
        confidences = [float(config.confidence_threshold)]
    elif config.fallback != "none" and signals.can_fall_back:
        confidences = [0.0, *between(signals.confidence.astype(float)), 1.0]
    return [Gates(exit, confidence) for exit in exits for confidence in confidences]


def between(values: np.ndarray) -> list[float]:
    """Thresholds half way between neighbours among the values, so that rounding moves nobody."""
    ranked = np.unique(values)
    if len(ranked) < 2:
        return []
    middle = (ranked[1:] + ranked[:-1]) / 2
    wanted = np.quantile(values, np.linspace(0, 1, _LEVELS)[1:-1])
    places = np.unique(np.searchsorted(middle, wanted).clip(0, len(middle) - 1))
    return [float(t) for t in middle[places] if t < 1]
