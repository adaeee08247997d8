"""Predict under load: many threads, forked and spawned workers, and more images than memory is for.

    python tests/load_check.py --threads 8 --predictions 10000 --images 100000

Answers are compared with those of a single thread, and memory is measured at the half and at the
end.  The process ends with 1 where they differ, or memory grows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from helpers import blobs, small_cnn
from torch import nn

from sinfkit import DCSPruner, FrozenModel, RoutingOptions, SemanticClusterer, SINFClassifier

GROWTH = 16 * 2**20  # bytes that memory may grow by in the second half of many predictions
TOLERANCE = 1e-5


def classifier() -> SINFClassifier:
    """A routed classifier whose unsure samples run two subgraphs."""
    X, y = blobs(per_class=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its network is not trained
        return SINFClassifier(
            FrozenModel(small_cnn()),
            clusterer=SemanticClusterer(n_clusters=3),
            pruner=DCSPruner(criterion="dcs", schedule="linear"),
            route_layer="3",
            fallback="top2",
            batch_size=32,
            random_state=0,
            options=RoutingOptions(confidence_threshold=0.5),
        ).fit(X, y)


class Requests:
    """Predictions of mixed sizes, and what a single thread answers."""

    def __init__(self, clf: SINFClassifier, n: int = 64, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        sizes = rng.integers(1, 97, n)  # up to three batches
        self.samples = [rng.normal(size=(k, 1, 8, 8)).astype(np.float32) for k in sizes]
        self.expected = [clf.predict_proba(x) for x in self.samples]

    def differ(self, clf: SINFClassifier, i: int) -> float:
        """Largest difference in the answer to the i-th request."""
        i %= len(self.samples)
        return float(np.abs(clf.predict_proba(self.samples[i]) - self.expected[i]).max())


def resident(kind: str = "VmRSS") -> int:
    """Bytes in memory: all, or without those of mapped files (``"RssAnon"``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {kind}")


def in_threads(clf: SINFClassifier, n_threads: int, n: int) -> dict[str, float]:
    """Answer `n` requests in threads: largest difference, and memory at the half and the end."""
    requests = Requests(clf)
    half = n // 2
    start = time.perf_counter()
    with ThreadPoolExecutor(n_threads) as pool:
        worst = max(pool.map(lambda i: requests.differ(clf, i), range(half)))
        at_half = resident()
        worst = max(worst, *pool.map(lambda i: requests.differ(clf, i), range(half, n)))
    return {
        "predictions": n,
        "difference": worst,
        "at half": at_half,
        "at end": resident(),
        "growth": resident() - at_half,
        "seconds": time.perf_counter() - start,
    }


_given: tuple[SINFClassifier, Requests] | None = None


def _give(path: str | None) -> None:
    """Load the classifier in a spawned worker; a forked one has it."""
    global _given
    if path is not None:
        _given = joblib.load(path)
    signal.alarm(300)  # a worker that hangs ends


def _answer(numbers: range) -> tuple[float, int, int]:
    """Answer requests: largest difference, and memory at the half and the end."""
    assert _given is not None
    clf, requests = _given
    first, second = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    worst = max(requests.differ(clf, i) for i in first)
    at_half = resident()
    return max(worst, *(requests.differ(clf, i) for i in second)), at_half, resident()


def in_processes(clf: SINFClassifier, method: str, n_workers: int, n: int) -> dict[str, float]:
    """Answer `n` requests in forked or spawned workers, after torch has used threads here."""
    global _given
    _given = clf, Requests(clf, min(64, n))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # which a fork leaves behind, and its child would wait for for ever
    clf.predict_proba(np.zeros((640, 1, 8, 8), np.float32))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = None
        if method == "spawn":
            path = str(Path(folder) / "given.joblib")
            joblib.dump(_given, path)
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(n_workers, context, _give, (path,)) as pool:
            found = list(pool.map(_answer, [range(i, n, n_workers) for i in range(n_workers)]))
    _given = None
    torch.set_num_threads(threads)
    return {
        "predictions": n,
        "difference": max(worst for worst, _, _ in found),
        "growth": max(end - half for _, half, end in found),
        "seconds": time.perf_counter() - start,
    }


@contextmanager
def _peak() -> Iterator[dict[str, int]]:
    """Watch the largest amount of memory, mapped files aside."""
    found = {"before": resident("RssAnon"), "peak": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found["peak"] = max(found["peak"], resident("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def mapped(n_images: int, side: int = 16, batch_size: int = 256) -> dict[str, float]:
    """Predict images from a memory-mapped file, and measure what memory that takes."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(6), 20)
    X = rng.integers(0, 255, (len(y), 3, side, side), dtype=np.uint8)
    network = small_cnn()
    network[0] = nn.Conv2d(3, 8, 3, padding=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clf = SINFClassifier(
            FrozenModel(network, mean=[0.5] * 3, std=[0.25] * 3),
            clusterer=SemanticClusterer(n_clusters=3),
            pruner=DCSPruner(criterion="dcs", schedule="linear"),
            route_layer="3",
            batch_size=batch_size,
            random_state=0,
        ).fit(X, y)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        images = np.lib.format.open_memmap(path, "w+", np.uint8, (n_images, 3, side, side))
        for i in range(0, n_images, 1000):
            some = images[i : i + 1000]
            some[:] = rng.integers(0, 255, some.shape, dtype=np.uint8)
        del images, some
        images = np.load(path, mmap_mode="r")
        few = np.array(images[: 4 * batch_size])
        expected = clf.predict(few)  # and whatever the first call needs stays
        start = time.perf_counter()
        with _peak() as memory:
            found = clf.predict(images)
        seconds = time.perf_counter() - start
        return {
            "images": n_images,
            "bytes of file": path.stat().st_size,
            "growth": memory["peak"] - memory["before"],
            "bytes of answer": n_images * 6 * 4 * 2 + found.nbytes,
            "bytes of a batch": batch_size * 3 * side * side * 4,
            "difference": float((found[: len(few)] != expected).sum()),
            "seconds": seconds,
        }


def show(title: str, figures: dict[str, Any], limit: float) -> bool:
    """Print the figures; whether they are as they should be."""
    fine = figures["difference"] <= TOLERANCE and figures["growth"] <= limit
    print(f"{title}: {'ok' if fine else 'FAILED'}")
    for name, value in figures.items():
        unit = value / 2**20 if "growth" in name or "at " in name or "bytes" in name else value
        print(f"    {name:16} {unit:,.6g}{' MiB' if unit is not value else ''}")
    return fine


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--predictions", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=100_000)
    arguments = parser.parse_args()
    clf = classifier()
    figures = mapped(arguments.images)
    # The answers are held twice while they are joined; a batch is held in each layer.
    limit = figures["bytes of answer"] + 16 * figures["bytes of a batch"]
    fine = show(f"{arguments.images:,} memory-mapped images", figures, limit)
    figures = in_threads(clf, arguments.threads, arguments.predictions)
    fine &= show(f"{arguments.threads} threads", figures, GROWTH)
    for method in ("fork", "spawn"):
        figures = in_processes(clf, method, arguments.workers, arguments.predictions)
        fine &= show(f"{arguments.workers} workers ({method})", figures, GROWTH)
    return 0 if fine else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    sys.exit(main())
