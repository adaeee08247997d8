import itertools
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sinfkit.promise import (
    Discordant,
    certify,
    count_discordant,
    drop_interval,
    drop_upper_bound,
    fixed_sequence,
    images_needed,
    p_value,
)


@st.composite
def counts(draw, most=400):
    n = draw(st.integers(1, most))
    lost = draw(st.integers(0, n))
    return lost, draw(st.integers(0, n - lost)), n


def refuting_region(n, limit, confidence, most):
    """For each number of discordant images, the most lost ones that still certify."""
    found, lost = [], -1
    for m in range(most + 1):
        lost = min(lost + 1, m)
        while lost >= 0 and p_value(lost, m - lost, n, limit, confidence) > 1 - confidence:
            lost -= 1
        found.append(lost)
    return np.array(found)


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.99])
@pytest.mark.parametrize(("n", "limit"), [(20, 0.1), (40, 0.05), (150, 0.0), (300, 0.01)])
def test_certifying_too_large_a_drop_is_rare_over_all_outcomes(n, limit, confidence):
    # No draws: the probability of every outcome is added up, at a drop of exactly the limit.
    most = n if n < 100 else 60
    region = refuting_region(n, limit, confidence, most)
    ms = np.arange(most + 1)
    for discordant in np.linspace(limit + 1e-6, 1 if n < 100 else 0.12, 25):
        given_m = stats.binom.cdf(region, ms, min(1, (discordant + limit) / (2 * discordant)))
        wrong = (stats.binom.pmf(ms, n, discordant) * given_m).sum()
        assert wrong <= 1 - confidence + 1e-9


@pytest.mark.parametrize("limit", [0.01, 0.03])
def test_the_test_is_nearly_as_sharp_as_it_may_be(limit):
    # A test that never certifies would be valid too.
    n, discordant = 1000, 0.06
    ms = np.arange(110)
    region = refuting_region(n, limit, 0.9, 109)
    at_limit = stats.binom.cdf(region, ms, (discordant + limit) / (2 * discordant))
    assert (stats.binom.pmf(ms, n, discordant) * at_limit).sum() > 0.09


@pytest.mark.parametrize(("lost", "n"), [(0, 216), (0, 20), (1, 100), (4, 500), (30, 1000)])
def test_without_gains_it_is_clopper_pearson(lost, n):
    exact = stats.beta.isf(0.1, lost + 1, n - lost)
    bound = drop_upper_bound(lost, 0, n)
    assert exact - 1e-6 <= bound <= exact * 1.01


def test_216_images_without_a_disagreement_resolve_a_point():
    assert round(100 * drop_upper_bound(0, 0, 216), 2) == 1.06
    assert drop_upper_bound(0, 0, 216) >= 1 - 0.1 ** (1 / 216)


@settings(max_examples=30, deadline=None)
@given(counts(), st.sampled_from([0.6, 0.9, 0.95, 0.999]))
def test_bound_and_p_value_are_one_test(data, confidence):
    lost, gained, n = data
    bound = drop_upper_bound(lost, gained, n, confidence)
    assert (lost - gained) / n <= bound + 1e-6 <= 1 + 1e-6
    if bound < 1 - 1e-3:
        assert p_value(lost, gained, n, bound + 1e-3, confidence) <= 1 - confidence + 1e-9
    if bound > -1 + 1e-3:
        assert p_value(lost, gained, n, bound - 1e-3, confidence) > 1 - confidence - 1e-9


@settings(max_examples=30, deadline=None)
@given(counts(), st.floats(-0.2, 0.5), st.floats(0, 0.2))
def test_p_value_falls_with_the_limit(data, limit, more):
    assert p_value(*data, limit + more) <= p_value(*data, limit) + 1e-4


@settings(max_examples=25, deadline=None)
@given(counts())
def test_gains_never_hurt_beyond_a_count(data):
    # Beside Clopper-Pearson on the lost images alone, which is valid but blind to gains.
    lost, _, n = data
    assert drop_upper_bound(*data) <= drop_upper_bound(lost, 0, n) + 1e-6


def test_many_images_are_fast_enough_to_walk_and_agree_with_the_normal_limit():
    lost, gained, n = 1500, 1400, 50_000
    normal = (lost - gained + stats.norm.isf(0.1) * math.sqrt(lost + gained)) / n
    assert drop_upper_bound(lost, gained, n) == pytest.approx(normal, rel=0.02)


def test_degenerate_counts():
    assert drop_upper_bound(0, 0, 0) == 1
    assert p_value(0, 0, 0, 0.5) == 1
    assert drop_upper_bound(10, 0, 10) == 1
    assert drop_upper_bound(0, 100, 100) < -0.9
    assert p_value(0, 0, 50, 0.0) == 1  # no drop at all cannot be shown by agreement
    assert not certify(0, 0, 0, 0.01).certified
    assert math.isnan(certify(0, 0, 0, 0.01).drop)
    assert -1 <= drop_upper_bound(3, 1, 40, confidence=5e-324) <= 0.1


