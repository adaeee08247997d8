"""Builds one network in any size from one set of scores; what sizes share is computed once."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from ..criteria.activations import Statistics
from ..data.calibration import Calibration
from ..graph.cost import count_macs
from ..repair.moments import Moments, gather_moments
from ..repair.sequential import RepairSettings, affordable_images, repair
from ..repair.static import static_least_squares
from ..repair.walk import graph_of
from ..slicing.channels import Sliced
from ..slicing.groups import ChannelGroup
from ..utils.device import in_pieces
from .budget import Budgeted, budgeted_widths
from .recipe import Recipe, choose_channels, extract
from .scoring import Scored

__all__ = ["Builder", "Pruned", "Split"]

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

    Shapes: `scores` (n_filters,).
    """

    sliced: Sliced
    scores: dict[str, np.ndarray]
    repair_error: dict[str, float]
    cost_ratio: float

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
    _widths: dict[float, Budgeted] = field(default_factory=dict)

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
        if budget not in self._widths:
            calibration = self.calibration
            batch = next(iter(self.batches(self.rows)))
            self._widths[budget] = budgeted_widths(
                calibration.graph,
                calibration.groups,
                self.chosen,
                self.scored,
                self.recipe,
                batch,
                self.others,
                budget,
            )
        return self._widths[budget]

    def build(self, budget: float | None = None) -> Pruned:
        """The network under a budget (None: that the recipe's schedule gives), repaired."""
        widths, cost = None, None
        if budget is not None:
            budgeted = self.budgeted(budget)
            widths, cost = budgeted.widths, budgeted.cost_ratio
        keep = choose_channels(self.chosen, self.scored.groups, self.recipe, widths)
        return self.of_channels(keep, self.recipe.repair, cost)

    def whole(self) -> Pruned:
        """The base itself, with the outputs that stay."""
        return self.of_channels({}, "none")

    def of_channels(
        self, keep: Mapping[str, np.ndarray], method: str, cost_ratio: float | None = None
    ) -> Pruned:
        """The network with these channels, by name of their group, repaired."""
        graph, drawn = self.calibration.graph, self.drawn(self.recipe.repair_samples)
        samples = torch.cat(list(self.batches(drawn)))
        outputs = self.calibration.table.outputs.tolist()
        sliced = extract(
            graph, self.calibration.groups, {**keep, **self.others}, samples[:64], outputs
        )
        errors = mend(self.calibration, sliced, drawn, samples, method)
        cost_ratio = self.macs_ratio(graph_of(sliced)) if cost_ratio is None else cost_ratio
        return Pruned(sliced, self.scored.layers, errors, cost_ratio)

    def macs_ratio(self, model: fx.GraphModule) -> float:
        """Multiplications of a network over those of the base."""
        example = self.calibration.example
        base = count_macs(self.calibration.graph, example)[0]
        return count_macs(model, example)[0] / max(base, 1)

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
        if self.recipe.repair != "none":
            static_least_squares(graph, sliced, self._moments)
        return graph_of(sliced)

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
