"""Blocks, faults and heads of which `fuzz_networks.py` makes networks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

Rng = np.random.Generator


# --- blocks: (n, channels, ...) in and out ---------------------------------------------------


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


ZERO_AT_ZERO = ("ReLU", "LeakyReLU", "GELU", "SiLU", "Tanh", "Hardswish", "PReLU", "ReLU6")
ACTIVATIONS = (*ZERO_AT_ZERO, "Sigmoid", "Softplus", "ELU")


@dataclass
class Kit:
    """Layers for samples with so many axes behind the channels."""

    rng: Rng
    axes: int  # behind the channels: 2 images, 1 sequences, 0 tables
    zero: bool = True  # whether a masked channel is 0 behind its activation

    def conv(self, i: int, o: int, k: int = 3, **more: Any) -> nn.Module:
        if not self.axes:
            return nn.Linear(i, o)
        kind = nn.Conv2d if self.axes == 2 else nn.Conv1d
        return kind(i, o, k, padding=k // 2, **more)

    def norm(self, n: int) -> nn.Module:
        kind = nn.BatchNorm2d if self.axes == 2 else nn.BatchNorm1d
        made = kind(n)
        for values, low, high in (
            *((made.weight.data, 0.5, 1.5), (made.bias.data, -0.5, 0.5)),
            *((made.running_mean, -0.5, 0.5), (made.running_var, 0.5, 2.0)),
        ):
            values.uniform_(low, high)
        return made

    def act(self) -> nn.Module:
        name = "ReLU" if self.rng.random() < 0.5 else self.pick(*ACTIVATIONS)
        self.zero &= name in ZERO_AT_ZERO
        in_place = name in ("ReLU", "ReLU6", "SiLU") and self.rng.random() < 0.3
        return getattr(nn, name)(inplace=True) if in_place else getattr(nn, name)()

    def pick(self, *values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def width(self) -> int:
        return int(self.pick(4, 6, 8))


class Plain(nn.Module):
    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.out = kit.width()
        self.conv, self.norm = kit.conv(c, self.out, kit.pick(1, 3)), kit.norm(self.out)
        self.act = kit.act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Bare(Plain):
    """Without a norm."""

    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__(kit, c)
        self.norm = nn.Identity()


class Residual(nn.Module):
    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.out, inner = c, kit.width()
        self.one, self.two = kit.conv(c, inner), kit.conv(inner, c)
        self.norm, self.act = kit.norm(inner), kit.act()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.act(self.norm(self.one(x))))


class LayerScale(Residual):
    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__(kit, c)
        self.gamma = nn.Parameter(torch.rand(c, *[1] * kit.axes))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.two(self.act(self.norm(self.one(x))))


class Dense(nn.Module):
    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        more = kit.width()
        self.conv, self.norm, self.act = kit.conv(c, more), kit.norm(more), kit.act()
        self.out = c + more

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.act(self.norm(self.conv(x)))], 1)


class Halves(nn.Module):
    """Two halves of the channels, one of them convolved."""

    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.wide = kit.conv(c, 8)
        self.conv, self.act, self.out = kit.conv(4, 4), kit.act(), 8
        self.how = kit.pick("chunk", "split", "slice", "sizes")

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        if self.how == "chunk":
            a, b = x.chunk(2, 1)
        elif self.how == "split":
            a, b = torch.split(x, 4, dim=1)
        elif self.how == "sizes":
            a, b = x.split([4, 4], 1)
        else:
            a, b = x[:, :4], x[:, 4:]
        return torch.cat([a, self.act(self.conv(b))], 1)


class Shared(nn.Module):
    """One layer that runs twice."""

    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.conv, self.act, self.out = kit.conv(c, c), kit.act(), c

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.act(self.conv(x))))


class Tied(nn.Module):
    """Two layers with the same weights."""

    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.one, self.two = kit.conv(c, c), kit.conv(c, c)
        self.two.weight = self.one.weight
        self.act, self.out = kit.act(), c

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.two(self.act(self.one(x))))


class Functional(nn.Module):
    """Weights of its own, and functions."""

    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        inner = kit.width()
        self.before, self.out = kit.conv(c, inner), kit.width()
        self.weight = nn.Parameter(torch.randn(self.out, inner, *[1] * kit.axes) / inner**0.5)
        self.bias = nn.Parameter(torch.zeros(self.out))
        self.call = (F.linear, F.conv1d, F.conv2d)[kit.axes]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.call(F.relu(self.before(x)), self.weight, self.bias))


class Einsum(nn.Module):
    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.before, self.out = kit.conv(c, 6), kit.width()
        self.weight = nn.Parameter(torch.randn(self.out, 6) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oc,nc...->no...", self.weight, F.relu(self.before(x)))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.conv, self.out = kit.conv(c, 8), 8
        self.less, self.more = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        pooled = x.flatten(2).mean(2) if x.ndim > 2 else x
        gate = torch.sigmoid(self.more(F.relu(self.less(pooled))))
        return x * gate.reshape(len(x), -1, *[1] * (x.ndim - 2))


class Gated(nn.Module):
    """A gated linear unit."""

    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.out = kit.width()
        self.conv = kit.conv(c, 2 * self.out)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.conv(x), 1)


class Depthwise(nn.Module):
    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        inner = kit.width()
        groups = {"groups": inner if kit.rng.random() < 0.7 else 2} if kit.axes else {}
        self.out = kit.width()
        self.one, self.two = kit.conv(c, inner), kit.conv(inner, inner, **groups)
        self.three, self.norm, self.act = kit.conv(inner, self.out, 1), kit.norm(inner), kit.act()

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.act(self.norm(self.two(F.relu(self.one(x))))))


class Wrapped(nn.Module):
    """Weights behind a parametrisation, or with zeros."""

    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.conv, self.norm, self.out = kit.conv(c, 6), kit.norm(6), 6
        self.after = kit.conv(6, 6)
        how = kit.pick("weight_norm", "spectral_norm", "prune", "prune_whole", "zeros")
        if how == "prune":
            prune.random_unstructured(self.conv, "weight", 0.4)
        elif how == "prune_whole":
            prune.ln_structured(self.after, "weight", 0.5, n=1, dim=1)
        elif how == "zeros":
            self.after.weight.data[:, :3] = 0
        else:
            getattr(parametrizations, how)(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.after(F.relu(self.norm(self.conv(x)))))


class Normed(nn.Module):
    """A norm that is none over the batch."""

    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.conv, self.after, self.out = kit.conv(c, 8), kit.conv(8, 8, 1), 8
        kinds = [nn.GroupNorm(2, 8), nn.GroupNorm(1, 8), nn.LayerNorm(8)]
        if kit.axes == 2:
            kinds += [nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True)]
        self.norm = kit.pick(*kinds)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if isinstance(self.norm, nn.LayerNorm):
            x = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        else:
            x = self.norm(x)
        return self.after(F.relu(x))


class Attention(nn.Module):
    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.before, self.out = kit.conv(c, 8), 8
        self.how = kit.pick("module", "sdpa", "matmul", "einsum")
        if self.how == "module":
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.qkv, self.project = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        tokens = x.flatten(2).transpose(1, 2) if x.ndim > 2 else x[:, None]
        if self.how == "module":
            found = self.attend(tokens, tokens, tokens, need_weights=False)[0]
        else:
            n, length, _ = tokens.shape
            q, k, v = self.qkv(tokens).reshape(n, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
            if self.how == "sdpa":
                found = F.scaled_dot_product_attention(q, k, v)
            elif self.how == "matmul":
                found = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
            else:
                weight = torch.einsum("bhid,bhjd->bhij", q, k).div(2).softmax(-1)
                found = torch.einsum("bhij,bhjd->bhid", weight, v)
            found = self.project(found.transpose(1, 2).reshape(n, length, 8))
        return (tokens + found).transpose(1, 2).reshape(x.shape)


class Recurrent(nn.Module):
    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.before, self.out = kit.conv(c, 6), 6
        self.cell = kit.pick(nn.LSTM, nn.GRU, nn.RNN)(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        tokens = x.flatten(2) if x.ndim > 2 else x[:, :, None]
        tokens = tokens[:, :, ::9].transpose(1, 2)  # few steps: each is counted
        last = self.cell(tokens)[0][:, -1]
        return x + last.reshape(len(x), -1, *[1] * (x.ndim - 2))


class Mixed(nn.Module):
    """An operation over the channels between two layers."""

    HOW: Sequence[Callable[[Tensor], Tensor]] = (
        lambda x: x.roll(1, 1),
        lambda x: x.flip(1),
        lambda x: x.cumsum(1),
        lambda x: x.softmax(1),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: F.normalize(x, dim=1),
        lambda x: x / (1 + x.norm(dim=1, keepdim=True)),
        lambda x: x.sort(1)[0],
        lambda x: x * x.amax(1, keepdim=True),
        lambda x: x[:, [3, 0, 1, 2, 5, 4]],
        lambda x: x[:, ::2].repeat_interleave(2, 1),
        lambda x: x.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2),
        lambda x: x.reshape(len(x), 3, 2, *x.shape[2:]).sum(2).repeat(1, 2, *[1] * (x.ndim - 2)),
        lambda x: torch.stack([x, -x], 2).amax(2),
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: x.masked_fill(x < 0, 0.0),
        lambda x: x.clamp(-1, 1) + x.abs().sqrt(),
        lambda x: torch.cat([x[:, 1:], x[:, :1]], 1),
        lambda x: torch.cat([x[:, :4], x], 1)[:, :6],
        lambda x: np.float64(0.5) * x / np.sqrt(x.shape[1]) + x / math.sqrt(x.shape[1]),
        lambda x: x.topk(6, 1)[0],
        lambda x: x.gather(1, x.argsort(1)),
        lambda x: x.view(x.size(0), x.size(1), -1).view(x.shape),
        lambda x: x.index_select(1, torch.tensor([5, 4, 3, 2, 1, 0])),
        lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
        lambda x: torch.addcmul(x, x, x, value=0.1),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: x.unbind(1)[0][:, None] + x,
        lambda x: x * torch.linspace(0.5, 1.5, 6).to(x).view(-1, *[1] * (x.ndim - 2)),
    )

    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.number = int(kit.rng.integers(len(self.HOW)))
        self.conv, self.after, self.out = kit.conv(c, 6), kit.conv(6, 6), 6

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.after(self.HOW[self.number](self.conv(x))))


class Spatial(nn.Module):
    """Images are moved about."""

    HOW: Sequence[Callable[[Tensor], Tensor]] = (
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
        lambda x: F.interpolate(x, size=(6, 6), mode="bilinear"),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
        lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2),
        lambda x: F.unfold(x, 2).reshape(len(x), x.shape[1] * 4, x.shape[2] - 1, -1),
        lambda x: x[:, :, 1:-1, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: F.adaptive_avg_pool2d(x, 4),
        lambda x: F.channel_shuffle(x, 2),
    )

    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.number = int(kit.rng.integers(len(self.HOW)))
        self.conv, self.act = kit.conv(c, 6), kit.act()
        self.out = {5: 8, 7: 24}.get(self.number, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.HOW[self.number](self.act(self.conv(x)))


class Transposed(nn.Module):
    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__()
        self.conv, self.out = kit.conv(c, 6), 4
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.up(F.relu(self.conv(x))))


class Regularised(Plain):
    """Dropout of every kind, which does nothing at prediction."""

    def __init__(self, kit: Kit, c: int) -> None:
        super().__init__(kit, c)
        self.drop = kit.pick(nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5))
        self.function = kit.rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return F.dropout(x, 0.5, training=self.training) if self.function else self.drop(x)


SIMPLE: tuple[type[nn.Module], ...] = (Plain, Residual, Bare, Dense)
ODD: tuple[type[nn.Module], ...] = (
    *(LayerScale, Halves, Shared, Tied, Functional, Einsum, Gate, Gated, Depthwise, Wrapped),
    *(Normed, Attention, Recurrent, Mixed, Mixed, Mixed, Regularised),
)
MASKABLE = (Plain, Bare, Residual, Dense, Regularised)


# --- faults ----------------------------------------------------------------------------------


@dataclass
class Fault:
    """Something that is lost where a network is traced, or was never there.

    `says` is a regular expression of what an error may say ("" where there is no reason for any);
    `answers` whether the network has answers; `step` changes features within ``forward``, `finish`
    the finished module.
    """

    name: str
    says: str
    step: Callable[[Tensor, Any], Tensor] | None = None
    finish: Callable[[nn.Module], Any] | None = None
    answers: bool = True


def _scale_view(x: Tensor, me: Any) -> Tensor:
    x[:, ::2].mul_(-1.0)
    return x


def _relu_view(x: Tensor, me: Any) -> Tensor:
    x.view(len(x), -1).relu_()
    return x


def _relu_chunk(x: Tensor, me: Any) -> Tensor:
    F.relu(x.chunk(2, 1)[0], inplace=True)
    return x


def _module_on_view(x: Tensor, me: Any) -> Tensor:
    me.helper(x[:, 1:])
    return x


def _out(x: Tensor, me: Any) -> Tensor:
    y = x.clone()
    torch.mul(x, -1.0, out=y)
    return y


def _set_item(x: Tensor, me: Any) -> Tensor:
    x[:, 0] = 0.5
    return x


def _add_to_view(x: Tensor, me: Any) -> Tensor:
    a = x[:, :2]
    a += 1.0
    return x


def _data(x: Tensor, me: Any) -> Tensor:
    x.data.mul_(-1.0)
    return x


def _transposed(x: Tensor, me: Any) -> Tensor:
    x.transpose(0, 1)[-1].fill_(0.3)
    return x


def _unbound(x: Tensor, me: Any) -> Tensor:
    for part in x.unbind(1)[:1]:
        part.neg_()
    return x


def _copied(x: Tensor, me: Any) -> Tensor:
    made = torch.zeros_like(x)
    made[:, 1:].copy_(x[:, 1:])
    return made


def _filled(x: Tensor, me: Any) -> Tensor:
    made = x.new_empty(x.shape)
    made[:, :1] = x[:, :1]
    made[:, 1:] = -x[:, 1:]
    return made


def _index_fill(x: Tensor, me: Any) -> Tensor:
    return x.index_fill_(1, torch.tensor([0]), 0.2)


def _rare_view(x: Tensor, me: Any) -> Tensor:
    """It shows where a value is far larger than usual, as do the next two."""
    x[:, ::2].clamp_(max=3.0)
    return x


def _rare_data(x: Tensor, me: Any) -> Tensor:
    x.data.clamp_(max=3.0)
    return x


def _rare_stale(x: Tensor, me: Any) -> Tensor:
    before = x[:, :1]
    x.clamp_(max=3.0)
    return x + before


def _chain(x: Tensor, me: Any) -> Tensor:
    return x.mul_(0.5).add_(1.0).clamp_(-1, 1)


def _stale(x: Tensor, me: Any) -> Tensor:
    """An alias that is read behind a write."""
    before = x
    x.mul_(-1.0)
    return before + x


def _noise(x: Tensor, me: Any) -> Tensor:
    return x + torch.randn_like(x)


def _noise_like_shape(x: Tensor, me: Any) -> Tensor:
    return x + torch.rand(x.shape[1], 1, 1).to(x) if x.ndim == 4 else x + torch.rand(1).to(x)


def _dropout(x: Tensor, me: Any) -> Tensor:
    return F.dropout(x, 0.5, training=True)


def _bernoulli(x: Tensor, me: Any) -> Tensor:
    return x * torch.bernoulli(torch.full_like(x, 0.5))


def _python_draw(x: Tensor, me: Any) -> Tensor:
    return x * (2 + random.random())


def _numpy_draw(x: Tensor, me: Any) -> Tensor:
    return x * float(2 + np.random.rand())  # noqa: NPY002


def _counter(x: Tensor, me: Any) -> Tensor:
    me.calls = getattr(me, "calls", 0) + 1
    return x * me.calls


def _buffer(x: Tensor, me: Any) -> Tensor:
    me.seen += x.mean()
    return x + me.seen


def _rare_dropout(x: Tensor, me: Any) -> Tensor:
    return F.dropout(x, 1e-4, training=True)


def _rare_path(x: Tensor, me: Any) -> Tensor:
    return x * (torch.rand(len(x), *[1] * (x.ndim - 1)) > 1e-4)


def _rare_python_draw(x: Tensor, me: Any) -> Tensor:
    return x if random.random() > 1e-4 else -x


def _first_kept(x: Tensor, me: Any) -> Tensor:
    if getattr(me, "kept", None) is None:
        me.kept = x.mean().detach()
    return x - 3 * me.kept


def _batch_of_many(x: Tensor, me: Any) -> Tensor:
    return x * (2.0 if x.shape[0] > 9 else -1.0)


def _batch_of_eights(x: Tensor, me: Any) -> Tensor:
    return x * (2.0 if len(x) % 8 == 0 else -1.0)


def _caught(x: Tensor, me: Any) -> Tensor:
    try:
        if float(x.max()) > 3.0:
            return -x
    except Exception:
        pass
    return x


def _batch_mean(x: Tensor, me: Any) -> Tensor:
    return x - 2 * x.mean(0, keepdim=True)


def _batch_max(x: Tensor, me: Any) -> Tensor:
    return x / x.abs().max()


def _batch_size(x: Tensor, me: Any) -> Tensor:
    return x * (2.0 if x.shape[0] > 2 else -1.0)


def _batch_norm(x: Tensor, me: Any) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def _shuffled(x: Tensor, me: Any) -> Tensor:
    return x + x.flip(0)


def _if_values(x: Tensor, me: Any) -> Tensor:
    return -x if float(x.sum()) > 0 else x * 0.5


def _if_any(x: Tensor, me: Any) -> Tensor:
    return -x if (x > 1.5).any() else x


@dataclass
class Hook:
    """Registers itself on the network, its first layer, or all of them."""

    change: Callable[[Any], Any]
    where: str
    before: bool = False

    def __call__(self, *args: Any) -> Any:
        if len(args) > 1:
            return self.change(args[1][0] if self.before else args[2])
        (module,) = args
        layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Conv1d)]
        for part in {"root": [module], "first": layers[:1], "all": layers[:-1]}[self.where]:
            if self.before:
                part.register_forward_pre_hook(self)
            else:
                part.register_forward_hook(self)
        return None


def _flip(x: Any) -> Any:
    """Of whatever a network may give."""
    return x.flip(1) if isinstance(x, Tensor) and x.ndim == 2 else x


def _double(x: Tensor) -> Tensor:
    return x * 2


def _clamp(x: Any) -> Any:
    return x.clamp(min=-0.1) if isinstance(x, Tensor) else x


@dataclass
class Flipped:
    """Another forward than that of the class."""

    module: nn.Module

    def __call__(self, x: Tensor) -> Any:
        return _flip(type(self.module).forward(self.module, x))


def _forward_on_object(module: nn.Module) -> None:
    module.forward = Flipped(module)  # type: ignore[method-assign]


def _look(x: Any) -> None:
    """A hook that only looks."""


def _in_place_hook(x: Any) -> None:
    if isinstance(x, Tensor):
        x.mul_(-1.0)


def _statistics_of_batch(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.track_running_stats = False
            part.running_mean = part.running_var = None


def _train_for_ever(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm | nn.Dropout):
            part.train()
            part.train = lambda mode=True, part=part: part  # type: ignore[method-assign]


HOOK = "hook|forward|pickled"
VIEW = "in place|view|hook|followed|cannot trace|look into"
DRAW = "random|state|draw|batch|followed|asked about first|cannot trace|same operations"
BATCH = "cannot trace|batch|one sample alone|Train it with running|random|state"
BRANCH = "batch|followed|branch|control flow|values of|trace"
FAULTS = (
    *(
        Fault(f"view {step.__name__.strip('_')}", VIEW, step)
        for step in (
            *(_scale_view, _relu_view, _relu_chunk, _module_on_view, _out, _set_item, _add_to_view),
            *(_data, _transposed, _unbound, _copied, _filled, _index_fill, _stale),
            *(_rare_view, _rare_data, _rare_stale),
        )
    ),
    Fault("chain in place", "", _chain),
    *(
        Fault(f"draw {step.__name__.strip('_')}", DRAW, step, answers=False)
        for step in (
            *(_noise, _noise_like_shape, _dropout, _bernoulli, _python_draw, _numpy_draw),
            *(_counter, _buffer, _rare_dropout, _rare_path, _rare_python_draw, _first_kept),
        )
    ),
    *(
        Fault(f"batch {step.__name__.strip('_')}", BATCH, step, answers=False)
        for step in (
            *(_batch_mean, _batch_max, _batch_size, _batch_norm, _shuffled),
            *(_batch_of_many, _batch_of_eights),
        )
    ),
    *(
        Fault(f"branch {step.__name__.strip('_')}", BRANCH, step)
        for step in (_if_values, _if_any, _caught)
    ),
    Fault("hook root output", "", finish=Hook(_flip, "root")),
    Fault("hook root input", "", finish=Hook(_double, "root", True)),
    Fault("hook first", HOOK, finish=Hook(_double, "first")),
    Fault("hook first input", HOOK, finish=Hook(_double, "first", True)),
    Fault("hook all", HOOK, finish=Hook(_clamp, "all")),
    Fault("hook in place", HOOK, finish=Hook(_in_place_hook, "first")),
    Fault("hook that looks", "", finish=Hook(_look, "all")),
    Fault("hook that looks at the root", "", finish=Hook(_look, "root")),
    Fault("forward on the object", "", finish=_forward_on_object),
    Fault("statistics of the batch", BATCH, finish=_statistics_of_batch),
    Fault("parts that stay in training", f"{BATCH}|{DRAW}|pickled", finish=_train_for_ever),
)


def draw_fault(rng: Rng) -> Fault:
    return FAULTS[rng.integers(len(FAULTS))]


# --- heads -----------------------------------------------------------------------------------

SHAPE = "class scores|row|one number per sample|logit"
# What an error may say, for each head; nothing for those that must work.
HEADS: dict[str, tuple[str, ...]] = {
    "softmax": (),
    "softmax_last": (),
    "log_softmax": (),
    "log_of_softmax": (),
    "sigmoid": (),
    "module_softmax": (),
    "sequential_softmax": (),
    "softmax_of_scaled": (),
    "softmax_float": (),
    "tuple": (),
    "dict": (),
    "namespace": (SHAPE,),
    "pair": (SHAPE,),
    "clamped_softmax": (),
    "mean_of_softmax": (),
    "smoothed_softmax": (),
    "reversed_softmax": (),
    "product": (),
    "one_logit": (),
    "one_logit_flat": (),
    "one_logit_sigmoid": (),
    "one_logit_flat_sigmoid": (),
    "one_logit_scaled": (),
}


class Network(nn.Module):
    """Blocks, pooling, an output layer and a head, with perhaps a fault between two blocks."""

    def __init__(
        self,
        parts: Sequence[nn.Module],
        pool: str,
        width: int,
        n_outputs: int,
        head: str,
        fault: Fault | None,
        place: int,
    ) -> None:
        super().__init__()
        self.blocks, self.names = nn.ModuleList(parts), [type(p).__name__ for p in parts]
        self.pool, self.fc, self.place = pool, nn.Linear(width, n_outputs), place
        self.head = nn.Softmax(1) if head == "module_softmax" else None
        self.kind, self.step = head, None if fault is None else fault.step
        self.helper = nn.ReLU(inplace=True)
        if self.step is _buffer:
            self.register_buffer("seen", torch.zeros(()))

    def features(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.step is not None and i == self.place:
                x = self.step(x, self)
        if x.ndim == 2:
            return x
        return x.flatten(1) if self.pool == "flatten" else x.flatten(2).mean(2)

    def forward(self, x: Tensor) -> Any:
        h = self.features(x)
        z = h @ self.fc.weight.T + self.fc.bias if self.kind == "product" else self.fc(h)
        return z if self.kind in ("logits", "product", "sequential_softmax") else self.answer(z)

    def answer(self, z: Tensor) -> Any:
        """What the head makes of logits."""
        if self.head is not None:
            return self.head(z)
        if self.kind == "softmax":
            return F.softmax(z, dim=1)
        if self.kind == "softmax_last":
            return z.softmax(-1)
        if self.kind == "log_softmax":
            return torch.log_softmax(z, 1)
        if self.kind == "log_of_softmax":
            return torch.log(torch.softmax(z, 1))
        if self.kind == "sigmoid" or self.kind == "one_logit_sigmoid":
            return torch.sigmoid(z)
        if self.kind == "softmax_of_scaled":
            return (z / 1.7).softmax(1)
        if self.kind == "softmax_float":
            return z.softmax(1).to(z.dtype)
        if self.kind == "tuple":
            return (z,)
        if self.kind == "dict":
            return {"logits": z}
        if self.kind == "namespace":
            return SimpleNamespace(logits=z)
        if self.kind == "pair":
            return z, z * 2
        if self.kind == "clamped_softmax":
            return z.softmax(1).clamp(1e-5, 1)
        if self.kind == "mean_of_softmax":
            return (z.softmax(1) + (z * 0.5).softmax(1)) / 2
        if self.kind == "smoothed_softmax":
            return 0.9 * z.softmax(1) + 0.1 / z.shape[1]
        if self.kind == "reversed_softmax":
            return z.flip(1).softmax(1).flip(1)
        if self.kind == "one_logit_scaled":
            return (z * self.fc.bias.sigmoid().add(1)).sum(1)
        if self.kind == "one_logit":
            return z
        if self.kind == "one_logit_flat":
            return z.squeeze(1)
        assert self.kind == "one_logit_flat_sigmoid"
        return torch.sigmoid(z)[:, 0]


def network(
    shape: tuple[int, ...], n_classes: int, head: str, fault: Fault | None, rng: Rng
) -> tuple[Network, bool]:
    """A network for samples of a shape; and whether masking its filters is masking their norms."""
    kit = Kit(rng, len(shape) - 1)
    parts: list[nn.Module] = []
    channels = shape[0]
    for i in range(int(rng.integers(1, 4))):
        kinds = SIMPLE if i == 0 or rng.random() < 0.5 else ODD
        if kinds is ODD and kit.axes == 2:
            kinds = (*ODD, Spatial, Spatial, Transposed)
        parts.append(kit.pick(*kinds)(kit, channels))
        channels = parts[-1].out
    pool = kit.pick("mean", "flatten") if kit.axes else "none"
    with torch.no_grad():
        x = torch.randn(2, *shape)
        for part in parts:
            x = part.eval()(x)
        width = x.flatten(1).shape[1] if pool != "mean" else channels
    n_outputs = 1 if head.startswith("one_logit") else n_classes
    place = int(rng.integers(len(parts)))
    made = Network(parts, pool, width, n_outputs, head, fault, place)
    return made, kit.zero and all(type(part) in MASKABLE for part in parts)


def fitted(body: Network, x: Tensor, codes: np.ndarray, head: str) -> Network:
    """Set the output layer by least squares, so that the network is right about its samples."""
    with torch.no_grad():
        h = body.features(x.clone()).double()
        h = h + 1e-9
        centred = h - h.mean(0)
        y = torch.as_tensor(codes)
        target = F.one_hot(y).double() if body.fc.out_features > 1 else y.double()[:, None]
        target = 6 * (target - target.mean(0))
        gram = centred.T @ centred
        gram += 1e-2 * gram.diagonal().mean().clamp_min(1e-6) * torch.eye(len(gram)).double()
        coef = torch.linalg.solve(gram, centred.T @ target)
        body.fc.weight.copy_(coef.T)
        body.fc.bias.copy_(-h.mean(0) @ coef)
        for kept in ("calls", "kept"):
            body.__dict__.pop(kept, None)
    return body


def finished(body: Network, head: str, fault: Fault | None) -> nn.Module:
    """The module that the user has, with the fault that concerns it as a whole."""
    module: nn.Module = body
    if head == "sequential_softmax":
        module = nn.Sequential(body, nn.Softmax(dim=1))
    if fault is not None and fault.finish is not None:
        fault.finish(module)
    return module


def probabilities(output: Any, head: str) -> Tensor:
    """Probabilities of the classes, from what the network gives."""
    if head == "dict":
        output = output["logits"]
    elif head == "namespace":
        output = output.logits
    elif head in ("tuple", "pair"):
        output = output[0]
    output = output.double()
    if head.startswith("one_logit"):
        output = output.reshape(len(output))
        p = output if head.endswith("sigmoid") else output.sigmoid()
        return torch.stack([1 - p, p], 1)
    if head in ("log_softmax", "log_of_softmax"):
        return output.exp()
    if head == "clamped_softmax":
        return output / output.sum(1, keepdim=True)
    if "softmax" in head or head == "sigmoid":
        return output
    return output.softmax(1)


def norm_behind(parts: dict[str, nn.Module], name: str) -> nn.Module | None:
    """The norm of the block's own behind a layer, if it has one."""
    block, _, layer = name.rpartition(".")
    if layer in ("conv", "one"):
        found = parts.get(f"{block}.norm")
        if isinstance(found, nn.modules.batchnorm._BatchNorm):
            return found
    return None
