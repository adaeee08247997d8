"""Static least squares, the moments that it needs, and the inputs that a sliced network kept."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import blobs, randomise_batch_norms, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sinfkit.repair.moments as moments
import sinfkit.repair.static as static
from sinfkit import DCSPruner, SlicingWarning
from sinfkit.graph import trace
from sinfkit.repair import (
    Moments,
    RepairSettings,
    gather_moments,
    repair,
    shrunk_layers,
    static_least_squares,
)
from sinfkit.slicing import Sliced, find_groups, slice_channels


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cut(model: nn.Module, keep: dict[str, list[int]], X: Tensor) -> tuple:
    """The dense network, the sliced one and its graph."""
    dense = trace(model.eval().requires_grad_(False))
    sliced = slice_channels(dense, X[:2], keep)
    return dense, sliced, sliced.model


def every_row(dense, sliced, X: Tensor, batch: int = 7) -> dict[str, Moments]:
    names = shrunk_layers(dense, sliced)
    return gather_moments(dense, names, X.split(batch), n_images=len(X), max_rows=10**7)


def two_linear(n_in: int = 5, width: int = 6, n_out: int = 3, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(n_in, width), nn.Tanh(), nn.Linear(width, n_out)).double()


# Against numpy ------------------------------------------------------------------------------------


def by_hand(H, W, b, k, alpha):
    """Ridge regression of the dense outputs, towards the old weights, from rows H."""
    centred = H - H.mean(0)
    r = np.setdiff1d(np.arange(H.shape[1]), k)
    X, Y = centred[:, k], centred[:, r] @ W[:, r].T
    a = alpha * (X**2).sum() / len(k)
    new = W[:, k] + np.linalg.solve(X.T @ X + a * np.eye(len(k)), X.T @ Y).T
    bias = b + W @ H.mean(0) - new @ H.mean(0)[k]
    lost = ((centred @ W.T - X @ new.T) ** 2).sum() / ((centred @ W.T) ** 2).sum()
    return new, bias, lost


@pytest.mark.parametrize("alpha", [1e-6, 1e-2, 1.0])
def test_one_layer_by_hand(alpha):
    model = two_linear()
    X = torch.randn(40, 5, generator=generator()).double() + 1
    dense, small, sliced = cut(model, {"0": [0, 2, 3]}, X)
    found = every_row(dense, sliced, X)
    errors = static_least_squares(dense, small, found, alpha=alpha)
    hidden = model[:2](X).numpy()
    W, b, lost = by_hand(hidden, model[2].weight.numpy(), model[2].bias.numpy(), [0, 2, 3], alpha)
    new = sliced.get_submodule("2")
    np.testing.assert_allclose(new.weight.numpy(), W, atol=1e-12)
    np.testing.assert_allclose(new.bias.numpy(), b, atol=1e-12)
    assert errors == {"0": 0.0, "2": pytest.approx(lost)}
    left = (dense(X) - sliced(X)).square().sum() / (dense(X) - dense(X).mean(0)).square().sum()
    assert errors["2"] == pytest.approx(float(left))


@pytest.mark.parametrize("norm", [True, False])
def test_convolution_by_hand(norm):
    """Its shift goes into the batch-norm behind, whose gain weighs the channels' errors."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1, bias=not norm)]
    layers += [nn.BatchNorm2d(4)] if norm else []
    model = randomise_batch_norms(nn.Sequential(*layers)).double()
    X = torch.randn(6, 2, 7, 7, dtype=torch.float64)
    keep = {"0": [1, 2, 5]} | ({"2": [0, 3]} if norm else {})
    dense, small, sliced = cut(model, keep, X)
    errors = static_least_squares(dense, small, every_row(dense, sliced, X), alpha=0.1)
    rows = nn.functional.unfold(model[:2](X), 3, padding=1).transpose(1, 2).flatten(0, 1).numpy()
    kept = small.support["2"]
    weight = model[2].weight.flatten(1).numpy()[kept]
    bias = np.zeros(len(kept)) if norm else model[2].bias.numpy()[kept]
    k = np.flatnonzero(np.isin(np.arange(54) // 9, [1, 2, 5]))
    W, b, _ = by_hand(rows, weight, bias, k, 0.1)
    new = sliced.get_submodule("2")
    np.testing.assert_allclose(new.weight.flatten(1).numpy(), W, atol=1e-12)
    if norm:
        assert new.bias is None
        mean = model[3].running_mean.numpy()[kept]
        np.testing.assert_allclose(sliced.get_submodule("3").running_mean.numpy(), mean - b)
    else:
        np.testing.assert_allclose(new.bias.numpy(), b, atol=1e-12)
    wanted, got = dense(X)[:, kept], sliced(X)
    spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().sum()
    assert errors["2"] == pytest.approx(float((wanted - got).square().sum() / spread))


def test_first_refitted_layer_agrees_with_the_sequential_form():
    """The inputs that it has left are the dense ones; the rows are all there are."""
    model = small_cnn().double()
    X = torch.as_tensor(blobs(per_class=4)[0]).double()
    keep = {"0": [0, 3, 4, 7], "3": [1, 2, 6]}
    dense, small, sliced = cut(model, keep, X)
    twin = copy.deepcopy(sliced)
    static_least_squares(dense, small, every_row(dense, sliced, X), alpha=0.03)
    repair(dense, replace(small, model=twin), X, RepairSettings(max_rows=10**7, alphas=[0.03]))
    for name in ("3.weight", "3.bias"):
        ours, theirs = (m.state_dict()[name] for m in (sliced, twin))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    later = [m.state_dict()["7.weight"] for m in (sliced, twin)]
    assert not torch.allclose(*later, rtol=1e-3)


# What must hold -----------------------------------------------------------------------------------


def test_nothing_removed_nothing_changed():
    model = small_cnn()
    dense = trace(model.requires_grad_(False))
    sliced = trace(copy.deepcopy(model))
    assert shrunk_layers(dense, sliced) == []
    errors = static_least_squares(dense, Sliced(sliced, {}, {}), {})
    assert set(errors.values()) == {0.0}
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), sliced.parameters(), strict=True)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_exact_where_the_removed_are_combinations_of_the_kept(seed, n_kept):
    model = two_linear(4, 9, 3, seed)
    model[1] = nn.Identity()
    mixing = torch.randn(9 - n_kept, n_kept, generator=generator(seed)).double()
    with torch.no_grad():
        model[0].weight[n_kept:] = mixing @ model[0].weight[:n_kept]
    X = torch.randn(80, 4, generator=generator(seed + 1)).double()
    dense, small, sliced = cut(model, {"0": list(range(n_kept))}, X)
    found = every_row(dense, sliced, X)
    errors = static_least_squares(dense, small, found, alpha=1e-12)
    assert errors["2"] < 1e-6
    torch.testing.assert_close(sliced(X), dense(X), rtol=1e-3, atol=1e-3)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-6, 1e-2, 1.0]), st.data())
