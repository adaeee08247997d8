"""Filter scores and their registry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sinfkit import DCSPruner, PruningOptions
from sinfkit.criteria import (
    CRITERIA,
    Consumer,
    Criterion,
    LayerData,
    discriminative_capability,
    get_criterion,
)


def record(
    n: int = 40, n_filters: int = 6, k: int = 3, seed: int = 0, **change: object
) -> LayerData:
    """A convolution's record with everything in it."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % k
    means = torch.randn(k, n_filters, 4, generator=generator)
    fields = {
        "name": "layer",
        "features": torch.relu(means[y] + torch.randn(n, n_filters, 4, generator=generator)),
        "y": y,
        "weight": torch.randn(n_filters, 3, 3, 3, generator=generator),
        "norm_scale": torch.rand(n_filters, generator=generator),
        "taylor": torch.rand(n_filters, generator=generator),
        "map_rank": 4 * torch.rand(n_filters, generator=generator),
        "map_independence": torch.rand(n_filters, generator=generator),
        "map_zeros": torch.rand(n_filters, generator=generator),
        "map_range": torch.rand(n_filters, generator=generator),
        "consumers": (reader(torch.randn(5, n_filters, generator=generator)),),
        "consumer_features": {"next": torch.rand(n, 5 * 4, generator=generator)},
        "n_classes": k,
        "generator": generator,
    }
    return LayerData(**{**fields, **change})


def reader(weight: torch.Tensor) -> Consumer:
    """A linear layer behind filters that are correlated."""
    n = weight.shape[1]
    gram = torch.eye(n, dtype=torch.float64) + torch.arange(1.0, n + 1).double().outer(
        torch.arange(1.0, n + 1).double()
    )
    return Consumer(
        "next", gram[None], weight.double()[None], ((np.arange(n)[:, None], np.arange(n)),)
    )


PER_FILTER = (
    "norm_scale",
    "taylor",
    "map_rank",
    "map_independence",
    "map_zeros",
    "map_range",
)


def scored(name: str, data: LayerData, **options: object) -> torch.Tensor:
    return CRITERIA[name].function(data, **options)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_one_finite_score_per_filter_from_what_is_declared(name):
    criterion = CRITERIA[name]
    data = record()
    only = LayerData(n_classes=3, **{field: getattr(data, field) for field in criterion.needs})
    scores = criterion.function(only)
    assert criterion.name == name
    assert scores.shape == (6,) and scores.dtype == torch.float64
    assert bool(torch.isfinite(scores).all()) and bool((scores >= 0).all())


@pytest.mark.parametrize(
    ("name", "field"),
    [(n, f) for n, c in sorted(CRITERIA.items()) for f in sorted(c.needs - {"generator"})],
)
def test_a_missing_field_is_named(name, field):
    with pytest.raises(ValueError, match=f"needs {field} of layer 'layer'"):
        scored(name, record(**{field: None}))


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_the_record_and_the_global_generator_are_left_alone(name):
    data = record()
    before = [data.features.clone(), data.y.clone(), data.weight.clone()]
    state = torch.random.get_rng_state()
    scored(name, data)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, before, (data.features, data.y, data.weight)))


def permuted_reader(consumer: Consumer, order: list[int]) -> Consumer:
    """The same layer behind filters in another order."""
    gram, weight = consumer.gram[:, order][:, :, order], consumer.weight[:, :, order]
    return Consumer(consumer.name, gram, weight, consumer.columns)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(sorted(set(CRITERIA) - {"random"})),
    st.integers(0, 1000),
    st.randoms(use_true_random=False),
)
def test_permuting_filters_permutes_scores(name, seed, random):
    data = record(seed=seed, generator=torch.Generator().manual_seed(1))
    order = list(range(6))
    random.shuffle(order)
    permuted = record(
        features=data.features[:, order],
        weight=data.weight[order],
        consumers=(permuted_reader(data.consumers[0], order),),
        consumer_features=data.consumer_features,
        **{field: getattr(data, field)[order] for field in PER_FILTER},
        generator=torch.Generator().manual_seed(1),
    )
    torch.testing.assert_close(
        scored(name, permuted), scored(name, data)[order], atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["dcs", "fdr"])
def test_duplicating_samples_changes_nothing(name):
    data = record()
    twice = record(features=data.features.repeat(2, 1, 1), y=data.y.repeat(2))
    torch.testing.assert_close(scored(name, twice), scored(name, data), atol=1e-9, rtol=1e-7)


def test_weights_of_convolutions_and_linear_layers():
    weight = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    for shaped in (weight, weight.reshape(2, 1, 1, 2), weight.reshape(2, 2, 1, 1)):
        assert scored("l1", LayerData(weight=shaped)).tolist() == [7.0, 1.0]
        assert scored("l2", LayerData(weight=shaped)).tolist() == [5.0, 1.0]
    layer = nn.Conv2d(4, 6, 3, groups=2)
    expected = layer.weight.detach().double().abs().sum((1, 2, 3))
    scores = scored("l1", LayerData(weight=layer.weight))
    torch.testing.assert_close(scores, expected)
    assert not scores.requires_grad


def test_dcs_is_the_public_function_with_its_options():
    data = record()
    for options in ({}, {"penalty": 0.1}):
        expected = discriminative_capability(data.features, data.y, **options).score
        assert torch.equal(scored("dcs", data, **options), expected)
    assert CRITERIA["dcs"].options == {"penalty"}


