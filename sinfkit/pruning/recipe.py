"""How to prune: one configuration, the groups that it is about, and the channels that it keeps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor, fx

from ..criteria.activations import MAX_POOL_SIZE
from ..criteria.registry import Criterion, get_criterion
from ..repair.sequential import REPAIRS
from ..slicing.groups import ChannelGroup, Sliced, check_sliced, slice_channels
from ..utils.params import caller_level, check_choice, check_integer, check_number
from .costs import UNITS
from .schedules import SCHEDULES, n_removed, removal_ratios, select_top

__all__ = ["Recipe", "choose_channels", "extract", "sliceable"]

Schedule = Literal["global", "linear", "geometric", "uniform", "iterative"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to prune: everything but the network and the samples; checked when it is made."""

    criterion: Any
    schedule: Schedule = "global"
    pruning_ratios: tuple[float, float] = (0.1, 0.5)
    budget: float | None = None
    budget_unit: Literal["macs", "params", "latency"] = "macs"
    max_ratio: float = 0.9  # a budget, not this, shall say how much goes
    round_to: int = 1
    penalty: float = 3.0
    pool_size: int = 1
    repair: str = "least_squares"
    repair_samples: int = 4000

    def __post_init__(self) -> None:
        object.__setattr__(self, "criterion", get_criterion(self.criterion))
        check_choice("schedule", self.schedule, get_args(Schedule))
        object.__setattr__(self, "pruning_ratios", _ratios(self.pruning_ratios))
        first, last = self.pruning_ratios
        if last < first and self.schedule in ("linear", "geometric"):
            raise ValueError(
                f"pruning_ratios must not fall from the first to the last layer, got "
                f"{self.pruning_ratios!r}."
            )
        check_number("budget", self.budget, "(0, 1]", optional=True)
        if self.schedule != "global" and self.budget is not None:
            raise ValueError(
                f"budget has an effect with schedule='global' only, got budget={self.budget!r} "
                f"with schedule={self.schedule!r}."
            )
        check_choice("budget_unit", self.budget_unit, UNITS)
        check_number("max_ratio", self.max_ratio, "[0, 1)")
        check_integer("round_to", self.round_to)
        if self.round_to > 1 and self.schedule == "iterative":
            raise ValueError("round_to has no effect with schedule='iterative'.")
        check_number("penalty", self.penalty, "(0, inf)")
        check_integer("pool_size", self.pool_size, high=MAX_POOL_SIZE)
        check_choice("repair", self.repair, REPAIRS)
        check_integer("repair_samples", self.repair_samples)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the criterion, of those that it knows."""
        scorer: Criterion = self.criterion
        return {"penalty": self.penalty} if "penalty" in scorer.options else {}

    @property
    def searches(self) -> bool:
        """Whether the size is to be searched."""
        return self.schedule == "global" and self.budget is None

    @property
    def measures_losses(self) -> bool:
        """Whether layers are compared by what their consumers lose, which no score says."""
        return self.schedule == "global" and not self.criterion.cumulative

    def check_weights(self, weight: np.ndarray) -> None:
        """Raise where samples count differently and the criterion knows only whole ones."""
        if not self.criterion.weighted and (weight != 1).any():
            raise ValueError(
                f"criterion {self.criterion.name!r} takes no sample_weight. Choose another, fit "
                "without weights, or (a function) say in its attribute `needs` that it uses "
                "'sample_weight'."
            )


def _ratios(value: Any) -> tuple[float, float]:
    """Two ratios in [0, 1), or a ValueError that says what is wrong with them."""
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != 2:
        raise ValueError(
            f"pruning_ratios must be two numbers, for the first and the last layer; got {value!r}."
        )
    for ratio in value:
        check_number("pruning_ratios", ratio, "[0, 1)")
    return float(value[0]), float(value[1])


def sliceable(
    groups: Sequence[ChannelGroup], within: Iterable[str] | None = None
) -> list[ChannelGroup]:
    """Select the groups that a schedule counts: hidden, can be sliced, wholly inside `within`.

    A group with a layer, or a consumer, outside stays whole: its channels cross the border.
    """
    allowed = None if within is None else set(within)
    return [
        group
        for group in groups
        if not (group.is_output or group.n_channels < 2 or group.reason_unsliceable)
        and (allowed is None or allowed.issuperset((*group.layers, *group.consumers)))
    ]


def warn_about_whole(groups: Sequence[ChannelGroup], within: Iterable[str] | None = None) -> None:
    """Name, in one warning, the layers that stay whole because they cannot be sliced."""
    allowed = None if within is None else set(within)
    reasons = [
        f"{group.name} ({group.reason_unsliceable})"
        for group in groups
        if group.reason_unsliceable
        and not group.is_output
        and (allowed is None or allowed.intersection(group.layers))
    ]
    if reasons:
        warnings.warn(
            "Some layers cannot be sliced and stay whole: " + "; ".join(reasons) + ".",
            UserWarning,
            stacklevel=caller_level(),
        )


def choose_channels(
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, np.ndarray],
    recipe: Recipe,
    widths: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Apply the schedule: the sorted channels of each group that stay, by group name.

    `groups` are in forward order; `scores`, of shape (n_channels,) each, and `widths` go by group
    name.  Widths say how many stay where the schedule is not a function of depth.
    """
    if widths is not None:
        return {g.name: select_top(scores[g.name], widths[g.name], g.n_runs) for g in groups}
    if recipe.schedule not in SCHEDULES:
        raise ValueError(
            f"schedule={recipe.schedule!r} cannot be used here; choose one of {tuple(SCHEDULES)}."
        )
    ratios = removal_ratios(len(groups), recipe.schedule, *recipe.pruning_ratios)
    keep = {}
    for group, ratio in zip(groups, ratios, strict=True):
        n_kept = group.n_channels - n_removed(float(ratio), group.n_channels, group.n_runs)
        # Upwards: more than the ratio asks for never goes.
        multiple = math.lcm(recipe.round_to, group.n_runs)
        n_kept = min(-(-n_kept // multiple) * multiple, group.n_channels)
        keep[group.name] = select_top(scores[group.name], n_kept, group.n_runs)
    return keep


def extract(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    keep: Mapping[str, np.ndarray],
    samples: Tensor,
    outputs: Sequence[int] | None = None,
) -> Sliced:
    """Slice a copy of the network, and check it against the masked one on real samples.

    `groups` are all of the network's; `keep` has channels by group name, those of the output
    layer's group being `outputs`.  Raises SlicingError where they differ.
    """
    sliced = slice_channels(graph, samples[:1], keep, groups=groups)
    check_sliced(graph, sliced, samples, keep_outputs=outputs)
    return sliced
