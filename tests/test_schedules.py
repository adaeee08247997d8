"""Schedules of removal and the choice of filters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinfkit.schedules import SCHEDULES, n_removed, removal_ratios, select_kept

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


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), RATIOS)
def test_the_lowest_go_and_ties_go_from_the_end(scores, ratio):
    kept = select_kept(scores, ratio)
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
    kept = select_kept(scores, ratio, n_groups)
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
        ([], 1, "at least one"),
    ],
)
def test_bad_scores_are_refused(scores, n_groups, message):
    with pytest.raises(ValueError, match=message):
        select_kept(scores, 0.5, n_groups)


def test_infinite_scores_rank_as_numbers():
    assert select_kept([np.inf, 0.0, -np.inf], 0.34).tolist() == [0, 1]
