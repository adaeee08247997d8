"""scikit-learn's own checks, and life inside its tools."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from sklearn import config_context
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import VotingClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    cross_val_score,
    cross_validate,
    learning_curve,
)
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sinfkit import (
    DCSPruner,
    FrozenModel,
    PruningOptions,
    RoutingOptions,
    SemanticClusterer,
    SINFClassifier,
    resnet50,
    train_network,
)


def expected_failures(estimator):
    """One, the same for all three; that it passes would fail the run."""
    return {
        "check_sample_weight_equivalence_on_dense_data": (
            "the default network is trained in random batches, and samples are held out by chance; "
            "for a given network see test_sample_weight.py"
        )
    }


# Of one size, where the defaults search one: a fit of a check takes a third of the time.
PRUNER = DCSPruner(budget=0.6)
SINF = SINFClassifier(clusterer=SemanticClusterer(n_clusters=2), pruner=PRUNER)
ALL = [SemanticClusterer(), PRUNER, SINF]


@parametrize_with_checks(ALL, expected_failed_checks=expected_failures)
@pytest.mark.filterwarnings("ignore")
def test_sklearn_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([DCSPruner(), SINFClassifier()], expected_failed_checks=expected_failures)
@pytest.mark.filterwarnings("ignore")
def test_sklearn_checks_of_the_defaults(estimator, check):
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


@pytest.mark.parametrize("estimator", ALL)
def test_clone_and_fit_share_the_weights(estimator, trained):
    frozen, X, y = trained
    fitted = clone(estimator).set_params(model=frozen, random_state=0).fit(X, y)
    assert fitted.base_model_ is frozen
    assert clone(fitted).model is frozen


def test_pipeline_with_a_scaler_in_front_and_features_behind(trained):
    frozen, X, y = trained
    flat = X.reshape(len(X), -1)
    front = make_pipeline(
        StandardScaler(with_mean=False, with_std=False), clone(SINF).set_params(model=frozen)
    )
    assert front.fit(flat, y).score(flat, y) > 0.8
    behind = make_pipeline(
        DCSPruner(frozen, criterion="dcs", schedule="linear", random_state=0),
        LogisticRegression(max_iter=500),
    )
    assert behind.fit(X, y).score(X, y) > 0.8


def test_pipeline_memory_hits(trained, tmp_path):
    frozen, X, y = trained
    pipeline = Pipeline(
        [
            ("prune", DCSPruner(frozen, criterion="dcs", schedule="linear", random_state=0)),
            ("lr", LogisticRegression(max_iter=500)),
        ],
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
    a = DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        random_state=0,
        options=PruningOptions(memory=str(tmp_path)),
    ).fit(X, y)
    n = len(list(tmp_path.rglob("output.pkl")))
    assert n == 2  # statistics and scores
    b = DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        pruning_ratios=(0.1, 0.7),
        random_state=0,
        options=PruningOptions(memory=str(tmp_path)),
    ).fit(X, y)
    assert len(list(tmp_path.rglob("output.pkl"))) == n  # the same ones serve
    plain = DCSPruner(
        frozen, criterion="dcs", schedule="linear", pruning_ratios=(0.1, 0.7), random_state=0
    ).fit(X, y)
    for layer, kept in plain.support_.items():
        np.testing.assert_array_equal(kept, b.support_[layer])
    assert any(len(a.support_[k]) > len(b.support_[k]) for k in a.support_)
    DCSPruner(
        frozen,
        schedule="linear",
        random_state=0,
        options=PruningOptions(memory=str(tmp_path)),
        criterion="fdr",
    ).fit(X, y)
    DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        random_state=0,
        options=PruningOptions(memory=str(tmp_path), penalty=0.1),
    ).fit(X, y)
    DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        random_state=0,
        options=PruningOptions(memory=str(tmp_path)),
        classes=[0, 1],
    ).fit(X, y)
    assert len(list(tmp_path.rglob("output.pkl"))) == n + 3  # other scores of the same statistics
    other = np.random.default_rng(0).permutation(y)
    keywords = {"random_state": 0, "repair": "none"}
    cached = DCSPruner(
        frozen,
        criterion="dcs",
        schedule="linear",
        options=PruningOptions(memory=str(tmp_path)),
        **keywords,
    ).fit(X, other)
    fresh = DCSPruner(frozen, criterion="dcs", schedule="linear", **keywords).fit(X, other)
    for layer, score in fresh.scores_.items():
        np.testing.assert_array_equal(cached.scores_[layer], score)


def test_grid_search_over_nested_parameters(trained):
    frozen, X, y = trained
    search = GridSearchCV(
        SINFClassifier(
            frozen,
            pruner=DCSPruner(criterion="dcs", schedule="linear"),
            route_layer="3",
            clusterer=SemanticClusterer(n_clusters=2),
            fallback="base",
            random_state=0,
        ),
        {
            "pruner__pruning_ratios": [(0.1, 0.2), (0.1, 0.6)],
            "options__confidence_threshold": [0.0, "auto"],
        },
        cv=2,
    ).fit(X, y)
    assert set(search.best_params_) == {
        "pruner__pruning_ratios",
        "options__confidence_threshold",
    }
    assert search.best_score_ > 0.7
    scores = cross_val_score(
        DCSPruner(frozen, criterion="dcs", schedule="linear", random_state=0), X, y, cv=2
    )
    assert scores.mean() > 0.7


def test_joblib_round_trip_in_a_new_process(trained, tmp_path):
    frozen, X, y = trained
    estimators = [clone(e).set_params(model=frozen, random_state=0).fit(X, y) for e in ALL]
    path, data, out = tmp_path / "e.joblib", tmp_path / "X.npy", tmp_path / "out.npz"
    joblib.dump(estimators, path)
    np.save(data, X)
    code = (
        f"import joblib, numpy as np; X = np.load({str(data)!r}); "
        f"clusterer, pruner, sinf = joblib.load({str(path)!r}); "
        f"np.savez({str(out)!r}, clusterer.transform(X), pruner.predict_proba(X), "
        "sinf.predict_proba(X))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    clusterer, pruner, sinf = estimators
    expected = [clusterer.transform(X), pruner.predict_proba(X), sinf.predict_proba(X)]
    with np.load(out) as found:
        for i, answer in enumerate(expected):
            np.testing.assert_allclose(found[f"arr_{i}"], answer, atol=1e-5)


def test_string_labels(trained):
    frozen, X, y = trained
    names = np.array(["ant", "bee", "cat", "dog", "eel", "fox"])
    clf = clone(SINF).set_params(model=frozen, random_state=0).fit(X, names[y])
    assert clf.classes_.tolist() == names.tolist()
    assert set(clf.predict(X)) <= set(names)
    assert clf.score(X, names[y]) > 0.8
    # outputs in another order than the sorted labels
    shuffled = names[[3, 1, 5, 0, 2, 4]]
    again = clone(SINF).set_params(model=frozen, model_classes=shuffled, random_state=0)
    again.fit(X, shuffled[y])
    assert again.classes_.tolist() == names.tolist()
    assert again.score(X, shuffled[y]) > 0.8


@pytest.mark.parametrize("estimator", ALL)
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


class HostReads(TorchFunctionMode):
    """Counts what would make the host wait for a GPU, also where tensors are on the CPU."""

    def __init__(self):
        super().__init__()
        self.found = []
        self._below = _Operations(self.found)

    def __enter__(self):
        self._below.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self._below.__exit__(*args)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Of the operations below Python, those that need a number from the device."""

    NAMES = (
        "_local_scalar_dense nonzero masked_select bincount _unique2 unique_dim "
        "unique_consecutive repeat_interleave"
    ).split()

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name.startswith("index") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8)
            for leaf in tree_leaves(args[1:2])
        )
        if name in self.NAMES or masked:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_host_reads_are_seen():
    x = torch.arange(4)
    for read in (
        lambda: x.tolist(),
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x[x > 1],
        lambda: torch.bincount(x),
        lambda: x.numpy(),
    ):
        with HostReads() as reads:
            read()
        assert len(reads.found) == 1
    with HostReads() as reads:
        x[torch.tensor([1, 2])]
    assert not reads.found


