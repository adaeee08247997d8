"""Channels beyond plain layers: attention, splits, per-channel parameters, norms over channels."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sinfkit import DCSPruner, PruningOptions, load, save
from sinfkit.graph import check_traced, count_macs, count_parameters, output_layer, trace
from sinfkit.slicing import check_sliced, find_groups, slice_channels

WIDTH, TOKENS = 16, 9
ATTENTION = ["fused", "apart", "einsum", "products", "torch", "tokens first", "encoder"]
ATTENTION += ["by head", "cosine", "rotated", "of channels", "features"]


class Attention(nn.Module):
    """Self-attention, written in one of several ways."""

    def __init__(self, way: str, heads: int = 2) -> None:
        super().__init__()
        self.way, self.heads = way, heads
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(heads, TOKENS, TOKENS))
        self.scale = (WIDTH // heads) ** -0.5
        self.torchs = nn.MultiheadAttention(WIDTH, heads, batch_first=way != "tokens first")
        self.layer = nn.TransformerEncoderLayer(WIDTH, heads, 24, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "torch":
            return self.torchs(x, x, x, need_weights=False)[0]
        if self.way == "tokens first":
            y = x.transpose(0, 1)
            y, weights = self.torchs(y, y, y)
            return y.transpose(0, 1) * weights.sum(-1, keepdim=True)
        if self.way == "encoder":
            return self.layer(x)
        n, tokens, width = x.shape
        shape = n, tokens, self.heads, width // self.heads
        if self.way in ("rotated", "of channels", "features"):
            q, k, v = self.qkv(x).view(n, tokens, 3, *shape[2:]).permute(2, 0, 3, 1, 4).unbind(0)
            if self.way == "of channels":
                y = ((q.mT @ k).softmax(-1) @ v.mT).mT
            elif self.way == "features":
                y = q.softmax(-1) @ (k.softmax(-2).mT @ v)
            else:
                y = (rotated(q) * self.scale @ rotated(k).mT).softmax(-1) @ v
            return self.proj(y.transpose(1, 2).reshape(n, tokens, width))
        if self.way in ("by head", "cosine"):
            parts = self.qkv(x).view(n, tokens, self.heads, -1).transpose(1, 2)
            q, k, v = parts.chunk(3, -1)
            if self.way == "cosine":
                q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            y = (q * width**-0.5 @ k.mT).softmax(-1) @ v
            return self.proj(y.transpose(1, 2).reshape(n, tokens, width))
        if self.way in ("fused", "chunked"):
            if self.way == "fused":
                parts = self.qkv(x).reshape(n, tokens, 3, *shape[2:]).permute(2, 0, 3, 1, 4)
                q, k, v = parts.unbind(0)
            else:
                q, k, v = (p.view(*shape).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        else:
            q, k, v = (f(x).view(*shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.way in ("fused", "apart"):
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.way == "einsum":
            weights = torch.einsum("bhid,bhjd->bhij", q * self.scale, k).softmax(-1)
            y = torch.einsum("bhij,bhjd->bhid", weights, v)
        else:
            y = ((q * self.scale @ k.transpose(-2, -1)) + self.bias).softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, tokens, width))


def rotated(x: Tensor) -> Tensor:
    """Channels turned by an angle that grows with the token, as rotary embeddings are."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(x.shape[-2]), 0.5 ** torch.arange(half)).repeat(1, 2)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angle.cos() + turned * angle.sin()


class Transformer(nn.Module):
    """Two blocks with layer scale, a class token and positions."""

    def __init__(self, way: str, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, 2)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(3))
        self.attention = Attention(way)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.gamma = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x) if x.is_quantized else x.shape[0], -1, -1), x], 1)
        x = x[:, :TOKENS] + self.pos
        x = x + self.gamma * self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x)[:, 0])


