"""Filter scores: pure functions of one layer's record, one score per filter, and their registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..utils.params import naming
from . import separability
from .brain_surgeon import Consumer, removal_costs, weigh_outputs
from .discriminability import DCSResult, discriminative_capability

__all__ = [
    "CRITERIA",
    "Criterion",
    "DCSResult",
    "LayerData",
    "discriminative_capability",
    "get_criterion",
]


@dataclass(frozen=True)
class LayerData:
    """What a criterion may know about one layer; only what it declares is collected.

    Shapes: `features` (n_samples, n_filters, n_cells), `y` (n_samples,), `sample_weight`
    (n_samples,), `weight` (n_filters, ...), `norm_scale` (n_filters,), `taylor` (n_filters,),
    `map_rank, map_independence, map_zeros` (n_filters,), `map_range` (n_filters,),
    `consumer_features` (n_samples, n_outputs * n_cells).
    """

    name: str = ""
    features: Tensor | None = None
    y: Tensor | None = None
    sample_weight: Tensor | None = None
    weight: Tensor | None = None
    norm_scale: Tensor | None = None
    taylor: Tensor | None = None
    map_rank: Tensor | None = None
    map_independence: Tensor | None = None
    map_zeros: Tensor | None = None
    map_range: Tensor | None = None
    consumers: tuple[Consumer, ...] | None = None
    consumer_features: Mapping[str, Tensor] | None = None
    n_groups: int = 1
    n_classes: int = 0
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Criterion:
    """A filter score and what it needs to know."""

    name: str
    function: Callable[..., Tensor]
    needs: frozenset[str]
    options: frozenset[str]
    weighted: bool = True
    cumulative: bool = False

    def __call__(self, data: LayerData, **options: Any) -> np.ndarray:
        """Score the filters of one layer, and check the answer: float64 of shape (n_filters,)."""
        given, n = self.function(data, **options), len(_need(data, "weight"))
        asked = f"one score for each of its {n} filters is needed"
        if not isinstance(given, (Tensor, np.ndarray, list, tuple)):
            raise TypeError(
                f"The criterion returned {type(given).__name__} for layer {data.name!r}; {asked}."
            )
        with naming("criterion"):
            try:
                scores = torch.as_tensor(given).detach().cpu().to(torch.float64)
            except RuntimeError as error:
                raise TypeError(
                    f"The scores of layer {data.name!r} are no numbers: {error}"
                ) from error
        if scores.shape != (n,):
            raise ValueError(
                f"The criterion returned shape {tuple(scores.shape)} for layer {data.name!r}; "
                f"{asked}."
            )
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(
                f"The criterion gave NaN or infinity for a filter of layer {data.name!r}."
            )
        return scores.numpy()

    def __reduce__(self) -> Any:
        # By name: some are made by a function, and the caches know the package's own by identity.
        if CRITERIA.get(self.name) is self:
            return get_criterion, (self.name,)
        return super().__reduce__()


_Function = Callable[..., Tensor]

CRITERIA: dict[str, Criterion] = {}
"""Criteria by name."""


def _register(
    name: str, needs: Iterable[str], *, weighted: bool = True, cumulative: bool = False
) -> Callable[[_Function], _Function]:
    """Put a criterion into the registry; its keyword-only parameters are its options."""

    def decorate(function: _Function) -> _Function:
        options = _keywords(function)
        CRITERIA[name] = Criterion(name, function, frozenset(needs), options, weighted, cumulative)
        return function

    return decorate


def _keywords(function: _Function) -> frozenset[str]:
    """Names of a function's keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def get_criterion(criterion: str | Criterion | Callable[..., Tensor]) -> Criterion:
    """Look up a criterion, or make one of a function."""
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise ValueError(
                f"criterion must be one of {sorted(CRITERIA)} or a function, got {criterion!r}"
            )
        return CRITERIA[criterion]
    if not callable(criterion) or isinstance(criterion, (type, nn.Module)):
        raise TypeError(f"criterion must be a name or a function, got {type(criterion).__name__}")
    name = getattr(criterion, "__name__", type(criterion).__name__)
    default = {"features", "y", "weight", "norm_scale", "generator"}
    needs = frozenset(getattr(criterion, "needs", default))
    unknown = needs - set(LayerData.__dataclass_fields__)
    if unknown:
        raise ValueError(f"criterion {name!r} needs {sorted(unknown)}, which no layer has")
    weighted = "sample_weight" in needs or not needs & {"features", "y", "consumer_features"}
    return Criterion(name, criterion, needs, frozenset(), weighted)


def _need(data: LayerData, field: str) -> Any:
    """A field of the record that the criterion cannot do without."""
    value = getattr(data, field)
    if value is None:
        raise ValueError(f"the criterion needs {field} of layer {data.name!r}, which is missing")
    return value


def _weight(data: LayerData) -> Tensor:
    """Weights in double precision, a row for each filter."""
    rows: Tensor = _need(data, "weight").detach().double().flatten(1)
    return rows


@_register("dcs", needs=("features", "y"))
def dcs(data: LayerData, *, penalty: float = 3.0) -> Tensor:
    """Discriminative Capability Score, see `discriminative_capability`."""
    features, y = _need(data, "features"), _need(data, "y")
    return discriminative_capability(
        features, y, penalty=penalty, sample_weight=data.sample_weight
    ).score


@_register("l1", needs=("weight",))
def l1(data: LayerData) -> Tensor:
    """Sum of a filter's absolute weights (Li et al., 2017)."""
    return _weight(data).abs().sum(1)