@pytest.fixture
def dispatch(monkeypatch):
    """scikit-learn's array API dispatch, for which it wants scipy's."""
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(config_context(array_api_dispatch=True))
        except ImportError as error:  # scikit-learn 1.6 has no copy of array-api-compat
            pytest.skip(str(error))
        yield


@pytest.mark.parametrize("fallback", ["none", "base"])
def test_one_host_copy_per_batch(fallback, trained, dispatch):
    frozen, X, y = trained
    clf = SINFClassifier(
        frozen,
        clusterer=SemanticClusterer(n_clusters=2),
        pruner=DCSPruner(criterion="dcs", schedule="linear"),
        fallback=fallback,
        route_layer="3",
        batch_size=100,
        random_state=0,
        device="cpu",
        options=RoutingOptions(
            confidence_threshold="auto" if fallback == "none" else 0.9, exit_threshold=0.999
        ),
    ).fit(X, y)
    x = torch.as_tensor(X)
    with HostReads() as reads:
        clf.predict(x)
    assert reads.found == ["tolist"] * 4  # 360 samples
    with HostReads() as reads, config_context(assume_finite=True):
        clf.predict_cluster(x)
    assert reads.found == []
    pruner = DCSPruner(
        frozen, criterion="dcs", schedule="linear", batch_size=100, random_state=0
    ).fit(X, y)
    with HostReads() as reads:
        pruner.transform(x)
    # Whether samples are finite, and their range, once a call.
    assert reads.found == ["_local_scalar_dense"] * 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_tensors_are_refused_under_dispatch(bad, trained, dispatch):
    frozen, X, y = trained
    x = torch.as_tensor(X).clone()
    x[7, 0, 3, 3] = bad
    for estimator in (
        SINFClassifier(
            frozen, pruner=DCSPruner(criterion="dcs", schedule="linear"), random_state=0
        ),
        DCSPruner(frozen, criterion="dcs", schedule="linear"),
    ):
        fitted = estimator.fit(X, y)
        for method in ("predict", "predict_proba", "predict_cluster", "transform"):
            if hasattr(fitted, method):
                with pytest.raises(ValueError, match="X contains NaN or infinity"):
                    getattr(fitted, method)(x)


