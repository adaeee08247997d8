"""Pruning in rounds, until the accuracy on held-out samples no longer allows another.

IterTVSPrune (Murti, Narshana and Bhattacharyya, "TVSPrune", ICLR 2023) for any filter score.  In
each round the filters that score at most a fraction of their layer's mean go, and the scores are
measured again on what is left.  When a round costs too much accuracy it is undone, and the fraction
lowered.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from ..criteria.activations import collect
from ..graph.cuts import observation_nodes
from ..repair.walk import graph_of
from ..slicing.groups import ChannelGroup, find_groups
from .recipe import choose_channels, extract, n_above_mean, sliceable
from .scoring import ClassSamples, Scored, score_classes
from .search import Builder, Goal, Pruned, Split, Witness, mend

__all__ = ["FACTORS", "prune_in_rounds"]

FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, *(0.025 * n for n in range(20, 0, -1)))
"""Fractions of the mean score, in the order in which they are tried.

From 0.5 downwards they are those of the authors' released code.  The five before are ours: scores
that differ less from filter to filter than theirs do have nothing below half of the mean.
"""


def prune_in_rounds(
    builder: Builder, split: Split, within: Iterable[str], goal: Goal
) -> list[Pruned]:
    """Prune in rounds while the samples that choose allow it; the network after each such round.

    `within` are the layers that may lose filters, see `sliceable`.
    """
    calibration, recipe = builder.calibration, builder.recipe
    choosing = Witness(builder, split.choose)
    drawn = builder.drawn(recipe.repair_samples)
    images = calibration.batcher.stacked(calibration.X, drawn)
    now = builder.whole()
    scores: dict[str, np.ndarray] = {}
    found: list[Pruned] = []
    fresh: _Round | None = None
    refused: dict[str, int] = {}
    for factor in FACTORS:
        builder.progress.doing(f"removes below {factor:g} of the mean")
        while True:
            if fresh is None:
                fresh = _score(builder, split.fit, within, now.model, first=not scores)
                builder.scored = builder.scored if scores else fresh.scored  # the base's
                _record(scores, fresh.scored.layers, now.support)
            widths = fresh.widths(factor)
            if widths == refused or not fresh.removes(widths):
                break
            keep = choose_channels(fresh.chosen, fresh.scored.groups, recipe, widths)
            # The base, not the round before, is what the repair aims at: errors do not add up.
            sliced = extract(now.model, fresh.groups, keep, images[:64]).after(now.sliced)
            errors = mend(calibration, sliced, drawn, images, recipe.repair)
            trial, left = graph_of(sliced), sliced.support
            drop = choosing.drop(trial)
            if not goal.met_by(drop):
                refused = widths
                break
            n_filters = sum(len(i) for name, i in left.items() if name != calibration.output)
            builder.progress.best(f"{n_filters} filters left, {drop:.1%} lost")
            copies = {layer: score.copy() for layer, score in scores.items()}
            now, fresh, refused = (
                Pruned(sliced, copies, errors, builder.macs_ratio(trial)),
                None,
                {},
            )
            found.append(now)
        builder.progress.done()
    return found


@dataclass(frozen=True)
class _Round:
    """What is known of a network before a round."""

    groups: list[ChannelGroup]
    chosen: list[ChannelGroup]
    scored: Scored

    def widths(self, factor: float) -> dict[str, int]:
        """Channels of each group that score more than a fraction of its mean."""
        widths = {}
        for group in self.chosen:
            try:
                n = n_above_mean(self.scored.groups[group.name], factor, group.n_runs)
            except ValueError as error:
                raise ValueError(f"Layer {group.name!r}: {error}.") from error
            widths[group.name] = n
        return widths

    def removes(self, widths: dict[str, int]) -> bool:
        """Whether any channel would go."""
        return any(widths[group.name] < group.n_channels for group in self.chosen)


def _score(
    builder: Builder, rows: np.ndarray, within: Iterable[str], model: fx.GraphModule, first: bool
) -> _Round:
    """Score the filters of the network as it is now; before the `first` round it is the base."""
    calibration = builder.calibration
    groups = find_groups(model, calibration.example, calibration.output)
    chosen = sliceable(groups, within)
    layers = [layer for group in chosen for layer in group.layers]
    if first:
        index = torch.as_tensor(rows)
        pooled = {layer: builder.statistics.pooled[layer][index] for layer in layers}
    else:
        nodes = observation_nodes(model, layers)
        pooled = collect(model, builder.batches(rows), nodes, builder.recipe.pool_size).pooled
    samples = ClassSamples(
        y=calibration.y_encoded[rows],
        outputs=list(range(len(calibration.table.classes))),
        pooled=pooled,
        batches=lambda wanted: builder.batches(rows[wanted]),
        weight=torch.as_tensor(calibration.weights(rows)),
        seed=calibration.seed,
    )
    return _Round(groups, chosen, score_classes(model, chosen, samples, builder.recipe))


def _record(
    scores: dict[str, np.ndarray], measured: dict[str, np.ndarray], support: dict[str, np.ndarray]
) -> None:
    """Write scores of the filters that are left where the original filters have their places."""
    for layer, score in measured.items():
        scores.setdefault(layer, score.copy())[support[layer]] = score
