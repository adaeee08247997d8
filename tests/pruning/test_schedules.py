"""Schedules of removal and the choice of filters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinfkit.pruning import (
    SCHEDULES,
    CostModel,
    marginal_losses,
    n_above_mean,
    n_removed,
    removal_ratios,
    select_top,
    widths_within,
)

RATIOS = st.floats(0.0, 0.95)


@given(st.integers(2, 40), st.sampled_from(sorted(SCHEDULES)), RATIOS, RATIOS)
def test_ratios_run_from_first_to_last(n_layers, schedule, a, b):
    low, high = sorted((a, b))
    ratios = removal_ratios(n_layers, schedule, low, high)
    assert ratios.shape == (n_layers,)
    assert np.all(np.diff(ratios) >= -1e-12)
    assert ratios[-1] == pytest.approx(high)
    assert ratios[0] == pytest.approx(high if schedule == "uniform" else low)


def test_linear_and_geometric_by_hand():
    np.testing.assert_allclose(removal_ratios(5, "linear", 0.1, 0.5), [0.1, 0.2, 0.3, 0.4, 0.5])
    # 0.8, 0.4, 0.2 of the filters are kept.
    np.testing.assert_allclose(removal_ratios(3, "geometric", 0.2, 0.8), [0.2, 0.6, 0.8])


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_single_layer_gets_the_largest_ratio(schedule):
    np.testing.assert_array_equal(removal_ratios(1, schedule, 0.1, 0.5), [0.5])
    assert len(removal_ratios(0, schedule, 0.1, 0.5)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, "cubic", 0.1, 0.5), "cubic"),
        ((3, "linear", 0.5, 0.1), "below min_ratio"),
        ((3, "linear", -0.1, 0.1), "min_ratio"),
        ((3, "linear", 0.1, 1.0), "max_ratio"),
        ((3, "uniform", 0.1, float("nan")), "max_ratio"),
        ((-1, "linear", 0.1, 0.5), "n_layers"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        removal_ratios(*arguments)


def test_counts_by_hand():
    assert n_removed(0.3, 64) == 19
    assert n_removed(0.29, 100) == 29  # the product is a little below 29 in floating point
    assert n_removed(0.7, 10) == 7
    assert n_removed(0.0, 64) == 0
    assert n_removed(0.999, 3) == 2
    assert n_removed(0.9, 1) == 0
    assert n_removed(0.3, 64, multiple=4) == 16
    assert n_removed(0.9, 4, multiple=4) == 0


@pytest.mark.parametrize("arguments", [(1.0, 4), (-0.1, 4), (0.5, 0), (0.5, 6, 4), (0.5, 6, 0)])
def test_bad_counts_are_refused(arguments):
    with pytest.raises(ValueError):
        n_removed(*arguments)


def kept_of(scores, ratio, n_groups=1):
    n = len(scores)
    return select_top(scores, n - n_removed(ratio, n, n_groups), n_groups)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), RATIOS)
def test_the_lowest_go_and_ties_go_from_the_end(scores, ratio):
    kept = kept_of(scores, ratio)
    assert kept.dtype == np.int64
    assert np.all(np.diff(kept) > 0)
    assert len(scores) - len(kept) == n_removed(ratio, len(scores))
    # Explicitly: remove one filter at a time, the lowest, and of equal ones the last.
    alive = list(range(len(scores)))
    while len(alive) > len(kept):
        alive.remove(min(alive, key=lambda i: (scores[i], -i)))
    assert kept.tolist() == alive


@given(st.integers(1, 5), st.integers(1, 6), RATIOS, st.integers(0, 2**32 - 1))
def test_groups_lose_the_same_local_indices(n_groups, per_group, ratio, seed):
    scores = np.random.default_rng(seed).random(n_groups * per_group)
    kept = kept_of(scores, ratio, n_groups)
    assert len(scores) - len(kept) == n_removed(ratio, len(scores), n_groups)
    local = (kept % per_group).reshape(n_groups, -1)
    assert (local == local[0]).all()
    assert (kept // per_group).tolist() == np.repeat(np.arange(n_groups), local.shape[1]).tolist()
    sums = scores.reshape(n_groups, per_group).sum(0)
    gone = np.setdiff1d(np.arange(per_group), local[0])
    assert not len(gone) or sums[gone].max() <= sums[local[0]].min()


@pytest.mark.parametrize(
    ("scores", "n_groups", "message"),
    [
        ([1.0, float("nan")], 1, r"NaN.*\[1\]"),
        ([[1.0, 2.0]], 1, "one-dimensional"),
        ([1.0, 2.0, 3.0], 2, "divide"),
        ([], 1, "divide"),
    ],
)
def test_bad_scores_are_refused(scores, n_groups, message):
    with pytest.raises(ValueError, match=message):
        select_top(scores, 1, n_groups)


def test_infinite_scores_rank_as_numbers():
    assert select_top([np.inf, 0.0, -np.inf], 2).tolist() == [0, 1]


def chain(widths, n_inputs=3):
    """Cost model of layers in a row."""
    n = len(widths)
    outputs, inputs = np.zeros((n, n + 1)), np.zeros((n, n + 1))
    outputs[:, 1:] = np.eye(n)
    inputs[0, 0] = n_inputs
    inputs[1:, 1:-1] = np.eye(n - 1)
    base = float(sum(a * b for a, b in zip([n_inputs, *widths], widths, strict=False)))
    return CostModel(np.array(widths), 0.0, np.ones(n), outputs, inputs, base)


@st.composite
def problems(draw):
    """Widths, steps and losses of a chain, with ties."""
    n = draw(st.integers(1, 5))
    units = draw(st.lists(st.integers(1, 8), min_size=n, max_size=n))
    steps = draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    cost = chain([u * s for u, s in zip(units, steps, strict=True)])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return cost, [np.sort(rng.integers(0, 4, u) / 7.0) for u in units], np.array(steps)


@given(problems(), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.floats(0.0, 0.99))
def test_a_budget_is_met_within_one_filter(problem, a, b, max_ratio):
    cost, losses, steps = problem
    found = []
    for budget in sorted((a, b), reverse=True):
        try:
            widths = widths_within(losses, cost, budget, max_ratio)
        except ValueError as error:
            assert "budget" in str(error) and "max_ratio" in str(error)
            caps = [
                n_removed(max_ratio, int(n), int(s))
                for n, s in zip(cost.widths, steps, strict=True)
            ]
            assert cost.total(cost.widths - caps) > budget * cost.base
            continue
        assert cost.total(widths) <= budget * cost.base * (1 + 1e-9)
        assert (widths >= steps).all() and ((cost.widths - widths) % steps == 0).all()
        for n, left, step in zip(cost.widths, widths, steps, strict=True):
            assert n - left <= n_removed(max_ratio, int(n), int(step))
        if (widths < cost.widths).any():
            # The last removal was needed: with one of the removed filters back it is not met.
            back = [
                cost.total(widths + steps * (np.arange(len(steps)) == i))
                for i in np.flatnonzero(widths < cost.widths)
            ]
            assert max(back) > budget * cost.base
        found.append(widths)
    if len(found) == 2:  # a smaller budget goes further on the same way
        assert (found[1] <= found[0]).all()


def test_the_cheapest_for_what_it_saves_goes_by_hand():
    # 3 x 4 + 4 x 4 = 28.  A filter of the first layer saves 3 + 4, of the second 4.
    losses = [np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.01, 0.09, 0.4, 0.5])]
    cost = chain([4, 4])
    # 0.01 / 4 < 0.1 / 7; then the first saves 3 + 3: 0.1 / 6 < 0.09 / 4; then 0.09 / 3 < 0.2 / 6
    for budget, expected in ((1.0, [4, 4]), (27, [4, 3]), (23, [3, 3]), (17, [3, 2])):
        limit = budget if budget <= 1 else budget / 28
        assert widths_within(losses, cost, limit).tolist() == expected
    # of equal ones the earliest
    alike = CostModel(np.array([4, 4]), 0.0, np.ones(2), np.eye(3)[1:], np.eye(3)[[0, 0]], 8.0)
    even = [np.full(4, 0.25)] * 2
    assert widths_within(even, alike, 7 / 8).tolist() == [3, 4]
    assert widths_within(even, alike, 4 / 8).tolist() == [1, 3]  # three of four at most


def test_the_message_names_a_cap_that_is_enough():
    cost = chain([20, 20])
    losses = [np.full(20, 0.05)] * 2
    with pytest.raises(ValueError, match=r"budget=0\.1 .*max_ratio=(\S+) would do") as caught:
        widths_within(losses, cost, 0.1, 0.5)
    enough = float(str(caught.value).split("max_ratio=")[-1].split()[0])
    widths_within(losses, cost, 0.1, enough)
    with pytest.raises(ValueError, match="budget"):
        widths_within(losses, cost, 0.1, enough - 0.05)
    with pytest.raises(ValueError, match="No max_ratio is enough"):
        widths_within(losses, cost, 1e-4, 0.5)
    for budget in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="budget must"):
            widths_within(losses, cost, budget)


def test_a_network_of_thousands_of_filters():
    widths = [64, 64, 128, 128, *[256] * 4, *[512] * 8]
    rng = np.random.default_rng(0)
    cost = chain(widths)
    left = widths_within([np.sort(rng.random(n)) / n for n in widths], cost, 0.1)
    assert 0.099 < cost.total(left) / cost.base <= 0.1


def test_losses_by_hand():
    np.testing.assert_allclose(marginal_losses([3.0, 1.0, 0.0, 4.0]), [0, 0.125, 0.375, 0.5])
    # runs of two: sums are 5, 3
    np.testing.assert_allclose(marginal_losses([1.0, 3, 4, 0], n_groups=2), [3 / 8, 5 / 8])
    np.testing.assert_allclose(
        marginal_losses([0.5, 0.2, 0.5, 0.2], n_groups=2, cumulative=True), [0.2, 0.3]
    )
    for cumulative in (False, True):  # nothing is known
        np.testing.assert_allclose(marginal_losses(np.zeros(4), cumulative=cumulative), 0.25)
    with pytest.raises(ValueError, match="not negative"):
        marginal_losses([1.0, -0.1])
    with pytest.raises(ValueError, match="finite"):
        marginal_losses([1.0, np.inf])
    with pytest.raises(ValueError, match="n_groups"):
        marginal_losses([1.0, 2.0, 3.0], n_groups=2)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.floats(0.0, 2.0))
def test_what_scores_far_below_the_mean(scores, factor):
    n = n_above_mean(scores, factor)
    limit = factor * np.mean(scores)
    assert n == max(1, sum(score > limit for score in scores))
    kept = select_top(scores, n)
    if n < len(scores) and n > 1:
        assert np.delete(scores, kept).max() <= limit < np.array(scores)[kept].min()


def test_bad_counts_and_factors():
    assert n_above_mean([1, 1, 5, 5], 1.0, n_groups=2) == 2
    assert select_top([1, 3, 2, 1], 2, n_groups=2).tolist() == [1, 3]
    with pytest.raises(ValueError, match="not negative"):
        n_above_mean([-1.0, 2.0], 0.5)
    with pytest.raises(ValueError, match="factor"):
        n_above_mean([1.0, 2.0], -0.5)
    for n_kept in (0, 3, 6):
        with pytest.raises(ValueError, match="n_kept"):
            select_top([1, 3, 2, 0], n_kept, n_groups=2)
