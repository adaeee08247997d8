"""The Discriminative Capability Score of a layer's filters."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.params import check_integer, check_kind, check_number
from .probe import Probe, fit_probe

__all__ = ["DCSResult", "discriminative_capability"]


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
            _warn(
                f"the probe did not converge in {max_iter} steps; its scores are approximate. "
                "Raise penalty or max_iter"
            )
    if why_not is not None:
        _warn(f"nothing discriminates the classes in this layer: {why_not}. Its scores are all 0")
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


def _warn(message: str) -> None:
    """Warn from the caller of `discriminative_capability`."""
    warnings.warn(message, UserWarning, stacklevel=3)
