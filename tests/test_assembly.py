"""The choices that SINFClassifier makes on held-out samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinfkit.assembly import Candidate, HeldOut, choose_cut, choose_weight, routed_answers
from sinfkit.graph import CutPoint


def candidate(name, route, accuracy, macs):
    return Candidate(CutPoint(name, name), route, accuracy, macs)


def test_the_earliest_cut_that_routes_well_is_taken():
    cuts = [candidate("a", 0.6, 0.9, 1), candidate("b", 0.8, 0.5, 3), candidate("c", 0.9, 0.9, 2)]
    assert choose_cut(cuts, 0.75, 0.8).cut.name == "b"


def test_otherwise_the_cheapest_that_is_accurate_enough_or_the_most_accurate():
    cuts = [candidate("a", 0.3, 0.7, 1), candidate("b", 0.5, 0.81, 3), candidate("c", 0.6, 0.85, 4)]
    with pytest.warns(UserWarning, match="No layer predicts the cluster with 75%"):
        assert choose_cut(cuts, 0.75, 0.8).cut.name == "b"
    with pytest.warns(UserWarning):
        assert choose_cut(cuts, 0.75, 0.99).cut.name == "c"


def held_out(router_noise, n=400, seed=0):
    """Four classes in two clusters; the subgraph is right but far too sure of itself."""
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % 4
    truth = np.eye(4)[codes]
    posterior = torch.softmax(
        torch.as_tensor(truth * 2 + router_noise * rng.normal(size=(n, 4))), 1
    )
    clusters = torch.tensor([0, 0, 1, 1])
    sums = torch.stack([posterior[:, :2].sum(1), posterior[:, 2:].sum(1)], 1)
    confidence, cluster = sums.max(1)
    logits = torch.as_tensor(20 * (truth + 0.5 * rng.normal(size=(n, 4))))
    return HeldOut(posterior.log(), cluster, confidence, logits), codes, clusters


def test_overconfident_subgraphs_are_cooled_down():
    held, codes, clusters = held_out(router_noise=1.0)
    weight, temperatures = choose_weight(held, codes, clusters, [0.0])
    assert weight == 0.0 and bool((temperatures > 1.5).all())


def test_a_useless_router_gets_no_weight_and_a_good_one_some():
    held, codes, clusters = held_out(router_noise=0.3)
    assert choose_weight(held, codes, clusters, [0.0, 0.5, 1.0])[0] > 0
    uniform = torch.full_like(held.log_posterior, 0.25).log()
    noise = uniform + torch.randn(uniform.shape, generator=torch.Generator().manual_seed(0))
    noisy = HeldOut(torch.log_softmax(noise, 1), held.cluster, held.confidence, held.logits / 8)
    assert choose_weight(noisy, codes, clusters, [0.0, 1.0])[0] == 0.0


def test_routed_answers_stay_in_the_cluster_that_was_sure():
    held, codes, clusters = held_out(router_noise=0.1)
    answers = routed_answers(held, clusters, torch.ones(2), 0.5)
    assert (clusters.numpy()[answers] == held.cluster.numpy()).mean() > 0.95
    assert (answers == codes).mean() > 0.8
