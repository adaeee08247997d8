"""The networks that table 4 compares: routed ones, and the controls without routes or clusters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from study import Study
from torch import Tensor, nn

from sinfkit.graph import find_cut, fold_batch_norm, split, trace
from sinfkit.inference import Normalise, RoutePredictor, choose_exit, fit_route_predictor
from sinfkit.routing import ROUTER_WEIGHTS, TEMPERATURES, pooled_output

POOL = 2  # cells per side of what a probe sees, as in SemanticClusterer


def fast(module: nn.Module) -> nn.Module:
    """Batch-norms folded, channels_last: the form in which all are timed."""
    return fold_batch_norm(trace(module)).eval().to(memory_format=torch.channels_last)


def normaliser(study: Study) -> nn.Module:
    """The base's normalisation."""
    model = study.base.model
    if model.mean is None or model.std is None:
        return nn.Identity()
    return Normalise(torch.tensor(model.mean), torch.tensor(model.std))


class Plain(nn.Module):
    """A network without routes: the base, or one pruned for all classes.

    Parameters
    ----------
    normalise, module : nn.Module
    """

    def __init__(self, normalise: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.normalise, self.module = normalise, fast(module)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.module(self.normalise(x))


class Probed(nn.Module):
    """A network with the router's probe on an early layer, but without clusters.

    Parameters
    ----------
    normalise, module : nn.Module
    layer : str
        The cut behind which the probe sits.
    probe : RoutePredictor
        On fine classes.
    weight : float
        Exponent of the probe's posterior in the product with the network's.
    threshold : float, default=2
        Samples of which the probe is at least so sure leave there; 2: none does.
    """

    def __init__(
        self,
        normalise: nn.Module,
        module: nn.Module,
        layer: str,
        probe: RoutePredictor,
        weight: float,
        threshold: float = 2.0,
    ) -> None:
        super().__init__()
        whole = trace(module)
        prefix, rest = split(whole, find_cut(whole, layer))
        self.normalise, self.probe = normalise, probe
        self.prefix, self.rest = fast(prefix), fast(rest)
        self.weight, self.threshold = weight, threshold

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What comes out of the prefix, and the probe's log-posterior."""
        h = self.prefix(self.normalise(x))
        return h, self.probe(h)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities, up to a constant."""
        h, early = self.parts(x)
        if self.threshold > 1:
            return self.rest(h) + self.weight * early
        stay = (early.exp().amax(1) < self.threshold).nonzero()[:, 0]
        if len(stay):
            early[stay] = self.rest(h[stay]) + self.weight * early[stay]
        return early


def probe_behind(module: nn.Module, layer: str, study: Study) -> RoutePredictor:
    """A probe on fine classes behind a layer of a network, as the router's."""
    whole = trace(module)
    prefix = split(whole, find_cut(whole, layer))[0]

    return fit_route_predictor(
        pooled_output(prefix, study.batches(study.X), POOL),
        study.y,
        pooled_output(prefix, study.batches(study.X_test), POOL),
        study.y_test,
        pool_size=POOL,
    ).predictor


def tuned(normalise: nn.Module, module: nn.Module, layer: str, held: Study) -> Probed:
    """A network fused with its own probe, as a subgraph is with the router.

    Its temperature and the probe's weight have the lowest held-out log loss. For answers alone, a
    temperature is a factor on the weight.
    """
    made = Probed(normalise, module, layer, probe_behind(module, layer, held), 0.0)
    late, early = [], []
    with torch.inference_mode():
        for x in raw(held.X_test):
            h, log_p = made.parts(x)
            late.append(made.rest(h))
            early.append(log_p)
    logits, posterior = torch.cat(late), torch.cat(early)
    y = torch.as_tensor(held.y_test)[:, None]
    losses = {
        t * w: float(-torch.log_softmax(logits / t + w * posterior, 1).gather(1, y).mean())
        for t in TEMPERATURES
        for w in ROUTER_WEIGHTS
    }
    made.weight = min(losses, key=lambda w: losses[w])
    return made


def early_exit(made: Probed, held: Study, target: float) -> Probed:
    """The same network, left at the probe where it is sure: SINF without clusters.

    As in SINF, those that stay have the fused answer, and as many held-out samples leave as
    `target` allows, or as cost nothing where it is out of reach.
    """
    answers, sure, leaves = [], [], []
    with torch.inference_mode():
        for x in raw(held.X_test):
            h, log_p = made.parts(x)
            answers.append((made.rest(h) + made.weight * log_p).argmax(1))
            confidence, early = log_p.exp().max(1)
            sure.append(confidence)
            leaves.append(early)
    late, early = (torch.cat(parts).numpy() == held.y_test for parts in (answers, leaves))
    exiting = copy.copy(made)
    exiting.threshold = choose_exit(torch.cat(sure).numpy(), early, late, target=target)
    return exiting


def raw(X: np.ndarray, batch: int = 256) -> Iterator[Tensor]:
    """Batches before normalisation."""
    for start in range(0, len(X), batch):
        x = torch.as_tensor(X[start : start + batch]).float().div(255)
        yield x.contiguous(memory_format=torch.channels_last)


def right_answers(module: Any, study: Study) -> np.ndarray:
    """Whether a network is right on each of the study's test images."""
    with torch.inference_mode():
        answers = torch.cat([module(x).argmax(1) for x in raw(study.X_test)])
    return answers.numpy() == study.y_test
