"""The times of layers: measured, fitted, and added up over the parts of a routed network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sinfkit.graph import count_macs, fold_batch_norm, output_layer, trace
from sinfkit.pruning import LayerTime, expected_seconds, fit_layer_times, layer_seconds, sliceable
from sinfkit.repair import insert_factors
from sinfkit.slicing import find_groups

seconds = st.floats(1e-6, 1e-2)


@pytest.fixture(scope="module")
def network():
    graph = trace(small_cnn())
    batch = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return graph, find_groups(graph, batch, output_layer(graph, 6)), batch


@settings(deadline=None)
@given(seconds, seconds, seconds)
def test_overhead_weights_and_samples_are_told_apart(call, weights, sample):
    truth = LayerTime(call, weights, sample)
    cells = [(f, n, truth.seconds(n, f)) for f in (1.0, 0.25) for n in (64.0, 8.0)]
    fitted = LayerTime.fitted(np.array(cells))
    for f, n, took in [*cells, (0.5, 100.0, truth.seconds(100.0, 0.5))]:
        assert fitted.seconds(n, f) == pytest.approx(took, rel=1e-6)


def test_noise_gives_no_negative_times():
    # Half of the layer took longer than the whole.
    fitted = LayerTime.fitted(
        np.array([(1.0, 64.0, 1.0), (0.25, 64.0, 1.2), (1.0, 8.0, 0.2), (0.25, 8.0, 0.3)])
    )
    assert min(fitted.call, fitted.weights, fitted.sample) >= 0


def test_two_layers_in_the_place_of_one_are_two_calls():
    graph = trace(nn.Sequential(nn.Linear(12, 12)))
    small = insert_factors(graph, {"0": 3})
    times = {"0": LayerTime(1.0, 8.0, 0.0)}
    # 2 x 3 x 12 of 144 weights, in two calls instead of one
    assert expected_seconds([(graph, 1.0)], times, graph, 1) == 9.0
    assert expected_seconds([(small, 1.0)], times, graph, 1) == 2 * 1.0 + 8.0 / 2


def test_layers_are_timed(network):
    graph, _, batch = network
    found = layer_seconds(graph, batch, repeats=3, warmup=1)
    assert set(count_macs(graph, batch[:1])[1]) < set(found)
    assert all(time > 0 for time in found.values())
    assert not any(module._forward_hooks for module in graph.modules())


@pytest.mark.parametrize("form", [None, fold_batch_norm])
@pytest.mark.parametrize("n", [1, 16])
def test_a_networks_layers_are_fitted(network, form, n):
    graph, groups, batch = network
    more = {} if form is None else {"form": form}
    times = fit_layer_times(graph, groups, sliceable(groups), batch[:n], repeats=3, **more)
    assert set(times) == set(layer_seconds((form or trace)(graph), batch, repeats=1, warmup=0))
    for time in times.values():
        assert min(time.call, time.weights, time.sample) >= 0
        assert 0 < time.seconds(n) < 0.1


def test_parts_add_up_by_hand():
    whole = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    times = {"0": LayerTime(1.0, 2.0, 3.0), "2": LayerTime(10.0, 20.0, 30.0)}
    assert expected_seconds([(whole, 1.0)], times, whole, 5) == 1 + 2 + 15 + 10 + 20 + 150
    narrow = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert expected_seconds([(narrow, 1.0)], times, whole, 5) == 1 + 1 + 7.5 + 10 + 10 + 75
    # Half of the samples, one at a time: every other call is left out.
    assert expected_seconds([(whole, 0.5)], times, whole, 1) == (1 + 2 + 3 + 10 + 20 + 30) / 2
    # Of two samples at least one needs it three times out of four.
    calls = 0.75 * (1 + 2 + 10 + 20)
    assert expected_seconds([(whole, 0.5)], times, whole, 2) == calls + 3 + 30
    assert expected_seconds([(whole, 0.0)], times, whole, 9) == 0


@given(st.integers(1, 5), st.integers(1, 300))
def test_small_groups_are_slow(n_clusters, n):
    """The same samples cost more where they fall apart into more calls, and never less."""
    whole = nn.Linear(4, 4)
    times = {"": LayerTime(1.0, 1.0, 1.0)}
    routed = [
        expected_seconds([(whole, 1 / k)] * k, times, whole, n)
        for k in (n_clusters, n_clusters + 1)
    ]
    assert routed[0] <= routed[1] + 1e-9
