"""Searches the sizes, numbers of clusters and ranks for the network that serves the goal best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..errors import OutOfReachError, UnreachableShareError
from .builder import Builder, Built
from .config import Plan
from .goal import Goal, Outcome, hill_climb

_LOW_RANK = 0.5  # tried in a search; at three quarters, two layers take as long as the one


class Search:
    """What was tried, and the best of it."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.config = builder.study.config
        self.goal = Goal(self.config.max_accuracy_drop, self.config.target_speedup)
        self.best: Built | None = None
        self.rows: list[dict[str, object]] = []
        self.missed: OutOfReachError | UnreachableShareError | None = None

    def run(self, plans: Sequence[Plan]) -> Built:
        """Try plans in several sizes.

        The first plan climbs; the others start where it stopped, and become bolder as long as they
        are better than all before.  Then the best one's prefix gets a low rank, in the same size
        and, while that is better, in others.
        """
        config, goal, n_sizes = self.config, self.goal, len(self.config.sizes)
        index, found = hill_climb(lambda i: self._try(plans[0], i), n_sizes, config.first, goal)
        for plan in plans[1:]:
            for i in range(index, n_sizes):
                outcome = self._try(plan, i)
                if not goal.better(outcome, found):
                    break
                index, found = i, outcome
        if self.best is None:
            assert self.missed is not None
            raise self.missed
        if config.searches_size and isinstance(config.prefix_low_rank, str):
            plan = self.best.plan
            hill_climb(lambda i: self._try(plan, i, _LOW_RANK), n_sizes, index, goal)
        return self.best

    def _try(self, plan: Plan, index: int, low_rank: float | None = None) -> Outcome:
        """Build one network, and remember it if it is the best so far."""
        size = self.config.sizes[index]
        if low_rank is not None:
            size = replace(size, low_rank=low_rank)
        try:
            built = self.builder.build(
                replace(plan, size=size), time_it=self.config.target_speedup is not None
            )
        except (OutOfReachError, UnreachableShareError) as error:
            if not self.config.searches_size:
                reach = isinstance(error, OutOfReachError)
                name = "pruner" if reach else "options.prefix_low_rank"
                raise type(error)(f"{name}: {error}") from error
            self.missed = self.missed or error
            return Outcome(drop=1.0, cost=math.inf, speedup=0.0)
        self._note(built)
        if self.best is None or self.goal.better(built.outcome, self.best.outcome):
            self.best = built  # the others' weights are let go
        return built.outcome

    def _note(self, built: Built) -> None:
        """Write down what was tried."""
        outcome, plan, passage = built.outcome, built.plan, built.passage
        row: dict[str, object] = {
            "route_layer": plan.cut.name,
            "n_clusters": built.network.n_clusters,
            "budget": plan.size.budget,
            "low_rank": plan.size.low_rank,
            "accuracy_drop": outcome.drop,
            "relative_macs": passage.cost,
            "fallback_share": passage.fallback_share,
            "exit_share": passage.exit_share,
        }
        if not math.isnan(built.relative_time):
            row["relative_time"] = built.relative_time
        if not math.isnan(outcome.speedup):
            row["speedup"] = outcome.speedup
        self.rows.append(row)
        if self.config.verbose:
            shown = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print("SINFClassifier: " + ", ".join(shown))
