"""Networks whose outputs are no logits: made to give some, or refused."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from ..frozen import FrozenModel
from ..graph.cuts import output_layer, trace
from ..graph.fidelity import close, output_of
from ..graph.heads import without_head

__all__ = ["check_logits", "with_two_outputs"]

_ROUNDING = 5e-3  # of a sum of probabilities, in half precision


def check_logits(graph: fx.GraphModule, samples: Tensor) -> None:
    """Raise where a graph gives probabilities that it does not compute from logits at its end."""
    with torch.inference_mode():
        outputs = graph(samples).double()
    sums = outputs.sum(1)
    if outputs.shape[1] > 1 and bool((outputs >= 0).all() & ((sums - 1).abs() < _ROUNDING).all()):
        raise ValueError(
            "The model returns probabilities (the rows of its output sum to 1) and not logits, and "
            "no softmax at its end that could be left out. Return the numbers in front of the "
            "softmax; of a mean of several, its logarithm."
        )


def with_two_outputs(frozen: FrozenModel, samples: Tensor) -> FrozenModel:
    """Make a network with one logit (binary cross-entropy) one with two, of which one is 0.

    Its last layer gets a second row; the answers are compared on `samples`, normalised.
    """
    module = copy.deepcopy(frozen.module(samples.device)).cpu()
    try:
        one = without_head(trace(frozen.module(samples.device), samples[:1]))
        name = output_layer(one, 1)
        module.set_submodule(name, _two_rows(module.get_submodule(name)))
        made = FrozenModel(module, frozen.mean, frozen.std, frozen.input_shape)
        two = without_head(trace(made.module(samples.device), samples[:1]))
        with torch.inference_mode():
            logit = one(samples).reshape(len(samples), 1)
            right = close(two(samples), torch.cat([torch.zeros_like(logit), logit], 1))
        right = right and output_of(made.module(samples.device), samples).shape == (len(samples), 2)
    except (ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ValueError(f"{_ONE_LOGIT} {error}") from error
    if not right:
        raise ValueError(_ONE_LOGIT)
    return made


_ONE_LOGIT = (
    "The model returns one number per sample. Of a binary classifier whose last layer is a Linear "
    "with one output it is taken as the logit of the second class; this one needs two outputs, one "
    "per class: torch.cat([torch.zeros_like(z), z], 1) is one way."
)


def _two_rows(layer: nn.Module) -> nn.Module:
    """A layer with one output as one with two, of which the first is 0."""
    if isinstance(layer, nn.Linear):
        made: nn.Module = nn.Linear(layer.in_features, 2)
    elif isinstance(layer, nn.Conv2d):
        made = nn.Conv2d(layer.in_channels, 2, 1)
    else:
        raise ValueError(f"Its last layer is a {type(layer).__name__}.")
    made = made.to(layer.weight.dtype).requires_grad_(False).eval()
    for name in ("weight", "bias"):
        target, source = getattr(made, name), getattr(layer, name)
        target.zero_()
        if source is not None:
            target[1:] = source.detach()
    return made
