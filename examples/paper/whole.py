"""A whole network that loses filters for all of its classes, with scores shared by all budgets."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from study import BATCH, Study, frozen
from torch import Tensor, fx

from sinfkit.criteria import Statistics, collect
from sinfkit.graph import count_macs, count_parameters, observation_nodes, output_layer, trace
from sinfkit.pruning import (
    Recipe,
    Scored,
    choose_channels,
    make_recipe,
    n_removed,
    network_cost,
    removal_ratios,
    score_classes,
    shared_widths,
    sliceable,
)
from sinfkit.repair import Moments, affordable_images, gather_moments, repair, static_least_squares
from sinfkit.slicing import check_sliced, find_groups, slice_channels

_LARGEST_RATIO = 0.99
_HALVINGS = 20


class Whole:
    """A study's network, any hidden layer of which may lose filters.

    Parameters
    ----------
    study : Study

    Attributes
    ----------
    graph : GraphModule
    output : str
        Name of the output layer.
    groups : list of ChannelGroup
        All of the network's.
    chosen : list of ChannelGroup
        Those that lose filters, in forward order.
    cost : CostModel
        Multiplications as a function of the channels left in `chosen`.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.graph = trace(study.base.model.module(study.device))
        self.example = next(study.batches(study.X[:1]))
        self.output = output_layer(self.graph, len(study.class_names))
        self.groups = find_groups(self.graph, self.example, self.output)
        self.chosen = sliceable(self.groups)
        layers = [layer for group in self.chosen for layer in group.layers]
        self.nodes = observation_nodes(self.graph, layers)
        self.cost = network_cost(self.graph, self.groups, self.chosen, self.example)
        self._checked = False

    def linear_widths(self, budget: float) -> dict[str, int]:
        """Widths of the linear schedule that keep to a fraction of the multiplications.

        The ratio of the last layer is found by bisection; that of the first is a fixed share of
        it, `linear_share` in ``frozen.toml``.
        """
        share = frozen()["pruning"]["linear_share"]

        def widths(last: float) -> dict[str, int]:
            ratios = removal_ratios(len(self.chosen), "linear", share * last, last)
            return {
                group.name: group.n_channels - n_removed(ratio, group.n_channels, group.n_groups)
                for group, ratio in zip(self.chosen, ratios.tolist(), strict=True)
            }

        return widths(smallest(lambda last: self.within(widths(last), budget), 0, _LARGEST_RATIO))

    def within(self, widths: Mapping[str, int], budget: float) -> bool:
        """Whether so few channels keep to a fraction of the multiplications."""
        left = [widths.get(group.name, group.n_channels) for group in self.chosen]
        return self.cost.total(left) <= budget * self.cost.base * (1 + 1e-9)

    def sliced(
        self, keep: Mapping[str, np.ndarray], x: Tensor
    ) -> tuple[fx.GraphModule, dict[str, np.ndarray]]:
        """The smaller network, and the channels that each layer kept; the first one is checked."""
        small = slice_channels(self.graph, self.example, keep, groups=self.groups)
        if not self._checked:
            check_sliced(self.graph, small, x[:64])
            self._checked = True
        return small.model, small.support  # type: ignore[return-value]

    def counts(self, module: torch.nn.Module) -> dict[str, int]:
        """Multiplications for one image, and parameters."""
        macs = count_macs(module, self.example)[0]
        return {"macs": macs, "params": count_parameters(module)}


