"""How long each layer takes on this machine, and how long it would take if less of it were left.

Multiplications alone do not tell the time of a pass: a call has its overhead, and weights must be
read for one sample as for a thousand.  The three are told apart by measuring a network whole and
half as wide, with many samples and with few.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, fx, nn

from ..graph.cost import _synchronise
from ..graph.tracing import copy_sharing_weights
from ..repair.low_rank import factorized
from ..slicing.channels import NARROWABLE, ChannelGroup, width
from ..slicing.groups import slice_channels

__all__ = ["LayerTime", "expected_seconds", "fit_layer_times", "layer_seconds"]

_REPEATS = 15  # passes of a measurement
_ROUNDS = 3  # turns of the networks that are measured


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer: of a call, of all its weights more, and of each sample."""

    call: float
    weights: float
    sample: float

    @classmethod
    def fitted(cls, cells: np.ndarray) -> LayerTime:
        """Fit the three times to measurements: rows of fraction left, samples and seconds."""
        fraction, n, seconds = cells.T
        design = np.stack([np.ones_like(n), fraction, fraction * n], axis=1)
        call, weights, sample = nnls(design / seconds[:, None], np.ones(len(cells)))[0]
        return cls(float(call), float(weights), float(sample))

    def seconds(self, n_samples: float, fraction: float = 1.0, n_calls: float = 1.0) -> float:
        """Time of so many samples in so many calls, with a fraction of the weights left."""
        per_call = self.call + fraction * self.weights
        return n_calls * per_call + n_samples * fraction * self.sample


def fit_layer_times(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    chosen: Sequence[ChannelGroup],
    batch: Tensor,
    *,
    form: Callable[[fx.GraphModule], fx.GraphModule] = copy_sharing_weights,
    repeats: int = _REPEATS,
) -> dict[str, LayerTime]:
    """Measure on this machine what each layer's calls, weights and multiplications take.

    Of the network whole, and with half of the `chosen` of its `groups`, each in its `form`, on all
    of the `batch` and on an eighth of it: non-negative least squares of the relative errors.  Ours.
    """
    half = {group.name: _every_other(group) for group in chosen}
    narrow = slice_channels(graph, batch[:1], half, groups=list(groups)).model
    assert isinstance(narrow, fx.GraphModule)
    networks = [form(graph), form(narrow)]
    whole = _sizes(networks[0])
    cells = [(net, n) for n in (len(batch), max(1, len(batch) // 8)) for net in networks]
    turns = [
        [layer_seconds(net, batch[:n], max(1, repeats // _ROUNDS)) for net, n in cells]
        for _ in range(_ROUNDS)
    ]
    rows: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for cell, (net, n) in enumerate(cells):
        for name, size in _sizes(net).items():
            if name in turns[0][cell]:
                took = float(np.median([turn[cell][name] for turn in turns]))
                rows[name].append((size / whole[name], n, took))
    return {name: LayerTime.fitted(np.array(measured)) for name, measured in rows.items()}


def _every_other(group: ChannelGroup) -> np.ndarray:
    """Half of a group's channels, the same in each run."""
    run = group.n_channels // group.n_runs
    local = np.arange(0, run, 2)
    return (np.arange(group.n_runs)[:, None] * run + local).ravel()


def _sizes(module: nn.Module) -> dict[str, int]:
    """Number of weights of each layer; of a batch-norm without scales, of channels."""
    return {
        name: layer.weight.numel() if isinstance(layer.weight, Tensor) else width(layer, "out")
        for name, layer in module.named_modules()
        if isinstance(layer, NARROWABLE)
    }


def expected_seconds(
    parts: Sequence[tuple[nn.Module, float]],
    times: Mapping[str, LayerTime],
    whole: nn.Module,
    n_samples: int,
) -> float:
    """Expected time of a batch through parts of a routed network, each with its share of samples.

    A part is called unless no sample of the batch needs it, samples being independent; `times` are
    those of the layers of `whole`.
    """
    sizes, total = _sizes(whole), 0.0
    for part, share in parts:
        n_calls = 1.0 - (1.0 - min(share, 1.0)) ** n_samples
        for name, size in _sizes(part).items():
            whole_name = name if name in times else factorized(name)
            if whole_name in times:
                fraction = size / sizes[whole_name]
                total += times[whole_name].seconds(share * n_samples, fraction, n_calls)
    return total


def layer_seconds(
    graph: fx.GraphModule, batch: Tensor, repeats: int = _REPEATS, warmup: int = 3
) -> dict[str, float]:
    """Measure how long each layer of a network takes on this machine.

    Shapes: `batch` (n, ...).
    """
    twin = copy_sharing_weights(graph).eval()
    started: dict[str, float] = {}
    passes: list[dict[str, float]] = []

    def watch(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: Any, inputs: Any) -> None:
            _synchronise()
            started[name] = time.perf_counter()

        def after(module: Any, inputs: Any, output: Any) -> None:
            _synchronise()
            passes[-1][name] += time.perf_counter() - started[name]

        return before, after

    for name, module in twin.named_modules():
        if isinstance(module, NARROWABLE):
            before, after = watch(name)
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    with torch.inference_mode():
        for _ in range(warmup + repeats):
            passes.append(defaultdict(float))
            twin(batch)
    names = passes[-1].keys()
    return {name: float(np.median([p[name] for p in passes[warmup:]])) for name in names}
