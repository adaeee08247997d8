"""The samples that a network is studied on, matched with it, and read in batches."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import joblib
import numpy as np
import torch
from torch import fx
from tqdm.auto import tqdm

from ..frozen import FrozenModel
from ..graph.cuts import trace
from ..graph.heads import without_head
from ..slicing.groups import ChannelGroup, find_groups
from ..utils.device import host_tensor, loaded_device, settle_after_fork
from ..utils.params import naming
from ..utils.pickling import pack
from .images import LazyImages
from .labels import ClassTable
from .validation import Images

__all__ = ["Batcher", "Calibration", "progress"]

T = TypeVar("T")


@dataclass
class Calibration:
    """A base network and the samples it is studied on, checked and matched.

    Shapes: `X` (n_samples, ...), `y_encoded` (n_samples,), `example` (1, ...), `weight`
    (n_samples,).
    """

    frozen: FrozenModel
    graph: fx.GraphModule
    output: str
    X: Images
    y_encoded: np.ndarray
    table: ClassTable
    n_outputs: int
    batcher: Batcher
    example: torch.Tensor
    seed: int
    weight: np.ndarray

    def weights(self, index: np.ndarray) -> np.ndarray:
        """How many times each of the samples `index` counts."""
        return self.weight[index]

    @functools.cached_property
    def key(self) -> tuple[str, ...]:
        """Tells network, samples and batches apart from others, for caches."""
        return (
            self.frozen.digest,
            self.X.digest() if isinstance(self.X, LazyImages) else joblib.hash(self.X),
            str(self.batcher.device),
            str(self.batcher.batch_size),
        )

    @functools.cached_property
    def groups(self) -> list[ChannelGroup]:
        """The network's coupled channels, in forward order."""
        with naming("model"):
            return find_groups(self.graph, self.example, self.output)

    def __getstate__(self) -> dict[str, Any]:
        """For a job elsewhere: the samples stay here, and the graph is traced anew there."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("X", "graph", "batcher")}
        state["example"] = pack(self.example)
        batcher = self.batcher
        state["batcher"] = (str(batcher.device), batcher.dtype, batcher.batch_size)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        stored, dtype, batch_size = state.pop("batcher")
        device = loaded_device(stored)
        self.__dict__.update(state)
        self.example = state["example"].unpack(device)
        self.batcher = Batcher(self.frozen, device, dtype, batch_size)
        self.graph = without_head(trace(self.frozen.module(device), self.example), self.example)


class Batcher:
    """Batches of samples as the network wants them: on its device, in its type, normalised."""

    def __init__(
        self, frozen: FrozenModel, device: torch.device, dtype: torch.dtype, batch_size: int
    ) -> None:
        settle_after_fork()  # whatever computes needs batches first
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self._mean = None if frozen.mean is None else torch.tensor(frozen.mean, dtype=dtype)
        self._std = None if frozen.std is None else torch.tensor(frozen.std, dtype=dtype)

    def load(self, X: Images) -> torch.Tensor:
        """Put samples on the device: float, uint8 divided by 255.  Not normalised."""
        if isinstance(X, np.ndarray):
            X = host_tensor(X)
        x = X.to(self.device)
        x = x.to(self.dtype).div_(255) if x.dtype == torch.uint8 else x.to(self.dtype)
        return x

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """(x - mean) / std per channel."""
        if self._mean is None or self._std is None:
            return x
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x - self._mean.to(x.device).view(shape)) / self._std.to(x.device).view(shape)

    def raw(self, X: Images) -> Iterator[torch.Tensor]:
        """Batches that are loaded, not normalised (SINFNetwork normalises by itself)."""
        for start in range(0, len(X), self.batch_size):
            yield self.load(X[start : start + self.batch_size])

    def __call__(self, X: Any, index: np.ndarray | None = None) -> Iterator[torch.Tensor]:
        """Normalised batches of `X`, or of its rows `index` in that order."""
        n = len(X) if index is None else len(index)
        for start in range(0, n, self.batch_size):
            stop = min(start + self.batch_size, n)
            rows = slice(start, stop) if index is None else index[start:stop]
            yield self.normalise(self.load(X[rows]))


def progress(items: Iterable[T], description: str, verbose: int, total: int | None = None) -> Any:
    """Wrap an iterable in a progress bar if `verbose`, else return it as it is."""
    if not verbose:
        return items
    return tqdm(items, desc=description, total=total, leave=False)
