"""Networks written in many ways: each is followed, or a part stays whole, or an error says why."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sinfkit import SlicingWarning
from sinfkit.graph import check_traced, layer_names, opaque_modules, trace


def images(n: int = 4, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def equal(network: nn.Module, x: Tensor, **options: Any) -> Any:
    """Trace and compare, also after pickling and for another number of samples."""
    network = network.eval()
    graph = trace(network, x[:1], **options)
    with torch.no_grad():
        for rows in (x, x[:1]):
            expected = network(rows.clone())
            expected = expected["logits"] if isinstance(expected, dict) else expected
            torch.testing.assert_close(graph(rows.clone()), expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(graph))(x), graph(x))
    return graph


# Layers that compute what a plain one does --------------------------------------------------------


class Standardised(nn.Conv2d):
    """Its weight is computed from its parameter."""

    def forward(self, x: Tensor) -> Tensor:
        shape = 1, self.out_channels, -1
        weight = F.batch_norm(self.weight.reshape(shape), None, None, training=True, momentum=0.0)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class SamePadded(nn.Conv2d):
    """It pads by as much as the input's size asks for."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.size()[-2:]
        extra = max((-(height // -self.stride[0]) - 1) * self.stride[0] + 3 - height, 0)
        if extra > 0 or width < 0:
            x = F.pad(x, [extra // 2, extra - extra // 2, extra // 2, extra - extra // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class ActiveNorm(nn.BatchNorm2d):
    """An activation lives in it."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"expected 4D, got {x.ndim}D")
        use = self.training or (self.running_mean is None and self.running_var is None)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, use, 0.1, self.eps
        )
        return self.act(self.drop(x))


class Cast(nn.Linear):
    """timm's linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(dtype=x.dtype)
        return F.linear(x, self.weight.to(dtype=x.dtype), bias)


class Scaled(nn.Module):
    """No layer at all, but a function on parameters."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.gain = (
            nn.Parameter(torch.randn(n_out, n_in, 1, 1)),
            nn.Parameter(torch.ones(n_out, 1, 1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain)


LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": lambda i, o: nn.Conv2d(i, o, 3, padding=1),
    "standardised": lambda i, o: Standardised(i, o, 3, padding=1),
    "same": lambda i, o: SamePadded(i, o, 3, stride=2),
    "weight_norm": lambda i, o: nn.utils.parametrizations.weight_norm(nn.Conv2d(i, o, 1)),
    "spectral_norm": lambda i, o: nn.utils.parametrizations.spectral_norm(nn.Conv2d(i, o, 1)),
    "function": Scaled,
    "circular": lambda i, o: nn.Conv2d(i, o, 3, padding=1, padding_mode="circular"),
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda n: nn.ReLU(inplace=True),
    "norm": nn.BatchNorm2d,
    "active": ActiveNorm,
}


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(LAYERS)), st.sampled_from(sorted(NORMS))),
        min_size=1,
        max_size=4,
    )
)
def test_layers_that_compute_the_same_become_plain(kinds: list[tuple[str, str]]) -> None:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for i, (layer, norm) in enumerate(kinds):
        parts += [LAYERS[layer](3 if i == 0 else 6, 6), NORMS[norm](6)]
    network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), Cast(6, 5))
    graph = equal(network, images())
    assert len(layer_names(graph)) == len(kinds) + 1
    assert not opaque_modules(graph)
    kinds_found = {type(module) for module in graph.modules()}
    assert not kinds_found & {Standardised, SamePadded, ActiveNorm, Cast, Scaled}
    names = {name.split(".")[0] for name in layer_names(graph)}
    assert names <= {name for name, _ in network.named_children()}


# Code that asks for shapes and types --------------------------------------------------------------


class Asking(nn.Module):
    """Control flow on facts, in a way that is drawn."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor, flag: bool = False) -> Any:
        if x.shape[1] != 3 or x.dtype not in (torch.float32, torch.float64):
            raise ValueError("not these")
        h = self.a(x)
        n, c, height, width = h.shape
        if self.way == "int":
            h = h.reshape(n, c, int(h.shape[-2]) * int(width))
            return self.head(h.mean(-1))
        if self.way == "isinstance":
            h = self.b(h) if isinstance(h, Tensor) else None
        elif self.way == "loop":
            for _ in range(h.ndim - 2):
                h = self.b(h)
        elif self.way == "factory":
            h = h + torch.zeros(n, c, 1, 1, dtype=h.dtype, device=h.device) + torch.ones(c, 1, 1)
        elif self.way == "unpack":
            parts = h.chunk(2, dim=1)
            h = torch.cat([part.relu() for part in parts], 1)
            assert len(parts) == 2
        elif self.way == "new":
            h = h * h.new_ones(c, height, width).sum(0) / c
        elif self.way == "pixels" and height > 4 and h.numel() > 0:
            h = F.interpolate(h, size=(height // 2, width // 2))
        return {"logits": self.head(h.mean((2, 3))), "features": h}


@pytest.mark.parametrize(
    "way", ["int", "isinstance", "loop", "factory", "unpack", "new", "pixels", "none"]
)
def test_facts_are_told(way: str) -> None:
    graph = equal(Asking(way), images())
    assert set(layer_names(graph)) >= {"a", "head"}
    assert not opaque_modules(graph)


class Batchwise(nn.Module):
    """It depends on values, or on how many samples there are: not to be written down."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.inner = way, nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "count":
            return self.inner(x) if x.shape[0] > 2 else x
        if self.way == "loop":
            return torch.stack([self.inner(row[None])[0] for row in x])
        if self.way == "value":
            return self.inner(x) if x.sum() > 0 else x
        if self.way == "item":
            return self.inner(x) * (1 if x.max().item() > 3 else 2)
        x[:, 0] = self.inner(x)[:, 0]
        return x


@pytest.mark.parametrize("way", ["count", "loop", "value", "item", "assignment"])
def test_what_depends_on_samples_stays_whole(way: str) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), Batchwise(way), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    with pytest.warns(SlicingWarning, match="Layers inside 1 stay whole"):
        graph = equal(network, images())
    assert opaque_modules(graph) == ["1"]


# The graph is the network -------------------------------------------------------------------------


class Writing(nn.Module):
    """It writes into a view of what it has computed, or around it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv, self.act = way, nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        if self.way == "slice":
            h[:, ::2].mul_(3)
        elif self.way == "chunk":
            a, _ = h.chunk(2, 1)
            self.act(a)
        elif self.way == "view":
            h.view(len(h), -1).relu_()
        elif self.way == "out":
            torch.add(h, 1, out=h)
        elif self.way == "inner":
            self.act(h.transpose(2, 3))
        elif self.way == "function":
            F.relu(h[:, 1:3], inplace=True)
        return h + 1


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.sampled_from(["slice", "chunk", "view", "out", "inner", "function", "none"]),
        min_size=1,
        max_size=2,
    ),
    st.sampled_from(["none", "root", "pre", "layer", "container", "forward"]),
    st.booleans(),
)
@pytest.mark.filterwarnings("ignore:Layers inside")
def test_right_or_a_clear_error(ways: list[str], hook: str, root: bool) -> None:
    torch.manual_seed(0)
    if root:
        network: nn.Module = Writing(ways[0])
        network = nn.Sequential(network) if hook == "container" else network
    else:
        body = [nn.Sequential(Writing(way), nn.Conv2d(8, 3, 1)) for way in ways]
        network = nn.Sequential(*body, nn.Conv2d(3, 4, 1))
    conv = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    if hook == "root":
        network.register_forward_hook(lambda m, args, out: 2 * out)
    elif hook == "pre":
        network.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    elif hook == "layer":
        conv.register_forward_hook(lambda m, args, out: out.clamp(max=0.5))
    elif hook == "container":
        network[0].register_forward_hook(lambda m, args, out: out.abs())
    elif hook == "forward":
        plain = type(network).forward
        network.forward = lambda x: plain(network, x) * 2
    network.eval()
    x = images()
    with torch.no_grad():
        expected = network(x.clone())
    try:
        graph = trace(network, x[:1])
        check_traced(graph, network, x)
    except ValueError as error:
        assert any(word in str(error) for word in ("view", "hook", "trace"))
        return
    with torch.no_grad():
        torch.testing.assert_close(graph(x.clone()), expected)


@pytest.mark.parametrize("way", ["rand", "dropout", "state", "numpy"])
def test_random_draws_are_refused(way: str) -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(6, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if way == "rand":
                x = x + torch.rand_like(x)
            elif way == "dropout":
                x = F.dropout(x, 0.5, training=True)
            elif way == "state":
                x = x * self.calls
            else:
                x = x * float(torch.rand(()))
            return self.fc(x)

    network = Random().eval()
    x = torch.ones(4, 6)
    with pytest.raises(ValueError, match="draws random numbers"):
        check_traced(trace(network, x[:1]), network, x)


def test_batch_mates_are_noticed() -> None:
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, track_running_stats=False)).eval()
    x = torch.randn(6, 3)
    with pytest.raises(ValueError, match="one sample alone|others of its batch"):
        check_traced(trace(network), network, x)


class Depth(nn.Module):
    """Stochastic depth, as anybody writes it."""

    def forward(self, x: Tensor) -> Tensor:
        return x if not self.training else x * torch.bernoulli(torch.full_like(x[:, :1], 0.5))


@pytest.mark.parametrize("way", ["function", "torch", "module", "depth"])
def test_dropout_comes_back_in_training(way: str) -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out, self.p = nn.Linear(6, 60), nn.Linear(60, 4), 0.4
            self.drop = Depth() if way == "depth" else nn.Dropout(0.4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            if way == "function":
                h = F.dropout(h, self.p, training=self.training)
            elif way == "torch":
                h = torch.dropout(h, self.p, self.training)
            else:
                h = self.drop(h)
            return self.out(h)

    network = Dropping().eval()
    x = torch.randn(20, 6)
    graph = equal(network, x)
    for one in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        one.train()
        assert not torch.equal(one(x), one(x))
        one.eval()
        torch.testing.assert_close(one(x), network(x))


def test_scripted_models_are_refused() -> None:
    with pytest.raises(TypeError, match="scripted"):
        trace(torch.jit.script(nn.Linear(3, 2)))
