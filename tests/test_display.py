"""Displays: what they compute, and that it is what they draw."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import blobs, small_cnn
from sklearn.exceptions import NotFittedError

from sinfkit import (
    ClusterTreeDisplay,
    DCSPruner,
    FilterOverlapDisplay,
    FilterScoreDisplay,
    FrozenModel,
    RouteConfusionDisplay,
    SemanticClusterer,
    SINFClassifier,
    SpeedAccuracyDisplay,
)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def data():
    return blobs(per_class=40)


@pytest.fixture(scope="module")
def fitted(data):
    return SINFClassifier(
        FrozenModel(small_cnn(seed=3)),
        clusterer=SemanticClusterer(method="given", mapping={c: "abb"[c // 2] for c in range(6)}),
        pruner=DCSPruner(criterion="dcs", schedule="linear", pruning_ratios=(0.4, 0.6)),
        route_layer="3",
        random_state=0,
    ).fit(*data)


def test_speed_and_accuracy_are_the_reports(fitted, data):
    X, y = data
    report = fitted.report(X, y, repeats=0)
    display = SpeedAccuracyDisplay.from_estimator(fitted, X, y)
    (line,) = display.lines_
    cost, accuracy = line.get_data()
    assert cost[0] == pytest.approx(report.macs / report.base_macs)
    assert accuracy[0] == pytest.approx(report.accuracy * 100)
    assert display.base_accuracy == report.base_accuracy
    two = SpeedAccuracyDisplay.from_reports({"a": [report], "b": [report, report]})
    assert [len(line.get_xdata()) for line in two.lines_] == [1, 2]
    assert [text.get_text() for text in two.ax_.get_legend().get_texts()] == ["a", "b"]
    timed = SpeedAccuracyDisplay.from_estimator([fitted], X, y, cost="latency", repeats=2)
    assert timed.lines_[0].get_xdata()[0] > 0
    with pytest.raises(ValueError, match="repeats of at least 1"):
        SpeedAccuracyDisplay.from_reports({"a": [report]}, cost="latency")
    with pytest.raises(ValueError, match="one base network"):
        SpeedAccuracyDisplay.from_reports({"a": [report, fitted.report(X[:7], y[:7], repeats=0)]})
    with pytest.raises(ValueError, match="estimator must be one, or a list"):
        SpeedAccuracyDisplay.from_estimator([], X, y)
    with pytest.raises(ValueError, match="at least one report"):
        SpeedAccuracyDisplay.from_reports({"a": [report], "b": []})
    with pytest.raises(ValueError, match="cost must be one of"):
        SpeedAccuracyDisplay.from_reports({"a": [report]}, cost="time")
    with pytest.raises(ValueError, match="cost must be one of"):
        SpeedAccuracyDisplay(base_accuracy=0.5, points={}, cost="money")


def test_scores_are_sorted_and_relative_to_the_layers_mean(fitted, data):
    pruner = DCSPruner(
        FrozenModel(small_cnn(seed=3)), criterion="dcs", schedule="linear", random_state=0
    ).fit(*data)
    display = FilterScoreDisplay.from_estimator(pruner)
    assert list(display.scores) == list(pruner.scores_)
    for line, (layer, score) in zip(display.lines_, pruner.scores_.items(), strict=True):
        assert line.get_label() == layer
        np.testing.assert_allclose(line.get_ydata(), np.sort(score)[::-1] / score.mean())
        assert display.kept[layer] == len(pruner.support_[layer])
    assert display.ax_.get_ylabel().startswith("dcs")
    ax = plt.figure().subplots()
    second = FilterScoreDisplay.from_estimator(fitted, cluster=1, ax=ax)
    assert second.ax_ is ax and second.figure_ is ax.figure
    np.testing.assert_array_equal(second.scores["7"], fitted.scores_[1]["7"])
    first = FilterScoreDisplay.from_estimator(fitted)
    np.testing.assert_array_equal(first.scores["7"], fitted.scores_[0]["7"])
    with pytest.raises(
        ValueError, match=r"cluster must be one that was sliced, of \[0, 1\]; got 2"
    ):
        FilterScoreDisplay.from_estimator(fitted, cluster=2)


def test_overlap_by_hand(fitted):
    display = FilterOverlapDisplay.from_estimator(fitted)
    layers = list(fitted.scores_[0])
    shares = []
    for layer in layers:
        a, b = (set(support[layer]) for support in fitted.supports_)
        shares.append(len(a & b) / len(a | b))
    np.testing.assert_allclose(np.diag(display.overlap), 1.0)
    assert display.overlap[0, 1] == display.overlap[1, 0] == pytest.approx(np.mean(shares))
    one = FilterOverlapDisplay.from_estimator(fitted, layer=layers[0])
    assert one.overlap[0, 1] == pytest.approx(shares[0])
    assert [label.get_text() for label in one.ax_.get_yticklabels()] == ["a", "b"]
    for wrong in ("nowhere", np.arange(2)):
        with pytest.raises(ValueError, match="layer must be one of"):
            FilterOverlapDisplay.from_estimator(fitted, layer=wrong)


def test_routes_are_counted(fitted, data):
    X, y = data
    routed = fitted.predict_cluster(X)
    for estimator in (fitted, fitted.clusterer_):
        display = RouteConfusionDisplay.from_estimator(estimator, X, y, normalize=None)
        expected = [[((y > 1) == i)[routed == j].sum() for j in (0, 1)] for i in (0, 1)]
        np.testing.assert_array_equal(display.confusion_matrix, expected)
    shares = RouteConfusionDisplay.from_estimator(fitted, X, y).confusion_matrix
    np.testing.assert_allclose(shares.sum(1), 1.0)
    with pytest.raises(ValueError, match="not in fit"):
        RouteConfusionDisplay.from_estimator(fitted, X, y + 1)


def test_tree_puts_alike_classes_side_by_side(fitted):
    affinity = np.full((6, 6), 0.1)
    for a, b in ((0, 3), (1, 4), (2, 5)):
        affinity[a, b] = affinity[b, a] = 0.9
    display = ClusterTreeDisplay(affinity=affinity, names=list("abcdef")).plot()
    order = display.order_
    assert {frozenset(order[i : i + 2]) for i in (0, 2, 4)} == {
        frozenset(pair) for pair in ((0, 3), (1, 4), (2, 5))
    }
    assert [t.get_text() for t in display.ax_.get_yticklabels()] == ["abcdef"[i] for i in order]
    named = ClusterTreeDisplay.from_estimator(fitted, names=list("uvwxyz"))
    assert sorted(t.get_text() for t in named.ax_.get_yticklabels()) == list("uvwxyz")
    colors = {t.get_text(): t.get_color() for t in named.ax_.get_yticklabels()}
    assert colors["u"] == colors["v"] != colors["w"] == colors["z"]
    with pytest.raises(ValueError, match="6 classes, got 2"):
        ClusterTreeDisplay.from_estimator(fitted, names=["a", "b"])
    with pytest.raises(ValueError, match="at least two"):
        ClusterTreeDisplay(affinity=[[1.0]], names=["a"]).plot()


@pytest.mark.parametrize("display", [FilterScoreDisplay, FilterOverlapDisplay, ClusterTreeDisplay])
def test_unfitted_estimators_are_refused(display):
    with pytest.raises(NotFittedError):
        display.from_estimator(SINFClassifier())
