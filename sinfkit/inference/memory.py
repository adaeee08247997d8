"""What a routed network takes: bytes of its weights, part by part, and of a batch at its peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..graph.cost import count_parameters
from .network import SINFNetwork

__all__ = ["MemoryUse", "memory_use", "peak_bytes"]


@dataclass(frozen=True)
class MemoryUse:
    """Parameters and bytes of a routed network and of its base.

    Attributes
    ----------
    parameters, bytes : dict of str to int
        Of ``"prefix"``, ``"router"``, ``"subgraphs"`` (all of them together), ``"rest"`` (the
        base's, for the fallback), ``"total"`` of the routed network, and ``"base"`` where one was
        given.  Bytes count buffers too.  Each storage counts once in each entry, however many
        layers share it.
    peak : int or None
        Most bytes that were alive at one time while a batch ran, weights aside; None where no batch
        was given.
    base_peak : int or None
        The same for the base.
    """

    parameters: dict[str, int]
    bytes: dict[str, int]
    peak: int | None
    base_peak: int | None

    def __str__(self) -> str:
        lines = [f"{'':12}{'parameters':>14}{'MiB':>10}"]
        for name, count in self.parameters.items():
            lines.append(f"{name:12}{count:>14,}{self.bytes[name] / 2**20:>10.2f}")
        for name, peak in (("batch", self.peak), ("base's batch", self.base_peak)):
            if peak is not None:
                lines.append(f"{name:12}{'':>14}{peak / 2**20:>10.2f}")
        return "\n".join(lines)


def memory_use(
    network: SINFNetwork, base: nn.Module | None = None, batch: Tensor | None = None
) -> MemoryUse:
    """Count what a routed network holds, and measure what it needs for a batch.

    Parameters
    ----------
    network : SINFNetwork
        For instance the ``network_`` of a fitted classifier, or a `Runtime` of it.
    base : nn.Module, optional
        The network that it was made from, to set beside it; takes normalised samples.
    batch : Tensor of shape (n_samples, ...), optional
        Samples before normalisation, on the network's device.

    Returns
    -------
    MemoryUse
        ``print`` it for a table.

    Raises
    ------
    ValueError
        If `batch` is empty.

    Notes
    -----
    Storages are told apart by their address, so that a `Runtime` with ``offload`` shows prefix,
    router and rest only.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import SINFClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> clf = SINFClassifier(random_state=0).fit(X, y)
    >>> use = memory_use(clf.network_, batch=torch.as_tensor(X))
    >>> use.bytes["total"] > 8 * use.parameters["total"], use.peak > X.nbytes
    (True, True)
    """
    if batch is not None and len(batch) == 0:
        raise ValueError("batch needs at least one sample.")
    parts: dict[str, nn.Module] = {
        "prefix": network.prefix,
        "router": network.router,
        "subgraphs": network.subgraphs,
    }
    if network.rest is not None:
        parts["rest"] = network.rest
    parts["total"] = network
    if base is not None:
        parts["base"] = base
    peak = base_peak = None
    if batch is not None:
        peak = peak_bytes(network, batch)
        if base is not None:
            base_peak = peak_bytes(nn.Sequential(network.normalise, base), batch)
    return MemoryUse(
        {name: count_parameters(part) for name, part in parts.items()},
        {name: _held(part) for name, part in parts.items()},
        peak,
        base_peak,
    )


def peak_bytes(module: nn.Module, batch: Tensor) -> int:
    """Measure how many bytes of activations are alive at one time while a batch runs.

    Parameters
    ----------
    module : nn.Module
        Run once, without gradients, as it is.
    batch : Tensor of shape (n_samples, ...)
        Counts as well.

    Returns
    -------
    int
        Bytes of tensors, without the module's own.  Scratch space inside a kernel is not seen, nor
        anything inside compiled code.

    Examples
    --------
    >>> x = torch.zeros(10, 4)  # 160 bytes, and 80 for the answer
    >>> peak_bytes(nn.Linear(4, 2), x)
    240
    """
    tracker = _LiveBytes([*module.parameters(), *module.buffers()])
    # Not inference mode: there, operations made of others would not show their parts.
    with torch.no_grad(), tracker:
        tracker.note(batch)
        module(batch)
    return tracker.peak


def _held(module: nn.Module) -> int:
    """Bytes of a module's storages."""
    storages = (t.untyped_storage() for t in [*module.parameters(), *module.buffers()])
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as they live."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return out

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's storage unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._live:
            return
        self._live[key] = storage.nbytes()
        weakref.finalize(storage, self._live.pop, key, None)
        self.peak = max(self.peak, sum(self._live.values()))
