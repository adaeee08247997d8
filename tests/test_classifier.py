"""SINFClassifier from fit to report."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn
from torchvision.models import MobileNetV2, ResNet
from torchvision.models.resnet import BasicBlock

from sinfkit import (
    DCSPruner,
    FrozenModel,
    PruningOptions,
    RoutingOptions,
    SemanticClusterer,
    SINFClassifier,
    train_network,
)
from sinfkit.errors import PromiseWarning, UnreachableShareError
from sinfkit.graph import count_macs, count_parameters
from sinfkit.pruning import LayerTime
from sinfkit.routing import Outcome, Samples, Target, build_subgraph, some_of_each

# Half as many networks in a search, where low ranks are not the point.
WHOLE_RANK = RoutingOptions(prefix_low_rank=1.0)


@pytest.fixture(scope="module")
def data():
    X, y = blobs(per_class=80, noise=1.5)
    return X[:320], y[:320], X[320:], y[320:]


@pytest.fixture(scope="module")
def frozen(data):
    X, y, *_ = data
    network = train_network(
        small_cnn(), X[:240], y[:240], epochs=12, batch_size=32, random_state=0, device="cpu"
    )
    return FrozenModel(network)


@pytest.fixture(scope="module")
def fitted(frozen, data):
    X, y, *_ = data
    return SINFClassifier(
        frozen,
        clusterer=SemanticClusterer(n_clusters=3),
        pruner=DCSPruner(criterion="dcs", schedule="linear"),
        fallback="base",
        route_layer="3",
        random_state=0,
        options=RoutingOptions(answers="cluster", confidence_threshold=0.6, exit_threshold=None),
    ).fit(X, y)


@pytest.fixture(scope="module")
def by_sizes():
    """How a search among sizes alone is asked for."""
    clusterer = SemanticClusterer(n_clusters=2)
    return {
        "route_layer": "3",
        "random_state": 0,
        "clusterer": clusterer,
        "options": WHOLE_RANK,
    }


@pytest.fixture(scope="module")
def searched(frozen, data, by_sizes):
    return SINFClassifier(frozen, **by_sizes).fit(*data[:2])


def test_predictions_and_probabilities(fitted, data):
    _, _, X, y = data
    p = fitted.predict_proba(X)
    assert p.shape == (len(X), 6) and p.dtype == np.float32
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert (fitted.predict(X) == fitted.classes_[p.argmax(1)]).all()
    assert fitted.score(X, y) > 0.75
    clusters = fitted.predict_cluster(X)
    assert set(clusters) <= {0, 1, 2}
    np.testing.assert_array_equal(clusters, fitted.clusterer_.predict(X))
    assert (fitted.class_clusters_ == fitted.clusterer_.class_clusters_).all()
    assert fitted.route_layer_ == "3" and fitted.confidence_threshold_ == 0.6


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), batch_size=st.integers(1, 40))
def test_batches_in_any_order_give_the_same_answers(fitted, data, seed, batch_size):
    X = data[2]
    rows = np.random.default_rng(seed).permutation(len(X))[:60]
    expected = fitted.predict_proba(X)[rows]
    before = fitted.batch_size
    try:
        fitted.batch_size = batch_size
        np.testing.assert_allclose(fitted.predict_proba(X[rows]), expected, atol=1e-5)
    finally:
        fitted.batch_size = before


def test_subgraphs_have_their_clusters_outputs_and_fewer_filters(fitted, frozen):
    for c, (support, error) in enumerate(zip(fitted.supports_, fitted.repair_errors_, strict=True)):
        classes = np.flatnonzero(fitted.class_clusters_ == c)
        if len(classes) < 2:
            assert support == {} and str(c) not in fitted.network_.subgraphs
            continue
        subgraph = fitted.network_.subgraphs[str(c)]
        out = [m for m in subgraph.modules() if isinstance(m, nn.Linear)][-1]
        assert out.out_features == len(classes)
        assert [len(kept) for kept in support.values()] == [15, 8]
        assert set(error) >= set(support)
    convs = [m for m in fitted.network_.prefix.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [6, 8]  # floor(0.3 * 8) gone; the last keeps all


@pytest.mark.parametrize("criterion", ["taylor", "l1"])
def test_the_prefix_has_a_criterion_of_its_own(frozen, data, criterion):
    X, y, X_test, y_test = data
    keywords = {
        "route_layer": "3",
        "random_state": 0,
        "pruner": DCSPruner(criterion="dcs", schedule="linear"),
    }
    clf = SINFClassifier(
        frozen,
        **keywords,
        prefix_pruner=DCSPruner(criterion=criterion, schedule="uniform", pruning_ratios=(0.5, 0.5)),
    ).fit(X, y)
    convs = [m for m in clf.network_.prefix.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [4, 8]
    assert clf.score(X_test, y_test) > 0.6
    with pytest.raises(ValueError, match="criterion must be one of"):
        SINFClassifier(frozen, prefix_pruner=DCSPruner(criterion="nothing", schedule="global")).fit(
            X, y
        )


def test_dense_routing_reproduces_the_base(frozen, data):
    """Nothing sliced, one cluster: the base itself, whatever the route."""
    X, y, X_test, _ = data
    clf = SINFClassifier(
        frozen,
        clusterer=SemanticClusterer(n_clusters=1),
        pruner=DCSPruner(criterion="dcs", schedule="linear", pruning_ratios=(0, 0)),
        random_state=0,
        prefix_pruner=DCSPruner(criterion="obs", schedule="uniform", pruning_ratios=(0, 0)),
        options=RoutingOptions(router_weight=0.0, exit_threshold=None),
    ).fit(X, y)
    clf.network_.temperatures.fill_(1.0)
    with torch.inference_mode():
        expected = torch.softmax(frozen.module()(torch.as_tensor(X_test)), 1).numpy()
    np.testing.assert_allclose(clf.predict_proba(X_test), expected, atol=1e-5)
    # more clusters, and everything on the fallback
    clf = SINFClassifier(
        frozen,
        pruner=DCSPruner(criterion="dcs", schedule="linear"),
        fallback="base",
        random_state=0,
        prefix_pruner=DCSPruner(criterion="obs", schedule="uniform", pruning_ratios=(0, 0)),
        options=RoutingOptions(confidence_threshold=1.0, exit_threshold=None),
    ).fit(X, y)
    clf.network_.threshold = 2.0
    np.testing.assert_allclose(clf.predict_proba(X_test), expected, atol=1e-5)


@pytest.mark.parametrize("fallback", ["base", "top2", "none"])
def test_fallbacks(frozen, data, fallback):
    X, y, X_test, y_test = data
    clf = SINFClassifier(
        frozen,
        fallback=fallback,
        clusterer=SemanticClusterer(n_clusters=3),
        pruner=DCSPruner(budget=0.6),
        route_layer="3",
        random_state=0,
    ).fit(X, y)
    p = clf.predict_proba(X_test)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert clf.score(X_test, y_test) > 0.7
    assert (clf.network_.rest is not None) == (fallback == "base")
    assert 0 <= clf.confidence_threshold_ <= 1


def test_report(fitted, frozen, data):
    _, _, X, y = data
    report = fitted.report(X, y, latency_batch=64, repeats=3)
    with torch.inference_mode():
        base = frozen.module()(torch.as_tensor(X)).numpy()
    assert report.base_accuracy == pytest.approx((base.argmax(1) == y).mean())
    assert report.accuracy == pytest.approx(fitted.score(X, y))
    truth = fitted.class_clusters_[y]
    assert report.route_accuracy == pytest.approx((fitted.predict_cluster(X) == truth).mean())
    implied = fitted.class_clusters_[base.argmax(1)]
    assert report.base_route_accuracy == pytest.approx((implied == truth).mean())
    assert report.base_parameters == count_parameters(frozen.module())
    assert report.macs < report.base_macs and report.active_parameters < report.base_parameters
    assert report.oracle_accuracy >= report.accuracy - 0.05
    for c, row in enumerate(report.clusters):
        own = truth == c
        classes = np.flatnonzero(fitted.class_clusters_ == c)
        restricted = classes[base[own][:, classes].argmax(1)]
        assert row.restricted == pytest.approx((restricted == y[own]).mean())
        assert row.routed == pytest.approx((fitted.predict(X[own]) == y[own]).mean())
        assert row.n_classes == len(classes) and row.n_samples == own.sum()
    assert report.latency.median["base"] > 0
    text = str(report)
    assert "MACs" in text and "restricted" in text
    assert report.to_dict()["accuracy"] == report.accuracy
    assert fitted.report(X, y, repeats=0).latency is None


def test_held_out_samples_can_be_given(frozen, data):
    X, y, X_test, y_test = data
    clf = SINFClassifier(frozen, pruner=DCSPruner(budget=0.6), route_layer="3", random_state=0)
    clf.fit(X, y, X_val=X_test[:80], y_val=y_test[:80])
    assert clf.n_certifying_ == 80
    report = clf.report(X_test[:80], y_test[:80], repeats=0)
    assert report.base_accuracy - report.accuracy == pytest.approx(clf.accuracy_drop_)
    for arguments, match in (
        ({"y_val": y_test}, "without X_val"),
        ({"X_val": X_test[:, :, :6], "y_val": y_test}, "shape"),
        ({"X_val": X_test, "y_val": y_test + 1}, "not in y"),
    ):
        with pytest.raises(ValueError, match=match):
            clf.fit(X, y, **arguments)


def test_automatic_route_layer_and_its_warning(frozen, data):
    X, y, *_ = data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", PromiseWarning)
        easy = SINFClassifier(
            frozen, pruner=DCSPruner(budget=0.6), route_layer=0.2, random_state=0
        ).fit(X, y)
    assert easy.route_layer_ == "0"  # the earliest that is good enough
    with pytest.warns(UserWarning, match="No layer predicts the cluster"):
        hard = SINFClassifier(
            frozen,
            clusterer=SemanticClusterer(n_clusters=5),
            pruner=DCSPruner(budget=0.6),
            route_layer=0.99,
            random_state=0,
        ).fit(X, y)
    assert hard.route_layer_ in ("0", "3", "7")


def test_one_class_clusters_and_too_many_clusters(frozen, data):
    X, y, X_test, y_test = data
    mapping = {0: "a", 1: "b", 2: "b", 3: "c", 4: "c", 5: "c"}
    clusterer = SemanticClusterer(method="given", mapping=mapping)
    # A limit that is wide enough for the clusters to stay.
    keywords = {"pruner": DCSPruner(budget=0.6), "route_layer": "3", "random_state": 0}
    clf = SINFClassifier(frozen, clusterer=clusterer, max_accuracy_drop=0.2, **keywords)
    clf.fit(X, y)
    assert sorted(clf.network_.subgraphs) == ["1", "2"]
    assert clf.cluster_names_.tolist() == ["a", "b", "c"]
    assert clf.score(X_test, y_test) > 0.7
    with pytest.warns(UserWarning, match="more than the 6 classes"):
        single = SINFClassifier(
            frozen,
            clusterer=SemanticClusterer(n_clusters=10),
            max_accuracy_drop=1.0,  # else the base may be kept
            **keywords,
        )
        single.fit(X, y)
    assert len(single.network_.subgraphs) == 0
    np.testing.assert_allclose(single.predict_proba(X_test).sum(1), 1, atol=1e-5)


def test_pickle_shares_the_prefix_and_is_not_much_larger_than_the_weights(fitted, data):
    X = data[2]
    blob = pickle.dumps(fitted)
    loaded = pickle.loads(blob)
    np.testing.assert_allclose(loaded.predict_proba(X), fitted.predict_proba(X), atol=1e-6)
    assert loaded.clusterer_.network_[0] is loaded.network_.prefix
    np.testing.assert_array_equal(loaded.clusterer_.predict(X), fitted.predict_cluster(X))
    assert pickle.dumps(loaded.base_model_) == pickle.dumps(fitted.base_model_)


def test_to_device(fitted, data):
    X = data[2]
    assert fitted.to("cpu") is fitted
    assert fitted.predict(X).shape == (len(X),)
    with pytest.raises(ValueError, match="not a torch device"):
        fitted.to("warp")


def test_same_seed_same_result_and_parallel_equals_serial(frozen, data):
    X, y, X_test, _ = data
    clf = SINFClassifier(frozen, pruner=DCSPruner(budget=0.6), random_state=5)
    a = clf.fit(X, y).predict_proba(X_test)
    b = clone(clf).set_params(options__n_jobs=2).fit(X, y).predict_proba(X_test)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_nested_estimators_are_checked(frozen, data):
    X, y, *_ = data
    for parameters, error, match in (
        (
            {"clusterer": DCSPruner(criterion="dcs", schedule="linear")},
            TypeError,
            "clusterer must be a SemanticClusterer",
        ),
        ({"pruner": "dcs"}, TypeError, "pruner"),
        ({"clusterer": SemanticClusterer(frozen)}, ValueError, "clusterer.model must be None"),
        (
            {"pruner": DCSPruner(criterion="dcs", schedule="linear", classes=[1])},
            ValueError,
            "pruner.classes must be None",
        ),
        (
            {
                "pruner": DCSPruner(
                    criterion="dcs", schedule="linear", options=PruningOptions(first_layer="3")
                )
            },
            ValueError,
            "first_layer must be None",
        ),
        (
            {"pruner": DCSPruner(criterion="dcs", schedule="linear", pruning_ratios=(0.1, 2))},
            ValueError,
            "pruning_ratios",
        ),
        (
            {"pruner": DCSPruner(criterion="dcs", schedule="iterative")},
            ValueError,
            "pruner.schedule",
        ),
        ({"fallback": "luck"}, ValueError, "fallback"),
        ({"prefix_pruner": "obs"}, TypeError, "prefix_pruner must be a DCSPruner"),
        ({"prefix_pruner": DCSPruner(classes=[1])}, ValueError, "prefix_pruner.classes"),
        ({"prefix_pruner": DCSPruner(repair="magic")}, ValueError, "prefix_pruner"),
        ({"prefix_pruner": DCSPruner(budget=0.5)}, ValueError, "prefix_pruner has either"),
        (
            {
                "prefix_pruner": DCSPruner(),
                "pruner": DCSPruner(criterion="dcs", schedule="linear"),
            },
            ValueError,
            "shares the budget of `pruner`, which has none",
        ),
        ({"options": {"answers": "all"}}, TypeError, "options must be a RoutingOptions"),
        ({"target_speedup": 0.5}, ValueError, "target_speedup"),
        ({"route_layer": 2.0}, ValueError, "route_layer"),
        ({"max_accuracy_drop": -0.1}, ValueError, "max_accuracy_drop"),
        ({"route_layer": "nowhere"}, ValueError, "nowhere"),
    ):
        clf = SINFClassifier(frozen, **parameters)
        with pytest.raises(error, match=match):
            clf.fit(X, y)
        assert not [name for name in vars(clf) if name.endswith("_")]
    for option, value in (
        ("answers", "some"),
        ("exit_threshold", "never"),
        ("exit_threshold", 1.5),
        ("prefix_low_rank", 0.0),
        ("prefix_low_rank", "half"),
        ("confidence_threshold", "high"),
        ("confidence_threshold", 1.2),
        ("confidence_threshold", 0.5),  # no effect without a fallback
        ("router_weight", -1),
        ("validation_fraction", 0),
    ):
        clf = SINFClassifier(frozen, options=RoutingOptions(**{option: value}))
        with pytest.raises(ValueError, match=option):
            clf.fit(X, y)
    with pytest.raises(UnreachableShareError, match="prefix_low_rank: too few layers"):
        SINFClassifier(
            frozen,
            pruner=DCSPruner(criterion="dcs", schedule="linear"),
            options=RoutingOptions(prefix_low_rank=0.001),
        ).fit(X, y)
    with pytest.raises(NotFittedError):
        SINFClassifier(frozen).predict(X)


@pytest.mark.parametrize(
    ("nested", "parameter", "value"),
    [
        ("pruner", "max_accuracy_drop", 0.2),
        ("pruner", "confidence", 0.5),
        ("pruner", "options__validation_fraction", 0.5),
        ("pruner", "options__n_jobs", 2),
        ("prefix_pruner", "max_accuracy_drop", 0.2),
        ("prefix_pruner", "options__max_ratio", 0.5),
        ("prefix_pruner", "options__round_to", 4),
        ("prefix_pruner", "options__budget_unit", "params"),
    ],
)
def test_what_has_no_effect_on_a_nested_pruner_is_an_error(frozen, data, nested, parameter, value):
    X, y, _, _ = data
    given = {nested: DCSPruner().set_params(**{parameter: value})}
    name = f"{nested}.{parameter.replace('options__', '(options.|options__)')}"
    with pytest.raises(ValueError, match=f"{name} has no effect"):
        SINFClassifier(frozen, **given).fit(X, y)


def test_interrupted_fit_changes_nothing(fitted, data):
    X, y, X_test, _ = data
    expected = fitted.predict_proba(X_test)

    class Interrupt(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    before = fitted.model
    try:
        fitted.model = nn.Sequential(Interrupt(), nn.Linear(2, 2))
        with pytest.raises((KeyboardInterrupt, TypeError)):
            fitted.fit(X, y)
    finally:
        fitted.model = before
    np.testing.assert_array_equal(fitted.predict_proba(X_test), expected)


class Branches(nn.Module):
    """A forward that cannot be traced: it depends on the values."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU())

    def forward(self, x):
        return self.body(x) if x.sum() > -1e9 else x


