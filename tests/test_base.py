"""What the estimators share: fitting as a whole or not at all, and the cached pass."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import ParameterGrid

from sinfkit import (
    DCSPruner,
    FrozenModel,
    RoutingOptions,
    SemanticClusterer,
    SINFClassifier,
    base,
    load,
    save,
)
from sinfkit.base import all_or_nothing


class Counter(BaseEstimator):
    """Counts, and fails where it is told to."""

    def __init__(self, fail=None):
        self.fail = fail

    @all_or_nothing
    def fit(self, n):
        self.count_ = n
        if n > 1:
            self.many_ = True
        if self.fail is not None:
            raise self.fail("in the middle of fit")
        return self


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_fit_changes_nothing(error):
    counter = Counter().fit(5)
    counter.fail = error
    with pytest.raises(error, match="in the middle"):
        counter.fit(7)
    assert counter.count_ == 5 and counter.many_
    never = Counter(error)
    with pytest.raises(error):
        never.fit(1)
    assert vars(never) == {"fail": error}


def test_a_second_fit_leaves_nothing_of_the_first():
    counter = Counter().fit(5)
    assert counter.fit(1) is counter
    assert counter.count_ == 1 and not hasattr(counter, "many_")


@pytest.mark.parametrize("verbose", [0, 1])
@pytest.mark.parametrize("kind", [DCSPruner, SINFClassifier, SemanticClusterer])
def test_a_fit_says_what_it_does_in_two_lines_and_one_bar_or_nothing(kind, verbose, capsys):
    X, y = blobs(per_class=20)
    model = FrozenModel(small_cnn())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nobody trained the network
        limit = {} if kind is SemanticClusterer else {"max_accuracy_drop": 0.5}
        kind(model, **limit, random_state=0, verbose=verbose).fit(X, y)
    out, err = capsys.readouterr()
    if not verbose:
        assert not out and not err
        return
    first, last = out.splitlines()
    assert first.startswith(f"{kind.__name__}: ") and "pass" in first and "samples" in first
    assert last.startswith(f"{kind.__name__}: ") and last.endswith(").")
    assert "left" in err and ("best: " in err) == bool(limit)


def test_a_warning_that_comes_up_again_and_again_is_given_once():
    X, y = blobs(per_class=20)
    clusterer = SemanticClusterer(n_clusters=99)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SINFClassifier(FrozenModel(small_cnn()), clusterer=clusterer, random_state=0).fit(X, y)
    messages = [str(w.message) for w in caught]
    assert len([m for m in messages if "n_clusters=99" in m]) == 1
    assert len(messages) == len(set(messages)) and {w.filename for w in caught} == {__file__}


def test_the_estimator_follows_its_device():
    X, y = blobs(per_class=10)
    pruner = DCSPruner(
        FrozenModel(small_cnn()), criterion="dcs", schedule="linear", device="cpu"
    ).fit(X, y)
    assert pruner.to("cpu") is pruner and pruner.device_ == torch.device("cpu")
    with pytest.raises(ValueError, match="not a torch device"):
        pruner.to("nowhere")


@pytest.mark.parametrize("kind", [SINFClassifier, SemanticClusterer])
def test_a_network_that_is_trained_does_not_see_what_is_held_out(kind, monkeypatch):
    seen, train = [], base.train_network

    def watched(network, X, y, **settings):
        seen.append(len(X))
        return train(network, X, y, **settings | {"epochs": 1})

    monkeypatch.setattr(base, "train_network", watched)
    X, y = blobs(n_classes=3, per_class=20)
    if kind is SINFClassifier:
        options = RoutingOptions(validation_fraction=0.25)
        clusterer, pruner = SemanticClusterer(n_clusters=1), DCSPruner(budget=0.7)
        made = kind(options=options, clusterer=clusterer, pruner=pruner, route_layer="3")
    else:
        made = kind(validation_fraction=0.25)
    made.set_params(device="cpu", random_state=0).fit(X, y)
    assert seen == [45]
    if kind is SINFClassifier:
        made.fit(X, y, X_val=X[:30], y_val=y[:30])
        assert seen == [45, 60]


def test_parameters_of_default_components_are_listed_and_set():
    clf = SINFClassifier()
    params = clf.get_params()
    assert params["pruner__schedule"] == "global" and params["clusterer__n_clusters"] is None
    assert "pruner__schedule" not in clf.get_params(deep=False)
    clf.set_params(pruner__budget=0.4, clusterer__n_clusters=5, batch_size=8)
    assert clf.pruner.budget == 0.4 and clf.pruner.schedule == "global"
    assert clf.clusterer.n_clusters == 5 and clf.batch_size == 8
    copy = clone(clf)
    assert copy.get_params(deep=False).keys() == clf.get_params(deep=False).keys()
    assert copy.pruner is not clf.pruner and copy.pruner.budget == 0.4


def test_setting_what_is_the_default_anyway_makes_no_component():
    clf = SINFClassifier()
    clf.set_params(**clf.get_params())
    assert clf.pruner is None and clf.clusterer is None
    with pytest.raises(ValueError, match="Invalid parameter 'budgt'"):
        clf.set_params(pruner__budgt=0.4)
    assert clf.pruner is None


def test_a_component_that_is_given_is_changed_and_none_brings_the_default_back():
    pruner = DCSPruner(criterion="dcs", schedule="linear")
    clf = SINFClassifier(pruner=pruner).set_params(pruner__budget=0.5)
    assert clf.pruner is pruner and pruner.budget == 0.5
    clf.set_params(pruner=None, pruner__budget=0.3)
    assert clf.pruner is not pruner and clf.pruner.schedule == "global" and pruner.budget == 0.5


def test_a_grid_reaches_the_parameters_of_defaults():
    grid = ParameterGrid({"pruner__budget": [0.4, 0.6], "clusterer__n_clusters": [1, 2]})
    made = [clone(SINFClassifier()).set_params(**point) for point in grid]
    assert [(m.pruner.budget, m.clusterer.n_clusters) for m in made] == [
        (point["pruner__budget"], point["clusterer__n_clusters"]) for point in grid
    ]


@pytest.mark.filterwarnings("ignore")
def test_the_callers_default_device_changes_nothing(tmp_path):
    """On the meta device whatever is made without a word on where has no values."""
    X, y = blobs(n_classes=4, per_class=10)
    network = FrozenModel(small_cnn(4, 4), mean=[0.1], std=[2.0])
    made = {}
    for where in ("cpu", "meta"):
        path = tmp_path / where
        pruner = DCSPruner(network, budget=0.6, device="cpu", random_state=0)
        with torch.device(where):
            pruner.fit(X, y).report(X, y, repeats=0)
            save(pruner, path)
            again = load(path, factory=lambda: small_cnn(4, 4))
            made[where] = pruner.predict_proba(X), again.predict_proba(X), pruner.transform(X)
    for found, wanted in zip(made["meta"], made["cpu"], strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert torch.get_default_device().type == "cpu"
