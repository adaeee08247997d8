"""Low rank in closed form: exact where the rank is low, within its share, and where it may be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sinfkit import resnet50
from sinfkit.graph import count_macs, trace
from sinfkit.repair import UnreachableShareError, factorize, factorized, insert_factors
from sinfkit.repair.low_rank import _principal, _ranks, _Rows


def images(n: int = 60, channels: int = 1, side: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, channels, side, side, generator=generator)


def lower(layer: nn.Conv2d | nn.Linear, rank: int) -> None:
    """Leave a layer only so many independent outputs."""
    with torch.no_grad():
        weight = layer.weight.flatten(1)
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        layer.weight.copy_((u[:, :rank] * s[:rank] @ v[:rank]).reshape(layer.weight.shape))


def error(a: nn.Module, b: nn.Module, x: torch.Tensor) -> float:
    """Relative squared error of `b`'s outputs."""
    with torch.inference_mode():
        expected, found = a(x), b(x)
    return float((found - expected).square().sum() / expected.square().sum())


def test_components_by_hand():
    # (2, 1), (-2, -1), (2, 1), (-2, -1): all of the variance lies along (2, 1).
    y = torch.tensor([[2.0, 1.0], [-2.0, -1.0]] * 2, dtype=torch.float64)
    found = _principal(len(y), y.sum(0), y.T @ y)
    torch.testing.assert_close(found.error, torch.tensor([1.0, 0.0, 0.0]).double())
    leading = found.vectors[:, 0] * found.vectors[0, 0].sign()
    torch.testing.assert_close(leading, torch.tensor([2.0, 1.0]).double() / 5**0.5)


def test_ranks_by_hand():
    # Rank 0 is the whole layer. Saving 60: 1 of "b" loses least for what it saves.
    a = ("a", np.array([0, 80, 40]), np.array([0.0, 0.5, 0.2]))
    b = ("b", np.array([0, 80, 40]), np.array([0.0, 0.1, 0.05]))
    assert _ranks([a, b], -60) == {"b": 1}
    assert _ranks([a, b], -100) == {"a": 2, "b": 1}
    assert _ranks([a, b], -160) == {"a": 1, "b": 1}
    assert _ranks([a, b], 0) == {}
    with pytest.raises(UnreachableShareError, match="too few layers"):
        _ranks([a, b], -161)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2**16))
def test_a_low_rank_is_found_exactly(rank, seed):
    torch.manual_seed(seed)
    network = nn.Sequential(
        *(nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12 * 9, 16)),
    ).eval()
    lower(network[2], rank)
    lower(network[5], rank)
    x = torch.randn(80, 2, 8, 8)
    whole, names = count_macs(network, x[:1])
    share = 1 - (1 - 0.4) * (names["2"] + names["5"]) / whole
    small = factorize(network, share, x)
    assert count_macs(small, x[:1])[0] <= share * whole
    assert error(network, small, torch.randn(20, 2, 8, 8)) < 1e-6
    assert small.get_submodule("0") is not network[0]
    assert isinstance(network[2], nn.Conv2d)  # it is not changed


@settings(max_examples=10, deadline=None)
@given(st.floats(0.2, 1.0))
def test_the_share_is_kept(share):
    network, x = small_cnn(), images()
    small = factorize(network, share, x)
    whole = count_macs(network, x[:1])[0]
    assert count_macs(small, x[:1])[0] <= share * whole
    if share == 1:
        assert error(network, small, x) < 1e-10