class Untraceable(nn.Module):
    def __init__(self, prefix, rest):
        super().__init__()
        self.prefix, self.rest = prefix, rest

    def forward(self, x):
        return self.rest(self.prefix(x)) if x.sum() > -1e9 else None


@pytest.mark.filterwarnings("ignore:The model answers")
def test_untraceable_networks_are_wrapped_in_two_halves(data):
    X, y, X_test, _ = data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prefix = Branches()
        rest = nn.Sequential(
            nn.Conv2d(8, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 6)
        )
    with pytest.raises(ValueError, match="Sequential"):
        SINFClassifier(Untraceable(prefix, rest)).fit(X, y)
    clf = SINFClassifier(
        nn.Sequential(prefix, rest),
        route_layer="0",
        prefix_pruner=DCSPruner(criterion="obs", schedule="uniform", pruning_ratios=(0.0, 0.0)),
    )
    clf.set_params(pruner=DCSPruner(criterion="dcs", schedule="linear"), random_state=0).fit(X, y)
    assert clf.route_layer_ == "0"
    assert all(len(s.get("1.0", range(8))) == 8 for s in clf.supports_)
    np.testing.assert_allclose(clf.predict_proba(X_test).sum(1), 1, atol=1e-5)


def test_a_drop_beyond_reach_is_told(frozen, data):
    X, y, *_ = data
    keywords = {"route_layer": "3", "max_accuracy_drop": 0.0, "random_state": 0}
    pruner = DCSPruner(criterion="dcs", schedule="linear", pruning_ratios=(0.8, 0.9), repair="none")
    with pytest.warns(UserWarning, match=r"loses .* more than max_accuracy_drop=0"):
        SINFClassifier(
            frozen,
            pruner=pruner,
            **keywords,
            prefix_pruner=DCSPruner(criterion="obs", schedule="uniform", pruning_ratios=(0.8, 0.8)),
        ).fit(X, y)
    # A search that finds nothing within the limit keeps the base.
    with pytest.warns(PromiseWarning, match="the base itself is kept"):
        clf = SINFClassifier(
            frozen,
            pruner=DCSPruner(criterion="random", repair="none", options=PruningOptions()),
            **keywords,
        ).fit(X, y)
    assert clf.certified_ and clf.certified_drop_ == clf.accuracy_drop_ == 0.0
    base = torch.softmax(frozen.module()(torch.as_tensor(X)), 1).detach().numpy()
    np.testing.assert_allclose(clf.predict_proba(X), base, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "options", "layer"),
    [
        (ResNet, {"block": BasicBlock, "layers": [1, 2, 1, 1]}, "layer2.1"),
        (MobileNetV2, {"width_mult": 0.1}, "features.9"),
    ],
)
def test_residual_and_depthwise_networks_are_routed(kind, options, layer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = kind(num_classes=6, **options).eval()
    X = np.random.default_rng(0).integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)
    y = np.arange(30) % 6
    clf = SINFClassifier(
        FrozenModel(network, mean=(0.5,) * 3, std=(0.25,) * 3),
        clusterer=SemanticClusterer(n_clusters=2),
        pruner=DCSPruner(
            criterion="dcs",
            schedule="linear",
            pruning_ratios=(0.3, 0.5),
            options=PruningOptions(repair_samples=24),
        ),
        route_layer=layer,
        random_state=0,
    ).fit(X, y)
    report = clf.report(X, y, repeats=0)
    assert report.macs < 0.7 * report.base_macs
    p = clf.predict_proba(X)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(clf.predict_proba(X[:3]), p[:3], atol=1e-5)