class Draw:
    """One draw of calibration images of all classes, and what is known from them.

    Parameters
    ----------
    whole : Whole
    resample : int
        Which draw.

    Attributes
    ----------
    rows : ndarray of int
        Of the study's calibration images.
    x : Tensor
        The images, normalised, on the study's device.
    y : ndarray
        Their classes.
    """

    def __init__(self, whole: Whole, resample: int) -> None:
        study, options = whole.study, frozen()["pruning"]
        self.whole, self.resample = whole, resample
        self.rows = study.draw(range(len(study.class_names)), options["images"], resample)
        self.x, self.y = torch.cat(list(study.batches(study.X[self.rows]))), study.y[self.rows]
        self._statistics: dict[int, Statistics] = {}
        self._scored: dict[tuple[str, int], tuple[Recipe, Scored]] = {}

    @functools.cached_property
    def repair_images(self) -> Tensor:
        """Some of the images, drawn at random."""
        wanted = frozen()["pruning"]["repair_samples"]
        n = affordable_images(self.whole.graph, self.whole.example, wanted)
        order = np.random.default_rng(self.resample).permutation(len(self.x))[:n]
        return self.x[torch.as_tensor(order, device=self.x.device)]

    @functools.cached_property
    def moments(self) -> dict[str, Moments]:
        """Covariances of what the layers behind the sliced ones read, for the static repair."""
        readers = [name for group in self.whole.chosen for name in group.consumers]
        batches, n = self.repair_images.split(BATCH), len(self.repair_images)
        return gather_moments(self.whole.graph, readers, batches, n_images=n, seed=self.resample)

    def keep(
        self, criterion: str, schedule: str, budget: float, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """Channels of each group that stay.

        Parameters
        ----------
        criterion : str
        schedule : {"global", "linear"}
        budget : float
            Fraction of the multiplications that may stay.
        seed : int, default=0
            Of a criterion that draws at random.

        Raises
        ------
        ValueError
            If the budget cannot be met.
        """
        recipe, scored = self._score(criterion, seed)
        if schedule == "global":
            widths = shared_widths(self.whole.chosen, [scored], self.whole.cost, recipe, budget)
        else:
            widths = self.whole.linear_widths(budget)
        return choose_channels(self.whole.chosen, scored.groups, recipe, widths)

    def _score(self, criterion: str, seed: int) -> tuple[Recipe, Scored]:
        """Scores of all filters, and the recipe that they were made by."""
        if (criterion, seed) in self._scored:
            return self._scored[criterion, seed]
        whole, options = self.whole, frozen()
        pool = options["pool"].get(criterion, options["pool"]["default"])
        recipe = make_recipe(
            criterion, "global", 0.0, None, pool, "none", options["dcs"], budget=1.0
        )
        if pool not in self._statistics:
            batches = self.x.split(BATCH)
            self._statistics[pool] = collect(whole.graph, batches, whole.nodes, pool)
        with warnings.catch_warnings():
            # Layers in which nothing discriminates score 0, which is what is wanted here.
            warnings.simplefilter("ignore", UserWarning)
            scored = score_classes(
                whole.graph,
                whole.chosen,
                whole.nodes,
                self._statistics[pool],
                np.arange(len(self.y)),
                self.y,
                recipe,
                outputs=list(range(len(whole.study.class_names))),
                batches=self._batches,
                seed=1000 * self.resample + seed,
            )
        self._scored[criterion, seed] = recipe, scored
        return recipe, scored

    def _batches(self, rows: np.ndarray) -> Iterator[Tensor]:
        """Some of the images."""
        if len(rows) == len(self.x) and np.array_equal(rows, np.arange(len(rows))):
            return iter(self.x.split(BATCH))
        return iter(self.x[torch.as_tensor(rows, device=self.x.device)].split(BATCH))

    def pruned(self, keep: Mapping[str, np.ndarray], method: str) -> fx.GraphModule:
        """The network without the other channels, repaired."""
        small, support = self.whole.sliced(keep, self.x)
        graph, images = self.whole.graph, self.repair_images
        if method == "static_least_squares":
            static_least_squares(graph, small, support, self.moments, images[:1])
        elif method != "none":
            repair(
                graph,
                small,
                support,
                images,
                method=method,
                batch_size=BATCH,
                seed=self.resample,
            )
        return small

    @functools.cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Of the mean loss over all images, by parameter."""
        module = differentiable(self.whole.study)
        truth = torch.as_tensor(self.y, device=self.x.device)
        for x, y in zip(self.x.split(BATCH), truth.split(BATCH), strict=True):
            loss = torch.nn.functional.cross_entropy(module(x), y, reduction="sum")
            (loss / len(truth)).backward()
        return {
            name: parameter.grad
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }


def differentiable(study: Study) -> torch.nn.Module:
    """A copy of the base whose parameters take gradients."""
    return copy.deepcopy(study.base.model.module(study.device)).requires_grad_(True).eval()


def smallest(
    enough: Callable[[float], bool], low: float, high: float, halvings: int = _HALVINGS
) -> float:
    """Smallest number between two for which something holds, to rounding.

    Raises
    ------
    ValueError
        If it does not hold for `high`.
    """
    if not enough(high):
        raise ValueError(f"{high:g} is not enough")
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
