"""The smallest network that keeps the promise: sizes are chosen on some samples, shown on others.

Which sizes are worth building is found by bisection, on samples that choose, over networks that
are repaired from second moments alone.  The few around the one found are built in full, from
careful to bold, and tested in that order on samples that have chosen nothing.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..criteria.activations import Statistics
from ..data.calibration import Calibration
from ..data.validation import hold_out
from ..errors import OutOfReachError
from ..graph.cost import count_macs, count_parameters
from ..promise import Certificate, certify, count_discordant, fixed_sequence, images_needed
from ..repair.blockwise import Part, parts_of
from ..repair.distillation import Lesson, distill
from ..repair.moments import Moments, gather_moments
from ..repair.sequential import RepairSettings, affordable_images, repair
from ..repair.static import static_least_squares
from ..repair.walk import graph_of
from ..slicing.blocks import Block, find_blocks, leave_out, silenced
from ..slicing.channels import Sliced
from ..slicing.groups import ChannelGroup
from ..utils.device import in_pieces
from ..utils.progress import Progress
from .costs import Budgeted, budgeted_widths, network_cost
from .depth import Depth, rank_blocks
from .layer_times import LayerTime, fit_layer_times
from .recipe import Recipe, choose_channels, extract
from .scoring import Scored

# Samples that tell how many blocks to leave out: that order them, repair, and compare.
_RANKED, _ROUGH, _COMPARED = 128, 600, 1_000
_MOMENT_IMAGES = 2_000  # of which a search takes second moments: many positions in each


@dataclass(frozen=True)
class Split:
    """Which calibration samples do what, as int ndarrays: nothing certifies that has chosen.

    `fit` scores and repairs, `choose` tells sizes apart (and repairs what is kept), `certify`
    says what is lost.  `choose` and `certify` may be empty.
    """

    fit: np.ndarray
    choose: np.ndarray
    certify: np.ndarray


@dataclass(frozen=True)
class Pruned:
    """A smaller network; everything refers to the ORIGINAL filters.

    Shapes: `scores` (n_filters,).  `distillation` has the loss of each epoch.
    """

    sliced: Sliced
    scores: dict[str, np.ndarray]
    repair_error: dict[str, float]
    cost_ratio: float
    distillation: tuple[float, ...] = ()

    @property
    def model(self) -> fx.GraphModule:
        """The network itself."""
        return graph_of(self.sliced)

    @property
    def support(self) -> dict[str, np.ndarray]:
        """Filters kept, by layer."""
        return self.sliced.support


@dataclass
class Builder:
    """Builds networks that keep some channels of the `chosen` groups, and sees what they answer.

    `scored` are the scores of these groups, `rows` the samples that repair, at most.
    """

    calibration: Calibration
    recipe: Recipe
    chosen: Sequence[ChannelGroup]
    scored: Scored
    statistics: Statistics
    rows: np.ndarray
    progress: Progress = field(default_factory=lambda: Progress(""))
    depth: Depth = field(default_factory=Depth)
    _widths: dict[tuple[float, Depth], Budgeted] = field(default_factory=dict)

    @functools.cached_property
    def others(self) -> dict[str, np.ndarray]:
        """The outputs that stay, by name of their group."""
        groups = self.calibration.groups
        return {next(g.name for g in groups if g.is_output): self.calibration.table.outputs}

    def batches(self, rows: np.ndarray) -> Iterable[Tensor]:
        """Normalised batches of calibration samples."""
        return self.calibration.batcher(self.calibration.X, rows)

    def budgeted(self, budget: float) -> Budgeted:
        """Widths under a budget; OutOfReachError where there are none."""
        key = budget, self.depth
        if key not in self._widths:
            calibration = self.calibration
            batch = next(iter(self.batches(self.rows)))
            self._widths[key] = budgeted_widths(
                calibration.graph,
                calibration.groups,
                self.chosen,
                self.scored,
                self.recipe,
                batch,
                self.others,
                budget,
                calibration.macs[1],
                self.depth.at(budget),
            )
        return self._widths[key]

    def build(self, budget: float | None = None) -> Pruned:
        """The network under a budget (None: that the recipe's schedule gives), repaired."""
        widths, cost = None, None
        if budget is not None:
            budgeted = self.budgeted(budget)
            widths, cost = budgeted.widths, budgeted.cost_ratio
        keep = choose_channels(self.chosen, self.scored.groups, self.recipe, widths)
        return self.of_channels(keep, self.recipe.repair, cost, self.depth.at(budget))

    def whole(self) -> Pruned:
        """The base itself, with the outputs that stay."""
        return self.of_channels({}, "none")

    def of_channels(
        self,
        keep: Mapping[str, np.ndarray],
        method: str,
        cost_ratio: float | None = None,
        blocks: Sequence[Block] = (),
    ) -> Pruned:
        """The network with these channels, by name of their group, without blocks, repaired."""
        graph, drawn = self.calibration.graph, self.drawn(self.recipe.repair_samples)
        samples = self.calibration.batcher.stacked(self.calibration.X, drawn)
        outputs = self.calibration.table.outputs.tolist()
        sliced = extract(
            graph, self.calibration.groups, {**keep, **self.others}, samples[:64], outputs
        )
        sliced = silenced(sliced, blocks)
        errors = mend(self.calibration, sliced, drawn, samples, method)
        sliced = leave_out(sliced, blocks)
        # Widths were found by a model, in which products of activations cost what they did.
        if cost_ratio is None or self.recipe.budget_unit == "macs":
            cost_ratio = self.macs_ratio(graph_of(sliced))
        elif self.recipe.budget_unit == "params":
            base = count_parameters(self.calibration.graph)
            cost_ratio = count_parameters(graph_of(sliced)) / max(base, 1)
        return Pruned(sliced, self.scored.layers, errors, cost_ratio)

    def distilled(self, pruned: Pruned) -> Pruned:
        """The network trained on the samples that repair, if the recipe says so; else itself."""
        how, calibration, rows = self.recipe.distill, self.calibration, self.rows
        if how is None:
            return pruned
        model, outputs = copy.deepcopy(pruned.model), calibration.table.outputs.tolist()
        parts: Sequence[Part] = ()
        if how.block_steps:
            some = calibration.batcher.at(calibration.X, rows[:4])
            parts = parts_of(calibration.graph, model, pruned.support, some)
        lesson = Lesson(
            student=model,
            answer=lambda x, _: model(x),
            teach=lambda x, _: calibration.graph(x)[:, outputs],
            read=lambda places: calibration.batcher.at(calibration.X, rows[places]),
            weight=calibration.weights(rows),
            parts=parts,
        )
        losses = distill(lesson, how, calibration.seed, self.progress)
        model.to(memory_format=torch.contiguous_format)
        sliced = replace(pruned.sliced, model=model)
        return replace(pruned, sliced=sliced, distillation=tuple(losses))

    def macs_ratio(self, model: fx.GraphModule) -> float:
        """Multiplications of a network over those of the base."""
        base = max(self.calibration.macs[0], 1)
        return count_macs(model, self.calibration.example)[0] / base

    def drawn(self, n: int) -> np.ndarray:
        """At most `n` of the samples that repair, as many as memory allows."""
        rng = np.random.default_rng(self.calibration.seed)
        most = affordable_images(self.calibration.graph, self.calibration.example, n)
        return rng.permutation(self.rows)[:most]

    def sketch(self, budget: float) -> fx.GraphModule:
        """The same network repaired from second moments alone: cheap, for a search."""
        graph, example = self.calibration.graph, self.calibration.example
        keep = choose_channels(
            self.chosen, self.scored.groups, self.recipe, self.budgeted(budget).widths
        )
        groups, outputs = self.calibration.groups, self.calibration.table.outputs.tolist()
        sliced = extract(graph, groups, {**keep, **self.others}, example, outputs)
        blocks = self.depth.at(budget)
        sliced = silenced(sliced, blocks)
        if self.recipe.repair != "none":
            static_least_squares(graph, sliced, self._moments)
        return graph_of(leave_out(sliced, blocks))

    @functools.cached_property
    def _moments(self) -> dict[str, Moments]:
        """Second moments of what the layers behind the groups read."""
        rows = self.drawn(_MOMENT_IMAGES)
        consumers = dict.fromkeys(name for group in self.chosen for name in group.consumers)
        return gather_moments(
            self.calibration.graph,
            list(consumers),
            self.batches(rows),
            n_images=len(rows),
            seed=self.calibration.seed,
            sample_weight=torch.as_tensor(self.calibration.weights(rows)),
        )

    def find_depth(self, budget: float, rows: np.ndarray) -> None:
        """Choose which blocks are left out, and how much of what goes is theirs, at a budget.

        Networks that are repaired on few samples are compared on other `rows`, at most a thousand.
        """
        calibration = self.calibration
        rows = np.random.default_rng(calibration.seed + 1).permutation(rows)[:_COMPARED]
        found = find_blocks(calibration.graph, calibration.example)
        within = {name for group in self.chosen for name in (*group.layers, *group.consumers)}
        layers = set(calibration.macs[1])
        blocks = [b for b in found if within.issuperset(layers.intersection(b.modules))]
        depth = rank_blocks(
            calibration.graph,
            blocks,
            self._cost_of,
            calibration.batcher.stacked(calibration.X, self.drawn(_RANKED)),
            torch.as_tensor(calibration.table.outputs),
            1 - budget,
        )
        if not depth.blocks:
            return
        total = np.cumsum(depth.costs)
        most = int((total <= 1 - budget).sum())
        few = replace(self, recipe=replace(self.recipe, repair_samples=_ROUGH))
        least = math.inf
        for n in sorted({round(most * part / 4) for part in range(5)}):
            share = float(total[n - 1]) / (1 - budget) if n else 0.0
            few.depth = replace(depth, share=min(share, 1.0))
            self.progress.doing(f"builds budget {budget:.2f} without {n} blocks")
            try:
                lost = self.divergence(few.build(budget).model, rows)
            except OutOfReachError:
                continue  # so few filters can make up for so few blocks
            if lost > least:
                break
            least, self.depth = lost, few.depth

    def _cost_of(self, blocks: Sequence[Block]) -> float:
        """Share of the base's cost that is saved without some blocks, all else being as it is."""
        graph, unit = self.calibration.graph, self.recipe.budget_unit
        gone = {name for block in blocks for name in block.modules}
        cost = network_cost(
            graph,
            self.calibration.groups,
            self.chosen,
            next(iter(self.batches(self.rows))),
            unit,
            times=self._times if unit == "latency" else None,
            macs=self.calibration.macs[1],
            left_out=gone,
        )
        return 1 - cost.total(cost.widths) / cost.base

    @functools.cached_property
    def _times(self) -> dict[str, LayerTime]:
        """What each layer of the base takes, on a batch."""
        batch = next(iter(self.batches(self.rows)))
        return fit_layer_times(self.calibration.graph, self.calibration.groups, self.chosen, batch)

    def divergence(self, model: fx.GraphModule, rows: np.ndarray) -> float:
        """Of the base's answers, from a network's: mean of Kullback and Leibler's, in nats."""
        columns = torch.as_tensor(self.calibration.table.outputs)
        wanted = self.statistics.logits[torch.as_tensor(rows)][:, columns].float().log_softmax(1)
        with torch.inference_mode():
            found = in_pieces(lambda x: model(x).float().log_softmax(1).cpu(), self.batches(rows))
            return float(
                F.kl_div(torch.cat(list(found)), wanted, reduction="batchmean", log_target=True)
            )

    def base_right(self, rows: np.ndarray) -> np.ndarray:
        """Whether the base, among the outputs that stay, is right on these samples."""
        columns = torch.as_tensor(self.calibration.table.outputs)
        answers = self.statistics.logits[torch.as_tensor(rows)][:, columns].argmax(1)
        return answers.numpy() == self.calibration.y_encoded[rows]

    def right(self, model: fx.GraphModule, rows: np.ndarray) -> np.ndarray:
        """Whether a network is right on these samples."""
        if not len(rows):
            return np.empty(0, dtype=bool)
        with torch.inference_mode():
            answers = list(in_pieces(lambda x: model(x).argmax(1).cpu(), self.batches(rows)))
        return torch.cat(answers).numpy() == self.calibration.y_encoded[rows]


def mend(
    calibration: Calibration,
    sliced: Sliced,
    rows: np.ndarray,
    samples: Tensor,
    method: str,
) -> dict[str, float]:
    """Repair a sliced network, in place, on the samples `rows`."""
    return repair(
        calibration.graph,
        sliced,
        samples,
        RepairSettings(method, batch_size=calibration.batcher.batch_size, seed=calibration.seed),
        sample_weight=calibration.weights(rows),
    )


SIZES = tuple(0.95 * 0.9**n for n in range(28))
"""Budgets from careful to bold; each leaves a tenth less than the one before."""

# Steps from the size that the choosing samples point to, of those that are built.  Full repair is
# better than that of the search, hence the bolder ones.
_FINALISTS = (-6, -3, -1, 0, 1, 2, 3, 4)
_DISTILLED = (-6, -2, 1, 4)  # where each is trained, which takes long, and bolder ones may do
_PLENTY = 4  # times the fewest samples that can certify: beyond these, more choose and repair
_NEVER = 2**31


@dataclass(frozen=True)
class Goal:
    """How much accuracy may be lost, and how sure that is to be."""

    max_accuracy_drop: float
    confidence: float

    @property
    def fewest(self) -> int:
        """Samples below which nothing can be certified, were no answer to change."""
        if self.max_accuracy_drop <= 0:
            return _NEVER
        return images_needed(self.max_accuracy_drop, self.confidence) or _NEVER

    def met_by(self, drop: float) -> bool:
        """Whether a drop that was seen is within the limit; one that nobody saw (nan) is."""
        return not drop > self.max_accuracy_drop + 1e-12


@dataclass(frozen=True)
class Judged:
    """A network, and what the samples that chose nothing say about it.

    `drop` is the accuracy lost on them, nan where there are none; `certificate` is None where
    nothing was asked of them; `tried` has one dict for each size that was looked at.
    """

    pruned: Pruned
    drop: float = math.nan
    certificate: Certificate | None = None
    is_base: bool = False
    tried: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Witness:
    """Some samples, and what networks lose on them against the base."""

    builder: Builder
    rows: np.ndarray

    @functools.cached_property
    def base(self) -> np.ndarray:
        """Whether the base is right on each."""
        return self.builder.base_right(self.rows)

    def counts(self, model: Any) -> tuple[int, int, int]:
        """Samples that only the base, and only the network, has right; and all of them."""
        weight = self.builder.calibration.weights(self.rows)
        return count_discordant(self.base, self.builder.right(model, self.rows), weight)

    def drop(self, model: Any) -> float:
        """Accuracy lost; nan without samples."""
        if not len(self.rows):
            return math.nan
        lost = self.base.astype(float) - self.builder.right(model, self.rows)
        return float(np.average(lost, weights=self.builder.calibration.weights(self.rows)))


def split_samples(
    y: np.ndarray,
    index: np.ndarray,
    fraction: float,
    goal: Goal | None,
    seed: int,
    *,
    widen: bool = True,
) -> Split:
    """Divide the samples `index`, of classes `y`, class by class.

    Without a goal (nothing is chosen) the share `fraction` certifies and the others fit.  With one,
    the others are divided once more; and where `fraction` could certify nothing, but up to half of
    the samples can, that many do (unless not to be `widen`-ed).
    """
    nobody = np.empty(0, dtype=np.int64)
    if fraction == 0:
        return Split(index, nobody, nobody)
    rng = np.random.default_rng(seed)
    share = fraction
    if widen and goal is not None and goal.fewest <= len(index) / 2:
        share = max(fraction, min(0.5, _PLENTY * goal.fewest / len(index)))
    fit, held = hold_out(y, share, rng)
    # A class of a single sample: then all of them fit, and none is left to certify.
    certifying = nobody if len(fit) == len(y) else index[held]
    if goal is None:
        return Split(index[fit], nobody, certifying)
    own, choose = hold_out(y[fit], fraction, rng)
    return Split(index[fit][own], index[fit][choose], certifying)


def judge(builder: Builder, pruned: Pruned, rows: np.ndarray, goal: Goal) -> Judged:
    """Say what a network that was asked for loses on samples that chose nothing."""
    if not len(rows):
        return Judged(pruned)
    witness = Witness(builder, rows)
    certificate = certify(*witness.counts(pruned.model), goal.max_accuracy_drop, goal.confidence)
    return Judged(pruned, witness.drop(pruned.model), certificate)


def search(builder: Builder, split: Split, goal: Goal) -> Judged:
    """Find the smallest network whose loss is certified, or else is within the limit as seen.

    Where none is, the base itself, which loses nothing.
    """
    tried: list[dict[str, Any]] = []
    choosing, progress = Witness(builder, split.choose), builder.progress

    def note(stage: str, size: int, cost_ratio: float, drop: float) -> None:
        tried.append(_row(stage, size, cost_ratio, drop))
        if goal.met_by(drop):
            progress.best(f"{cost_ratio:.0%} of the cost, {drop:.1%} lost")
        progress.done()

    def within(size: int) -> bool:
        budgeted = _reached(builder, size)
        if budgeted is None:
            return False
        progress.doing(f"sketches budget {SIZES[size]:.2f}")
        drop = choosing.drop(builder.sketch(SIZES[size]))
        note("sketch", size, budgeted.cost_ratio, drop)
        return goal.met_by(drop)

    def network(size: int) -> Pruned:
        progress.doing(f"builds budget {SIZES[size]:.2f}")
        pruned = builder.distilled(builder.build(SIZES[size]))
        note("finalist", size, pruned.cost_ratio, choosing.drop(pruned.model))
        return pruned

    best, steps = boldest(within, len(SIZES)), finalists(builder.recipe)
    if builder.recipe.drop_blocks:
        builder.find_depth(SIZES[max(best, 0)], split.choose)
    around = sorted({min(max(best + step, 0), len(SIZES) - 1) for step in steps})
    sizes = [size for size in around if _reached(builder, size) is not None]
    start = sum(size <= max(best, 0) for size in sizes) - 1
    if builder.recipe.distill is not None:
        start = min(start + 1, len(sizes) - 1)  # what training may make up for
    makers = [functools.partial(network, size) for size in sizes]
    return replace(walk(builder, split, goal, makers, start), tried=tried)


def finalists(recipe: Recipe) -> tuple[int, ...]:
    """Steps from the size found, of those that are built in full."""
    return _FINALISTS if recipe.distill is None else _DISTILLED


def most_tried(recipe: Recipe) -> int:
    """How many networks a search builds at most: sketches, and those built in full."""
    return math.ceil(math.log2(len(SIZES) + 1)) + len(finalists(recipe))


def walk(
    builder: Builder, split: Split, goal: Goal, makers: Sequence[Callable[[], Pruned]], start: int
) -> Judged:
    """Test networks from careful to bold, and keep the last that is certified.

    Each is made when it is asked for.  Where none is certified: from number `start` back to the
    careful ones, the first that is within the limit on the samples that chose and on those that
    chose nothing; in the end the base.
    """
    certifying = Witness(builder, split.certify)
    limit, confidence = goal.max_accuracy_drop, goal.confidence
    made: dict[int, Pruned] = {}

    def network(i: int) -> Pruned:
        made[i] = made[i] if i in made else makers[i]()
        return made[i]

    if len(split.certify) >= goal.fewest:
        counts = (certifying.counts(network(i).model) for i in range(len(makers)))
        index, certificate = fixed_sequence(counts, limit, confidence)
        if index is not None:
            pruned = network(index)
            return Judged(pruned, certifying.drop(pruned.model), certificate)
    everybody = Witness(builder, np.concatenate((split.choose, split.certify)))
    for i in range(start, -1, -1):
        pruned = network(i)
        drop = certifying.drop(pruned.model)
        if goal.met_by(drop) and goal.met_by(everybody.drop(pruned.model)):
            own = certify(*certifying.counts(pruned.model), limit, confidence)
            # Even where it alone would pass: it was not the first to be tested.
            return Judged(pruned, drop, replace(own, certified=False))
    # The same answers as the base's: nothing can be lost.
    sure = Certificate(limit, confidence, len(split.certify), 0, 0, 0.0, True, None)
    return Judged(builder.whole(), 0.0, sure, is_base=True)


def boldest(within: Callable[[int], bool], n: int) -> int:
    """Last of `n` sizes that is within the limit, by bisection; -1 where the first is not."""
    low, high = -1, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low


def _reached(builder: Builder, size: int) -> Any:
    """What a size takes, or None where there is no network so small."""
    try:
        return builder.budgeted(SIZES[size])
    except OutOfReachError:
        return None


def _row(stage: str, size: int, cost_ratio: float, drop: float) -> dict[str, Any]:
    """What was tried, for `search_results_`; the drop is that on the samples that choose."""
    return {
        "stage": stage,
        "budget": SIZES[size],
        "cost_ratio": cost_ratio,
        "accuracy_drop": drop,
    }
