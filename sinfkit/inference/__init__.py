"""RUN: the routed network, and what it gives beside the base."""

from .forms import HalfNetwork, PackedNetwork, fast_form, half_precision
from .measure import base_for_timing, branch_costs
from .network import (
    Normalise,
    RoutePredictor,
    SINFNetwork,
    choose_exit,
    choose_threshold,
    cluster_posterior,
    fit_route_predictor,
    fuse,
    own_classes,
)
from .prepacked import PrepackedConv2d, can_prepack, group_size, prepacked
from .report import ClusterRow, Promise, PruningReport, SINFReport

__all__ = [
    "SINFReport",
    "PruningReport",
    "Promise",
    "ClusterRow",
    "HalfNetwork",
    "Normalise",
    "PackedNetwork",
    "PrepackedConv2d",
    "RoutePredictor",
    "SINFNetwork",
    "base_for_timing",
    "branch_costs",
    "can_prepack",
    "choose_exit",
    "choose_threshold",
    "cluster_posterior",
    "fast_form",
    "fit_route_predictor",
    "fuse",
    "group_size",
    "half_precision",
    "own_classes",
    "prepacked",
]
