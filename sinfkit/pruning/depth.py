"""How many residual blocks are left out, and which: by what the answers lose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..graph.tracing import copy_sharing_weights
from ..slicing.blocks import Block, cut_out

_AT_ONCE = 32  # samples, whose activations need little memory


@dataclass(frozen=True)
class Depth:
    """Blocks in the order in which they go, and how much of what a budget takes away is theirs.

    `costs` are shares of the base's cost, of shape (n_blocks,); `share` lies in [0, 1].
    """

    blocks: tuple[Block, ...] = ()
    costs: tuple[float, ...] = ()
    share: float = 0.0

    def at(self, budget: float | None) -> tuple[Block, ...]:
        """The blocks that are left out under a budget."""
        if budget is None:
            return ()
        within = np.cumsum(self.costs) <= self.share * (1 - budget) + 1e-9
        return self.blocks[: int(within.sum())]


def rank_blocks(
    graph: fx.GraphModule,
    blocks: Sequence[Block],
    cost_of: Callable[[Sequence[Block]], float],
    X: Tensor,
    outputs: Tensor,
    most: float,
) -> Depth:
    """Order blocks by what the answers lose without each alone, for what that saves.

    `cost_of` gives the share of the cost that blocks have; so much as `most` is enough. Loss is the
    Kullback-Leibler divergence of the base's answers to `X`, (n, ...), among the columns `outputs`,
    before any repair. Measured anew after each block that goes, it orders them no better: what is
    lost then is mostly what a repair brings back.
    """

    def answers(model: fx.GraphModule) -> Tensor:
        with torch.inference_mode():
            found = [model(x)[:, outputs].float() for x in X.split(_AT_ONCE)]
        return torch.cat(found).log_softmax(1)

    wanted = answers(graph)

    def loss(block: Block) -> float:
        model = copy_sharing_weights(graph)
        cut_out(model, [block])
        found = float(F.kl_div(answers(model), wanted, reduction="batchmean", log_target=True))
        return max(found, 0.0) if np.isfinite(found) else np.inf

    costs = {block: cost_of([block]) for block in blocks}
    price = {block: loss(block) / costs[block] for block in blocks if costs[block] > 0}
    order = sorted(price, key=price.__getitem__)
    before = np.cumsum([0.0, *(costs[block] for block in order)])[:-1]
    order = order[: int((before < most).sum())]
    return Depth(tuple(order), tuple(costs[block] for block in order))
