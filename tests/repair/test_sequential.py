"""Closed-form repair of sliced networks, and the parts it is made of."""

from __future__ import annotations

import copy
import weakref

import numpy as np
import pytest
import torch
from helpers import repaired as repair
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sinfkit.graph import trace
from sinfkit.repair import REPAIRS, Lockstep, affordable_images, fit_ridge
from sinfkit.slicing import find_groups, slice_channels

# The static form has its own tests: it needs to know which inputs were removed.
METHODS = REPAIRS[:-1]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights for every layer and batch-norm, in float64."""
    g = generator(seed)
    model = model.double().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=g)
            if module.bias is not None:
                module.bias.normal_(0, 0.3, generator=g)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            if module.affine:
                module.weight.uniform_(0.5, 1.5, generator=g)
                module.bias.normal_(0, 0.3, generator=g)
            module.running_mean.normal_(0, 0.3, generator=g)
            module.running_var.uniform_(0.5, 1.5, generator=g)
    return model


def images(n: int = 24, channels: int = 3, size: int = 8, seed: int = 1) -> Tensor:
    """Smooth random images, so that neighbouring pixels are related."""
    coarse = torch.randn(n, channels, 4, 4, dtype=torch.float64, generator=generator(seed))
    return F.interpolate(coarse, size=(size, size), mode="bilinear")


def relative_error(dense: Tensor, sliced: Tensor) -> float:
    return float((dense - sliced).square().sum() / (dense - dense.mean(0)).square().sum())


def duplicate_half(conv: nn.Module, norm: nn.Module | None = None) -> None:
    """Make the second half of a layer's channels equal to the first."""
    half = len(conv.weight) // 2
    for module in (conv, norm):
        for tensor in [] if module is None else [*module.parameters(), *module.buffers()]:
            if tensor.ndim:
                tensor[half:] = tensor[:half]


class Affine(nn.Sequential):
    """Two linear layers without a non-linearity: everything can be computed by hand."""

    def __init__(self, first: list[list[float]], second: list[list[float]], bias: float) -> None:
        super().__init__(nn.Linear(len(first[0]), len(first), bias=False), nn.Linear(len(first), 1))
        self.double().eval().requires_grad_(False)
        self[0].weight.copy_(torch.tensor(first))
        self[1].weight.copy_(torch.tensor(second))
        self[1].bias.fill_(bias)


def halves(model: nn.Module, keep: dict[str, list[int]], X: Tensor) -> tuple:
    """The dense network, the sliced one and its support."""
    dense = trace(model)
    sliced = slice_channels(dense, X[:2], keep)
    return dense, sliced.model, sliced.support


# By hand ------------------------------------------------------------------------------------------


HAND = torch.tensor([[0.0, 1.0], [2.0, 5.0], [4.0, 3.0], [6.0, 7.0]], dtype=torch.float64)


def test_mean_by_hand():
    model = Affine([[1, 0], [0, 1]], [[1, 2]], 1.0)
    dense, sliced, support = halves(model, {"0": [0]}, HAND)
    errors = repair(dense, sliced, support, HAND, method="mean")
    assert sliced.get_submodule("1").weight.tolist() == [[1.0]]
    assert sliced.get_submodule("1").bias.item() == pytest.approx(1 + 2 * 4)
    # Y = 3, 13, 11, 21; left of it: 2 (x2 - 4) = -6, 2, -2, 6
    assert errors == {"0": 0.0, "1": pytest.approx(80 / 164)}


def test_match_by_hand():
    model = Affine([[1, 0], [0, 1]], [[1, 2]], 1.0)
    dense, sliced, support = halves(model, {"0": [0]}, HAND)
    repair(dense, sliced, support, HAND, method="match")
    ratio = (164 / 20) ** 0.5
    assert sliced.get_submodule("1").weight.item() == pytest.approx(ratio)
    assert sliced.get_submodule("1").bias.item() == pytest.approx(12 - 3 * ratio)


@pytest.mark.parametrize(("factor", "ratio"), [(100.0, 3.0), (-0.9, 1 / 3)])
def test_match_is_clipped(factor, ratio):
    X = HAND[:, :1]
    model = Affine([[1], [1]], [[1, factor]], 0.0)
    dense, sliced, support = halves(model, {"0": [0]}, X)
    repair(dense, sliced, support, X, method="match")
    assert sliced.get_submodule("1").weight.item() == pytest.approx(ratio)
    torch.testing.assert_close(dense(X).mean(), sliced(X).mean())