def test_sizes_clusters_and_route_layer_are_searched(frozen, data):
    """The user says what may be lost; the fastest network within it is kept."""
    X, y, X_test, y_test = data
    clf = SINFClassifier(frozen, max_accuracy_drop=0.02, random_state=0).fit(X, y)
    tried = clf.search_results_
    assert len(tried) > 1 and len({row["budget"] for row in tried}) > 1
    assert clf.prefix_ratio_ is None
    if clf.pruner_.budget < 1:  # not the base itself
        chosen = {
            "route_layer": clf.route_layer_,
            "low_rank": clf.prefix_low_rank_,
            "n_clusters": clf.network_.n_clusters,
        }
        assert any(chosen.items() <= row.items() for row in tried)
    report = clf.report(X_test, y_test, repeats=0)
    assert report.macs < 1.01 * report.base_macs  # the base itself has a router, too
    assert clf.accuracy_drop_ <= 0.02


def same_times(call):
    """In place of `fit_layer_times`: what a machine measures is another thing each time."""

    def times(graph, *_, **__):
        layers = (torch.nn.Conv2d, torch.nn.Linear)
        names = [name for name, m in graph.named_modules() if isinstance(m, layers)]
        return {name: LayerTime(call, 0.0, (1 - call) / 64) for name in names}

    return times


