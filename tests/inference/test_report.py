"""The report: its figures, its costs, and what it says in words."""

from __future__ import annotations

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from torch import nn

from sinfkit import DCSPruner, FrozenModel, RoutingOptions, SemanticClusterer, SINFClassifier
from sinfkit.graph import Latency, count_macs, count_parameters
from sinfkit.inference import Promise, PruningReport, SINFReport, base_for_timing, branch_costs


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
        random_state=0,
        options=RoutingOptions(confidence_threshold=0.5, exit_threshold=None),
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


@pytest.mark.parametrize("exit_threshold", [None, 0.99])
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
        network.threshold, network.exit_threshold = before, None
    costs = branch_costs(network, torch.as_tensor(X[:1]))
    leaves = (route.log_posterior.exp().amax(1) >= (exit_threshold or 2.0)).numpy()
    unsure = (route.confidence < threshold).numpy() & ~leaves
    cluster = np.where(leaves, 3, np.where(unsure, 2, route.cluster.numpy()))
    assert report.fallback_share == pytest.approx(unsure.mean())
    assert report.exit_share == pytest.approx(leaves.mean())
    alone = ~leaves & ~unsure & (route.cluster.numpy() == 1)  # one class, no subgraph
    assert report.alone_share == pytest.approx(alone.mean())
    shares = report.exit_share + report.alone_share + report.subgraph_share
    assert shares + report.fallback_share == pytest.approx(1)
    assert exit_threshold is None or 0 < leaves.mean() < 1
    assert report.macs == pytest.approx(costs["shared_macs"] + costs["macs"][cluster].mean())
    shared = costs["shared_parameters"]
    assert report.active_parameters == pytest.approx(shared + costs["parameters"][cluster].mean())
    if threshold == 2.0 and exit_threshold is None:
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
    assert "samples need no subgraph" not in str(report) or report.alone_share > 0


SIZES = {"base_macs": 1000, "macs": 400, "base_parameters": 90, "parameters": 40} | {
    "base_bytes": 360,
    "bytes": 160,
    "latency": Latency({"base": np.array([2.0, 4, 6]), "result": np.array([1.0, 2, 4])}),
    "latency_batch": 8,
    "promise": Promise(0.01, 0.9, True, 0.008),
}
ROUTED = {
    "oracle_accuracy": 0.97,
    "route_accuracy": 0.9,
    "base_route_accuracy": 0.95,
    "exit_share": 0.1,
    "alone_share": 0.0,
    "subgraph_share": 0.7,
    "fallback_share": 0.2,
    "fallback": "base",
    "active_parameters": 30.0,
    "route_layer": "features.7",
    "clusters": [],
}


def pruned(lost=6, gained=2, **changed):
    n, right = 1000, 900
    accuracy = (right - lost + gained) / n
    return PruningReport(right / n, accuracy, lost, gained, n, **(SIZES | changed))


def routed(**changed):
    return SINFReport(0.95, 0.945, 6, 1, 1000, **SIZES, **(ROUTED | changed))


@pytest.mark.parametrize(
    ("lost", "gained", "promise", "verdict"),
    [
        (6, 2, Promise(0.01, 0.9, True, 0.008), "certified: 0.8 points .*: kept"),
        (6, 2, Promise(0.01, 0.9, False, 0.02), "not certified .*: kept"),
        (60, 2, Promise(0.01, 0.9, True, 0.008), r"5.8 \[.*\]: EXCEEDED\.$"),
        (13, 2, Promise(0.01, 0.9, True, 0.008), "EXCEEDED, within what so few samples can tell"),
    ],
)
def test_the_promise_is_held_against_the_samples(lost, gained, promise, verdict):
    report = pruned(lost, gained, promise=promise)
    (line,) = [line for line in str(report).splitlines() if line.startswith("asked: at most 1.0")]
    assert re.search(verdict, line)
    assert report.kept == ("kept" in verdict)
    low, high = report.drop_interval
    assert low < report.accuracy_drop == (lost - gained) / 1000 < high


