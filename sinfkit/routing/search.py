"""Searches the sizes, numbers of clusters and ranks for the network that serves the goal best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import OutOfReachError, UnreachableShareError
from .builder import Builder, Built, set_gates
from .certify import Verdict, judge
from .config import Plan
from .goal import Goal, Outcome, hill_climb

_LOW_RANK = 0.5  # tried in a search; at three quarters, two layers take as long as the one


@dataclass(frozen=True)
class Kept:
    """The network that is kept, and what is known of its loss; None where it is the base itself."""

    built: Built
    verdict: Verdict | None


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

    def judged(self, built: Built) -> Kept:
        """Let samples that chose nothing decide about a network and its thresholds.

        In a search the next more careful size is judged beside it; the base itself is what is left
        where neither keeps within the limit.
        """
        config, study = self.config, self.builder.study
        finalists = [built]
        automatic = config.searches_size and config.target_speedup is None
        if automatic:
            finalists = [*self._more_careful(built.plan), built]
        signals = [self.builder.signals(one, study.certify) for one in finalists]
        if config.target_speedup is not None:
            config = replace(
                config,
                exit_threshold=built.gates.exit,
                confidence_threshold=built.gates.confidence
                if config.fallback != "none"
                else "auto",
            )
        verdict, within = judge([one.signals for one in finalists], signals, config)
        if not within and automatic:
            cut, pool_size = built.plan.cut, built.plan.grouping.pool_size
            return Kept(self.builder.base(cut, pool_size), None)
        kept = finalists[verdict.point.network]
        set_gates(kept.network, verdict.point.gates)
        return Kept(replace(kept, gates=verdict.point.gates), verdict)

    def _more_careful(self, plan: Plan) -> list[Built]:
        """The same plan in the next more careful size, if there is one."""
        sizes = self.config.sizes
        index = [size.budget for size in sizes].index(plan.size.budget)
        if index == 0:
            return []
        size = replace(plan.size, budget=sizes[index - 1].budget)
        return [self.builder.build(replace(plan, size=size))]

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
