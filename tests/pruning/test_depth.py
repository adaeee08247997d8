"""Pruning by whole residual blocks, through `DCSPruner`."""

from __future__ import annotations

import copy

import joblib
import numpy as np
import pytest
import torch
from helpers import blobs
from torch import Tensor, nn

import sinfkit
from sinfkit import (
    DCSPruner,
    FrozenModel,
    PruningOptions,
    RoutingOptions,
    SemanticClusterer,
    SINFClassifier,
    train_network,
)
from sinfkit.graph import count_macs, count_parameters


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


@pytest.fixture(scope="module")
def trained():
    """Five blocks, of which the second and the fourth do next to nothing."""
    X, y = blobs(per_class=60, noise=1.2)
    torch.manual_seed(0)
    blocks, idle = [Block() for _ in range(3)], [Block() for _ in range(2)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, len(np.unique(y)))
    stem, *blocks, pool, flatten, last = train_network(
        nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), *blocks, *head),
        *(X[:240], y[:240]), epochs=8, batch_size=32, random_state=0, device="cpu",
    )  # fmt: skip
    with torch.no_grad():
        for block in idle:
            block.bn2.weight.mul_(0.01)
    first, second, third = blocks
    network = nn.Sequential(stem, first, idle[0], second, idle[1], third, pool, flatten, last)
    network = network.eval().requires_grad_(False)
    return network, X[:240], y[:240], X[240:], y[240:]


def pruner(model, **more):
    options = PruningOptions(**more.pop("options", {}))
    return DCSPruner(model, **{"budget": 0.6, "random_state": 0, **more}, options=options)


def test_idle_blocks_go_first_and_nothing_is_lost(trained):
    network, X, y, X_test, y_test = trained
    before = copy.deepcopy(network.state_dict())
    fitted = pruner(network).fit(X, y)
    idle = [f"{block}.conv{i}" for block in (2, 4) for i in (1, 2)]
    assert fitted.dropped_layers_ == idle
    assert not set(idle).intersection(fitted.support_, fitted.ratios_, fitted.repair_error_)
    example = torch.as_tensor(X[:1]).float()
    macs = count_macs(fitted.model_, example)[0] / count_macs(network, example)[0]
    assert fitted.cost_ratio_ == pytest.approx(macs) and macs <= 0.6
    base = FrozenModel(network).module()(torch.as_tensor(X_test).float()).argmax(1).numpy()
    assert (fitted.predict(X_test) == base).mean() > 0.95
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_budget_of_parameters(trained):
    network, X, y, _, _ = trained
    fitted = pruner(network, budget=0.7, options={"budget_unit": "params"}).fit(X, y)
    left = count_parameters(fitted.model_) / count_parameters(network)
    assert len(fitted.dropped_layers_) >= 2 and fitted.cost_ratio_ == pytest.approx(left)
    assert left <= 0.7


def test_a_budget_of_time(trained):
    network, X, y, _, _ = trained
    fitted = pruner(network, budget=0.9, batch_size=32, options={"budget_unit": "latency"})
    # How many blocks go depends on the machine.
    assert fitted.fit(X, y).cost_ratio_ <= 0.9


def test_a_search_drops_blocks_within_the_promise(trained):
    network, X, y, X_test, y_test = trained
    fitted = pruner(network, budget=None, max_accuracy_drop=0.1).fit(X, y)
    assert set(fitted.dropped_layers_) >= {"2.conv1", "4.conv2"}
    assert fitted.cost_ratio_ < 0.65
    report = fitted.report(X_test, y_test, repeats=0)
    assert report.macs / report.base_macs == pytest.approx(fitted.cost_ratio_, abs=1e-3)


