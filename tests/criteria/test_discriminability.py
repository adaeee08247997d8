"""The Discriminative Capability Score: what the definition promises."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sinfkit.criteria import discriminative_capability


def activations(
    n: int = 60, n_filters: int = 7, n_cells: int = 1, k: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Rectified, correlated activations with class differences and very different sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    y = torch.arange(n) % k
    common = draw(n, 3) @ draw(3, n_filters * n_cells)
    x = torch.relu(draw(k, n_filters * n_cells)[y] + common + draw(n, n_filters * n_cells))
    sizes = draw(n_filters).exp().repeat_interleave(n_cells)
    return (x * sizes).reshape(n, n_filters, n_cells), y


layers = st.builds(
    activations,
    n=st.integers(8, 60),
    n_filters=st.integers(2, 12),
    n_cells=st.sampled_from([1, 4]),
    k=st.integers(2, 4),
    seed=st.integers(0, 10_000),
)
options = st.sampled_from([{}, {"penalty": 0.3}])
few = settings(max_examples=20, deadline=None)


def score(x: Tensor, y: Tensor, **keywords: object) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return discriminative_capability(x, y, **keywords).score


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-7, rtol=1e-6)


@few
@given(layers, options, st.floats(-1.5, 1.5))
def test_finite_not_negative_and_of_sum_one(layer, keywords, log_penalty):
    x, y = layer
    result = discriminative_capability(x, y, **{"penalty": 10.0**log_penalty, **keywords})
    assert result.converged
    for values in (result.score, result.norm):
        assert values.shape == (x.shape[1],) and values.dtype == torch.float64
        assert bool(torch.isfinite(values).all()) and bool((values >= 0).all())
    assert float(result.score.sum()) == pytest.approx(1.0, abs=1e-12)
    assert_same(result.norm / result.norm.sum(), result.score)


@few
@given(layers, options, st.randoms(use_true_random=False))
def test_permuting_filters_permutes_scores(layer, keywords, random):
    x, y = layer
    order = list(range(x.shape[1]))
    random.shuffle(order)
    assert_same(score(x[:, order], y, **keywords), score(x, y, **keywords)[order])


@few
@given(layers, options, st.floats(-100, 100))
def test_shifting_a_filter_changes_nothing(layer, keywords, shift):
    x, y = layer
    shifted = x.clone()
    shifted[:, 0] += shift
    assert_same(score(shifted, y, **keywords), score(x, y, **keywords))


@few
@given(layers, options, st.floats(-12, 12))
def test_scaling_the_layer_changes_nothing(layer, keywords, log_factor):
    x, y = layer
    assert_same(score(x * 10.0**log_factor, y, **keywords), score(x, y, **keywords))


@few
@given(layers, options, st.integers(2, 3))
def test_duplicating_samples_changes_nothing(layer, keywords, times):
    x, y = layer
    again = score(x.repeat(times, 1, 1), y.repeat(times), **keywords)
    assert_same(again, score(x, y, **keywords))


@few
@given(layers, options, st.randoms(use_true_random=False))
def test_relabelling_and_reordering_change_nothing(layer, keywords, random):
    x, y = layer
    names = random.sample(range(-5, 100), int(y.max()) + 1)
    rows = list(range(len(y)))
    random.shuffle(rows)
    assert_same(score(x[rows], torch.tensor(names)[y][rows], **keywords), score(x, y, **keywords))


@few
@given(layers, options, st.floats(-1000, 1000))
def test_a_constant_filter_scores_zero(layer, keywords, value):
    x, y = layer
    x[:, 1] = value
    assert float(score(x, y, **keywords)[1]) <= 1e-12


@few
@given(st.integers(0, 10_000), st.integers(0, 9), st.integers(2, 5), options)
def test_of_equal_variances_the_one_that_separates_ranks_first(seed, which, k, keywords):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(40 * k) % k
    x = torch.randn(len(y), 10, generator=generator, dtype=torch.float64)
    x[:, which] = 2.0 * y + 0.1 * x[:, which]
    x = (x - x.mean(0)) / x.std(0)
    assert int(score(x, y, **keywords).argmax()) == which


def test_half_of_a_signals_size_counts():
    x, y = activations(n_filters=2)
    x[:, 1] = 0.01 * x[:, 0]
    scores = score(x, y)
    assert float(scores[0] / scores[1]) == pytest.approx(10.0)


def test_shuffled_labels_leave_a_norm_that_falls_as_the_root_of_the_sample_size():
    generator = torch.Generator().manual_seed(0)

    def total(n: int) -> float:
        x, y = activations(n, n_filters=10, k=4, seed=1)
        norms = []
        for _ in range(12):
            shuffled = y[torch.randperm(n, generator=generator)]
            norms.append(float(discriminative_capability(x, shuffled).norm.sum()))
        return float(np.mean(norms))

    sizes = np.array([200, 800, 3200])
    totals = [total(n) for n in sizes]
    slope = np.polyfit(np.log(sizes), np.log(totals), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)
    x, y = activations(3200, n_filters=10, k=4, seed=1)
    assert float(discriminative_capability(x, y).norm.sum()) > 5 * totals[-1]


def test_mean_score_over_shuffles_is_flatter_than_the_true_one():
    # Filters of one size, of which some discriminate: without labels nothing sets them apart.
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4
    strength = torch.linspace(0, 1.5, 12, dtype=torch.float64)
    means = torch.randn(4, 12, generator=generator, dtype=torch.float64) * strength
    x = means[y] + torch.randn(400, 12, generator=generator, dtype=torch.float64)

    def variation(s: Tensor) -> float:
        return float(s.std() / s.mean())

    shuffles = [y[torch.randperm(400, generator=generator)] for _ in range(20)]
    shuffled = torch.stack([score(x, s) for s in shuffles]).mean(0)
    assert variation(shuffled) < 0.7 * variation(score(x, y))


@pytest.mark.parametrize("case", ["constant", "one class", "equal means"])
def test_nothing_to_discriminate_gives_zeros_and_one_warning(case):
    x, y = activations(n=40, k=2)
    if case == "constant":
        x = x[:1].expand(40, -1, -1)
    elif case == "one class":
        y = torch.full_like(y, 3)
    else:
        x = x[::2].repeat_interleave(2, 0)
    with pytest.warns(UserWarning, match="nothing discriminates") as caught:
        result = discriminative_capability(x, y)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert not result.score.any() and not result.norm.any()


def test_the_probe_is_scikit_learns():
    x, y = activations(n=90, n_filters=6, n_cells=4, k=3)
    result = discriminative_capability(x, y, penalty=0.5)
    flat = x.flatten(1).numpy()
    scaled = (flat - flat.mean(0)) / flat.std(0) ** 0.5
    scaled /= np.sqrt(scaled.var(0).mean())
    reference = LogisticRegression(C=1 / (2 * 0.5 * 90), tol=1e-10, max_iter=5000)
    coef = reference.fit(scaled, y.numpy()).coef_.reshape(3, 6, 4)
    np.testing.assert_allclose(result.coef, coef, atol=1e-6)
    np.testing.assert_allclose(result.norm, np.sqrt((coef**2).sum((0, 2))), atol=1e-6)


def test_single_precision_and_two_axes_give_the_same():
    x, y = activations(n=80, n_filters=9)
    expected = score(x, y)
    assert_same(score(x[:, :, 0], y), expected)
    torch.testing.assert_close(score(x.float(), y), expected, atol=1e-5, rtol=1e-4)


def test_an_approximate_probe_is_said():
    x, y = activations()
    with pytest.warns(UserWarning, match="did not converge"):
        discriminative_capability(x, y, penalty=1e-3, max_iter=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"penalty": 0.0}, "penalty"),
        ({"penalty": float("nan")}, "penalty"),
        ({"penalty": float("inf")}, "penalty"),
        ({"y": torch.zeros(3)}, "one class per sample"),
        ({"features": torch.zeros(60)}, "shape"),
        ({"features": torch.zeros(60, 0)}, "not empty"),
        ({"features": torch.full((60, 2), float("nan"))}, "finite"),
    ],
)
def test_bad_input_is_refused(change, message):
    x, y = activations()
    with pytest.raises(ValueError, match=message):
        discriminative_capability(**{"features": x, "y": y, **change})
