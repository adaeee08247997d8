"""A graph is compared with its network, and samples alone with samples together."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sinfkit import DCSPruner, PruningOptions
from sinfkit.graph import check_traced, trace


class Shifted(nn.Module):
    """Adds a number that grows with the batch, and takes it away or not."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.layer, self.share = nn.Linear(4, 3), share

    def forward(self, x: Tensor) -> Tensor:
        much = 1e6 * x.shape[0]
        return self.layer(x) + much - self.share * much


def test_rounding_is_told_from_what_hangs_on_the_batch() -> None:
    x = torch.randn(4, 4)
    rounded, dependent = Shifted(1.0).eval(), Shifted(0.999).eval()
    check_traced(trace(rounded, x), rounded, x)  # off by some hundredths in float32
    with pytest.raises(ValueError, match="depends on the others"):
        check_traced(trace(dependent, x), dependent, x)


# Draws, mates and classes that never come ---------------------------------------------------------


def _drop_path(x: Tensor, p: float) -> Tensor:
    return x * (torch.rand_like(x[:, :1]) >= p)


DRAWS = {
    "stochastic depth": _drop_path,
    "dropout": lambda x, p: F.dropout(x, p, training=True),
    "feature dropout": lambda x, p: F.dropout1d(x[:, :, None], p, training=True)[..., 0],
    "bernoulli": lambda x, p: x * torch.bernoulli(torch.full_like(x, 1 - p)),
    "noise": lambda x, p: x + p**8 * torch.randn_like(x),
    "normal": lambda x, p: x + p**8 * torch.normal(torch.zeros_like(x), 1.0),
    "uniform": lambda x, p: x + p**8 * torch.empty_like(x).uniform_(),
    "choice": lambda x, p: x.index_select(1, torch.randperm(x.shape[1])) * p**8 + x,
    "python": lambda x, p: x * float(random.random() >= p),
    "numpy": lambda x, p: x * float(np.random.rand() >= p),  # noqa: NPY002
    "attention": lambda x, p: F.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None], dropout_p=p
    )[:, 0],
}


class Step(nn.Module):
    def __init__(self, function: Any, *arguments: Any, head: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)
        self.function, self.arguments, self.head = function, arguments, head

    def forward(self, x: Tensor) -> Tensor:
        z = self.two(self.function(self.one(x), *self.arguments))
        return z if self.head is None else self.head(z)


def checked(network: nn.Module, x: Tensor) -> None:
    network.eval()
    check_traced(trace(network, x), network, x)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(DRAWS)), p=st.floats(1e-6, 0.3))
def test_a_draw_is_found_however_seldom_it_matters(name: str, p: float) -> None:
    with pytest.raises(ValueError, match="random"):
        checked(Step(DRAWS[name], p), torch.randn(4, 4))


def _seeded(x: Tensor) -> Tensor:
    return x + torch.rand(6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.rrelu(x),
        lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
        _seeded,
    ],
)
def test_what_draws_nothing_is_none(function: Any) -> None:
    checked(Step(function), torch.randn(4, 4))


MATES = {
    "largest": lambda x, k: x / x.amax().clamp(min=k),
    "norm": lambda x, k: x / x.norm().clamp(min=k),
    "mean": lambda x, k: x - x.mean(0, keepdim=True).clamp(min=k),
    "sorted": lambda x, k: x.sort(0)[0].clamp(min=k) + x,
    "first": lambda x, k: x + x[:1].clamp(min=k),
    "before": lambda x, k: x + x.roll(1, 0).clamp(min=k),
    "counted": lambda x, k: x * (x > k).sum(),
}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(name=st.sampled_from(sorted(MATES)), times=st.floats(1.5, 2.5))
def test_mates_are_found_that_matter_only_where_they_are_large(name: str, times: float) -> None:
    x = 0.5 + 0.1 * torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    network = Step(MATES[name], 1.0)
    with torch.no_grad():
        network.one.bias.zero_()
        network.arguments = (times * float(network.one(x).max()),)  # no feature comes near it
    with pytest.raises(ValueError, match="depends on the others"):
        checked(network, x)


@pytest.mark.parametrize("low", [-1e9, -1e30, float("-inf"), float(torch.finfo().min)])
@pytest.mark.parametrize("fault", ["none", "mean of the batch", "noise"])
def test_a_class_that_is_masked_hides_no_difference(low: float, fault: str) -> None:
    def head(z: Tensor) -> Tensor:
        z = z - z.mean(0, keepdim=True) if fault == "mean of the batch" else z
        z = z + torch.randn_like(z) if fault == "noise" else z
        return z.masked_fill(torch.tensor([False, True, False]), low)

    network, x = Step(lambda x: x, head=head), torch.randn(4, 4)
    if fault == "none":
        return checked(network, x)
    with pytest.raises(ValueError, match="random|depends on the others"):
        checked(network, x)


class Counts(nn.Module):
    """Grows with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("fault", ["counts", "mean of the batch", "none"])
def test_probabilities_next_to_0_and_1_hide_no_difference(fault: str, scale: float) -> None:
    parts = {"counts": Counts(), "none": nn.Identity()}
    middle = parts.get(fault) or (lambda z: z - 0.1 * z.mean(0))
    network = Step(middle, head=lambda z: (z * 20 + scale * torch.arange(3)).softmax(1))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    if fault == "none":
        checked(network, x)
    else:
        with pytest.raises(ValueError, match="asked again|other answers|depends on the others"):
            checked(network, x)


def test_a_part_that_stays_in_training_is_refused_even_where_nothing_is_seen_of_it() -> None:
    network = nn.Sequential(nn.Conv1d(2, 6, 1), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(24, 3))
    network[1].train = lambda mode=True: network[1]  # does not listen to eval()
    with torch.no_grad():
        network[3].weight.zero_()
    with pytest.raises(ValueError, match="'1' stays in training mode"):
        checked(network, torch.randn(8, 2, 4))


class Keeps(nn.Module):
    """Keeps something: of the first samples, or of their size alone."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.what, self.kept = nn.Linear(4, 3), what, None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            made = {"mean": x.mean, "number": lambda: x.mean().item(), "first": lambda: x[:1]}
            size = {"size": lambda: torch.linspace(0, 1, x.shape[1])}
            self.kept = (made | size)[self.what]()
        return self.layer(x - self.kept)


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("what", ["mean", "number", "first", "size"])
def test_what_is_kept_of_the_first_samples_is_refused_but_not_what_is_of_their_size(
    what: str, part: bool
) -> None:
    X = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Keeps(what), nn.ReLU(), nn.Linear(3, 3))
    network = network if part else nn.Sequential(Keeps(what), nn.ReLU(), nn.Linear(3, 3))
    pruner = DCSPruner(
        network,
        criterion="l1",
        budget=1.0,
        repair="none",
        options=PruningOptions(validation_fraction=0, allow_unsliceable=True),
        device="cpu",
    )
    if what == "size":
        with torch.no_grad():
            wanted = network(torch.as_tensor(X)).softmax(1)
        np.testing.assert_allclose(pruner.fit(X).predict_proba(X), wanted, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="asked about first|depends on the others"):
            pruner.fit(X)
