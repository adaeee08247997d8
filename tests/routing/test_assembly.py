"""The weights and temperatures that are chosen on held-out samples."""

from __future__ import annotations

import numpy as np
import torch

from sinfkit.inference import own_classes
from sinfkit.routing import HeldOut, choose_weight, routed_answers


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
    answered = own_classes(clusters, 2)
    return HeldOut(posterior.log(), cluster, confidence, logits), codes, answered


def test_overconfident_subgraphs_are_cooled_down():
    held, codes, answered = held_out(router_noise=1.0)
    weight, temperatures = choose_weight(held, codes, answered, [0.0])
    assert weight == 0.0 and bool((temperatures > 1.5).all())


def test_a_useless_router_gets_no_weight_and_a_good_one_some():
    held, codes, answered = held_out(router_noise=0.3)
    assert choose_weight(held, codes, answered, [0.0, 0.5, 1.0])[0] > 0
    uniform = torch.full_like(held.log_posterior, 0.25).log()
    noise = uniform + torch.randn(uniform.shape, generator=torch.Generator().manual_seed(0))
    noisy = HeldOut(torch.log_softmax(noise, 1), held.cluster, held.confidence, held.logits / 8)
    assert choose_weight(noisy, codes, answered, [0.0, 1.0])[0] == 0.0


def test_routed_answers_stay_in_the_cluster_that_was_sure():
    held, codes, answered = held_out(router_noise=0.1)
    answers = routed_answers(held, answered, torch.ones(2), 0.5)
    assert answered[held.cluster].numpy()[np.arange(len(answers)), answers].mean() > 0.95
    assert (answers == codes).mean() > 0.8


def test_subgraphs_of_all_classes_win_back_what_was_routed_wrongly():
    held, codes, answered = held_out(router_noise=2.0)
    wrong = ~answered[held.cluster, torch.as_tensor(codes)]
    assert 0.1 < float(wrong.double().mean()) < 0.5
    own, every = (
        routed_answers(held, some, torch.ones(2), 0.0) == codes
        for some in (answered, torch.ones_like(answered))
    )
    assert own[wrong].mean() < 0.3 and every[wrong].mean() > 0.7
    # Temperatures are then fitted on all samples, those on the wrong route too.
    weight, temperatures = choose_weight(held, codes, torch.ones_like(answered), [0.0])
    assert weight == 0.0 and bool((temperatures > 1.5).all())
