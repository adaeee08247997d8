"""Faults that really happen: no memory, a kill, Ctrl-C, a full disk, a worker that dies."""

from __future__ import annotations

import ctypes
import gc
import inspect
import os
import signal
import sys
import warnings

import joblib
import numpy as np
import pytest
import torch
from children import in_child, needs_fork, value_of
from helpers import blobs, small_cnn
from sklearn.base import clone
from torch import nn

from sinfkit import (
    DCSPruner,
    FrozenModel,
    PruningOptions,
    SemanticClusterer,
    SINFClassifier,
    train_network,
)
from sinfkit.utils import in_pieces

resource = pytest.importorskip("resource")
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory as on Linux")
ESTIMATORS = ("SemanticClusterer", "DCSPruner", "SINFClassifier")


@pytest.fixture(scope="module")
def data():
    return blobs(n_classes=4, per_class=20)


def estimators_on_a_network(data, width):
    """Estimators that are not fitted, on one trained network."""
    X, y = data
    network = train_network(
        small_cnn(4, width), X, y, epochs=4, batch_size=16, random_state=0, device="cpu"
    )
    frozen = FrozenModel(network)
    return {
        "SemanticClusterer": SemanticClusterer(frozen, n_clusters=2, random_state=0),
        "DCSPruner": DCSPruner(frozen, criterion="dcs", schedule="linear", random_state=0),
        "SINFClassifier": SINFClassifier(
            frozen,
            clusterer=SemanticClusterer(n_clusters=2),
            pruner=DCSPruner(criterion="dcs", schedule="linear"),
            route_layer="3",
            random_state=0,
        ),
    }


@pytest.fixture(scope="module")
def fresh(data):
    return estimators_on_a_network(data, 4)


@pytest.fixture(scope="module")
def fitted(fresh, data):
    return {name: clone(estimator).fit(*data) for name, estimator in fresh.items()}


def limit_memory(more: int) -> None:
    """From now on this process gets so many bytes, beside what it has."""
    torch.set_num_threads(1)  # a thread's stack would count too
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.malloc_trim(0)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    # What other tests gave back still lies in the allocator's heap, and would be found there. With
    # nothing more to be had from the system, whatever is large in it is taken away here.
    resource.setrlimit(resource.RLIMIT_AS, (now, hard))
    for size in (2**k for k in range(30, 15, -1)):
        while libc.malloc(size):
            pass
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))


def lift_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def sizes_too_large(caught: list[warnings.WarningMessage]) -> list[int]:
    """Sizes that were warned of, in order."""
    said = [str(w.message) for w in caught if "does not fit into the memory" in str(w.message)]
    return [int(text.split()[3]) for text in said]