def test_time_can_be_what_counts(frozen, data, monkeypatch):
    """Budgets and the choice between networks go by the expected time of a batch."""
    X, y, *_ = data
    monkeypatch.setattr("sinfkit.routing.study.fit_layer_times", same_times(0.01))
    clf = SINFClassifier(
        frozen,
        pruner=DCSPruner(
            criterion="dcs", schedule="global", options=PruningOptions(budget_unit="latency")
        ),
        max_accuracy_drop=0.05,
        route_layer="3",
        clusterer=SemanticClusterer(n_clusters=2),
        batch_size=64,
        random_state=0,
    ).fit(X, y)
    tried = clf.search_results_
    assert all(0 < row["relative_time"] < 2 for row in tried)
    assert clf.pruner_.get_params()["options__budget_unit"] == "latency"


def test_the_calls_of_each_cluster_are_paid_for(frozen, data, monkeypatch):
    """Under one budget of time, more clusters leave less for multiplications."""
    X, y, *_ = data
    monkeypatch.setattr("sinfkit.routing.study.fit_layer_times", same_times(0.1))
    tried = [
        SINFClassifier(
            frozen,
            clusterer=SemanticClusterer(n_clusters=n),
            pruner=DCSPruner(
                criterion="dcs",
                schedule="global",
                budget=0.6,
                options=PruningOptions(budget_unit="latency", round_to=1),
            ),
            route_layer="3",
            batch_size=64,
            random_state=0,
            options=RoutingOptions(exit_threshold=None),
        )
        .fit(X, y)
        .search_results_[0]
        for n in (1, 3)
    ]
    assert all(0.5 < row["relative_time"] <= 0.6 + 1e-9 for row in tried)
    assert tried[1]["relative_macs"] < tried[0]["relative_macs"] - 0.05


