"""Exported classifiers answer as the fitted ones do, without torch."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import CLUSTERS, WIDTH, K, M, blobs, make_network, small_cnn
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from torch import nn

from sinfkit import (
    DCSPruner,
    FrozenModel,
    RoutingOptions,
    SemanticClusterer,
    SINFClassifier,
    train_network,
)
from sinfkit.export import to_exported, to_onnx
from sinfkit.export.onnx_loader import load
from sinfkit.graph import cut_points, split, trace
from sinfkit.inference import RoutePredictor, SINFNetwork, own_classes

# Quantisation and export speak of what they do; the rest are errors as everywhere.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def data():
    X, y = blobs(per_class=60, noise=1.2)
    return X[:240], np.array(["ant", "bee", "cat", "dog", "eel", "fox"])[y[:240]], X[240:]


@pytest.fixture(scope="module")
def fitted(data):
    X, y, _ = data
    codes = np.unique(y, return_inverse=True)[1]
    network = train_network(
        small_cnn(), X, codes, epochs=10, batch_size=32, random_state=0, device="cpu"
    )
    return SINFClassifier(
        FrozenModel(network, mean=[0.1], std=[1.3]),
        clusterer=SemanticClusterer(n_clusters=2),
        pruner=DCSPruner(criterion="dcs", schedule="linear"),
        fallback="base",
        route_layer="3",
        device="cpu",
        random_state=0,
        options=RoutingOptions(confidence_threshold=0.6),
    ).fit(X, y)


@pytest.fixture(scope="module")
def folder(fitted, tmp_path_factory):
    return fitted.to_onnx(tmp_path_factory.mktemp("export") / "model")


def with_network(network):
    """A classifier around a network made by hand."""
    clf = SINFClassifier()
    clf.network_, clf.classes_, clf.input_shape_ = network, np.arange(K), (WIDTH,)
    clf.class_clusters_ = CLUSTERS.numpy()
    return clf


def router_alone(classes):
    """A classifier of one linear layer whose clusters have no subgraphs: exported in no time."""
    network = make_network("none")
    network.subgraphs.clear()
    clf = with_network(network)
    clf.classes_ = classes
    return clf


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """Files of a network made by hand; the last cluster has one class and no subgraph."""
    answered = own_classes(CLUSTERS, M)
    answered[:3] |= torch.rand(3, K, generator=torch.Generator().manual_seed(4)) < 0.4
    clf = with_network(make_network(answered=answered))
    return answered, clf.to_onnx(tmp_path_factory.mktemp("hand") / "model")


def near_a_tie(network, x, within=1e-4):
    """Rows whose route hangs on the last digits: near a threshold, or between two clusters."""
    route = network.route(x)
    ranked = route.posterior.sort(1, descending=True).values
    near = (route.confidence - network.threshold).abs() < within
    if network.exit_threshold is not None:
        near |= (route.log_posterior.exp().amax(1) - network.exit_threshold).abs() < within
    for rank in range(min(2, ranked.shape[1] - 1)):
        near |= ranked[:, rank] - ranked[:, rank + 1] < within
    return near.numpy()


def assert_agrees(found, network, x, n_near=0.05):
    near = near_a_tie(network, x)
    assert near.mean() <= n_near
    np.testing.assert_allclose(found[~near], network(x).numpy()[~near], atol=1e-4)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("fallback", ["base", "top2", "none"])
@pytest.mark.parametrize("threshold", [0.0, 0.45, 1.1])
@pytest.mark.parametrize("exit_threshold", [None, 0.4, 0.0])
def test_every_way_through_the_network(by_hand, tmp_path, fallback, threshold, exit_threshold):
    """The ONNX files are the same for all of them; what the manifest says differs."""
    answered, source = by_hand
    network = make_network(fallback, threshold, answered=answered, exit_threshold=exit_threshold)
    manifest = json.loads((source / "manifest.json").read_text())
    manifest.update(threshold=threshold, fallback=fallback, exit_threshold=exit_threshold)
    manifest["base"] = "base.onnx" if fallback == "base" else None
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(1))
    loaded = load(tmp_path, n_threads=1)
    assert_agrees(loaded.predict_proba(x.numpy()), network, x)
    same = loaded.predict_cluster(x.numpy()) == network.route(x).cluster.numpy()
    assert same[~near_a_tie(network, x)].all()


@pytest.mark.parametrize("n", [1, 3, 64])
def test_answers_are_those_of_the_classifier(fitted, folder, data, n):
    X = data[2][:n]
    loaded = load(folder, n_threads=1)
    assert_agrees(loaded.predict_proba(X), fitted.network_, torch.as_tensor(X), 0.34)
    sure = np.sort(fitted.predict_proba(X), 1)
    sure = (sure[:, -1] - sure[:, -2] > 1e-3) & ~near_a_tie(fitted.network_, torch.as_tensor(X))
    assert sure.any()
    np.testing.assert_array_equal(loaded.predict(X)[sure], fitted.predict(X)[sure])
    np.testing.assert_array_equal(loaded.predict_cluster(X), fitted.predict_cluster(X))
    np.testing.assert_array_equal(loaded.classes_, fitted.classes_)
    assert loaded.classes_.dtype == fitted.classes_.dtype
    whole = load(folder, n_threads=2, batch_size=5).predict_proba(X)
    np.testing.assert_allclose(whole, loaded.predict_proba(X), atol=1e-5)


def test_another_export_takes_the_place_of_an_earlier_one(fitted, folder, data, tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    clf = copy.copy(fitted)
    clf.network_ = copy.deepcopy(fitted.network_)
    clf.network_.fallback, clf.network_.rest, clf.network_.exit_threshold = "top2", None, 0.9
    assert clf.to_onnx(target, overwrite=True) == target
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (target / "base.onnx").exists()
    X = data[2]
    leave = clf.network_.route(torch.as_tensor(X)).log_posterior.exp().amax(1) >= 0.9
    assert 0 < leave.float().mean() < 1
    assert_agrees(load(target).predict_proba(X), clf.network_, torch.as_tensor(X))


def test_bytes_are_divided_by_255(fitted, folder):
    X = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    loaded = load(folder)
    scaled = fitted.predict_proba(X.astype(np.float32) / 255)
    np.testing.assert_allclose(loaded.predict_proba(X), scaled, atol=1e-4)
    flat = X.reshape(20, 64)
    np.testing.assert_allclose(loaded.predict_proba(flat), loaded.predict_proba(X))


def test_the_loader_knows_no_torch(folder, data, tmp_path):
    np.save(tmp_path / "X.npy", data[2])
    code = (
        "import sys, numpy; from sinf_onnx import load; "
        f"p = load('.', n_threads=1).predict_proba(numpy.load({str(tmp_path / 'X.npy')!r})); "
        "assert 'torch' not in sys.modules and 'sinfkit' not in sys.modules; "
        f"numpy.save({str(tmp_path / 'p.npy')!r}, p)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    found = np.load(tmp_path / "p.npy")
    np.testing.assert_array_equal(found, load(folder, n_threads=1).predict_proba(data[2]))


@pytest.mark.parametrize("n", [1, 3, 64])
def test_exported_programs(fitted, data, n):
    programs = to_exported(fitted.network_, fitted.input_shape_)
    network, x = fitted.network_, torch.as_tensor(data[2][:n])
    assert set(programs) == {"router", "base", *(f"subgraph_{c}" for c in network.subgraphs)}
    h, log_posterior = programs["router"].module()(x)
    route = network.route(x)
    torch.testing.assert_close(log_posterior, route.log_posterior, atol=1e-4, rtol=1e-4)
    assert log_posterior.dtype == torch.float32
    torch.testing.assert_close(h, network.prefix(network.normalise(x)), atol=1e-5, rtol=1e-4)
    for name, program in programs.items():
        if name != "router":
            part = network.rest if name == "base" else network.subgraphs[name[len("subgraph_") :]]
            torch.testing.assert_close(program.module()(h), part(h), atol=1e-4, rtol=1e-4)


def test_damage_is_told(folder, tmp_path):
    for file in folder.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    router = bytearray((folder / "router.onnx").read_bytes())
    router[len(router) // 2] ^= 1
    (tmp_path / "router.onnx").write_bytes(router)
    with pytest.raises(ValueError, match=r"router\.onnx is not as it was exported: its SHA-256"):
        load(tmp_path)
    (tmp_path / "router.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"router\.onnx is missing"):
        load(tmp_path)
    text = (folder / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text[:100])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        load(tmp_path)
    manifest = json.loads(text)
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(ValueError, match="schema 99"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        load(tmp_path / "nowhere")


def test_samples_that_do_not_fit_are_told(folder, data):
    loaded, X = load(folder), data[2]
    for bad, match in (
        (X[:, :, :5], r"X must have shape \(n_samples, 1, 8, 8\)"),
        (X[:0], "0 samples"),
        (np.full_like(X, np.nan), "NaN"),
        (X.astype(str), "numbers"),
    ):
        with pytest.raises(ValueError, match=match):
            loaded.predict(bad)
    for name in ("n_threads", "batch_size"):
        with pytest.raises(ValueError, match=name):
            load(folder, **{name: 0})


def test_what_is_there_is_not_lost(fitted, folder, tmp_path):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        fitted.to_onnx(folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no earlier export"):
        fitted.to_onnx(tmp_path, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        fitted.to_onnx(tmp_path / "notes.txt", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


class DependsOnValues(nn.Module):
    def forward(self, h):
        return h if h.sum() > 0 else -h


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    clf = with_network(make_network())
    clf.network_.subgraphs["1"] = nn.Sequential(DependsOnValues(), nn.Linear(WIDTH, 2))
    with pytest.raises(ValueError, match="cannot export 'subgraph_1'"):
        clf.to_onnx(tmp_path / "model")

    def fail(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(KeyboardInterrupt):
        with_network(make_network()).to_onnx(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "labels",
    [
        np.array([1, 2], dtype=np.int8),
        np.array([False, True]),
        np.array(["längst", 3, False, 1.5], dtype=object),
    ],
)
def test_labels_keep_their_type(labels, tmp_path):
    restored = load(router_alone(labels).to_onnx(tmp_path / "model")).classes_
    np.testing.assert_array_equal(restored, labels)
    assert restored.dtype == labels.dtype


def test_parameters_that_are_wrong(fitted, tmp_path, monkeypatch):
    for options, match in (
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"dtype": "int8"}, "needs X"),
        ({"opset": 9}, "opset must be an integer of at least 18"),
    ):
        with pytest.raises(ValueError, match=match):
            fitted.to_onnx(tmp_path / "model", **options)
    with pytest.raises(ValueError, match="cannot hold labels"):
        router_alone(np.array([b"a", b"b"])).to_onnx(tmp_path / "model")
    with pytest.raises(NotFittedError):
        SINFClassifier().to_onnx(tmp_path / "model")
    with pytest.raises(TypeError, match="network must be the network_ of a fitted"):
        to_exported(fitted, fitted.input_shape_)
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as where it is not installed
    with pytest.raises(ImportError, match=r"needs onnxscript: pip install 'sinfkit\[onnx\]'"):
        fitted.to_onnx(tmp_path / "model")


def test_double_precision_becomes_single(tmp_path):
    network = make_network("none", dtype=torch.float64)
    del network.subgraphs["1"], network.subgraphs["2"]
    with_network(network).to_onnx(tmp_path / "model")
    assert network.router.weight.dtype == torch.float64
    x = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = load(tmp_path / "model").predict_proba(x.numpy())
    assert found.dtype == np.float32
    assert_agrees(found, network, x)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    network = train_network(
        small_cnn(10, 16), X[:1000], y[:1000], epochs=6, random_state=0, device="cpu"
    )
    clf = SINFClassifier(
        FrozenModel(network),
        clusterer=SemanticClusterer(n_clusters=2),
        pruner=DCSPruner(criterion="dcs", schedule="linear", pruning_ratios=(0.1, 0.3)),
        route_layer="3",
        device="cpu",
        random_state=0,
    ).fit(X[:1000], y[:1000])
    return clf, X, y


def test_int8_mostly_agrees(digits, tmp_path):
    import onnx
    import onnxruntime

    clf, X, y = digits
    clf.to_onnx(tmp_path / "model", dtype="int8", X=X[:1000])
    loaded = load(tmp_path / "model", n_threads=1)
    answers = loaded.predict(X[1000:])
    assert (answers == clf.predict(X[1000:])).mean() > 0.95
    assert (answers == y[1000:]).mean() > clf.score(X[1000:], y[1000:]) - 0.03
    for path in (tmp_path / "model").glob("*.onnx"):
        graph = onnx.load(path).graph
        weights = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and t.dims]
        assert any(len(t.dims) == 4 for t in weights), path
        scales = [t.dims for t in graph.initializer if t.name.endswith("_scale")]
        assert any(len(dims) == 1 and dims[0] > 1 for dims in scales), path  # per channel
    # The route predictor's own arithmetic is in float.
    graph = onnx.load(tmp_path / "model" / "router.onnx").graph
    matmul = next(node for node in graph.node if node.op_type in ("MatMul", "Gemm"))
    floats = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    assert floats.intersection(matmul.input)
    with torch.inference_mode():
        exact = clf.network_.route(torch.as_tensor(X[1000:1100])).log_posterior.numpy()
    router = onnxruntime.InferenceSession(str(tmp_path / "model" / "router.onnx"))
    (log_posterior,) = router.run(["log_posterior"], {"x": X[1000:1100]})
    assert np.abs(log_posterior - exact).mean() < 0.2


class Residual(nn.Module):
    """Blocks with a shortcut; the cut lies behind an addition."""

    def __init__(self, activation):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
            for _ in range(4)
        )
        self.act, self.head = activation(), nn.Linear(8, 10)

    def forward(self, x):
        x = self.act(self.stem(x))
        for block in self.blocks:
            x = self.act(block(x) + x)
        return self.head(x.mean((2, 3)))


def plain_net(activation):
    layers = []
    for n_in in (1, 8, 8, 8):
        layers += [nn.Conv2d(n_in, 8, 3, padding=1), nn.BatchNorm2d(8), activation()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize(
    ("make", "activation"), [(plain_net, nn.ReLU), (Residual, nn.ReLU), (Residual, nn.SiLU)]
)
def test_a_cut_leaves_no_convolution_in_float(make, activation, tmp_path):
    import onnx
    import onnxruntime

    X = np.random.default_rng(0).random((32, 1, 8, 8), dtype=np.float32)
    torch.manual_seed(0)
    graph = trace(make(activation).eval())
    prefix, tail = split(graph, cut_points(graph)[2])
    router = RoutePredictor(torch.randn(10, 8 * 4), torch.zeros(10), 2)
    one = torch.zeros(10, dtype=torch.long), torch.arange(10), torch.ones(1)
    network = SINFNetwork(
        nn.Identity(), prefix, router, [tail], None, *one,
        router_weight=0.5, threshold=0.0, fallback="none",
    )  # fmt: skip
    shapes = {"classes": np.arange(10), "input_shape": (1, 8, 8)}
    for path in to_onnx(network, tmp_path / "model", dtype="int8", X=X, **shapes).glob("*.onnx"):
        n = sum(node.op_type == "Conv" for node in onnx.load(path).graph.node)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "as_it_runs.onnx")
        options.log_severity_level = 3  # it says that such a file is for this machine alone
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        runs = [node.op_type for node in onnx.load(tmp_path / "as_it_runs.onnx").graph.node]
        assert n > 0 and runs.count("QLinearConv") == n, (path.name, runs)


def test_branches_that_no_calibration_sample_takes(digits, tmp_path):
    clf, X, _ = digits
    one = X[1000:][clf.predict_cluster(X[1000:]) == 0][:1]
    clf = copy.copy(clf)
    clf.network_ = copy.deepcopy(clf.network_)
    clf.network_.fallback = "none"
    del clf.network_.subgraphs["0"]
    clf.to_onnx(tmp_path / "model", dtype="int8", X=one)
    p = load(tmp_path / "model").predict_proba(X[1000:])
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert (p.argmax(1) == clf.predict(X[1000:])).mean() > 0.5


class Odd(nn.Module):
    """A part that ONNX cannot hold, or onnxruntime cannot run."""

    def __init__(self, way):
        super().__init__()
        self.way, self.a, self.b = way, nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 6)
        if way == "types":
            self.head.double()

    def forward(self, x):
        h = self.b(self.a(x).relu()).relu()
        if self.way == "types":
            return self.head(h.mean((2, 3)).double()).float()
        h = torch.special.bessel_j0(h) if self.way == "operation" else h
        return self.head(h.mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["types", "operation"])
def test_what_onnxruntime_cannot_run_is_not_left_behind(way, tmp_path):
    X, y = blobs(per_class=12)
    torch.manual_seed(0)
    sinf = SINFClassifier(Odd(way), max_accuracy_drop=0.5, random_state=0).fit(X, y)
    with pytest.raises(ValueError, match="ONNX"):
        sinf.to_onnx(tmp_path / "out")
    assert not list(tmp_path.iterdir())