@linux
@needs_fork
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("SINFClassifier", "predict_proba"),
        ("SemanticClusterer", "transform"),
        ("DCSPruner", "transform"),
    ],
)
def test_out_of_memory_halves_the_batch_and_goes_on(fitted, data, name, method):
    n = 64_000
    X = np.tile(data[0], (n // len(data[0]), 1, 1, 1))
    estimator = fitted[name]
    expected = getattr(estimator, method)(data[0])

    def starve():
        estimator.set_params(batch_size=n // 2)
        limit_memory(32 * 2**20)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = getattr(estimator, method)(X)
        lift_limit()
        close = all(np.allclose(found[i::80], expected[i], atol=1e-5) for i in range(80))
        return close, sizes_too_large(caught)

    close, sizes = value_of(starve)
    assert close
    # Each size was tried once only, though there are two batches.
    assert sizes == [n // 2 >> k for k in range(len(sizes))] and sizes


@linux
@needs_fork
def test_fit_and_report_go_on_in_halves_too(data):
    # Large images and many channels: 3 MB of images take 42 MB in a layer, and 28 are there.
    fresh = estimators_on_a_network(data, 16)
    X, y = (np.concatenate([part] * 2) for part in data)
    X = np.kron(X, np.ones((1, 1, 8, 8), X.dtype))
    clusterer, clf = clone(fresh["SemanticClusterer"]), clone(fresh["SINFClassifier"])
    clf.fit(X[: len(data[0])], data[1])
    expected = clone(clusterer).fit(X, y).affinity_, clf.report(X, y, repeats=0).to_dict()

    def starve():
        clusterer.set_params(batch_size=len(X))
        clf.set_params(batch_size=len(X))
        sizes = []
        limit_memory(28 * 2**20)
        for run in (
            lambda: clusterer.fit(X, y).affinity_,
            lambda: clf.report(X, y, latency_batch=64, repeats=0).to_dict(),
        ):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found.append(run())
            sizes.append(sizes_too_large(caught))
        return found, sizes

    found = []
    (affinity, report), sizes = value_of(starve)
    np.testing.assert_allclose(affinity, expected[0], atol=1e-4)
    for name in ("n_samples", "base_accuracy", "accuracy", "exit_share", "macs"):
        assert report[name] == pytest.approx(expected[1][name], abs=1e-3)
    assert all(tried[0] == len(X) for tried in sizes)


def test_memory_is_given_back_if_not_even_one_sample_fits():
    """The first ReLU asks for more than any machine has, when images and channels are held."""
    network = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
    )
    rng = np.random.default_rng(0)
    X = rng.normal(size=(6, 1, 192, 192)).astype(np.float32)
    estimator = DCSPruner(
        FrozenModel(network),
        criterion="dcs",
        schedule="linear",
        batch_size=4,
        random_state=0,
        options=PruningOptions(repair_samples=2),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator.fit(X, [0, 1] * 3)
    expected = estimator.predict_proba(X)

    def large() -> int:
        gc.collect()
        # Not the shadows that an export in another test may have left, without a size.
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
        return sum(t.numel() > 100_000 for t in tensors)

    before = large()
    relu = estimator.model_.get_submodule("1")
    hungry = relu.register_forward_pre_hook(lambda *_: torch.empty(2**60, dtype=torch.int8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            estimator.predict_proba(X)
        except MemoryError as error:
            message, left = str(error), large() - before
    hungry.remove()
    assert message.startswith("Not even one sample fits into the memory of cpu")
    assert left == 0 and sizes_too_large(caught) == [4, 2]
    np.testing.assert_allclose(estimator.predict_proba(X), expected, atol=1e-6)


def test_pieces_keep_their_order_and_other_errors_pass():
    batches = [torch.arange(0, 7), torch.arange(7, 12)]
    rows = torch.arange(12) * 2
    limit = 3

    def run(x, twice):
        if len(x) > limit:
            torch.empty(2**60, dtype=torch.int8)  # more than any machine has
        assert torch.equal(2 * x, twice)
        return x

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = list(in_pieces(run, batches, rows))
    assert torch.cat(found).tolist() == list(range(12))
    assert [len(piece) for piece in found] == [3, 3, 1, 3, 2] and sizes_too_large(caught) == [7]
    assert {w.filename for w in caught} == {__file__}
    with pytest.raises(RuntimeError, match="size"):
        list(in_pieces(lambda x: x.float() @ torch.zeros(99), batches))


@needs_fork
@pytest.mark.parametrize("name", ["DCSPruner", "SINFClassifier"])
def test_a_killed_fit_goes_on_from_the_last_finished_stage(fresh, data, name, tmp_path, capsys):
    X, y = data
    where = "pruner__options__memory" if name == "SINFClassifier" else "options__memory"

    def killed():
        stored = []

        def watch(event, arguments):
            # What is written is renamed at the end: the second result never gets there.
            if event == "os.rename" and str(arguments[1]).endswith("output.pkl"):
                stored.append(arguments[1])
                if len(stored) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        clone(fresh[name]).set_params(**{where: str(tmp_path)}).fit(X, y)

    assert in_child(killed).status == -signal.SIGKILL
    (statistics,) = tmp_path.rglob("output.pkl")
    written = statistics.stat().st_mtime_ns
    capsys.readouterr()
    # At this level joblib tells of every call that it has to make.
    memory = joblib.Memory(str(tmp_path), verbose=1)
    resumed = clone(fresh[name]).set_params(**{where: memory}).fit(X, y)
    # The scores had to be computed, the statistics (by a function named as its folder) were there.
    calls = capsys.readouterr().out
    assert "Calling sinfkit.pruning.scoring" in calls and statistics.parents[1].name not in calls
    assert statistics.stat().st_mtime_ns == written
    expected = clone(fresh[name]).fit(X, y)
    np.testing.assert_array_equal(resumed.predict_proba(X), expected.predict_proba(X))


class Interrupt:
    """Presses Ctrl-C at the n-th call of a Python function, or soon after; counts if n is None.

    Not where Python ignores it: in a generator that is being closed, or a finaliser.
    """

    def __init__(self, n: int | None = None) -> None:
        self.n, self.count = n, 0

    def __call__(self, frame, event, argument):
        if event == "call":
            self.count += 1
            code = frame.f_code
            ignored = code.co_flags & inspect.CO_GENERATOR or code.co_name == "__del__"
            if self.n is not None and self.count >= self.n and not ignored:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    def __enter__(self):
        # A job in the background of a shell ignores it.
        self.handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.setprofile(self)
        return self

    def __exit__(self, *exception):
        sys.setprofile(None)
        signal.signal(signal.SIGINT, self.handler)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_ctrl_c_leaves_the_estimator_as_it_was(fitted, fresh, data, name):
    X, y = data
    old, new = fitted[name], clone(fresh[name])
    method = "transform" if name == "SemanticClusterer" else "predict_proba"
    expected = getattr(old, method)(X)
    before, parameters = dict(vars(old)), dict(vars(new))
    clone(old).fit(X, y)  # what the first fit of a process does besides
    with Interrupt() as counted:
        clone(old).fit(X, y)
    assert counted.count > 1000
    for n in np.linspace(1, 0.8 * counted.count, 3).astype(int):
        for estimator, held in ((old, before), (new, parameters)):
            with pytest.raises(KeyboardInterrupt), Interrupt(n):
                estimator.fit(X, y)
            assert vars(estimator).keys() == held.keys()
            assert all(vars(estimator)[key] is value for key, value in held.items())
    np.testing.assert_array_equal(getattr(old, method)(X), expected)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


@needs_fork
def test_a_full_disk_leaves_no_half_export_and_the_earlier_one(fitted, tmp_path):
    pytest.importorskip("onnxscript")
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("manifest.json", "sinf_onnx.py"):
        (folder / name).write_text("the earlier one")

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                fitted["SINFClassifier"].to_onnx(folder, overwrite=True)
            except OSError as error:
                return type(error).__name__, os.strerror(error.errno)
        return "", ""

    kind, reason = value_of(fill)
    assert kind == "OSError" and reason == "File too large"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "sinf_onnx.py"]
    assert {path.read_text() for path in folder.iterdir()} == {"the earlier one"}


@needs_fork
def test_a_full_disk_costs_the_cache_not_the_fit(fresh, data, tmp_path):
    X, y = data
    estimator = clone(fresh["DCSPruner"]).set_params(options__memory=str(tmp_path))

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.RLIM_INFINITY))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            p = estimator.fit(X, y).predict_proba(X)
        return p, [str(w.message) for w in caught]

    p, said = value_of(fill)
    assert any("Unable to cache to disk" in text for text in said)
    assert not list(tmp_path.rglob("output.pkl"))
    np.testing.assert_allclose(estimator.fit(X, y).predict_proba(X), p, atol=1e-6)


@needs_fork
def test_a_full_disk_leaves_no_half_checkpoint(data, tmp_path):
    X, y = data
    keywords = {"epochs": 2, "batch_size": 16, "random_state": 0, "device": "cpu"}
    path = tmp_path / "run.ckpt"

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.RLIM_INFINITY))
        train_network(small_cnn(4, 4), X, y, checkpoint=path, **keywords)

    ended = in_child(fill)
    assert ended.status == 1 and "File too large" in ended.error
    assert not list(tmp_path.iterdir())


class Deadly:
    """A criterion that ends its process, unless that is the one that made it."""

    def __init__(self) -> None:
        self.home, self.needs = os.getpid(), {"weight"}

    def __call__(self, layer):
        if os.getpid() != self.home:
            os._exit(3)
        return layer.weight.flatten(1).abs().sum(1)


@pytest.mark.slow
def test_a_worker_that_dies_is_told_and_changes_nothing(fitted, data):
    X, y = data
    clf = fitted["SINFClassifier"]
    # Two clusters of two: the scores of a single one are computed here.
    pairs = SemanticClusterer(method="given", mapping={k: k // 2 for k in range(4)})
    parameters = {**clf.get_params(deep=False), "clusterer": pairs}
    parameters["pruner"] = DCSPruner(schedule="linear", criterion=Deadly())
    twin = SINFClassifier(**parameters).fit(X, y)  # in threads nothing dies
    before = dict(vars(twin))
    with joblib.parallel_config("loky", n_jobs=2), pytest.raises(Exception) as caught:
        twin.fit(X, y)
    assert "terminated" in str(caught.value) and "worker" in str(caught.value)
    assert vars(twin).keys() == before.keys()
    assert all(vars(twin)[key] is value for key, value in before.items())
    assert twin.predict(X).shape == y.shape
