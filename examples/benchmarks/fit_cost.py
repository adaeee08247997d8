"""What a fit costs: time and memory by number of images, classes, clusters and threads.

Each point runs in a process of its own, so that its peak of memory is its own. Images are made up,
the network is a narrow VGG16 that nobody trained: shapes decide about the cost, not accuracies::

    python fit_cost.py
    python fit_cost.py --profile SINFClassifier classes 1000
    python fit_cost.py --quick

One quantity varies at a time, the others have the values of ``BASE``. Slopes are those of
log(seconds) over log(quantity): 1 is linear growth.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _paper  # noqa: F401
import figures
import numpy as np
import rst
import torch
from matplotlib.ticker import LogLocator
from record import Table, read
from study import RESULTS
from tqdm.auto import tqdm

from sinfkit import DCSPruner, FrozenModel, SemanticClusterer, SINFClassifier, vgg16

NAME = "fit_cost"
ESTIMATORS = ("SINFClassifier", "DCSPruner")
AXES = ("images", "classes", "clusters", "n_jobs")
KEYS = ("estimator", "axis", *AXES)
VALUES = ("seconds", "cpu_seconds", "before_mb", "peak_mb")
BASE = {"images": 10_000, "classes": 100, "clusters": 10, "n_jobs": 1}
POINTS: dict[str, tuple[int, ...]] = {
    "images": (5_000, 10_000, 20_000, 50_000),
    "classes": (10, 30, 100, 300, 1_000),
    "clusters": (2, 5, 10, 20, 50, 100),
    "n_jobs": (1, 2),
}
QUICK_BASE = {"images": 240, "classes": 8, "clusters": 2, "n_jobs": 1}
QUICK_POINTS = {"images": (120, 240), "classes": (), "clusters": (), "n_jobs": ()}
_WIDTH = 1 / 16  # of VGG16: 4 to 32 channels


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print slopes and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=ESTIMATORS)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--profile", nargs=3, metavar=("ESTIMATOR", "AXIS", "VALUE"))
    parser.add_argument("--point", help=argparse.SUPPRESS)  # one point, in a process of its own
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few small points")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of CSV and PNG files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.point:
        print(json.dumps(measure(json.loads(options.point))))
        return
    if options.profile:
        estimator, axis, value = options.profile
        profile({"estimator": estimator, **_base(options.quick), axis: int(value)})
        return
    path = options.out / f"{NAME}.csv"
    table = Table(path, KEYS, VALUES)
    rows = [row for row in plan(options) if row not in table]
    for row in tqdm(rows, unit=" fits"):
        table.add(**row, **_in_own_process(row, options.threads))
    for line in slopes(read(path)):
        print("{estimator}, {axis}: slope {slope:.2f}, last step {last:.2f}".format(**line))
    draw(path)
    print(path)


def _base(quick: bool) -> dict[str, int]:
    return QUICK_BASE if quick else BASE


def plan(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Keys of all rows."""
    points = QUICK_POINTS if options.quick else POINTS
    for estimator in options.estimators:
        for axis in options.axes:
            if estimator == "DCSPruner" and axis in ("clusters", "n_jobs"):
                continue  # it has neither
            for value in points[axis]:
                yield {"estimator": estimator, "axis": axis, **_base(options.quick), axis: value}