def test_match_leaves_constant_channels_alone():
    model = Affine([[0, 0], [0, 1]], [[1, 2]], 1.0)
    dense, sliced, support = halves(model, {"0": [0]}, HAND)
    repair(dense, sliced, support, HAND, method="match")
    assert sliced.get_submodule("1").weight.item() == 1.0
    assert sliced.get_submodule("1").bias.item() == pytest.approx(1 + 2 * 4)


def test_least_squares_by_hand():
    model = Affine([[1, 0], [0, 1]], [[1, 2]], 1.0)
    dense, sliced, support = halves(model, {"0": [0]}, HAND)
    X = HAND.repeat(10, 1)  # so many that the held-out ones are like the others
    repair(dense, sliced, support, X, alphas=[0.5])
    # Centred x1 = -3, -1, 1, 3 and 2 x2 = -6, 2, -2, 6: 32 / (20 + 0.5 * 20)
    assert sliced.get_submodule("1").weight.item() == pytest.approx(1 + 32 / 30)
    assert sliced.get_submodule("1").bias.item() == pytest.approx(12 - 3 * (1 + 32 / 30))


def test_none_only_measures():
    model = Affine([[1, 0], [0, 1]], [[1, 2]], 1.0)
    dense, sliced, support = halves(model, {"0": [0]}, HAND)
    errors = repair(dense, sliced, support, HAND, method="none")
    assert sliced.get_submodule("1").weight.tolist() == [[1.0]]
    assert sliced.get_submodule("1").bias.item() == 1.0
    assert errors["1"] == pytest.approx((4 + 100 + 36 + 196) / 164)


# Against an independent solution ------------------------------------------------------------------


def reference(X, W0, b0, Y, alpha):
    """The ridge solution, with numpy; X (n, p), W0 (o, p), Y (n, o)."""
    X, W0, b0, Y = (np.asarray(a, dtype=np.float64) for a in (X, W0, b0, Y))
    Xc, Yc = X - X.mean(0), Y - Y.mean(0)
    gram = Xc.T @ Xc
    a = alpha * np.trace(gram) / len(gram)
    W = W0 + np.linalg.solve(gram + a * np.eye(len(gram)), Xc.T @ (Yc - Xc @ W0.T)).T
    return W, Y.mean(0) - W @ X.mean(0)


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "padding": {"kernel_size": 3, "padding": (2, 1)},
    "stride": {"kernel_size": (3, 2), "stride": (2, 1), "padding": 1},
    "dilation": {"kernel_size": (2, 3), "dilation": (3, 2), "padding": 2},
    "same": {"kernel_size": (2, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": (3, 1), "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    "pointwise": {"kernel_size": 1, "stride": 2},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "no bias": {"kernel_size": 3, "bias": False},
}


@pytest.mark.parametrize("n", [1, 40])  # fewer rows than unknowns, and more
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_against_numpy(kind, n):
    """The patches, found here by convolving with unit kernels, give the same weights."""
    kwargs = CONVOLUTIONS[kind]
    groups = kwargs.get("groups", 1)
    dense = trace(randomised(nn.Sequential(nn.Conv2d(4, 8, **kwargs)), seed=2))
    sliced = trace(copy.deepcopy(dense))
    X = images(n, 4, 6, seed=3)
    X_sliced = 0.5 * X + 0.1 * images(n, 4, 6, seed=4)
    repair(dense, sliced, {}, X, X_sliced=X_sliced, alphas=[0.3], batch_size=7)

    old, new = dense.get_submodule("0"), sliced.get_submodule("0")
    size = old.weight[0].numel()
    unit = nn.Conv2d(4, groups * size, **{**kwargs, "bias": False}).double()
    unit.weight.data.copy_(
        torch.eye(size).reshape(size, *old.weight.shape[1:]).repeat(groups, 1, 1, 1)
    )
    patches = unit(X_sliced).detach().movedim(1, -1).flatten(0, 2).chunk(groups, dim=1)
    targets = dense(X).movedim(1, -1).flatten(0, 2).chunk(groups, dim=1)
    zeros = torch.zeros(8, dtype=torch.float64)
    for i in range(groups):
        part = slice(i * 8 // groups, (i + 1) * 8 // groups)
        bias = zeros if old.bias is None else old.bias
        W, b = reference(patches[i], old.weight[part].flatten(1), bias[part], targets[i], 0.3)
        np.testing.assert_allclose(new.weight[part].flatten(1).numpy(), W, atol=1e-9)
        np.testing.assert_allclose(new.bias[part].numpy(), b, atol=1e-9)


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4)])
def test_linear_on_vectors_and_tokens_against_numpy(shape):
    dense = trace(randomised(nn.Sequential(nn.Linear(4, 3))))
    sliced = trace(copy.deepcopy(dense))
    X = torch.randn(20, *shape, generator=generator()).double()
    X_sliced = 0.5 * X + 1
    repair(dense, sliced, {}, X, X_sliced=X_sliced, alphas=[0.1])
    old, new = dense.get_submodule("0"), sliced.get_submodule("0")
    W, b = reference(X_sliced.reshape(-1, 4), old.weight, old.bias, dense(X).reshape(-1, 3), 0.1)
    np.testing.assert_allclose(new.weight.numpy(), W, atol=1e-9)
    np.testing.assert_allclose(new.bias.numpy(), b, atol=1e-9)


