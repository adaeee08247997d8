"""Shapes of samples: what to do with X where the network does not take it as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..graph.fidelity import output_of
from ..utils.device import is_out_of_memory

__all__ = ["check_shape", "count_outputs", "looks_like_nhwc", "shape_hint"]

Shape = tuple[int, ...]


def check_shape(shape: Shape, expected: Shape) -> None:
    """Raise unless samples of an X of `shape` are of the shape `expected`."""
    if shape[1:] == expected:
        return
    hint = shape_hint(shape, lambda sample: sample == expected)
    raise ArgumentError(
        f"X has shape {shape}, but the model takes samples of shape {expected}: "
        f"(n_samples, {', '.join(map(str, expected))}).{hint}",
        "X",
    )


def count_outputs(module: nn.Module, samples: Tensor, shape: Shape) -> int:
    """Width of a network's output; a ValueError where it cannot take samples of an X of `shape`."""
    try:
        with torch.inference_mode():
            logits = output_of(module, samples)
    except Exception as error:  # a network may raise what it likes
        if is_out_of_memory(error):
            raise
        hint = shape_hint(shape, lambda sample: _accepts(module, samples, sample))
        raise ValueError(
            f"The model cannot take samples of shape {shape[1:]}.{hint or f' It says: {error}'}"
        ) from error
    if isinstance(logits, Tensor) and logits.shape == (len(samples),):
        return 1
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(samples):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"The model must return one row of class scores per sample (a 2-D tensor), got {got}."
        )
    return int(logits.shape[1])


def _accepts(module: nn.Module, samples: Tensor, shape: Shape) -> bool:
    """Whether a network can take samples of another shape."""
    try:
        with torch.inference_mode():
            output_of(module, samples.new_zeros((1, *shape)))
    except Exception:  # a network may raise what it likes
        return False
    return True


def shape_hint(shape: Shape, accepts: Callable[[Shape], bool]) -> str:
    """What makes an X of `shape` one of samples whose shape `accepts` is true for; or nothing."""
    for sample, text in _candidates(shape):
        if accepts(sample):
            return f" {text}"
    return ""


def _candidates(shape: Shape) -> list[tuple[Shape, str]]:
    """Shapes that samples would have if X were changed, and how to change it."""
    found: list[tuple[Shape, str]] = [(shape, "X is one sample: pass X[None].")]
    if len(shape) == 2:
        found.append(((1, *shape), "X is one grey image: pass X[None, None]."))
    if len(shape) == 3:
        n, height, width = shape
        found += [
            ((1, height, width), "These are grey images: pass X[:, None]."),
            (
                (width, n, height),
                "X looks like one image in HWC (channels last): pass X.transpose(2, 0, 1)[None].",
            ),
        ]
    if len(shape) == 4:
        _, first, second, last = shape
        found.append(
            (
                (last, first, second),
                "X looks like NHWC (channels last); pass NCHW: X.transpose(0, 3, 1, 2).",
            )
        )
        if first == 1:
            wide = "These are grey images: pass X.repeat(3, axis=1), as the model was trained."
            found.append(((3, second, last), wide))
        if first == 4:
            found.append(((3, second, last), "Leave the fourth channel out: pass X[:, :3]."))
        if first == 3:
            grey = "The model takes grey images: pass X.mean(axis=1, keepdims=True)."
            found.append(((1, second, last), grey))
    return found


def looks_like_nhwc(shape: Shape) -> bool:
    """Whether images are likely to be NHWC, where no network can tell."""
    if len(shape) != 4:
        return False
    _, first, second, last = shape
    return last in (1, 3, 4) and first not in (1, 3, 4) and min(first, second) >= 8