def test_it_is_stored_trained_and_exported_like_any_other(trained, tmp_path):
    network, X, y, X_test, _ = trained
    fitted = pruner(network, distill=1).fit(X, y)
    assert fitted.dropped_layers_ and len(fitted.distillation_losses_) == 1
    joblib.dump(fitted, tmp_path / "joblib")
    sinfkit.save(fitted, tmp_path / "saved")
    expected = fitted.predict_proba(X_test)
    loaded = sinfkit.load(tmp_path / "saved", factory=lambda: copy.deepcopy(network))
    for again in (joblib.load(tmp_path / "joblib"), loaded):
        np.testing.assert_allclose(again.predict_proba(X_test), expected, atol=1e-6)
        assert again.dropped_layers_ == fitted.dropped_layers_
    program = torch.export.export(fitted.model_, (torch.as_tensor(X_test[:4]).float(),))
    found = program.module()(torch.as_tensor(X_test[:4]).float()).softmax(1)
    np.testing.assert_allclose(found.detach().numpy(), expected[:4], atol=1e-5)


def test_for_some_of_the_classes(trained):
    network, X, y, X_test, y_test = trained
    fitted = pruner(network, classes=[0, 2, 3]).fit(X, y)
    assert set(fitted.dropped_layers_) >= {"2.conv1", "4.conv2"}
    inside = np.isin(y_test, [0, 2, 3])
    assert fitted.score(X_test[inside], y_test[inside]) > 0.8


def test_first_layer_and_settings_without_effect(trained):
    network, X, y, _, _ = trained
    fitted = pruner(network, budget=0.8, options={"first_layer": "4.conv1"}).fit(X, y)
    assert set(fitted.dropped_layers_) == {"4.conv1", "4.conv2"}
    with pytest.raises(ValueError, match="drop_blocks has no effect with schedule='linear'"):
        DCSPruner(network, schedule="linear", options=PruningOptions(drop_blocks=False)).fit(X, y)


def test_only_where_it_is_wanted(trained):
    network, X, y, _, _ = trained
    assert pruner(network, options={"drop_blocks": False}).fit(X, y).dropped_layers_ == []
    assert DCSPruner(network, schedule="uniform").fit(X, y).dropped_layers_ == []


def test_networks_without_blocks_are_pruned_as_ever(trained):
    _, X, y, _, _ = trained
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, len(np.unique(y))),
    )  # fmt: skip
    ours = pruner(plain).fit(X, y)
    other = pruner(plain, options={"drop_blocks": False}).fit(X, y)
    assert ours.dropped_layers_ == []
    np.testing.assert_array_equal(ours.predict_proba(X), other.predict_proba(X))


@pytest.mark.parametrize("fallback", ["none", "base"])
def test_routed_networks_do_without_blocks_on_both_sides_of_the_router(trained, fallback, tmp_path):
    network, X, y, X_test, y_test = trained
    routed = SINFClassifier(
        network, clusterer=SemanticClusterer(n_clusters=2), route_layer="3", fallback=fallback,
        pruner=pruner(None), options=RoutingOptions(exit_threshold=None, prefix_low_rank=1.0),
        max_accuracy_drop=0.1, random_state=0,
    ).fit(X, y)  # fmt: skip
    parts = [routed.network_.prefix, *map(routed.network_.subgraph, range(2))]
    for part, idle, whole in (
        (parts[0], "2.", "1."),
        (parts[1], "4.", "5."),
        (parts[2], "4.", "5."),
    ):
        names = [name for name, _ in part.named_modules()]
        assert not any(name.startswith(idle) for name in names)
        assert any(name.startswith(whole) for name in names)
    assert not any(name.startswith("4.") for support in routed.supports_ for name in support)
    report = routed.report(X_test, y_test, repeats=0)
    if fallback == "none":
        # The route predictor's are not budgeted; filters make up for the rest, and no more.
        assert 0.5 < report.macs / report.base_macs <= 0.61
    assert routed.score(X_test, y_test) > 0.8
    sinfkit.save(routed, tmp_path / "saved")
    again = sinfkit.load(tmp_path / "saved", factory=lambda: copy.deepcopy(network))
    np.testing.assert_allclose(again.predict_proba(X_test), routed.predict_proba(X_test), atol=1e-6)
