"""Jobs in other processes: real workers of Dask and loky give the answers of this process."""

from __future__ import annotations

import functools
import os
import pickle
import sys
import time
import types
import warnings
from pathlib import Path

import distributed
import joblib
import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from joblib import Parallel, delayed, parallel_config
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, ShuffleSplit
from workers import Marked, inside, noted_cnn, whose

from sinfkit import (
    DCSPruner,
    FrozenModel,
    PruningOptions,
    SemanticClusterer,
    SINFClassifier,
    train_network,
)
from sinfkit.utils import Rows, Shared, elsewhere, with_shared


@pytest.fixture(scope="module")
def data():
    X, y = blobs(per_class=40, noise=1.5)
    return X[:160], y[:160], X[160:], y[160:]


@pytest.fixture(scope="module")
def network(data):
    return train_network(
        small_cnn(), *data[:2], epochs=8, batch_size=32, random_state=0, device="cpu"
    )


@pytest.fixture(scope="module")
def frozen(network, tmp_path_factory):
    """A network whose weights stay in a file; notes of its factory are in `notes` beside it."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "notes").mkdir()
    torch.save(network.state_dict(), folder / "weights.pt")
    return FrozenModel.from_file(
        folder / "weights.pt", functools.partial(noted_cnn, str(folder / "notes"))
    )


@pytest.fixture(scope="module")
def client():
    """Two workers, each a process with one thread; closed again, processes and all."""
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            worker_dashboard_address=None,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client
        pids = list(client.run(os.getpid).values())
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.05)


def builders(frozen: FrozenModel) -> list[int]:
    """The processes that have built the network, in that order."""
    notes = sorted(
        Path(frozen.weights_file.factory.args[0]).iterdir(), key=lambda p: p.stat().st_mtime
    )
    return [int(path.name.split("-")[0]) for path in notes]


def classifier(model, **parameters) -> SINFClassifier:
    return SINFClassifier(
        model,
        clusterer=SemanticClusterer(n_clusters=2, max_cluster_size=3),
        pruner=parameters.pop(
            "pruner", DCSPruner(criterion="dcs", schedule="linear", pruning_ratios=(0.1, 0.4))
        ),
        route_layer="3",
        random_state=0,
        **parameters,
    )


def same(a: SINFClassifier, b: SINFClassifier, X: np.ndarray) -> None:
    """Both have chosen the same filters, and answer alike."""
    for one, other in zip(a.supports_, b.supports_, strict=True):
        assert one.keys() == other.keys() and len(one)
        for layer in one:
            np.testing.assert_array_equal(one[layer], other[layer])
    for one, other in zip(a.scores_, b.scores_, strict=True):
        for layer in one:
            np.testing.assert_allclose(one[layer], other[layer], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(a.predict_proba(X), b.predict_proba(X), atol=1e-4)


def test_fit_search_and_predict_on_dask(client, frozen, data):
    X, y, X_test, _ = data
    search = GridSearchCV(
        classifier(frozen),
        {"pruner__pruning_ratios": [(0.1, 0.5)]},
        cv=ShuffleSplit(1, random_state=0),
        refit=False,
    )
    local = classifier(frozen, batch_size=32).fit(X, y)
    methods = {m: getattr(local, m) for m in ("predict", "predict_proba", "predict_cluster")}
    expected = {name: method(X_test) for name, method in methods.items()}
    scores = search.fit(X, y).cv_results_["mean_test_score"]
    built_here = len(builders(frozen))
    with parallel_config("dask"):
        remote = classifier(frozen, batch_size=32).fit(X, y)
        answers = {name: method(X_test) for name, method in methods.items()}
        remote_scores = search.fit(X, y).cv_results_["mean_test_score"]
    same(local, remote, X_test)
    for name, answer in answers.items():
        np.testing.assert_allclose(answer, expected[name], atol=1e-5, err_msg=name)
    np.testing.assert_allclose(remote_scores, scores, atol=0.02)

    # Caches of other processes know it again.
    assert client.submit(joblib.hash, frozen).result() == joblib.hash(frozen)
    # Each worker has loaded the weights, once for all that it was given to do; nobody else has.
    workers = sorted(client.run(os.getpid).values())
    assert sorted(builders(frozen)[built_here:]) == workers


def test_every_worker_gets_what_is_shared_once(client, frozen):
    in_memory = FrozenModel(frozen)
    shared = Shared(Marked(in_memory))
    with parallel_config("dask"):
        found = Parallel()(delayed(with_shared)(whose, shared) for _ in range(12))
    assert len(found) == 12 and os.getpid() not in {pid for pid, _ in found}
    assert len(set(found)) == len({pid for pid, _ in found})


def test_jobs_stay_on_a_worker_of_dask(client):
    with parallel_config("dask"):
        assert elsewhere()
        inner = Parallel()(delayed(inside)() for _ in range(2))
    assert all(inner) and not elsewhere()


def test_a_network_that_workers_cannot_import_is_an_error(client, frozen, data, monkeypatch):
    # In the job, where it is told: what fails on a worker's way in is never heard of.
    here = types.ModuleType("known_here_only")
    exec("def build():\n    from helpers import small_cnn\n    return small_cnn()", here.__dict__)
    monkeypatch.setitem(sys.modules, "known_here_only", here)
    model = FrozenModel.from_file(frozen.weights_file.path, here.build)
    with parallel_config("dask"), pytest.raises(ModuleNotFoundError, match="known_here_only"):
        classifier(model, batch_size=32).fit(*data[:2])


def test_nothing_goes_elsewhere_unless_asked_to():
    assert not elsewhere()
    with parallel_config("threading", n_jobs=2):
        assert not elsewhere()
    with parallel_config("loky", n_jobs=2):
        assert elsewhere()


@pytest.mark.slow
def test_loky_workers_without_a_file(network, data, tmp_path):
    # In memory, with torch tensors, and the methods of all three estimators.
    X, y, X_test, _ = data
    model = FrozenModel(network)
    local = classifier(model, pruner=DCSPruner(schedule="linear", criterion="taylor")).fit(X, y)
    pruner = DCSPruner(
        model, criterion="dcs", schedule="linear", random_state=0, batch_size=40
    ).fit(X, y)
    clusterer = SemanticClusterer(model, random_state=0, batch_size=40).fit(X, y)
    methods = [pruner.predict_proba, pruner.transform, clusterer.predict, clusterer.transform]
    expected = [method(X_test) for method in methods]
    with parallel_config("loky", n_jobs=2):
        taylor = DCSPruner(
            schedule="linear", criterion="taylor", options=PruningOptions(memory=str(tmp_path))
        )
        remote = classifier(model, pruner=taylor).fit(X, y)
        for method, answer in zip(methods, expected, strict=True):
            for samples in (X_test, torch.from_numpy(X_test)):
                found = method(samples)
                assert found.dtype == answer.dtype
                np.testing.assert_allclose(found, answer, atol=1e-5)
        with pytest.raises(ValueError, match="NaN"):
            pruner.predict(
                np.where(np.arange(len(X_test))[:, None, None, None] == 100, np.nan, X_test)
            )
    same(local, remote, X_test)


def test_a_single_batch_and_lists_are_answered_here(network, data, monkeypatch):
    X, y, X_test, _ = data
    pruner = DCSPruner(
        FrozenModel(network), criterion="dcs", schedule="linear", random_state=0
    ).fit(X, y)
    monkeypatch.setattr("sinfkit.utils.jobs.run", lambda *_: pytest.fail("it went to a worker"))
    with parallel_config("loky", n_jobs=2):
        pruner.predict(X_test)
        pruner.set_params(batch_size=10).predict(X_test.tolist())
    with pytest.raises(NotFittedError), parallel_config("loky", n_jobs=2):
        DCSPruner().predict(X_test)


@pytest.mark.parametrize("tensor", [False, True])
def test_rows_take_along_what_they_are_for(tensor):
    X = np.random.default_rng(0).normal(size=(1000, 3))
    index = np.array([907, 4, 55, 500])
    rows = Rows(torch.from_numpy(X) if tensor else X, index)
    data = pickle.dumps(rows)
    assert len(data) < 1000
    copy = pickle.loads(data)
    for wanted in (index, index[2:], index[::-1].copy()):
        for one in (rows, copy, pickle.loads(pickle.dumps(copy))):
            assert isinstance(one[wanted], torch.Tensor) == tensor
            np.testing.assert_array_equal(one[wanted], X[wanted])


def test_workers_that_predict_do_without_the_base_network(network, data, monkeypatch):
    X, y, *_ = data
    model = FrozenModel(network, mean=[0.1], std=[0.9])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fitted = classifier(model).fit(X, y).set_params(batch_size=60)
    sent = []

    def watched(jobs, n_jobs):
        sent.extend(jobs)
        return [pickle.loads(pickle.dumps(job[0]))(*job[1]) for job in sent]

    expected = fitted.predict_proba(X)
    monkeypatch.setattr("sinfkit.utils.jobs.run", watched)
    with joblib.parallel_config("loky", n_jobs=2):
        np.testing.assert_allclose(fitted.predict_proba(X), expected, atol=1e-5)
    twin = next(part for part in sent[0][1] if isinstance(part, Shared))
    assert len(pickle.dumps(twin)) < len(pickle.dumps(fitted)) - len(pickle.dumps(model))
    np.testing.assert_allclose(pickle.loads(pickle.dumps(twin)).get().predict_proba(X), expected)
