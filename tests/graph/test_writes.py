"""Writes into shared memory, seldom seen: followed, kept whole, or refused; never lost."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sinfkit import DCSPruner, PruningOptions
from sinfkit.graph import opaque_modules, trace

VIEWS = {
    "slice": lambda x: x[:, ::2],
    "rows": lambda x: x[:, :, 1:3],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "first chunk": lambda x: x.chunk(2, 1)[0],
    "last part": lambda x: x.split([1, 3], 1)[1],
    "unbound": lambda x: x.unbind(1)[2],
    "transposed": lambda x: x.transpose(1, 2),
    "flat": lambda x: x.view(x.shape[0], -1),
    "diagonal": lambda x: torch.diagonal(x, dim1=2, dim2=3),
    "data": lambda x: x.data,
    "detached": lambda x: x.detach(),
    "itself": lambda x: x,
    "copy": lambda x: x.clone(),
    "sum": lambda x: x + 1.0,
}
# Each changes only what is far larger than usual.
WRITES = {
    "clamp_": lambda x: x.clamp_(max=4.0),
    "masked_fill_": lambda x: x.masked_fill_(x > 4.0, 0.5),
    "relu": lambda x: F.hardtanh(x, -4.0, 4.0, inplace=True),
    "operator": lambda x: x.__iadd__((x > 4.0) * 1.0),
    "out": lambda x: torch.clamp(x, max=4.0, out=x),
    "copy_": lambda x: x.copy_(x.clamp(max=4.0)),
    "threshold_": lambda x: F.threshold_(x, -4.0, 0.0),
    "where": lambda x: torch.where(x > 4.0, 0.5, x),
}


class Program(nn.Module):
    """Takes views, writes into some, and adds up a few of all that there are."""

    def __init__(self, steps: list[tuple[str, str, int]], read: list[int]) -> None:
        super().__init__()
        self.steps, self.read = steps, read

    def forward(self, x: Tensor) -> Tensor:
        there = [x * 2.0]
        for kind, name, i in self.steps:
            function = (VIEWS if kind == "view" else WRITES)[name]
            there.append(function(there[i % len(there)]))
        parts = [there[i % len(there)].flatten(1).mean(1, keepdim=True) for i in self.read]
        return torch.cat([*parts, there[0].flatten(1)], 1)


class Inside(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.conv, self.program = nn.Conv2d(3, 4, 3, padding=1), program

    def forward(self, x: Tensor) -> Tensor:
        return self.program(self.conv(x))


steps = st.lists(
    st.one_of(
        st.tuples(st.just("view"), st.sampled_from(sorted(VIEWS)), st.integers(0, 5)),
        st.tuples(st.just("write"), st.sampled_from(sorted(WRITES)), st.integers(0, 5)),
    ),
    min_size=2,
    max_size=6,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(steps=steps, read=st.lists(st.integers(0, 6), max_size=3), inside=st.booleans())
def test_no_write_is_lost_however_seldom_it_shows(steps, read, inside):
    network: nn.Module = Program(steps, read)
    if inside:
        network = Inside(network)
    torch.manual_seed(0)
    usual = 0.1 * torch.rand(4, 3 if inside else 4, 4, 4)
    loud = torch.randn(5, *usual.shape[1:]) * 9
    try:
        with torch.no_grad():
            network(usual.clone())
    except (RuntimeError, IndexError):  # no program
        reject()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            graph = trace(network.eval(), usual[:1])
    except ValueError as error:
        # A part can stay whole; only a network that is nothing else cannot.
        assert not inside and "view" in str(error)
        return
    with torch.no_grad():
        for x in (usual, loud, loud[:1]):
            given_ = x.clone()
            torch.testing.assert_close(graph(given_), network(x.clone()))
            assert torch.equal(given_, x)


@pytest.mark.parametrize("write", sorted(WRITES.keys() - {"copy_", "out", "where"}))
def test_a_part_that_nobody_else_reads_may_be_written(write):
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = (2 * x).chunk(2, 1)
            return torch.cat([WRITES[write](a), b], 1)

    network = nn.Sequential(nn.Conv2d(3, 4, 1), Halves(), nn.Conv2d(4, 2, 1))
    graph = trace(network, torch.randn(1, 3, 4, 4))
    assert not opaque_modules(graph) and "1" not in dict(graph.named_modules())


class Odd(nn.Module):
    """Cannot be looked into, and writes into what it is given."""

    def __init__(self, view: str) -> None:
        super().__init__()
        self.view, self.conv = view, nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        VIEWS[self.view](x).mul_(2.0)
        return x + 0 * self.conv(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("view", ["slice", "transposed", "flat", "itself"])
def test_samples_are_left_as_they_are(view, as_tensor):
    torch.manual_seed(0)
    network = nn.Sequential(
        Odd(view), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).append(nn.Linear(4, 2))
    X = torch.randn(20, 3, 6, 6)
    before = X.clone()
    with torch.no_grad():
        wanted = network(X.clone()).softmax(1)
    pruner = DCSPruner(
        network,
        criterion="l1",
        budget=1.0,
        repair="none",
        options=PruningOptions(validation_fraction=0, allow_unsliceable=True),
        device="cpu",
    ).fit(X if as_tensor else X.numpy())
    for _ in range(2):
        found = pruner.predict_proba(X if as_tensor else X.numpy())
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert torch.equal(X, before)


# Facts about the number of samples ----------------------------------------------------------------

COUNTS = {
    "shape": lambda x: x.shape[0],
    "size": lambda x: x.size(0),
    "pixels": lambda x: x.numel() // (x.shape[1] * x.shape[2] * x.shape[3]),
    "len": len,
    "positions": lambda x: x.numel(),
    "stride": lambda x: x.transpose(0, 1).shape[1],
}
FACTS = {
    "above": lambda n, k: n > k,
    "at least": lambda n, k: k <= n,
    "is": lambda n, k: n == k,
    "even": lambda n, k: n % max(k, 2) == 0,
    "share": lambda n, k: (n // max(k, 1)) > 1,
    "between": lambda n, k: 1 < n < k,
    "least": lambda n, k: min(n, k) == k,
    "any": lambda n, k: n >= 1,
}


class Counting(nn.Module):
    """Goes one of two ways by the number of samples."""

    def __init__(self, count: str, fact: str, k: int) -> None:
        super().__init__()
        self.count, self.fact, self.k = count, fact, k

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if FACTS[self.fact](COUNTS[self.count](x), self.k) else x.flatten(1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.sampled_from(sorted(COUNTS)),
    fact=st.sampled_from(sorted(FACTS)),
    k=st.one_of(st.integers(0, 40), st.integers(40, 300)),
)
def test_no_way_is_taken_by_the_number_of_samples_that_were_recorded(count, fact, k):
    network = Counting(count, fact, k)
    x = torch.randn(1, 2, 3, 3)
    try:
        graph = trace(network, x)
    except ValueError as error:
        assert fact != "any", "true for any number" in str(error)
        return
    for n in (1, 2, 3, 5, 16, 17, 31, 64, 128, 301):
        batch = x.expand(n, 2, 3, 3)
        torch.testing.assert_close(graph(batch), network(batch))


class Caught(nn.Module):
    """Catches what refuses to tell a value, and goes on without."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        try:
            if self.how == "float":
                value = float(x.max())
            elif self.how == "item":
                value = x.max().item()
            elif self.how == "bool":
                value = 9.0 if x.max() > 4 else 0.0
            else:
                value = max(x.flatten().tolist())
            if value > 4:
                return x * 0.5
        except Exception:
            pass
        return x


@pytest.mark.parametrize("how", ["float", "item", "bool", "list"])
def test_a_refusal_that_is_caught_is_one(how):
    with pytest.raises(ValueError, match="depends on the samples"):
        trace(Caught(how).eval(), torch.randn(1, 3, 4, 4))
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Caught(how)).eval()
    with pytest.warns(UserWarning, match="stay whole"):
        graph = trace(network, torch.randn(1, 3, 4, 4))
    for x in (torch.randn(4, 3, 4, 4), 90 * torch.randn(4, 3, 4, 4)):
        torch.testing.assert_close(graph(x), network(x))
