"""How well one filter alone separates classes: scores from the classes' means and variances.

Each takes `features` (n_samples, n_filters[, n_cells]), labels `y` and how many times each sample
counts, and gives one score per filter: high for those that separate, 0 for one that never moves,
and the mean over cells.  Most compare one class with all others, and average over classes: with
mean ``m+``, variance ``v+`` and number ``n+`` of its samples, and ``m-``, ``v-`` and ``n-`` of the
others'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.params import check_integer, check_kind, check_number
from .discriminability import centred, check_features, check_weight

__all__ = [
    "abs_snr",
    "discriminant_information",
    "fisher_ratio",
    "hellinger",
    "j_divergence",
    "max_mean_discrepancy",
    "sym_div",
    "t_statistic",
]

# Two different constants are separated without end: a large number instead of infinity.
_FLOOR = 1e-12
_ROUNDING = 1e-24


@dataclass(frozen=True)
class _Moments:
    """Moments of each class (+) and of the rest (-), each of shape (n_classes, n_filters, n_cells).

    Counts are of shape (n_classes, 1, 1).
    """

    n_in: Tensor
    n_out: Tensor
    mean_in: Tensor
    mean_out: Tensor
    var_in: Tensor
    var_out: Tensor

    @property
    def gap(self) -> Tensor:
        """Difference of the means."""
        return self.mean_in - self.mean_out


def _moments(features: Tensor, y: Tensor, sample_weight: Tensor | None) -> _Moments | None:
    """Moments of centred features; None where there is one class only."""
    x, codes, n_classes = check_features(features, y)
    if n_classes < 2:
        return None
    weight = check_weight(sample_weight, x)
    x = centred(x, weight)

    def weighed(value: Tensor) -> Tensor:
        return value * weight[:, None, None]

    count = x.new_zeros(n_classes).index_add_(0, codes, weight)[:, None, None]
    others = count.sum() - count
    shape = (n_classes, *x.shape[1:])
    total = x.new_zeros(shape).index_add_(0, codes, weighed(x))
    mean_in, mean_out = total / count, (total.sum(0) - total) / others
    # Around each class's own mean; what is constant in a class has variance 0, not rounding.
    within = x.new_zeros(shape).index_add_(0, codes, weighed((x - mean_in[codes]).square()))
    within = torch.where(within > _ROUNDING * weighed(x.square()).sum(0), within, 0.0)
    between = torch.stack(
        [
            (count * (mean_in - m).square()).sum(0) - n * (own - m).square()
            for m, own, n in zip(mean_out, mean_in, count, strict=True)
        ]
    )
    var_out = (within.sum(0) - within + between.clamp_min(0.0)) / others
    return _Moments(count, others, mean_in, mean_out, within / count, var_out)


def _none(features: Tensor) -> Tensor:
    """Scores of filters that have nothing to separate."""
    return torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """A quotient whose denominator is not less than a trace of the numerator; 0 / 0 is 0."""
    floor = (_FLOOR * numerator).clamp_min(torch.finfo(numerator.dtype).tiny)
    return numerator / torch.maximum(denominator, floor)


def _averaged(
    features: Tensor,
    y: Tensor,
    sample_weight: Tensor | None,
    score: Callable[[_Moments], Tensor],
) -> Tensor:
    """A score of one class against the rest, averaged over classes and cells."""
    m = _moments(features, y, sample_weight)
    return _none(features) if m is None else score(m).mean((0, 2))


def fisher_ratio(features: Tensor, y: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Fisher's discriminant ratio, ``(m+ - m-)^2 / (v+ + v-)``."""
    return _averaged(
        features, y, sample_weight, lambda m: _ratio(m.gap.square(), m.var_in + m.var_out)
    )


