"""The search: who fits, who chooses, who certifies, and what is kept of what was tried."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st

from sinfkit import DCSPruner, FrozenModel, PromiseWarning, PruningOptions, train_network
from sinfkit.graph import count_macs
from sinfkit.pruning import Goal, split_samples


@pytest.fixture(scope="module")
def trained():
    X, y = blobs(per_class=250, noise=1.0)
    network = train_network(
        small_cnn(), X[:300], y[:300], epochs=12, batch_size=32, random_state=0, device="cpu"
    )
    return FrozenModel(network), X[300:], y[300:]


@pytest.fixture(scope="module")
def searched(trained):
    frozen, X, y = trained
    return DCSPruner(frozen, max_accuracy_drop=0.02, random_state=0, device="cpu").fit(X, y)


def quiet(pruner, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pruner.fit(*args, **kwargs)


@settings(max_examples=60, deadline=None)
@given(
    n_classes=st.integers(1, 5),
    n=st.integers(10, 1500),
    fraction=st.sampled_from([0.0, 0.1, 0.2, 0.5]),
    limit=st.sampled_from([0.0, 0.01, 0.05]),
    searches=st.booleans(),
)
def test_no_sample_has_two_tasks(n_classes, n, fraction, limit, searches):
    y = np.arange(2 * n_classes + n) % n_classes
    index = 10 + np.arange(len(y))
    goal = Goal(limit, 0.9) if searches else None
    split = split_samples(y, index, fraction, goal, 0)
    parts = [split.fit, split.choose, split.certify]
    assert sorted(np.concatenate(parts)) == index.tolist()
    assert len(split.fit) >= n_classes
    if fraction == 0 or goal is None:
        assert len(split.choose) == 0
    if fraction == 0:
        assert len(split.certify) == 0
    elif goal is not None and goal.fewest <= len(y) / 2:
        # As many as it takes, where they are there.
        assert len(split.certify) >= goal.fewest - n_classes


def test_what_is_certified_is_small_enough_to_be_worth_it(trained, searched):
    frozen, X, y = trained
    example = torch.zeros(1, 1, 8, 8)
    ratio = count_macs(searched.model_, example)[0] / count_macs(frozen.module("cpu"), example)[0]
    assert searched.cost_ratio_ == pytest.approx(ratio) and ratio < 0.8
    assert searched.certified_ is True
    assert searched.accuracy_drop_ <= searched.certified_drop_ <= 0.02
    assert searched.sliceable_share_ == pytest.approx(1.0)
    stages = [row["stage"] for row in searched.search_results_]
    assert stages.count("sketch") <= 5 and 1 <= stages.count("finalist") <= 8
    kept = [r for r in searched.search_results_ if r["cost_ratio"] == searched.cost_ratio_]
    assert any(row["stage"] == "finalist" for row in kept)


def test_a_search_repeats_itself_and_a_refit_obeys_too(trained, searched):
    frozen, X, y = trained
    again = DCSPruner(frozen, max_accuracy_drop=0.02, random_state=0, device="cpu").fit(X, y)
    assert again.search_results_ == searched.search_results_
    np.testing.assert_array_equal(again.predict_proba(X[:50]), searched.predict_proba(X[:50]))
    again.set_params(budget=0.5).fit(X, y)
    assert not hasattr(again, "search_results_") and again.cost_ratio_ <= 0.5


def test_too_few_samples_give_an_estimate_and_one_warning(trained):
    frozen, X, y = trained
    with pytest.warns(UserWarning) as caught:
        pruner = DCSPruner(frozen, random_state=0, device="cpu").fit(X[:150], y[:150])
    about = [str(w.message) for w in caught if "max_accuracy_drop" in str(w.message)]
    assert len(about) == 1
    if pruner.cost_ratio_ < 1:
        assert not pruner.certified_ and math.isnan(pruner.certified_drop_)
        assert pruner.accuracy_drop_ <= 0.01
        assert "cannot show" in about[0] and "would show it" in about[0]


def test_where_nothing_may_be_lost_the_base_stays(trained):
    frozen, X, y = trained
    rng = np.random.default_rng(0)
    # Random labels that the base has learned: whatever changes, is lost.
    pruner = DCSPruner(
        frozen,
        criterion="random",
        repair="none",
        max_accuracy_drop=0.0,
        random_state=0,
        device="cpu",
    )
    hard = X + rng.normal(size=X.shape).astype(np.float32)
    with torch.inference_mode():
        own = frozen.module("cpu")(torch.as_tensor(hard)).argmax(1).numpy()
    with pytest.warns(UserWarning, match="Nothing was removed"):
        pruner.fit(hard, own)
    assert pruner.cost_ratio_ == 1.0 and pruner.accuracy_drop_ == 0.0
    assert (pruner.predict(hard) == own).all() and pruner.certified_


def test_what_was_asked_for_is_given_and_judged(trained):
    frozen, X, y = trained
    careful = quiet(DCSPruner(frozen, budget=0.95, max_accuracy_drop=0.05, random_state=0), X, y)
    assert careful.certified_ and careful.certified_drop_ <= 0.05
    bold = DCSPruner(frozen, criterion="random", repair="none", budget=0.2, random_state=0)
    with pytest.warns(UserWarning, match="held-out samples the smaller network loses"):
        bold.fit(X, y)
    assert not bold.certified_ and bold.accuracy_drop_ > 0.01 and bold.cost_ratio_ <= 0.2
    blind = bold.set_params(options=PruningOptions(validation_fraction=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromiseWarning)  # nobody asked what is lost
        blind.fit(X, y)
    assert math.isnan(blind.accuracy_drop_) and not blind.certified_


def test_without_labels_the_bases_own_answers_count(trained):
    frozen, X, y = trained
    for criterion in ("obs", "l1", "fpgm"):
        pruner = quiet(DCSPruner(frozen, criterion=criterion, budget=0.6, random_state=0), X)
        assert pruner.cost_ratio_ <= 0.6 and pruner.classes_.tolist() == list(range(6))
    with torch.inference_mode():
        own = frozen.module("cpu")(torch.as_tensor(X)).argmax(1).numpy()
    assert pruner.score(X, own) == pytest.approx(1 - pruner.accuracy_drop_, abs=0.15)
    # Not every class has to be among the answers.
    few = X[own != 3]
    assert len(quiet(pruner, few).classes_) == 6
    names = np.array(list("abcdef"))
    named = quiet(pruner.set_params(model_classes=names), few)
    assert named.classes_.tolist() == list("abcdef")
    searched = quiet(DCSPruner(frozen, criterion="obs", random_state=0), X)
    assert searched.cost_ratio_ < 1
    for criterion in ("dcs_obs", "taylor", "fdr"):
        with pytest.raises(ValueError, match="needs labels"):
            DCSPruner(frozen, criterion=criterion, budget=0.6).fit(X)
    with pytest.raises(ValueError, match="y"):
        DCSPruner(criterion="l1", budget=0.6).fit(X)  # nothing to train a network with