@pytest.mark.parametrize("n", [15, 200])
def test_ridge_penalty_has_the_smallest_held_out_error(n):
    g = generator()
    X = torch.randn(1, n, 20, generator=g).double() + 5
    Y = X @ torch.randn(1, 20, 3, generator=g).double() + torch.randn(1, n, 3, generator=g) * 2
    weight = torch.tensor([[1.0, 4.0, 0.0]])
    alphas, n_train = [1e-4, 1e-2, 1.0, 10.0], n * 4 // 5
    fit = fit_ridge(X.clone(), Y, n_train, alphas, weight)
    errors = {}
    for alpha in alphas:
        W, b = reference(X[0, :n_train], np.zeros((3, 20)), 0, Y[0, :n_train], alpha)
        residual = Y[0, n_train:].numpy() - X[0, n_train:].numpy() @ W.T - b
        errors[alpha] = float((residual**2).sum(0) @ weight[0].numpy())
    assert fit.alpha == min(errors, key=errors.get)
    assert fit.error == pytest.approx(errors[fit.alpha])
    W, b = reference(X[0], np.zeros((3, 20)), 0, Y[0], fit.alpha)  # refitted to all rows
    np.testing.assert_allclose(fit.coef[0].T.numpy(), W, atol=1e-9)
    np.testing.assert_allclose(fit.intercept[0].numpy(), b, atol=1e-9)


def test_ridge_blocks_and_precision():
    """More rows and columns than in one block, in float32, far from the origin."""
    g = generator()
    X = torch.randn(1, 5000, 900, generator=g) + 20
    Y = X[..., :2] + torch.randn(1, 5000, 2, generator=g)
    fit = fit_ridge(X.clone(), Y, 4000, [1e-2], torch.ones(1, 2))
    W, _ = reference(X[0], np.zeros((2, 900)), 0, Y[0], 1e-2)
    np.testing.assert_allclose(fit.coef[0].T.numpy(), W, atol=2e-5)


