"""ROUTE, at fit time: where to put the route predictor, which clusters, and the search."""

from .assembly import build_subgraph
from .builder import ROUTER_WEIGHTS, HeldOut, choose_weight, routed_answers
from .clusters import (
    activation_affinity,
    agglomerate,
    confusion_affinity,
    read_mapping,
)
from .gates import (
    Gates,
    Outcome,
    Passage,
    Point,
    Signals,
    Verdict,
    careful_to_bold,
    judge,
    let_through,
)
from .search import Candidate, Target, hill_climb, rank_candidates, some_of_each
from .study import BUDGETS, RoutingConfig, Samples

__all__ = [
    "BUDGETS",
    "Candidate",
    "Gates",
    "HeldOut",
    "Outcome",
    "Passage",
    "Point",
    "ROUTER_WEIGHTS",
    "RoutingConfig",
    "Samples",
    "Signals",
    "Target",
    "Verdict",
    "activation_affinity",
    "agglomerate",
    "build_subgraph",
    "careful_to_bold",
    "choose_weight",
    "confusion_affinity",
    "hill_climb",
    "judge",
    "let_through",
    "rank_candidates",
    "read_mapping",
    "routed_answers",
    "some_of_each",
]