def test_a_pruner_without_a_budget_has_it_searched(searched, frozen, data, by_sizes):
    clf = SINFClassifier(frozen, pruner=DCSPruner(), **by_sizes).fit(*data[:2])
    assert clf.search_results_ == searched.search_results_
    assert "relative_time" not in clf.search_results_[0]


def test_more_may_be_lost_and_less_is_left(searched, frozen, data, by_sizes):
    X, y, *_ = data
    costs = []
    bold = SINFClassifier(frozen, max_accuracy_drop=0.3, **by_sizes).fit(X, y)
    for clf in (searched, bold):
        costs.append(min(row["relative_macs"] for row in clf.search_results_))
        assert {row["low_rank"] for row in clf.search_results_} == {1.0}
    assert costs[1] < costs[0]
    given = SINFClassifier(
        frozen, pruner=DCSPruner(criterion="dcs", schedule="linear"), **by_sizes
    ).fit(X, y)
    assert len(given.search_results_) == 1 and given.prefix_ratio_ == 0.3
    fixed = SINFClassifier(
        frozen,
        **by_sizes,
        prefix_pruner=DCSPruner(criterion="obs", schedule="uniform", pruning_ratios=(0.1, 0.1)),
    ).fit(X, y)
    assert fixed.prefix_ratio_ == 0.1


