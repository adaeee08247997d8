"""Who leaves, who falls back, what is kept: held to loops over images, and to the exact bound."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinfkit.promise import certify, count_discordant
from sinfkit.pruning import Recipe
from sinfkit.routing import Gates, RoutingConfig, Signals, careful_to_bold, judge, let_through

RECIPE = Recipe(criterion="l1")
EXITS = (None, 0.0, 0.3, 0.7, 1.0)


def signals(seed, n=40, weighted=False, falls_back=True, shared=0.2, good=0.9):
    """Made-up images of which those that are surer are right more often."""
    rng = np.random.default_rng(seed)
    sure = rng.uniform(0.2, 1, n)
    routed = rng.uniform(size=n) < good
    return Signals(
        base=rng.uniform(size=n) < 0.95,
        sure=np.log(sure),
        early=rng.uniform(size=n) < sure,
        confidence=rng.uniform(0.3, 1, n),
        routed=routed,
        fallback=rng.uniform(size=n) < 0.95 if falls_back else routed,
        routed_cost=rng.choice([0.1, 0.3], n),
        fallback_cost=np.full(n, 0.8),
        shared_cost=shared,
        weight=rng.integers(1, 4, n).astype(float) if weighted else None,
    )


def config(**parameters):
    # One threshold is searched, not pairs of both: a path of some dozen points.
    fallback = parameters.pop("fallback", "base")
    parameters = {"exit_threshold": "auto" if fallback == "none" else 0.7} | parameters
    return RoutingConfig(subgraphs=RECIPE, prefix=RECIPE, fallback=fallback, **parameters)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    exit=st.sampled_from(EXITS),
    confidence=st.floats(0, 1),
    weighted=st.booleans(),
)
def test_passage_is_that_of_a_loop_over_images(seed, exit, confidence, weighted):
    s = signals(seed, weighted=weighted)
    found = let_through(s, Gates(exit, confidence))
    lost, cost, left, fell, total = 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(len(s.sure)):
        w = 1.0 if s.weight is None else s.weight[i]
        leaves = exit is not None and s.sure[i] >= math.log(max(exit, 1e-30))
        falls = not leaves and s.confidence[i] < confidence
        right = s.early[i] if leaves else s.fallback[i] if falls else s.routed[i]
        assert (found.leaves[i], found.falls[i], found.right[i]) == (leaves, falls, right)
        own = 0.0 if leaves else s.fallback_cost[i] if falls else s.routed_cost[i]
        lost += w * (float(s.base[i]) - float(right))
        cost, left, fell, total = cost + w * own, left + w * leaves, fell + w * falls, total + w
    assert found.drop == pytest.approx(lost / total, abs=1e-12)
    assert found.cost == pytest.approx(s.shared_cost + cost / total)
    assert found.exit_share == pytest.approx(left / total)
    assert found.fallback_share == pytest.approx(fell / total)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), exit=st.sampled_from(EXITS), confidence=st.sampled_from([0.0, 0.6])
)
def test_whole_weights_are_repeats(seed, exit, confidence):
    s = signals(seed, weighted=True)
    times = s.weight.astype(int)
    arrays = ("base", "sure", "early", "confidence", "routed", "fallback")
    arrays += ("routed_cost", "fallback_cost")
    twice = replace(s, weight=None, **{k: np.repeat(getattr(s, k), times) for k in arrays})
    a, b = (let_through(x, Gates(exit, confidence)) for x in (s, twice))
    for name in ("exit_share", "fallback_share", "drop", "drop_error", "cost"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-12)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), fallback=st.sampled_from(["none", "base"]))
def test_no_point_of_the_path_is_dominated(seed, fallback):
    networks = [
        signals(
            [seed, i], falls_back=fallback != "none", shared=0.3 - 0.08 * i, good=0.96 - 0.05 * i
        )
        for i in range(3)
    ]
    path = careful_to_bold(networks, config(fallback=fallback, max_accuracy_drop=0.05))
    cost = np.array([point.passage.cost for point in path])
    safe = np.array([point.passage.drop + point.passage.drop_error for point in path])
    assert (np.diff(cost) < 0).all()  # each step is cheaper
    assert (np.diff(safe) >= 0).all()  # and bolder
    for point in path[1:]:
        assert point.passage.drop - point.passage.drop_error <= 0.05 + 1e-12
    # The first is as safe as any.
    everything = [
        let_through(s, Gates(exit, confidence))
        for s in networks
        for exit in ((None,) if fallback == "none" else (0.7,))
        for confidence in ((0.0,) if fallback == "none" else (0.0, 1.0))
    ]
    assert safe[0] <= min(p.drop + p.drop_error for p in everything) + 1e-12


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    limit=st.sampled_from([0.02, 0.05, 0.2]),
    weighted=st.booleans(),
)
def test_what_is_certified_keeps_the_exact_bound(seed, limit, weighted):
    choosing = [signals([seed, i], 60, shared=0.3 - 0.1 * i, good=0.97) for i in range(2)]
    certifying = [
        signals([seed, i, 1], 300, weighted, shared=0.3 - 0.1 * i, good=0.97) for i in range(2)
    ]
    certifying[1] = replace(
        certifying[1], weight=certifying[0].weight, base=certifying[0].base
    )  # the same images
    asked = config(max_accuracy_drop=limit)
    verdict, within = judge(choosing, certifying, asked)
    # The passage is that of the point kept, on the images that certify.
    s = certifying[verdict.point.network]
    passage = let_through(s, verdict.point.gates)
    np.testing.assert_array_equal(passage.right, verdict.passage.right)
    counts = count_discordant(s.base, passage.right, s.weight)
    own = certify(*counts, limit, asked.confidence)
    if verdict.certificate.certified:
        assert within and own.certified and verdict.certificate.bound <= limit
        # So were all that are more careful.
        for point in careful_to_bold(choosing, asked):
            if (point.network, point.gates) == (verdict.point.network, verdict.point.gates):
                break
            other = certifying[point.network]
            right = let_through(other, point.gates).right
            assert certify(
                *count_discordant(other.base, right, other.weight), limit, asked.confidence
            ).certified
    elif within:
        assert verdict.drop <= limit + 1e-12
        assert verdict.point.passage.drop <= limit + 1e-12


def test_nothing_is_certified_where_the_first_fails():
    # Right everywhere, but too few to show it.
    good = signals(0, 50)
    good = replace(good, base=good.base | True, routed=good.routed | True)
    verdict, within = judge([good], [good], config(fallback="none", exit_threshold=None))
    assert within and not verdict.certificate.certified and verdict.drop == 0