def test_fdr_by_hand():
    y = torch.tensor([0, 0, 1, 1])
    x = torch.tensor([[0.0, 5.0, 0.0], [2.0, 5.0, 0.0], [4.0, 5.0, 1.0], [8.0, 5.0, 1.0]])
    scores = scored("fdr", LayerData(features=x[:, :, None], y=y, n_classes=2))
    # Means 1 and 6, variances 1 and 4; a constant; a perfect separation without variance.
    assert float(scores[0]) == pytest.approx(25 / 5)
    assert float(scores[1]) == 0.0
    assert float(scores[2]) > 1e6 and bool(torch.isfinite(scores[2]))


def test_fdr_of_one_class_is_zero():
    data = record(y=torch.zeros(40, dtype=torch.int64))
    assert scored("fdr", data).tolist() == [0.0] * 6


def test_taylor_passes_the_gradient_score_on():
    data = record()
    torch.testing.assert_close(scored("taylor", data), data.taylor.double())


def test_a_filter_of_zeros_is_not_far_from_others():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3.0, 0.0]])
    assert scored("fpgm", LayerData(weight=weight)).tolist() == pytest.approx([9.0, 0.0, 7.0])


def test_statistics_of_maps_count_where_activations_vary():
    data = LayerData(
        map_rank=torch.tensor([2.5, 1.0]),
        map_independence=torch.tensor([3.0, 7.0]),
        map_zeros=torch.tensor([0.75, 0.0]),
        map_range=torch.tensor([4.0, 0.0]),
    )
    assert scored("hrank", data).tolist() == [2.5, 0.0]
    assert scored("chip", data).tolist() == [3.0, 0.0]
    assert scored("apoz", data).tolist() == [0.25, 0.0]


def test_random_follows_its_generator():
    def draw(seed: int) -> torch.Tensor:
        return scored("random", record(generator=torch.Generator().manual_seed(seed)))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_criteria_of_the_user():
    def spread(layer: LayerData) -> torch.Tensor:
        return layer.features.std(0).mean(1)

    criterion = get_criterion(spread)
    assert criterion.name == "spread"
    assert {"features", "y", "weight", "norm_scale"} <= criterion.needs
    assert not {"taylor", "map_rank"} & criterion.needs
    assert criterion.function(record()).shape == (6,)
    spread.needs = {"features"}
    assert get_criterion(spread).needs == {"features"}
    assert get_criterion(criterion) is criterion
    assert get_criterion("l1") is CRITERIA["l1"]
    assert isinstance(CRITERIA["l1"], Criterion)


untrained = pytest.mark.filterwarnings("ignore:The model answers")


def network_with_idle_filters() -> nn.Module:
    """Behind the second convolution, filter 2 is always 0 and filter 5 always 1."""
    network = small_cnn()
    with torch.no_grad():
        network[4].bias.fill_(1.0)  # so that all others fire
        network[4].weight[[2, 5]] = 0.0
        network[4].bias[2] = 0.0
    return network


MAY_KEEP_IDLE = {"random", "l1", "l2", "fpgm", "taylor", "obs", "dcs_obs"}


@untrained
@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_prunes(name):
    X, y = blobs(per_class=12)
    pruner = DCSPruner(
        network_with_idle_filters(),
        schedule="linear",
        pruning_ratios=(0.25, 0.25),
        criterion=name,
        repair="none",
        random_state=0,
        device="cpu",
    )
    if CRITERIA[name].needs & {"features", "consumer_features"}:
        pruner.set_params(options=PruningOptions(pool_size=2))
    pruner.fit(X, y)
    assert {layer: len(kept) for layer, kept in pruner.support_.items()} == {
        "0": 6,
        "3": 6,
        "7": 12,
        "10": 12,
    }
    for layer, score in pruner.scores_.items():
        assert np.isfinite(score).all() and (score >= 0).all(), layer
    if name not in MAY_KEEP_IDLE:  # what a constant can replace goes first
        assert pruner.scores_["3"][[2, 5]].tolist() == [0.0, 0.0]
        assert not {2, 5} & set(pruner.support_["3"])


@untrained
def test_what_is_collected_is_what_the_network_computes():
    X, y = blobs(per_class=5)
    network, seen = network_with_idle_filters(), {}

    def look(layer: LayerData) -> torch.Tensor:
        seen[layer.name] = layer
        return layer.map_rank

    look.needs = {"map_rank", "map_independence", "map_zeros", "taylor"}
    everything = PruningOptions(validation_fraction=0.0)
    DCSPruner(
        network, budget=0.9, criterion=look, random_state=0, device="cpu", options=everything
    ).fit(X, y)
    with torch.no_grad():
        maps = network[:6](torch.from_numpy(X))  # behind the second convolution's ReLU
    found = seen["3"]
    torch.testing.assert_close(found.map_zeros, (maps == 0).double().mean((0, 2, 3)))
    ranks = torch.linalg.matrix_rank(maps).double().mean(0)
    torch.testing.assert_close(found.map_rank, ranks, atol=0.05, rtol=0)
    assert np.flatnonzero(found.map_range == 0).tolist() == [2, 5]
    assert (np.flatnonzero(found.map_independence < 1e-6) == [2]).all()
    assert found.features is None


def test_unknown_criteria_are_refused():
    def wants(layer: LayerData) -> torch.Tensor:
        return layer.weight

    wants.needs = {"colour"}
    with pytest.raises(ValueError, match=r"'dcs'.*'l3'"):
        get_criterion("l3")
    with pytest.raises(ValueError, match="colour"):
        get_criterion(wants)
    with pytest.raises(TypeError, match="int"):
        get_criterion(3)
