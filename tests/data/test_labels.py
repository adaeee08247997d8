"""Labels in another order than the network's outputs are found, and nothing else is."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from sinfkit import CalibrationWarning, DCSPruner
from sinfkit.data import check_order, match_classes

SEEDS = st.integers(0, 10_000)


def answered(rng, y, n_classes, accuracy):
    """Answers of a network of some accuracy, whose errors are spread over the other classes."""
    wrong = (y + rng.integers(1, n_classes, len(y))) % n_classes
    return np.where(rng.random(len(y)) < accuracy, y, wrong)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(n=st.integers(2, 20), per_class=st.integers(25, 60), accuracy=st.floats(0.9, 1), seed=SEEDS)
def test_any_other_order_is_found_and_the_right_one_is_printed(n, per_class, accuracy, seed):
    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    assume((order != np.arange(n)).any())
    y = np.repeat(np.arange(n), per_class)
    table = match_classes(y, n, None)
    outputs = answered(rng, np.argsort(order)[y], n, accuracy)  # output o means class order[o]
    with pytest.raises(ValueError, match="another order") as caught:
        check_order(table, outputs, table.encode(y))
    assert str(order.tolist()) in str(caught.value)
    check_order(match_classes(y, n, order), order[outputs], y)


@pytest.mark.parametrize(("seen", "found"), [(3, "nothing"), (8, "warning"), (20, "error")])
def test_of_few_exchanged_answers_there_is_a_warning_first(seen, found):
    # Ten classes are right ten times each, the first and the last change places.
    y = np.concatenate([np.repeat(np.arange(1, 11), 10), np.repeat([0, 11], seen)])
    answers = np.where(np.isin(y, (0, 11)), 11 - y, y)
    table = match_classes(y, 12, None)
    if found == "error":
        with pytest.raises(ValueError, match="seem mismatched"):
            check_order(table, answers, y)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_order(table, answers, y)
    assert [w.category for w in caught] == [CalibrationWarning] * (found == "warning")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(n=st.integers(2, 40), per_class=st.integers(1, 40), accuracy=st.floats(0, 1), seed=SEEDS)
def test_a_weak_network_in_the_right_order_is_no_error(n, per_class, accuracy, seed):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(n), per_class)
    # Right at least as often as any one wrong answer is given.
    answers = answered(rng, y, n, max(accuracy, 1 / n))
    check_order(match_classes(y, n, None), answers, y)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(n=st.integers(2, 12), untrained=st.integers(1, 3), seed=SEEDS)
def test_a_network_that_gives_few_answers_is_not_taken_for_a_permuted_one(n, untrained, seed):
    assume(untrained <= n / 2)
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(n), 30)
    answers = rng.integers(0, untrained, n)[y]
    check_order(match_classes(y, n, None), answers, y)


@given(labels=st.sets(st.integers(0, 200), min_size=2, max_size=30))
def test_numbers_as_text_are_refused_where_their_order_is_another(labels):
    text = np.array(sorted(map(str, labels)))
    y = np.repeat(text, 2)
    if [int(t) for t in text] == sorted(labels):
        match_classes(y, len(text), None)
    else:
        with pytest.raises(ValueError, match=r"astype\(int\)"):
            match_classes(y, len(text), None)
    match_classes(y, len(text), [str(k) for k in sorted(labels)])


def test_one_exchanged_pair_stops_a_fit():
    rng = np.random.default_rng(0)
    centres = 4 * np.eye(6)
    y = np.repeat(np.arange(6), 20)
    X = (centres[y] + rng.normal(size=(120, 6))).astype(np.float32)
    network = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))
    with torch.no_grad():
        network[0].weight.copy_(torch.cat([torch.eye(6), torch.eye(6)]))
        network[0].bias.zero_()
        network[2].weight.copy_(torch.cat([torch.eye(6), torch.eye(6)], 1))
        network[2].bias.zero_()
    exchanged = np.array([0, 3, 2, 1, 4, 5])[y]
    with pytest.raises(ValueError, match=r"model_classes=\[0, 3, 2, 1, 4, 5\]"):
        DCSPruner(network, budget=0.5, device="cpu").fit(X, exchanged)
