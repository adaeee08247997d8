"""What is kept of what was built: the cheapest network and thresholds whose loss can be shown.

The images that choose put networks and thresholds in an order from careful to bold; images that
have chosen nothing certify as far as they can.  Along the way cost falls and loss rises: Pareto
testing (arXiv 2210.07913), a form of fixed-sequence testing (arXiv 2110.01052).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..promise import Certificate, certify, count_discordant, fixed_sequence
from .config import RoutingConfig
from .gates import Gates, Passage, Signals, let_through

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
