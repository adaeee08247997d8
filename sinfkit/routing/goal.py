"""What serves a goal better, and hill climbing to what serves it best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Goal", "Outcome", "hill_climb"]


@dataclass(frozen=True)
class Outcome:
    """What a size gave on held-out samples."""

    drop: float
    cost: float
    speedup: float = float("nan")


@dataclass(frozen=True)
class Goal:
    """What the search is for: the cheapest within a loss, or the most accurate at a speed."""

    max_drop: float
    speedup: float | None = None

    def reached(self, outcome: Outcome) -> bool:
        """Tell whether an outcome is within the limit."""
        if self.speedup is not None:
            return outcome.speedup >= self.speedup
        return outcome.drop <= self.max_drop + 1e-12

    def better(self, a: Outcome, b: Outcome) -> bool:
        """Tell whether `a` serves the goal better than `b`.

        Within the limit, the cheaper (for a speed: the more accurate) is better; outside, the one
        that is nearer to the limit.
        """
        inside = self.reached(a)
        if inside != self.reached(b):
            return inside
        if self.speedup is None:
            return a.cost < b.cost if inside else a.drop < b.drop
        return a.drop < b.drop if inside else a.speedup > b.speedup

    @property
    def away(self) -> int:
        """Which way, over sizes from careful to bold, leads away from the limit."""
        return 1 if self.speedup is None else -1


def hill_climb(
    evaluate: Callable[[int], Outcome], n_sizes: int, start: int, goal: Goal
) -> tuple[int, Outcome]:
    """Find the best of sizes, from careful to bold, over which the outcome has one summit."""
    best, found = start, evaluate(start)
    for step in (1, -1):
        index = start + step
        while 0 <= index < n_sizes:
            outcome = evaluate(index)
            if goal.better(outcome, found):
                best, found = index, outcome
            elif goal.reached(found) or step == goal.away:
                break
            index += step
        if best != start and (goal.reached(found) or step != goal.away):
            break
    return best, found
