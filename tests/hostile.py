"""Values that nobody expects as an argument, drawn by chance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import nn

Rng = np.random.Generator
Make = Callable[[Rng], Any]
HUGE = 10**20


class Returns(nn.Module):
    """A network that gives what it is told to."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.layer = what, nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.layer(x.flatten(1))
        if self.what == "raises":
            return {}["logits"]
        if self.what == "cube":
            return logits[:, :, None]
        return {"tuple": (logits, logits), "none": None, "dict": {"a": logits}}[self.what]


def weights(data: Any, *, penalty: float = 0.0) -> Any:
    return data.weight


def anything(rng: Rng) -> Any:
    """A value of no particular use."""
    values = [
        *(None, True, False, -1, 0, 1, 7, 1.5, -0.25, float("nan"), float("inf"), -float("inf")),
        *("", "abc", "auto", "\0", b"abc", [], (), {}, set(), [[]], [None], ["a", 1], range(3)),
        *(object(), int, len, lambda *a: a, 1j, np.float32(0.3), np.int64(-3), np.bool_(True)),
        *(np.array([]), np.array(2), np.array([1, 2]), np.array(["a"]), np.full((2, 2), np.nan)),
        *(torch.zeros(3), torch.tensor(1), torch.tensor([True]), Ellipsis, NotImplemented),
        *(10**9, HUGE, -HUGE, 1e308, 5e-324, np.datetime64("2020-01-01"), ValueError("x")),
        *(nn.ReLU(), nn.Linear, scipy.sparse.eye(3, format="csr"), slice(2), {"a": 1}),
    ]
    return values[rng.integers(len(values))]


def number(rng: Rng) -> Any:
    """A number, often out of range."""
    scale = 10.0 ** rng.integers(-3, 4)
    drawn = float(rng.normal() * scale)
    return [drawn, int(drawn), np.float32(drawn), str(drawn), np.array([drawn])][rng.integers(5)]


def images(X: np.ndarray) -> Make:
    """Samples that something is wrong with."""

    def make(rng: Rng) -> Any:
        x = X[: rng.integers(1, len(X) + 1)].copy()
        flat = x.reshape(len(x), -1)
        holes = x.copy()
        holes.flat[rng.integers(holes.size)] = [np.nan, np.inf, -np.inf][rng.integers(3)]
        wild = x.astype(np.float64) * 10.0 ** rng.integers(30, 300)
        t = torch.as_tensor(x)
        values = [
            *(x, x[0], x[0, 0], x[:, 0], x[None], x[:0], x[:, :0], x[:, :, :5], x[..., None]),
            *(flat, flat[:, :7], flat[0], x.transpose(0, 2, 3, 1), np.repeat(x, 3, 1), holes, wild),
            *(x.astype(complex), x.astype(object), x.astype(str), x.astype(bool), x.tolist()),
            *(x.astype(np.float16), x.astype(np.int8), x.astype("M8[s]"), x[::-1], x[:, :, ::-1]),
            *(np.asfortranarray(x), np.ma.masked_array(x, x > 0), iter(x), list(x), x.tobytes()),
            *(
                np.array([[1, 2], [3]], dtype=object),
                [[1.0, 2.0], [3.0]],
                scipy.sparse.csr_array(flat),
            ),
            *(np.array(0.5), np.zeros((0,)), np.zeros(3, dtype="f4,f4"), {"X": x}, x.astype(">f4")),
            *(
                t,
                t[0],
                t[0, 0],
                t.T if t.ndim < 3 else t.transpose(1, 3),
                t[:0],
                t.half(),
                t.bool(),
            ),
            *(t.to(torch.complex64), t.to_sparse(), t.long(), t.double() * 1e300, t / 0.0),
            *(t.clone().requires_grad_(), t.to("meta"), t.bfloat16(), t[:, :, :3], t.flatten()),
        ]
        return values[rng.integers(len(values))]

    return make


def labels(y: np.ndarray) -> Make:
    """Labels that something is wrong with."""

    def make(rng: Rng) -> Any:
        n, codes = len(y), y.astype(np.int64) % 4
        mixed = y.astype(object)
        mixed[rng.integers(n)] = [None, "a", np.nan, (1, 2), 1.5][rng.integers(5)]
        values = [
            *(y, y[:-1], y[:0], y[:, None], np.stack([y, y], 1), y * 0, y - 1, y + 100, y + 0.5),
            *(y.astype(float), y.astype(str), y.astype(bytes), y.astype(complex), mixed, y[::-1]),
            *(y.tolist(), tuple(y), iter(y), y.astype("M8[s]"), np.full(n, np.nan), y > 1),
            *(torch.as_tensor(y), torch.as_tensor(y).float() + 0.5, torch.as_tensor(y)[:, None]),
            *(
                np.full(n, ""),
                [[1]] * n,
                np.eye(4)[codes],
                scipy.sparse.csr_array(np.eye(4)[codes]),
                3,
            ),
            *(np.where(y > 0, y.astype(float), np.inf), [None] * n, [{}] * n, y.astype(np.uint64)),
            *(torch.as_tensor(y).to("meta"), torch.as_tensor(y) * 1j, y.reshape(2, -1), y[None]),
        ]
        return values[rng.integers(len(values))]

    return make


def choice(*names: Any) -> Make:
    """One of some values, most of them out of place."""
    return lambda rng: names[rng.integers(len(names))]


def tensors(valid: torch.Tensor) -> Make:
    """Tensors that something is wrong with."""

    def make(rng: Rng) -> Any:
        t = valid.clone()
        values = [
            *(
                t,
                t[:0],
                t[:-1],
                t[0],
                t[None],
                t.numpy(),
                t.tolist(),
                t.to("meta"),
                t.mT if t.ndim > 1 else t,
                t * 0,
            ),
            *(t.to(torch.complex64), t.bool(), t.half(), t.double() * 1e300, t / 0.0, t.flatten()),
            *(t.to_sparse(), t.long(), t.float() + 0.5, t.unsqueeze(-1), t.to(torch.uint8), -t),
        ]
        return values[rng.integers(len(values))]

    return make
