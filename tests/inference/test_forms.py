"""Forms of a network: the plain one's answers, whatever the batch, and made anew after changes."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from helpers import blobs, randomise_batch_norms, small_cnn
from sklearn.exceptions import NotFittedError
from torch import nn

from sinfkit import DCSPruner, FrozenModel, SemanticClusterer, SINFClassifier
from sinfkit.graph import fold_batch_norm
from sinfkit.inference import (
    HalfNetwork,
    Normalise,
    PackedNetwork,
    PrepackedConv2d,
    RoutePredictor,
    SINFNetwork,
    can_prepack,
    fast_form,
    half_precision,
)

N_CLASSES, CHANNELS, SIZE = 9, 8, 8
needs_onednn = pytest.mark.skipif(not can_prepack(torch.float32), reason="PyTorch without oneDNN")


def conv_network(widths=(6, 6, 4), fallback="base", threshold=0.5, seed=0, fold=True, **options):
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
            **options,
        )
    network = network.eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)


def images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    colour = torch.rand(n, 3, 1, 1, generator=generator)
    return colour + 0.5 * torch.rand(n, 3, 2 * SIZE, 2 * SIZE, generator=generator)


def packed(network):
    form = fast_form(network, lambda: images(8))
    assert isinstance(form, PackedNetwork)
    assert any(isinstance(m, PrepackedConv2d) for m in form.subgraphs.modules())
    return form


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@needs_onednn
@pytest.mark.parametrize("fallback", ["base", "top2", "none"])
def test_answers_are_the_plain_networks_whatever_the_batch(fallback):
    network = conv_network(fallback=fallback)
    form, x = packed(network), images(64)
    branch = network.branches(network.route(x))[1]
    assert len(branch.unique()) == network.n_clusters + (fallback == "base")
    expected = network(x)
    for n in (0, 1, 3, 17, 64):
        close(form(x[:n]), expected[:n])
    close(form(x.flip(0)).flip(0), expected)
    assert (form(x).argmax(1) == expected.argmax(1)).all()
    # 17 rows are run as 18, which is all that there are, but not the same ones.
    h, index = network.features(images(18))[0], torch.arange(1, 18)
    close(form.run_branch(1, h, index), network.run_branch(1, h, index))
    own = {t.data_ptr() for t in network.state_dict().values()}
    assert {t.data_ptr() for t in form.state_dict().values()} == own  # nothing is stored twice


def new_values(network):
    network.subgraph(1).get_submodule("0").weight.mul_(1.5)


def new_storage(network):
    layer = network.subgraph(1).get_submodule("0")
    layer.weight.data = layer.weight.data * 1.5


def new_layer(network):
    network.subgraph(1).set_submodule("5", nn.Linear(96, 3))


def new_threshold(network):
    network.threshold = 0.9


@needs_onednn
@pytest.mark.parametrize("change", [new_values, new_storage, new_layer, new_threshold])
@torch.no_grad()
def test_a_changed_network_gets_a_new_form(change):
    network, x = conv_network(), images(32)
    assert packed(network) is packed(network)
    before = network(x)
    change(network)
    assert (network(x) - before).abs().max() > 1e-3
    close(packed(network)(x), network(x))


@needs_onednn
def test_where_a_form_would_not_be_the_same_there_is_none():
    network, x = conv_network(), images(8)
    called = []
    hook = network.subgraph(0).register_forward_hook(lambda *_: called.append(1))
    assert fast_form(network, lambda: x) is network
    hook.remove()
    packed(network)
    assert fast_form(network.train(), lambda: x) is network
    # The batch's own statistics would change with the rows that fill it up.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_batch = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()
        ).eval()
    assert fast_form(by_batch, lambda: x) is by_batch
    only_linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    assert fast_form(only_linear, lambda: torch.zeros(2, 3, 2, 2)) is only_linear


class OneLayout(nn.Module):
    """A view that a batch with its channels last does not allow."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).view(len(x), 4, -1).mean(2)


