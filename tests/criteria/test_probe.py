"""The ridge-penalised softmax regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from sinfkit.criteria import fit_probe


def problem(n: int, p: int, k: int, seed: int, balanced: bool = True):
    """Correlated, shifted features of classes whose means differ."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % k
    if not balanced:
        y = torch.where(torch.arange(n) < n // 2, 0, y)
    means = 0.4 * torch.randn(k, p, generator=generator, dtype=torch.float64)
    mixing = torch.randn(p, p, generator=generator, dtype=torch.float64) / p**0.5
    noise = torch.randn(n, p, generator=generator, dtype=torch.float64)
    return means[y] + noise @ mixing + 3.0, y


@pytest.mark.parametrize("penalty", [0.003, 0.1, 1.0, 30.0])
@pytest.mark.parametrize(("n", "p", "k"), [(150, 12, 5), (120, 30, 3), (20, 50, 4)])
def test_equals_scikit_learn(n, p, k, penalty):
    x, y = problem(n, p, k, seed=n, balanced=n != 120)
    probe = fit_probe(x, y, penalty=penalty)
    reference = LogisticRegression(
        C=1 / (2 * penalty * n), solver="newton-cholesky", tol=1e-10, max_iter=1000
    ).fit(x.numpy(), y.numpy())
    assert probe.converged
    np.testing.assert_allclose(probe.coef, reference.coef_, atol=1e-6)
    np.testing.assert_allclose(
        torch.softmax(probe.logits(x), 1), reference.predict_proba(x.numpy()), atol=1e-6
    )


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(6, 60),
    p=st.integers(1, 70),
    k=st.integers(2, 5),
    log_penalty=st.floats(-3, 2),
    seed=st.integers(0, 1000),
    balanced=st.booleans(),
)
def test_the_gradient_vanishes(n, p, k, log_penalty, seed, balanced):
    # The problem is strictly convex in the weights, so this proves the optimum.
    x, y = problem(max(n, 2 * k), p, k, seed, balanced)
    penalty = 10.0**log_penalty
    probe = fit_probe(x, y, penalty=penalty)
    coef, intercept = probe.coef.clone().requires_grad_(), probe.intercept.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ coef.T + intercept, y)
    (loss + penalty * coef.square().sum()).backward()
    scale = float((x - x.mean(0)).norm()) / len(x) ** 0.5
    assert probe.converged
    assert probe.loss == pytest.approx(float(loss.detach()), abs=1e-12)
    assert float(coef.grad.norm()) <= 1e-8 * scale
    assert float(intercept.grad.norm()) <= 1e-8 * scale
    assert float(probe.coef.mean(0).abs().max()) <= 1e-10


def test_two_classes_get_two_opposite_rows():
    x, y = problem(80, 6, 2, seed=1)
    probe = fit_probe(x, y)
    assert probe.coef.shape == (2, 6)
    torch.testing.assert_close(probe.coef[0], -probe.coef[1])
    # Two rows share the work: a binary regression of twice the penalty has their difference.
    binary = LogisticRegression(C=1 / (1.0 * 80), tol=1e-10, max_iter=1000).fit(
        x.numpy(), y.numpy()
    )
    np.testing.assert_allclose(2 * probe.coef[1], binary.coef_[0], atol=1e-6)


def test_few_steps_with_a_strong_penalty_and_single_precision_input():
    x, y = problem(2000, 128, 5, seed=2)
    x = x / x.std()
    probe = fit_probe(x.float(), y, penalty=1.0)
    assert probe.converged and probe.n_iter <= 8
    assert probe.coef.dtype == torch.float64
    torch.testing.assert_close(probe.coef, fit_probe(x, y).coef, atol=1e-5, rtol=1e-4)


def test_a_loose_tolerance_stops_early_near_the_optimum():
    x, y = problem(300, 20, 4, seed=3)
    tight, loose = (fit_probe(x, y, penalty=0.01, tol=tol) for tol in (1e-10, 1e-2))
    assert loose.converged and loose.n_iter < tight.n_iter
    torch.testing.assert_close(loose.coef, tight.coef, atol=0.1, rtol=0.1)


def test_running_out_of_steps_is_said():
    x, y = problem(300, 20, 4, seed=3)
    assert not fit_probe(x, y, penalty=1e-3, max_iter=1).converged


def test_separable_classes_and_a_weak_penalty_converge():
    x = torch.tensor([[-1.0, 0.0], [-2.0, 1.0], [1.0, 0.0], [2.0, 1.0]])
    probe = fit_probe(x, torch.tensor([0, 0, 1, 1]), penalty=1e-6)
    assert probe.converged and probe.loss < 1e-3


def test_nothing_to_fit_gives_exact_zeros():
    x = torch.tensor([[0.1, 0.7], [0.3, 0.2]]).repeat(2, 1)
    probe = fit_probe(x, torch.tensor([0, 0, 1, 1]))
    assert probe.converged and probe.n_iter == 0 and not probe.coef.any()


@pytest.mark.parametrize(
    ("y", "penalty", "message"),
    [
        ([0, 0, 2, 2], 1.0, "at least one sample"),
        ([0, 0, 1, 1], 0.0, "penalty"),
        ([0, 0, 1, 1], float("nan"), "penalty"),
        ([0, 0, 1, 1], float("inf"), "penalty"),
    ],
)
def test_bad_input(y, penalty, message):
    with pytest.raises(ValueError, match=message):
        fit_probe(torch.zeros(4, 2), torch.tensor(y), penalty=penalty)


@pytest.mark.parametrize("shape", [(200, 12), (30, 50)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_start_elsewhere_and_single_precision_end_at_the_same_optimum(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) + 3.0
    y = torch.arange(shape[0]) % 4
    x[:, 0] += y
    tol = 1e-10 if dtype == torch.float64 else 1e-4
    expected = fit_probe(x, y, penalty=0.01)
    far = fit_probe(x, (y + 1) % 4, penalty=1e-3, dtype=dtype)
    near = fit_probe(x, y, penalty=0.011, tol=tol, dtype=dtype)
    for start in (None, far, near):
        found = fit_probe(x, y, penalty=0.01, tol=tol, dtype=dtype, start=start)
        assert found.converged and found.coef.dtype == dtype
        accuracy = (
            {"atol": 1e-8, "rtol": 1e-6} if dtype == torch.float64 else {"atol": 2e-3, "rtol": 0}
        )
        torch.testing.assert_close(found.coef.double(), expected.coef, **accuracy)
        # At the mean of x: at 0, far from it, an error of the coefficients counts many times.
        middle = x.mean(0)
        torch.testing.assert_close(
            found.intercept.double() + found.coef.double() @ middle,
            expected.intercept + expected.coef @ middle,
            **accuracy,
        )
    assert found.n_iter <= fit_probe(x, y, penalty=0.01, tol=tol, dtype=dtype).n_iter
