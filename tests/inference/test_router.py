"""Route predictor, fusion and threshold."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinfkit.inference import (
    RoutePredictor,
    choose_exit,
    choose_threshold,
    cluster_posterior,
    fit_route_predictor,
    fuse,
)


def _posterior(rng, n, k):
    return torch.log_softmax(torch.as_tensor(rng.normal(size=(n, k)) * 2), 1)


def test_cluster_posterior_sums_classes():
    log_p = torch.tensor([[0.5, 0.2, 0.3]]).log()
    out = cluster_posterior(log_p, torch.tensor([1, 0, 1]), 2)
    torch.testing.assert_close(out, torch.tensor([[0.2, 0.8]]))


def test_fuse_by_hand():
    log_router = torch.tensor([[0.4, 0.1, 0.5]]).log()
    logits = torch.tensor([[1.0, 3.0, 99.0]]).log()
    members = torch.tensor([[True, True, False]])
    out = fuse(log_router, logits, members, 1.0)
    # within the cluster: 1 * 0.4 against 3 * 0.1, sharing its mass of one half
    torch.testing.assert_close(out, torch.tensor([[0.5 * 4 / 7, 0.5 * 3 / 7, 0.5]]))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 7), weight=st.floats(0, 2))
def test_fuse_sums_to_one_and_keeps_the_cluster_mass(seed, k, weight):
    rng = np.random.default_rng(seed)
    log_router = _posterior(rng, 5, k)
    members = torch.as_tensor(rng.random((5, k)) < 0.5)
    members[:, 0] = True
    out = fuse(log_router, torch.as_tensor(rng.normal(size=(5, k))), members, weight)
    torch.testing.assert_close(out.sum(1), torch.ones(5, dtype=out.dtype))
    mass = (log_router.exp() * members).sum(1)
    torch.testing.assert_close((out * members).sum(1), mass)
    assert bool((out > 0).all())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), target=st.floats(0, 1))
def test_threshold_is_the_smallest_that_reaches_the_target(seed, n, target):
    rng = np.random.default_rng(seed)
    confidence = np.round(rng.random(n), 1)  # with ties
    routed, fallback = rng.random(n) < 0.5, rng.random(n) < 0.7
    threshold = choose_threshold(confidence, routed, fallback, target=target)

    def accuracy(t):
        return np.where(confidence < t, fallback, routed).mean()

    grid = np.concatenate(([0.0], np.unique(confidence) + 1e-6))
    grid = grid[grid <= 1]
    reached = [t for t in grid if accuracy(t) >= target - 1e-12]
    if reached:
        assert accuracy(threshold) >= target - 1e-12
        assert (confidence < threshold).sum() == (confidence < min(reached)).sum()
    else:
        best = max(grid, key=lambda t: (accuracy(t), -t))

        def level(t):  # not more than one paired standard error below the best
            a, b = (np.where(confidence < u, fallback, routed).astype(float) for u in (best, t))
            return (a - b).mean() <= (a - b).std() / n**0.5 + 1e-12

        smallest = min(t for t in grid if level(t))
        assert (confidence < threshold).sum() == (confidence < smallest).sum()


def test_route_predictor_learns_and_its_penalty_is_held_out():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 12)) * 2
    y = np.arange(400) % 4
    x = torch.as_tensor(centres[y] + rng.normal(size=(400, 12)), dtype=torch.float32)
    fit = fit_route_predictor(x[:300], y[:300], x[300:], y[300:], pool_size=1)
    assert (fit.log_posterior.argmax(1).numpy() == y[300:]).mean() > 0.9
    assert fit.predictor.weight.dtype == torch.float32
    again = fit.predictor(x[300:])
    torch.testing.assert_close(again, fit.log_posterior, atol=1e-5, rtol=1e-5)
    # pure noise: the strongest penalty wins
    noise = torch.as_tensor(rng.normal(size=(400, 12)), dtype=torch.float32)
    random = fit_route_predictor(noise[:300], y[:300], noise[300:], y[300:], pool_size=1)
    assert random.penalty > fit.penalty


def test_predictor_pools_maps_and_stays_in_float32():
    predictor = RoutePredictor(torch.randn(3, 8), torch.zeros(3), 2)
    h = torch.randn(5, 2, 6, 6)
    full = predictor(h)
    assert full.shape == (5, 3)
    assert predictor(h.to(torch.bfloat16)).dtype == torch.float32
    pooled = torch.nn.functional.adaptive_avg_pool2d(h, 2).flatten(1)
    torch.testing.assert_close(full, torch.log_softmax(pooled @ predictor.weight.T, 1))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), target=st.floats(0, 1))
def test_as_many_leave_as_the_target_allows(seed, n, target):
    """Against all thresholds there are, tried one by one."""
    rng = np.random.default_rng(seed)
    confidence = rng.integers(1, 8, n) / 8
    early, later = rng.random(n) < 0.5, rng.random(n) < 0.7

    def accuracy(threshold):
        return np.where(confidence >= threshold, early, later).mean()

    threshold = choose_exit(confidence, early, later, target=target)
    threshold = 2.0 if threshold is None else threshold
    kept = min(target, accuracy(2.0))
    assert accuracy(threshold) >= kept - 1e-9
    possible = [t for t in (*np.unique(confidence), 2.0) if accuracy(t) >= kept - 1e-12]
    assert (confidence >= threshold).sum() == (confidence >= min(possible)).sum()
