"""What Dask's workers cost: bytes of a pickled classifier, and seconds beside this process.

Random images and an untrained network: what is measured does not depend on either. On one machine
the workers share its cores, so this shows what has to be paid for them, not what more machines
would bring::

    python -m benchmarks workers --width 0.5 --images 1000
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed, parallel_config

from .library import FrozenModel, SemanticClusterer, SINFClassifier, pruner, routed, vgg16


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=float, default=0.5, help="of the VGG16")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--clusters", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise SystemExit('this table needs Dask: pip install "dask[array]" distributed') from error
    warnings.simplefilter("ignore")  # that nobody trained the network
    torch.set_num_threads(1)  # as each of the workers has
    X = np.random.default_rng(0).integers(0, 256, (options.images, 3, 32, 32), dtype=np.uint8)
    y = np.arange(len(X)) % options.classes
    factory = partial(vgg16, options.classes, width=options.width)

    def classifier(model: FrozenModel) -> SINFClassifier:
        return routed(
            model,
            clusterer=SemanticClusterer(n_clusters=options.clusters),
            pruner=pruner(budget=0.5),
            route_layer="features.24",
            batch_size=64,
            random_state=0,
        )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(factory().state_dict(), path)
        models = {
            "in memory": FrozenModel(factory()),
            "of a file": FrozenModel.from_file(path, factory),
        }
        for name, model in models.items():
            size = len(pickle.dumps(classifier(model)))
            print(f"classifier before fit, FrozenModel {name}: {size / 1e3:,.1f} kB")
        fitted = classifier(models["of a file"])
        print(f"fit here, one thread: {seconds(lambda: fitted.fit(X, y)):.1f} s")
        print(f"predict here, one thread: {seconds(lambda: fitted.predict(X)):.1f} s")
        start = time.perf_counter()
        with (
            LocalCluster(options.workers, threads_per_worker=1, dashboard_address=None) as cluster,
            Client(cluster) as client,
            parallel_config("dask"),
        ):
            client.run(warm_up)
            print(f"workers up, sinfkit imported: {time.perf_counter() - start:.1f} s")
            empty = seconds(lambda: Parallel(batch_size=1)(delayed(int)() for _ in range(200)))
            print(f"an empty job: {empty / 200 * 1e3:.1f} ms")
            for name, model in models.items():
                took = seconds(lambda m=model: classifier(m).fit(X, y))
                print(f"fit on {options.workers} workers, FrozenModel {name}: {took:.1f} s")
            print(f"predict on them: {seconds(lambda: fitted.predict(X)):.1f} s")


def warm_up() -> None:
    """Make a worker ready."""
    import sinfkit  # noqa: F401


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
