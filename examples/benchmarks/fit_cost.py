"""How a fit's time grows with images, classes and clusters.

One quantity varies at a time; images are made up and nobody trained the network, since shapes
decide. ``passes`` is the time of the fit over that of one pass of the base over the images; the
slope is that of log(seconds) over log(quantity): 1 is linear growth::

    python -m benchmarks fit_cost
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from . import study as base
from .figures import COLOURS, panels, save
from .library import FrozenModel, SemanticClusterer, pruner, routed, vgg16
from .record import RESULTS, Table, read
from .summary import Summary, show

NAME = "fit_cost"
AXES = ("images", "classes", "clusters")
KEYS = ("estimator", "axis", *AXES)
VALUES = ("seconds", "passes")
START = {"images": 5_000, "classes": 100, "clusters": 10}
POINTS = {"images": (2_500, 5_000, 10_000, 20_000), "classes": (30, 100, 300)}
POINTS |= {"clusters": (5, 10, 20)}
QUESTION = "What does a fit cost?"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then draw and say what was found."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--quick", action="store_true", help="two small fits")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of CSV and PNG files")
    made.add_argument("--show", action="store_true", help="only say what the CSV file holds")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    path = options.out / f"{NAME}.csv"
    if not options.show:
        table = Table(path, KEYS, VALUES)
        for row in tqdm([row for row in _plan(options.quick) if row not in table], unit=" fits"):
            table.add(**row, **measure(row, 1 / 16))
    draw(path)
    show(summary(path))


def _plan(quick: bool) -> Iterator[dict[str, Any]]:
    start = {"images": 120, "classes": 8, "clusters": 2} if quick else START
    points = {"images": (120, 240)} if quick else POINTS
    for estimator in ("DCSPruner", "SINFClassifier"):
        for axis, values in points.items():
            for value in values if (estimator, axis) != ("DCSPruner", "clusters") else ():
                yield {"estimator": estimator, "axis": axis, **start, axis: value}


def measure(row: Mapping[str, Any], width: float) -> dict[str, str]:
    """Seconds of one fit with a fixed size, and how many passes over the images that is."""
    n, k = row["images"], row["classes"]
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    y = np.arange(n) % k
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FrozenModel(vgg16(k, width=width), [0.5] * 3, [0.25] * 3)
    one = pruner(budget=0.5)
    if row["estimator"] == "DCSPruner":
        estimator: Any = one.set_params(model=model)
    else:
        clusterer = SemanticClusterer(n_clusters=row["clusters"])
        estimator = routed(model, clusterer=clusterer, pruner=one, route_layer="features.24")
    estimator.set_params(random_state=0)
    module = model.module().eval()
    start = time.perf_counter()
    with torch.inference_mode():
        for x in base.raw_batches(X):
            module(x)
    one_pass = time.perf_counter() - start
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nobody trained the network
        estimator.fit(X, y)
    seconds = time.perf_counter() - start
    return {"seconds": f"{seconds:.3f}", "passes": f"{seconds / one_pass:.1f}"}


def slope(rows: Sequence[Mapping[str, str]], axis: str) -> float:
    """Of log(seconds) over log(quantity)."""
    x, y = (np.log([float(row[k]) for row in rows]) for k in (axis, "seconds"))
    return float(np.polyfit(x, y, 1)[0])


def _groups(path: Path) -> dict[tuple[str, str], list[dict[str, str]]]:
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read(path):
        groups.setdefault((row["estimator"], row["axis"]), []).append(row)
    return {key: rows for key, rows in groups.items() if len(rows) > 1}


def summary(path: Path) -> Summary:
    """Seconds, passes and slope by estimator and quantity."""
    cells, rows, worst = [], read(path), 0.0
    for (estimator, axis), own in _groups(path).items():
        ends = sorted(own, key=lambda row: float(row[axis]))
        worst = max(worst, slope(own, axis))
        cells.append(
            [
                estimator,
                f"{axis}, {ends[0][axis]} to {ends[-1][axis]}",
                f"{ends[0]['seconds']} to {ends[-1]['seconds']}",
                f"{ends[0]['passes']} to {ends[-1]['passes']}",
                f"{slope(own, axis):.2f}",
            ]
        )
    answer = f"The steepest growth has slope {worst:.2f}."
    header = ["", "quantity", "seconds", "passes", "slope"]
    note = "VGG16 of 1/16 of the width, made-up images, a fixed size."
    return Summary(
        NAME, QUESTION, answer, note, header, cells, rows, path.with_suffix(".png")
    )  # fmt: skip


def draw(path: Path) -> Path:
    """Seconds against each quantity."""
    groups = _groups(path)
    axes_shown = list(dict.fromkeys(axis for _, axis in groups))
    figure, axes = panels(max(1, len(axes_shown)), width=3.0)
    for axis, name in zip(axes, axes_shown, strict=False):
        for estimator, colour in zip(("DCSPruner", "SINFClassifier"), COLOURS, strict=False):
            points = [
                (float(row[name]), float(row["seconds"]))
                for row in groups.get((estimator, name), [])
            ]
            if points:
                axis.plot(*np.transpose(sorted(points)), "o-", color=colour, label=estimator)
        axis.set(xscale="log", yscale="log", xlabel=name)
    axes[0].set_ylabel("seconds")
    axes[0].legend(fontsize=7)
    return save(figure, path.with_suffix(".png"))
