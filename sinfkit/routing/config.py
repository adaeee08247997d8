"""How to route: one configuration, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sklearn.base import BaseEstimator

from ..graph.cuts import CutPoint
from ..pruning.recipe import Recipe
from ..pruning.schedules import removal_ratios
from ..utils.params import check_choice, check_number
from .clusters import Grouping

BUDGETS = (0.8, 0.63, 0.5, 0.4, 0.32, 0.25, 0.2, 0.16)
"""Budgets that a search goes through, from careful to bold: a fifth less in each step."""
_FIRST = 3  # tried first: two fifths of the multiplications stay
Answers = Literal["all", "cluster"]
Fallback = Literal["none", "base", "top2"]


class RoutingOptions(BaseEstimator):
    """What few users of `SINFClassifier` need to set.

    Parameters
    ----------
    answers : {"all", "cluster"}, default="all"
        Which classes a subgraph answers: every class, repaired on the samples that are routed to
        it, rightly or not; or those of its cluster, repaired on samples of these (the paper's form:
        a sample on the wrong route is lost).
    exit_threshold : float, "auto" or None, default="auto"
        Samples of which the route predictor gives one class at least this probability leave there,
        with its answer.  None: no sample leaves.  ``"auto"``: the smallest that keeps the promise.
    confidence_threshold : float or "auto", default="auto"
        Samples whose route confidence is below it take the fallback.  ``"auto"``: the smallest that
        keeps the promise.  It has no effect, and must be ``"auto"``, with ``fallback="none"``.
    router_weight : float or "auto", default="auto"
        Exponent of the router's posterior in the product with the subgraph's, see
        `sinfkit.inference.fuse`.  ``"auto"``: chosen by held-out log loss.
    validation_fraction : float, default=0.2
        Share of the calibration samples that is held out for the automatic choices, where ``fit``
        is not given samples for them.
    prefix_low_rank : float or "auto", default="auto"
        Share of the sliced prefix's multiplications that stay when its layers become products of
        two with fewer outputs in between, see `sinfkit.repair.factorize`; on top of what slicing
        saves.  1 leaves the layers as they are.  ``"auto"``: a search tries a half, and keeps it
        where that serves its goal; without a search 1.

    Examples
    --------
    >>> from sinfkit import RoutingOptions, SINFClassifier
    >>> SINFClassifier(options=RoutingOptions(answers="cluster"))
    SINFClassifier(options=RoutingOptions(answers='cluster'))
    """

    def __init__(
        self,
        *,
        answers: Answers = "all",
        exit_threshold: float | Literal["auto"] | None = "auto",
        confidence_threshold: float | Literal["auto"] = "auto",
        router_weight: float | Literal["auto"] = "auto",
        validation_fraction: float = 0.2,
        prefix_low_rank: float | Literal["auto"] = "auto",
    ) -> None:
        self.answers = answers
        self.exit_threshold = exit_threshold
        self.confidence_threshold = confidence_threshold
        self.router_weight = router_weight
        self.validation_fraction = validation_fraction
        self.prefix_low_rank = prefix_low_rank


@dataclass(frozen=True)
class Size:
    """How much of a network may stay.

    `budget`: cost of prefix and one subgraph as a fraction of the base's (None: ratios decide);
    `low_rank`: share of the sliced prefix's multiplications that stay when its layers become
    products of two, where 1 leaves them as they are.
    """

    budget: float | None = None
    low_rank: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What to build: where to cut, how to group the classes, how much to remove."""

    cut: CutPoint
    grouping: Grouping
    size: Size


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How to route: everything but the network, the samples and the clusters."""

    subgraphs: Recipe
    prefix: Recipe
    answers: Answers = "all"
    fallback: Fallback = "none"
    exit_threshold: float | Literal["auto"] | None = "auto"
    confidence_threshold: float | Literal["auto"] = "auto"
    router_weight: float | Literal["auto"] = "auto"
    prefix_low_rank: float | Literal["auto"] = "auto"
    validation_fraction: float = 0.2
    max_accuracy_drop: float = 0.01
    confidence: float = 0.9
    target_speedup: float | None = None
    n_jobs: int | None = None
    memory: Any = field(default=None, compare=False)
    verbose: int = 0

    def __post_init__(self) -> None:
        check_choice("answers", self.answers, get_args(Answers))
        check_choice("fallback", self.fallback, get_args(Fallback))
        for name, interval, optional in (
            ("exit_threshold", "[0, 1]", True),
            ("confidence_threshold", "[0, 1]", False),
            ("router_weight", "[0, inf)", False),
            ("prefix_low_rank", "(0, 1]", False),
        ):
            value = getattr(self, name)
            if isinstance(value, str):
                check_choice(name, value, ("auto",))
            else:
                check_number(name, value, interval, optional=optional)
        check_number("validation_fraction", self.validation_fraction, "(0, 1)")
        if self.fallback == "none" and self.confidence_threshold != "auto":
            raise ValueError("options.confidence_threshold has no effect with fallback='none'.")
        check_number("max_accuracy_drop", self.max_accuracy_drop, "[0, 1]")
        check_number("confidence", self.confidence, "(0, 1)")
        check_number("target_speedup", self.target_speedup, "[1, inf)", optional=True)

    @property
    def shares_budget(self) -> bool:
        """Whether prefix and subgraphs keep to one budget together."""
        return self.prefix.schedule == "global"

    @property
    def prunes_prefix(self) -> bool:
        """Whether ratios of the prefix's own remove anything."""
        return bool(removal_ratios(2, self.prefix.schedule, *self.prefix.pruning_ratios).any())

    @property
    def searches_size(self) -> bool:
        """Whether the budget is left to the search."""
        return self.subgraphs.schedule == "global" and self.subgraphs.budget is None

    @property
    def sizes(self) -> list[Size]:
        """What to choose from, from careful to bold: one size where the user has said it."""
        low_rank = 1.0 if isinstance(self.prefix_low_rank, str) else float(self.prefix_low_rank)
        budgets = BUDGETS if self.searches_size else (self.subgraphs.budget,)
        return [Size(budget, low_rank) for budget in budgets]

    @property
    def first(self) -> int:
        """Number of the size that is tried first."""
        return _FIRST if self.searches_size else 0

    @property
    def middle_size(self) -> Size:
        """The size that is tried first."""
        return self.sizes[self.first]
