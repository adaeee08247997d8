"""Scores of single filters from the classes' means and variances."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinfkit.criteria import discriminant_information, hellinger, max_mean_discrepancy
from sinfkit.criteria import separability as separability

SCORES = [getattr(separability, name) for name in separability.__all__]
MOMENTS = [
    s for s in SCORES if s not in (hellinger, discriminant_information, max_mean_discrepancy)
]


def activations(n=60, n_filters=5, n_cells=1, k=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % k
    means = torch.randn(k, n_filters, n_cells, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, n_filters, n_cells, generator=generator, dtype=torch.float64)
    sizes = torch.rand(n_filters, 1, generator=generator, dtype=torch.float64) + 0.1
    return (means[y] + noise) * sizes, y


def by_hand(name, a, b):
    """One class against the rest, for one column."""
    m, n = a.mean() - b.mean(), len(a)
    u, v = a.var(), b.var()
    return {
        "fisher_ratio": m**2 / (u + v),
        "abs_snr": abs(m) / (u**0.5 + v**0.5),
        "t_statistic": abs(m) / (u / n + v / len(b)) ** 0.5,
        "sym_div": 0.5 * (u / v + v / u) + 0.5 * m**2 / (u + v) - 1,
        "j_divergence": 0.5 * (u / v + v / u) + 0.5 * m**2 * (1 / u + 1 / v) - 1,
    }[name]


@pytest.mark.parametrize("score", MOMENTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("n_cells", [1, 4])
def test_one_against_the_rest_is_averaged_over_classes_and_cells(score, n_cells):
    x, y = activations(n_cells=n_cells)
    columns, labels = x.numpy(), y.numpy()
    expected = [
        np.mean(
            [
                by_hand(score.__name__, columns[labels == c, j, s], columns[labels != c, j, s])
                for c in range(3)
                for s in range(n_cells)
            ]
        )
        for j in range(5)
    ]
    np.testing.assert_allclose(score(x, y).numpy(), expected, rtol=1e-9)


def test_rounding_is_no_variance():
    y = torch.arange(40) % 2
    x = torch.full((40, 2), 0.1, dtype=torch.float64)
    x[:, 1] += torch.arange(40) * 0.3
    x[0:4, 0] = 7.7  # two of each class
    shifted = separability.hellinger(x * 3 + 1 / 3, y)
    torch.testing.assert_close(shifted, separability.hellinger(x, y))
    x[:, 0] = 0.1 * y
    assert separability.hellinger(x * 3 + 1 / 3, y)[0] == 1.0


def test_hellinger_is_the_closest_pair():
    x, y = activations(k=4)
    expected = []
    for column in x[:, :, 0].T.numpy():
        pairs = []
        for a, b in itertools.combinations(range(4), 2):
            p, q = column[y.numpy() == a], column[y.numpy() == b]
            total = p.var() + q.var()
            overlap = np.sqrt(2 * p.std() * q.std() / total)
            pairs.append(1 - overlap * np.exp(-((p.mean() - q.mean()) ** 2) / (4 * total)))
        expected.append(min(pairs))
    np.testing.assert_allclose(hellinger(x, y).numpy(), expected, rtol=1e-9)
    constants = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0], [1.0, 3.0]])
    assert hellinger(constants, torch.tensor([0, 0, 1, 1])).tolist() == [0.0, 1.0]


def test_discriminant_information_by_hand():
    x, y = activations(n_cells=4)
    for j, found in enumerate(discriminant_information(x, y, ridge=1e-12)):
        rows = (x[:, j] - x[:, j].mean(0)).numpy()
        means = np.stack([rows[y.numpy() == c].mean(0) for c in range(3)])
        between = 20 * means.T @ means
        expected = np.trace(np.linalg.solve(rows.T @ rows, between))
        assert float(found) == pytest.approx(expected, rel=1e-6)


def test_max_mean_discrepancy_by_hand_and_on_a_part():
    x, y = activations(n=30, n_filters=2)
    for j, found in enumerate(max_mean_discrepancy(x, y)):
        column = x[:, j, 0].numpy()
        distance = abs(column[:, None] - column)
        positive = np.sort(distance[distance > 0])
        median = positive[(len(positive) - 1) // 2]  # torch takes the lower of the middle two
        kernel = np.exp(-0.5 * (distance / median) ** 2)
        values = []
        for c in range(3):
            own = y.numpy() == c
            within = kernel[own][:, own].mean() + kernel[~own][:, ~own].mean()
            values.append(within - 2 * kernel[own][:, ~own].mean())
        assert float(found) == pytest.approx(np.mean(values), rel=1e-6)
    many, labels = activations(n=900)
    all_of_them = max_mean_discrepancy(many, labels)
    some = max_mean_discrepancy(many, labels, max_samples=300)
    assert torch.equal(some, max_mean_discrepancy(many, labels, max_samples=300))
    assert float((some - all_of_them).abs().max()) < 0.3 * float(all_of_them.max())
    rare = torch.zeros(900, dtype=torch.int64)
    rare[17] = 1
    assert bool(torch.isfinite(max_mean_discrepancy(many, rare, max_samples=50)).all())
    assert bool(torch.isfinite(max_mean_discrepancy(many, labels, max_samples=2)).all())


@pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.floats(-50, 50), log=st.floats(-3, 3))
def test_shift_scale_order_and_names_do_not_matter(score, seed, shift, log):
    x, y = activations(seed=seed, n=40, n_cells=2)
    expected = score(x, y)
    assert expected.shape == (5,) and bool((expected >= 0).all())
    changed = score(x * 10**log + shift, (y + 1) % 3 + 7)
    torch.testing.assert_close(changed, expected, rtol=1e-6, atol=1e-8)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(score(x[order], y[order]), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("score", SCORES, ids=lambda f: f.__name__)
def test_what_separates_scores_above_what_does_not(score):
    x, y = activations(n=90, n_filters=3)
    x[:, 0, 0] = 5.0  # constant
    x[:, 1, 0] = torch.arange(90) // 3 % 5  # the same for all classes
    x[:, 2, 0] = y + x[:, 1, 0] / 10
    found = score(x, y)
    assert float(found[0]) == 0.0
    assert float(found[1]) < 0.1 * float(found[2])
    assert score(x, torch.zeros(90)).tolist() == [0.0, 0.0, 0.0]
    apart = torch.stack([y.double(), torch.ones(90, dtype=torch.float64)], 1)
    ends = score(apart, y)
    assert bool(torch.isfinite(ends).all()) and float(ends[0]) > float(ends[1]) == 0.0
