"""A linear probe: ridge-penalised multinomial logistic regression, solved to convergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Probe", "fit_probe"]


@dataclass(frozen=True)
class Probe:
    """A fitted softmax regression.

    Shapes: `coef` (n_classes, n_features), `intercept` (n_classes,).
    """

    coef: Tensor
    intercept: Tensor
    loss: float
    n_iter: int
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """Return the class scores before the softmax.

        Shapes: `features` (n_samples, n_features), returns (n_samples, n_classes).
        """
        return features.to(self.coef.dtype) @ self.coef.T + self.intercept


def fit_probe(
    features: Tensor,
    y: Tensor,
    *,
    penalty: float = 1.0,
    tol: float = 1e-10,
    max_iter: int = 100,
    dtype: torch.dtype = torch.float64,
    start: Probe | None = None,
    sample_weight: Tensor | None = None,
) -> Probe:
    """Fit a softmax regression with a ridge penalty on its weights.

    Shapes: `features` (n_samples, n_features), `y` (n_samples,), `sample_weight` (n_samples,).
    """
    if not 0.0 < penalty < float("inf"):
        raise ValueError(f"penalty must be positive and finite, got {penalty}")
    counts = torch.bincount(y)
    if len(counts) == 0 or int(counts.min()) == 0:
        raise ValueError("every class from 0 to max(y) needs at least one sample")
    x = features.to(dtype)
    weight = x.new_ones(len(x)) if sample_weight is None else sample_weight.to(x)
    weight = weight * (len(x) / weight.sum())
    counts = torch.zeros_like(counts, dtype=dtype).index_add_(0, y, weight)
    if not bool((counts > 0).all()):
        raise ValueError("every class needs a sample of a weight that is not zero")
    mean = weight @ x / len(x)
    x = x - mean
    basis = None
    if x.shape[0] < x.shape[1]:
        # The optimum lies in the span of the samples: solve in an orthonormal basis of it.
        basis, triangle = torch.linalg.qr(x.T)
        x = triangle.T
    w = None
    if start is not None:
        coef = start.coef.to(x)
        bias = start.intercept.to(x) + coef @ mean
        w = torch.cat((coef if basis is None else coef @ basis, bias[:, None]), 1)
    weights, loss, n_iter, converged = _newton(x, y, counts, penalty, tol, max_iter, w, weight)
    coef, bias = weights[:, :-1], weights[:, -1]
    if basis is not None:
        coef = coef @ basis.T
    return Probe(coef, bias - coef @ mean, loss, n_iter, converged)


def _newton(
    x: Tensor,
    y: Tensor,
    counts: Tensor,
    penalty: float,
    tol: float,
    max_iter: int,
    start: Tensor | None,
    weight: Tensor,
) -> tuple[Tensor, float, int, bool]:
    """Minimise the objective for centred `x`; the weights' last column is the bias.

    The samples' `weight`, of which `counts` are the sums, has a mean of 1.
    """
    n, p = x.shape
    k = len(counts)
    priors = counts.to(x.dtype) / n
    one_hot = torch.nn.functional.one_hot(y, k).to(x.dtype)
    target = one_hot * weight[:, None]
    ridge = 2.0 * penalty
    # Mean of the non-zero eigenvalues of diag(p) - p p': 1 / k for balanced classes.
    curvature = ((1.0 - priors.square().sum()) / max(k - 1, 1)).clamp_min(1e-12)
    hessian = (x * weight[:, None]).T @ x * (curvature / n)
    hessian.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(hessian)

    def precondition(v: Tensor) -> Tensor:
        inner = torch.cholesky_solve(v[:, :p].T, factor).T
        return torch.cat((inner, v[:, p:] / curvature), 1)

    def evaluate(w: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(x @ w[:, :p].T + w[:, p], 1)
        return penalty * w[:, :p].square().sum() - (log_p * target).sum() / n, log_p

    def pull_back(residual: Tensor, w: Tensor) -> Tensor:
        """Gradient (or Hessian product) from the derivative by the logits."""
        residual = residual * weight[:, None]
        inner = residual.T @ x / n + ridge * w[:, :p]
        return torch.cat((inner, residual.sum(0, keepdim=True).T / n), 1)

    w = torch.zeros(k, p + 1, dtype=x.dtype, device=x.device)
    w[:, p] = priors.log() - priors.log().mean()
    objective, log_p = evaluate(w)
    gradient = pull_back(log_p.exp() - one_hot, w)
    first = size = float(gradient.norm())
    if start is not None:
        w = start
        objective, log_p = evaluate(w)
        gradient = pull_back(log_p.exp() - one_hot, w)
        size = float(gradient.norm())
    # What rounding alone leaves of a gradient that is zero: nothing to fit.
    rounding = 45 * torch.finfo(x.dtype).eps
    floor = rounding * float(x.square().mean().sqrt()) * p**0.5
    n_iter = 0
    while size > max(tol * first, floor) and n_iter < max_iter:
        n_iter += 1
        prob = log_p.exp()

        def hessian_product(v: Tensor, prob: Tensor = prob) -> Tensor:
            logits = prob * (x @ v[:, :p].T + v[:, p])
            return pull_back(logits - prob * logits.sum(1, keepdim=True), v)

        goal = size * min(0.1, (size / first) ** 0.5)
        step = _conjugate_gradients(hessian_product, precondition, -gradient, goal)
        slope = float((gradient * step).sum())
        scale = 1.0
        slack = rounding * max(1.0, abs(float(objective)))
        while True:
            candidate = w + scale * step
            value, log_p = evaluate(candidate)
            if float(value - objective) <= 1e-4 * scale * slope + slack or scale < 1e-8:
                break
            scale /= 2.0
        w, objective = candidate, value
        gradient = pull_back(log_p.exp() - one_hot, w)
        size = float(gradient.norm())
    # Centring over the classes changes no prediction; at the optimum it changes nothing.
    w = w - w.mean(0)
    loss = -float((log_p * target).sum()) / n
    return w, loss, n_iter, size <= max(tol * first, floor)


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    rhs: Tensor,
    goal: float,
) -> Tensor:
    """Solve ``product(v) = rhs`` until the residual's norm is below `goal`."""
    v = torch.zeros_like(rhs)
    residual = rhs
    z = precondition(residual)
    direction = z
    rho = (residual * z).sum()
    for _ in range(200):
        image = product(direction)
        alpha = rho / (direction * image).sum()
        v = v + alpha * direction
        residual = residual - alpha * image
        if float(residual.norm()) <= goal:
            break
        z = precondition(residual)
        rho, previous = (residual * z).sum(), rho
        direction = z + (rho / previous) * direction
    return v
