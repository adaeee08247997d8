"""scikit-learn's own checks, and life inside its tools."""

from __future__ import annotations

import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from sinfkit import DCSPruner, FrozenModel, SemanticClusterer, SINFClassifier, train_network


# No check is expected to fail.
@parametrize_with_checks([SemanticClusterer(), DCSPruner(), SINFClassifier()])
@pytest.mark.filterwarnings("ignore")
def test_sklearn_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def trained():
    """A trained network and its data: 6 classes of 8 x 8 images."""
    X, y = blobs(per_class=60, noise=1.2)
    network = train_network(
        small_cnn(), X[:240], y[:240], epochs=12, batch_size=32, random_state=0, device="cpu"
    )
    return FrozenModel(network, input_shape=(1, 8, 8)), X, y


def test_the_fixture_is_good_enough(trained):
    frozen, X, y = trained
    with torch.inference_mode():
        answers = frozen.module()(torch.as_tensor(X[240:])).argmax(1).numpy()
    assert (answers == y[240:]).mean() > 0.8


@pytest.mark.parametrize("estimator", [SemanticClusterer(), DCSPruner(), SINFClassifier()])
def test_clone_and_fit_share_the_weights(estimator, trained):
    frozen, X, y = trained
    fitted = clone(estimator).set_params(model=frozen, random_state=0).fit(X, y)
    assert fitted.base_model_ is frozen
    assert clone(fitted).model is frozen


def test_pipeline_with_a_scaler_in_front_and_features_behind(trained):
    frozen, X, y = trained
    flat = X.reshape(len(X), -1)
    front = make_pipeline(StandardScaler(with_mean=False, with_std=False), SINFClassifier(frozen))
    assert front.fit(flat, y).score(flat, y) > 0.8
    behind = make_pipeline(DCSPruner(frozen, random_state=0), LogisticRegression(max_iter=500))
    assert behind.fit(X, y).score(X, y) > 0.8


def test_pipeline_memory_hits(trained, tmp_path):
    frozen, X, y = trained
    pipeline = Pipeline(
        [("prune", DCSPruner(frozen, random_state=0)), ("lr", LogisticRegression(max_iter=500))],
        memory=str(tmp_path),
    )
    first = clone(pipeline).fit(X, y)
    stored = sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("output.pkl"))
    assert len(stored) == 1
    second = clone(pipeline).fit(X, y)
    assert sorted(p.stat().st_mtime_ns for p in tmp_path.rglob("output.pkl")) == stored
    np.testing.assert_allclose(first.predict_proba(X), second.predict_proba(X), atol=1e-5)


def test_own_memory_caches_statistics_and_scores(trained, tmp_path):
    frozen, X, y = trained
    a = DCSPruner(frozen, random_state=0, memory=str(tmp_path)).fit(X, y)
    n = len(list(tmp_path.rglob("output.pkl")))
    assert n == 2  # statistics and scores
    b = DCSPruner(frozen, random_state=0, memory=str(tmp_path), max_ratio=0.7).fit(X, y)
    assert len(list(tmp_path.rglob("output.pkl"))) == n  # the same ones serve
    plain = DCSPruner(frozen, random_state=0, max_ratio=0.7).fit(X, y)
    for layer, kept in plain.support_.items():
        np.testing.assert_array_equal(kept, b.support_[layer])
    assert any(len(a.support_[k]) > len(b.support_[k]) for k in a.support_)
    DCSPruner(frozen, random_state=0, memory=str(tmp_path), criterion="fdr").fit(X, y)
    DCSPruner(frozen, random_state=0, memory=str(tmp_path), penalty=0.1).fit(X, y)
    DCSPruner(frozen, random_state=0, memory=str(tmp_path), classes=[0, 1]).fit(X, y)
    assert len(list(tmp_path.rglob("output.pkl"))) == n + 3  # other scores of the same statistics
    other = np.random.default_rng(0).permutation(y)
    keywords = {"random_state": 0, "repair": "none"}
    cached = DCSPruner(frozen, memory=str(tmp_path), **keywords).fit(X, other)
    fresh = DCSPruner(frozen, **keywords).fit(X, other)
    for layer, score in fresh.scores_.items():
        np.testing.assert_array_equal(cached.scores_[layer], score)


def test_grid_search_over_nested_parameters(trained):
    frozen, X, y = trained
    search = GridSearchCV(
        SINFClassifier(frozen, pruner=DCSPruner(), route_layer="3", random_state=0),
        {"pruner__max_ratio": [0.2, 0.6], "confidence_threshold": [0.0, "auto"]},
        cv=2,
    ).fit(X, y)
    assert set(search.best_params_) == {"pruner__max_ratio", "confidence_threshold"}
    assert search.best_score_ > 0.7
    scores = cross_val_score(DCSPruner(frozen, random_state=0), X, y, cv=2)
    assert scores.mean() > 0.7


@pytest.mark.parametrize("kind", ["clusterer", "pruner", "sinf"])
def test_joblib_round_trip_in_a_new_process(kind, trained, tmp_path):
    frozen, X, y = trained
    estimator = {
        "clusterer": SemanticClusterer(frozen, random_state=0),
        "pruner": DCSPruner(frozen, random_state=0),
        "sinf": SINFClassifier(frozen, random_state=0),
    }[kind].fit(X, y)
    path, data, out = tmp_path / "e.joblib", tmp_path / "X.npy", tmp_path / "out.npy"
    joblib.dump(estimator, path)
    np.save(data, X)
    method = "transform" if kind == "clusterer" else "predict_proba"
    code = (
        "import joblib, numpy as np; "
        f"e = joblib.load({str(path)!r}); np.save({str(out)!r}, e.{method}(np.load({str(data)!r})))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    np.testing.assert_allclose(np.load(out), getattr(estimator, method)(X), atol=1e-5)


def test_string_labels(trained):
    frozen, X, y = trained
    names = np.array(["ant", "bee", "cat", "dog", "eel", "fox"])
    clf = SINFClassifier(frozen, random_state=0).fit(X, names[y])
    assert clf.classes_.tolist() == names.tolist()
    assert set(clf.predict(X)) <= set(names)
    assert clf.score(X, names[y]) > 0.8
    # outputs in another order than the sorted labels
    shuffled = names[[3, 1, 5, 0, 2, 4]]
    again = SINFClassifier(frozen, model_classes=shuffled, random_state=0).fit(X, shuffled[y])
    assert again.classes_.tolist() == names.tolist()
    assert again.score(X, shuffled[y]) > 0.8


@pytest.mark.parametrize("estimator", [SemanticClusterer(), DCSPruner(), SINFClassifier()])
def test_uint8_float64_and_tensors_give_the_same(estimator, trained):
    frozen, X, y = trained
    low, high = X.min(), X.max()
    pixels = np.round((X - low) / (high - low) * 255).astype(np.uint8)
    scaled = FrozenModel(frozen.module(), mean=[-low / (high - low)], std=[1 / (high - low)])
    estimator = clone(estimator).set_params(model=scaled, random_state=0)
    method = "transform" if isinstance(estimator, SemanticClusterer) else "predict_proba"
    expected = getattr(clone(estimator).fit(pixels, y), method)(pixels)
    for variant in (
        pixels / 255.0,
        (pixels / 255.0).astype(np.float32),
        torch.as_tensor(pixels),
        torch.as_tensor(pixels / 255.0),
    ):
        fitted = clone(estimator).fit(variant, torch.as_tensor(y))
        np.testing.assert_allclose(getattr(fitted, method)(variant), expected, atol=2e-4)
