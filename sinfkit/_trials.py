"""Trying a slice before it is relied upon.

A dependency graph knows what it was taught. Whether channels can really leave is a matter of fact:
the smaller network computes what the masked one does, or it does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ._channels import ChannelGroup, take_out
from ._masking import Comparison, exact_inference, precision

# Rounding moves outputs by about 1e-6 of their largest value, a wrong index by about 1. In between
# lie weak dependencies between channels (local response normalisation), to be noticed as well.
_TRIAL_TOLERANCE = 3e-5


def try_groups(model: nn.Module, groups: Sequence[ChannelGroup], example: Tensor) -> dict[str, str]:
    """Slice half of every group; give the reasons of those that do not equal the mask."""
    rng = np.random.default_rng(0)
    # An example may be blank; noise as strong as it varies wakes the channels.
    noise = torch.from_numpy(rng.standard_normal((2, *example.shape[1:])))
    x = precision(model, example[:1])
    x = x + (float(x.std(correction=0)) or 1.0) * noise.to(x)
    dense = Comparison(model, model, {})
    with exact_inference(x):
        if not torch.isfinite(dense.masked(x.clone())).all():
            raise ValueError(
                "The model gives values that are not finite: check its weights and the scale of X."
            )
    halves = {group.name: _half(group, rng) for group in groups}
    reasons: dict[str, str] = {}
    accepted: list[ChannelGroup] = []

    def settle(candidates: Sequence[ChannelGroup]) -> None:
        """Accept the candidates if they pass together; else look for those that do not."""
        if not candidates:
            return
        tried = [(group, halves[group.name]) for group in (*accepted, *candidates)]
        why = _trial(model, tried, x)
        if not why:
            accepted.extend(candidates)
        elif len(candidates) == 1:
            reasons[candidates[0].name] = why
        else:
            settle(candidates[: len(candidates) // 2])
            settle(candidates[len(candidates) // 2 :])

    settle(groups)
    return reasons


def _half(group: ChannelGroup, rng: np.random.Generator) -> np.ndarray:
    """Choose half of the channels, the same in each run; outputs in mixed order."""
    run = group.n_channels // group.n_groups
    local = rng.permutation(run)[: (run + 1) // 2]
    if not group.is_output or group.consumers:
        local = np.sort(local)
    return (np.arange(group.n_groups)[:, None] * run + local).ravel()


def _trial(model: nn.Module, tried: list[tuple[ChannelGroup, np.ndarray]], x: Tensor) -> str:
    """Say why slicing these groups does not equal masking them; nothing if it does."""
    sliced = take_out(model, [], tried)
    try:
        comparison = Comparison(model, sliced.model, sliced.removed_inputs)
        difference = comparison.of_outputs(x, sliced.outputs)
    except Exception as error:
        return f"the forward pass fails where it is narrower ({str(error).splitlines()[0]})"
    if difference <= _TRIAL_TOLERANCE:
        return ""
    return "its channels meet, or change places, outside of layers"