@pytest.mark.parametrize("n", [8, 100])
def test_ridge_prefers_nothing_to_noise(n):
    g = generator()
    X, Y = torch.randn(1, n, 30, generator=g), torch.randn(1, n, 4, generator=g)
    fit = fit_ridge(X, Y, n // 2, [1e-4], torch.ones(1, 4))
    assert fit.alpha == float("inf")
    assert not fit.coef.any()
    torch.testing.assert_close(fit.intercept[0], Y[0].mean(0).double())


@pytest.mark.parametrize("n", [8, 100])
def test_ridge_on_constant_inputs(n):
    g = generator()
    X = torch.full((2, n, 10), 0.1) * torch.tensor([0.0, 7.0])[:, None, None]
    Y = torch.randn(2, n, 1, generator=g)
    fit = fit_ridge(X, Y, n // 2, [1e-6], torch.ones(2, 1))
    assert fit.coef.abs().max() < 1e-2


# Redundant filters --------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """A residual block whose shortcut, like torchvision's, is executed after the main branch."""

    def __init__(self, n_in: int, width: int, n_out: int, downsample: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
        self.shortcut = nn.Identity()
        if downsample:
            self.shortcut = nn.Sequential(
                nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out = out + self.shortcut(x)
        return F.relu(out)


class DenseBlock(nn.Module):
    """Batch-norm before convolution, and concatenation, as in DenseNet."""

    def __init__(self, n_in: int, width: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(n_in), nn.Conv2d(n_in, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(new)))], 1)


class Functional(nn.Module):
    """Functional pooling and flattening by a shape, and logits that are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 16, 5)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv(x).relu(), 2)
        return self.fc(x.view(x.size(0), -1)) / self.temperature


def redundant(kind: str) -> tuple[nn.Module, dict[str, list[int]]]:
    """A network in which half of some layers' channels are copies, and what to keep of them."""
    conv, norm, relu = nn.Conv2d, nn.BatchNorm2d, nn.ReLU
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if kind == "plain":
        model = nn.Sequential(
            conv(3, 8, 3, padding=1, bias=False), norm(8), relu(),
            conv(8, 12, 3, stride=2), norm(12), relu(), *head, nn.Linear(12, 5),
        )  # fmt: skip
        copies = [("0", "1"), ("3", "4")]
    elif kind == "flatten":
        model = nn.Sequential(conv(3, 8, 3), relu(), nn.Flatten(), nn.Dropout(), nn.Linear(288, 5))
        copies = [("0", None)]
    elif kind == "mlp":
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 5)
        )
        copies = [("1", "2")]
    elif kind == "depthwise":
        model = nn.Sequential(
            conv(3, 8, 1), relu(), conv(8, 8, 3, groups=8, bias=False), norm(8), relu(),
            conv(8, 6, 1), norm(6), *head, nn.Linear(6, 5),
        )  # fmt: skip
        copies = [("0", None), ("2", "3")]
    elif kind == "bottleneck":
        model = nn.Sequential(
            conv(3, 6, 3, bias=False), norm(6), relu(),
            Bottleneck(6, 8, 10, downsample=True), Bottleneck(10, 8, 10, downsample=False),
            *head, nn.Linear(10, 5),
        )  # fmt: skip
        copies = [(f"{i}.conv{j}", f"{i}.bn{j}") for i in (3, 4) for j in (1, 2)]
    elif kind == "densenet":
        model = nn.Sequential(
            conv(3, 6, 3), DenseBlock(6, 8, 4), DenseBlock(10, 8, 4), norm(14), relu(),
            *head, nn.Linear(14, 5),
        )  # fmt: skip
        copies = [("1.conv1", "1.norm2"), ("2.conv1", "2.norm2")]
    else:
        model, copies = Functional(), [("conv", None)]
    randomised(model, seed=5)
    keep = {}
    for layer, follower in copies:
        module = model.get_submodule(layer)
        duplicate_half(module, model.get_submodule(follower) if follower else None)
        keep[layer] = list(range(len(module.weight) // 2))
    if kind == "depthwise":
        del keep["2"]
    return model, keep


KINDS = ["plain", "flatten", "mlp", "depthwise", "bottleneck", "densenet", "functional"]


@pytest.mark.parametrize("kind", KINDS)
def test_redundant_filters_are_repaired_exactly(kind):
    model, keep = redundant(kind)
    X, fresh = images(400 if kind in ("flatten", "functional") else 40), images(10, seed=2)
    results = {}
    dense, unrepaired, support = halves(model, keep, X)
    for method in METHODS:
        sliced = copy.deepcopy(unrepaired)
        errors = repair(dense, sliced, support, X, method=method, alphas=[1e-9], max_rows=2000)
        results[method] = relative_error(dense(fresh), sliced(fresh))
        assert all(np.isfinite(e) and e >= 0 for e in errors.values())
        assert list(errors) == [str(n.target) for n in sliced.graph.nodes if n.target in errors]
    assert results["none"] > 0.05
    assert results["least_squares"] < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_changes_nothing(kind, method):
    model, _ = redundant(kind)
    X = images()
    for X_sliced in (None, X.clone()):  # taken to be equal, and found to be equal
        dense = trace(model)
        sliced = trace(copy.deepcopy(model))
        errors = repair(dense, sliced, {}, X, method=method, X_sliced=X_sliced)
        torch.testing.assert_close(sliced(X), dense(X), rtol=1e-9, atol=1e-9)
        assert max(errors.values()) < 1e-12


def correlated(seed: int) -> nn.Module:
    """A network whose filters are mixtures of fewer."""
    widths = [3, 16, 16, 16]
    blocks = []
    for n_in, n_out in zip(widths, widths[1:], strict=False):
        blocks += [
            nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
        ]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5))
    randomised(model, seed)
    for module in model[:-1]:
        if isinstance(module, nn.Conv2d):
            base = module.weight[:5].clone()
            mixing = torch.randn(len(module.weight), 5, generator=generator(seed)).double()
            module.weight.copy_(torch.einsum("ab,bchw->achw", mixing, base) / 5**0.5)
    return model


