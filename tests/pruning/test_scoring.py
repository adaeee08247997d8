"""Choosing channels: groups, schedules, scores of coupled layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import small_cnn
from torch import nn

from sinfkit.graph import observation_nodes, output_layer, trace
from sinfkit.pruning import (
    ClassSamples,
    Recipe,
    choose_channels,
    group_scores,
    score_classes,
    sliceable,
)
from sinfkit.slicing import find_groups


def recipe(**changes):
    parameters = {
        "criterion": "l1",
        "schedule": "linear",
        "pruning_ratios": (0.25, 0.5),
        "repair": "none",
        "penalty": 1.0,
    }
    return Recipe(**(parameters | changes))


@pytest.fixture(scope="module")
def plain():
    graph = trace(small_cnn())
    return graph, find_groups(graph, torch.zeros(1, 1, 8, 8), output_layer(graph, 6))


def test_the_schedule_counts_hidden_groups_only(plain):
    _, groups = plain
    chosen = sliceable(groups)
    assert [g.name for g in chosen] == ["0", "3", "7", "10"]
    scores = {g.name: np.arange(g.n_channels, dtype=float) for g in chosen}
    keep = choose_channels(chosen, scores, recipe())
    assert [len(k) for k in keep.values()] == [6, 6, 10, 8]
    assert keep["10"].tolist() == list(range(8, 16))  # the lowest scores went


def test_widths_are_rounded_up_to_a_multiple(plain):
    _, groups = plain
    chosen = sliceable(groups)
    scores = {g.name: np.arange(g.n_channels, dtype=float) for g in chosen}
    keep = choose_channels(chosen, scores, recipe(round_to=4))
    assert [len(k) for k in keep.values()] == [8, 8, 12, 8]  # of 6, 6, 10, 8
    # What is rounded to more than there is stays whole.
    keep = choose_channels(chosen, scores, recipe(round_to=16))
    assert [len(k) for k in keep.values()] == [8, 8, 16, 16]
    for wrong in (0, 2.0, True):
        with pytest.raises(ValueError, match="round_to"):
            recipe(round_to=wrong)
    with pytest.raises(ValueError, match="round_to"):
        recipe(round_to=8, schedule="iterative")


def test_a_group_that_crosses_the_border_stays_whole(plain):
    _, groups = plain
    assert [g.name for g in sliceable(groups, ["0", "3"])] == ["0"]  # 3 feeds 7
    assert [g.name for g in sliceable(groups, ["7", "10", "15"])] == ["7", "10"]


def test_options_reach_only_criteria_that_know_them():
    assert recipe().options == {}
    assert recipe(criterion="dcs").options == {"penalty": 1.0}


def test_coupled_layers_share_one_score():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.head(torch.relu(x + self.b(x)).mean((2, 3)))

    graph = trace(Block())
    groups = sliceable(find_groups(graph, torch.zeros(1, 1, 8, 8), "head"))
    assert [g.layers for g in groups] == [("a", "b")]
    scores = {"a": np.array([1.0, 0, 0, 3]), "b": np.array([0, 0, 20.0, 0])}
    joint = group_scores(groups, scores, {"a": "x", "b": "y"})
    np.testing.assert_allclose(joint["a"], [0.125, 0, 0.5, 0.375])
    # two operands of one sum are observed at the same place, and count once
    nodes = observation_nodes(graph, ["a", "b"])
    assert len(set(nodes.values())) in (1, 2)
    same = group_scores(groups, {"a": scores["b"], "b": scores["b"]}, {"a": "x", "b": "x"})
    np.testing.assert_allclose(same["a"], [0, 0, 1, 0])


def test_scores_by_weights_need_no_features(plain):
    graph, groups = plain
    chosen = sliceable(groups)

    def scores(seed, **changes):
        samples = ClassSamples(np.arange(6), range(6), {}, lambda rows: [], torch.ones(6), seed)
        return score_classes(graph, chosen, samples, recipe(**changes)).layers

    modules = dict(graph.named_modules())
    for layer, score in scores(0).items():
        expected = modules[layer].weight.detach().abs().flatten(1).sum(1).numpy()
        np.testing.assert_allclose(score, expected, rtol=1e-5)
    a, b, c = (scores(seed, criterion="random")["0"] for seed in (1, 1, 2))
    assert (a == b).all() and (a != c).any()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pruning_ratios": (0.6, 0.5)}, "pruning_ratios must not fall"),
        ({"pruning_ratios": (-0.1, 0.5)}, "pruning_ratios"),
        ({"pruning_ratios": (0.1, 1.0)}, "pruning_ratios"),
        ({"pruning_ratios": 0.5}, "two numbers"),
        ({"pruning_ratios": torch.tensor(0)}, "two numbers"),
        ({"pruning_ratios": np.eye(2)}, "pruning_ratios"),
        ({"pruning_ratios": "ab"}, "pruning_ratios must be"),
        ({"budget": 0.5}, "budget has an effect"),
        ({"schedule": "global", "budget": 0.0}, "budget must be"),
        ({"schedule": "steep"}, "schedule must be one of"),
    ],
)
def test_a_recipe_is_checked_when_it_is_made(changes, match):
    with pytest.raises(ValueError, match=match):
        recipe(**changes)
    assert recipe(schedule="uniform", pruning_ratios=(0.6, 0.5)).pruning_ratios == (0.6, 0.5)