def test_a_low_rank_is_tried_and_can_be_given(frozen, data):
    X, y, X_test, y_test = data
    keywords = {"route_layer": "3", "random_state": 0, "clusterer": SemanticClusterer(n_clusters=2)}
    whole = SINFClassifier(
        frozen, pruner=DCSPruner(criterion="dcs", schedule="linear"), **keywords
    ).fit(X, y)
    assert whole.prefix_low_rank_ == 1.0  # nothing is searched
    half = clone(whole).set_params(options__prefix_low_rank=0.5).fit(X, y)
    assert half.prefix_low_rank_ == half.search_results_[0]["low_rank"] == 0.5
    costs = [count_macs(c.network_.prefix, torch.zeros(1, 1, 8, 8))[0] for c in (whole, half)]
    assert costs[1] <= 0.5 * costs[0]
    assert half.score(X_test, y_test) > whole.score(X_test, y_test) - 0.2
    searched = SINFClassifier(frozen, max_accuracy_drop=0.1, **keywords).fit(X, y)
    tried = [row["low_rank"] for row in searched.search_results_]
    assert {1.0, 0.5} == set(tried) and tried == sorted(tried, reverse=True)
    assert searched.prefix_low_rank_ in tried


def test_a_speed_can_be_asked_for(frozen, data, by_sizes):
    X, y, *_ = data
    clf = SINFClassifier(frozen, target_speedup=1.01, batch_size=64, **by_sizes).fit(X, y)
    assert all(row["speedup"] > 0 for row in clf.search_results_)
    # Whatever a busy machine measures, nothing that was tried serves the target better.
    target = Target(clf.max_accuracy_drop, speedup=1.01)
    tried = {
        row["budget"]: Outcome(row["accuracy_drop"], row["relative_macs"], row["speedup"])
        for row in clf.search_results_
    }
    assert len(tried) > 1
    best = tried[clf.pruner_.budget]
    assert not any(target.better(other, best) for other in tried.values())
    with pytest.raises(ValueError, match="target_speedup"):
        SINFClassifier(frozen, target_speedup=0.5).fit(X, y)


@pytest.mark.parametrize("criterion", ["dcs", "obs"])
def test_prefix_and_subgraph_keep_to_a_budget_together(frozen, data, criterion):
    X, y, *_ = data
    pruner = DCSPruner(
        criterion=criterion, schedule="global", budget=0.6, options=PruningOptions(max_ratio=0.9)
    )
    clf = SINFClassifier(
        frozen,
        clusterer=SemanticClusterer(n_clusters=2, max_cluster_size=3),
        pruner=pruner,
        route_layer="0",
        random_state=0,
        prefix_pruner=DCSPruner(criterion="obs", schedule="uniform", pruning_ratios=(0.0, 0.0)),
        options=RoutingOptions(answers="cluster", exit_threshold=None),
    ).fit(X, y)
    report = clf.report(X, y, repeats=0)
    shared = clf.network_.router.weight.numel()
    # Within one filter: the widest here is a convolution of 8 inputs on 8 x 8 pixels.
    assert 0.5 < (report.macs - shared) / report.base_macs <= 0.6
    widths = [[len(kept) for kept in support.values()] for support in clf.supports_]
    assert widths[0] == widths[1] and sum(widths[0]) < 24 + 16
    assert any(
        not np.array_equal(clf.supports_[0][k], clf.supports_[1][k]) for k in clf.supports_[0]
    )


