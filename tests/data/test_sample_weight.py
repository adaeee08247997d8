"""A sample of weight 2 is the sample twice, one of weight 0 is none, and no weights are free."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from sklearn import config_context
from sklearn.model_selection import GridSearchCV, cross_validate

from sinfkit import (
    DCSPruner,
    FrozenModel,
    PruningOptions,
    RoutingOptions,
    SemanticClusterer,
    SINFClassifier,
)
from sinfkit.criteria import CRITERIA, discriminative_capability, fit_probe
from sinfkit.data import validate_weight
from sinfkit.graph import trace
from sinfkit.inference import choose_exit, choose_threshold, fit_route_predictor
from sinfkit.repair import RepairSettings, fit_ridge, gather_moments, repair
from sinfkit.routing import (
    ROUTER_WEIGHTS,
    HeldOut,
    activation_affinity,
    choose_weight,
    confusion_affinity,
)
from sinfkit.slicing import slice_channels
from sinfkit.zoo import default_network, train_network

UNWEIGHTED = {"mmd"}
# What is held out is drawn from the samples, however often each counts.
NOTHING_HELD_OUT = PruningOptions(validation_fraction=0)
CHOSEN = (
    "router_weight_",
    "confidence_threshold_",
    "exit_threshold_",
    "temperatures_",
    "route_accuracy_",
)


@pytest.fixture(scope="module")
def frozen():
    X, y = blobs(n_classes=4, per_class=40, seed=1, noise=1.0)
    network = train_network(
        small_cnn(n_classes=4), X, y, epochs=6, batch_size=32, random_state=0, device="cpu"
    )
    return FrozenModel(network)


@pytest.fixture(scope="module")
def data():
    """Samples, labels and whole weights, of which two are 0."""
    X, y = blobs(n_classes=4, per_class=20, noise=1.5)
    weight = np.random.default_rng(0).integers(1, 5, len(y))
    weight[[5, 40]] = 0
    return X, y, weight


def repeated(X, y, weight):
    """Each sample as often as it counts, in another order."""
    order = np.random.default_rng(1).permutation(int(weight.sum()))
    return np.repeat(X, weight, axis=0)[order], np.repeat(y, weight)[order]


def test_every_criterion_knows_weights_or_says_so(frozen, data):
    X, y, weight = data
    X2, y2 = repeated(*data)
    for name, criterion in CRITERIA.items():
        pruner = DCSPruner(
            frozen,
            schedule="linear",
            criterion=name,
            repair="none",
            options=NOTHING_HELD_OUT,
            random_state=0,
            device="cpu",
        )
        assert criterion.weighted == (name not in UNWEIGHTED)
        if not criterion.weighted:
            with pytest.raises(ValueError, match=f"'{name}' takes no sample_weight"):
                pruner.fit(X, y, sample_weight=weight)
            continue
        weighted = pruner.fit(X, y, sample_weight=weight).scores_
        twice = pruner.fit(X2, y2).scores_
        for layer, scores in twice.items():
            np.testing.assert_allclose(
                weighted[layer], scores, rtol=2e-4, atol=1e-6 * np.abs(scores).max(), err_msg=name
            )
        if criterion.needs & {"features", "y", "taylor", "consumers"}:
            plain = pruner.fit(X, y).scores_
            assert any(not np.allclose(plain[k], weighted[k], rtol=1e-3) for k in plain), name


def test_discriminative_capability():
    rng = np.random.default_rng(0)
    x, y = torch.as_tensor(rng.normal(size=(30, 5, 2))), torch.as_tensor(rng.integers(0, 3, 30))
    weight = torch.as_tensor(rng.integers(1, 4, 30))
    options = {"penalty": 0.1}
    twice = discriminative_capability(
        x.repeat_interleave(weight, 0), y.repeat_interleave(weight), **options
    )
    found = discriminative_capability(x, y, sample_weight=weight.double(), **options)
    torch.testing.assert_close(found.score, twice.score, rtol=1e-7, atol=1e-9)
    once = discriminative_capability(x, y, sample_weight=torch.ones(30), **options)
    plain = discriminative_capability(x, y, **options)
    torch.testing.assert_close(once.score, plain.score, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n_features", [4, 60])  # fewer and more than samples
def test_probe(n_features):
    rng = np.random.default_rng(0)
    x, y = torch.as_tensor(rng.normal(size=(30, n_features))), torch.as_tensor(np.arange(30) % 3)
    weight = torch.as_tensor(rng.integers(1, 4, 30))
    twice = fit_probe(x.repeat_interleave(weight, 0), y.repeat_interleave(weight), penalty=0.05)
    found = fit_probe(x, y, penalty=0.05, sample_weight=weight)
    torch.testing.assert_close(found.coef, twice.coef, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.intercept, twice.intercept, rtol=1e-6, atol=1e-8)
    assert found.loss == pytest.approx(twice.loss)
    with pytest.raises(ValueError, match="every class needs"):
        fit_probe(x, y, sample_weight=(y != 1).double())


@pytest.mark.parametrize("n_columns", [5, 40])  # fewer and more than rows
def test_ridge(n_columns):
    rng = np.random.default_rng(0)
    X, Y = (
        torch.as_tensor(rng.normal(size=(2, 30, n_columns))),
        torch.as_tensor(rng.normal(size=(2, 30, 3))),
    )
    counts = torch.as_tensor(rng.integers(1, 4, 30))
    alphas, weight = [1e-3, 0.1, 10.0], torch.ones(2, 3)
    n_train = 20
    twice = fit_ridge(
        X.repeat_interleave(counts, 1),
        Y.repeat_interleave(counts, 1),
        int(counts[:n_train].sum()),
        alphas,
        weight,
    )
    found = fit_ridge(X.clone(), Y, n_train, alphas, weight, counts.double())
    assert found.alpha == twice.alpha
    assert found.error == pytest.approx(twice.error)
    torch.testing.assert_close(found.coef, twice.coef)
    torch.testing.assert_close(found.intercept, twice.intercept)


def test_moments(frozen, data):
    X, y, weight = data
    graph, x = trace(frozen.module()), torch.as_tensor(X)
    weight = torch.as_tensor(weight)
    found = gather_moments(
        graph, ["3", "12"], x.split(7), n_images=len(x), sample_weight=weight.double()
    )
    x = x.repeat_interleave(weight, 0)
    twice = gather_moments(graph, ["3"], [x], n_images=len(x))
    torch.testing.assert_close(found["3"].mean, twice["3"].mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["3"].covariance, twice["3"].covariance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["mean", "match", "static_least_squares", "least_squares"])
def test_repair(method, frozen, data):
    X, y, weight = data
    X, weight = X[weight > 0], weight[weight > 0]
    dense, x = trace(frozen.module()), torch.as_tensor(X)
    keep = {"0": np.arange(5), "3": np.arange(2, 8), "7": np.arange(10)}

    def repaired(x, weight):
        small = slice_channels(dense, x[:1], keep)
        # One penalty: which images are held out to choose it is up to chance.
        kind = RepairSettings(method, alphas=[1e-2], batch_size=16)
        errors = repair(dense, small, x, kind, sample_weight=weight)
        return small.model, errors

    found, errors = repaired(x, weight.astype(float))
    twice, errors2 = repaired(x.repeat_interleave(torch.as_tensor(weight), 0), None)
    plain, _ = repaired(x, None)
    close = torch.testing.assert_close
    close(found(x), twice(x), rtol=1e-3, atol=1e-3)
    assert float((found(x) - plain(x)).abs().max()) > 1e-2
    if method != "least_squares":  # whose error is that of the held-out images
        assert errors == pytest.approx(errors2, rel=1e-3, abs=1e-6)
    with pytest.raises(ValueError, match="one number for each of the 78 images"):
        repaired(x, np.ones(3))


@pytest.mark.parametrize("repair", ["none", "mean", "match", "static_least_squares"])
def test_pruner(repair, frozen, data):
    X, y, weight = data
    pruner = DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        repair=repair,
        options=NOTHING_HELD_OUT,
        random_state=0,
        device="cpu",
    )
    weighted = pruner.fit(X, y, sample_weight=weight).predict_proba(X)
    twice = pruner.fit(*repeated(*data)).predict_proba(X)
    np.testing.assert_allclose(weighted, twice, atol=2e-4)


@pytest.mark.parametrize("kind", [DCSPruner, SemanticClusterer, SINFClassifier])
def test_weight_zero_is_no_sample_and_weight_one_is_no_weight(kind, frozen, data):
    X, y, weight = data
    method = "transform" if kind is SemanticClusterer else "predict_proba"
    estimator = kind(frozen, random_state=0, device="cpu")
    if kind is DCSPruner:
        estimator.set_params(budget=0.6)
    if kind is SINFClassifier:
        estimator.set_params(pruner=DCSPruner(criterion="dcs", schedule="linear"), route_layer="3")

    def answers(*args, **kwargs):
        return getattr(estimator.fit(*args, **kwargs), method)(X)

    kept = weight > 0
    gone = answers(X, y, sample_weight=weight)
    np.testing.assert_array_equal(gone, answers(X[kept], y[kept], sample_weight=weight[kept]))
    plain = answers(X, y)
    np.testing.assert_array_equal(plain, answers(X, y, sample_weight=None))
    np.testing.assert_array_equal(plain, answers(X, y, sample_weight=np.ones(len(y))))
    np.testing.assert_array_equal(
        answers(X[kept], y[kept]), answers(X, y, sample_weight=kept.astype(float))
    )
    tensors = torch.as_tensor(X), torch.as_tensor(y)
    np.testing.assert_array_equal(gone, answers(*tensors, sample_weight=torch.as_tensor(weight)))


@pytest.mark.parametrize("kind", [DCSPruner, SemanticClusterer])
def test_nearly_equal_weights_give_nearly_what_none_give(kind, frozen, data):
    # The same splits, and nothing jumps where weights come in.
    X, y, _ = data
    method = "transform" if kind is SemanticClusterer else "predict_proba"
    estimator = kind(frozen, random_state=0, device="cpu")
    if kind is DCSPruner:
        estimator.set_params(budget=0.6)
    weight = 1 + 1e-9 * np.arange(len(y))
    np.testing.assert_allclose(
        getattr(estimator.fit(X, y, sample_weight=weight), method)(X),
        getattr(estimator.fit(X, y), method)(X),
        atol=1e-3,
    )


@pytest.mark.parametrize("kind", [DCSPruner, SemanticClusterer, SINFClassifier])
@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (3, "one number for each of the 80 samples, got 3"),
        (np.ones(79), "one number for each of the 80 samples, got shape"),
        (np.ones((80, 2)), "one number for each of the 80 samples"),
        (np.full(80, -1.0), "must not be negative"),
        (np.zeros(80), "only zeros"),
        (np.full(80, np.nan), "NaN"),
    ],
)
def test_wrong_weights(kind, weight, match, frozen, data):
    X, y, _ = data
    with pytest.raises(ValueError, match=match):
        kind(frozen).fit(X, y, sample_weight=weight)


def test_whole_numbers_are_weights():
    assert validate_weight(None, 2).tolist() == [1.0, 1.0]
    assert validate_weight([1, 2], 2).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("method", ["confusion", "activation"])
def test_affinities(method):
    rng = np.random.default_rng(0)
    y = np.arange(80) % 4
    x = torch.as_tensor(rng.normal(size=(80, 6)) + rng.normal(size=(4, 6))[y])
    weight = rng.integers(1, 4, 80)
    x2, y2 = x.repeat_interleave(torch.as_tensor(weight), 0), np.repeat(y, weight)
    if method == "activation":
        found, twice = activation_affinity(x, y, weight.astype(float)), activation_affinity(x2, y2)
        np.testing.assert_allclose(found, twice, rtol=1e-6)
        assert np.abs(found - activation_affinity(x, y)).max() > 0.01
    else:
        # Halves are drawn from the samples: equal for equal weights, and near for others.
        found = confusion_affinity(x, y, 0.01, 0, np.full(80, 3.0))
        np.testing.assert_allclose(found, confusion_affinity(x, y, 0.01, 0), atol=1e-6)
        # What is worth next to nothing counts next to nothing.
        weight = np.where(np.arange(80) < 60, 1.0, 1e-9)
        found = confusion_affinity(x, y, 0.01, 0, weight)
        x[60:] += 5.0 * torch.as_tensor(rng.normal(size=(20, 6)))
        np.testing.assert_allclose(found, confusion_affinity(x, y, 0.01, 0, weight), atol=1e-5)


def test_route_predictor():
    rng = np.random.default_rng(0)
    y, y_held = np.arange(60) % 3, np.arange(40) % 3
    x = torch.as_tensor(rng.normal(size=(60, 6)) + rng.normal(size=(3, 6))[y])
    held = torch.as_tensor(rng.normal(size=(40, 6)) + rng.normal(size=(3, 6))[y_held])
    a, b = rng.integers(1, 4, 60), rng.integers(1, 4, 40)
    found = fit_route_predictor(
        x, y, held, y_held, pool_size=1, weight=a.astype(float), held_out_weight=b.astype(float)
    )
    twice = fit_route_predictor(
        x.repeat_interleave(torch.as_tensor(a), 0),
        np.repeat(y, a),
        held.repeat_interleave(torch.as_tensor(b), 0),
        np.repeat(y_held, b),
        pool_size=1,
    )
    assert found.penalty == twice.penalty
    close = torch.testing.assert_close
    close(found.predictor.weight, twice.predictor.weight, rtol=1e-2, atol=1e-3)
    close(
        found.log_posterior.repeat_interleave(torch.as_tensor(b), 0),
        twice.log_posterior,
        rtol=1e-2,
        atol=1e-2,
    )


def test_thresholds():
    rng = np.random.default_rng(0)
    confidence = rng.random(200)
    first, second = rng.random(200) < 0.5 + confidence / 2, rng.random(200) < 0.9
    weight = rng.integers(1, 5, 200)
    again = [np.repeat(a, weight) for a in (confidence, first, second)]
    for choose in (choose_threshold, choose_exit):
        chosen = []
        for target in (0.7, 0.8, 0.85, 0.88, 0.99):
            found = choose(confidence, first, second, target=target, weight=weight.astype(float))
            assert found == choose(*again, target=target)
            chosen.append(found == choose(confidence, first, second, target=target))
        assert not all(chosen)


def test_router_weight_and_temperatures():
    rng = np.random.default_rng(0)
    n, k = 60, 4
    codes, cluster = rng.integers(0, k, n), torch.as_tensor(rng.integers(0, 2, n))
    logits = rng.normal(size=(2, n, k)) + 2 * np.eye(k)[codes]
    log_p = torch.log_softmax(torch.as_tensor(logits[0]), 1)
    held = HeldOut(log_p, cluster, torch.ones(n), torch.as_tensor(3 * logits[1]))
    weight = rng.integers(0, 6, n) + 1
    rows = torch.arange(n).repeat_interleave(torch.as_tensor(weight))
    again = HeldOut(*(part[rows] for part in (log_p, cluster, held.confidence, held.logits)))
    answered = torch.ones(2, k, dtype=torch.bool)
    found = choose_weight(held, codes, answered, ROUTER_WEIGHTS, weight.astype(float))
    twice = choose_weight(again, codes[rows.numpy()], answered, ROUTER_WEIGHTS)
    assert found[0] == twice[0] and found[1].tolist() == twice[1].tolist()
    # Less than ten samples' worth is too little for a temperature.
    little = choose_weight(held, codes, answered, ROUTER_WEIGHTS, np.full(n, 9.0 / n))
    assert little[1].tolist() == [1.0, 1.0]


def test_sinf_with_given_held_out_samples(frozen, data):
    # What repeated samples would give is tested part by part: here they would lie on both sides
    # of the split by which thresholds are chosen.
    X, y, weight = data
    X_val, y_val = blobs(n_classes=4, per_class=15, seed=3, noise=1.5)
    weight_val = np.random.default_rng(2).integers(0, 4, len(y_val))
    sinf = SINFClassifier(
        frozen,
        clusterer=SemanticClusterer(method="given", mapping={"a": [0, 1], "b": [2, 3]}),
        pruner=DCSPruner(criterion="dcs", schedule="linear", repair="static_least_squares"),
        route_layer="3",
        random_state=0,
        device="cpu",
        prefix_pruner=DCSPruner(criterion="dcs", schedule="uniform", pruning_ratios=(0.0, 0.0)),
        options=RoutingOptions(answers="cluster"),
    )
    found = sinf.fit(X, y, weight, X_val=X_val, y_val=y_val).predict_proba(X_val)
    plain = sinf.fit(X, y, X_val=X_val, y_val=y_val)
    assert np.abs(found - plain.predict_proba(X_val)).max() > 0.03
    kept = weight_val > 0
    zeros = sinf.fit(X, y, X_val=X_val, y_val=y_val, sample_weight_val=kept.astype(float))
    without, drop = zeros.predict_proba(X_val), zeros.accuracy_drop_
    left_out = sinf.fit(X, y, X_val=X_val[kept], y_val=y_val[kept])
    np.testing.assert_array_equal(without, left_out.predict_proba(X_val))
    assert drop == left_out.accuracy_drop_
    with pytest.raises(ValueError, match="sample_weight_val is given without X_val"):
        sinf.fit(X, y, sample_weight_val=weight_val)
    with pytest.raises(ValueError, match="sample_weight_val must hold one number for each of"):
        sinf.fit(X, y, X_val=X_val, y_val=y_val, sample_weight_val=weight)


def test_sinf_searches_with_weights(frozen, data):
    X, y, weight = data
    two = SemanticClusterer(n_clusters=2)
    fitted = SINFClassifier(frozen, clusterer=two, random_state=0, device="cpu")
    fitted.fit(X, y, sample_weight=weight)
    assert len(fitted.search_results_) > 1
    assert fitted.score(X, y) > 0.6
    for names in (
        {"pruner": DCSPruner(schedule="linear", criterion="mmd")},
        {"prefix_pruner": DCSPruner(criterion="mmd")},
    ):
        with pytest.raises(ValueError, match="'mmd' takes no sample_weight"):
            SINFClassifier(frozen, **names).fit(X, y, sample_weight=weight)


def test_a_class_without_weight_is_missing(frozen, data):
    X, y, _ = data
    with pytest.raises(ValueError, match="No calibration samples for class"):
        DCSPruner(frozen, criterion="dcs", schedule="linear").fit(
            X, y, sample_weight=(y != 2).astype(float)
        )


def test_functions_as_criteria(frozen, data):
    X, y, weight = data
    seen = []

    def spread(layer):
        seen.append(layer.sample_weight)
        return layer.features.mean((0, 2))

    with pytest.raises(ValueError, match="'spread' takes no sample_weight"):
        DCSPruner(frozen, schedule="linear", criterion=spread).fit(X, y, sample_weight=weight)
    spread.needs = {"features", "y", "sample_weight"}
    options = {"repair": "none", "options": NOTHING_HELD_OUT}
    DCSPruner(frozen, schedule="linear", criterion=spread, **options).fit(
        X, y, sample_weight=weight
    )
    assert seen[0].tolist() == weight[weight > 0].tolist()


def test_cached_scores_know_the_weights(frozen, data, tmp_path):
    X, y, weight = data
    pruner = DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        repair="none",
        random_state=0,
        options=PruningOptions(memory=str(tmp_path)),
    )
    first = pruner.fit(X, y).scores_
    second = pruner.fit(X, y, sample_weight=weight + 1).scores_
    assert any(not np.array_equal(first[k], second[k]) for k in first)


def test_held_out_accuracies_are_weighted(frozen, data):
    X, y, _ = data
    kept = {}
    for heavy in (True, False):
        # What the network gets wrong is most of the weight, or next to none.
        wrong = (
            DCSPruner(
                frozen, criterion="dcs", schedule="linear", pruning_ratios=(0, 0), repair="none"
            )
            .fit(X, y)
            .predict(X)
            != y
        )
        weight = np.where(wrong == heavy, 20.0, 1.0)
        pruner = DCSPruner(
            frozen,
            criterion="l1",
            schedule="iterative",
            repair="none",
            max_accuracy_drop=0.05,
            random_state=0,
            options=PruningOptions(validation_fraction=0.5),
        ).fit(X, y, sample_weight=weight)
        kept[heavy] = sum(map(len, pruner.support_.values()))
    # A network that is mostly wrong has little to lose.
    assert kept[True] < kept[False]


def test_metadata_routing(frozen, data):
    X, y, weight = data
    weight = weight.astype(float) + 1
    with config_context(enable_metadata_routing=True):
        pruner = DCSPruner(
            frozen, criterion="dcs", schedule="linear", repair="none", random_state=0
        )
        routed = pruner.set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        search = GridSearchCV(routed, {"pruning_ratios": [(0.1, 0.2), (0.1, 0.6)]}, cv=2)
        search.fit(X, y, sample_weight=weight)
        best = search.best_estimator_
        expected = pruner.set_params(**search.best_params_).fit(X, y, sample_weight=weight)
        for layer, score in expected.scores_.items():
            np.testing.assert_array_equal(best.scores_[layer], score)
        found = cross_validate(
            routed, X, y, params={"sample_weight": weight}, cv=2, error_score="raise"
        )
        assert np.isfinite(found["test_score"]).all()


def test_default_network_is_trained_with_weights():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(200, 4)).astype(np.float32), np.arange(200) % 2
    X[:100] += 2 * y[:100, None]  # the first half says one thing, the second the opposite
    X[100:] -= 2 * y[100:, None]
    network = default_network((4,), 2, random_state=0)
    for half in (slice(0, 100), slice(100, 200)):
        weight = np.full(200, 0.01)
        weight[half] = 1.0
        trained = train_network(
            network, X, y, epochs=10, sample_weight=weight, random_state=0, device="cpu"
        )
        answers = trained(torch.as_tensor(X[half])).argmax(1).numpy()
        assert (answers == y[half]).mean() > 0.8
    with pytest.raises(ValueError, match="must not be negative"):
        train_network(network, X, y, epochs=1, sample_weight=-weight)
    with pytest.raises(ValueError, match="for each of the 200 samples"):
        train_network(network, X, y, epochs=1, sample_weight=weight[1:])
