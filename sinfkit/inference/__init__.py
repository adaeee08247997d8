"""RUN: the routed network, and what it gives beside the base."""

from .compiled import bucket, signature, skeleton, weights_of
from .memory import MemoryUse, memory_use, peak_bytes
from .network import Normalise, SINFNetwork, own_classes
from .prepacked import PrepackedConv2d, can_prepack, group_size, prepacked
from .report import base_for_timing, branch_costs
from .residency import Residency
from .router import (
    RoutePredictor,
    choose_exit,
    choose_threshold,
    cluster_posterior,
    fit_route_predictor,
    fuse,
)
from .runtime import Runtime
from .stacked import StackedSubgraphs, gather_slots

__all__ = [
    "MemoryUse",
    "Normalise",
    "PrepackedConv2d",
    "Residency",
    "RoutePredictor",
    "Runtime",
    "SINFNetwork",
    "StackedSubgraphs",
    "base_for_timing",
    "branch_costs",
    "bucket",
    "can_prepack",
    "choose_exit",
    "choose_threshold",
    "cluster_posterior",
    "fit_route_predictor",
    "fuse",
    "gather_slots",
    "group_size",
    "memory_use",
    "own_classes",
    "peak_bytes",
    "prepacked",
    "signature",
    "skeleton",
    "weights_of",
]
