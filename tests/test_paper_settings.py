"""What `SINFClassifier.paper_settings` builds is what the paper (arXiv 2310.01259) describes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn

from sinfkit import FrozenModel, SemanticClusterer, SINFClassifier, train_network
from sinfkit.graph import trace


@pytest.fixture(scope="module")
def fitted():
    X, y = blobs(n_classes=4, per_class=30, noise=1.0)
    network = train_network(
        small_cnn(4, 6), X, y, epochs=6, batch_size=32, random_state=0, device="cpu"
    )
    clusterer = SemanticClusterer(method="given", mapping={"a": [0, 1], "b": [2, 3]})
    sinf = SINFClassifier.paper_settings(
        FrozenModel(network), clusterer=clusterer, random_state=0, device="cpu"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sinf.fit(X, y), X, y


def test_route_layer_is_the_earliest_with_three_quarters(fitted):
    sinf, X, y = fitted
    assert sinf.route_layer == 0.75 and sinf.route_accuracy_ >= 0.75
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = SINFClassifier.paper_settings(
            sinf.model, clusterer=sinf.clusterer, route_layer=0.99, random_state=0, device="cpu"
        ).fit(X, y)
    order = [n.target for n in trace(sinf.base_model_.module(), torch.as_tensor(X[:1])).graph.nodes]
    assert order.index(sinf.route_layer_) <= order.index(other.route_layer_)


def test_prefix_is_whole(fitted):
    sinf, *_ = fitted
    base = dict(sinf.base_model_.module().named_parameters())
    prefix = dict(sinf.network_.prefix.named_parameters())
    assert prefix and sinf.prefix_low_rank_ == 1
    for name, weight in prefix.items():
        assert weight.shape == base[name].shape, name


def test_scores_and_shares_are_those_of_its_algorithms(fitted):
    sinf, *_ = fitted
    pruner = sinf.pruner_
    assert (pruner.criterion, pruner.schedule, pruner.repair) == ("dcs", "linear", "none")
    modules = dict(sinf.base_model_.module().named_modules())
    for scores, support in zip(sinf.scores_, sinf.supports_, strict=True):
        shares = [
            1 - len(rows) / modules[layer].weight.shape[0]
            for layer, rows in support.items()
            if layer in scores
        ]
        assert shares == sorted(shares) and shares[-1] == pytest.approx(0.5)
        for layer, values in scores.items():
            assert values.min() >= 0 and values.sum() == pytest.approx(1)
            gone = np.setdiff1d(np.arange(len(values)), support[layer])
            assert not len(gone) or values[gone].max() <= values[support[layer]].min()


def test_a_cluster_answers_its_own_classes_and_unsure_samples_the_base(fitted):
    sinf, X, _ = fitted
    network = sinf.network_
    assert network.fallback == "base" and sinf.exit_threshold_ is None and sinf.router_weight_ == 0
    cluster, labels = sinf.predict_cluster(X), sinf.predict(X)
    x = torch.as_tensor(X)
    with torch.inference_mode():
        route = network.route(x)
        base = sinf.base_model_.module()(x).argmax(1).numpy()
    sure = route.confidence.numpy() >= sinf.confidence_threshold_
    own = sinf.class_clusters_[labels] == cluster
    assert own[sure].all()
    assert (labels == base)[~sure].all()
