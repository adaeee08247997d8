"""How small may the network be? A ladder of sizes, and the climb to the best of its rungs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["LADDER", "Goal", "Outcome", "Size", "climb"]


@dataclass(frozen=True)
class Size:
    """How much of a network a sample may cost.

    Attributes
    ----------
    prefix_ratio : float or None
        Fraction of filters removed from each layer before the route predictor.  None: prefix and
        subgraphs share the budget.
    min_ratio, max_ratio : float
        Fraction of filters removed from the first and from the last layer behind it; with a budget,
        `max_ratio` is the most that any layer may lose.
    budget : float or None
        Cost of prefix and one subgraph that may stay, as a fraction of the base's.
    low_rank : float
        Fraction of the sliced prefix's multiplications that stay when its layers become products
        of two; 1 leaves them as they are.
    """

    prefix_ratio: float | None
    min_ratio: float
    max_ratio: float
    budget: float | None = None
    low_rank: float = 1.0


# Our choice: each step costs about a fifth less than the one before.
LADDER = tuple(
    Size(None, 0.0, 0.95, budget) for budget in (0.8, 0.63, 0.5, 0.4, 0.32, 0.25, 0.2, 0.16)
)
"""Sizes from careful to bold."""


@dataclass(frozen=True)
class Outcome:
    """What a size gave on held-out samples.

    Attributes
    ----------
    drop : float
        Accuracy of the base minus that of the routed network.
    cost : float
        Expected multiplications per sample, as a fraction of the base's.
    speedup : float
        Measured time of the base over that of the routed network; NaN where it was not asked for.
    """

    drop: float
    cost: float
    speedup: float = float("nan")


@dataclass(frozen=True)
class Goal:
    """What the search is for: the cheapest within a loss, or the most accurate at a speed.

    Attributes
    ----------
    max_drop : float
        Accuracy that may be given away.
    speedup : float or None
        Where given, the most accurate network that is so many times as fast as the base.
    """

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
        """Which way on the ladder leads away from the limit."""
        return 1 if self.speedup is None else -1


def climb(
    evaluate: Callable[[int], Outcome], n_rungs: int, start: int, goal: Goal
) -> tuple[int, Outcome]:
    """Find the best rung of a ladder on which the outcome has one summit.

    Parameters
    ----------
    evaluate : callable
        From the number of a rung to its outcome; called at most once per rung.
    n_rungs : int
    start : int
    goal : Goal

    Returns
    -------
    rung : int
    outcome : Outcome

    Notes
    -----
    From `start` one step at a time, up while that is better, else (or where that stays outside the
    limit, by noise) down: a bolder size does less work, but sends more samples to the base, so that
    the cost has a minimum.  Towards a limit that has not been met yet, the way goes on over steps
    that are no better, which noise can make.

    Examples
    --------
    >>> from sinfkit.routing import Goal, Outcome, climb
    >>> drops = [0.0, 0.002, 0.004, 0.008, 0.02, 0.05]
    >>> climb(lambda i: Outcome(drops[i], 1 - i / 10), 6, 1, Goal(max_drop=0.01))[0]
    3
    """
    best, found = start, evaluate(start)
    for step in (1, -1):
        rung = start + step
        while 0 <= rung < n_rungs:
            outcome = evaluate(rung)
            if goal.better(outcome, found):
                best, found = rung, outcome
            elif goal.reached(found) or step == goal.away:
                break
            rung += step
        if best != start and (goal.reached(found) or step != goal.away):
            break
    return best, found