class Channels(nn.Module):
    """Convolutions, with something between two of them that is no plain layer."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.narrow = nn.Conv2d(4, 4, 3, padding=1)
        self.wider = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.after = nn.Conv2d(16, 8, 1)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.group_norm, self.layer_norm = nn.GroupNorm(2, 8), nn.LayerNorm(8)
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.row = nn.Conv1d(1, 1, 3, padding=1)
        self.last, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        way = self.way
        if way == "chunk":
            one, other = h.chunk(2, 1)
            h = torch.cat([self.narrow(one), other], 1)
        elif way == "split":
            one, other = torch.split(h, [4, 4], dim=1)
            h = torch.cat([one, self.narrow(other + one)], 1)
        elif way == "slices":
            h = torch.cat([h[:, :4] * 2, self.narrow(h[:, 4:])], dim=1)
        elif way == "scale":
            h = h + self.gamma * self.b(h)
        elif way == "double":
            h = self.after(self.wider(h).relu())
        elif way == "group_norm":
            h = self.b(self.group_norm(h)).relu()
        elif way == "layer_norm":
            h = self.layer_norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        elif way == "shuffle":
            n, c, height, width = h.shape
            h = h.view(n, 2, c // 2, height, width).transpose(1, 2).reshape(n, c, height, width)
        elif way == "response":
            size = h.norm(p=2, dim=(2, 3), keepdim=True)
            h = h + self.gamma * h * (size / (size.mean(dim=1, keepdim=True) + 1e-6))
        elif way == "written":
            bias = self.b.bias.clone()
            bias[2:4].zero_()
            h = F.conv2d(h, self.b.weight, bias, padding=1)
        elif way == "pads":
            h = self.after(F.pad(F.pad(h, (1, 0, 2, 1)), (0, 0, 0, 0, 3, 5)))
        elif way == "gates in part":
            h = torch.cat([h[:, :6] * h[:, 6:7], self.reduce(h)[:, :2]], 1) * h[:, 7:].sigmoid()
        elif way == "in a row":
            h = h * self.row(h.mean((2, 3))[:, None]).sigmoid().transpose(1, 2)[..., None]
        elif way == "split positions":
            h = torch.cat(h.split([3, 5], 2)[::-1], 2)
        elif way == "with the batch":
            n, c, height, width = h.shape
            h = h.reshape(n * c * height, 2, width // 2).transpose(1, 2).reshape(n, c, height, -1)
        elif way == "notes":
            self.smaller = min(min(h.shape[2:]), 6)
            h = self.b(h[:, :, : self.smaller])
        elif way == "half by size":
            h = torch.cat([h[:, h.shape[1] // 2 :, ...], h[..., : h.shape[1] // 2, :, :]], 1)
        elif way == "gate":
            h = h * self.expand(self.reduce(h.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(self.last(h).mean((2, 3)))


WAYS = "chunk split slices scale double group_norm layer_norm shuffle gate pads".split()
WAYS += ["gates in part", "response", "written"]
WAYS += ["split positions", "with the batch", "notes", "half by size", "in a row"]


def halves(network: nn.Module, x: Tensor, seed: int, share: float = 0.5) -> tuple[float, list[str]]:
    """Slice every group and compare; the share of multiplications removed, what stayed whole."""
    network = network.eval()
    graph = trace(network, x[:1])
    check_traced(graph, network, x)
    groups = find_groups(graph, x[:1], output_layer(graph, 5))
    rng = np.random.default_rng(seed)
    keep = {}
    for group in groups:
        run = group.n_channels // group.n_runs
        if not group.reason_unsliceable and not group.is_output:
            local = np.sort(rng.permutation(run)[: max(1, round(share * run))])
            kept = (np.arange(group.n_runs)[:, None] * run + local).ravel()
            keep[group.name] = group.with_every_part(kept)
    sliced = slice_channels(graph, x[:1], keep, groups=groups)
    assert check_sliced(graph, sliced, x) <= 1e-4
    removed = 1 - count_macs(sliced.model, x[:1])[0] / count_macs(graph, x[:1])[0]
    return removed, [group.name for group in groups if group.reason_unsliceable]


def images(size: int, seed: int = 0) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(ATTENTION), st.sampled_from([nn.LayerNorm, nn.RMSNorm]), st.integers(0, 99))
def test_attention_is_sliced_with_its_stream(way: str, norm: type[nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    removed, whole = halves(Transformer(way, norm), images(6), seed)
    assert not whole and removed > 0.6


class Axes(nn.Module):
    """Convolutions over 1, 2 or 3 axes of positions."""

    def __init__(self, n_axes: int, way: str) -> None:
        super().__init__()
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n_axes - 1]
        norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n_axes - 1]
        options = {"depthwise": {"groups": 8}, "groups": {"groups": 2}, "dilated": {"dilation": 2}}
        self.a, self.norm = kind(3, 8, 3, padding=1, bias=False), norm(8)
        self.b = kind(8, 8, 3, padding="same", **options.get(way, {}))
        self.c = kind(8, 12, 3, stride=2, padding=1, padding_mode="circular")
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x)).relu()
        return self.head(self.c(h + self.b(h)).relu().flatten(2).mean(2))


@settings(max_examples=3, deadline=None)
@given(st.sampled_from([1, 3]), st.sampled_from(["plain", "depthwise", "groups", "dilated"]))
def test_convolutions_over_any_axes_are_pruned_and_repaired(n_axes: int, way: str) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    patterns = rng.normal(size=(3, 3, *[6] * n_axes))
    noise = rng.normal(size=(60, *patterns.shape[1:]))
    X = (patterns[np.arange(60) % 3] + 0.3 * noise).astype(np.float32)
    network = Axes(n_axes, way).eval().requires_grad_(False)
    given, errors = torch.as_tensor(X), {}
    network.head.bias -= network(given).mean(0)  # or one class would be all answers
    dense = network(given)
    for repair in ("none", "least_squares"):
        pruner = DCSPruner(
            network, criterion="dcs_obs", schedule="uniform", pruning_ratios=(0, 0.5), repair=repair
        ).fit(X, dense.argmax(1).numpy())
        assert pruner.sliceable_share_ > 0.99 and pruner.cost_ratio_ < 0.7
        errors[repair] = float((pruner.model_(given) - dense).square().mean())
    stored_again(pruner, lambda: Axes(n_axes, way), X)
    assert errors["least_squares"] < 0.7 * errors["none"]


@settings(max_examples=18, deadline=None)
@given(st.sampled_from(WAYS), st.integers(0, 100), st.sampled_from([0.1, 0.5, 0.75]))
def test_what_is_no_plain_layer_is_sliced_along(way: str, seed: int, share: float) -> None:
    torch.manual_seed(seed)
    removed, whole = halves(Channels(way), images(8), seed, share)
    assert removed > (0.4 if share < 0.5 else 0.1)
    assert not whole


@pytest.mark.parametrize("way", ["fft", "cumsum", "sort", "unfold"])
def test_what_is_not_known_costs_its_group_only(way: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(n, 8, 3) for n in (3, 8, 8))
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.b(self.a(x).relu()).relu()
            if way == "fft":
                h = torch.fft.fft(h, dim=1).real
            elif way == "cumsum":
                h = torch.cumsum(h, 1)
            elif way == "sort":
                h = h.sort(1).values
            else:
                h = F.fold(F.unfold(h, 1), h.shape[-2:], 1)
            return self.head(self.c(h).mean((2, 3)))

    _, whole = halves(Odd(), images(10), 0)
    assert whole == ["b"]


class Directions(nn.Module):
    """Answers by the direction of features that a normalisation gives."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 3)
        self.last, self.head = nn.BatchNorm2d(8), nn.Parameter(torch.randn(5, 8))
        for one in (self.last, norm):
            if isinstance(one, nn.BatchNorm2d):
                nn.init.normal_(one.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.last(self.b(self.norm(self.a(x)).relu())).mean((2, 3))
        return F.linear(F.normalize(h), F.normalize(self.head))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.LayerNorm([6, 6]), nn.LayerNorm(6)])
