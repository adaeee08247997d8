"""The cost model says what the sliced network costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import small_cnn
from torch import nn

from sinfkit import resnet50, vgg16
from sinfkit.graph import count_macs, count_parameters, output_layer, trace
from sinfkit.pruning import CostModel, LayerTime, network_cost, sliceable
from sinfkit.slicing import find_groups, slice_channels


class Mixed(nn.Module):
    """Depthwise and grouped convolutions, a sum, a concatenation, a flattened map, PReLU."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.slopes = nn.PReLU(12)
        self.back = nn.Conv2d(12, 8, 1)
        self.side = nn.Conv2d(8, 5, 1)
        self.norm = nn.BatchNorm2d(13)
        self.hidden = nn.Linear(13 * 16, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.back(self.slopes(self.grouped(self.depthwise(x))))
        x = self.norm(torch.cat([x, self.side(x)], 1))
        return self.head(torch.relu(self.hidden(torch.relu(x).flatten(1))))


NETWORKS = {
    "vgg": (lambda: vgg16(10, width=0.125), (3, 32, 32)),
    "resnet": (lambda: resnet50(10, width=0.0625, stem="half"), (3, 32, 32)),
    "mixed": (Mixed, (3, 4, 4)),
    "plain": (small_cnn, (1, 8, 8)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    make, shape = NETWORKS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        graph = trace(make().eval())
    example = torch.zeros(1, *shape)
    n_outputs = graph(example).shape[1]
    return graph, find_groups(graph, example, output_layer(graph, n_outputs)), example


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_predicted_cost_is_that_of_the_sliced_network(network, unit):
    graph, groups, example = network

    def count(model):
        return count_macs(model, example)[0] if unit == "macs" else count_parameters(model)

    chosen = sliceable(groups)
    assert chosen
    output = next(group for group in groups if group.is_output)
    rng = np.random.default_rng(0)
    for n_outputs in (output.n_channels, 2):
        cost = network_cost(graph, groups, chosen, example, unit, kept={output.name: n_outputs})
        assert cost.base == count(graph)
        if n_outputs == output.n_channels:
            assert round(cost.total(cost.widths), 3) == count(graph)
        for _ in range(3):
            widths = [g.n_runs * rng.integers(1, g.n_channels // g.n_runs + 1) for g in chosen]
            keep = {
                g.name: np.concatenate(
                    [
                        run * (g.n_channels // g.n_runs) + np.arange(n // g.n_runs)
                        for run in range(g.n_runs)
                    ]
                )
                for g, n in zip(chosen, widths, strict=True)
            }
            keep[output.name] = np.arange(n_outputs)
            sliced = slice_channels(graph, example, keep, groups=groups).model
            assert round(cost.total(widths), 3) == count(sliced)
            steps = np.array([g.n_runs for g in chosen])
            for i, saving in enumerate(cost.savings(widths, steps)):
                fewer = np.array(widths) - steps * (np.arange(len(chosen)) == i)
                assert saving == pytest.approx(cost.total(widths) - cost.total(fewer))


def test_groups_that_are_not_chosen_keep_what_they_are_said_to_keep(network):
    graph, groups, example = network
    chosen = sliceable(groups)
    everything = network_cost(graph, groups, chosen, example)
    first = chosen[0]
    rest = network_cost(graph, groups, chosen[1:], example, kept={first.name: first.n_runs})
    widths = [group.n_channels for group in chosen[1:]]
    assert rest.total(widths) == pytest.approx(everything.total([first.n_runs, *widths]))
    assert rest.base == everything.base


def test_times_take_the_place_of_macs(network):
    graph, groups, example = network
    chosen = sliceable(groups)
    _, macs = count_macs(graph, example)
    times = {name: LayerTime(0.0, 0.0, float(n)) for name, n in macs.items()}
    timed = network_cost(graph, groups, chosen, example, "latency", times=times)
    counted = network_cost(graph, groups, chosen, example)
    widths = [group.n_runs for group in chosen]
    assert timed.total(widths) == pytest.approx(counted.total(widths))
    for unit in ("latency", "energy"):
        with pytest.raises(ValueError, match="budget_unit"):
            network_cost(graph, groups, chosen, example, unit)


def test_more_calls_cost_their_overhead_and_their_weights(network):
    graph, groups, example = network
    chosen = sliceable(groups)
    times = {name: LayerTime(0.1, 2.0, 0.01) for name in count_macs(graph, example)[1]}
    many = example.expand(10, *example.shape[1:])
    once = network_cost(graph, groups, chosen, many, "latency", times=times)
    calls = dict.fromkeys(list(times)[1:], 3)
    thrice = network_cost(graph, groups, chosen, many, "latency", times=times, calls=calls)
    whole = [group.n_channels for group in chosen]
    assert once.total(whole) == pytest.approx(len(times) * 2.2)
    assert thrice.base == pytest.approx(once.base) == pytest.approx(once.total(whole))
    assert thrice.total(whole) - once.total(whole) == pytest.approx(2 * 2.1 * len(calls))


def test_a_group_on_both_sides_of_a_layer_by_hand():
    # one layer, k -> k channels: k^2
    side = np.array([[0.0, 1.0]])
    cost = CostModel(np.array([5]), 2.0, np.array([1.0]), side, side, base=27.0)
    assert cost.total([5]) == 27
    assert cost.savings([5], [2]).tolist() == [16]
