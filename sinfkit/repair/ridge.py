"""Ridge regression with its penalty chosen on held-out rows; one large problem or many small ones.

Gram matrices are summed in float64 from products of blocks in the data's own precision. One
Cholesky factorisation per penalty is far cheaper than an eigendecomposition that serves them all,
and with fewer rows than columns the same solution comes from the products between rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["fit_ridge"]

_ROWS = 4096  # per block: enough to be fast, few enough to keep float32 sums accurate
_COLUMNS = 768  # per block: those below the diagonal of a Gram matrix are not computed
_ATTEMPTS = 10


@dataclass(frozen=True)
class RidgeFit:
    """A batch of ridge regressions.

    Shapes: `coef` (n_problems, n_columns, n_outputs), `intercept` (n_problems, n_outputs).
    """

    coef: Tensor
    intercept: Tensor
    alpha: float
    error: float


def fit_ridge(
    X: Tensor,
    Y: Tensor,
    n_train: int,
    alphas: Sequence[float],
    weight: Tensor,
    counts: Tensor | None = None,
) -> RidgeFit:
    """Fit ``Y ~ X @ coef + intercept`` with a small ``coef``.

    Shapes: `X` (n_problems, n_rows, n_columns), `Y` (n_problems, n_rows, n_outputs), `weight`
    (n_problems, n_outputs), `counts` (n_rows,).
    """
    centre = X.mean(1, keepdim=True)
    X -= centre
    counts = double(X.new_ones(X.shape[1]) if counts is None else counts)
    products = _Products(X, n_train, counts, centre)
    alpha, error = _best_alpha(products.system(n_train), X, Y, alphas, double(weight), counts)
    system = products.system(X.shape[1])
    coef, intercept = system.solve(system.right_hand_side(Y), Y, alpha)
    return RidgeFit(coef, intercept - (double(centre) @ coef)[:, 0], alpha, error)


def _best_alpha(
    system: _System,
    X: Tensor,
    Y: Tensor,
    alphas: Sequence[float],
    weight: Tensor,
    counts: Tensor,
) -> tuple[float, float]:
    """The penalty with the smallest error on the rows that are not in a system, and that error."""
    n_train, n_rows = system.X.shape[1], X.shape[1]
    train, held = slice(n_train), slice(n_train, n_rows)
    grid = sorted(alphas)
    if n_train == n_rows:
        held, grid = train, grid[-1:]
    right_hand_side = system.right_hand_side(Y[:, train])

    def error(residual: Tensor) -> float:
        square = residual.square()
        return float((double(counts[held].to(square) @ square) * weight).sum())

    def attempt(alpha: float) -> tuple[float, float]:
        coef, intercept = system.solve(right_hand_side, Y[:, train], alpha)
        residual = Y[:, held] - X[:, held] @ coef.to(X)
        return error(residual - intercept.to(X)[:, None]), alpha

    middle = len(grid) // 2
    best = attempt(grid[middle])
    for direction in (grid[:middle][::-1], grid[middle + 1 :]):
        for alpha in direction:
            other = attempt(alpha)
            if not other < best:  # further on it would only rise
                break
            best = other
    if n_train < n_rows:
        best = min(best, (error(Y[:, held] - system.mean(Y[:, train])), float("inf")))
    return best[1], best[0]


@dataclass(frozen=True)
class _System:
    """Normal equations of some rows, in terms of columns or (fewer) rows.

    Shapes: `X` (n_problems, n_rows, n_columns), `counts` (n_rows,), how often each row counts,
    `centre` (n_problems, 1, n_columns).
    """

    X: Tensor
    counts: Tensor
    centre: Tensor
    matrix: Tensor
    noise: Tensor
    by_rows: bool

    def mean(self, Y: Tensor) -> Tensor:
        """Mean over rows, of shape (n_problems, 1, n_outputs)."""
        return ((self.counts / self.counts.sum()).to(Y) @ Y)[:, None]

    def right_hand_side(self, Y: Tensor) -> Tensor:
        """What the matrix is solved for: one column per output."""
        counts = self.counts.sqrt() if self.by_rows else self.counts
        Y = (Y - self.mean(Y)) * counts.to(Y)[:, None]
        return double(Y) if self.by_rows else _product(self.X, Y)

    def solve(self, right_hand_side: Tensor, Y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Coefficients and intercept for one penalty."""
        n_problems, _, n_columns = self.X.shape
        mean = double(self.mean(Y)[:, 0])
        if alpha == float("inf"):
            return mean.new_zeros(n_problems, n_columns, Y.shape[2]), mean
        coef = torch.cholesky_solve(right_hand_side, self._factor(alpha))
        if self.by_rows:
            rows = double(self.X - self.centre) * self.counts.sqrt()[:, None]
            coef = rows.transpose(1, 2) @ coef
        return coef, mean - (double(self.centre) @ coef)[:, 0]

    def _factor(self, alpha: float) -> Tensor:
        """Cholesky factor of the matrix and its penalty."""
        diagonal = self.matrix.diagonal(dim1=1, dim2=2)
        # The noise keeps rounding from being fitted where inputs are all but constant.
        penalty = alpha * diagonal.sum(1) / self.X.shape[2] + self.counts.sum() * self.noise
        penalty = torch.where(penalty > 0, penalty, torch.ones_like(penalty))
        for _ in range(_ATTEMPTS):
            matrix = self.matrix.clone()
            matrix.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
            factor, failed = torch.linalg.cholesky_ex(matrix)
            if not failed.any():
                break
            penalty = torch.where(failed > 0, 10 * penalty, penalty)
        return factor