def test_more_multiplications_lose_less():
    torch.manual_seed(0)
    network, x = small_cnn(), images(200)
    errors = [error(network, factorize(network, share, x), x) for share in (0.9, 0.6, 0.3)]
    assert errors[0] < errors[1] < errors[2] and errors[0] < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_the_wide_layer_makes_up_for_what_came_before(seed):
    """Least squares on what arrives beats components of what should have arrived."""
    torch.manual_seed(seed)
    layers = [part for _ in range(3) for part in (nn.Linear(20, 20), nn.ReLU())]
    network = nn.Sequential(*layers[:-1]).eval()
    x = torch.randn(4000, 20)
    small = factorize(network, 0.5, x)
    names = {factorized(name) for name, _ in small.named_modules() if factorized(name) != name}
    # The same ranks, each pair the projection of its own layer on its components.
    naive = insert_factors(
        trace(network), {n: len(small.get_submodule(n).narrow.weight) for n in names}
    )
    for name in names:
        layer, pair = network.get_submodule(name), naive.get_submodule(name)
        u = nn.functional.normalize(
            small.get_submodule(name).narrow.weight @ torch.linalg.pinv(layer.weight)
        )
        y = network[: int(name) + 1](x).mean(0)
        with torch.no_grad():
            pair.narrow.weight.copy_(u @ layer.weight)
            pair.wide.weight.copy_(u.T)
            pair.wide.bias.copy_(u.T @ u @ (layer.bias - y) + y)
    fresh = torch.randn(1000, 20)
    assert len(names) >= 2
    assert error(network, small, fresh) < error(network, naive, fresh)


@given(st.lists(st.integers(1, 3), min_size=5, max_size=5))
@settings(max_examples=10, deadline=None)
def test_weights_count_samples_as_often(weight):
    graph, x = trace(small_cnn()), images(5)
    again = torch.cat([x[i : i + 1].expand(n, -1, -1, -1) for i, n in enumerate(weight)])
    one = _Rows(5, np.array(weight), 0).sums(graph, ["0"], x.split(2))["0"]
    other = _Rows(len(again), None, 0).sums(graph, ["0"], again.split(2))["0"]
    for a, b in zip(one[1:], other[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert one[0] == other[0]


def test_double_weights_are_no_weights():
    network, x = small_cnn(), images(40)
    plain = factorize(network, 0.6, x)
    twice = factorize(network, 0.6, x, weight=np.full(40, 2.0))
    assert error(plain, twice, x) < 1e-6


@pytest.mark.filterwarnings("ignore:Layers inside normed stay whole")
def test_what_cannot_have_a_low_rank_stays_whole():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.Conv2d(8, 8, 3, padding=1)
            self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
            self.plain = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.grouped(self.twice(self.twice(x)))
            return self.plain(self.normed(x)).relu()

    network, x = Network().eval(), images(30, 8)
    share = 1 - 0.4 * count_macs(network, x[:1])[1]["plain"] / count_macs(network, x[:1])[0]
    small = factorize(network, share, x)
    assert {factorized(n) for n, _ in small.named_modules() if factorized(n) != n} == {"plain"}
    assert small.get_submodule("plain.narrow").padding_mode == "circular"
    with pytest.raises(UnreachableShareError):
        factorize(network, 0.3, x)
    for name in ("twice", "grouped", "nowhere"):
        with pytest.raises(ValueError, match=name):
            insert_factors(trace(network), {name: 1})
    insert_factors(trace(network), {"normed": 1})  # tracing has baked its weight in


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_ranks_that_save_nothing(rank):
    graph = trace(nn.Sequential(nn.Linear(8, 8)).eval())
    assert insert_factors(graph, {"0": 4}) is not graph
    with pytest.raises(ValueError, match="cannot be replaced"):
        insert_factors(graph, {"0": rank})


@pytest.mark.parametrize("share", [0.0, 1.1, -0.5])
def test_shares_out_of_range(share):
    with pytest.raises(ValueError, match="share"):
        factorize(small_cnn(), share, images())


def test_residual_networks_and_tokens():
    network = resnet50(10, width=1 / 8).eval()
    x = images(30, 3, 32)
    small = factorize(network, 0.7, x)
    assert count_macs(small, x[:1])[0] <= 0.7 * count_macs(network, x[:1])[0]
    assert error(network, small, x) < 0.5
    tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).eval()
    x = torch.randn(50, 7, 4) @ torch.randn(4, 16)
    assert error(tokens, factorize(tokens, 0.6, x), x) < 0.05
