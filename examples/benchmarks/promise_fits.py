"""Is the promise kept by real fits? Small networks, and images without end to check them on.

Three networks on images that can be drawn without end, so that the true loss is known to a
fraction of a point: `plain` and `residual` on made-up patterns of twelve classes that overlap,
`depthwise` on scikit-learn's digits, shifted and under noise (the base learns from half of them,
all else uses the other half). Each way of fitting gets 100 to 2,000 calibration images::

    python -m benchmarks promise_fits
    python -m benchmarks promise_fits --quick      # a few fits, in a minute

Of the certified fits at most one in ten may lose more than asked. The others say that they are
not certified.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn

from .library import DCSPruner, FrozenModel, SemanticClusterer, SINFClassifier, train_network
from .record import RESULTS, Table, read

NAME = "promise_fits"
KEYS = ("network", "way", "images", "limit", "seed")
VALUES = (
    *("base_accuracy", "lost", "gained", "test_images", "drop", "seen", "certified", "bound"),
    *("exceeds", "speedup", "warned", "seconds"),
)
WAYS = ("search", "iterative", "budget 0.7", "budget 0.4", "sinf", "sinf 2", "sinf 4")
# The same images, and what would be taken if nothing had to be shown: half of the time it is wrong.
RAW = tuple(f"raw {way}" for way in WAYS if "budget" not in way)
SIZES = (100, 200, 400, 800, 1400, 2000)
EPOCHS, TRAINING_IMAGES, TEST_IMAGES = 12, 4_000, 20_000
CONFIDENCE, RAW_CONFIDENCE = 0.9, 0.5


def block(n_in: int, n_out: int, stride: int = 1, groups: int = 1, size: int = 3) -> nn.Sequential:
    """A convolution with its normalisation and ReLU."""
    convolution = nn.Conv2d(n_in, n_out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(n_out), nn.ReLU())


def head(n_in: int, n_classes: int) -> list[nn.Module]:
    """What follows the convolutions."""
    return [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * n_in, n_classes)]


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = block(n_in, n_out, stride), block(n_out, n_out)[:2]
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add both ways."""
        return torch.relu(self.shortcut(x) + self.second(self.first(x)))


def plain() -> nn.Module:
    """Five convolutions."""
    widths = ((3, 12, 1), (12, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1))
    return nn.Sequential(*(block(*w) for w in widths), *head(32, 12))


def residual() -> nn.Module:
    """Three blocks with shortcuts."""
    widths = ((12, 16, 2), (16, 24, 2), (24, 32, 1))
    return nn.Sequential(block(3, 12), *(Residual(*w) for w in widths), *head(32, 12))


def depthwise() -> nn.Module:
    """Three pairs of a depthwise and a pointwise convolution."""
    layers: list[nn.Module] = [block(1, 16)]
    for n_in, n_out, stride in ((16, 24, 1), (24, 32, 2), (32, 48, 1)):
        layers += [block(n_in, n_in, stride, groups=n_in), block(n_in, n_out, size=1)]
    return nn.Sequential(*layers, *head(48, 10))


