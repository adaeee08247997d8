"""Filter scores and their registry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sinfkit.capability import discriminative_capability
from sinfkit.obs import Consumer
from sinfkit.scores import CRITERIA, Criterion, LayerData, get_criterion


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
        "consumers": (reader(torch.randn(5, n_filters, generator=generator)),),
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
        norm_scale=data.norm_scale[order],
        taylor=data.taylor[order],
        consumers=(permuted_reader(data.consumers[0], order),),
        generator=torch.Generator().manual_seed(1),
    )
    torch.testing.assert_close(
        scored(name, permuted), scored(name, data)[order], atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["dcs", "dcs_closed_form", "fdr", "activation_std"])
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
    for options in ({}, {"penalty": 0.1}, {"variant": "ablation"}, {"scaling": "column"}):
        expected = discriminative_capability(data.features, data.y, **options).score
        assert torch.equal(scored("dcs", data, **options), expected)
    assert {"penalty", "variant", "norm", "scaling"} <= CRITERIA["dcs"].options


def test_closed_form_is_the_spread_of_class_means():
    data = record()
    means = torch.stack([data.features[data.y == c].double().mean(0) for c in range(3)])
    priors = torch.bincount(data.y).double() / len(data.y)
    gaps = priors[:, None, None] * (means - data.features.double().mean(0))
    spread = gaps.square().sum((0, 2)).sqrt()
    torch.testing.assert_close(scored("dcs_closed_form", data), spread / spread.sum())


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


def test_activation_std_needs_no_labels():
    data = record()
    expected = data.features.double().std(0, correction=0).mean(1)
    torch.testing.assert_close(scored("activation_std", data), expected)


def test_taylor_passes_the_gradient_score_on():
    data = record()
    torch.testing.assert_close(scored("taylor", data), data.taylor.double())


def test_random_follows_its_generator():
    def draw(seed: int) -> torch.Tensor:
        return scored("random", record(generator=torch.Generator().manual_seed(seed)))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_shuffled_labels_keep_the_counts_and_lose_the_meaning():
    # All sizes are equal, one filter discriminates: only the true labels tell which.
    y = torch.arange(300) % 3
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    x[:, 5] = (y - 1) * 1.2
    data = record(features=x[:, :, None], y=y)
    true, shuffled = scored("dcs", data), scored("dcs_shuffled", data)
    assert float(true[5]) > 0.5
    assert float(shuffled[5]) < 0.4


def test_criteria_of_the_user():
    def spread(layer: LayerData) -> torch.Tensor:
        return layer.features.std(0).mean(1)

    criterion = get_criterion(spread)
    assert criterion.name == "spread"
    assert {"features", "y", "weight", "norm_scale"} <= criterion.needs
    assert not {"taylor", "weight_grad"} & criterion.needs
    assert criterion.function(record()).shape == (6,)
    spread.needs = {"features"}
    assert get_criterion(spread).needs == {"features"}
    assert get_criterion(criterion) is criterion
    assert get_criterion("l1") is CRITERIA["l1"]
    assert isinstance(CRITERIA["l1"], Criterion)


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
