"""
Predict on a Dask array, block by block
=======================================

More images than fit into memory, on as many workers as there are.

``map_blocks`` gives each block of images to a worker; the fitted classifier travels to each worker
once, as one value of the graph. Needs ``pip install "dask[array]" distributed``.

    python examples/dask_predict.py --workers 2
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from sinfkit import SINFClassifier

try:
    import dask
    import dask.array as da
    from distributed import Client, LocalCluster
except ImportError as error:
    raise SystemExit('This example needs Dask: pip install "dask[array]" distributed') from error


def answer(block: np.ndarray, classifier: Any, method: str) -> np.ndarray:
    """What one worker does with one block."""
    result: np.ndarray = getattr(classifier, method)(block)
    return result


def predict(classifier: Any, X: da.Array) -> da.Array:
    """Labels of a Dask array of images, computed when they are asked for."""
    X = X.rechunk({axis: -1 for axis in range(1, X.ndim)})  # a block holds whole images
    return da.map_blocks(
        partial(answer, method="predict"),
        X,
        classifier=dask.delayed(classifier, pure=False),
        drop_axis=list(range(1, X.ndim)),
        dtype=classifier.classes_.dtype,
        meta=np.empty(0, classifier.classes_.dtype),
    )


def predict_proba(classifier: Any, X: da.Array) -> da.Array:
    """Probabilities of a Dask array of images, one column per class."""
    X = X.rechunk({axis: -1 for axis in range(1, X.ndim)})
    return da.map_blocks(
        partial(answer, method="predict_proba"),
        X,
        classifier=dask.delayed(classifier, pure=False),
        drop_axis=list(range(2, X.ndim)),
        chunks=(X.chunks[0], (len(classifier.classes_),)),
        meta=np.empty((0, 0), np.float32),
    )


def main() -> None:
    """Fit here, predict there, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="0: in this process")
    workers = parser.parse_args().workers
    X, y = load_digits(return_X_y=True)
    images = (X / 16).reshape(-1, 1, 8, 8).astype(np.float32)
    classifier = SINFClassifier(random_state=0).fit(images[:1200], y[:1200])
    # In earnest: da.from_zarr, or da.from_array of a memory map; only blocks are ever in memory.
    many = da.from_array(images[1200:], chunks=(100, 1, 8, 8))
    with ExitStack() as stack:
        if workers:
            # One thread per worker: torch has its own, and a GPU serves one process best.
            cluster = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
            stack.enter_context(cluster)
            stack.enter_context(Client(cluster))
        else:
            stack.enter_context(dask.config.set(scheduler="synchronous"))
        labels, probabilities = dask.compute(
            predict(classifier, many), predict_proba(classifier, many)
        )
    print(f"{many.npartitions} blocks, {len(labels)} images, {workers} workers")
    difference = np.abs(probabilities - classifier.predict_proba(images[1200:])).max()
    same = np.mean(labels == classifier.predict(images[1200:]))
    print(f"labels as predicted here: {same:.1%}")
    print(f"largest difference of a probability: {difference:.1e}")


if __name__ == "__main__":
    main()