@pytest.mark.parametrize("seed", range(3))
def test_every_repair_helps_correlated_filters(seed):
    model = correlated(seed)
    X, fresh = images(60), images(60, seed=9)
    keep = {
        name: sorted(np.random.default_rng(seed).permutation(16)[:9]) for name in ("0", "3", "6")
    }
    left = {}
    dense, unrepaired, support = halves(model, keep, X)
    for method in METHODS:
        sliced = copy.deepcopy(unrepaired)
        repair(dense, sliced, support, X, method=method)
        left[method] = relative_error(dense(fresh), sliced(fresh))
    assert left["least_squares"] < 0.6 * min(left["none"], left["mean"], left["match"])
    assert left["mean"] < left["none"]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 30),
    alpha=st.sampled_from([1e-6, 1e-2, 1.0, 100.0]),
)
def test_least_squares_never_raises_the_error_of_a_layer(seed, n, alpha):
    """Over all calibration rows, compared with the best shift alone."""
    model = randomised(nn.Sequential(nn.Conv2d(2, 3, 2)), seed)
    X, X_sliced = images(n, 2, 6, seed=seed), images(n, 2, 6, seed=seed + 1)
    dense = trace(model)
    after = {}
    for method in ("none", "mean", "least_squares"):
        sliced = trace(model)
        repair(dense, sliced, {}, X, X_sliced=X_sliced, method=method, alphas=[alpha])
        after[method] = float((dense(X) - sliced(X_sliced)).square().sum())
    assert after["mean"] <= after["none"] * (1 + 1e-9)
    assert after["least_squares"] <= after["mean"] * (1 + 1e-9)


# What a layer's output runs into ------------------------------------------------------------------


class Residual(nn.Module):
    """``x + norm(layer(x))``; the shortcut may have a layer, executed last."""

    def __init__(self, layer: nn.Module, norm: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.shortcut = layer, norm, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.norm(self.layer(x)), self.shortcut(x))


@pytest.mark.parametrize(
    "norm", [nn.Identity(), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)]
)
def test_residual_branch_makes_up_for_the_shortcut(norm):
    """From half the input, ``x / 2 + norm(W' x / 2)`` must be ``x + norm(W x)``."""
    dense = trace(randomised(Residual(nn.Linear(4, 4), norm, nn.Identity())))
    sliced = trace(copy.deepcopy(dense))
    X = torch.randn(50, 4, generator=generator()).double()
    errors = repair(dense, sliced, {}, X, X_sliced=X / 2, alphas=[1e-10])
    gain = torch.ones(4, dtype=torch.float64)
    if isinstance(norm, nn.BatchNorm1d):
        norm = dense.get_submodule("norm")
        gain = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    wanted = 2 * dense.get_submodule("layer").weight + torch.diag(1 / gain)
    torch.testing.assert_close(sliced.get_submodule("layer").weight.data, wanted)
    assert errors["layer"] < 1e-9
    torch.testing.assert_close(sliced(X / 2), dense(X))


def test_branch_executed_last_makes_up_for_the_other():
    """A linear shortcut can express what a linear main branch lost."""
    main = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    model = randomised(Residual(main, nn.BatchNorm1d(4), nn.Linear(4, 4)))
    X = torch.randn(60, 4, generator=generator()).double()
    dense, sliced, support = halves(model, {"layer.0": [1]}, X)
    # The shortcut's own input is intact: only its target tells that something is wrong.
    errors = repair(dense, sliced, support, X, alphas=[1e-10])
    assert errors["layer.1"] > 0.05
    assert errors["shortcut"] < 1e-9
    torch.testing.assert_close(sliced(X), dense(X))


@pytest.mark.parametrize("method", ["mean", "match", "least_squares"])
def test_means_agree_after_an_addition_even_where_a_norm_has_no_gain(method):
    model = randomised(Residual(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Identity()))
    model.norm.weight[:2] = torch.tensor([0.0, 1e-9])
    dense, sliced = trace(model), trace(copy.deepcopy(model))
    X = images()
    repair(dense, sliced, {}, X, X_sliced=0.7 * X + 1, method=method)
    axes = (0, 2, 3)
    torch.testing.assert_close(sliced(0.7 * X + 1).mean(axes), dense(X).mean(axes))
    assert sliced.get_submodule("layer").weight.abs().max() < 100
    assert model.norm.bias.equal(dense.get_submodule("norm").bias)


