"""ROUTE, at fit time: where to put the route predictor, which clusters, and the search."""

from .assembly import (
    ROUTER_WEIGHTS,
    TEMPERATURES,
    HeldOut,
    build_subgraph,
    choose_weight,
    pooled_output,
    routed_answers,
)
from .clusters import (
    activation_affinity,
    agglomerate,
    confusion_affinity,
    read_mapping,
)
from .placement import Candidate, rank_candidates
from .search import LADDER, Goal, Outcome, Size, climb

__all__ = [
    "Candidate",
    "Goal",
    "HeldOut",
    "LADDER",
    "Outcome",
    "ROUTER_WEIGHTS",
    "Size",
    "TEMPERATURES",
    "activation_affinity",
    "agglomerate",
    "build_subgraph",
    "choose_weight",
    "climb",
    "confusion_affinity",
    "pooled_output",
    "rank_candidates",
    "read_mapping",
    "routed_answers",
]