def abs_snr(features: Tensor, y: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Absolute signal-to-noise ratio, ``|m+ - m-| / (sqrt v+ + sqrt v-)``."""
    return _averaged(
        features,
        y,
        sample_weight,
        lambda m: _ratio(m.gap.abs(), m.var_in.sqrt() + m.var_out.sqrt()),
    )


def t_statistic(features: Tensor, y: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Welch's t, ``|m+ - m-| / sqrt(v+ / n+ + v- / n-)``; its ranking is that of any n."""
    return _averaged(
        features,
        y,
        sample_weight,
        lambda m: _ratio(m.gap.abs(), (m.var_in / m.n_in + m.var_out / m.n_out).sqrt()),
    )


def sym_div(features: Tensor, y: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """``0.5 (v+ / v- + v- / v+) + 0.5 (m+ - m-)^2 / (v+ + v-) - 1``, as in published code."""
    return _averaged(
        features,
        y,
        sample_weight,
        lambda m: _spread(m) + 0.5 * _ratio(m.gap.square(), m.var_in + m.var_out),
    )


def j_divergence(features: Tensor, y: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Symmetric Kullback-Leibler divergence of two Gaussians.

    ``0.5 (v+ / v- + v- / v+) + 0.5 (m+ - m-)^2 (1 / v+ + 1 / v-) - 1``
    """

    def divergence(m: _Moments) -> Tensor:
        gap = m.gap.square()
        return _spread(m) + 0.5 * (_ratio(gap, m.var_in) + _ratio(gap, m.var_out))

    return _averaged(features, y, sample_weight, divergence)


def _spread(m: _Moments) -> Tensor:
    """``0.5 (v+ / v- + v- / v+) - 1``, 0 for equal variances, also where both are 0."""
    difference = (m.var_in - m.var_out).square()
    return 0.5 * _ratio(difference, m.var_in * m.var_out)


def hellinger(features: Tensor, y: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Smallest squared Hellinger distance of any two classes, as Gaussians: TVSPrune's score.

    ``1 - sqrt(2 s1 s2 / (s1^2 + s2^2)) exp(-(m1 - m2)^2 / (4 (s1^2 + s2^2)))``, in [0, 1] (Murti
    et al., ICLR 2023, whose released code looks at fewer pairs than the paper).
    """
    m = _moments(features, y, sample_weight)
    if m is None:
        return _none(features)
    mean, var = m.mean_in, m.var_in
    smallest = torch.full_like(mean[0], torch.inf)
    for a in range(len(mean) - 1):
        total = var[a] + var[a + 1 :]
        overlap = _ratio(2 * (var[a] * var[a + 1 :]).sqrt(), total).sqrt()
        overlap = torch.where(total > 0, overlap, 1.0)  # two constants: equal or not
        gap = _ratio((mean[a] - mean[a + 1 :]).square(), 4 * total)
        smallest = torch.minimum(smallest, (1 - overlap * torch.exp(-gap)).amin(0))
    return smallest.clamp_min(0.0).mean(1)


def discriminant_information(
    features: Tensor, y: Tensor, sample_weight: Tensor | None = None, *, ridge: float = 1e-3
) -> Tensor:
    """Discriminant information, ``tr (S + rho I)^-1 B``, in [0, n_cells]; arXiv:2004.14492.

    ``S``: scatter of a filter's cells; ``B``: that of the class means; ``rho``: `ridge` times the
    mean diagonal of ``S`` over the layer, so that what hardly moves counts little.
    """
    check_number("ridge", ridge, "(0, inf)")
    m = _moments(features, y, sample_weight)
    if m is None:
        return _none(features)
    x = check_features(features, y)[0]
    weight = check_weight(sample_weight, x)
    x = centred(x, weight)
    scatter = torch.einsum("njs,njt->jst", x * weight[:, None, None], x)
    between = torch.einsum("cjs,cjt->jst", m.n_in * m.mean_in, m.mean_in)
    size = float(scatter.diagonal(dim1=1, dim2=2).mean())
    if size == 0.0:
        return _none(features)
    eye = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    solved = torch.linalg.solve(scatter + ridge * size * eye, between)
    return solved.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0.0)


def max_mean_discrepancy(
    features: Tensor,
    y: Tensor,
    *,
    max_samples: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Maximum mean discrepancy, ``mean K(+, +) + mean K(-, -) - 2 mean K(+, -)``.

    ``K`` is Gaussian in the cells, as wide as the median distance.  At most `max_samples` are used,
    drawn by `generator` without regard to class (None: a fixed draw); each class keeps one.
    """
    check_integer("max_samples", max_samples)
    if generator is not None:
        check_kind("generator", generator, torch.Generator, "a torch.Generator")
    x, codes, n_classes = check_features(features, y)
    if n_classes < 2:
        return _none(features)
    if len(x) > max_samples:
        chosen = generator if generator is not None else torch.Generator().manual_seed(0)
        order = torch.randperm(len(x), generator=chosen).to(x.device)
        # The first of each class in the drawn order goes in front.
        shuffled = codes[order]
        first = torch.stack([torch.nonzero(shuffled == c)[0, 0] for c in range(n_classes)])
        rest = torch.ones(len(order), dtype=torch.bool, device=x.device)
        rest[first] = False
        order = torch.cat([order[first], order[rest]])[: max(max_samples, n_classes)]
        x, codes = x[order], codes[order]
    x = centred(x)
    own = torch.nn.functional.one_hot(codes, n_classes).to(x)
    inside = own / own.sum(0)
    outside = (1 - own) / (1 - own).sum(0)
    contrast = inside - outside  # K is quadratic in it: the three means in one product
    scores = []
    for column in x.unbind(1):
        distance = torch.cdist(column, column, compute_mode="donot_use_mm_for_euclid_dist")
        positive = distance[distance > 0]
        if len(positive) == 0:
            scores.append(x.new_zeros(()))
            continue
        kernel = torch.exp(-0.5 * (distance / positive.median()).square())
        scores.append((contrast * (kernel @ contrast)).sum(0).mean())
    return torch.stack(scores).clamp_min(0.0)
