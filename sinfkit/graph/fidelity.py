"""Whether a traced graph is the network: compared on real samples before anything else is done."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..utils.device import full_float32, is_out_of_memory

__all__ = ["check_traced", "close"]

_N_SAMPLES = 4
_STATISTICS = (
    "It may have a batch-norm with track_running_stats=False, or take a mean over the batch: its "
    "answers would change with batch_size. Train it with running statistics, or set them from data."
)
# Of the largest value. Graph and network run the same kernels on the same tensors.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def check_traced(graph: fx.GraphModule, module: nn.Module, X: Tensor) -> None:
    """Compare a graph with the module it was traced from, on a few real samples.

    Raises ValueError, with what is likely to be the cause, if they differ, or if the answer for a
    sample depends on the others of its batch. `X` is of shape (n, ...), normalised.
    """
    X = X[:_N_SAMPLES]
    with torch.inference_mode(), full_float32():
        first, again = output_of(module, X), output_of(module, X)
        if not close(first, again):
            raise ValueError(
                "The model gives another answer when it is asked again: its forward draws random "
                "numbers, or keeps state from call to call, in eval mode. Seed the draw with the "
                "input or take it out; switch Monte Carlo dropout off."
            )
        found = graph(X.clone())
    if not close(found, first):
        raise ValueError(
            "The model could not be followed: the graph recorded from its forward gives other "
            f"answers than the model itself (off by {difference(found, first):.2g} of the "
            f"largest). {_cause(module)}"
        )
    _check_alone(module, X, first)


def _check_alone(module: nn.Module, X: Tensor, together: Tensor) -> None:
    """Raise where samples get other answers alone than `together`."""
    if len(X) < 2:
        return
    with torch.inference_mode(), full_float32():
        try:
            alone = torch.cat([output_of(module, x) for x in X.split(1)])
        except Exception as error:  # a network may raise what it likes
            if is_out_of_memory(error):
                raise
            raise ValueError(f"The model cannot take one sample alone. {_STATISTICS}") from error
    if not close(alone, together):
        raise ValueError(
            "The model's answer for a sample depends on the others of its batch (by "
            f"{difference(alone, together):.2g} of the largest). {_STATISTICS}"
        )


def output_of(module: nn.Module, X: Tensor) -> Tensor:
    """The logits that a module gives for samples that it may overwrite."""
    given = module(X.clone())
    found: Tensor = given if isinstance(given, Tensor) else logits_of(given)
    return found


def logits_of(output: Any) -> Any:
    """Of a model's output, the class scores: the field "logits", or the only element."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    if found is None and isinstance(output, tuple | list) and len(output) == 1:
        found = output[0]
    return output if found is None else found


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    if found.shape != wanted.shape:
        return False
    same = torch.isfinite(wanted) == torch.isfinite(found)
    return bool(same.all()) and difference(found, wanted) <= _TOLERANCES.get(wanted.dtype, 1e-4)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference of two outputs, relative to the largest value."""
    if found.shape != wanted.shape:
        return float("inf")
    finite = torch.isfinite(wanted)
    if not bool(finite.any()):
        return 0.0
    gap = (found.double() - wanted.double())[finite].abs().max()
    largest = wanted[finite].double().abs().max().clamp_min(1e-12)
    return float(gap / largest)


def _cause(module: nn.Module) -> str:
    """What is likely to have been lost."""
    hooked = [
        name or "the model itself"
        for name, part in module.named_modules()
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
    ]
    if hooked:
        return (
            f"It has hooks, or a forward set on the object, at {', '.join(hooked[:3])}: put what "
            "they do into the module's class."
        )
    return (
        "Its forward may write in place into a view (a slice, a chunk, out=), or use something "
        "computed once outside of it: write y = f(x) instead of f_(x[...]), and concatenate."
    )