def patterns(n: int, rng: np.random.Generator, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Twelve classes in four families, shifted, of any contrast, under noise: 12 x 12 pixels."""
    fixed = np.random.default_rng(7)
    shared = fixed.normal(0, 1, (4, 3, 6, 6)).repeat(3, axis=0)
    shape = (shared + 0.9 * fixed.normal(0, 1, (12, 3, 6, 6))).repeat(2, axis=2).repeat(2, axis=3)
    y = rng.integers(12, size=n)
    X = shifted(shape[y], rng) * rng.uniform(15, 55, (n, 1, 1, 1))
    return as_pixels(128 + X + rng.normal(0, 55, X.shape)), y


def digits(n: int, rng: np.random.Generator, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's digits, shifted and under noise: 8 x 8 pixels; half of them for training."""
    images, labels = load_digits(return_X_y=True)
    rows = 2 * rng.integers(len(labels) // 2, size=n) + training
    X = shifted(images[rows].reshape(n, 1, 8, 8), rng, 1) * rng.uniform(6, 14, (n, 1, 1, 1))
    return as_pixels(30 + X + rng.normal(0, 30, X.shape)), labels[rows]


def shifted(X: np.ndarray, rng: np.random.Generator, most: int = 2) -> np.ndarray:
    """Each image rolled by up to `most` pixels both ways."""
    n, _, height, width = X.shape
    down, right = rng.integers(-most, most + 1, (2, n, 1, 1))
    rows = (np.arange(height)[:, None] + down) % height
    columns = (np.arange(width)[None] + right) % width
    return X.transpose(0, 2, 3, 1)[np.arange(n)[:, None, None], rows, columns].transpose(0, 3, 1, 2)


def as_pixels(X: np.ndarray) -> np.ndarray:
    """Rounded to uint8."""
    return X.clip(0, 255).astype(np.uint8)


NETWORKS = {
    "plain": (plain, patterns),
    "residual": (residual, patterns),
    "depthwise": (depthwise, digits),
}


@functools.cache
def trained(network: str, n_images: int, folder: Path) -> FrozenModel:
    """The base, on images of its own; a stopped run finds it in the folder."""
    build, images = NETWORKS[network]
    X, y = images(n_images, np.random.default_rng(1), True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    scale = {"mean": [0.5] * X.shape[1], "std": [0.25] * X.shape[1]}
    folder.mkdir(parents=True, exist_ok=True)
    how = {"epochs": EPOCHS, "max_lr": 0.05, "random_state": 0}
    how["checkpoint"] = folder / f"{NAME}_{network}_{n_images}.ckpt"
    return FrozenModel(train_network(model, X, y, **how, **scale), **scale)


@functools.cache
def test_set(network: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Images that measure: the same for all fits of a network."""
    return NETWORKS[network][1](n, np.random.default_rng(3), False)


def estimator(way: str, model: FrozenModel, limit: float, seed: int) -> Any:
    """What is fitted."""
    confidence = RAW_CONFIDENCE if way in RAW else CONFIDENCE
    promise = {"max_accuracy_drop": limit, "confidence": confidence, "random_state": seed}
    kind, _, number = way.removeprefix("raw ").partition(" ")
    if kind == "sinf":
        clusters = {"clusterer": SemanticClusterer(n_clusters=int(number))} if number else {}
        return SINFClassifier(model, **clusters, **promise)
    if kind == "budget":
        return DCSPruner(model, budget=float(number), **promise)
    return DCSPruner(model, schedule="global" if kind == "search" else kind, **promise)


def fit(row: Mapping[str, Any], model: FrozenModel, test_images: int) -> dict[str, Any]:
    """One fit, and what it truly loses."""
    images = NETWORKS[row["network"]][1]
    # New ones in every row, but for its twin that shows nothing.
    way = WAYS.index(row["way"].removeprefix("raw "))
    draw = np.random.default_rng([2, row["images"], row["seed"], way, int(1e4 * row["limit"])])
    X, y = images(row["images"], draw, False)
    X_test, y_test = test_set(row["network"], test_images)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted = estimator(row["way"], model, row["limit"], row["seed"]).fit(X, y)
    seconds = time.perf_counter() - start
    base = base_right(row["network"], model, test_images)
    ours = fitted.predict(X_test) == y_test
    lost, gained = int((base & ~ours).sum()), int((~base & ours).sum())
    drop = (lost - gained) / test_images
    if isinstance(fitted, SINFClassifier):
        report = fitted.report(X_test[:2000], y_test[:2000], repeats=0)
        speedup = report.base_macs / report.macs
    else:
        speedup = 1 / fitted.cost_ratio_
    return {
        "base_accuracy": f"{base.mean():.4f}",
        "lost": lost,
        "gained": gained,
        "test_images": test_images,
        "drop": f"{drop:.5f}",
        "seen": f"{fitted.accuracy_drop_:.5f}",
        "certified": int(fitted.certified_),
        "bound": f"{fitted.certified_drop_:.5f}",
        "exceeds": int(drop > row["limit"]),
        "speedup": f"{speedup:.3f}",
        "warned": " ".join(sorted({w.category.__name__ for w in caught})),
        "seconds": f"{seconds:.1f}",
    }


@functools.cache
def base_right(network: str, model: FrozenModel, test_images: int) -> np.ndarray:
    """Whether the base has each test image right."""
    X, y = test_set(network, test_images)
    with torch.inference_mode():
        pixels = (torch.from_numpy(part).float() / 255 for part in np.array_split(X, 50))
        answers = [model.module()((p - 0.5) / 0.25).argmax(1).numpy() for p in pixels]
    return np.concatenate(answers) == y


def summary(rows: Sequence[Mapping[str, str]]) -> str:
    """What the table says, in words."""
    given_up = _given_up(rows)
    rows = [row for row in rows if row["way"] not in RAW]
    # The base itself loses nothing for sure: it would only make the share look better.
    whole = [r for r in rows if float(r["speedup"]) <= 1]
    smaller = [r for r in rows if float(r["speedup"]) > 1]
    certified = [r for r in smaller if r["certified"] == "1"]
    others = [r for r in smaller if r["certified"] == "0"]
    lines = [f"{len(rows)} fits, confidence {CONFIDENCE:g}; {len(whole)} of them kept the base"]
    if certified:
        k, n = exceeding(certified), len(certified)
        low, high = stats.binomtest(k, n).proportion_ci(0.95, "exact")
        speed = np.median([float(r["speedup"]) for r in certified])
        lines += [
            f"certified: {n}; {k} of them ({k / n:.1%}, exact interval {low:.1%} to {high:.1%}) "
            f"lose more than asked; median speed-up {speed:.2f} in multiplications"
        ]
    for name, part in (
        ("a size that was searched", [r for r in others if "budget" not in r["way"]]),
        ("a size that was asked for", [r for r in others if "budget" in r["way"]]),
    ):
        drops = [float(r["drop"]) / float(r["limit"]) for r in part]
        silent = sum("PromiseWarning" not in r["warned"] for r in part)
        if part:
            lines += [
                f"not certified, {name}: {len(part)}; median loss {np.median(drops):.2f} of the "
                f"limit, {exceeding(part)} lose more than asked, {silent} without a warning"
            ]
    if given_up:
        lines += [
            f"certified, beside the boldest whose raw mean is within the limit: {len(given_up)} "
            f"pairs, median {np.median(given_up):.0%} of the speed-up given up"
        ]
    for column in ("network", "way", "images", "limit"):
        for value in dict.fromkeys(r[column] for r in rows):
            part = [r for r in rows if r[column] == value]
            own = [r for r in certified if r[column] == value]
            speed = np.median([float(r["speedup"]) for r in own]) if own else np.nan
            lines += [
                f"  {column:8}{value:12}{len(part):4} fits {len(own):4} certified and smaller, "
                f"{exceeding(own):3} exceed, speed-up {speed:.2f}"
            ]
    return "\n".join(lines)


def _given_up(rows: Sequence[Mapping[str, str]]) -> list[float]:
    """Share of the raw choice's speed-up that a certified fit on the same images gives up."""
    known = {tuple(row[key] for key in KEYS): row for row in rows}
    found = []
    for row in rows:
        other = known.get(tuple(f"raw {row[k]}" if k == "way" else row[k] for k in KEYS))
        if other is not None and row["certified"] == "1" and float(row["speedup"]) > 1:
            found.append(1 - float(row["speedup"]) / float(other["speedup"]))
    return found


def exceeding(rows: Sequence[Mapping[str, str]]) -> int:
    """How many lose more than asked."""
    return sum(int(r["exceeds"]) for r in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit what is missing, then say what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a few fits")
    parser.add_argument("--show", action="store_true", help="only say what was found")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=(*WAYS, *RAW))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--images", type=int, nargs="+", default=SIZES)
    parser.add_argument("--limits", type=float, nargs="+", default=[0.01, 0.02])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=np.inf, help="stop after that long")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    path = options.out / f"{NAME}{'_quick' * options.quick}.csv"
    if options.quick:
        options.networks, options.images, options.limits = ["depthwise"], [100, 500], [0.05]
        options.ways = ["search", "budget 0.7"]
    n_images, test_images = (1000, 2000) if options.quick else (TRAINING_IMAGES, TEST_IMAGES)
    if not options.show:
        table, start = Table(path, KEYS, VALUES), time.monotonic()
        cells = (range(options.seeds), options.limits, options.images, options.ways)
        for seed, limit, images, way, network in itertools.product(*cells, options.networks):
            row = dict(zip(KEYS, (network, way, images, limit, seed), strict=True))
            if row not in table and time.monotonic() - start < 60 * options.minutes:
                model = trained(network, n_images, options.out)
                table.add(**row, **fit(row, model, test_images))
    print(summary(read(path)))


if __name__ == "__main__":
    main()