@_register("l2", needs=("weight",))
def l2(data: LayerData) -> Tensor:
    """Root of the sum of a filter's squared weights."""
    return _weight(data).square().sum(1).sqrt()


@_register("taylor", needs=("taylor",))
def taylor(data: LayerData) -> Tensor:
    """First-order change of the loss without a filter (Molchanov et al., 2017, 2019)."""
    return _need(data, "taylor").detach().double()


@_register("obs", needs=("weight", "consumers"), cumulative=True)
def obs(data: LayerData) -> Tensor:
    """What the layers behind lose for good without a filter, see `sinfkit.criteria.removal_costs`.

    Filters whose readers are not known (too wide, or called more than once) are ranked by L1 norm.
    """
    consumers = _need(data, "consumers")
    if not consumers:
        size = l1(data)
        return size / size.sum().clamp_min(torch.finfo(size.dtype).tiny)
    return removal_costs(consumers, len(_need(data, "weight")), data.n_groups)


@_register("dcs_obs", needs=("y", "weight", "consumers", "consumer_features"), cumulative=True)
def dcs_obs(data: LayerData, *, penalty: float = 3.0) -> Tensor:
    """What the layers behind lose for good, each of their outputs counted by its own DCS.

    A loss of an output counts in proportion to that output's DCS. Outputs that are not observed
    (those of the network itself) count alike. Filters whose readers are not known are
    ranked by L1 norm.
    """
    y, observed = _need(data, "y"), _need(data, "consumer_features")
    consumers, importance = _need(data, "consumers"), {}
    if not consumers:
        return obs(data)
    for consumer in consumers:
        if consumer.name in observed:
            x = observed[consumer.name].reshape(len(y), consumer.n_outputs, -1)
            found = discriminative_capability(
                x, y, penalty=penalty, sample_weight=data.sample_weight
            )
            importance[consumer.name] = found.score.cpu()
    weighed = weigh_outputs(consumers, importance)
    return removal_costs(weighed, len(_need(data, "weight")), data.n_groups)


@_register("fpgm", needs=("weight",))
def fpgm(data: LayerData) -> Tensor:
    """Sum of a filter's distances to all others of its layer (He et al., CVPR 2019).

    A filter of zeros scores 0, wherever the others lie: it costs nothing to remove (our addition).
    """
    w = _weight(data)
    return torch.where(w.any(1), torch.cdist(w, w).sum(1), 0.0)


@_register("bn_scale", needs=("norm_scale",))
def bn_scale(data: LayerData) -> Tensor:
    """Absolute scale of the batch-norm behind the layer (Liu et al., ICCV 2017)."""
    return _need(data, "norm_scale").detach().double().abs()


@_register("hrank", needs=("map_rank", "map_range"))
def hrank(data: LayerData) -> Tensor:
    """Mean rank of a filter's feature map over images (HRank, Lin et al., CVPR 2020).

    Of the map as a matrix of H rows and W columns, see `sinfkit.criteria.map_rank`. A filter
    whose activation is always the same scores 0.
    """
    return _if_it_varies(data, _need(data, "map_rank"))


@_register("chip", needs=("map_independence", "map_range"))
def chip(data: LayerData) -> Tensor:
    """Channel independence (CHIP, Sui et al., NeurIPS 2021).

    Drop of the nuclear norm of the layer's (C, H W) maps without the filter's row, mean over
    images, see `sinfkit.criteria.map_independence`. A filter whose activation is always the
    same scores 0.
    """
    return _if_it_varies(data, _need(data, "map_independence"))


@_register("apoz", needs=("map_zeros", "map_range"))
def apoz(data: LayerData) -> Tensor:
    """One minus the average percentage of zeros (APoZ, Hu et al., 2016), in [0, 1].

    They remove filters of high APoZ, so here those that fire least score lowest. A filter whose
    activation is always the same scores 0.
    """
    return _if_it_varies(data, 1.0 - _need(data, "map_zeros"))


def _if_it_varies(data: LayerData, score: Tensor) -> Tensor:
    """The score, or 0 for filters that a constant can replace."""
    return torch.where(_need(data, "map_range") > 0, score, 0.0).detach().double()


def _register_separability(name: str, function: Callable[..., Tensor]) -> None:
    """Register a score of `sinfkit.criteria.separability`."""

    def criterion(data: LayerData) -> Tensor:
        return function(_need(data, "features"), _need(data, "y"), data.sample_weight)

    criterion.__name__, criterion.__doc__ = name, function.__doc__
    _register(name, needs=("features", "y"))(criterion)


for _name, _separability in (
    ("fdr", separability.fisher_ratio),
    ("abs_snr", separability.abs_snr),
    ("t", separability.t_statistic),
    ("sym_div", separability.sym_div),
    ("j_div", separability.j_divergence),
    ("hellinger", separability.hellinger),
    ("di", separability.discriminant_information),
):
    _register_separability(_name, _separability)


@_register("mmd", needs=("features", "y", "generator"), weighted=False)
def mmd(data: LayerData) -> Tensor:
    """Maximum mean discrepancy, see `sinfkit.criteria.max_mean_discrepancy`."""
    return separability.max_mean_discrepancy(
        _need(data, "features"), _need(data, "y"), generator=data.generator
    )


@_register("random", needs=("weight", "generator"))
def random(data: LayerData) -> Tensor:
    """Uniform random numbers, the lower end of every comparison."""
    n_filters = len(_need(data, "weight"))
    return torch.rand(n_filters, generator=data.generator, dtype=torch.float64)
