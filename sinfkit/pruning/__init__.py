"""How many filters go from each layer, and the smaller network that results."""

from .budget import Budgeted, budgeted_widths, shared_widths, tighten
from .builder import Builder, Pruned, Split
from .costs import UNITS, CostModel, network_cost
from .layer_times import LayerTime, expected_seconds, fit_layer_times, layer_seconds
from .options import PruningOptions
from .recipe import Recipe, choose_channels, extract, sliceable
from .schedules import (
    SCHEDULES,
    OutOfReachError,
    marginal_losses,
    n_above_mean,
    n_removed,
    removal_order,
    removal_ratios,
    select_top,
    widths_within,
)
from .scoring import ClassSamples, Scored, group_scores, score_classes
from .search import SIZES, Goal, Judged, judge, search, split_samples, walk
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
    "UNITS",
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
