"""Networks and inputs that people bring: right, or refused with a word on what is wrong."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from fuzz_blocks import FAULTS
from fuzz_networks import run
from helpers import blobs, small_cnn
from torch import nn
from torch.nn.utils import parametrizations, prune

import sinfkit
from sinfkit import (
    DCSPruner,
    FrozenModel,
    PruningOptions,
    SINFClassifier,
    SlicingWarning,
)
from sinfkit.errors import UnsliceableError
from sinfkit.graph import count_macs, count_parameters


def test_generated_networks_are_answered_right_or_refused():
    bugs: list[str] = []
    outcomes = run(25, seed=220, report=bugs.append)
    assert not bugs
    # Refusing everything would be no wrong answer either.
    assert outcomes["right"] > 12 and outcomes["refused"] > 2


def test_faults_that_are_generated_are_of_every_kind():
    kinds = {fault.name.split()[0] for fault in FAULTS}
    assert kinds >= {"view", "draw", "batch", "branch", "hook", "statistics", "forward"}


@pytest.fixture(scope="module")
def data():
    return blobs(n_classes=4, per_class=8)


def whole(model, X, y, **more):
    """A pruner that removes nothing."""
    return DCSPruner(
        model,
        criterion="l1",
        schedule="uniform",
        pruning_ratios=(0.0, 0.0),
        repair="none",
        options=PruningOptions(validation_fraction=0, allow_unsliceable=True),
        device="cpu",
        random_state=0,
        **more,
    ).fit(X, y)


class WritesIntoView(nn.Module):
    """Both the whole and a part of it write in place; the part can be one node, the whole not."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            self.relu(x[:, :2])
            return x

    def __init__(self):
        super().__init__()
        self.net = small_cnn(4, 4)
        self.part = self.Part()

    def forward(self, x):
        z = self.part(self.net(x))
        z.data.mul_(-1.0)
        z[:, ::2].mul_(-1.0)
        return z


