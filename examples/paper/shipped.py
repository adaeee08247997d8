"""torch-pruning's pruners, as that package ships them, brought to a budget.

Fang et al., "DepGraph: towards any structural pruning", CVPR 2023. Its importances rank groups of
coupled channels by their weights, or by weights times gradients; every layer loses the same share
("local"), or all are ranked together ("global"). It knows no budget: the share is searched here.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from whole import Draw, Whole, differentiable, smallest

IMPORTANCES: dict[str, Callable[[], Any]] = {
    "magnitude_l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "magnitude_l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "bn_scale": tp.importance.BNScaleImportance,
    "fpgm": tp.importance.FPGMImportance,
    "lamp": tp.importance.LAMPImportance,
    "taylor": tp.importance.TaylorImportance,
    "random": tp.importance.RandomImportance,
}
SCOPES = ("local", "global")
_STEPS = 25  # shares that are tried before those between two of them
_HALVINGS = 7


class Shipped:
    """One of its pruners.

    Parameters
    ----------
    whole : Whole
    importance : str
        Key of `IMPORTANCES`.
    scope : {"local", "global"}
    draw : Draw or None
        Images for the gradients that ``"taylor"`` needs.
    seed : int, default=0
        For ``"random"``.
    """

    def __init__(
        self, whole: Whole, importance: str, scope: str, draw: Draw | None = None, seed: int = 0
    ) -> None:
        self._whole, self._importance, self._scope = whole, importance, scope
        self._draw, self._seed = draw, seed
        self._pruner = self._fresh()[1]
        self._names = {module: name for name, module in self._pruner.model.named_modules()}
        self._known: dict[float, dict[str, np.ndarray]] = {}

    def ratio(self, budget: float) -> float:
        """The smallest share of channels without which a network keeps to a budget.

        Raises
        ------
        ValueError
            If none does: it leaves a layer whole from which all channels would go.
        """

        def enough(ratio: float) -> bool:
            widths = {name: len(kept) for name, kept in self.keep(ratio).items()}
            return self._whole.within(widths, budget)

        # A layer that is left whole makes a larger share the slower one, so start from below.
        for step in range(1, _STEPS):
            if enough(step / _STEPS):
                return smallest(enough, (step - 1) / _STEPS, step / _STEPS, _HALVINGS)
        raise ValueError(f"no share of channels keeps to {budget:g} of the multiplications")

    def keep(self, ratio: float) -> dict[str, np.ndarray]:
        """Channels of each of our groups that stay without a share of them."""
        if ratio not in self._known:
            pruner = self._pruner
            pruner.reset()
            pruner.per_step_pruning_ratio = pruner.iterative_pruning_ratio_scheduler(ratio, 1)
            owner = {layer: group for group in self._whole.chosen for layer in group.layers}
            kept = {}
            with self._seeded():
                for found in pruner.step(interactive=True):
                    group = owner[self._names[found[0].dep.target.module]]
                    kept[group.name] = np.setdiff1d(np.arange(group.n_channels), found[0].idxs)
            self._known[ratio] = kept
        return self._known[ratio]

    def pruned(self, ratio: float) -> nn.Module:
        """The network that it makes itself."""
        module, pruner = self._fresh(ratio)
        with self._seeded():
            pruner.step()
        for parameter in module.parameters():
            parameter.grad = None
        return module.requires_grad_(False)

    def _fresh(self, ratio: float = 0.5) -> tuple[nn.Module, Any]:
        """A copy of the base, and a pruner for it."""
        module = differentiable(self._whole.study)
        if self._importance == "taylor":
            assert self._draw is not None
            for name, gradient in self._draw.gradients.items():
                module.get_parameter(name).grad = gradient.clone()
        pruner = tp.pruner.BasePruner(
            module,
            self._whole.example,
            IMPORTANCES[self._importance](),
            global_pruning=self._scope == "global",
            pruning_ratio=ratio,
            ignored_layers=[module.get_submodule(self._whole.output)],
        )
        return module, pruner

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Its random importance draws from the global generator; the same draws every time."""
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(self._seed)
            yield