def test_bias_goes_where_there_is_one():
    conv, norm = nn.Conv2d, nn.BatchNorm2d
    model = nn.Sequential(
        conv(3, 6, 3), nn.ReLU(),
        conv(6, 6, 1), norm(6),  # into the bias
        conv(6, 6, 1, bias=False), norm(6), nn.ReLU(),  # into the running mean
        conv(6, 6, 1, bias=False), nn.ReLU(), norm(6),  # into a new bias
        conv(6, 6, 1, bias=False), norm(6, track_running_stats=False),  # nowhere: a new one
    )  # fmt: skip
    dense, sliced, support = halves(
        randomised_without_statistics(model), {"0": [0, 2, 4]}, images()
    )
    for method in ("mean", "match", "least_squares"):
        fixed = copy.deepcopy(sliced)
        repair(dense, fixed, support, images(), method=method)
        old, new = (dict(gm.named_modules()) for gm in (dense, fixed))
        assert not new["2"].bias.equal(old["2"].bias)
        assert new["3"].running_mean.equal(old["3"].running_mean)
        assert new["4"].bias is None
        assert not new["5"].running_mean.equal(old["5"].running_mean)
        assert new["7"].bias is not None
        assert new["9"].running_mean.equal(old["9"].running_mean)
        assert new["10"].bias is not None


def randomised_without_statistics(model: nn.Module) -> nn.Module:
    last = model[-1]
    model[-1] = nn.Identity()
    randomised(model)
    model[-1] = last.double().eval().requires_grad_(False)
    return model


def test_output_rows_in_any_order():
    model, keep = redundant("plain")
    X = images()
    last = str(len(model) - 1)
    dense, sliced, support = halves(model, {**keep, last: [3, 0]}, X)
    assert support[last].tolist() == [3, 0]
    repair(dense, sliced, support, X, alphas=[1e-9])
    torch.testing.assert_close(sliced(X), dense(X)[:, [3, 0]], rtol=1e-4, atol=1e-4)


def test_grouped_convolution():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=2, bias=False),
        nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(12 * 36, 5),
    )  # fmt: skip
    randomised(model)
    for start in (0, 4):  # copies within each group of the grouped convolution's inputs
        for tensor in (model[0].weight, model[0].bias):
            tensor[start + 2 : start + 4] = tensor[start : start + 2]
    X = images(60)
    dense, sliced, support = halves(model, {"0": [0, 1, 4, 5]}, X)
    assert relative_error(dense(X), sliced(X)) > 0.1
    repair(dense, sliced, support, X, alphas=[1e-9])
    assert relative_error(dense(X), sliced(X)) < 1e-9


