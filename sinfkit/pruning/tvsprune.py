"""Pruning in rounds, until the accuracy on held-out samples no longer allows another.

IterTVSPrune (Murti, Narshana and Bhattacharyya, "TVSPrune", ICLR 2023) for any filter score.  In
each round the filters that score at most a fraction of their layer's mean go, and the scores are
measured again on what is left.  When a round costs too much accuracy it is undone, and the fraction
lowered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from ..criteria.activations import Statistics, collect
from ..data.validation import mean
from ..graph.cuts import observation_nodes
from ..repair.sequential import repair
from ..slicing.groups import ChannelGroup, find_groups
from ..utils.params import caller_level
from .recipe import Recipe, choose_channels, extract, sliceable
from .schedules import n_above_mean
from .scoring import ClassSamples, Scored, score_classes

__all__ = ["FACTORS", "Pruned", "prune_in_rounds"]

FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, *(0.025 * n for n in range(20, 0, -1)))
"""Fractions of the mean score, in the order in which they are tried.

From 0.5 downwards they are those of the authors' released code.  The five before are ours: scores
that differ less from filter to filter than theirs do have nothing below half of the mean.
"""


@dataclass(frozen=True)
class Pruned:
    """A network that was pruned in rounds; everything refers to the ORIGINAL filters.

    Attributes
    ----------
    model : GraphModule
    support : dict of str to int ndarray
        Filters kept, by layer.
    scores : dict of str to ndarray of shape (n_filters,)
        The last score of each filter: of a removed one, that of the round in which it went.
    repair_error : dict of str to float
        As `sinfkit.repair.repair` returns it, against the original network.
    """

    model: fx.GraphModule
    support: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    repair_error: dict[str, float]


def prune_in_rounds(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    output: str,
    outputs: Sequence[int],
    within: Iterable[str],
    statistics: Statistics,
    fit: tuple[np.ndarray, np.ndarray],
    held: tuple[np.ndarray, np.ndarray],
    batches: Callable[[np.ndarray], Iterable[Tensor]],
    recipe: Recipe,
    *,
    n_images: int,
    batch_size: int,
    seed: int,
    verbose: int = 0,
    weight: np.ndarray,
) -> Pruned:
    """Prune a network in rounds that keep the accuracy on held-out samples.

    Parameters
    ----------
    graph : GraphModule
        The base network.
    groups : sequence of ChannelGroup
        All of its groups.
    output : str
        Its output layer.
    outputs : sequence of int
        Outputs to keep, in the order of the classes.
    within : iterable of str
        Layers that may lose filters, see `sliceable`.
    statistics : Statistics
        Pooled activations of all samples in the base network.
    fit, held : tuple of (int ndarray of shape (n,), int ndarray of shape (n,))
        Indices of the samples that filters are scored and layers repaired on, or that accuracy is
        measured on; and their classes, 0..k-1.
    batches : callable
        Normalised batches of the samples with the given indices.
    recipe : Recipe
        Of ``schedule="iterative"``: criterion, repair, `max_accuracy_drop`.
    n_images : int
        Samples for the repair, at most.
    batch_size : int
        Of the repair.
    seed : int
    verbose : int, default=0
        Print a line for each round.
    weight : ndarray of shape (n_samples,), optional
        How many times each sample counts, by its index. Default: once.

    Returns
    -------
    Pruned
        After the last round whose accuracy was not below the base's, on the same held-out samples
        and among the same outputs, by more than ``recipe.max_accuracy_drop``.

    Raises
    ------
    ValueError
        If a score is negative.

    Warns
    -----
    UserWarning
        If nothing could be removed.
    """
    sample = np.random.default_rng(seed).permutation(fit[0])[:n_images]
    images = torch.cat(list(batches(sample)))
    whole = next(group.name for group in groups if group.is_output)
    model, support = extract(
        graph, groups, {whole: np.asarray(outputs)}, images[:64], outputs=outputs
    )
    counts = weight[sample]
    floor = _accuracy(model, batches, held, weight) - recipe.max_accuracy_drop
    errors = repair(
        graph,
        model,
        support,
        images,
        method="none",
        batch_size=batch_size,
        seed=seed,
        sample_weight=counts,
    )
    scores: dict[str, np.ndarray] = {}
    fresh: _Round | None = None
    refused: dict[str, int] = {}
    for factor in FACTORS:
        while True:
            if fresh is None:
                fresh = _score(
                    model,
                    output,
                    within,
                    fit,
                    batches,
                    recipe,
                    seed,
                    None if scores else statistics,
                    weight[fit[0]],
                )
                _record(scores, fresh.scored.layers, support)
            widths = fresh.widths(factor)
            if widths == refused or not fresh.removes(widths):
                break
            keep = choose_channels(fresh.chosen, fresh.scored.groups, recipe, widths)
            trial, kept = extract(model, fresh.groups, keep, images[:64])
            # The base, not the round before, is what the repair aims at: errors do not add up.
            left = {layer: support[layer][index] for layer, index in kept.items()}
            found = repair(
                graph,
                trial,
                left,
                images,
                method=recipe.repair,
                batch_size=batch_size,
                seed=seed,
                sample_weight=counts,
            )
            accuracy = _accuracy(trial, batches, held, weight)
            accepted = accuracy >= floor - 1e-9
            if verbose:
                n_filters = sum(len(index) for name, index in left.items() if name != output)
                print(
                    f"factor {factor:.3f}: {n_filters} filters, held-out accuracy {accuracy:.4f}, "
                    f"floor {floor:.4f}, {'kept' if accepted else 'undone'}"
                )
            if not accepted:
                refused = widths
                break
            model, support, errors, fresh, refused = trial, left, found, None, {}
    if all(len(support[name]) == len(score) for name, score in scores.items()):
        warnings.warn(
            "schedule='iterative' removed nothing: already the first round costs more than "
            f"max_accuracy_drop={recipe.max_accuracy_drop:g} on the held-out samples, or no filter "
            "scores far below its layer's mean.",
            UserWarning,
            stacklevel=caller_level(),
        )
    return Pruned(model, support, scores, errors)


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
                n = n_above_mean(self.scored.groups[group.name], factor, group.n_groups)
            except ValueError as error:
                raise ValueError(f"Layer {group.name!r}: {error}.") from error
            widths[group.name] = n
        return widths

    def removes(self, widths: dict[str, int]) -> bool:
        """Whether any channel would go."""
        return any(widths[group.name] < group.n_channels for group in self.chosen)


def _score(
    model: fx.GraphModule,
    output: str,
    within: Iterable[str],
    fit: tuple[np.ndarray, np.ndarray],
    batches: Callable[[np.ndarray], Iterable[Tensor]],
    recipe: Recipe,
    seed: int,
    statistics: Statistics | None,
    weight: np.ndarray,
) -> _Round:
    """Score the filters of the network as it is now."""
    index, y = fit
    groups = find_groups(model, next(iter(batches(index[:1]))), output)
    chosen = sliceable(groups, within)
    layers = [layer for group in chosen for layer in group.layers]
    if statistics is None:
        nodes = observation_nodes(model, layers)
        pooled = collect(model, batches(index), nodes, recipe.pool_size).pooled
    else:
        rows = torch.as_tensor(index)
        pooled = {layer: statistics.pooled[layer][rows] for layer in layers}
    n_outputs = dict(model.named_modules())[output].weight.shape[0]
    samples = ClassSamples(
        y=y,
        outputs=list(range(n_outputs)),
        pooled=pooled,
        batches=lambda wanted: batches(index[wanted]),
        weight=torch.as_tensor(weight),
        seed=seed,
    )
    scored = score_classes(model, chosen, samples, recipe)
    return _Round(groups, chosen, scored)


def _record(
    scores: dict[str, np.ndarray], measured: dict[str, np.ndarray], support: dict[str, np.ndarray]
) -> None:
    """Write scores of the filters that are left where the original filters have their places."""
    for layer, score in measured.items():
        scores.setdefault(layer, score.copy())[support[layer]] = score


def _accuracy(
    model: fx.GraphModule,
    batches: Callable[[np.ndarray], Iterable[Tensor]],
    held: tuple[np.ndarray, np.ndarray],
    weight: np.ndarray,
) -> float:
    """Share of right answers."""
    index, y = held
    with torch.inference_mode():
        answers = torch.cat([model(x).argmax(1).cpu() for x in batches(index)])
    return mean(answers.numpy() == y, weight[index])
