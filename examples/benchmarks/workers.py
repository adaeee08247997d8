"""What it costs to work on Dask's workers: bytes that are pickled, and time, beside this process.

Random images and an untrained network: what is measured does not depend on either. On one machine
the workers share its cores, so nothing here shows what more machines would bring; it shows what
has to be paid for them.

    python workers.py --width 0.5 --images 1000
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch
from distributed import Client, LocalCluster
from joblib import Parallel, delayed, parallel_config

import sinfkit.routing.builder as builder
import sinfkit.utils.jobs as _jobs
from sinfkit import DCSPruner, FrozenModel, SemanticClusterer, SINFClassifier, vgg16


class Bytes:
    """Counts what jobs pickle to: what they share, and what each has of its own."""

    def __init__(self) -> None:
        self.shared: list[int] = []
        self.own: list[int] = []
        self.back: list[int] = []

    def __call__(self, jobs: Any, n_jobs: int | None) -> list[Any]:
        """Run jobs as `sinfkit.utils.run` does, and count."""
        jobs = list(jobs)
        for _, arguments, _ in jobs:
            sizes = [len(cloudpickle.dumps(a)) for a in arguments]
            is_shared = [isinstance(a, _jobs.Shared) for a in arguments]
            self.shared.append(sum(n for n, s in zip(sizes, is_shared, strict=True) if s))
            self.own.append(sum(n for n, s in zip(sizes, is_shared, strict=True) if not s))
        results = _RUN(jobs, n_jobs)
        self.back += [len(cloudpickle.dumps(r)) for r in results]
        return results


_RUN = _jobs.run


@contextmanager
def counted() -> Iterator[Bytes]:
    """Count the bytes of the jobs that run inside."""
    found = Bytes()
    _jobs.run = builder.run = found
    try:
        yield found
    finally:
        _jobs.run = builder.run = _RUN


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=0.5, help="of the VGG16")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--clusters", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # as each of the workers has
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (options.images, 3, 32, 32), dtype=np.uint8)
    y = np.arange(len(X)) % options.classes
    factory = partial(vgg16, options.classes, width=options.width)

    def classifier(model: FrozenModel) -> SINFClassifier:
        return SINFClassifier(
            model,
            clusterer=SemanticClusterer(n_clusters=options.clusters),
            pruner=DCSPruner(),
            route_layer="features.24",
            batch_size=64,
            random_state=0,
        )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(factory().state_dict(), path)
        named, held = FrozenModel.from_file(path, factory), FrozenModel(factory())
        print(f"VGG16 of width {options.width}, {path.stat().st_size / 1e6:.1f} MB of weights")
        for name, model in (("in memory", held), ("of a file", named)):
            print(f"classifier before fit, FrozenModel {name}: {kilobytes(classifier(model))}")
        print(f"file read, checked and built: {seconds(named._source.load):.2f} s")

        start = time.perf_counter()
        with (
            LocalCluster(options.workers, threads_per_worker=1, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            client.run(_import)
            print(f"workers up, torch and sinfkit imported: {time.perf_counter() - start:.1f} s")
            with parallel_config("dask"):
                n = 200
                took = seconds(lambda: Parallel(batch_size=1)(delayed(int)() for _ in range(n)))
                print(f"an empty job: {took / n * 1e3:.1f} ms")
            fitted = classifier(named)
            print(f"fit here, one thread: {seconds(lambda: fitted.fit(X, y)):.1f} s")
            print(f"predict here, one thread: {seconds(lambda: fitted.predict_proba(X)):.1f} s")
            for name, model in (("in memory", held), ("of a file", named)):
                with parallel_config("dask"):
                    took = seconds(lambda m=model: classifier(m).fit(X, y))
                    with counted() as found:
                        classifier(model).fit(X, y)
                print(
                    f"fit, FrozenModel {name}: {took:.1f} s, {len(found.own)} jobs; shared "
                    f"{max(found.shared) / 1e6:.2f} MB once per worker and round of jobs, "
                    f"{sum(found.own) / 1e6:.2f} MB of their own in all, "
                    f"{sum(found.back) / 1e6:.2f} MB back"
                )
            with parallel_config("dask"):
                first = seconds(lambda: fitted.predict_proba(X))
                with counted() as found:
                    fitted.predict_proba(X)
            print(
                f"predict: {first:.1f} s, {len(found.own)} chunks; shared "
                f"{max(found.shared) / 1e6:.2f} MB once per worker, {sum(found.own) / 1e6:.2f} MB "
                f"of images, {sum(found.back) / 1e6:.2f} MB back"
            )


def kilobytes(thing: Any) -> str:
    """Size of a pickle."""
    return f"{len(pickle.dumps(thing)) / 1e3:,.1f} kB"


def _import() -> None:
    """Make a worker ready."""
    import sinfkit  # noqa: F401


if __name__ == "__main__":
    main()
