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


def two_layers(seed: int = 0) -> nn.Sequential:
    """Of 144 multiplications each; as two of rank 1, of 24."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)).eval()


def ranks(network: nn.Module) -> dict[str, int]:
    """Outputs in between, of each layer that has become two."""
    parts = dict(network.named_modules())
    return {factorized(name): len(part.weight) for name, part in parts.items() if "narrow" in name}


def test_components_by_hand():
    # Inputs along the first axis only, so that outputs are along (2, 1) and (-2, -1).
    network = two_layers()[:1]
    with torch.no_grad():
        network[0].weight.zero_()[:2, 0] = torch.tensor([2.0, 1.0])
    small = factorize(network, 24 / 144, torch.randn(40, 12))
    narrow, wide = small.get_submodule("0.narrow").weight, small.get_submodule("0.wide").weight
    leading = torch.tensor([2.0, 1.0] + 10 * [0.0]) / 5**0.5
    torch.testing.assert_close(wide[:, 0] * narrow[0, 0].sign(), leading, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(narrow[0].abs(), torch.tensor([5**0.5] + 11 * [0.0]))


def test_the_layer_that_loses_least_gets_the_low_rank():
    x = torch.randn(200, 12)
    for name in ("0", "2"):
        network = two_layers()
        lower(network.get_submodule(name), 1)
        assert ranks(factorize(network, 1.0, x)) == {}
        # Up to what rank 1 of that layer saves nothing else is touched.
        assert set(ranks(factorize(network, 0.9, x))) == {name}
        assert ranks(factorize(network, (24 + 144) / 288, x)) == {name: 1}
        assert ranks(factorize(network, 48 / 288, x)) == {"0": 1, "2": 1}
        with pytest.raises(UnreachableShareError, match="too few layers"):
            factorize(network, 47 / 288, x)


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
    names = ranks(small)
    # The same ranks, each pair the projection of its own layer on its components.
    naive = insert_factors(trace(network), names)
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


@given(st.permutations([1, 2, 3, 2]))
@settings(max_examples=4, deadline=None)
def test_weights_count_samples_as_often(weight):
    # The last fifth chooses the penalty, of the samples as of their repetitions.
    network, weight = small_cnn(), np.repeat([*weight, 2], 4)
    x = images(20) * torch.linspace(0.1, 3, 20)[:, None, None, None]
    again = x.repeat_interleave(torch.as_tensor(weight), 0)
    small = factorize(network, 0.3, x, weight=weight)
    assert ranks(small) and error(factorize(network, 0.3, again), small, images(30)) < 1e-10
    assert error(factorize(network, 0.3, x), small, images(30)) > 1e-8


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
    assert set(ranks(small)) == {"plain"}
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