@pytest.mark.parametrize("estimator", ALL)
def test_tensors_in_tensors_out_under_dispatch(estimator, trained, dispatch):
    frozen, X, y = trained
    fitted = clone(estimator).set_params(model=frozen, random_state=0)
    fitted.fit(torch.as_tensor(X), torch.as_tensor(y))
    for method in ("predict", "predict_proba", "predict_cluster", "transform"):
        if not hasattr(fitted, method):
            continue
        expected = getattr(fitted, method)(X)
        assert isinstance(expected, np.ndarray)
        for x in (torch.as_tensor(X), torch.as_tensor(X).double()):
            with config_context(array_api_dispatch=False):
                assert isinstance(getattr(fitted, method)(x), np.ndarray)
            got = getattr(fitted, method)(x)
            assert isinstance(got, torch.Tensor) and got.device == x.device
            wide = method == "transform" and x.dtype == torch.float64
            assert got.numpy().dtype == (np.float64 if wide else expected.dtype)
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5)
            got += 1  # not an inference tensor
    if hasattr(fitted, "score"):
        tensors = torch.as_tensor(X), torch.as_tensor(y)
        assert fitted.score(X, y) > 0.8
        assert fitted.score(*tensors) == pytest.approx(fitted.score(X, y))


def test_string_labels_are_numpy_under_dispatch(trained, dispatch):
    frozen, X, y = trained
    names = np.array(["ant", "bee", "cat", "dog", "eel", "fox"])
    for estimator in (PRUNER, SINF):
        fitted = clone(estimator).set_params(model=frozen, random_state=0)
        fitted.fit(torch.as_tensor(X), names[y])
        answers = fitted.predict(torch.as_tensor(X))
        assert isinstance(answers, np.ndarray) and set(answers) <= set(names)
        assert isinstance(fitted.predict_proba(torch.as_tensor(X)), torch.Tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_copy_from_a_gpu_per_batch(trained, dispatch):
    frozen, X, y = trained
    clf = SINFClassifier(
        frozen, pruner=DCSPruner(criterion="dcs", schedule="linear"), batch_size=100, random_state=0
    ).fit(X, y)
    assert clf.device_.type == "cuda"
    x = torch.as_tensor(X, device="cuda")
    expected = clf.predict(x)  # warms up
    assert expected.device == x.device
    assert clf.predict(X).tolist() == expected.tolist()
    with torch.profiler.profile() as profile:
        clf.predict(x)
        torch.cuda.synchronize()
    copies = [e for e in profile.events() if "DtoH" in e.name]
    assert len(copies) == 4


def test_feature_names_and_set_output(trained):
    frozen, X, y = trained
    for kind in (SemanticClusterer, DCSPruner):
        fitted = kind(frozen, random_state=0).fit(X, y)
        names = fitted.get_feature_names_out()
        prefix = kind.__name__.lower()
        assert names.tolist() == [f"{prefix}{i}" for i in range(fitted.transform(X).shape[1])]
        pandas = pytest.importorskip("pandas")
        frame = fitted.set_output(transform="pandas").transform(X)
        assert isinstance(frame, pandas.DataFrame)
        assert frame.columns.tolist() == names.tolist()
        np.testing.assert_array_equal(frame, fitted.set_output(transform="default").transform(X))


def test_reprs_are_short_with_a_resnet50_inside():
    network = resnet50(n_classes=10)
    for model in (network, FrozenModel(network)):
        for estimator in (
            SemanticClusterer(model),
            DCSPruner(model, criterion="dcs", schedule="linear"),
            SINFClassifier(
                model,
                clusterer=SemanticClusterer(n_clusters=3),
                pruner=DCSPruner(criterion="dcs", schedule="linear"),
            ),
        ):
            text = repr(estimator)
            assert len(text) < 200 and "23.5M parameters" in text
            html = estimator._repr_html_()
            assert len(html) < 60_000  # most of it scikit-learn's style sheet
            assert "Conv2d" not in html and "23.5M parameters" in html
    assert repr(DCSPruner(network)) == "DCSPruner(model=_ResNet50(23.5M parameters))"
    # Lines break where scikit-learn breaks them.
    long = SINFClassifier(
        route_layer="3", max_accuracy_drop=0.02, options=RoutingOptions(validation_fraction=0.3)
    )
    assert repr(long).count("\n") == 2


def test_fitted_html_is_short(trained):
    frozen, X, y = trained
    html = (
        SINFClassifier(
            frozen.module(), pruner=DCSPruner(criterion="dcs", schedule="linear"), random_state=0
        )
        .fit(X, y)
        ._repr_html_()
    )
    assert len(html) < 80_000 and "(conv" not in html and "Conv2d" not in html


def test_calibrated_frozen_and_voting(trained):
    frozen, X, y = trained
    names = np.array(["ant", "bee", "cat", "dog", "eel", "fox"])
    pruner = DCSPruner(frozen, criterion="dcs", schedule="linear", random_state=0)
    fitted = clone(pruner).fit(X[:240], names[y[:240]])
    calibrated = CalibratedClassifierCV(FrozenEstimator(fitted))
    calibrated.fit(X[240:], names[y[240:]])
    assert calibrated.calibrated_classifiers_[0].estimator.estimator is fitted
    assert calibrated.score(X, names[y]) > 0.8
    # It learns from folds of its own, in each of which the estimator is fitted anew.
    again = CalibratedClassifierCV(pruner, cv=2).fit(X, names[y])
    assert again.score(X, names[y]) > 0.8
    assert FrozenEstimator(fitted).fit(X, y).predict(X).tolist() == fitted.predict(X).tolist()
    sinf = SINFClassifier(
        frozen,
        pruner=DCSPruner(criterion="dcs", schedule="linear"),
        route_layer="3",
        random_state=0,
    )
    voting = VotingClassifier([("pruner", pruner), ("sinf", sinf)], voting="soft").fit(X, names[y])
    assert voting.score(X, names[y]) > 0.8


def test_cross_validate_and_learning_curve(trained):
    frozen, X, y = trained
    pruner = DCSPruner(frozen, criterion="dcs", schedule="linear", random_state=0)
    scores = cross_validate(
        pruner, X, y, cv=2, scoring=["accuracy", "neg_log_loss"], return_estimator=True
    )
    assert scores["test_accuracy"].mean() > 0.7 and np.isfinite(scores["test_neg_log_loss"]).all()
    assert all(e.base_model_ is frozen for e in scores["estimator"])
    sizes, _, test = learning_curve(pruner, X, y, cv=2, train_sizes=[60, 180], error_score="raise")
    assert sizes.tolist() == [60, 180] and test.mean() > 0.7


def test_a_fitted_skorch_net_is_a_model(trained):
    skorch = pytest.importorskip("skorch")
    frozen, X, y = trained
    net = skorch.NeuralNetClassifier(
        small_cnn, criterion=torch.nn.CrossEntropyLoss, max_epochs=0, verbose=0
    ).fit(X, y.astype(np.int64))
    net.module_.load_state_dict(frozen.module().state_dict())
    fitted = DCSPruner(
        FrozenModel(net),
        criterion="dcs",
        schedule="linear",
        pruning_ratios=(0.0, 0.0),
        repair="none",
    ).fit(X, y)
    np.testing.assert_allclose(fitted.predict_proba(X), _softmax(net.forward(X)), atol=1e-5)
    with pytest.raises(TypeError, match="FrozenModel"):
        DCSPruner(net, criterion="dcs", schedule="linear").fit(X, y)


def _softmax(logits):
    return torch.softmax(logits, 1).numpy()
