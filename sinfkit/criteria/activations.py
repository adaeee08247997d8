"""One streaming pass over the images: pooled activations, or Taylor scores, of chosen layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..graph.cuts import channel_axis, samples_first, with_capture
from ..graph.tracing import copy_sharing_weights
from ..utils.device import in_pieces

__all__ = ["Statistics", "collect", "pool", "taylor_scores"]

MAX_POOL_SIZE = 64  # cells per side; more would only repeat what is there


@dataclass
class Statistics:
    """What `collect` gathers.

    Shapes: `pooled` (n_samples, n_channels * size**2), `logits` (n_samples, n_outputs).
    """

    pooled: dict[str, Tensor]
    logits: Tensor


def pool(x: Tensor, size: int, axis: int | None = None) -> Tensor:
    """Average activations over a grid of cells, or over all positions where they are no images.

    Shapes: `x` (n, C, ...), returns (n, C * size**2).  `axis` is that of the channels; None: the
    last one of (n, T, C).
    """
    if size < 1:
        raise ValueError(f"pool size must be positive, got {size}")
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if x.dim() == 2:
        return x
    if axis == -1 or (axis is None and x.dim() == 3):
        x = x.movedim(-1, 1)
    if size == 1 or x.dim() != 4:
        return x.mean(tuple(range(2, x.dim())))
    return F.adaptive_avg_pool2d(x, int(size)).flatten(1)


def collect(
    gm: fx.GraphModule,
    batches: Iterable[Tensor],
    nodes: Mapping[str, str],
    pool_size: int | Mapping[str, int] = 1,
) -> Statistics:
    """Gather pooled activations and outputs in one pass.

    Shapes: `batches` (n, ...).
    """
    sizes = {k: pool_size[k] if isinstance(pool_size, Mapping) else pool_size for k in nodes}
    # Layers that are added up are observed at one node: pool it once.
    places = {key: (node, sizes[key]) for key, node in nodes.items()}
    first_key = {place: key for key, place in reversed(list(places.items()))}
    wanted = {key: node for (node, _), key in first_key.items()}
    axes = {key: channel_axis(gm, node) for key, node in wanted.items()}
    rows = {key: samples_first(gm, node) for key, node in wanted.items()}
    parts: dict[str, list[Tensor]] = {key: [] for key in wanted}
    logits: list[Tensor] = []
    seen: dict[str, Tensor] = {}

    def keep(key: str, value: Tensor) -> None:
        seen[key] = _to_cpu(pool(rows[key](value), sizes[key], axes[key]))

    watched = with_capture(gm, wanted, keep)
    with torch.inference_mode():
        for out in in_pieces(lambda batch: _to_cpu(_checked(watched(batch))), batches):
            logits.append(out)
            for key, value in seen.items():
                parts[key].append(value)
    if not logits:
        raise ValueError("there is no batch to collect activations from")
    # One key after the other, so that no more than one is held twice.
    joined = {key: torch.cat(parts.pop(key)) for key in wanted}
    pooled = {key: joined[first_key[place]] for key, place in places.items()}
    return Statistics(pooled, torch.cat(logits))


def taylor_scores(
    gm: fx.GraphModule,
    batches: Iterable[tuple[Tensor, Tensor]],
    nodes: Mapping[str, str],
    outputs: Sequence[int] | None = None,
    *,
    sample_weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """First-order Taylor scores of channels, after Molchanov et al. (2017, 2019).

    Shapes: `batches` (n, ...), `sample_weight` (n_samples,), returns (n_channels,).
    """
    first_key = {node: key for key, node in reversed(list(nodes.items()))}
    wanted = {key: node for node, key in first_key.items()}
    axes = {key: channel_axis(gm, node) for key, node in wanted.items()}
    rows = {key: samples_first(gm, node) for key, node in wanted.items()}
    totals: dict[str, Tensor] = {}
    weights = None if sample_weight is None else _Slices(sample_weight.double())

    def attend(key: str, value: Tensor) -> None:
        if not value.requires_grad:
            value.requires_grad_()
        # The hook may hold the value's numbers but not the value, which holds the hook.
        numbers = value.detach()

        def add(gradient: Tensor) -> None:
            change = _over_positions(rows[key](numbers * gradient), axes[key]).abs().double()
            if weights is not None:
                change = change * weights.here.to(change)[:, None]
            score = change.sum(0)
            totals[key] = totals[key] + score if key in totals else score

        value.register_hook(add)
        totals.setdefault(key, numbers.new_zeros(numbers.shape[axes[key]], dtype=torch.float64))

    # Copied, since the call below puts the constants in the modules' places for its time, and other
    # threads may be using the same modules.
    watched = copy_sharing_weights(with_capture(gm, wanted, attend))
    constants = {name: p.detach() for name, p in watched.named_parameters()}

    def attribute(batch: Tensor, labels: Tensor) -> int:
        if weights is not None:
            weights.advance(len(batch))
        logits = _checked(torch.func.functional_call(watched, constants, (batch.detach(),)))
        if outputs is not None:
            logits = logits[:, torch.as_tensor(outputs, device=logits.device)]
        _check_labels(labels, *logits.shape)
        loss = F.cross_entropy(logits, labels.to(logits.device).long(), reduction="sum")
        if loss.requires_grad:
            loss.backward()
        return len(batch)

    # Whatever a batch needs ends with the call, before the next batch is read.
    with torch.inference_mode(False), torch.enable_grad():
        n_samples = sum(attribute(batch, labels) for batch, labels in batches)
    if n_samples == 0:
        raise ValueError("there is no sample to compute Taylor scores from")
    size = n_samples if weights is None else float(weights.values.sum())
    means = {key: total.cpu() / size for key, total in totals.items()}
    return {key: means[first_key[node]] for key, node in nodes.items()}


class _Slices:
    """What belongs to the samples of the batch at hand, `here`."""

    def __init__(self, values: Tensor) -> None:
        self.values, self._start = values, 0
        self.here = values[:0]

    def advance(self, n: int) -> None:
        """Go on to the next batch, of `n` samples."""
        self.here = self.values[self._start : self._start + n]
        self._start += n


def _to_cpu(x: Tensor) -> Tensor:
    """A copy on the CPU, of at least single precision, that shares nothing with its source."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to("cpu", dtype, copy=True)


def _checked(logits: Tensor) -> Tensor:
    """The network's outputs, if they are one row of logits per sample."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(
            "the network must return a tensor of shape (n_samples, n_outputs), but it returns "
            f"{tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}"
        )
    return logits


def _check_labels(labels: Tensor, n_samples: int, n_outputs: int) -> None:
    """Raise unless there is one label in range per sample."""
    if labels.shape != (n_samples,):
        raise ValueError(
            f"there must be one label per sample: expected shape ({n_samples},), got "
            f"{tuple(labels.shape)}"
        )
    if n_samples and not 0 <= int(labels.min()) <= int(labels.max()) < n_outputs:
        raise ValueError(
            f"labels must lie in 0..{n_outputs - 1}, the positions of the outputs that the loss is "
            f"taken over; found {int(labels.min())}..{int(labels.max())}"
        )


def _over_positions(x: Tensor, axis: int) -> Tensor:
    """Sum over all axes but those of samples and channels."""
    channels_first = x if axis == 1 else x.movedim(-1, 1)
    return channels_first.flatten(2).sum(2) if x.dim() > 2 else x