def _in_own_process(row: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Measure a point where nothing else has been."""
    command = [sys.executable, __file__, "--threads", str(threads), "--point", json.dumps(row)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the fit {dict(row)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(row: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a fit, by the clock and of all cores; memory before it and at its peak, in MB."""
    X, y = made_up(row["images"], row["classes"])
    estimator = _estimator(row)
    before = _peak_mb()
    start, started = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nobody trained the network
        estimator.fit(X, y)
    seconds, busy = time.perf_counter() - start, time.process_time() - started
    return {
        "seconds": f"{seconds:.3f}",
        "cpu_seconds": f"{busy:.3f}",
        "before_mb": f"{before:.0f}",
        "peak_mb": f"{_peak_mb():.0f}",
    }


def _peak_mb() -> float:
    """Largest resident size so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def made_up(n: int, n_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of 32 x 32 pixels, a pattern for each class, and noise; all classes equally often."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(60, 196, (n_classes, 3, 8, 8), dtype=np.uint8)
    y = np.arange(n) % n_classes
    X = patterns[y].repeat(4, axis=2).repeat(4, axis=3)
    X += rng.integers(0, 60, X.shape, dtype=np.uint8)
    return X, y


def _estimator(row: Mapping[str, Any]) -> Any:
    """What is fitted: sizes given, so that nothing is searched; the rest by default."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FrozenModel(vgg16(row["classes"], width=_WIDTH))
    if row["estimator"] == "DCSPruner":
        return DCSPruner(model, max_ratio=0.5, device="cpu", random_state=0)
    return SINFClassifier(
        model,
        clusterer=SemanticClusterer(n_clusters=row["clusters"]),
        pruner=DCSPruner(min_ratio=0.3, max_ratio=0.5),
        device="cpu",
        n_jobs=row["n_jobs"],
        random_state=0,
    )


def profile(row: Mapping[str, Any], n: int = 15) -> None:
    """Print the functions of a fit that take the longest by themselves, and with what they call."""
    X, y = made_up(row["images"], row["classes"])
    estimator, watched = _estimator(row), cProfile.Profile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        watched.runcall(estimator.fit, X, y)
    found = pstats.Stats(watched)
    found.sort_stats("tottime").print_stats(n)
    found.sort_stats("cumulative").print_stats("sinfkit", 2 * n)


def slopes(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Growth by quantity: over all points by least squares, and between the last two.

    What a fit takes anyhow flattens the first; the second says more of what is to come.
    """
    found = []
    for (estimator, axis), own in _curves(rows).items():
        if len(own) < 2 or axis == "n_jobs":
            continue
        x = np.log([float(row[axis]) for row in own])
        for unit in ("seconds", "peak_mb"):
            y = np.log([_used(row, unit) for row in own])
            slope = float(np.polyfit(x, y, 1)[0])
            last = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
            if unit == "seconds":
                found.append({"estimator": estimator, "axis": axis, "slope": slope, "last": last})
            else:
                found[-1] |= {"memory": slope, "memory_last": last}
    return found


def _used(row: Mapping[str, str], unit: str) -> float:
    """Seconds, or memory beyond that of images and libraries; at least 1."""
    if unit == "seconds":
        return float(row["seconds"])
    return max(float(row["peak_mb"]) - float(row["before_mb"]), 1.0)


def _curves(
    rows: Sequence[Mapping[str, str]],
) -> dict[tuple[str, str], list[Mapping[str, str]]]:
    """Rows by estimator and quantity, ascending."""
    found: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault((row["estimator"], row["axis"]), []).append(row)
    return {
        key: sorted(own, key=lambda row: int(row[key[1]])) for key, own in sorted(found.items())
    }


def draw(path: Path) -> Path | None:
    """Seconds, and memory beyond the start, against each quantity."""
    curves = _curves(read(path))
    axes_shown = [a for a in AXES if a != "n_jobs" and any(axis == a for _, axis in curves)]
    if not axes_shown:
        return None
    n = len(axes_shown)
    figure, axes = figures.plt.subplots(
        2,
        n,
        figsize=(2.9 * n + 0.6, 5.4),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    colour = dict(zip(ESTIMATORS, figures.COLOURS, strict=False))
    for j, axis in enumerate(axes_shown):
        for i, unit in enumerate(("seconds", "peak_mb")):
            for estimator in ESTIMATORS:
                own = curves.get((estimator, axis), [])
                if own:
                    x, y = [int(r[axis]) for r in own], [_used(r, unit) for r in own]
                    axes[i, j].plot(x, y, "o-", color=colour[estimator], label=estimator)
            axes[i, j].set(xscale="log", yscale="log")
            axes[i, j].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes[i, j].yaxis.set_major_formatter("{x:g}")
            axes[i, j].minorticks_off()
            _linear(axes[i, j])
        values = sorted(
            {int(row[axis]) for (_, a), own in curves.items() if a == axis for row in own}
        )
        axes[1, j].set_xticks(values, [f"{v:,}" for v in values], rotation=45, ha="right")
        axes[1, j].set_xlabel(axis)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("memory beyond the start (MB)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8)
    return figures.save(figure, path.with_suffix(".png"))


def _linear(axis: Any) -> None:
    """A dashed line of slope 1 through the last point of the upper curve."""
    lines = axis.get_lines()
    if lines:
        x = np.asarray(lines[0].get_xdata(), dtype=float)
        y = np.asarray(lines[0].get_ydata(), dtype=float)
        axis.plot(x, y[-1] * x / x[-1], "--", color="0.6", linewidth=1, label="linear")


def page(folder: Path) -> rst.Page | None:
    """The page, where there is a file in the folder."""
    path = folder / f"{NAME}.csv"
    rows = read(path) if path.exists() else []
    image = draw(path) if rows else None
    if image is None:
        return None
    seen = rows[0]
    body = [
        f"Measured {seen['date']} on {seen['processor']}, threads: {seen['threads']}, with sinfkit "
        f"{seen['sinfkit']}, torch {seen['torch']}, Python {seen['python']}.\n",
        rst.figure(image.name, "Seconds and memory of a fit against its sizes."),
    ]
    header = ["", "quantity", "slope of time", "at the last step", "slope of memory"]
    cells = [
        [line["estimator"], line["axis"]]
        + [f"{line[k]:.2f}" for k in ("slope", "last", "memory", "memory_last")]
        for line in slopes(rows)
    ]
    title = "Slopes of log over log: 1 is linear growth"
    body.append(rst.list_table([*header, "at the last step"], cells, title))
    cells = [
        [*(row[k] for k in KEYS)]
        + [f"{float(row[k]):.1f}" for k in ("seconds", "cpu_seconds")]
        + [row["before_mb"], row["peak_mb"]]
        for row in rows
    ]
    header = ["", "varied", *AXES, "seconds", "of all cores", "MB before", "MB at the peak"]
    body.append(rst.list_table(header, cells, "All points"))
    return rst.Page(NAME, "Cost of a fit", "\n".join([_INTRODUCTION, *body]))


_INTRODUCTION = """\
Seconds and peak of memory of ``SINFClassifier.fit`` and ``DCSPruner.fit`` on made-up images of
32 x 32 pixels and a VGG16 of a sixteenth of the width that nobody trained. Filters removed: 30 to
50 %, sizes given, nothing searched but the route layer. One quantity varies at a time. Each point
ran in a process of its own; memory before the fit has the images and the libraries in it.

``python examples/benchmarks/fit_cost.py``
"""


if __name__ == "__main__":
    main()