def test_dead_channels_keep_their_weights():
    model = randomised(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    model[0].bias[1] = -1e3
    X = images()
    dense, sliced, support = halves(model, {"0": [0, 1, 2]}, X)
    old = sliced.get_submodule("2").weight[:, 1].clone()
    repair(dense, sliced, support, X)
    new = sliced.get_submodule("2").weight
    torch.testing.assert_close(new[:, 1], old)
    assert torch.isfinite(new).all()
    assert not torch.allclose(new[:, 0], old)


def test_all_inputs_dead():
    model = randomised(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    model[0].bias[:2] = -1e3
    X = torch.randn(20, 4, generator=generator()).double()
    dense, unrepaired, support = halves(model, {"0": [0, 1]}, X)
    for method in METHODS[1:]:
        sliced = copy.deepcopy(unrepaired)
        repair(dense, sliced, support, X, method=method)
        torch.testing.assert_close(sliced(X).mean(0), dense(X).mean(0))


# Conduct ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_shared_tensors_are_not_written_to(method):
    model, keep = redundant("bottleneck")
    X = images()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dense, sliced, support = halves(model, keep, X)
    repair(dense, sliced, support, X, method=method)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert sliced.get_submodule("1").weight is model[1].weight  # nothing to repair there
    assert all(not p.requires_grad for p in sliced.parameters())


def test_result_does_not_depend_on_batches_and_global_state():
    model, keep = redundant("bottleneck")
    X = images(23)
    outputs = []
    dense, unrepaired, support = halves(model, keep, X)
    for batch_size, seed in ((256, 0), (5, 0), (256, 1)):
        sliced = copy.deepcopy(unrepaired)
        state = torch.random.get_rng_state()
        repair(dense, sliced, support, X, batch_size=batch_size, seed=seed, max_rows=200)
        assert torch.equal(state, torch.random.get_rng_state())
        outputs.append(sliced(X))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(outputs[0], outputs[2], rtol=1e-4, atol=1e-4)


def test_float32_is_near_float64():
    model, keep = redundant("bottleneck")
    X = images(60)
    outputs = []
    for dtype in (torch.float64, torch.float32):
        dense, sliced, support = halves(copy.deepcopy(model).to(dtype), keep, X.to(dtype))
        repair(dense, sliced, support, X.to(dtype))
        assert all(p.dtype == dtype for p in sliced.parameters())
        outputs.append(sliced(X.to(dtype)).double())
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


def test_inference_tensors_and_gradients():
    """Calibration activations often come from inference mode; the result can still be trained."""
    model, keep = redundant("plain")
    model.requires_grad_(True)
    dense, sliced, support = halves(model, keep, images())
    with torch.inference_mode():
        X = images() * 1.0
        repair(dense, sliced, support, X)
    sliced(images()).sum().backward()
    assert sliced.get_submodule("3").weight.grad is not None


def test_one_image():
    model, keep = redundant("plain")
    X = images(1)
    dense, sliced, support = halves(model, keep, X)
    errors = repair(dense, sliced, support, X)
    assert all(np.isfinite(e) for e in errors.values())
    assert torch.isfinite(sliced(X)).all()


def test_more_rows_do_better_than_few():
    """Also that rows are drawn from all over the image, and inputs and targets at one place."""
    model = correlated(0)
    X, fresh = images(30), images(60, seed=9)
    left = []
    dense, unrepaired, support = halves(model, {"0": list(range(9)), "3": list(range(9))}, X)
    for max_rows in (30, 600):
        sliced = copy.deepcopy(unrepaired)
        repair(dense, sliced, support, X, max_rows=max_rows)
        left.append(relative_error(dense(fresh), sliced(fresh)))
    assert left[1] < 0.8 * left[0]


class Watched(nn.Module):
    """Copies its input, and counts how many of its copies are alive."""

    alive: list[weakref.ref] = []
    most = 0

    def forward(self, x: Tensor) -> Tensor:
        out = x.clone()
        Watched.alive = [ref for ref in Watched.alive if ref() is not None] + [weakref.ref(out)]
        Watched.most = max(Watched.most, len(Watched.alive))
        return out


class WatchedTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, Watched) or super().is_leaf_module(m, name)


def test_values_are_dropped_after_their_last_use():
    blocks = [[nn.Conv2d(3, 3, 1), Watched()] for _ in range(6)]
    model = randomised(nn.Sequential(*sum(blocks, [])))
    dense, sliced = (
        fx.GraphModule(m, WatchedTracer().trace(m)).eval() for m in (model, copy.deepcopy(model))
    )
    Watched.alive, Watched.most = [], 0
    X = images(40)
    repair(dense, sliced, {}, X, X_sliced=X + 1, batch_size=4)  # 10 chunks
    assert Watched.most <= 2 * 10 + 2
    assert not [ref for ref in Watched.alive if ref() is not None]


def test_equal_parts_are_computed_once():
    calls = []
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)))
    X = images()
    dense, sliced, support = halves(model, {"1": [0, 1]}, X)
    for side, gm in (("dense", dense), ("sliced", sliced)):
        for name in "012":
            gm.get_submodule(name).register_forward_hook(
                # One image is run through both, to see how large the values are.
                lambda *values, key=side + name: calls.append((key, len(values[2])))
            )
    repair(dense, sliced, support, X)
    once = [key for key, n_images in sorted(calls) if n_images == len(X)]
    assert once == ["dense1", "dense2", "sliced0", "sliced1", "sliced2"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(F.relu(self.shared(F.relu(self.first(x))))))


def test_layers_used_twice_stay_with_a_warning():
    model = randomised(Twice())
    X = torch.randn(30, 4, generator=generator()).double()
    dense, sliced = trace(model), trace(copy.deepcopy(model))
    with pytest.warns(UserWarning, match="more than once.*: shared"):
        errors = repair(dense, sliced, {}, X, X_sliced=X + 1)
    assert sorted(errors) == ["first", "last"]
    assert sliced.get_submodule("shared").weight.equal(model.shared.weight)


def call(**changes):
    model, keep = redundant("plain")
    X = images()
    dense, sliced, support = halves(model, keep, X)
    arguments = {"dense": dense, "sliced": sliced, "support": support, "X": X, **changes}
    return repair(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "none, mean, match, least_squares.*'magic'"),
        ({"alphas": []}, "alphas must be positive"),
        ({"alphas": [0.1, 0.0]}, "alphas must be positive"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_rows": 0}, "max_rows"),
        ({"X": images()[:0]}, "at least one"),
        ({"X_sliced": images(3)}, "got 24 and 3"),
        ({"X": images() * float("nan")}, "'3' are not finite"),
        ({"X": images() * float("nan"), "method": "mean"}, "'3' are not finite"),
        ({"support": {"0": np.arange(3)}}, "support of '0' must be 4 channels below 8"),
        ({"support": {"0": np.arange(4) + 5}}, "support of '0' must be 4 channels below 8"),
        ({"support": {}}, "support of '0' must be 4 channels below 8"),
        ({"dense": trace(Functional().eval())}, "different graphs"),
    ],
)
def test_errors_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_training_mode_is_refused():
    model, _ = redundant("plain")
    with pytest.raises(ValueError, match="'1'.*training mode"):
        dense = trace(model)
        dense.get_submodule("1").train()
        call(dense=dense)