@pytest.mark.parametrize(
    "call",
    [
        lambda: p_value(-1, 0, 5, 0.1),
        lambda: p_value(3, 3, 5, 0.1),
        lambda: p_value(0, 0, 5, 2.0),
        lambda: p_value(0, 0, 5, float("nan")),
        lambda: drop_upper_bound(0, 0, 5, confidence=1.0),
        lambda: drop_upper_bound(0, 0, 5, confidence=0.0),
        lambda: drop_interval(9, 0, 5),
        lambda: images_needed(0.01, rate_lost=0.7, rate_gained=0.7),
        lambda: count_discordant([1, 0], [1]),
        lambda: count_discordant([1], [1], [-1]),
        lambda: count_discordant([1], [1], [math.inf]),
    ],
)
def test_impossible_arguments_are_refused(call):
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize(
    "data", [(0, 0, 500), (1, 0, 500), (1, 0, 300), (9, 9, 500), (0, 0, 3), (7, 0, 100)]
)
def test_certificate_agrees_with_its_own_numbers(data):
    certificate = certify(*data, limit=0.01)
    assert certificate.certified == (certificate.bound <= 0.01)
    assert certificate.certified == (p_value(*data, 0.01) <= 0.1)
    assert ("not certified" in str(certificate)) == (not certificate.certified)
    assert str(certificate).startswith("asked at most 1.0, ")


def test_a_certificate_never_prints_less_than_it_holds():
    certificate = certify(1, 0, 500, limit=0.01)
    printed = float(str(certificate).split("certified ")[1].split(" ")[0])
    assert 0 <= printed - 100 * certificate.bound <= 0.1


def test_walk_stops_at_the_first_that_fails_and_asks_for_no_more():
    tried = []

    def candidates():
        for counts in [(0, 0, 500), (1, 0, 500), (20, 0, 500), (0, 0, 500)]:
            tried.append(counts)
            yield counts

    index, certificate = fixed_sequence(candidates(), 0.01)
    assert index == 1
    assert len(tried) == 3
    # It stopped at a bolder one: what holds is the limit.
    assert certificate.certified
    assert certificate.bound == 0.01
    assert (certificate.lost, certificate.gained, certificate.n_images) == (1, 0, 500)


def test_walk_to_the_end_keeps_the_bound_of_the_last():
    index, certificate = fixed_sequence([(0, 0, 500), (1, 0, 500)], 0.01)
    assert index == 1
    assert certificate == certify(1, 0, 500, 0.01)


def test_walk_that_cannot_start_tells_why():
    index, certificate = fixed_sequence([(5, 0, 100), (0, 0, 1000)], 0.01)
    assert index is None
    assert not certificate.certified
    assert certificate.n_images == 100
    assert fixed_sequence([], 0.01) == (None, None)


def _outcomes(n, kinds):
    """All ways in which `n` images can be of `kinds` kinds."""
    for bars in itertools.combinations(range(n + kinds - 1), kinds - 1):
        yield np.diff([-1, *bars, n + kinds - 1]) - 1


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    kinds=st.lists(
        st.tuples(*[st.sampled_from([-1, 0, 1])] * 4), min_size=2, max_size=3, unique=True
    ),
    seed=st.integers(0, 10_000),
    limit=st.sampled_from([0.0, 0.1, 0.3]),
    n=st.integers(4, 12),
)
def test_the_walk_errs_no_more_often_than_said_whatever_the_losses(kinds, seed, limit, n):
    # An image is of one of some kinds: on it, each of four candidates loses (1), gains (-1) or
    # neither. Their losses may rise, fall, or hang on each other in any way. No draws: the
    # probability of every outcome in which too large a loss is certified is added up.
    kinds = np.array(kinds)
    shares = np.random.default_rng(seed).dirichlet(np.full(len(kinds), 0.7))
    true = shares @ kinds
    confidence, wrong = 0.8, 0.0
    for numbers in _outcomes(n, len(kinds)):
        walk = [
            (int(numbers[kinds[:, j] > 0].sum()), int(numbers[kinds[:, j] < 0].sum()), n)
            for j in range(kinds.shape[1])
        ]
        index, certificate = fixed_sequence(walk, limit, confidence)
        if index is not None and true[index] >= limit:
            assert certificate.certified
            wrong += stats.multinomial.pmf(numbers, n, shares)
    assert wrong <= 1 - confidence + 1e-9


@pytest.mark.parametrize("limit", [0.005, 0.01, 0.02])
def test_images_needed_is_exact_without_disagreement(limit):
    n = images_needed(limit)
    assert drop_upper_bound(0, 0, n) <= limit < drop_upper_bound(0, 0, n - 1)
    assert abs(n - math.log(0.1) / math.log(1 - limit)) < 2


def test_images_needed_certify_at_the_expected_counts():
    lost, gained = 0.02, 0.015
    n = images_needed(0.01, 0.9, lost, gained)
    assert certify(math.ceil(n * lost), math.floor(n * gained), n, 0.01).certified
    assert images_needed(0.01, 0.9, 0.02, 0.01) is None
    assert images_needed(0.01, 0.9, 0.03, 0.02) is None  # whose difference is below 0.01 in binary
    assert images_needed(0.0) is None
    assert images_needed(0.0001, 0.9, 0.05, 0.05) > 10**6