def test_all_widths_under_a_budget_can_be_multiples(frozen, data):
    X, y, *_ = data
    clf = SINFClassifier(
        frozen,
        clusterer=SemanticClusterer(n_clusters=2, max_cluster_size=3),
        pruner=DCSPruner(
            criterion="dcs",
            schedule="global",
            budget=0.5,
            options=PruningOptions(max_ratio=0.9, round_to=4),
        ),
        route_layer="3",
        random_state=0,
        options=RoutingOptions(exit_threshold=None),
    ).fit(X, y)
    widths = [len(kept) for support in clf.supports_ for kept in support.values()]
    network = clf.network_
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    widths += [m.out_channels for m in convolutions]
    assert min(widths) < 8 and not any(n % 4 for n in widths)
    report = clf.report(X, y, repeats=0)
    assert report.macs - network.router.weight.numel() <= 0.5 * report.base_macs


@pytest.mark.parametrize("fallback", ["none", "base"])
def test_one_budget_decides_about_both_sides_of_the_cut(frozen, data, fallback):
    X, y, X_test, y_test = data
    clf = SINFClassifier(
        frozen,
        clusterer=SemanticClusterer(n_clusters=2, max_cluster_size=3),
        pruner=DCSPruner(
            criterion="dcs", schedule="global", budget=0.45, options=PruningOptions(max_ratio=0.9)
        ),
        route_layer="3",
        fallback=fallback,
        random_state=0,
        options=RoutingOptions(
            exit_threshold=None, confidence_threshold=0.0 if fallback == "base" else "auto"
        ),
    ).fit(X, y)
    assert clf.prefix_ratio_ is None and clf.pruner_.budget == 0.45
    report = clf.report(X_test, y_test, repeats=0)
    router = clf.network_.router.weight.numel()
    assert 0.35 < (report.macs - router) / report.base_macs <= 0.45
    convs = [m for m in clf.network_.prefix.modules() if isinstance(m, nn.Conv2d)]
    # What crosses the cut stays whole where the base's own rest has to read it.
    assert convs[0].out_channels < 8 and (convs[1].out_channels == 8) == (fallback == "base")
    widths = [[len(kept) for kept in support.values()] for support in clf.supports_]
    assert widths[0] == widths[1] and clf.score(X_test, y_test) > 0.6
    keepers = [support["7"] for support in clf.supports_]
    assert not np.array_equal(*keepers)  # equally many filters, but the cluster's own


def test_subgraphs_answer_all_classes_and_lose_less_on_the_wrong_route(frozen, data):
    X, y, X_test, y_test = data
    accuracy = {}
    for answers in ("all", "cluster"):
        clf = SINFClassifier(
            frozen,
            clusterer=SemanticClusterer(n_clusters=3, max_cluster_size=2),
            pruner=DCSPruner(criterion="dcs", schedule="linear"),
            route_layer="0",
            random_state=0,
            options=RoutingOptions(answers=answers, router_weight=0.0, exit_threshold=None),
        ).fit(X, y)
        out = [m for m in clf.network_.subgraphs["0"].modules() if isinstance(m, nn.Linear)][-1]
        assert out.out_features == (6 if answers == "all" else 2)
        wrong = clf.predict_cluster(X_test) != clf.class_clusters_[y_test]
        assert wrong.sum() >= 10
        accuracy[answers] = (clf.predict(X_test) == y_test)[wrong].mean()
    assert accuracy["all"] > accuracy["cluster"] + 0.1


@pytest.mark.parametrize("answers", ["all", "cluster"])
def test_subgraphs_are_made_for_what_they_will_answer(frozen, data, monkeypatch, answers):
    """Each is repaired on samples that are routed to it; in the paper's form on its classes'."""
    X, y, X_test, y_test = data
    samples = []

    def watched(*arguments):
        samples.append(arguments[-1])
        return build_subgraph(*arguments)

    monkeypatch.setattr("sinfkit.routing.assembly.build_subgraph", watched)
    clf = SINFClassifier(
        frozen,
        clusterer=SemanticClusterer(n_clusters=2, max_cluster_size=3),
        pruner=DCSPruner(criterion="dcs", schedule="linear"),
        route_layer="0",
        random_state=0,
        options=RoutingOptions(answers=answers),
    ).fit(X, y, X_val=X_test, y_val=y_test)
    rows = np.sort(np.concatenate(samples))  # without those that choose
    assert len(rows) == len(set(rows)) and 0.7 * len(X) < len(rows) < 0.9 * len(X)
    routed, own = clf.predict_cluster(X[rows]), clf.class_clusters_[y[rows]]
    assert (routed != own).any()  # else the two forms could not be told apart
    wanted = routed if answers == "all" else own
    assert len(samples) == 2
    for cluster, sample in enumerate(samples):
        np.testing.assert_array_equal(np.sort(sample), rows[wanted == cluster])