@needs_onednn
def test_a_plain_network_gets_one_as_well():
    network = randomise_batch_norms(small_cnn()).eval()
    x = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    form = fast_form(network, lambda: x)
    assert any(isinstance(m, PrepackedConv2d) for m in form.modules())
    torch.testing.assert_close(form(x), network(x), atol=1e-4, rtol=1e-4)
    odd, images_ = OneLayout().eval(), images(4)
    torch.testing.assert_close(fast_form(odd, lambda: images_)(images_), odd(images_))


@needs_onednn
def test_a_form_goes_with_its_network_and_is_never_stored():
    network = conv_network()
    form = weakref.ref(packed(network))
    size = len(pickle.dumps(network))
    assert size == len(pickle.dumps(conv_network()))
    del network
    gc.collect()
    assert form() is None


@needs_onednn
def test_many_threads_ask_at_once():
    network, x = conv_network(), images(16)
    expected, answers = network(x), []

    def ask():
        with torch.inference_mode():
            answers.append(packed(network)(x))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    for answer in answers:
        close(answer, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_clear_routes(dtype):
    network = conv_network()
    before = copy.deepcopy(network.state_dict())
    half, x = half_precision(network, dtype), images(256)
    assert isinstance(half, HalfNetwork)
    expected, found = network.route(x), half.route(x)
    margin = expected.posterior.topk(2, 1).values
    clear = margin[:, 0] - margin[:, 1] > 0.05
    assert clear.float().mean() > 0.8
    assert found.posterior.dtype == torch.float32
    assert (found.posterior - expected.posterior).abs().max() > 1e-6  # it is half that runs
    assert (found.cluster == expected.cluster)[clear].all()
    sure = (expected.confidence - network.threshold).abs() > 0.05
    out, wanted = half(x)[clear & sure], network(x)[clear & sure]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.sum(1), torch.ones(len(out)))
    torch.testing.assert_close(out, wanted, atol=0.05, rtol=0)
    to = getattr(torch, dtype)
    for part in (half.prefix, half.subgraphs, half.rest):
        assert all(t.dtype == to for t in part.parameters())
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    with pytest.raises(ValueError, match="dtype must be one of"):
        half_precision(network, "float32")


def test_fitted_estimators_answer_as_their_networks():
    X, y = blobs(per_class=20)
    frozen = FrozenModel(small_cnn(), mean=(0.1,), std=(0.9,))
    sinf = SINFClassifier(
        frozen,
        clusterer=SemanticClusterer(method="given", mapping={i: i % 2 for i in range(6)}),
        pruner=DCSPruner(),
        route_layer="3",
        random_state=0,
        device="cpu",
    )
    with pytest.raises(NotFittedError):
        sinf.runtime()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its weights are random
        sinf.fit(X, y)
        pruner = DCSPruner(frozen, random_state=0, device="cpu").fit(X, y)
    x = torch.as_tensor(X)
    with torch.inference_mode():
        expected = sinf.network_(x).numpy()
        logits = pruner.model_((x - 0.1) / 0.9)
    np.testing.assert_allclose(sinf.predict_proba(X), expected, atol=1e-5)
    np.testing.assert_array_equal(sinf.predict(X), sinf.classes_[expected.argmax(1)])
    half = sinf.runtime()(x).numpy()
    assert np.median(np.abs(half - expected).max(1)) < 0.05
    np.testing.assert_allclose(pruner.predict_proba(X), torch.softmax(logits, 1), atol=1e-5)
    # A network that was trained further answers with its new weights.
    with torch.no_grad():
        list(pruner.model_.parameters())[0].mul_(-1)
        changed = torch.softmax(pruner.model_((x - 0.1) / 0.9), 1)
    np.testing.assert_allclose(pruner.predict_proba(X), changed, atol=1e-5)
    again = pickle.loads(pickle.dumps(sinf))
    np.testing.assert_allclose(again.predict_proba(X), expected, atol=1e-5)