def test_more_inputs_lose_less_but_for_the_penalty(seed, alpha, data):
    """No refit of fewer inputs, nor zero weights, is better by more than the penalty accounts for.

    A refit also minimises how far the weights move, so that the share may exceed 1, a little.
    """
    model = two_linear(6, 8, 3, seed)
    X = torch.randn(50, 6, generator=generator(seed)).double()
    order = data.draw(st.permutations(range(8)))
    dense = trace(model.requires_grad_(False))
    found = gather_moments(dense, ["2"], [X], n_images=50)
    old, spread = model[2].weight, float(model(X).var(0, correction=0).sum())
    power = model[:2](X).var(0, correction=0)
    fewer, weights = spread, torch.zeros_like(old)  # nothing is left
    for n in range(1, 9):
        kept = sorted(order[:n])
        small = slice_channels(dense, X[:1], {"0": kept})
        lost = static_least_squares(dense, small, found, alpha=alpha)["2"] * spread
        penalty = float(alpha * power[kept].mean()) + found["2"].noise
        moved = float((weights - old)[:, kept].square().sum())
        assert 0.0 <= lost <= fewer + penalty * moved + 1e-9 * spread
        fewer, weights = lost, torch.zeros_like(old)
        weights[:, kept] = small.model.get_submodule("2").weight
    assert lost <= 1e-9 * spread


