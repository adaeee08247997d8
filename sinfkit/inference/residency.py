"""Which subgraphs lie on the device, where not all of them fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from .compiled import Weights

__all__ = ["Residency"]


class Residency:
    """Which subgraphs' weights lie on the device: the ones that ran last.

    Parameters
    ----------
    weights : mapping of int to weights
        Parameters and buffers of each subgraph, by cluster and name, in the host's memory.
    device : torch.device
        Where they run.
    limit : int
        Most subgraphs on the device at a time.

    Attributes
    ----------
    n_loads : int
        How often a subgraph was brought to the device.
    """

    def __init__(self, weights: Mapping[int, Weights], device: torch.device, limit: int) -> None:
        self._host = {
            c: {k: _ready(t, device) for k, t in one.items()} for c, one in weights.items()
        }
        self._device: OrderedDict[int, Weights] = OrderedDict()
        self._place, self._limit = device, limit
        self.n_loads = 0

    @property
    def on_device(self) -> list[int]:
        """Clusters whose subgraphs lie on the device, the one that ran last in the end."""
        return list(self._device)

    def fetch(self, cluster: int) -> Weights:
        """Weights of a subgraph on the device."""
        if cluster in self._device:
            self._device.move_to_end(cluster)
            return self._device[cluster]
        while len(self._device) >= self._limit:
            self._device.popitem(last=False)  # the host has the same weights still
        self.n_loads += 1
        self._device[cluster] = {
            name: tensor.to(self._place, non_blocking=True)
            for name, tensor in self._host[cluster].items()
        }
        return self._device[cluster]


def _ready(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor in memory from which a GPU can fetch it without waiting."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
