"""Bytes held and bytes alive, against sums by hand."""

from __future__ import annotations

import pytest
import torch
from helpers import make_network
from torch import nn

from sinfkit.inference import Runtime, memory_use, peak_bytes


def test_parts_are_counted_once():
    network = make_network()
    network.subgraphs["1"] = network.subgraphs["0"]  # tied
    base = nn.Linear(6, 7)
    use = memory_use(network, base)
    assert use.parameters["prefix"] == 6 * 6 + 6
    assert use.parameters["router"] == 7 * 6 + 7
    assert use.parameters["subgraphs"] == 2 * (6 * 2 + 2)
    assert use.parameters["rest"] == 6 * 8 + 8
    assert use.parameters["base"] == 6 * 7 + 7
    parts = ("prefix", "router", "subgraphs", "rest")
    assert all(use.bytes[name] == 4 * use.parameters[name] for name in (*parts, "base"))
    assert use.parameters["total"] == sum(use.parameters[name] for name in parts)
    # Beside them: normalisation, clusters, outputs, temperatures and the answered classes.
    buffers = 2 * 6 * 4 + 2 * 7 * 8 + 4 * 4 + 4 * 7
    assert use.bytes["total"] == 4 * use.parameters["total"] + buffers
    assert use.peak is use.base_peak is None
    assert "subgraphs" in str(use)


def test_views_of_one_storage_count_once():
    layer = nn.Linear(4, 4)
    layer.register_buffer("view", layer.weight.detach()[1:])
    network = make_network()
    network.prefix = layer
    assert memory_use(network).bytes["prefix"] == 4 * (16 + 4)


def test_the_peak_is_the_widest_pair_of_neighbours():
    n = 5
    network = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 2))
    x = torch.zeros(n, 4)
    # The batch stays; both sides of the ReLU are alive at a time.
    assert peak_bytes(network, x) == 4 * n * (4 + 32 + 32)
    inplace = nn.Sequential(nn.Linear(4, 32), nn.ReLU(inplace=True), nn.Linear(32, 8))
    assert peak_bytes(inplace, x) == 4 * n * (4 + 32 + 8)
    assert peak_bytes(nn.Flatten(), x) == 4 * n * 4  # a view takes nothing


def test_peak_of_a_routed_network_grows_with_the_batch():
    network = make_network()
    x = torch.randn(400, 6)
    use = memory_use(network, nn.Linear(6, 7), x)
    half = memory_use(network, batch=x[:200])
    assert use.peak > 1.5 * half.peak > 1.5 * 200 * 6 * 4
    # Input, its difference to the mean and the quotient; a linear layer's answer is smaller.
    assert use.base_peak == 4 * 400 * (6 + 6 + 7)
    assert memory_use(Runtime(network), batch=x).peak > 400 * 6 * 4
    with pytest.raises(ValueError, match="at least one sample"):
        memory_use(network, batch=x[:0])