def test_single_precision_is_near_double_and_falls_back_to_it(monkeypatch):
    X = torch.randn(300, 6, generator=generator())
    keep = {"0": list(range(0, 64, 2))}
    model = two_linear(6, 64, 5)  # many inputs that are functions of few: ill-conditioned
    outputs = {}
    for kind in ("double", "single", "fallback"):
        dtype = torch.float64 if kind == "double" else torch.float32
        if kind == "fallback":
            monkeypatch.setattr(static, "_WELL_SOLVED", 0.0)
        dense, small, sliced = cut(copy.deepcopy(model).to(dtype), keep, X.to(dtype))
        found = every_row(dense, sliced, X.to(dtype))
        static_least_squares(dense, small, found)
        assert sliced.get_submodule("2").weight.dtype == dtype
        outputs[kind] = sliced(X.to(dtype)).double()
    torch.testing.assert_close(outputs["single"], outputs["double"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs["fallback"], outputs["double"], rtol=1e-4, atol=1e-4)


def test_constant_and_dead_inputs():
    model = two_linear(4, 6, 2)
    with torch.no_grad():
        model[0].weight.zero_()
    X = torch.randn(30, 4, generator=generator()).double()
    dense, small, sliced = cut(model, {"0": [1, 4]}, X)
    errors = static_least_squares(dense, small, every_row(dense, sliced, X))
    torch.testing.assert_close(sliced(X), dense(X))  # constants go into the bias
    assert errors["2"] < 1e-6


# Real networks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return X[:1000], y[:1000], X[1000:], y[1000:]


def test_beats_mean_and_none_on_digits(digits):
    X, y, X_test, y_test = digits
    base = (
        DCSPruner(criterion="dcs", schedule="linear", pruning_ratios=(0.0, 0.0), random_state=0)
        .fit(X, y)
        .base_model_
    )
    score, spread = {}, {}
    for method in ("none", "mean", "static_least_squares", "least_squares"):
        pruner = DCSPruner(
            base,
            schedule="linear",
            pruning_ratios=(0.3, 0.7),
            criterion="random",
            repair=method,
            random_state=0,
        ).fit(X, y)
        score[method] = pruner.score(X_test, y_test)
        spread[method] = max(pruner.repair_error_.values())
    assert score["static_least_squares"] > max(score["none"], score["mean"])
    assert 0 < spread["static_least_squares"] < 1


class Branches(nn.Module):
    """Concatenation, a sum, depthwise and grouped layers, pooling, flattening, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 6, 1)
        self.joined = nn.Conv2d(10, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.added = nn.Conv2d(10, 8, 1)
        self.gate = nn.Linear(8, 8)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x).relu(), torch.sigmoid(self.right(x))], 1)
        h = self.norm(self.depthwise(self.joined(both).relu())).relu()
        h = self.grouped(h) + self.added(both)
        h = h * torch.sigmoid(self.gate(h.mean((2, 3))))[:, :, None, None]
        h = nn.functional.max_pool2d(h.relu(), 3)
        return self.head(h.view(h.size(0), -1))


@pytest.fixture(scope="module")
def branches():
    torch.manual_seed(0)
    model = randomise_batch_norms(Branches()).double().eval().requires_grad_(False)
    coarse = torch.randn(60, 2, 2, 2, dtype=torch.float64, generator=generator())
    return model, nn.functional.interpolate(coarse, size=(6, 6), mode="bilinear")


def test_inputs_are_followed_to_their_consumers(branches):
    model, X = branches
    keep = {
        "left": [1, 3],
        "right": [0, 2, 5],
        "joined": [0, 1, 3, 4, 5, 7],
        "grouped": [0, 2, 4, 6],
    }
    removed = cut(model, keep, X)[1].removed_inputs
    others = {name: index.tolist() for name, index in removed.items()}
    both = [0, 2, 5, 7, 8]
    assert others["joined"] == others["added"] == both
    assert others["depthwise"] == others["grouped"] == [2, 6]
    assert others["gate"] == [1, 3, 5, 7]
    assert others["head"] == [i * 4 + j for i in (1, 3, 5, 7) for j in range(4)]


def test_refits_whatever_reads_what_is_missing(branches):
    model, X = branches
    keep = {
        "left": [1, 3],
        "right": [0, 2, 5],
        "joined": [0, 1, 3, 4, 5, 7],
        "grouped": [0, 2, 4, 6],
    }
    dense, unrepaired, _ = cut(model, keep, X)
    left = {}
    for method in ("none", "mean", "static_least_squares"):
        small = replace(unrepaired, model=copy.deepcopy(unrepaired.model))
        sliced = small.model
        errors = repair(dense, small, X, RepairSettings(method, max_rows=10**6))
        left[method] = float((dense(X) - sliced(X)).square().mean())
        assert all(np.isfinite(e) and 0 <= e for e in errors.values())
    assert left["static_least_squares"] < min(left["none"], left["mean"])


def test_moments_are_those_of_the_patches(branches):
    model, X = branches
    names = ["grouped", "head"]
    found = gather_moments(trace(model), names, X.split(7), n_images=60, max_rows=10**6)
    both = torch.cat([model.left(X).relu(), model.right(X).sigmoid()], 1)
    h = model.norm(model.depthwise(model.joined(both).relu())).relu()
    rows = h.movedim(1, -1).flatten(0, 2)
    for block in range(2):
        own = rows[:, 4 * block : 4 * block + 4]
        torch.testing.assert_close(found["grouped"].mean[block], own.mean(0))
        torch.testing.assert_close(found["grouped"].covariance[block], own.T.cov(correction=0))
    out = model.grouped(h).movedim(1, -1).flatten(0, 2)
    variance = out.var(0, correction=0).reshape(2, 4)
    torch.testing.assert_close(found["grouped"].variance, variance)
    assert list(found) == ["grouped", "head"] and found["head"].mean.shape == (1, 32)


# Conduct ------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(self.first(x)).relu()).relu())


def test_layers_without_moments_stay_with_a_warning(monkeypatch):
    torch.manual_seed(0)
    X = torch.randn(20, 4)
    monkeypatch.setattr(moments, "MAX_INPUTS", 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2))
    dense, small, sliced = cut(model, {"0": [0, 1], "2": [0, 2]}, X)
    before = sliced.get_submodule("2").weight
    with pytest.warns(SlicingWarning, match="stay as they were sliced: 2"):
        errors = repair(dense, small, X, RepairSettings("static_least_squares"))
    assert sliced.get_submodule("2").weight is before
    assert list(errors) == ["0", "4"] and errors["4"] > 0
    shared = trace(Twice().eval())
    assert list(gather_moments(shared, ["first", "shared"], [X], n_images=20)) == ["first"]


def test_result_is_trainable_and_shares_nothing_new():
    model = small_cnn().requires_grad_(True)
    X = torch.as_tensor(blobs(per_class=4)[0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dense = trace(model)
    groups = find_groups(dense, X[:1], "15")
    with torch.inference_mode():
        small = slice_channels(dense, X[:1], {"0": [0, 1, 2]}, groups=groups)
        found = gather_moments(dense, ["3"], [X * 1.0], n_images=len(X))
        static_least_squares(dense, small, found)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    small.model(X).sum().backward()
    assert small.model.get_submodule("3").weight.grad is not None


def test_errors_say_what_is_wrong():
    model = two_linear()
    X = torch.randn(20, 5, generator=generator()).double()
    dense, small, sliced = cut(model, {"0": [0, 2]}, X)
    found = every_row(dense, sliced, X)
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        static_least_squares(dense, small, found, alpha=0)
    with pytest.raises(ValueError, match="support of '0' must be 2 channels"):
        static_least_squares(dense, replace(small, support={"0": np.arange(3)}), found)
    with pytest.raises(ValueError, match="different graphs"):
        static_least_squares(trace(model[:2]), small, found)
    X[3] = torch.nan
    broken = every_row(dense, sliced, X)
    with pytest.raises(ValueError, match="not finite"):
        static_least_squares(dense, small, broken)
    with pytest.raises(ValueError, match="training mode"):
        static_least_squares(dense.train(), small, found)
