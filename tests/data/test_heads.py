"""Networks that end in a softmax or a sigmoid, in one logit, or in whatever people write."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sinfkit
from sinfkit import DCSPruner, FrozenModel

K = 4


class Network(nn.Module):
    """Two convolutions, and a head that is given as a function of the logits."""

    def __init__(self, head, n_outputs=K, seed=0, pointwise=False):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
            )
            last = nn.Conv2d(6, n_outputs, 1) if pointwise else nn.Linear(6, n_outputs)
            self.last = last if pointwise else nn.Sequential(nn.Flatten(), last)
        self.softmax, self.log_softmax, self.sigmoid = (
            nn.Softmax(1),
            nn.LogSoftmax(-1),
            nn.Sigmoid(),
        )
        self.head, self.pointwise = head, pointwise
        with torch.no_grad():
            last.weight.mul_(20)

    def logits(self, x):
        return self.last(self.body(x)).flatten(1)

    def forward(self, x):
        h = self.last(self.body(x))
        return HEADS[self.head](self, h) if self.pointwise else HEADS[self.head](self, h.flatten(1))


HEADS = {
    "none": lambda net, z: z.flatten(1),
    "softmax module": lambda net, z: net.softmax(z).flatten(1),
    "softmax method": lambda net, z: z.softmax(dim=1).flatten(1),
    "softmax function": lambda net, z: F.softmax(z.flatten(1), dim=-1),
    "torch.softmax": lambda net, z: torch.softmax(z.flatten(1), 1),
    "log-softmax module": lambda net, z: net.log_softmax(z.flatten(1)),
    "log-softmax function": lambda net, z: F.log_softmax(z, 1).flatten(1),
    "log of softmax": lambda net, z: torch.log(torch.softmax(z, 1)).flatten(1),
    "sigmoid": lambda net, z: torch.sigmoid(z).flatten(1),
    "sigmoid module": lambda net, z: net.sigmoid(z.flatten(1)),
    "of a temperature": lambda net, z: torch.softmax(z.flatten(1) / 2.5, 1),
}
OWN = {  # by hand, which no graph tells from something else
    "softmax by hand": lambda net, z: z.flatten(1).exp() / z.flatten(1).exp().sum(1, keepdim=True),
    "mean of two": lambda net, z: (z.flatten(1).softmax(1) + (2 * z.flatten(1)).softmax(1)) / 2,
}
HEADS |= OWN


def images(seed, n=24):
    return np.random.default_rng(seed).normal(size=(n, 1, 6, 6)).astype(np.float32)


def fitted(network, X, y=None, **parameters):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        # All filters stay, so that the answers are the network's own.
        return DCSPruner(
            network, criterion="l1", budget=1.0, repair="none", device="cpu", **parameters
        ).fit(X, y)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    head=st.sampled_from(sorted(HEADS.keys() - OWN)),
    pointwise=st.booleans(),
    seed=st.integers(0, 50),
)
def test_probabilities_are_not_softmaxed_twice(head, pointwise, seed):
    network, X = Network(head, seed=seed, pointwise=pointwise).eval(), images(seed)
    z = network.logits(torch.from_numpy(X)).detach()
    expected = torch.softmax(z / 2.5 if head == "of a temperature" else z, 1).numpy()
    pruner = fitted(network, X)
    np.testing.assert_allclose(pruner.predict_proba(X), expected, atol=1e-4)
    again = pickle.loads(pickle.dumps(pruner))
    np.testing.assert_allclose(again.predict_proba(X), expected, atol=1e-4)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(head=st.sampled_from(sorted(HEADS.keys() - OWN)), seed=st.integers(0, 50))
def test_some_of_the_classes_can_be_kept(head, seed):
    network, X = Network(head, seed=seed).eval(), images(seed)
    z = network.logits(torch.from_numpy(X)).detach() / (2.5 if head == "of a temperature" else 1)
    y = z[:, [0, 2]].argmax(1).numpy() * 2
    y[:2] = 0, 2  # both occur
    pruner = fitted(network, X, y, classes=[0, 2])
    expected = torch.softmax(z[:, [0, 2]], 1).numpy()
    np.testing.assert_allclose(pruner.predict_proba(X), expected, atol=1e-4)


@pytest.mark.parametrize("head", sorted(OWN))
def test_probabilities_made_by_hand_are_taken_as_they_are(head, tmp_path):
    network, X = Network(head).eval(), images(0)
    expected = network(torch.from_numpy(X)).detach().numpy()
    pruner = fitted(network, X)
    np.testing.assert_allclose(pruner.predict_proba(X), expected, atol=1e-5)
    sinfkit.save(pruner, tmp_path / "p.sinf")
    again = sinfkit.load(tmp_path / "p.sinf", factory=lambda: Network(head, seed=1))
    np.testing.assert_allclose(again.predict_proba(X), expected, atol=1e-5)
    y = expected[:, [1, 3]].argmax(1) * 2 + 1
    y[:2] = 1, 3  # both occur
    some = fitted(network, X, y, classes=[1, 3])
    kept = expected[:, [1, 3]] / expected[:, [1, 3]].sum(1, keepdims=True)
    np.testing.assert_allclose(some.predict_proba(X), kept, atol=1e-4)


class Attention(Network):
    def forward(self, x):
        z = self.last(self.body(x)).flatten(1)
        return z + torch.softmax(z, 1)


def test_a_softmax_over_something_else_stays():
    network, X = Attention("none").eval(), images(1)
    expected = torch.softmax(network(torch.from_numpy(X)).detach(), 1).numpy()
    np.testing.assert_allclose(fitted(network, X).predict_proba(X), expected, atol=1e-5)


SQUEEZES = {
    "column": lambda net, z: z.flatten(1),
    "squeeze": lambda net, z: z.flatten(1).squeeze(1),
    "sigmoid": lambda net, z: torch.sigmoid(z.flatten(1)),
    "sigmoid, squeezed": lambda net, z: net.sigmoid(z.flatten(1)).squeeze(-1),
}
HEADS |= SQUEEZES


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    head=st.sampled_from(sorted(SQUEEZES)),
    pointwise=st.booleans(),
    labels=st.sampled_from([[0, 1], ["no", "yes"], None]),
    seed=st.integers(0, 20),
)
def test_one_logit_is_that_of_the_second_class(head, pointwise, labels, seed):
    network, X = Network(head, 1, seed, pointwise).eval(), images(seed)
    z = network.logits(torch.from_numpy(X)).detach()[:, 0]
    z = z.numpy()
    y = None
    if labels is not None:
        y = np.array(labels)[(z > 0).astype(int)]
        y[:2] = labels  # both occur
    pruner = fitted(FrozenModel(network), X, y)
    p = pruner.predict_proba(X)
    np.testing.assert_allclose(p[:, 1], 1 / (1 + np.exp(-z)), atol=1e-4)
    assert pruner.classes_.tolist() == (labels or [0, 1])
    if y is not None:
        assert pruner.report(X, y, repeats=0).base_accuracy == np.mean((z > 0) == (y == labels[1]))


def test_one_logit_that_is_the_same_on_all_samples_is_no_probability():
    network, X = Network("column", 1, 0).eval(), images(0)
    z = network.logits(torch.from_numpy(X)).detach().flatten()
    best = int(z.argmax())
    assert z[best] > 0
    X = np.repeat(X[best : best + 1], len(X), axis=0)  # (0, z) has the same sum in each row
    p = fitted(FrozenModel(network), X).predict_proba(X)
    np.testing.assert_allclose(p[:, 1], float(torch.sigmoid(z[best])), atol=1e-4)


# A single number that no plain layer gives, and whether it is a probability.
SINGLES = {
    "scaled": (lambda net, z: 2 * z[:, :1] + 0.1, False),
    "difference": (lambda net, z: z[:, 0] - z[:, 1], False),
    "of one's own weights": (lambda net, z: (z * torch.arange(K)).sum(1), False),
    "largest": (lambda net, z: z.amax(1, keepdim=True), False),
    "a column": (lambda net, z: torch.sigmoid(z)[:, 2], False),
    "a probability": (lambda net, z: z[:, :2].softmax(1)[:, 1], True),
    "clamped": (lambda net, z: z.sigmoid()[:, 3:].clamp(1e-3, 0.999), True),
    "mean of two sigmoids": (lambda net, z: (z[:, 0].sigmoid() + z[:, 1].sigmoid()) / 2, True),
}
HEADS |= {name: head for name, (head, _) in SINGLES.items()}


@pytest.mark.parametrize("head", sorted(SINGLES))
def test_one_number_is_that_of_the_second_class_whatever_it_is_made_of(head, tmp_path):
    HEADS[head] = lambda net, z: SINGLES[head][0](net, z.flatten(1) - middle)
    network, X, middle = Network(head).eval(), images(3), 0.0
    with torch.no_grad():
        middle = network.logits(torch.from_numpy(X)).mean(0)
        given = network(torch.from_numpy(X)).flatten()
    p = (given if SINGLES[head][1] or head == "a column" else given.sigmoid()).numpy()
    pruner = fitted(network, X, np.where(p > 0.5, "yes", "no"))
    np.testing.assert_allclose(pruner.predict_proba(X)[:, 1], p, atol=1e-5)
    assert pruner.report(X, pruner.predict(X), repeats=0).base_accuracy == 1
    sinfkit.save(pruner, tmp_path / "p.sinf")
    again = sinfkit.load(tmp_path / "p.sinf", factory=lambda: Network(head, seed=1))
    np.testing.assert_allclose(again.predict_proba(X)[:, 1], p, atol=1e-5)
    np.testing.assert_allclose(fitted(network, X).predict_proba(X)[:, 1], p, atol=1e-5)


def test_a_number_that_may_be_a_logit_or_a_probability_is_refused():
    HEADS["either"] = lambda net, z: z.flatten(1).softmax(1).amin(1)
    with pytest.raises(ValueError, match="logit of the second class, or its probability"):
        fitted(Network("either").eval(), images(0), np.arange(24) % 2)


# Outputs that no plain layer gives in their order; `w` is a matrix of (6, K) with a bias.
PRODUCTS = {
    "matmul": lambda h, w, b: h @ w,
    "turned": lambda h, w, b: h @ w.T.contiguous().T + b,
    "mm": lambda h, w, b: h.mm(w),
    "addmm": lambda h, w, b: torch.addmm(b, h, w),
    "weighted addmm": lambda h, w, b: torch.addmm(b, h, w, beta=2, alpha=0.5),
    "einsum": lambda h, w, b: torch.einsum("nc, ck -> nk", h, w) + b,
    "einsum turned": lambda h, w, b: torch.einsum("kc,nc->nk", w.T, h),
    "function": lambda h, w, b: F.linear(h, w.T, b),
    "the other way": lambda h, w, b: (w.T @ h.T).T,
    "sum": lambda h, w, b: (h[:, :, None] * w).sum(1) + b,
    "tensordot": lambda h, w, b: torch.tensordot(h, w, dims=1),
    "expanded": lambda h, w, b: torch.bmm(h[:, None], w.expand(len(h), -1, -1))[:, 0],
    "distance": lambda h, w, b: -torch.cdist(h, w.T),
    "column by column": lambda h, w, b: torch.stack([h @ w[:, i] for i in range(K)], 1),
    "scaled": lambda h, w, b: (h @ w) * b.exp(),
    "reversed": lambda h, w, b: F.linear(h, w.T, b).flip(1),
    "picked": lambda h, w, b: F.linear(h, w.T, b)[:, [2, 0, 3, 1]],
    "reversed softmax": lambda h, w, b: F.linear(h, w.T, b).softmax(1).flip(1),
    "some of them": lambda h, w, b: F.linear(h, torch.cat([w, w], 1).T)[:, 1 : K + 1],
}


class Product(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.w, self.b, self.how = (
            nn.Parameter(20 * torch.randn(6, K)),
            nn.Parameter(torch.rand(K)),
            how,
        )

    def forward(self, x):
        return PRODUCTS[self.how](self.two(self.one(x).relu()).relu().mean((2, 3)), self.w, self.b)


@pytest.mark.parametrize("how", sorted(PRODUCTS))
def test_whatever_computes_the_outputs_they_are_the_networks(how, tmp_path):
    network, X = Product(how).eval(), images(2)
    given = network(torch.from_numpy(X)).detach()
    expected = (given if "softmax" in how else given.softmax(1)).numpy()
    np.testing.assert_allclose(fitted(network, X).predict_proba(X), expected, atol=1e-5)
    y = expected[:, [0, 2]].argmax(1) * 2
    y[:2] = 0, 2
    some = fitted(network, X, y, classes=[0, 2])
    kept = expected[:, [0, 2]] / expected[:, [0, 2]].sum(1, keepdims=True)
    np.testing.assert_allclose(some.predict_proba(X), kept, atol=1e-5)
    smaller = DCSPruner(
        network,
        criterion="l1",
        schedule="uniform",
        pruning_ratios=(0.5, 0.5),
        options=sinfkit.PruningOptions(validation_fraction=0),
        device="cpu",
    ).fit(X)
    assert len(smaller.support_["one"]) == 3
    sinfkit.save(smaller, tmp_path / "p.sinf")
    again = sinfkit.load(tmp_path / "p.sinf", factory=lambda: Product(how))
    np.testing.assert_array_equal(again.predict_proba(X), smaller.predict_proba(X))


def _reduced(net, z):
    """Some of the mass is that of a class that is left out."""
    return torch.cat([z, z.mean(1, keepdim=True)], 1).softmax(1)[:, :-1]


# Numbers that are made of probabilities. `share` is any number.
MADE = {
    "times": lambda z, share: 100 * share * z.softmax(1),
    "base 10": lambda z, share: (z / 20).softmax(1).log10(),  # where no class is sure
    "base 2": lambda z, share: (z / 20).softmax(1).log2(),
    "softmin": lambda z, share: F.softmin(z, 1),
    "of two groups": lambda z, share: torch.cat(
        [share * z[:, :2].softmax(1), (1 - share) * z[:, 2:].softmax(1)], 1
    ),
    "rounded": lambda z, share: (z.softmax(1) * 1000).round() / 1000,
    "sparse": lambda z, share: F.normalize(F.relu(z - z.mean(1, keepdim=True)), p=1, dim=1),
    "evidence over its sum": lambda z, share: F.normalize(F.softplus(z) + share, p=1, dim=1),
    "smoothed": lambda z, share: (1 - share / 2) * z.softmax(1) + share / 2 / K,
    "sharpened": lambda z, share: F.normalize(z.softmax(1) ** (1 + share), p=1, dim=1),
}
ODD = {
    "mass left out": lambda z, share: _reduced(None, z),
    "exponential": lambda z, share: (share * z).exp(),
    "evidence": lambda z, share: F.softplus(z) + share,
}


def made(how, share):
    return lambda net, z: (MADE | ODD)[how](z.flatten(1), share)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(how=st.sampled_from(sorted(MADE)), share=st.floats(0.1, 0.9), seed=st.integers(0, 20))
def test_whatever_is_made_of_probabilities_is_taken_for_them(how, share, seed):
    HEADS["made"] = made(how, share)
    network, X = Network("made", seed=seed).eval(), images(seed)
    p = network(torch.from_numpy(X)).detach()
    p = {"base 10": 10**p, "base 2": 2**p}.get(how, p)
    p = (p / p.sum(1, keepdim=True)).numpy()
    np.testing.assert_allclose(fitted(network, X).predict_proba(X), p, atol=1e-4)


@pytest.mark.parametrize("how", sorted(ODD))
def test_outputs_of_which_none_is_below_zero_are_warned_of(how):
    HEADS["made"] = made(how, 0.5)
    with pytest.warns(UserWarning, match="None of the model's outputs is below 0"):
        DCSPruner(
            Network("made").eval(), criterion="l1", budget=1.0, repair="none", device="cpu"
        ).fit(images(0))


@pytest.mark.parametrize(
    "head", [lambda net, z: z.flatten(1) > 0, lambda net, z: torch.complex(*[z.flatten(1)] * 2)]
)
def test_outputs_that_are_no_real_numbers_are_refused(head):
    HEADS["made"] = head
    for y in (None, np.arange(24) % K):
        with pytest.raises(ValueError, match="real numbers"):
            fitted(Network("made").eval(), images(0), y)
