"""How many filters go from each layer, and the smaller network that results."""

from ..errors import OutOfReachError
from .costs import Budgeted, CostModel, budgeted_widths, network_cost, shared_widths, tighten
from .layer_times import LayerTime, expected_seconds, fit_layer_times, layer_seconds
from .recipe import (
    SCHEDULES,
    PruningOptions,
    Recipe,
    choose_channels,
    extract,
    marginal_losses,
    n_above_mean,
    n_removed,
    removal_order,
    removal_ratios,
    select_top,
    sliceable,
    widths_within,
)
from .scoring import ClassSamples, Scored, group_scores, score_classes
from .search import SIZES, Builder, Goal, Judged, Pruned, Split, judge, search, split_samples, walk
from .tvsprune import FACTORS, prune_in_rounds

__all__ = [
    "Budgeted",
    "Builder",
    "ClassSamples",
    "CostModel",
    "FACTORS",
    "Goal",
    "Judged",
    "LayerTime",
    "OutOfReachError",
    "Pruned",
    "PruningOptions",
    "Recipe",
    "SCHEDULES",
    "SIZES",
    "Scored",
    "Split",
    "budgeted_widths",
    "choose_channels",
    "expected_seconds",
    "extract",
    "fit_layer_times",
    "group_scores",
    "judge",
    "layer_seconds",
    "marginal_losses",
    "n_above_mean",
    "n_removed",
    "network_cost",
    "prune_in_rounds",
    "removal_order",
    "removal_ratios",
    "score_classes",
    "search",
    "select_top",
    "shared_widths",
    "sliceable",
    "split_samples",
    "tighten",
    "walk",
    "widths_within",
]