def test_one_module_in_both_networks_is_refused():
    dense = trace(randomised(nn.Sequential(nn.Linear(4, 2))))
    X = torch.randn(9, 4, generator=generator()).double()
    with pytest.raises(ValueError, match="one module in both"):
        repair(dense, dense, {}, X, X_sliced=X + 1)


def test_lockstep_gives_both_networks_outputs():
    model, keep = redundant("densenet")
    X = images()
    dense, sliced, _ = halves(model, keep, X)
    walk = Lockstep(dense, sliced, X, X, batch_size=10)
    for node in walk.nodes:
        walk.run(node)
    for side, gm in (("dense", dense), ("sliced", sliced)):
        out = torch.cat([walk.value(walk.nodes[-1], side, i) for i in range(3)])
        torch.testing.assert_close(out, gm(X))


@pytest.mark.parametrize("kind", ["plain", "residual", "densenet", "bottleneck"])
def test_images_that_join_later_have_the_same_values(kind):
    model, keep = redundant(kind)
    X = images()
    dense, sliced, _ = halves(model, keep, X)
    whole = Lockstep(dense, sliced, X, X, batch_size=10)
    for late in range(0, len(whole.nodes), 3):
        walk = Lockstep(dense, sliced, X, X, batch_size=10, n_images=7)
        for i, node in enumerate(walk.nodes):
            if i == late:
                walk.join(len(X))
            walk.run(node)
        assert walk.n_images == len(X)
        for side, gm in (("dense", dense), ("sliced", sliced)):
            out = torch.cat([walk.value(node, side, i) for i in range(len(walk.images))])
            torch.testing.assert_close(out, gm(X))


def test_early_layers_see_as_many_images_as_memory_holds():
    """Maps shrink, so that ever more images take part; the result is nearly that of all of them."""
    model = randomised(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
            *(nn.Flatten(), nn.Linear(8, 5)),
        )
    )
    X = images(300, 3, 16)
    calls: list[tuple[str, int]] = []
    left = {}
    for n_bytes in (2**40, 3_000_000):
        dense, sliced, support = halves(model, {"0": [0, 2, 3, 5, 6, 7], "2": [0, 1, 2, 4, 6]}, X)
        for name in ("2", "4", "6"):
            dense.get_submodule(name).register_forward_hook(
                lambda *values, name=name: calls.append((name, len(values[2])))
            )
        calls.clear()
        repair(dense, sliced, support, X, max_bytes=n_bytes, batch_size=50)
        fewer = n_bytes < 2**40
        del calls[:3]  # one image, to see how large the values are
        passed = [name for name, _ in calls].index("4")
        early = sum(n for name, n in calls[:passed] if name == "2")
        assert 16 <= early < len(X) if fewer else early == len(X)
        assert sum(n for name, n in calls if name == "6") == len(X)
        left[fewer] = relative_error(dense(X), sliced(X))
    assert left[True] < 1.2 * left[False]


def test_groups_of_a_real_search():
    """Everything that can be sliced is, as the estimators do it."""
    model, _ = redundant("bottleneck")
    X = images(60)
    dense = trace(model)
    groups = find_groups(dense, X[:1], str(len(model) - 1))
    keep = {
        g.name: np.arange(g.n_channels * 2 // 3)
        for g in groups
        if not g.reason_unsliceable and not g.is_output
    }
    left = {}
    for method in ("none", "least_squares"):
        sliced = slice_channels(dense, X[:1], keep, groups=groups)
        repair(dense, sliced.model, sliced.support, X, method=method)
        left[method] = relative_error(dense(X), sliced.model(X))
    assert left["least_squares"] < 0.3 * left["none"]


def test_images_are_limited_by_the_largest_value():
    dense = trace(randomised(nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Flatten())))
    example = images(1, 3, 8)
    size = 10 * 36 * 8  # bytes of the convolution's output
    for n_bytes, expected in ((100 * size, 100), (100 * size - 1, 99), (size, 64), (10**12, 500)):
        assert affordable_images(dense, example, 500, n_bytes) == expected
    assert affordable_images(dense, example, 5) == 5
