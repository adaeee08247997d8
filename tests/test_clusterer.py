"""SemanticClusterer: groups of classes, and routes to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st

from sinfkit import CalibrationWarning, FrozenModel, SemanticClusterer
from sinfkit.routing import (
    activation_affinity,
    agglomerate,
    confusion_affinity,
    read_mapping,
)


def two_level_features(n_per=40, seed=0):
    """Six classes in three pairs; the pairs are far apart, the partners close."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(np.eye(3) * 6, 2, axis=0) + rng.normal(size=(6, 3)) * 0.4
    y = np.repeat(np.arange(6), n_per)
    x = centres[y] + rng.normal(size=(len(y), 3))
    return torch.as_tensor(np.hstack([x, rng.normal(size=(len(y), 2))]), dtype=torch.float32), y


@pytest.mark.parametrize(
    "affinity", [lambda x, y: confusion_affinity(x, y, 1e-3, 0), activation_affinity]
)
def test_both_affinities_find_the_pairs(affinity):
    x, y = two_level_features()
    a = affinity(x, y)
    np.testing.assert_allclose(a, a.T)
    assert (a >= 0).all()
    assert agglomerate(a, 3).tolist() == [0, 0, 1, 1, 2, 2]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 14), data=st.data())
def test_every_class_is_in_exactly_one_cluster(seed, n, data):
    k = data.draw(st.integers(1, n))
    limit = data.draw(st.one_of(st.none(), st.integers(-(-n // k), n)))
    a = np.random.default_rng(seed).random((n, n))
    labels = agglomerate(a + a.T, k, limit)
    assert labels.shape == (n,)
    sizes = np.bincount(labels, minlength=k)
    assert len(sizes) == k and sizes.min() >= 1
    assert limit is None or sizes.max() <= limit
    assert labels[0] == 0


def test_agglomerate_refuses_the_impossible():
    with pytest.raises(ValueError, match="cannot hold 7 classes"):
        agglomerate(np.ones((7, 7)), 2, 3)


def test_mappings_in_both_directions():
    classes = np.array(["car", "cat", "dog"])
    by_class = {"cat": "animal", "dog": "animal", "car": "vehicle"}
    by_cluster = {"vehicle": ["car"], "animal": ["dog", "cat"]}
    for mapping in (by_class, by_cluster):
        clusters, names = read_mapping(mapping, classes)
        assert clusters.tolist() == [1, 0, 0] and names.tolist() == ["animal", "vehicle"]


@pytest.mark.parametrize(
    ("mapping", "match"),
    [
        ({"a": [0, 1], "b": [1, 2]}, "names class 1 twice"),
        ({0: "a", 1: "a"}, "no cluster for class"),
        ([0, 1], "must be a dict"),
        ({}, "not empty"),
    ],
)
def test_wrong_mappings(mapping, match):
    with pytest.raises(ValueError, match=match):
        read_mapping(mapping, np.arange(3))


@pytest.mark.parametrize("method", ["confusion", "activation"])
def test_fit_predict_transform(method):
    X, y = blobs()
    frozen = FrozenModel(small_cnn())
    with pytest.warns(CalibrationWarning, match="no better than chance"):
        clusterer = SemanticClusterer(frozen, method=method, n_clusters=3, random_state=0).fit(X, y)
    assert clusterer.class_clusters_.shape == (6,)
    assert set(clusterer.class_clusters_) == {0, 1, 2}
    p = clusterer.transform(X)
    assert p.shape == (len(X), 3) and p.dtype == np.float32
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert (clusterer.predict(X) == p.argmax(1)).all()
    truth = clusterer.class_clusters_[y]
    assert (clusterer.predict(X) == truth).mean() > 0.8
    assert clusterer.get_feature_names_out().tolist() == [f"semanticclusterer{i}" for i in range(3)]


@pytest.mark.filterwarnings("ignore:The model answers")
def test_given_mapping_layer_and_max_cluster_size():
    X, y = blobs()
    frozen = FrozenModel(small_cnn())
    given_ = SemanticClusterer(
        frozen, method="given", mapping={"x": [0, 2, 4], "y": [1, 3, 5]}, layer="3", random_state=0
    ).fit(X, y)
    assert given_.class_clusters_.tolist() == [0, 1, 0, 1, 0, 1]
    assert given_.cluster_names_.tolist() == ["x", "y"] and given_.layer_ == "3"
    capped = SemanticClusterer(frozen, n_clusters=3, max_cluster_size=2, random_state=0).fit(X, y)
    assert np.bincount(capped.class_clusters_).tolist() == [2, 2, 2]
    with pytest.warns(UserWarning, match="more than the 6 classes"):
        clipped = SemanticClusterer(frozen, n_clusters=9, random_state=0).fit(X, y)
    assert sorted(clipped.class_clusters_) == list(range(6))


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"method": "kmeans"}, "method must be one of"),
        ({"mapping": {0: 1}}, "mapping goes with"),
        ({"method": "given"}, "mapping goes with"),
        ({"n_clusters": 0}, "n_clusters must be a positive integer"),
        ({"n_clusters": 2.5}, "n_clusters must be a positive integer"),
        ({"max_cluster_size": -1}, "max_cluster_size"),
        ({"n_clusters": 2, "max_cluster_size": 2}, "cannot hold"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"layer": "nowhere"}, "nowhere"),
        ({"device": "gpu"}, "device"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
@pytest.mark.filterwarnings("ignore:The model answers")
def test_bad_parameters(parameters, match):
    X, y = blobs(per_class=8)
    clusterer = SemanticClusterer(FrozenModel(small_cnn()), **parameters)
    with pytest.raises(ValueError, match=match):
        clusterer.fit(X, y)
    assert not [name for name in vars(clusterer) if name.endswith("_")]
