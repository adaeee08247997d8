"""All device policy in one place: which device, which precision, what happens on loading."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .params import warn

__all__ = [
    "channels_last",
    "float_type",
    "full_float32",
    "host_tensor",
    "in_pieces",
    "loaded_device",
    "resolve_device",
]

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)


def float_type(module: nn.Module) -> torch.dtype:
    """The type that a network computes in: that of its weights; float32 if it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def in_pieces(function: Callable[..., T], batches: Iterable[Tensor], *rows: Tensor) -> Iterator[T]:
    """Apply a function to each batch, or to parts of it where it runs out of memory.

    Shapes: `batches` (n, ...), `*rows` (n_samples, ...).
    """
    limit: int | None = None
    start = 0
    for batch in batches:
        first, n, device = 0, len(batch), batch.device
        while first < n:
            size = n - first if limit is None else min(n - first, limit)
            last = first + size
            piece = batch if size == n else batch[first:last]
            others = (row[start + first : start + last] for row in rows)
            try:
                result = function(piece, *others)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0]
            else:
                del piece
                yield result
                first = last
                continue
            # Out of the handler: the error's traceback holds what the network was working on.
            del piece, others
            if size == 1:
                del batch
                release_memory(device)
                raise MemoryError(f"Not even one sample fits into the memory of {device}: {reason}")
            release_memory(device)
            limit = size // 2
            warn(
                f"A batch of {size} samples does not fit into the memory of {device}; going on "
                f"with {limit}. Set batch_size={limit} or less to avoid this."
            )
        start += n


def host_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor on the CPU that shares the array's memory, or a copy where torch cannot share it.

    torch takes neither negative strides, nor read-only memory, nor another byte order.
    """
    native = np.require(array, array.dtype.newbyteorder("="), requirements=["C", "W"])
    # An axis of length one may run backwards in an array that counts as contiguous.
    return torch.from_numpy(native.copy() if min(native.strides, default=0) < 0 else native)


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn a `device` parameter into one concrete device."""
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"device={device!r} is not a torch device, such as 'cpu' or 'cuda'."
        ) from error
    if not _is_available(resolved):
        raise ValueError(
            f"device={str(resolved)!r} is not available on this machine. Use device='cpu', or "
            "device='auto' to take a GPU only where there is one."
        )
    if resolved.type == "cuda" and resolved.index is None:
        resolved = torch.device("cuda", torch.cuda.current_device())
    return resolved


def channels_last(module: Module) -> Module:
    """Lay the weights of 2-D convolutions out as their kernels want them, in place.

    Not other parameters, as torch's own ``to`` does: code may rely on how these lie in memory.
    """
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)) and part.weight.ndim == 4:
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)
    return module


def loaded_device(stored: str) -> torch.device:
    """Device for a model stored on `stored`; the CPU, with one warning, if it is missing."""
    device = torch.device(stored)
    if _is_available(device):
        return device
    warnings.warn(
        f"The model was stored on {stored!r}, which this machine does not have; it is loaded on "
        "the CPU. Call .to(device) to move it.",
        UserWarning,
        stacklevel=3,
    )
    return torch.device("cpu")


def _is_available(device: torch.device) -> bool:
    """Whether tensors can be placed on `device` here."""
    if device.type == "cpu":
        return True
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    if device.type == "mps":
        return torch.backends.mps.is_available()
    return False


_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, MPS
    "can't allocate memory",  # torch on Linux
    "not enough memory",  # torch elsewhere
    "bad_alloc",  # C++ below torch
    "ALLOC_FAILED",  # cuBLAS and cuDNN
    "could not create a primitive",  # oneDNN, whatever the reason
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, had no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # Only CUDA has a type of its own for it.
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def release_memory(device: torch.device) -> None:
    """Give back what torch holds on a device without using it."""
    gc.collect()
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


_PROCESS = os.getpid()  # that has imported this; a spawned worker imports it anew


def settle_after_fork() -> None:
    """Compute with one thread in a forked process, where more would wait for ever.

    GNU OpenMP, which torch's wheels use, does not survive a fork: its threads stay behind in the
    parent, and the child waits for them.
    """
    global _PROCESS
    if os.getpid() != _PROCESS:
        torch.set_num_threads(1)
        _PROCESS = os.getpid()


@contextmanager
def on_host_by_default() -> Iterator[None]:
    """Let tensors lie on the CPU where nothing is said of a device, whatever the caller's is."""
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute in full single precision inside the block, and put the caller's settings back.

    Comparisons to 1e-4 mean nothing in TF32 or bfloat16, whose mantissas have ten and seven bits.
    """
    with _LOCK:
        _full_float32(1)
    try:
        yield
    finally:
        with _LOCK:
            _full_float32(-1)


_LOCK = threading.Lock()
_inside = 0
_before: list[Any] = []


def _full_float32(change: int) -> None:
    """Count the threads inside the block: the first switches, the last one switches back."""
    global _inside, _before
    first, _inside = _inside == 0, _inside + change
    backends: Any = torch.backends
    # torch refuses the old switches once the new ones were set, so the new ones where they exist.
    if hasattr(backends.cudnn, "conv"):
        places: list[Any] = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        places += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
        switch: str = "fp32_precision"
        value: str | bool = "ieee"
    else:
        places, switch, value = [backends.cuda.matmul, backends.cudnn], "allow_tf32", False
    if first:
        _before = [getattr(place, switch) for place in places]
    if first or _inside == 0:
        for place, setting in zip(places, _before, strict=True):
            setattr(place, switch, value if first else setting)