def test_what_does_not_apply_is_left_out():
    text = str(pruned(promise=None, latency=None))
    for word in ("asked", "ms per", "router", "cluster", "subgraph", "nan"):
        assert word not in text
    assert pruned(promise=None).kept is None
    text = str(routed(fallback_share=0.0, subgraph_share=0.9))
    assert "10.0% leave at the router, 90.0% run one subgraph." in text
    assert "base network" not in text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"exit_share": 0.97}, "leave at layer 'features.7': .* linear probe"),
        ({"fallback_share": 0.97}, "run the base network: nothing is saved"),
        ({"clusters": [None]}, "One cluster: nothing is routed"),
    ],
)
def test_degenerate_results_are_told_in_words(changed, words):
    assert re.search(words, " ".join(routed(**changed).remarks()))
    assert not re.search(words, " ".join(routed().remarks()))
    assert "nothing was gained" in str(pruned(macs=1000))


@pytest.mark.parametrize(
    ("threshold", "words"),
    [
        (0.0, "Of all samples 100.0% leave at the router.\nNearly all samples leave at layer"),
        (None, "need no subgraph|run one subgraph"),
    ],
)
def test_all_leave_or_none_does_and_a_fit_says_so(threshold, words):
    X, y = blobs(per_class=20)
    clf = SINFClassifier(
        FrozenModel(small_cnn()),
        clusterer=SemanticClusterer(
            method="given", mapping=dict.fromkeys(range(5), "a") | {5: "b"}
        ),
        pruner=DCSPruner(criterion="l1", schedule="linear", repair="none"),
        route_layer="3",
        random_state=0,
        device="cpu",
        options=RoutingOptions(exit_threshold=threshold),
    )
    text = str(clf.fit(X, y).report(X, y, repeats=0))
    assert re.search(words, text)
    assert (threshold is None) == ("leave at the router" not in text)
    for line in text.splitlines():
        if line.startswith("Of all samples"):
            assert " 0.0%" not in line


def test_times_are_compared_in_pairs():
    report = pruned()
    assert report.speedup == 2.0 and report.time_saved == 0.5
    low, high = report.speedup_interval
    assert (low, high) == (1.5, 2.0)
    assert "2.00 [1.50, 2.00] times as fast" in str(report)
    assert np.isnan(pruned(latency=None).speedup)


@pytest.mark.parametrize("latency", [SIZES["latency"], None])
def test_it_is_shown_in_a_notebook_and_as_one_picture(latency):
    report = pruned(latency=latency)
    page = report._repr_html_()
    assert page.count("<tr>") == page.count("</tr>") == len(report.rows()) + 1
    assert "&" not in page.replace("&lt;", "").replace("&amp;", "")
    figure = report.plot()
    labels = " ".join(axis.get_xlabel() for axis in figure.axes)
    assert "accuracy" in labels and "size" in labels
    assert ("time" in labels) == (latency is not None)
    plt.close(figure)


class Writing(nn.Module):
    """A network that writes into its samples, and wraps what it returns."""

    def __init__(self, way, wrap):
        super().__init__()
        self.way, self.wrap = way, wrap
        self.a, self.b, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.act = nn.LeakyReLU(0.3, inplace=True)

    def forward(self, x):
        if self.way == "sub":
            x.sub_(0.3).div_(0.5)
        elif self.way == "minus":
            x -= 0.3
        elif self.way == "module":
            x = self.act(x)
        scores = self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))
        return {"dict": {"logits": scores, "x": x}, "list": [scores]}.get(self.wrap, scores)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["sub", "minus", "module"])
@pytest.mark.parametrize("wrap", ["dict", "list", "none"])
@pytest.mark.parametrize("kind", ["pruner", "classifier"])
def test_a_base_that_writes_into_samples_or_wraps_its_answers_is_reported(way, wrap, kind):
    torch.manual_seed(0)
    network = Writing(way, wrap).eval()
    rng = np.random.default_rng(0)
    X = rng.normal(size=(64, 1, 6, 6)).astype(np.float32)
    before = X.copy()
    scores = network(torch.as_tensor(X.copy()))
    scores = scores["logits"] if wrap == "dict" else scores[0] if wrap == "list" else scores
    y = (scores - scores.mean(0)).argmax(1).numpy()
    if kind == "pruner":
        fitted = DCSPruner(network, budget=1.0, random_state=0)
    else:
        pruner = DCSPruner(budget=0.9)
        fitted = SINFClassifier(network, pruner=pruner, route_layer="a", random_state=0)
    report = fitted.fit(X, y).report(X, y, repeats=1)
    assert report.base_accuracy == pytest.approx((scores.argmax(1).numpy() == y).mean())
    assert report.accuracy == pytest.approx((fitted.predict(X) == y).mean())
    np.testing.assert_array_equal(X, before)
