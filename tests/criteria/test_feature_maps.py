"""Ranks, independence and zeros of feature maps."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sinfkit.criteria import STATISTICS, map_independence, map_rank, map_statistics, map_zeros
from sinfkit.graph import layer_names, observation_nodes, trace

few = settings(deadline=None, max_examples=20)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def nuclear(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix).sum()


def independence_by_definition(maps: Tensor) -> Tensor:
    rows = maps.double().flatten(2)
    result = torch.empty(rows.shape[:2], dtype=torch.float64)
    for image, channel in itertools.product(range(len(rows)), range(rows.shape[1])):
        without = rows[image].clone()
        without[channel] = 0
        result[image, channel] = nuclear(rows[image]) - nuclear(without)
    return result


def test_ranks_by_hand():
    identity, outer, nothing = torch.eye(3), torch.ones(3, 3), torch.zeros(3, 3)
    middle = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])
    maps = torch.stack([identity, outer, nothing, middle])[None]
    assert map_rank(maps).tolist() == [[3.0, 1.0, 0.0, 2.0]]
    assert map_rank(maps[..., :2]).tolist() == [[2.0, 1.0, 0.0, 2.0]]


@few
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 9)
)
def test_a_rank_is_that_of_the_factors(n: int, c: int, h: int, w: int, seed: int) -> None:
    k = min(h, w, 2)
    maps = rand(n, c, h, k, seed=seed) @ rand(n, c, k, w, seed=seed + 1)
    assert (map_rank(maps) == k).all()
    assert (map_rank(maps.float() * 1e-12) == k).all()  # no absolute threshold


def test_independence_by_hand():
    # Two rows that repeat each other, and one at right angles to them: without one of the two,
    # sqrt(2) a becomes a; without the third, its own length is gone.
    rows = torch.tensor([[3.0, 4.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    expected = torch.tensor([[5 * (2**0.5 - 1), 5 * (2**0.5 - 1), 2.0]]).double()
    torch.testing.assert_close(map_independence(rows[None, :, None]), expected, atol=1e-5, rtol=0)


@few
@given(
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 1000),
    st.sampled_from(["random", "relu", "low rank", "repeated", "dead"]),
    st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_independence_is_the_drop_of_the_nuclear_norm(c, h, w, seed, kind, scale):
    maps = rand(2, c, h, w, seed=seed) * scale
    if kind == "relu":
        maps = maps.relu()
    elif kind == "low rank":
        maps = (rand(2, c, 1, seed=seed) * rand(2, 1, h * w, seed=seed + 1)).reshape(2, c, h, w)
    elif kind == "repeated":
        maps[:, -1] = maps[:, 0]
    elif kind == "dead":
        maps[:, 0] = 0
    found, size = map_independence(maps), float(maps.abs().max()) + 1e-300
    torch.testing.assert_close(
        found / size, independence_by_definition(maps) / size, atol=1e-5, rtol=1e-6
    )
    assert (found >= 0).all() and torch.isfinite(found).all()
    if kind == "dead":
        assert (found[:, 0] / size < 1e-9).all()


def test_independence_of_many_channels_and_of_many_positions():
    for shape in ((1, 40, 4, 4), (1, 12, 9, 9)):
        maps = rand(*shape, seed=3).relu()
        torch.testing.assert_close(
            map_independence(maps.float()), independence_by_definition(maps), atol=1e-4, rtol=0
        )


def test_zeros_by_hand():
    maps = torch.tensor([[[[0.0, 1.0], [2.0, 0.0]], [[-1.0, 1.0], [1.0, 1.0]]]])
    assert map_zeros(maps).tolist() == [[0.5, 0.25]]


def one_layer(weight: list[float], bias: list[float]) -> nn.Module:
    """Filters that scale and shift a grey image, and a ReLU."""
    layer = nn.Conv2d(1, len(weight), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight)[:, None, None, None])
        layer.bias.copy_(torch.tensor(bias))
    head = nn.Linear(len(weight), 2)
    return nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def test_statistics_by_hand():
    gm = trace(one_layer([1.0, 0.0, 0.0], [0.0, 3.0, 0.0]))  # alive, constant, dead
    x = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]], [[[1.0, 1.0], [1.0, 5.0]]], [[[0.0] * 2] * 2]])
    found = map_statistics(gm, x.split(2), observation_nodes(gm, ["0"]), list(STATISTICS))["0"]
    assert found["map_rank"].tolist() == pytest.approx([4 / 3, 1.0, 0.0])
    assert found["map_zeros"].tolist() == pytest.approx([(0.5 + 0 + 1) / 3, 0.0, 1.0])
    assert found["map_range"].tolist() == [5.0, 0.0, 0.0]
    assert float(found["map_independence"][2]) < 1e-9


@few
@given(st.lists(st.integers(0, 9), max_size=4), st.permutations(range(9)))
def test_batches_make_no_difference(cuts: list[int], order: list[int]) -> None:
    gm = trace(small_cnn())
    x = rand(9, 1, 8, 8, dtype=torch.float32)
    nodes = observation_nodes(gm, layer_names(gm))
    names = ["map_zeros", "map_independence"]
    whole = map_statistics(gm, [x], nodes, names)
    parts = map_statistics(gm, x[order].tensor_split(sorted(cuts)), nodes, names)
    assert list(whole) == list(nodes)
    for layer, fields in whole.items():
        assert set(fields) == {"map_range", *names}
        for name, value in fields.items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(parts[layer][name], value, atol=1e-5, rtol=1e-5)


def test_linear_layers_sequences_and_half_precision():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)).mean(1))

    network = Tokens().bfloat16()
    gm = trace(network)
    x = rand(6, 7, 3).bfloat16()
    found = map_statistics(gm, [x], observation_nodes(gm, ["a", "b"]), list(STATISTICS))
    with torch.no_grad():
        hidden = torch.relu(network.a(x)).float()
        logits = network(x).float()
    torch.testing.assert_close(found["a"]["map_zeros"], (hidden == 0).double().mean((0, 1)))
    torch.testing.assert_close(found["a"]["map_rank"], (hidden > 0).any(1).double().mean(0))
    assert found["b"]["map_rank"].tolist() == [1.0] * 5
    lengths = logits.double().norm(dim=1, keepdim=True)
    without = (lengths.square() - logits.double().square()).sqrt()
    torch.testing.assert_close(
        found["b"]["map_independence"], (lengths - without).mean(0), atol=1e-5, rtol=1e-5
    )


def test_no_sample_is_refused():
    gm = trace(small_cnn())
    nodes = observation_nodes(gm, ["0"])
    for batches in ([], [torch.zeros(0, 1, 8, 8)]):
        with pytest.raises(ValueError, match="no sample"):
            map_statistics(gm, batches, nodes, ["map_rank"])