class _Products:
    """Products between columns, or between rows where these are fewer; all systems share them."""

    def __init__(self, X: Tensor, n_train: int, counts: Tensor, centre: Tensor) -> None:
        self.X, self.counts = X, counts
        rounding = 10 * torch.finfo(X.dtype).eps
        self.noise = rounding**2 * double(centre).square().mean((1, 2))
        self.by_rows = X.shape[1] < X.shape[2]
        if self.by_rows:
            self.parts = [_gram(X.transpose(1, 2))]
        else:
            train, held = slice(n_train), slice(n_train, None)
            self.parts = [_gram(X[:, part], counts[part]) for part in (train, held)]

    def system(self, n_rows: int) -> _System:
        """The equations of the first rows: those to train with, or all."""
        X, counts = self.X[:, :n_rows], self.counts[:n_rows]
        share = counts / counts.sum()
        centre = (share.to(X) @ X)[:, None]
        if self.by_rows:
            matrix = self.parts[0][:, :n_rows, :n_rows]
            means = matrix @ share
            matrix = matrix - means[:, :, None] - means[:, None] + (means @ share)[:, None, None]
            matrix *= (counts[:, None] * counts).sqrt()
        else:
            matrix = self.parts[0] if n_rows < self.X.shape[1] else self.parts[0] + self.parts[1]
            middle = double(centre[:, 0])
            matrix = matrix - counts.sum() * middle[:, :, None] * middle[:, None]
        return _System(X, counts, centre, matrix, self.noise, self.by_rows)


def _gram(X: Tensor, counts: Tensor | None = None) -> Tensor:
    """``X' X`` in float64, rows as often as they count."""
    n_rows, n_columns = X.shape[1:]
    total = double(X.new_zeros(len(X), n_columns, n_columns))
    for row in range(0, n_rows, _ROWS):
        block = X[:, row : row + _ROWS]
        other = block if counts is None else block * counts[row : row + _ROWS, None].to(block)
        for column in range(0, n_columns, _COLUMNS):
            left = slice(column, column + _COLUMNS)
            total[:, left, column:] += double(block[:, :, left].mT @ other[:, :, column:])
    for column in range(0, n_columns, _COLUMNS):
        left, below = slice(column, column + _COLUMNS), slice(column + _COLUMNS, None)
        total[:, below, left] = total[:, left, below].mT
    return total


def _product(X: Tensor, Y: Tensor) -> Tensor:
    """``X' Y`` in float64."""
    total = double(X.new_zeros(len(X), X.shape[2], Y.shape[2]))
    for row in range(0, X.shape[1], _ROWS):
        total += double(X[:, row : row + _ROWS].mT @ Y[:, row : row + _ROWS])
    return total


def double(value: Tensor) -> Tensor:
    """In float64, on the host where the device has none."""
    return (value.cpu() if value.device.type == "mps" else value).double()
