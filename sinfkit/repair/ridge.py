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
    products = _Products(X, n_train, centre) if counts is None else _Weighed(X, counts, centre)
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
    counts: Tensor | None,
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
        total = square.sum(1) if counts is None else counts[held].to(square) @ square
        return float((double(total) * weight).sum())

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
    """Normal equations of some rows, in terms of columns or (fewer) rows."""

    X: Tensor
    matrix: Tensor
    noise: Tensor
    by_rows: bool

    @property
    def size(self) -> int | float:
        """How many rows there are."""
        return self.X.shape[1]

    def mean(self, Y: Tensor) -> Tensor:
        """Mean over rows, of shape (n_problems, 1, n_outputs)."""
        return Y.mean(1, keepdim=True)

    @property
    def centre(self) -> Tensor:
        """Mean of the inputs."""
        return self.X.mean(1, keepdim=True)

    def right_hand_side(self, Y: Tensor) -> Tensor:
        """What the matrix is solved for: one column per output."""
        Y = Y - self.mean(Y)
        return double(Y) if self.by_rows else _product(self.X, Y)

    def solve(self, right_hand_side: Tensor, Y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """Coefficients and intercept for one penalty."""
        n_problems, _, n_columns = self.X.shape
        mean = double(self.mean(Y)[:, 0])
        if alpha == float("inf"):
            return mean.new_zeros(n_problems, n_columns, Y.shape[2]), mean
        coef = torch.cholesky_solve(right_hand_side, self._factor(alpha))
        if self.by_rows:
            coef = double(self.X).transpose(1, 2) @ coef
        return coef, mean - (double(self.centre) @ coef)[:, 0]

    def _factor(self, alpha: float) -> Tensor:
        """Cholesky factor of the matrix and its penalty."""
        diagonal = self.matrix.diagonal(dim1=1, dim2=2)
        # The noise keeps rounding from being fitted where inputs are all but constant.
        penalty = alpha * diagonal.sum(1) / self.X.shape[2] + self.size * self.noise
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
    """Products between columns, or between rows where these are fewer."""

    def __init__(self, X: Tensor, n_train: int, centre: Tensor) -> None:
        self.X = X
        rounding = 10 * torch.finfo(X.dtype).eps
        self.noise = rounding**2 * double(centre).square().mean((1, 2))
        self.by_rows = X.shape[1] < X.shape[2]
        if self.by_rows:
            self.parts = [_gram(X.transpose(1, 2))]
        else:
            self.parts = [_gram(X[:, :n_train]), _gram(X[:, n_train:])]

    def system(self, n_rows: int) -> _System:
        """The equations of the first rows: those to train with, or all."""
        X = self.X[:, :n_rows]
        if self.by_rows:
            matrix = self.parts[0][:, :n_rows, :n_rows]
            matrix = matrix - matrix.mean(1, keepdim=True)
            matrix -= matrix.mean(2, keepdim=True)
        else:
            matrix = self.parts[0] if n_rows < self.X.shape[1] else self.parts[0] + self.parts[1]
            mean = double(X.mean(1))
            matrix = matrix - n_rows * mean[:, :, None] * mean[:, None]
        return _System(X, matrix, self.noise, self.by_rows)


@dataclass(frozen=True)
class _WeighedSystem(_System):
    """The same for rows that count differently: `X` is centred, and multiplied by their roots."""

    counts: Tensor
    middle: Tensor

    @property
    def size(self) -> float:
        """How many rows there are, each as often as it counts."""
        return float(self.counts.sum())

    def mean(self, Y: Tensor) -> Tensor:
        """Mean over rows, of shape (n_problems, 1, n_outputs)."""
        return _mean(Y, self.counts)

    @property
    def centre(self) -> Tensor:
        """Mean of the inputs."""
        return self.middle

    def right_hand_side(self, Y: Tensor) -> Tensor:
        """What the matrix is solved for: one column per output."""
        Y = (Y - self.mean(Y)) * self.counts.sqrt().to(Y)[:, None]
        return double(Y) if self.by_rows else _product(self.X, Y)


class _Weighed:
    """Makes systems of rows that count differently."""

    def __init__(self, X: Tensor, counts: Tensor, centre: Tensor) -> None:
        self.X, self.counts = X, counts
        rounding = 10 * torch.finfo(X.dtype).eps
        self.noise = rounding**2 * double(centre).square().mean((1, 2))

    def system(self, n_rows: int) -> _System:
        """The equations of the first rows: those to train with, or all."""
        counts = self.counts[:n_rows]
        middle = _mean(self.X[:, :n_rows], counts)
        X = (self.X[:, :n_rows] - middle) * counts.sqrt().to(self.X)[:, None]
        by_rows = X.shape[1] < X.shape[2]
        matrix = _gram(X.transpose(1, 2)) if by_rows else _gram(X)
        return _WeighedSystem(X, matrix, self.noise, by_rows, counts, middle)


def _mean(X: Tensor, counts: Tensor) -> Tensor:
    """Mean over rows that count differently, of shape (n_problems, 1, n_columns)."""
    share = (counts / counts.sum()).to(X)
    return (share @ X)[:, None]


def _gram(X: Tensor) -> Tensor:
    """``X' X`` in float64."""
    n_rows, n_columns = X.shape[1:]
    total = double(X.new_zeros(len(X), n_columns, n_columns))
    for row in range(0, n_rows, _ROWS):
        block = X[:, row : row + _ROWS]
        for column in range(0, n_columns, _COLUMNS):
            left = slice(column, column + _COLUMNS)
            total[:, left, column:] += double(block[:, :, left].mT @ block[:, :, column:])
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