def test_sure_samples_leave_at_the_router_within_the_drop(frozen, data):
    X, y, X_test, y_test = data
    keywords = {
        "clusterer": SemanticClusterer(n_clusters=2),
        "pruner": DCSPruner(criterion="dcs", schedule="linear"),
        "route_layer": "3",
        "random_state": 0,
    }
    stay = SINFClassifier(frozen, **keywords, options=RoutingOptions(exit_threshold=None))
    stay.fit(X, y, X_val=X_test, y_val=y_test)
    assert stay.exit_threshold_ is None and stay.search_results_[0]["exit_share"] == 0
    shares = []
    for drop in (0.0, 0.3):
        clf = SINFClassifier(frozen, max_accuracy_drop=drop, **keywords)
        clf.fit(X, y, X_val=X_test, y_val=y_test)
        report = clf.report(X_test, y_test, repeats=0)
        # What certified is what happens at prediction.
        assert report.base_accuracy - report.accuracy == pytest.approx(clf.accuracy_drop_)
        shares.append(report.exit_share)
    assert shares[0] <= shares[1] and shares[1] > 0
    assert clf.certified_ and clf.certified_drop_ <= 0.3
    given = SINFClassifier(frozen, **keywords, options=RoutingOptions(exit_threshold=0.9)).fit(X, y)
    assert given.exit_threshold_ == 0.9


def test_a_speed_out_of_reach_is_told(frozen, data):
    X, y, *_ = data
    clf = SINFClassifier(
        frozen,
        clusterer=SemanticClusterer(n_clusters=2),
        pruner=DCSPruner(criterion="dcs", schedule="linear"),
        route_layer="3",
        target_speedup=1e6,
        random_state=0,
    )
    with pytest.warns(UserWarning, match="No network that was tried is 1e\\+06 times as fast"):
        clf.fit(X, y)


def test_outputs_of_readers_count_by_their_dcs_in_subgraphs_too(frozen, data):
    X, y, *_ = data
    keywords = {
        "clusterer": SemanticClusterer(n_clusters=2, max_cluster_size=3),
        "route_layer": "3",
        "prefix_pruner": DCSPruner(criterion="obs", schedule="uniform", pruning_ratios=(0, 0)),
        "random_state": 0,
    }
    plain, joined = (
        SINFClassifier(frozen, pruner=DCSPruner(schedule="linear", criterion=name), **keywords).fit(
            X, y
        )
        for name in ("obs", "dcs_obs")
    )
    for one, other in zip(plain.scores_, joined.scores_, strict=True):
        assert np.abs(one["7"] - other["7"]).max() > 1e-3  # its reader is observed
        np.testing.assert_allclose(one["10"], other["10"])  # the network's outputs are not
    # A prefix that is left whole gives the first layer behind it what it has always had.
    assert [errors["7"] for errors in plain.repair_errors_] == [0.0, 0.0]


def test_ratios_that_a_budget_ignores_are_no_obstacle(frozen, data):
    X, y, *_ = data
    pruner = DCSPruner(
        criterion="l1", schedule="global", budget=0.99, options=PruningOptions(max_ratio=0.08)
    )
    clusterer = SemanticClusterer(n_clusters=2)
    clf = SINFClassifier(frozen, clusterer=clusterer, pruner=pruner, random_state=0).fit(X, y)
    assert len(clf.search_results_) == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 60))
def test_a_few_samples_hold_some_of_each_class(seed, n):
    rng = np.random.default_rng(seed)
    codes = rng.permutation(np.repeat(np.arange(5), [1, 2, 3, 10, 20]))
    index = np.flatnonzero(rng.random(36) < 0.8)
    found = some_of_each(Samples(codes, index, codes[index]), n, rng)
    assert set(found.y) == set(codes[index]) and set(found.index) <= set(index)
    assert (found.y == codes[found.index]).all()
    n_classes = len(set(codes[index]))
    assert len(found.y) == len(set(found.index)) == min(len(index), max(n, n_classes))


def test_warnings_point_at_the_call_of_fit(frozen, data):
    X, y, *_ = data
    with pytest.warns(UserWarning, match="No layer predicts the cluster") as caught:
        SINFClassifier(
            frozen,
            clusterer=SemanticClusterer(n_clusters=5),
            pruner=DCSPruner(criterion="dcs", schedule="linear"),
            route_layer=0.99,
            random_state=0,
        ).fit(X, y)
    assert {warning.filename for warning in caught} == {__file__}
