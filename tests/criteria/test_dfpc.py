"""DFPC's data-free score of coupled channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import randomise_batch_norms, small_cnn
from torch import Tensor, nn
from torch.nn import functional as F

from sinfkit.criteria import gather_couplings, inflow, outflow
from sinfkit.graph import output_layer, trace
from sinfkit.slicing import find_groups


def conv(*args: int, seed: int = 0, **kwargs: object) -> nn.Conv2d:
    layer = nn.Conv2d(*args, **kwargs).double()
    generator = torch.Generator().manual_seed(seed)
    layer.weight.data = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
    return layer


def matrix(layer: nn.Conv2d, size: tuple[int, int]) -> Tensor:
    """A convolution without bias as a matrix from flattened input to flattened output."""
    n = layer.in_channels * size[0] * size[1]
    basis = torch.eye(n, dtype=torch.float64).reshape(n, layer.in_channels, *size)
    with torch.no_grad():
        out = F.conv2d(
            basis, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
        )
    return out.flatten(1).T


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"padding": 1}, {"padding": 1}),
        ({"padding": 1, "stride": 2}, {"padding": 1, "stride": 2}),
        ({"padding": 0}, {"padding": 2, "dilation": 2}),
        ({"padding": "same"}, {"padding": 1, "groups": 2}),
    ],
)
def test_it_is_the_product_of_absolute_matrices(first: dict, second: dict) -> None:
    a, b = conv(3, 4, 3, **first), conv(4, 6, 3, seed=1, **second)
    gain = torch.tensor([0.5, -2.0, 0.0, 1.0], dtype=torch.float64)
    flow = inflow(a, (7, 6), gain)
    found = outflow(b, flow, np.arange(4), np.arange(4))
    product_a = matrix(a, (7, 6)).abs()
    rows = product_a.shape[0] // 4
    scaled = gain.abs().repeat_interleave(rows)[:, None] * product_a
    product_b = matrix(b, tuple(flow.shape[1:])).abs()
    expected = torch.stack(
        [
            (product_b[:, i * rows : (i + 1) * rows] @ scaled[i * rows : (i + 1) * rows]).sum()
            for i in range(4)
        ]
    )
    torch.testing.assert_close(found, expected)
    assert float(found[2]) == 0.0  # a gain of 0 lets nothing through


def test_linear_readers_of_flattened_maps() -> None:
    flow = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]], dtype=torch.float64)
    layer = nn.Linear(8, 1).double()
    layer.weight.data = torch.tensor([[1.0, 0, 0, -1, 0, 2, 0, 0]], dtype=torch.float64)
    channel = np.repeat([0, 1], 4)
    assert outflow(layer, flow, np.arange(8), channel).tolist() == [5.0, 12.0]
    # the same inputs named in another order
    order = np.array([7, 2, 4, 0, 6, 1, 3, 5])
    assert outflow(layer, flow, order, channel[order]).tolist() == [5.0, 12.0]
    # pooled to one cell: means 2.5 and 6.5
    pooled = nn.Linear(2, 2).double()
    pooled.weight.data = torch.tensor([[1.0, 2.0], [-3.0, 0.0]], dtype=torch.float64)
    assert outflow(pooled, flow, np.arange(2), np.arange(2)).tolist() == [10.0, 13.0]
    # a grid that does not fit the map: the mean again
    odd = nn.Linear(6, 1).double()
    odd.weight.data = torch.ones(1, 6, dtype=torch.float64)
    assert outflow(odd, flow, np.arange(6), np.repeat([0, 1], 3)).tolist() == [7.5, 19.5]


def test_plain_networks_by_their_weights() -> None:
    network = nn.Sequential(
        nn.Linear(2, 3), nn.BatchNorm1d(3, eps=0.0), nn.ReLU(), nn.Linear(3, 2)
    ).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 0.0], [3.0, 1.0]]))
        network[1].weight.copy_(torch.tensor([1.0, -6.0, 0.0]))
        network[1].running_var.copy_(torch.tensor([1.0, 4.0, 1.0]))
        network[3].weight.copy_(torch.tensor([[1.0, 0.5, 9.0], [-1.0, 0.5, 9.0]]))
    graph = trace(network)
    example = torch.zeros(1, 2)
    groups = [g for g in find_groups(graph, example, "3") if not g.is_output]
    (pair,) = gather_couplings(graph, groups, example)["0"]
    # |row| * |gamma| / sqrt(var) * |column|: 2 * 1 * 2, 2 * 3 * 1, 4 * 0 * 18
    assert pair.tolist() == pytest.approx([4.0, 6.0, 0.0])


class Stream(nn.Module):
    """A residual stream: the stem and both branches give it, both branches and the head read it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.a(x))
        x = torch.relu(x + self.bn(self.b(x)))
        return self.head(x.mean((2, 3)))


def test_coupled_layers_are_paired_with_readers_behind_them() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = randomise_batch_norms(Stream()).double().eval()
    graph = trace(network)
    example = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    group = next(g for g in find_groups(graph, example, "head") if "stem" in g.layers)
    assert group.layers == ("stem", "a", "b")
    pairs = gather_couplings(graph, [group], example)[group.name]
    gain = network.bn.weight / (network.bn.running_var + network.bn.eps).sqrt()
    flows = [
        inflow(network.stem, (6, 6)),
        inflow(network.a, (6, 6)),
        inflow(network.b, (6, 6), gain.detach()),
    ]
    same = np.arange(4)
    head = [outflow(network.head, flow, same, same) for flow in flows]
    expected = [
        outflow(network.a, flows[0], same, same),
        outflow(network.b, flows[0], same, same),
        head[0],
        outflow(network.b, flows[1], same, same),
        head[1],
        head[2],
    ]
    assert len(pairs) == len(expected)
    torch.testing.assert_close(sum(pairs), sum(expected))


def test_what_is_pooled_between_is_averaged() -> None:
    graph = trace(small_cnn())
    example = torch.zeros(1, 1, 8, 8)
    groups = find_groups(graph, example, output_layer(graph, 6))
    found = gather_couplings(graph, [g for g in groups if not g.is_output], example)
    modules = dict(graph.named_modules())
    gain = modules["4"].weight / (modules["4"].running_var + modules["4"].eps).sqrt()
    flow = F.avg_pool2d(inflow(modules["3"], (8, 8), gain.detach()), 2)
    torch.testing.assert_close(
        found["3"][0], outflow(modules["7"], flow, np.arange(8), np.arange(8)), rtol=1e-6, atol=0
    )
    assert all(len(pairs) == 1 and (pairs[0] > 0).all() for pairs in found.values())
