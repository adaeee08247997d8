"""Batches run through a network, in halves where memory does not suffice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import Tensor

from ._calls import caller_level
from ._device import is_out_of_memory, release_memory

T = TypeVar("T")


def in_pieces(function: Callable[..., T], batches: Iterable[Tensor], *rows: Tensor) -> Iterator[T]:
    """Apply a function to each batch, or to parts of it where it runs out of memory.

    Parameters
    ----------
    function : callable
        Of a batch, and of its part of each of `rows`.  It is called again with half of a batch for
        which it ran out of memory, so it must not have kept anything of it.
    batches : iterable of Tensor of shape (n, ...)
    *rows : Tensor of shape (n_samples, ...)
        What else belongs to the samples, for all batches together, on any device.

    Yields
    ------
    object
        The function's results, in the order of the samples; one per batch or part of one.

    Raises
    ------
    MemoryError
        If not even one sample can be computed; nothing of the batch is held then.

    Warns
    -----
    UserWarning
        Once for each size that turns out to be too large.  What follows is not tried in that size
        again.

    Examples
    --------
    >>> import torch
    >>> list(in_pieces(len, [torch.zeros(3), torch.zeros(2)]))
    [3, 2]
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
            warnings.warn(
                f"A batch of {size} samples does not fit into the memory of {device}; going on "
                f"with {limit}. Set batch_size={limit} or less to avoid this.",
                UserWarning,
                stacklevel=caller_level(),
            )
        start += n
