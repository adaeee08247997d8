"""The routed network: every sample gets its own branch's answer, whatever stands beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CLUSTERS, WIDTH, K, M, make_network
from hypothesis import given, settings
from hypothesis import strategies as st

from sinfkit.inference import SINFNetwork, own_classes


def by_hand(network, x):
    """One sample at a time, straight from the definition."""
    rows = []
    for sample in x:
        h = network.prefix((sample[None] - 0.1) / 2.0)
        log_r = network.router(h)[0]
        p = log_r.exp()
        mass = torch.stack([p[c == CLUSTERS].sum() for c in range(M)])
        unsure = float(mass.max()) < network.threshold
        answer = p.clone()
        if network.exit_threshold is not None and float(p.max()) >= network.exit_threshold:
            rows.append(answer)
            continue
        run = [int(mass.argmax())]
        if unsure and network.fallback == "top2":
            run = mass.topk(2).indices.tolist()
        if unsure and network.fallback == "base":
            rows.append(torch.softmax(network.rest(h)[0, network.outputs], 0))
            continue
        votes, weight = torch.zeros_like(p), torch.zeros_like(p)
        for c in run:
            inside = network.answered[c].nonzero()[:, 0]
            within = p[inside]
            if str(c) in network.subgraphs:
                z = network.subgraphs[str(c)](h)[0] / network.temperatures[c]
                joint = torch.softmax(z + network.router_weight * log_r[inside], 0)
                within = within.sum() * joint
            votes[inside] += mass[c] * within
            weight[inside] += mass[c]
        answer = torch.where(weight > 0, votes / weight, answer)
        rows.append(answer / answer.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("fallback", ["base", "top2", "none"])
@pytest.mark.parametrize("threshold", [0.0, 0.45, 1.1])
@pytest.mark.parametrize("answered", [None, "all", "some"])
@pytest.mark.parametrize("exit_threshold", [None, 0.4, 0.0])
def test_equals_the_definition(fallback, threshold, answered, exit_threshold):
    if answered is not None:
        foreign = torch.rand(M, K, generator=torch.Generator().manual_seed(4)) < 0.4
        answered = own_classes(CLUSTERS, M) | (foreign if answered == "some" else True)
    network = make_network(fallback, threshold, answered=answered, exit_threshold=exit_threshold)
    x = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(x), by_hand(network, x), atol=1e-6, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 25),
    fallback=st.sampled_from(["base", "top2", "none"]),
)
def test_order_and_batch_mates_do_not_matter(seed, n, fallback):
    network = make_network(fallback, dtype=torch.float64)
    rng = np.random.default_rng(seed)
    x = torch.as_tensor(rng.normal(size=(n, WIDTH)))
    whole = network(x)
    torch.testing.assert_close(whole.sum(1), torch.ones(n, dtype=torch.float64))
    order = torch.as_tensor(rng.permutation(n))
    torch.testing.assert_close(network(x[order]), whole[order])
    cut = int(rng.integers(0, n + 1))
    pieces = [network(part) for part in (x[:cut], x[cut:]) if len(part)]
    torch.testing.assert_close(torch.cat(pieces), whole)


def test_only_the_wanted_branches_run():
    network = make_network("none")
    x = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(2))
    route = network.route(x)
    seen = {}
    for name, module in network.subgraphs.items():
        module.register_forward_hook(
            lambda m, inputs, out, name=name: seen.__setitem__(name, len(inputs[0]))
        )
    network.rest.register_forward_hook(lambda *_: seen.__setitem__("base", True))
    network(x)
    expected = {str(c): int(n) for c, n in enumerate(torch.bincount(route.cluster)) if n}
    expected.pop("3", None)
    assert seen == expected


def test_what_leaves_at_the_router_runs_nothing_behind_it():
    network = make_network("base", threshold=0.9, exit_threshold=0.3)
    x = torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(2))
    route = network.route(x)
    leaves = route.log_posterior.exp().amax(1) >= 0.3
    assert 0 < int(leaves.sum()) < 30
    rows = []
    for module in [*network.subgraphs.values(), network.rest]:
        module.register_forward_hook(lambda m, inputs, out: rows.append(len(inputs[0])))
    out = network(x)
    in_cluster_of_one = (route.cluster == 3) & (route.confidence >= 0.9)
    assert sum(rows) == int((~leaves & ~in_cluster_of_one).sum())
    torch.testing.assert_close(out[leaves], route.log_posterior.exp()[leaves])


def test_a_batch_of_one_branch_is_not_copied():
    network = make_network("base", threshold=0.0)
    h = torch.randn(5, WIDTH)
    seen = []
    network.subgraphs["1"].register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    network.branch_logits(h, torch.ones(5, dtype=torch.int64))
    network.branch_logits(h, torch.tensor([1, 0, 1, 1, 2]))
    assert seen[0] is h
    torch.testing.assert_close(seen[1], h[[0, 2, 3]])


def test_logits_stand_in_the_order_of_the_samples():
    network = make_network()
    h = torch.randn(6, WIDTH)
    branch = torch.tensor([2, 0, 3, 1, 0, 2])
    logits = network.branch_logits(h, branch)
    expected = torch.zeros(6, K)
    for i, c in enumerate(branch.tolist()):
        if c != 3:
            expected[i, network.answered[c]] = network.subgraph(c)(h[i : i + 1])[0]
    torch.testing.assert_close(logits, expected)


def test_a_given_route_replaces_the_predicted_one():
    network = make_network("base", threshold=0.9)
    x = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(3))
    h = network.prefix(network.normalise(x))
    route = network.route_features(h)
    truth = torch.arange(9) % 3
    forced = replace(route, cluster=truth, confidence=torch.ones(9))
    out = network.process(h, forced)
    for c in range(3):
        inside = c == CLUSTERS
        rows = truth == c
        torch.testing.assert_close(
            out[rows][:, ~inside], route.log_posterior.exp()[rows][:, ~inside]
        )


def test_empty_single_and_all_fallback_batches():
    network = make_network("base", threshold=2.0)
    assert network(torch.zeros(0, WIDTH)).shape == (0, K)
    x = torch.randn(4, WIDTH)
    expected = torch.softmax(
        network.rest(network.prefix(network.normalise(x)))[:, network.outputs], 1
    )
    torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(network(x[:1]), expected[:1])


def test_parameters_are_checked():
    with pytest.raises(ValueError, match="fallback must be one of"):
        make_network("nothing")
    network = make_network()
    with pytest.raises(ValueError, match="needs the rest"):
        SINFNetwork(
            network.normalise,
            network.prefix,
            network.router,
            list(network.subgraphs.values()),
            None,
            CLUSTERS,
            network.outputs,
            network.temperatures,
            router_weight=0.5,
            threshold=0.5,
            fallback="base",
        )