def test_nobody_is_asked_for_millions_of_images():
    nearly = certify(lost=10_001, gained=0, n=1_000_000, limit=0.01002)
    assert not nearly.certified and nearly.images_needed is None
    assert "no number would do" in str(nearly)
    assert certify(lost=9_000, gained=0, n=1_000_000, limit=0.01).certified


@pytest.mark.parametrize(
    ("lost", "gained", "n"), [(9, 3, 100), (0, 0, 100), (0, 5, 60), (5, 0, 5), (0, 5, 5), (1, 0, 8)]
)
def test_drop_interval_is_the_score_interval(lost, gained, n):
    low, high = drop_interval(lost, gained, n)
    assert -1 <= low <= (lost - gained) / n <= high <= 1
    z = stats.norm.isf(0.025)
    for end, edge in ((low, -1), (high, 1)):
        if abs(end - edge) < 1e-6:
            continue
        # The likeliest share of gained images at this drop, by brute force.
        share = np.linspace(max(0, -end), (1 - end) / 2, 400_001)[1:-1]
        likelihood = (
            lost * np.log(np.maximum(share + end, 1e-12))
            + gained * np.log(share)
            + (n - lost - gained) * np.log(1 - 2 * share - end)
        )
        best = share[likelihood.argmax()]
        variance = n * (2 * best + end - end**2)
        assert abs(lost - gained - n * end) / math.sqrt(variance) == pytest.approx(z, rel=1e-2)


def test_drop_interval_swaps_with_its_sides():
    low, high = drop_interval(8, 3, 200)
    assert drop_interval(3, 8, 200) == pytest.approx((-high, -low))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_weights_count_draws_not_size(seed, scale):
    rng = np.random.default_rng(seed)
    base, ours = rng.integers(0, 2, (2, 60))
    plain = count_discordant(base, ours)
    assert count_discordant(base, ours, np.full(60, scale)) == plain
    # A weight of zero leaves an image out.
    kept = rng.integers(0, 2, 60)
    kept[0] = 1
    masked = count_discordant(base, ours, kept * scale)
    assert masked == count_discordant(base[kept > 0], ours[kept > 0])
    # No weights make more images, or better counts, than there are.
    weighted = count_discordant(base, ours, rng.uniform(0, 1, 60))
    assert weighted.n_images <= 60
    assert weighted.lost + weighted.gained <= weighted.n_images


def test_no_weight_at_all_certifies_nothing():
    assert count_discordant([1, 1], [1, 0], [0, 0]) == Discordant(0, 0, 0)
    assert count_discordant([], []) == Discordant(0, 0, 0)


@pytest.mark.parametrize("n", [200, 800])
def test_weighted_promise_holds_for_the_weighted_loss(n):
    # Two kinds of images; the rare kind weighs five times as much and is the one that suffers.
    rng = np.random.default_rng(n)
    rare, lost_rare, gained = 0.1, 0.06, 0.01
    weighted = 5 * rare / (5 * rare + 1 - rare)
    limit = weighted * lost_rare - gained
    draws, wrong = 300, 0
    for _ in range(draws):
        is_rare = rng.uniform(size=n) < rare
        u = rng.uniform(size=n)
        lost = is_rare & (u < lost_rare)
        gain = u > 1 - gained
        data = count_discordant(~gain, ~lost, np.where(is_rare, 5.0, 1.0))
        wrong += p_value(*data, limit) <= 0.1
    assert wrong <= stats.binom.isf(1e-6, draws, 0.1)


@pytest.fixture(scope="module")
def simulation():
    script = Path(__file__).parents[1] / "examples" / "benchmarks" / "promise_simulation.py"
    return runpy.run_path(str(script))


def test_walks_keep_the_promise_where_the_loss_is_known(simulation, tmp_path):
    out = tmp_path / "promise.csv"
    rows = simulation["main"](
        ["--draws", "400", "--sizes", "250", "600", "--limit", "0.02", "--out", str(out)]
    )
    assert len(out.read_text().splitlines()) == 1 + len(rows)
    for row in rows:
        # Were the chance of a wrong certificate 10 %, more than this come once in a million.
        assert row["exceeds"] <= stats.binom.isf(1e-6, 400, 0.1) / 400
    # The check has teeth: the choice by the raw mean is caught everywhere.
    assert all(row["raw_exceeds"] > 0.2 for row in rows)
    assert max(row["speed"] / row["raw_speed"] for row in rows if row["family"] == "exits") > 0.7


def test_the_simulation_walks_as_the_package_does(simulation):
    rng = np.random.default_rng(0)
    certifies = simulation["Certifies"](400, 0.02, 0.9)
    for _ in range(15):
        lost = np.sort(rng.integers(0, 12, 6))
        gained = rng.integers(0, 6, 6)
        index, _ = fixed_sequence(zip(lost, gained, [400] * 6, strict=True), 0.02)
        walked = np.logical_and.accumulate(certifies(lost, gained)).sum() - 1
        assert walked == (-1 if index is None else index)
