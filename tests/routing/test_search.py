"""The budgets that are tried, and hill climbing over them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sinfkit.routing import BUDGETS, Outcome, Target, hill_climb


def climb(evaluate, n, start, target):
    """Run a climb over `n` sizes to its end."""
    steps = hill_climb(range(n), start, target)
    index = next(steps)
    while True:
        try:
            index = steps.send(evaluate(index))
        except StopIteration as end:
            return end.value


def test_budgets_go_from_careful_to_bold():
    assert (np.diff(BUDGETS) < 0).all() and 0 < BUDGETS[-1] and BUDGETS[0] < 1


def test_within_the_limit_the_cheaper_is_better_and_outside_the_nearer():
    target = Target(max_drop=0.01)
    assert target.better(Outcome(0.01, 0.4), Outcome(0.0, 0.5))
    assert target.better(Outcome(0.01, 0.9), Outcome(0.011, 0.1))
    assert target.better(Outcome(0.02, 0.9), Outcome(0.03, 0.1))
    speed = Target(max_drop=0.01, speedup=2.0)
    assert speed.better(Outcome(0.05, 0.4, 2.1), Outcome(0.0, 0.5, 1.9))
    assert speed.better(Outcome(0.01, 0.4, 2.1), Outcome(0.02, 0.4, 3.0))
    assert speed.better(Outcome(0.01, 0.4, 1.8), Outcome(0.0, 0.4, 1.5))


@given(
    st.lists(st.floats(0, 0.02), min_size=1, max_size=8),
    st.integers(0, 7),
    st.floats(0, 0.1),
)
def test_the_climb_finds_the_boldest_rung_within_the_limit(steps, start, limit):
    """Drops rise and costs fall with the size: every one before the best is within."""
    drops = np.cumsum(steps)
    n, seen = len(drops), []

    def evaluate(i):
        seen.append(i)
        return Outcome(float(drops[i]), 1 - i / 10)

    best, outcome = climb(evaluate, n, min(start, n - 1), Target(limit))
    within = np.flatnonzero(drops <= limit + 1e-12)
    # Outside the limit the nearer is better; of equal drops the first seen is kept.
    assert outcome.drop == (drops[within[-1]] if len(within) else drops.min())
    assert best == within[-1] if len(within) else drops[best] == drops.min()
    assert len(seen) == len(set(seen)), "each size is built once"


def test_a_size_that_falls_back_too_often_is_passed_over():
    costs = [0.7, 0.6, 0.5, 0.45, 0.55, 0.8]
    assert climb(lambda i: Outcome(0.01, costs[i]), 6, 3, Target(0.01))[0] == 3
    assert climb(lambda i: Outcome(0.01, costs[i]), 6, 1, Target(0.01))[0] == 3
    assert climb(lambda i: Outcome(0.01, costs[i]), 6, 5, Target(0.01))[0] == 3


def test_for_a_speed_the_first_size_that_reaches_it_is_taken():
    speeds, drops = [1.2, 1.6, 2.1, 2.6], [0.0, 0.01, 0.02, 0.03]

    def evaluate(i):
        return Outcome(drops[i], 1 / speeds[i], speeds[i])

    for start in range(4):
        assert climb(evaluate, 4, start, Target(0.01, speedup=2.0))[0] == 2
    assert climb(evaluate, 4, 1, Target(0.01, speedup=9.0))[0] == 3


def test_a_step_away_that_noise_makes_better_does_not_hide_the_way_to_the_limit():
    drops = [0.0, 0.0, 0.02, 0.05, 0.049, 0.06]  # at 4 a little better than at 3, by chance
    seen = []

    def evaluate(i):
        seen.append(i)
        return Outcome(drops[i], 1 - i / 10)

    assert climb(evaluate, 6, 3, Target(0.01))[0] == 1
    assert len(seen) == len(set(seen)), "each size is built once"
