"""The runtime: the plain network's answers, with weights shared, halved, compiled or offloaded."""

from __future__ import annotations

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from helpers import blobs, make_network, randomise_batch_norms, small_cnn
from sklearn.exceptions import NotFittedError
from torch import nn

from sinfkit import DCSPruner, FrozenModel, SemanticClusterer, SINFClassifier
from sinfkit.graph import fold_batch_norm
from sinfkit.inference import (
    Normalise,
    PrepackedConv2d,
    Residency,
    RoutePredictor,
    Runtime,
    SINFNetwork,
    bucket,
    can_prepack,
    signature,
    skeleton,
    weights_of,
)

N_CLASSES, CHANNELS, SIZE = 9, 8, 8


def conv_network(widths=(6, 6, 4), fallback="base", threshold=0.5, seed=0, fold=False, **options):
    """Three clusters of three classes, on images; `widths` are the subgraphs'."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)

        def branch(width, n_out):
            network = nn.Sequential(
                nn.Conv2d(CHANNELS, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(width * SIZE * SIZE // 4, n_out),
            )
            network = randomise_batch_norms(network, width).eval()
            return fold_batch_norm(network) if fold else network

        normalise = Normalise(torch.full((3,), 0.4), torch.full((3,), 0.5))
        prefix = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1), nn.ReLU())
        # A router that sends these images everywhere.
        with torch.no_grad():
            seen = prefix(normalise(images(256))).mean((2, 3))
        weight = torch.randn(N_CLASSES, CHANNELS) / seen.std(0)
        network = SINFNetwork(
            normalise,
            prefix,
            RoutePredictor(weight, -weight @ seen.mean(0), 1),
            [branch(width, 3) for width in widths],
            branch(12, N_CLASSES + 1),
            torch.arange(N_CLASSES) % 3,
            torch.arange(N_CLASSES) + 1,
            torch.tensor([0.8, 1.0, 1.3]),
            router_weight=0.5,
            threshold=threshold,
            fallback=fallback,
            top_k=2,
            **options,
        )
    network = network.eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)


def images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    colour = torch.rand(n, 3, 1, 1, generator=generator)
    return colour + 0.5 * torch.rand(n, 3, 2 * SIZE, 2 * SIZE, generator=generator)


def all_branches_run(network, x):
    branch = network.branches(network.route(x))[1]
    return len(branch.unique()) == network.n_clusters + (network.fallback == "base")


@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize("fallback", ["base", "topk", "none"])
@pytest.mark.parametrize("offload", [0, 1, 2])
def test_answers_are_the_networks(n, fallback, offload):
    network = conv_network(fallback=fallback)
    runtime = Runtime(network, offload=offload)
    assert all_branches_run(network, images(64))
    torch.testing.assert_close(runtime(images(n)), network(images(n)), atol=1e-5, rtol=0)
    torch.testing.assert_close(runtime.route(images(n)).cluster, network.route(images(n)).cluster)
    assert runtime(images(0)).shape == (0, N_CLASSES)


@pytest.mark.skipif(not can_prepack(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("n", [1, 3, 64])
def test_prepacked_answers_are_the_networks(n):
    network = conv_network(fold=True)
    runtime = Runtime(network)
    assert any(isinstance(m, PrepackedConv2d) for m in runtime.subgraph(0).modules())
    assert all_branches_run(network, images(64))
    for seed in range(4):  # groups of other sizes
        x = images(n, seed)
        torch.testing.assert_close(runtime(x), network(x), atol=1e-5, rtol=0)
    plain = Runtime(network, prepack=False)
    assert not any(isinstance(m, PrepackedConv2d) for m in plain.modules())
    # 17 rows are run as 18, which is all that there are, but not the same ones.
    h = network.features(images(18))[0]
    index = torch.arange(1, 18)
    torch.testing.assert_close(
        runtime.run_branch(1, h, index), network.run_branch(1, h, index), atol=1e-5, rtol=0
    )


def test_settings_and_early_exit_are_taken_over():
    answered = torch.ones(4, 7, dtype=torch.bool)
    network = make_network("topk", threshold=0.6, answered=answered, exit_threshold=0.5)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Runtime(network)(x), network(x), atol=1e-6, rtol=0)


def test_float32_stores_nothing_twice():
    network = conv_network()
    runtime = Runtime(network, offload=2)
    own = {t.data_ptr() for t in weights_of(network).values()}
    held = list(weights_of(runtime).values())
    for c in range(3):
        held += runtime.residency.fetch(c).values()
    assert {t.data_ptr() for t in held} == own
    runtime = Runtime(network)
    assert set(weights_of(runtime)) == set(weights_of(network))
    assert {t.data_ptr() for t in weights_of(runtime).values()} == own


def test_bfloat16_halves_the_weights_and_keeps_clear_routes():
    network = conv_network(fold=True)
    before = copy.deepcopy(network.state_dict())
    runtime = Runtime(network, dtype="bfloat16")
    x = images(256)
    expected, p = network.route(x), runtime.route(x)
    margin = expected.posterior.topk(2, 1).values
    clear = margin[:, 0] - margin[:, 1] > 0.05
    assert clear.float().mean() > 0.8
    assert p.posterior.dtype == torch.float32
    assert (p.posterior - expected.posterior).abs().max() > 1e-5  # it is bfloat16 that runs
    assert (p.cluster == expected.cluster)[clear].all()
    sure = (expected.confidence - network.threshold).abs() > 0.05
    out, wanted = runtime(x)[clear & sure], network(x)[clear & sure]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.sum(1), torch.ones(len(out)))
    torch.testing.assert_close(out, wanted, atol=0.05, rtol=0)
    layers = [runtime.prefix, runtime.subgraphs, runtime.rest]
    assert all(t.dtype == torch.bfloat16 for m in layers for t in m.parameters())
    assert runtime.router is network.router
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_subgraphs_on_the_device_are_those_that_ran_last():
    network = conv_network(fallback="none")
    runtime = Runtime(network, offload=2)
    residency = runtime.residency
    h, _ = network.features(images(4))
    rows = torch.arange(4)
    for cluster, held, loads in ((0, [0], 1), (1, [0, 1], 2), (0, [1, 0], 2), (2, [0, 2], 3)):
        out = runtime.run_branch(cluster, h, rows)
        torch.testing.assert_close(out, network.run_branch(cluster, h, rows))
        assert residency.on_device == held and residency.n_loads == loads
    assert not list(runtime.subgraphs.parameters())


def test_weights_go_to_the_device_and_stay_on_the_host():
    network = conv_network()
    host = {c: weights_of(network.subgraph(c)) for c in range(3)}
    before = {name: tensor.clone() for name, tensor in host[0].items()}
    residency = Residency(host, torch.device("meta"), 1)
    assert all(tensor.is_meta for tensor in residency.fetch(0).values())
    residency.fetch(1)
    assert residency.on_device == [1]
    assert set(residency.fetch(0)) == set(before) and residency.n_loads == 3
    for name, tensor in weights_of(network.subgraph(0)).items():
        assert torch.equal(tensor, before[name])


def test_runtime_of_a_fitted_classifier():
    X, y = blobs(per_class=40)
    clf = SINFClassifier(
        FrozenModel(small_cnn(), mean=(0.1,), std=(0.9,)),
        clusterer=SemanticClusterer(method="given", mapping={i: i % 2 for i in range(6)}),
        pruner=DCSPruner(),
        route_layer="3",
        random_state=0,
        device="cpu",
    )
    with pytest.raises(NotFittedError):
        clf.runtime()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its weights are random
        clf.fit(X, y)
    expected = clf.predict_proba(X)
    for n in (1, 3, 64):
        out = clf.runtime(device="cpu")(torch.as_tensor(X[:n]))
        np.testing.assert_allclose(out.numpy(), expected[:n], atol=1e-5)
    half = clf.runtime(dtype="bfloat16", offload=1)(torch.as_tensor(X))
    assert np.median(np.abs(half.numpy() - expected).max(1)) < 0.01


def test_bad_parameters_and_moves():
    network = conv_network()
    with pytest.raises(ValueError, match="dtype must be one of"):
        Runtime(network, dtype="float16")
    for offload in (-1, 1.5):
        with pytest.raises(ValueError, match="offload must be"):
            Runtime(network, offload=offload)
    with pytest.raises(RuntimeError, match="Make a new one"):
        Runtime(network).to("cpu")
    with pytest.raises(ValueError, match="warm_up needs"):
        Runtime(network).warm_up(images(0), 8)
    with pytest.raises(ValueError, match="example must be a dense batch"):
        Runtime(network).warm_up(images(2).to_sparse(), 8)
    # torch's convolution takes one image without an axis of samples; oneDNN's gives an error that
    # looks as if memory were short.
    for prepack in (False, True):
        runtime = Runtime(network, prepack=prepack)
        with pytest.raises(ValueError, match="x has samples of shape|one axis of samples"):
            runtime(images(1)[0])
        with pytest.raises(ValueError, match="example: "):
            runtime.warm_up(images(1)[0], 3)


def test_a_missing_compiler_is_named():
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler"):
            Runtime(conv_network(), compile=True)


def test_signatures_tell_widths_and_settings_apart():
    network = conv_network(widths=(6, 6, 4), fold=True)
    a, b, c = (network.subgraph(i) for i in range(3))
    assert not torch.equal(next(a.parameters()), next(b.parameters()))
    assert signature(a) == signature(b) != signature(c)
    assert signature(nn.MaxPool2d(2)) != signature(nn.MaxPool2d(3))
    empty = skeleton(a)
    assert all(t.is_meta for t in weights_of(empty).values())
    h = network.features(images(2))[0]
    torch.testing.assert_close(torch.func.functional_call(empty, weights_of(b), (h,)), b(h))


def compilations():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_once_for_all_batches():
    network = conv_network(widths=(6, 6, 6), fallback="none", fold=True)
    runtime = Runtime(network, compile=True)
    before = compilations()
    runtime.warm_up(images(1), 8)
    # Two sizes (1 and 8), one graph for the front and one for all subgraphs.
    assert runtime.n_compiled == compilations() - before == 2 * 2
    rng = np.random.default_rng(0)
    compositions = set()
    for seed in range(30):
        x = images(int(rng.integers(1, 9)), seed)
        compositions.add(tuple(torch.bincount(network.route(x).cluster, minlength=3).tolist()))
        expected = network(x)
        torch.testing.assert_close(runtime(x), expected, atol=1e-5, rtol=0)
        with torch.inference_mode():
            torch.testing.assert_close(runtime(x.clone()), expected, atol=1e-5, rtol=0)
    assert len(compositions) > 15
    assert compilations() - before == runtime.n_compiled == 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_with_all_options(dtype):
    network = conv_network(widths=(6, 6, 4), fallback="base")
    runtime = Runtime(network, compile=True, dtype=dtype, offload=2)
    before = compilations()
    runtime.warm_up(images(2), 64)
    # Five sizes; front, two widths of subgraphs, rest.
    assert runtime.n_compiled == compilations() - before == 5 * 4
    eager = Runtime(network, dtype=dtype)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    for n, seed in itertools.product((1, 3, 64), range(3)):
        x = images(n, seed)
        route, other = eager.route(x), runtime.route(x)
        top = route.posterior.topk(2, 1).values
        margin = (top[:, 0] - top[:, 1]).minimum((route.confidence - network.threshold).abs())
        clear = margin > (1e-4 if dtype == "float32" else 0.05)
        assert (route.cluster == other.cluster)[clear].all()
        torch.testing.assert_close(runtime(x)[clear], eager(x)[clear], atol=tolerance, rtol=0)
    assert compilations() - before == runtime.n_compiled == 5 * 4
    assert runtime.residency.n_loads > 3


def test_buckets():
    assert [bucket(n) for n in (0, 1, 2, 8, 9, 33, 64)] == [0, 1, 8, 8, 16, 64, 64]
