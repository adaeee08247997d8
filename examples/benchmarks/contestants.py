"""The networks that are compared: routed ones, and their controls without clusters.

A control with a probe and exits is a routed network of ONE cluster: probe, exits and thresholds
are those of SINF, and only the clusters are missing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from .library import (
    LayerData,
    Normalise,
    SemanticClusterer,
    __version__,
    count_macs,
    count_parameters,
    pruner,
    routed,
)
from .study import BATCH, NETWORKS, Study

BASE = "base"
EXITS = "base, exits"
ONE = "one network"
ONE_EXITS = "one network, exits"
SHALLOW = "one network, blocks dropped"
FOUND = "SINF, found clusters"
GIVEN = "SINF, given clusters"
SHIPPED = "torch-pruning"
REPAIRED = "torch-pruning, our repair"
_DISTILLED = ", distilled"
DISTILLED = tuple(name + _DISTILLED for name in (ONE, SHALLOW, ONE_EXITS, FOUND))
EVERYBODY = (BASE, EXITS, ONE, SHALLOW, ONE_EXITS, FOUND, GIVEN, SHIPPED, REPAIRED, *DISTILLED)
KEYS = ("contestant", "size", "draw")
MAX_DROP = 0.01  # that exits may cost on the choosing images
N_CLUSTERS = 5
EPOCHS = 5  # of training without labels, on the same images
REPAIR_SAMPLES = 4000


@dataclass(frozen=True)
class Contestant:
    """One network: what it is, the share of multiplications it is sliced to, its images."""

    name: str
    size: float
    draw: int

    def key(self) -> dict[str, Any]:
        """What tells its rows apart."""
        return {"contestant": self.name, "size": f"{self.size:g}", "draw": self.draw}


@dataclass(frozen=True, eq=False)
class Made:
    """A network that is ready to run: a module of raw images, or a fitted routed classifier."""

    contestant: Contestant
    module: nn.Module | None
    classifier: Any
    macs: float
    params: float

    def answers(self, X: np.ndarray) -> np.ndarray:
        """Classes that it gives to uint8 images."""
        if self.classifier is not None:
            return np.asarray(self.classifier.predict(X))
        assert self.module is not None
        with torch.inference_mode():
            return torch.cat([self.module(x) for x in raw(X)]).argmax(1).numpy()


def raw(X: np.ndarray, size: int = BATCH) -> Iterator[Tensor]:
    """Batches before normalisation, channels last."""
    for start in range(0, len(X), size):
        x = torch.as_tensor(X[start : start + size]).float().div(255)
        yield x.contiguous(memory_format=torch.channels_last)


def contestants(names: Sequence[str], sizes: Sequence[float], draws: int) -> Iterator[Contestant]:
    """All of them, the base first; the base hangs on no images, its exits on no size."""
    for draw in range(draws):
        for name in names:
            for size in [1.0] if name in (BASE, EXITS) else sizes:
                if name != BASE or draw == 0:
                    yield Contestant(name, size, draw)


def estimator_of(study: Study, one: Contestant) -> Any:
    """The unfitted estimator of a contestant; None of those that have none."""
    name, distilled = one.name.removesuffix(_DISTILLED), one.name.endswith(_DISTILLED)
    epochs = EPOCHS if distilled else None
    own = pruner(
        criterion="dcs_obs", schedule="global", budget=one.size, repair_samples=REPAIR_SAMPLES
    )
    if name in (ONE, SHALLOW):
        return pruner(
            study.model,
            criterion="dcs_obs",
            schedule="global",
            budget=one.size,
            distill=epochs,
            drop_blocks=name == SHALLOW,
            repair_samples=2 * REPAIR_SAMPLES,
            random_state=one.draw,
        )
    clusterers = {
        EXITS: SemanticClusterer(n_clusters=1),
        ONE_EXITS: SemanticClusterer(n_clusters=1),
        FOUND: SemanticClusterer(n_clusters=min(N_CLUSTERS, study.n_classes // 2)),
        GIVEN: SemanticClusterer(method="given", mapping=dict(study.clusters)),
    }
    if name not in clusterers:
        return None
    return routed(
        study.model,
        clusterer=clusterers[name],
        distill=epochs,
        pruner=own,
        route_layer=NETWORKS[study.network][1],
        max_accuracy_drop=MAX_DROP,
        random_state=one.draw,
    )


def make(study: Study, one: Contestant, images: int, folder: Path) -> Made:
    """Fit a contestant, or find it in the folder where it was stored."""
    X, y = study.draw(images, one.draw)
    made_of = (__version__, study.model, one, X, y, study.X_choose)
    path = folder / f"{study.network}_{joblib.hash(made_of)[:16]}.joblib"
    if path.exists():
        return replace(joblib.load(path), contestant=one)
    made = _fit(study, one, X, y)
    folder.mkdir(parents=True, exist_ok=True)
    joblib.dump(made, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)  # whole or not at all
    return made


def _fit(study: Study, one: Contestant, X: np.ndarray, y: np.ndarray) -> Made:
    estimator = estimator_of(study, one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is missed shows in the table
        if one.name == BASE:
            return _plain(study, one, study.model.module())
        if one.name in (SHIPPED, REPAIRED):
            module, scores, ratio = torch_pruning(study, one.size)
            if one.name == SHIPPED:
                return _plain(study, one, module)
            estimator = pruner(
                study.model,
                criterion=Replayed(scores),
                schedule="uniform",
                pruning_ratios=(ratio, ratio),
                repair_samples=2 * REPAIR_SAMPLES,
                random_state=one.draw,
            )
        if one.name.removesuffix(_DISTILLED) in (ONE, SHALLOW, REPAIRED):
            return _plain(study, one, estimator.fit(X, y).model_)
        estimator.fit(X, y, X_val=study.X_choose, y_val=study.y_choose)
        report = estimator.report(study.X_choose, study.y_choose, repeats=0)
    return Made(
        one,
        None,
        estimator,
        report.macs / report.base_macs,
        report.parameters / report.base_parameters,
    )


def _plain(study: Study, one: Contestant, module: nn.Module) -> Made:
    """A network without routes, with its normalisation, and what it costs."""
    model = study.model
    mean, std = (None if v is None else torch.tensor(v) for v in (model.mean, model.std))
    example = next(study.batches(study.X[:1]))
    base = model.module()
    return Made(
        one,
        nn.Sequential(Normalise(mean, std), copy.deepcopy(module)).eval(),
        None,
        count_macs(module, example)[0] / count_macs(base, example)[0],
        count_parameters(module) / count_parameters(base),
    )


class Replayed:
    """A criterion that hands out scores which were found before, layer by layer."""

    needs: frozenset[str] = frozenset()

    def __init__(self, scores: dict[str, np.ndarray]) -> None:
        self.scores = scores

    def __call__(self, layer: LayerData) -> Tensor:
        """Scores of one layer."""
        return torch.as_tensor(self.scores[layer.name])


def torch_pruning(study: Study, budget: float) -> tuple[nn.Module, dict[str, np.ndarray], float]:
    """What torch-pruning makes of the base within a share of its multiplications.

    Fang et al., "DepGraph", CVPR 2023: groups of coupled channels ranked by their L2 norm, the
    same share removed everywhere. It knows no budget: the share is searched.

    Returns the network, which channels stayed (1 or 0) by layer, and the share.
    """
    example = next(study.batches(study.X[:1]))
    whole = count_macs(study.model.module(), example)[0]
    low, high = 0.0, 0.98
    for _ in range(10):
        middle = (low + high) / 2
        module = _shrunk(study, example, middle)[0]
        enough = count_macs(module, example)[0] <= budget * whole
        low, high = (low, middle) if enough else (middle, high)
    return (*_shrunk(study, example, high), high)


def _shrunk(study: Study, example: Tensor, ratio: float) -> tuple[nn.Module, dict[str, np.ndarray]]:
    module = copy.deepcopy(study.model.module()).requires_grad_(True)
    names = {layer: name for name, layer in module.named_modules()}
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    engine = tp.pruner.BasePruner(
        module,
        example,
        tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[linear[-1]],
    )
    kept: dict[str, np.ndarray] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            n = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
            kept[name] = np.ones(n, dtype=np.float32)
    for group in engine.step(interactive=True):
        for dependency, indices in group:
            name = names.get(dependency.target.module, "")
            if name in kept and engine.DG.is_out_channel_pruning_fn(dependency.handler):
                kept[name][indices] = 0.0
        group.prune()
    return module.requires_grad_(False).eval(), kept
