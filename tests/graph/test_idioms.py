"""What people write in a forward that torch.fx alone would stumble over."""

from __future__ import annotations

import math
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sinfkit.graph import check_traced, layer_names, opaque_modules, trace


class Net(nn.Module):
    """Two convolutions and a head; `between` is what happens between the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def between(self, h: Tensor) -> Tensor:
        return h.relu()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.b(self.between(self.a(x))).mean((2, 3)))


def followed(network: nn.Module) -> Any:
    """Trace, compare on samples, and see that no layer is out of sight."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = trace(network.eval(), x[:1])
    check_traced(graph, network, x)
    assert not opaque_modules(graph) and set(layer_names(graph)) >= {"a", "b", "head"}
    return graph


@pytest.mark.parametrize(
    "name",
    ["mean", "sum", "softmax", "split", "chunk", "normalize", "rand", "dropout", "view", "shape"],
)
@pytest.mark.parametrize("inside", [False, True])
def test_an_attribute_may_be_named_as_a_function_is(name: str, inside: bool) -> None:
    class Named(Net):
        def forward(self, x: Tensor) -> Tensor:
            home = self.part if inside else self
            return super().forward((x - getattr(home, name)) / 2)

    network = Named()
    network.part = nn.Module()
    (network.part if inside else network).register_buffer(name, torch.rand(1, 3, 1, 1))
    followed(network)


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x) if ctx.needs_input_grad[0] else x.mul(torch.sigmoid(x))


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.kept = output.sum()


def half(h: Tensor) -> Tensor:
    return h.relu() / 2


WAYS = {
    "function of one's own": lambda self, h: Swish.apply(h),
    "function with a set-up": lambda self, h: Sign.apply(h),
    "checkpoint": lambda self, h: checkpoint(half, h, use_reentrant=False),
    "checkpoint of a layer": lambda self, h: checkpoint(self.b, h, use_reentrant=False),
    "reentrant checkpoint": lambda self, h: checkpoint(self.b, h, use_reentrant=True),
    "module on the spot": lambda self, h: nn.LeakyReLU(0.2)(h),
    "sequence on the spot": lambda self, h: nn.Sequential(nn.ReLU(), self.b, nn.Tanh())(h),
    "length in a view": lambda self, h: h.view(len(h), -1).relu().view(len(h), 8, *h.shape[2:]),
    "length in an expansion": lambda self, h: (
        h + self.a.bias[None].expand(len(h), 8)[:, :, None, None]
    ),
    "length of what is steady": lambda self, h: (
        h * len(h[0]) / len(h.shape) + len(h.transpose(0, 1))
    ),
    "size as text": lambda self, h: h * {"8": 2.0, "4": 3.0}[str(h.shape[1])],
    "root of a size": lambda self, h: h / math.sqrt(h.shape[1]) + math.log(h.size(2)),
    "root by numpy": lambda self, h: h / np.sqrt(h.shape[1]) * float(np.prod(h.shape[1:])),
    "constants of numpy": lambda self, h: (
        np.float64(0.5) * h / np.sqrt(2) - np.float32(1.5) + h ** np.int64(2) * np.pi
    ),
    "constant of numpy first": lambda self, h: np.float64(2.0) - np.float32(0.5) * h,
    "root of an element count": lambda self, h: h * (h[0].numel() ** 0.5) / math.prod(h.shape[1:]),
    "grid": lambda self, h: (
        h.flatten(2).unflatten(2, (int(math.sqrt(h.flatten(2).shape[-1])), -1)).relu()
    ),
    "least size": lambda self, h: F.adaptive_avg_pool2d(h, min(h.shape[1:])) / max(h.shape[2:]),
    "rounded": lambda self, h: h.narrow(1, 0, round(h.shape[1] / 2)).repeat(
        1, divmod(h.shape[1], 4)[0], 1, 1
    ),
    "power": lambda self, h: h * h.shape[-1] ** -0.5 + h.shape[-1] // 2 - -h.shape[1] % 3,
    "printed": lambda self, h: print(h.shape, h.size(0), f"{h.mean():.3f} of {len(h)}") or h.relu(),
    "size in text": lambda self, h: getattr(h, f"re{'lu' if f'{h.size(1):02d}' == '08' else ''}")(),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_stands_between_layers_is_followed(way: str) -> None:
    followed(type("Way", (Net,), {"between": WAYS[way]})())


class Holding(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = Swish.apply

    def between(self, h: Tensor) -> Tensor:
        return self.act(swish(h))


swish = Swish.apply


def test_an_apply_that_was_looked_up_before_does_not_end_the_process() -> None:
    network = Holding()
    graph = followed(network)
    assert network.act is vars(network)["act"] and "partial" not in repr((network.act, swish))
    assert "sigmoid" in graph.code
    x = torch.ones(1, requires_grad=True)
    assert swish(x).grad_fn is not None


@pytest.mark.parametrize("kind", [dict, tuple, list, types.SimpleNamespace])
def test_the_only_output_is_taken(kind: Any) -> None:
    class Packed(Net):
        def forward(self, x: Tensor) -> Any:
            scores = super().forward(x)
            if kind is dict:
                return {"out": scores}
            return kind(logits=scores) if kind is types.SimpleNamespace else kind([scores])

    followed(Packed())


@pytest.mark.parametrize("how", ["size", "minus one", "shape"])
def test_views_of_flattened_maps_do_not_mind_the_order_in_memory(how: str) -> None:
    class Flat(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8 * 36, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.b(self.between(self.a(x)))
            if how == "size":
                return self.head(h.view(h.size(0), -1))
            return self.head(h.view(-1, 288) if how == "minus one" else h.view(h.shape[0], 288))

    graph = followed(Flat())
    x = torch.randn(4, 3, 8, 8)
    expected = graph(x)
    found = graph(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected)


class Adapted(nn.Linear):
    """A layer with parameters of its own, as adapters are added to layers."""

    def __init__(self, n_in: int, n_out: int, form: str) -> None:
        super().__init__(n_in, n_out)
        self.form = form
        self.A, self.B = nn.Parameter(torch.randn(2, n_in)), nn.Parameter(torch.randn(n_out, 2))
        self.scale = nn.Parameter(torch.rand(n_out))
        self.extra = nn.Linear(n_in, n_out)
        self.register_buffer("mask", torch.arange(n_out) % 3 > 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "first":
            return F.linear(F.linear(x, self.A), self.B) + F.linear(x, self.weight, self.bias)
        if self.form == "last":
            return super().forward(x) + F.linear(F.linear(x, self.A), self.B)
        if self.form == "product":
            return x @ self.A.t() @ self.B.t() + F.linear(x, self.weight)
        if self.form == "merged":
            return F.linear(x, self.weight + self.B @ self.A, self.bias)
        if self.form == "scaled":
            return F.linear(x, self.weight, self.bias) * self.scale * self.mask
        if self.form == "weight again":
            return F.linear(x, 2 * self.weight, self.bias) + (x * self.weight[:1]).sum(1, True)
        return self.extra(x) + F.linear(x, self.weight)


@pytest.mark.parametrize(
    "form", ["first", "last", "product", "merged", "scaled", "weight again", "beside"]
)
def test_layers_may_have_more_parameters_than_a_plain_one(form: str) -> None:
    network = Net()
    network.head = nn.Sequential(Adapted(8, 6, form), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = trace(network.eval(), x[:1])
    check_traced(graph, network, x)
    assert "head.0" in layer_names(graph)
    layer = graph.get_submodule("head.0")
    assert layer.weight.shape == network.head[0].weight.shape
