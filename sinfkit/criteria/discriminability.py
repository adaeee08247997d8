"""The Discriminative Capability Score of a layer's filters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.params import check_choice, check_integer, check_kind, check_number
from .probe import Probe, fit_probe

__all__ = ["DCSResult", "discriminative_capability"]


@dataclass(frozen=True)
class DCSResult:
    """Discriminative Capability Scores of one layer.

    Attributes
    ----------
    score : Tensor of shape (n_filters,)
        Scores, at least 0; their sum is 1, or 0 where there is nothing to discriminate.
    norm : Tensor of shape (n_filters,)
        The same before they were divided by their sum.
    coef : Tensor of shape (n_classes, n_filters, n_cells)
        The probe's weights on the scaled features.
    intercept : Tensor of shape (n_classes,)
        Its biases on the centred features.
    n_iter : int
        Newton steps taken; 0 for the closed form.
    converged : bool
        Whether the probe was solved to the tolerance.
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
    variant: str = "norm",
    norm: str = "fro",
    scaling: str = "root",
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
        Weight :math:`\lambda` of the probe's squared norm. ``float("inf")`` gives the limit of
        :math:`2 \lambda W^*`, which needs no solver: :math:`p_c (\bar f_c - \bar f)` for class c of
        frequency :math:`p_c` and mean :math:`\bar f_c`.
    variant : {"norm", "contribution", "ablation"}, default="norm"
        Of each filter: the norm of its block of weights; the standard deviation of what it adds to
        the probe's logits, joined over classes (root of the summed variances); or the rise of the
        probe's cross-entropy when it adds nothing.
    norm : {"fro", "l1", "max"}, default="fro"
        Norm of the block, for ``variant="norm"``: root of the sum of squares, sum of or largest
        absolute value.
    scaling : {"root", "layer", "column"}, default="root"
        How much of a filter's size counts. After centring, ``"layer"`` divides all features by one
        number, their root mean square: all of it. ``"column"`` divides each column by its own
        standard deviation: nothing. ``"root"`` stands halfway: each column is divided by the square
        root of its own, then all by one number.
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
        If shapes do not match, a feature is not finite, or an option is unknown.

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
    for option, value, known in (
        ("variant", variant, ("norm", "contribution", "ablation")),
        ("norm", norm, tuple(_NORMS)),
        ("scaling", scaling, tuple(_SCALINGS)),
    ):
        check_choice(option, value, known)
    check_number("penalty", penalty, "(0, inf]")
    penalty = float(penalty)  # torch takes no integer beyond 64 bits
    check_number("tol", tol, "(0, inf)")
    check_integer("max_iter", max_iter)
    x, codes, n_classes = check_features(features, y)
    n, n_filters, n_cells = x.shape
    weight = check_weight(sample_weight, x)
    x = _scaled(x.flatten(1), scaling, weight)
    why_not = None
    if n_classes < 2:
        why_not = "all samples are of one class"
    elif not bool(x.any()):
        why_not = "every filter's activation is constant"
    else:
        probe = _probe(x, codes, penalty, tol, max_iter, weight)
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
    if variant == "norm":
        size = _NORMS[norm](blocks)
    elif variant == "contribution":
        size = _contribution(x, blocks, weight)
    else:
        size = _ablation(x, codes, probe, n_filters, weight)
    total = size.sum()
    score = size / total if float(total) > 0.0 else torch.zeros_like(size)
    return DCSResult(score, size, blocks, probe.intercept, probe.n_iter, probe.converged)


_LARGEST = 1e60  # fourth powers are numbers still

_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "fro": lambda w: w.square().sum((0, 2)).sqrt(),
    "l1": lambda w: w.abs().sum((0, 2)),
    "max": lambda w: w.abs().amax((0, 2)),
}


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


def check_weight(sample_weight: Tensor | None, x: Tensor) -> Tensor | None:
    """How many times each sample of `x` counts, in its type and where it is."""
    if sample_weight is None:
        return None
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


_SCALINGS = {"layer": 0.0, "root": 0.5, "column": 1.0}


def _scaled(x: Tensor, scaling: str, weight: Tensor | None) -> Tensor:
    """Centre, divide each column by a power of its deviation, and all by one root mean square."""
    x = centred(x, weight)
    # Squares of very large or very small numbers would leave the range of the type.
    x = _divided(x, x.abs().amax())
    x = _divided(x, average(x.square(), weight).sqrt() ** _SCALINGS[scaling])
    square = x.square()
    return _divided(x, (square if weight is None else average(square, weight)).mean().sqrt())


def _divided(x: Tensor, size: Tensor) -> Tensor:
    """Divide by what is not zero."""
    return x / torch.where(size > 0.0, size, 1.0)


def _probe(
    x: Tensor, codes: Tensor, penalty: float, tol: float, max_iter: int, weight: Tensor | None
) -> Probe:
    """Fit the probe, or take its closed form where the penalty is infinite."""
    if penalty < float("inf"):
        return fit_probe(
            x, codes, penalty=penalty, tol=tol, max_iter=max_iter, sample_weight=weight
        )
    one_hot = torch.nn.functional.one_hot(codes).to(x.dtype)
    priors = average(one_hot, weight)
    contrast = one_hot - priors
    if weight is not None:
        contrast = contrast * (weight * len(x) / weight.sum())[:, None]
    coef = contrast.T @ x / len(x)
    if float(coef.norm()) <= 1e-14 * x.shape[1] ** 0.5:
        coef = torch.zeros_like(coef)  # rounding is all there is
    return Probe(coef, priors.log(), 0.0, 0, True)


def _contribution(x: Tensor, blocks: Tensor, weight: Tensor | None) -> Tensor:
    """Standard deviation over samples of each filter's part of the logits, joined over classes."""
    cells = x.unflatten(1, blocks.shape[1:])
    weighed = cells
    if weight is not None:
        weighed = cells * (weight * len(x) / weight.sum())[:, None, None]
    covariance = torch.einsum("njs,njt->jst", weighed, cells) / len(x)
    return torch.einsum("kjs,jst,kjt->j", blocks, covariance, blocks).clamp_min(0.0).sqrt()


def _ablation(
    x: Tensor, codes: Tensor, probe: Probe, n_filters: int, weight: Tensor | None
) -> Tensor:
    """Rise of the cross-entropy without each filter; at the optimum it is never negative."""
    cells = x.unflatten(1, (n_filters, -1))
    blocks = probe.coef.unflatten(1, (n_filters, -1))
    logits = probe.logits(x)

    def cross_entropy(logits: Tensor) -> Tensor:
        if weight is None:
            return torch.nn.functional.cross_entropy(logits, codes)
        return average(torch.nn.functional.cross_entropy(logits, codes, reduction="none"), weight)

    base = cross_entropy(logits)
    rise = [cross_entropy(logits - cells[:, j] @ blocks[:, j].T) - base for j in range(n_filters)]
    return torch.stack(rise).clamp_min(0.0)


def _warn(message: str) -> None:
    """Warn from the caller of `discriminative_capability`."""
    warnings.warn(message, UserWarning, stacklevel=3)
