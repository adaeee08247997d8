"""What fits share through a cache."""

from __future__ import annotations

import numpy as np
from helpers import blobs, small_cnn

from sinfkit import DCSPruner, FrozenModel, PruningOptions
from sinfkit.pruning import scoring


def test_the_pass_over_the_samples_is_cached_by_network_and_samples(tmp_path, monkeypatch):
    X, y = blobs(per_class=10)
    passes = []
    collect = scoring.collect
    monkeypatch.setattr(scoring, "collect", lambda *args: passes.append(1) or collect(*args))
    frozen = FrozenModel(small_cnn())
    first = DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        options=PruningOptions(memory=str(tmp_path)),
        random_state=0,
    ).fit(X, y)
    again = DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        pruning_ratios=(0.1, 0.7),
        options=PruningOptions(memory=str(tmp_path)),
        random_state=0,
    ).fit(X, y)
    assert len(passes) == 1
    for layer, scores in first.scores_.items():
        np.testing.assert_array_equal(scores, again.scores_[layer])
    DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        options=PruningOptions(memory=str(tmp_path)),
        random_state=0,
    ).fit(X[1:], y[1:])
    DCSPruner(
        FrozenModel(small_cnn(seed=1)),
        criterion="dcs",
        schedule="linear",
        options=PruningOptions(memory=str(tmp_path)),
    ).fit(X, y)
    DCSPruner(frozen, criterion="dcs", schedule="linear", random_state=0).fit(
        X, y
    )  # without a cache
    assert len(passes) == 4


def test_other_labels_of_the_same_samples_have_other_scores(tmp_path):
    X, y = blobs(per_class=10)
    frozen = FrozenModel(small_cnn())
    memory = str(tmp_path)
    DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        options=PruningOptions(memory=memory),
        random_state=0,
    ).fit(X, y)
    cached = DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        options=PruningOptions(memory=memory),
        random_state=0,
    ).fit(X, np.roll(y, 1))
    plain = DCSPruner(frozen, criterion="dcs", schedule="linear", random_state=0).fit(
        X, np.roll(y, 1)
    )
    for layer, scores in plain.scores_.items():
        np.testing.assert_allclose(cached.scores_[layer], scores, rtol=1e-6)
