"""The report's costs and its printed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn

from sinfkit import DCSPruner, FrozenModel, SemanticClusterer, SINFClassifier
from sinfkit.graph import count_macs, count_parameters
from sinfkit.inference import base_for_timing, branch_costs


@pytest.fixture(scope="module")
def fitted():
    X, y = blobs(per_class=40)
    return SINFClassifier(
        FrozenModel(small_cnn(), mean=(0.1,), std=(0.9,)),
        clusterer=SemanticClusterer(
            method="given", mapping=dict.fromkeys(range(5), "a") | {5: "b"}
        ),
        pruner=DCSPruner(criterion="dcs", schedule="linear", pruning_ratios=(0.5, 0.5)),
        route_layer="3",
        fallback="base",
        confidence_threshold=0.5,
        exit_threshold=None,
        random_state=0,
    ).fit(X, y)


def test_costs_of_the_branches_are_those_of_their_parts(fitted):
    network = fitted.network_
    example = torch.zeros(1, 1, 8, 8)
    h = network.prefix(network.normalise(example))
    costs = branch_costs(network, example)
    macs, parameters = costs["macs"], costs["parameters"]
    assert macs[0] == count_macs(network.subgraph(0), h)[0]
    assert macs[1] == parameters[1] == 0  # a cluster of one class needs no subgraph
    assert macs[2] == count_macs(network.rest, h)[0] > macs[0]
    assert parameters[2] == count_parameters(network.rest)
    assert len(macs) == 4 and macs[3] == parameters[3] == 0  # leaving is free
    # first convolution: 6 of 8 filters on 64 positions; second: 8 filters; router: 6 classes
    assert costs["shared_macs"] == 64 * 9 * 6 + 64 * 9 * 6 * 8 + 6 * network.router.weight.shape[1]


@pytest.mark.parametrize("exit_threshold", [2.0, 0.99])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_expected_costs_follow_the_mix(fitted, threshold, exit_threshold):
    X, y = blobs(per_class=20, seed=1)
    network = fitted.network_
    before = network.threshold
    network.threshold, network.exit_threshold = threshold, exit_threshold
    try:
        report = fitted.report(X, y, repeats=0)
        with torch.inference_mode():
            route = network.route(torch.as_tensor(X))
    finally:
        network.threshold, network.exit_threshold = before, 2.0
    costs = branch_costs(network, torch.as_tensor(X[:1]))
    leaves = (route.log_posterior.exp().amax(1) >= exit_threshold).numpy()
    unsure = (route.confidence < threshold).numpy() & ~leaves
    cluster = np.where(leaves, 3, np.where(unsure, 2, route.cluster.numpy()))
    assert report.fallback_share == pytest.approx(unsure.mean())
    assert report.exit_share == pytest.approx(leaves.mean())
    assert (exit_threshold > 1) or 0 < leaves.mean() < 1
    assert report.macs == pytest.approx(costs["shared_macs"] + costs["macs"][cluster].mean())
    shared = costs["shared_parameters"]
    assert report.active_parameters == pytest.approx(shared + costs["parameters"][cluster].mean())
    if threshold == 2.0 and exit_threshold > 1:
        assert report.fallback_share == 1.0
    assert np.isnan(report.time_saved) and "ms per batch" not in str(report)


def test_the_base_is_timed_in_the_form_of_the_routed_network(fitted):
    X, _ = blobs(per_class=5, seed=2)
    base = fitted.base_model_.module()
    before = {name: t.clone() for name, t in base.state_dict().items()}
    x = torch.as_tensor(X)
    fast = base_for_timing(fitted.network_, base, x)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), base((x - 0.1) / 0.9), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fast.modules())
    weights = [p for p in fast.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.is_contiguous(), name


def test_the_table_names_every_cluster_and_marks_what_has_no_subgraph(fitted):
    X, y = blobs(per_class=10, seed=3)
    report = fitted.report(X, y, repeats=2, latency_batch=16)
    lines = str(report).splitlines()
    (row,) = [line for line in lines if line.startswith("b ")]
    assert " - " in row and len(report.clusters) == 2
    assert np.isnan(report.clusters[1].subgraph) and not np.isnan(report.clusters[0].subgraph)
    assert any("ms per batch of 16" in line for line in lines)
    assert report.to_dict()["time_saved"] == report.time_saved