def test_lengths_are_taken_behind_norms_that_leave_channels_alone(norm: nn.Module) -> None:
    torch.manual_seed(0)
    removed, whole = halves(Directions(norm), images(8), 0)
    assert not whole and removed > 0.5


def test_what_looks_across_channels_is_named() -> None:
    graph = trace(Directions(nn.LayerNorm([8, 6, 6])).eval(), images(8)[:1])
    reasons = {g.name: g.reason_unsliceable for g in find_groups(graph, images(8), "linear")}
    assert reasons["a"] == "its channels run through the LayerNorm 'norm', which is not sliced"


class Gram(nn.Module):
    """Features of one layer times those of another, and so more cost where there are more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, n, 3) for n in (16, 16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (layer(x).relu().flatten(2) for layer in (self.a, self.b, self.c))
        return self.head((a.transpose(1, 2) @ b @ c.transpose(1, 2)).mean(1) / 100)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_the_cost_is_that_of_the_smaller_network(unit: str) -> None:
    torch.manual_seed(0)
    network = Gram().eval().requires_grad_(False)
    X = images(8).repeat(12, 1, 1, 1)
    network.head.bias -= network(X).mean(0)  # or one class would be all answers
    options = PruningOptions(budget_unit=unit)
    pruner = DCSPruner(
        network, criterion="l1", budget=0.7, repair="none", device="cpu", options=options
    ).fit(X)
    parts = [trace(m, X[:1]) for m in (pruner.model_, network)]
    costs = [count_macs(m, X[:1])[0] if unit == "macs" else count_parameters(m) for m in parts]
    assert pruner.cost_ratio_ == pytest.approx(costs[0] / costs[1]) and pruner.cost_ratio_ <= 0.7


def test_a_transformer_is_pruned_repaired_and_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Transformer("fused")
    rng = np.random.default_rng(0)
    y = np.arange(150) % 5
    patterns = rng.normal(size=(5, 3, 6, 6))
    X = (patterns[y] + 0.5 * rng.normal(size=(150, 3, 6, 6))).astype(np.float32)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(network(torch.as_tensor(X)), torch.as_tensor(y)).backward()
        optimiser.step()
    scores = {}
    for repair in ("none", "least_squares"):
        pruner = DCSPruner(
            network.eval(), schedule="uniform", pruning_ratios=(0.4, 0.4), repair=repair
        ).fit(X, y)
        scores[repair] = pruner.score(X, y)
    assert scores["least_squares"] >= max(0.8, scores["none"])
    save(pruner, tmp_path / "pruner.sinf")
    again = load(tmp_path / "pruner.sinf", factory=lambda: Transformer("fused"))
    np.testing.assert_allclose(again.predict_proba(X), pruner.predict_proba(X), atol=1e-6)


def stored_again(pruner: DCSPruner, factory: Any, X: np.ndarray) -> None:
    """A file of the smaller network gives the same answers."""
    with tempfile.TemporaryDirectory() as folder:
        save(pruner, Path(folder) / "pruner.sinf")
        again = load(Path(folder) / "pruner.sinf", factory=factory)
    np.testing.assert_allclose(again.predict_proba(X), pruner.predict_proba(X), atol=1e-6)


@settings(max_examples=5, deadline=None)
@given(st.sampled_from([*WAYS, *ATTENTION]), st.integers(0, 99))
def test_what_is_sliced_along_is_repaired_and_stored(way: str, seed: int) -> None:
    torch.manual_seed(seed)
    kind: Any = Transformer if way in ATTENTION else Channels
    network = kind(way).eval().requires_grad_(False)
    X = images(6 if kind is Transformer else 8, seed).repeat(12, 1, 1, 1)
    X = X + 0.3 * torch.randn(X.shape)
    network.head.bias -= network(X).mean(0)  # or one class would be all answers
    pruner = DCSPruner(network, criterion="obs", schedule="uniform", pruning_ratios=(0.4, 0.4)).fit(
        X
    )
    assert pruner.cost_ratio_ < 0.8
    stored_again(pruner, lambda: kind(way), X.numpy())
