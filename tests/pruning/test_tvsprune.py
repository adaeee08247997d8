"""Pruning in rounds: the floor holds on held-out samples, and supports speak of the base."""

from __future__ import annotations

import copy
import re
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from sinfkit import DCSPruner, FrozenModel, PruningOptions, train_network
from sinfkit.graph import count_parameters
from sinfkit.pruning import Goal, split_samples
from sinfkit.zoo import default_network


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    X = (X / 16).reshape(-1, 1, 8, 8).astype(np.float32)
    network = default_network((1, 8, 8), 10, random_state=0)
    trained = train_network(
        network, X[:1000], y[:1000], epochs=4, batch_size=64, random_state=0, device="cpu"
    )
    return FrozenModel(trained), X[1000:1400], y[1000:1400]


def accuracy(model, X, y):
    with torch.inference_mode():
        return float((model(torch.as_tensor(X)).argmax(1).numpy() == y).mean())


def split_of(pruner, y):
    """Which samples did what in the fit: that depends on the seed alone."""
    seed = int(np.random.RandomState(pruner.random_state).randint(2**31 - 1))  # noqa: NPY002
    goal = Goal(pruner.max_accuracy_drop, pruner.confidence)
    return split_samples(y, np.arange(len(y)), pruner.options.validation_fraction, goal, seed)


# Without repair whether a first round keeps to a small limit hangs on the network: any loss is
# allowed there.
@pytest.mark.parametrize(
    ("criterion", "repair", "limit"), [("hellinger", "none", 0.9), ("dcs", "least_squares", 0.08)]
)
def test_it_removes_filters_and_stays_above_the_floor(digits, criterion, repair, limit):
    trained, X, y = digits
    network = copy.deepcopy(trained.module("cpu"))
    with torch.no_grad():  # some filters are of no use, whatever the training made of the others
        for tensor in (*network[0].parameters(), *network[1].parameters()):
            tensor[:4] = 0
        network[1].running_mean[:4] = 0
    frozen = FrozenModel(network)
    pruner = DCSPruner(
        frozen,
        schedule="iterative",
        criterion=criterion,
        repair=repair,
        max_accuracy_drop=limit,
        random_state=0,
        device="cpu",
        options=PruningOptions(validation_fraction=0.3, repair_samples=100),
    ).fit(X, y)
    split = split_of(pruner, y)
    for rows in (split.choose, split.certify):
        base = accuracy(frozen.module("cpu"), X[rows], y[rows])
        drop = base - accuracy(pruner.model_, X[rows], y[rows])
        assert drop <= limit + 1e-9
    assert pruner.accuracy_drop_ == pytest.approx(drop)
    if pruner.certified_:
        assert drop <= pruner.certified_drop_ <= limit
    assert count_parameters(pruner.model_) < count_parameters(frozen.module())
    modules, dense = dict(pruner.model_.named_modules()), dict(frozen.module().named_modules())
    assert sum(ratio > 0 for ratio in pruner.ratios_.values()) >= 1
    for layer, kept in pruner.support_.items():
        n = len(dense[layer].weight)
        assert len(kept) == len(modules[layer].weight) == round(n * (1 - pruner.ratios_[layer]))
        assert (np.diff(kept) > 0).all() and kept.max() < n
        assert pruner.scores_[layer].shape == (n,)
    if repair == "none":
        # Without repair a kept filter's weights are those of the original filter.
        first = next(iter(pruner.support_))
        np.testing.assert_array_equal(
            modules[first].weight.detach(), dense[first].weight.detach()[pruner.support_[first]]
        )
        second = list(pruner.support_)[1]
        rows, columns = pruner.support_[second], pruner.support_[first]
        np.testing.assert_array_equal(
            modules[second].weight.detach(), dense[second].weight.detach()[rows][:, columns]
        )


def test_several_rounds_go_further_than_one_and_say_so(digits, capsys):
    frozen, X, y = digits
    DCSPruner(
        frozen,
        schedule="iterative",
        criterion="hellinger",
        max_accuracy_drop=0.05,
        random_state=0,
        device="cpu",
        verbose=1,
        options=PruningOptions(repair_samples=100),
    ).fit(X, y)
    kept = [int(n) for n in re.findall(r"best: (\d+) filters left", capsys.readouterr().err)]
    assert len(set(kept)) >= 2 and kept == sorted(kept, reverse=True)


def test_a_subset_of_classes(digits):
    frozen, X, y = digits
    pruner = DCSPruner(
        frozen,
        criterion="dcs",
        schedule="iterative",
        classes=[7, 2, 5],
        max_accuracy_drop=0.05,
        random_state=0,
        options=PruningOptions(repair_samples=100),
    ).fit(X, y)
    own = np.isin(y, [2, 5, 7])
    assert pruner.classes_.tolist() == [2, 5, 7]
    assert pruner.score(X[own], y[own]) > 0.9
    assert sum(pruner.ratios_.values()) > 0


def test_nothing_to_remove_warns_and_reproduces_the_base(digits):
    frozen, X, y = digits

    def alike(data):
        return torch.ones(len(data.weight))

    pruner = DCSPruner(frozen, schedule="iterative", criterion=alike, random_state=0, device="cpu")
    with pytest.warns(UserWarning, match="Nothing was removed"):
        pruner.fit(X, y)
    assert set(pruner.ratios_.values()) == {0.0}
    assert set(pruner.repair_error_.values()) == {0.0}
    with torch.inference_mode():
        expected = torch.softmax(frozen.module("cpu")(torch.as_tensor(X)), 1)
    np.testing.assert_allclose(pruner.predict_proba(X), expected, atol=1e-5)

    pruner.set_params(criterion=lambda data: -torch.ones(len(data.weight)))
    with pytest.raises(ValueError, match="Layer '0'.*not negative"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner.fit(X, y)
