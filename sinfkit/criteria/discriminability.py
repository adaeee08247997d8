"""The Discriminative Capability Score of a layer's filters, and the probe that it rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.params import check_integer, check_kind, check_number, warn


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


@dataclass(frozen=True)
class DCSResult:
    """Discriminative Capability Scores of one layer.

    Shapes: `score` (n_filters,), `norm` (n_filters,), `coef` (n_classes, n_filters, n_cells),
    `intercept` (n_classes,).
    """

    score: Tensor
    norm: Tensor
    coef: Tensor
    intercept: Tensor
    n_iter: int
    converged: bool


def discriminative_capability(
    features: Tensor,
    y: Tensor,
    *,
    penalty: float = 3.0,
    tol: float = 1e-10,
    max_iter: int = 100,
    sample_weight: Tensor | None = None,
) -> DCSResult:
    r"""Score each filter by how much a linear probe relies on it to tell classes apart.

    Parameters
    ----------
    features : Tensor of shape (n_samples, n_filters) or (n_samples, n_filters, n_cells)
        Activations of one layer, averaged over each of ``n_cells`` cells. Any floating type; the
        computation is in double precision, on the tensor's device.
    y : Tensor of shape (n_samples,)
        Class of each sample, integers. Only which samples share a class matters.
    penalty : float, default=3.0
        Weight :math:`\lambda` of the probe's squared norm.
    tol, max_iter : float and int, default=1e-10 and 100
        See `sinfkit.criteria.fit_probe`.
    sample_weight : Tensor of shape (n_samples,), optional
        How many times each sample counts, larger than 0. Default: once.

    Returns
    -------
    DCSResult
        Scores that sum to 1, the probe, and how the solver ended.

    Raises
    ------
    ValueError
        If shapes do not match, or a feature is not finite.

    Warns
    -----
    UserWarning
        Where nothing discriminates (a single class, or features that are constant or have equal
        means in all classes): all scores are 0. Where the solver did not converge.

    Notes
    -----
    The probe's weights minimise

    .. math:: \operatorname{mean} \mathrm{CE}(\operatorname{softmax}(F W' + b), y)
              + \lambda \lVert W \rVert^2 .

    That filters are scored by the norm of a linear probe's weights on pooled activations,
    normalised over the layer, is stated by algorithm 1 of the paper on semantic inference
    (arXiv:2310.01259). It leaves the objective, the penalty, the grid, the scaling and the norm
    open: those are this package's choice, made on how well networks work without the lowest scores.
    Each centred feature is divided by the square root of its standard deviation (half of its size
    counts), then all by one number, their root mean square; the norm is that of Frobenius.

    The scores do not change when one filter is shifted, the layer is scaled, every sample is
    duplicated, or classes are renamed.

    Examples
    --------
    >>> import torch
    >>> from sinfkit import discriminative_capability
    >>> y = torch.tensor([0, 0, 1, 1])
    >>> separates = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    >>> does_not = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    >>> constant = torch.full((4,), 7.0)
    >>> features = torch.stack([separates, does_not, constant], 1)
    >>> discriminative_capability(features, y).score.round(decimals=6).tolist()
    [1.0, 0.0, 0.0]
    """
    check_number("penalty", penalty, "(0, inf)")
    penalty = float(penalty)  # torch takes no integer beyond 64 bits
    check_number("tol", tol, "(0, inf)")
    check_integer("max_iter", max_iter)
    x, codes, n_classes = check_features(features, y)
    n, n_filters, n_cells = x.shape
    weight = check_weight(sample_weight, x)
    x = _scaled(x.flatten(1), weight)
    why_not = None
    if n_classes < 2:
        why_not = "all samples are of one class"
    elif not bool(x.any()):
        why_not = "every filter's activation is constant"
    else:
        probe = fit_probe(
            x, codes, penalty=penalty, tol=tol, max_iter=max_iter, sample_weight=weight
        )
        if not bool(probe.coef.any()):
            why_not = "the classes' mean activations are equal"
        elif not probe.converged:
            warn(
                f"the probe did not converge in {max_iter} steps; its scores are approximate. "
                "Raise penalty or max_iter"
            )
    if why_not is not None:
        warn(f"nothing discriminates the classes in this layer: {why_not}. Its scores are all 0")
        nothing = x.new_zeros(n_classes, x.shape[1])
        probe = Probe(nothing, nothing[:, :0].sum(1), 0.0, 0, True)
    blocks = probe.coef.unflatten(1, (n_filters, n_cells))
    size = blocks.square().sum((0, 2)).sqrt()
    total = size.sum()
    score = size / total if float(total) > 0.0 else torch.zeros_like(size)
    return DCSResult(score, size, blocks, probe.intercept, probe.n_iter, probe.converged)


_LARGEST = 1e60  # fourth powers are numbers still


def check_features(features: Tensor, y: Tensor) -> tuple[Tensor, Tensor, int]:
    """Features in double precision with three axes, and labels as codes 0..k-1 that all occur."""
    for name, value in (("features", features), ("y", y)):
        check_kind(name, value, Tensor, "a Tensor")
        if value.is_complex() or value.layout != torch.strided or value.device.type == "meta":
            raise TypeError(f"{name} must be a dense Tensor that holds real values.")
    if features.dim() == 2:
        features = features.unsqueeze(2)
    if features.dim() != 3 or 0 in features.shape:
        raise ValueError(
            "features must be of shape (n_samples, n_filters) or (n_samples, n_filters, n_cells) "
            f"and not empty, got {tuple(features.shape)}"
        )
    if y.shape != features.shape[:1]:
        raise ValueError(
            f"y must hold one class per sample of features: expected shape ({len(features)},), got "
            f"{tuple(y.shape)}"
        )
    x = features.detach().to(torch.float64)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("features must be finite, but hold NaN or infinity")
    if float(x.abs().max()) > _LARGEST:
        raise ValueError(f"features must be at most {_LARGEST:g} in size")
    classes, codes = torch.unique(y.to(x.device), return_inverse=True)
    return x, codes, len(classes)


def check_weight(sample_weight: Tensor | None, x: Tensor) -> Tensor:
    """How many times each sample of `x` counts (None: once), in its type and where it is."""
    if sample_weight is None:
        return x.new_ones(len(x))
    check_kind("sample_weight", sample_weight, Tensor, "a Tensor")
    if sample_weight.layout != torch.strided or sample_weight.device.type == "meta":
        raise TypeError("sample_weight must be a dense Tensor that holds its values.")
    if sample_weight.shape != x.shape[:1] or sample_weight.is_complex():
        raise ValueError(
            f"sample_weight must hold one real number for each of the {len(x)} samples, got "
            f"{sample_weight.dtype} of shape {tuple(sample_weight.shape)}"
        )
    weight = sample_weight.detach().to(x)
    if not bool(((weight > 0) & (weight <= _LARGEST)).all()):
        raise ValueError(f"sample_weight must be larger than 0, and at most {_LARGEST:g}")
    return weight


def average(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over samples, of which some may count more than others."""
    return x.mean(0) if weight is None else torch.tensordot(weight / weight.sum(), x, 1)


def centred(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Subtract each column's mean; what is constant becomes exactly zero."""
    x = x - x[0]
    return x - average(x, weight)


def _scaled(x: Tensor, weight: Tensor) -> Tensor:
    """Centre, divide each column by the root of its deviation, all by one root mean square."""
    x = centred(x, weight)
    # Squares of very large or very small numbers would leave the range of the type.
    x = _divided(x, x.abs().amax())
    x = _divided(x, average(x.square(), weight).sqrt().sqrt())
    return _divided(x, average(x.square(), weight).mean().sqrt())


def _divided(x: Tensor, size: Tensor) -> Tensor:
    """Divide by what is not zero."""
    return x / torch.where(size > 0.0, size, 1.0)