@pytest.mark.filterwarnings("ignore")
def test_tracing_ends_where_the_whole_model_writes_into_views(data):
    with pytest.raises(ValueError, match="could not be followed"):
        whole(WritesIntoView(), *data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_predict_in_single_precision(dtype, data, tmp_path):
    network = small_cnn(4, 4).to(dtype)
    pruner = whole(network, *data)
    p = pruner.predict_proba(data[0])
    assert p.dtype == np.float32
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
    with torch.inference_mode():
        wanted = network(torch.as_tensor(data[0]).to(dtype)).float().softmax(1)
    np.testing.assert_allclose(p, wanted, atol=3e-2)
    sinfkit.save(pruner, tmp_path / "p.sinf")
    again = sinfkit.load(tmp_path / "p.sinf", factory=lambda: small_cnn(4, 4).to(dtype))
    np.testing.assert_array_equal(again.predict_proba(data[0]), p)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm"])
def test_computed_weights_become_plain_ones(how, data, tmp_path):
    X, y = data
    network = small_cnn(4, 4)
    getattr(parametrizations, how)(network[0])
    network.eval()
    names = list(network.state_dict())
    pruner = whole(network, X, y)
    with torch.inference_mode():
        wanted = network(torch.as_tensor(X)).softmax(1)
    np.testing.assert_allclose(pruner.predict_proba(X), wanted, atol=1e-5)
    assert list(network.state_dict()) == names
    sinfkit.save(pruner, tmp_path / "p.sinf")
    again = sinfkit.load(tmp_path / "p.sinf", factory=lambda: copy.deepcopy(network))
    np.testing.assert_array_equal(again.predict_proba(X), pruner.predict_proba(X))
    frozen = FrozenModel(network)
    assert pickle.loads(pickle.dumps(frozen)).digest == frozen.digest


def centred(network, X):
    """A network none of whose outputs is always the largest."""
    with torch.no_grad():
        z = network(torch.as_tensor(X))
        network[-1].weight.div_(z.std(0)[:, None])
        network[-1].bias.sub_(z.median(0).values).div_(z.std(0)).add_(0.01)
    return network


class Squeezed(nn.Module):
    """As people end networks: a squeeze or a view that changes nothing."""

    def __init__(self, network, end):
        super().__init__()
        self.network, self.end = network, end

    def forward(self, x):
        z = self.network(x)
        if self.end == "squeeze":
            return z.squeeze(-1)
        if self.end == "dict":
            return {"logits": z}
        if self.end == "softmax":
            return z.softmax(1).view(z.size(0), -1)
        return z.view(z.size(0), -1).float()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("end", ["squeeze", "softmax", "dict"])
def test_a_view_at_the_end_keeps_no_outputs_in_place(end, data, tmp_path):
    X, _ = data
    network = centred(small_cnn(4, 4), X)
    with torch.inference_mode():
        wanted = network(torch.as_tensor(X)).softmax(1).numpy()
    names = np.array(["d", "b", "c", "a"])
    pruner = whole(
        Squeezed(network, end), X, names[wanted.argmax(1)], model_classes=names, classes=["a", "d"]
    )
    own = wanted[:, [3, 0]] / wanted[:, [3, 0]].sum(1, keepdims=True)
    # Weights that were divided by small deviations multiply the rounding of sums.
    np.testing.assert_allclose(pruner.predict_proba(X), own, atol=1e-4)
    sinfkit.save(pruner, tmp_path / "p.sinf")
    again = sinfkit.load(tmp_path / "p.sinf", factory=lambda: Squeezed(small_cnn(4, 4), end))
    np.testing.assert_allclose(again.predict_proba(X), own, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_one_logit_that_is_squeezed(data, tmp_path):
    X, _ = data
    network = centred(small_cnn(1, 4), X)
    with torch.inference_mode():
        y = np.where((network(torch.as_tensor(X))[:, 0] > 0).numpy(), "a", "b")
    pruner = whole(Squeezed(network, "squeeze"), X, y, model_classes=["b", "a"])
    assert (pruner.predict(X) == y).all()
    sinfkit.save(pruner, tmp_path / "p.sinf")
    again = sinfkit.load(tmp_path / "p.sinf", factory=lambda: Squeezed(small_cnn(1, 4), "squeeze"))
    assert (again.predict(X) == y).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_networks_can_be_saved(wrap, data, tmp_path):
    pruner = whole(wrap(small_cnn(4, 4)), *data)
    sinfkit.save(pruner, tmp_path / "p.sinf")
    again = sinfkit.load(tmp_path / "p.sinf", factory=lambda: wrap(small_cnn(4, 4)))
    np.testing.assert_array_equal(again.predict_proba(data[0]), pruner.predict_proba(data[0]))


class Rolled(nn.Module):
    """The first channel goes a way of its own, and keeps something."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.one(x)
        x = self.two(torch.cat([x[:, 1:], x[:, :1]], 1))
        return self.fc(x.relu().mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("budget", [0.4, 0.7])
def test_a_part_that_keeps_a_channel_exceeds_no_budget(budget, data):
    X, y = data
    torch.manual_seed(0)
    network = Rolled()
    with torch.no_grad():
        network.one.weight[0] = 0  # the first to go, were it for its weights
    options = PruningOptions(validation_fraction=0)
    pruner = DCSPruner(
        network, criterion="l1", budget=budget, repair="none", options=options, device="cpu"
    ).fit(X, y)
    x = torch.as_tensor(X[:1])
    left = count_macs(pruner.model_, x)[0] / count_macs(network, x)[0]
    assert pruner.cost_ratio_ == pytest.approx(left) and left <= budget
    assert 0 in pruner.support_["one"]


class Ghost(nn.Module):
    """Some channels reach a layer once, others twice or more, as in GhostNet."""

    def __init__(self, n):
        super().__init__()
        self.one, self.own = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.two, self.fc, self.n = nn.Conv2d(n, 6, 3, padding=1), nn.Linear(6, 4), n

    def forward(self, x):
        x = self.one(x).relu()
        x = torch.cat([x, self.own(x), x], 1)[:, : self.n]
        return self.fc(self.two(x).relu().mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [7, 11, 12, 16])
@pytest.mark.parametrize("criterion", ["l1", "dcs_obs"])
def test_channels_may_reach_a_layer_as_often_as_they_like(n, criterion, data):
    X, y = data
    torch.manual_seed(0)
    network = Ghost(n).eval()
    with torch.inference_mode():
        wanted = network(torch.as_tensor(X)).softmax(1)
    np.testing.assert_allclose(whole(network, X, y).predict_proba(X), wanted, atol=1e-5)
    for unit, count in (("macs", macs), ("params", count_parameters)):
        options = PruningOptions(budget_unit=unit, validation_fraction=0)
        pruner = DCSPruner(
            network, criterion=criterion, budget=0.6, options=options, device="cpu", random_state=0
        ).fit(X, y)
        assert count(pruner.model_) / count(network) <= 0.6 + 1e-9
        if unit == "macs":
            assert pruner.cost_ratio_ == pytest.approx(macs(pruner.model_) / macs(network))


def macs(network):
    return count_macs(network, torch.zeros(1, 1, 8, 8))[0]


@pytest.mark.filterwarnings("ignore")
def test_masks_of_torchs_pruning_are_no_state_but_changed_buffers_are(data):
    X, y = data
    network = small_cnn(4, 4)
    prune.random_unstructured(network[3], "weight", 0.4)
    with torch.inference_mode():
        wanted = network(torch.as_tensor(X)).softmax(1)
    np.testing.assert_allclose(whole(network, X, y).predict_proba(X), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="random|state"):
        whole(Remembers(small_cnn(4, 4)), X, y)


class Remembers(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += x.abs().mean()
        return self.network(x) * self.seen


def test_fit_and_load_leave_torchs_generator_alone(data, tmp_path):
    X, y = data
    network = small_cnn(4, 4)
    state = torch.random.get_rng_state()
    pruner = DCSPruner(network, budget=0.6, device="cpu", random_state=0)
    with pytest.warns(UserWarning):
        pruner.fit(X, y)
    sinfkit.save(pruner, tmp_path / "p.sinf")
    sinfkit.load(tmp_path / "p.sinf", factory=lambda: small_cnn(4, 4)).predict(X)
    assert torch.equal(torch.random.get_rng_state(), state)


class OddlyShaped(nn.Module):
    """Parameters that no layout of images suits."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.head = (
            nn.Conv2d(1, 6, 3, padding=1),
            nn.Conv2d(6, 6, 1),
            nn.Linear(6, 4),
        )
        shape = {"complex": (6, 8, 5, 2), "volume": (6, 1, 1, 3, 3), "table": (6, 6, 1, 1)}[kind]
        self.kind, self.weight = kind, nn.Parameter(torch.randn(shape) / 3)
        self.c = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        h = self.b(self.a(x).relu()).relu()
        if self.kind == "complex":
            f = torch.fft.rfft2(h) * torch.view_as_complex(self.weight)
            h = h + torch.fft.irfft2(f, s=h.shape[-2:])
            h = self.c(h).relu()
        elif self.kind == "volume":
            h = (
                h
                + nn.functional.conv3d(h[:, :, None], self.weight, padding=(0, 1, 1), groups=6)[
                    :, :, 0
                ]
            )
        else:
            h = h + torch.einsum("nchw,cd->ndhw", h, self.weight.view(6, 6))
        return self.head((h if self.kind == "complex" else self.c(h)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["complex", "volume", "table"])
def test_parameters_keep_their_order_in_memory(kind, data, tmp_path):
    X, y = data
    torch.manual_seed(0)
    network = OddlyShaped(kind).eval()
    pruner = DCSPruner(budget=0.9)
    sinf = SINFClassifier(network, pruner=pruner, fallback="base", random_state=0).fit(X, y)
    expected = sinf.predict_proba(X)
    sinf.report(X, y, repeats=1)
    sinfkit.save(sinf, tmp_path / "a.sinf")
    again = sinfkit.load(tmp_path / "a.sinf", factory=lambda: OddlyShaped(kind))
    np.testing.assert_allclose(again.predict_proba(X), expected, atol=1e-5)
    np.testing.assert_allclose(
        pickle.loads(pickle.dumps(sinf)).predict_proba(X), expected, atol=1e-5
    )


def test_a_search_speaks_of_no_budget_that_nobody_asked_for(data):
    class Closed(OddlyShaped):
        def forward(self, x):
            h = torch.fft.rfft2(self.b(torch.fft.rfft2(self.a(x)).abs())).abs()
            return self.head(h.mean((2, 3)))

    with pytest.warns(SlicingWarning), pytest.raises(UnsliceableError, match="stay whole.*cut"):
        SINFClassifier(Closed("table"), random_state=0).fit(*data)


class OfWords(nn.Module):
    """Convolutions over embedded words."""

    def __init__(self, cast):
        super().__init__()
        self.words, self.conv, self.head = nn.Embedding(9, 8), nn.Conv1d(8, 6, 3), nn.Linear(6, 3)
        self.cast = cast

    def forward(self, x):
        x = x.long() if self.cast else x
        return self.head(self.conv(self.words(x).transpose(1, 2)).relu().amax(2))


def words(n=60):
    rng = np.random.default_rng(0)
    y = np.arange(n) % 3
    return np.where(rng.random((n, 7)) < 0.5, y[:, None], rng.integers(3, 9, (n, 7))), y


@pytest.mark.filterwarnings("ignore")
def test_numbers_of_words_stay_numbers_of_words():
    X, y = words()
    torch.manual_seed(0)
    network = taught(OfWords(True), X, y)
    pruner = DCSPruner(network, budget=0.6, device="cpu", random_state=0).fit(X, y)
    assert pruner.cost_ratio_ <= 0.6
    np.testing.assert_allclose(
        whole(network, X, y).predict_proba(X), network(torch.as_tensor(X)).softmax(1), atol=1e-5
    )


def test_a_network_of_integers_is_told_how_to_take_samples():
    with pytest.raises(ValueError, match=r"takes integers.*x = x.long\(\)"):
        DCSPruner(OfWords(False), budget=0.5, device="cpu").fit(*words())


def taught(network, X, y):
    """A network whose last layer is fitted to the labels."""
    found = {}
    network.head.register_forward_pre_hook(lambda module, args: found.update(x=args[0]))
    with torch.no_grad():
        network(torch.as_tensor(X))
        target = 4 * torch.eye(3)[torch.as_tensor(y)]
        h = torch.cat([found["x"], torch.ones(len(X), 1)], 1)
        solved = torch.linalg.lstsq(h, target).solution
        network.head.weight.copy_(solved[:-1].T)
        network.head.bias.copy_(solved[-1])
    network.head._forward_pre_hooks.clear()
    return network.eval().requires_grad_(False)
