"""
Fit, search and predict on Ray's workers
========================================

Through joblib; the weights reach the workers by file.

Nothing here is Ray's but three lines: with another backend of joblib (Dask, loky) it is the same.
Needs ``pip install ray``.
"""

from __future__ import annotations

import pickle
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from joblib import parallel_config
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV

from sinfkit import DCSPruner, FrozenModel, SemanticClusterer, SINFClassifier, train_network
from sinfkit.zoo import default_network

try:
    import ray
    from ray.util.joblib import register_ray
except ImportError as error:
    raise SystemExit("This example needs Ray: pip install ray") from error


def main() -> None:
    """Train a network, put its weights where the workers find them, compare here and there."""
    X, y = load_digits(return_X_y=True)
    images = (X / 16).reshape(-1, 1, 8, 8).astype(np.float32)
    train, test = slice(0, 1200), slice(1200, None)
    # The workers call this to build the network, so it must be something they can import.
    factory = partial(default_network, (1, 8, 8), 10)
    network = train_network(factory(), images[train], y[train], epochs=10, random_state=0)
    with tempfile.TemporaryDirectory() as folder:
        # On several machines: a path that all of them see.
        torch.save(network.state_dict(), Path(folder) / "weights.pt")
        model = FrozenModel.from_file(Path(folder) / "weights.pt", factory)
        for name, one in (("in memory", FrozenModel(network)), ("of a file", model)):
            print(f"a FrozenModel {name} is pickled to {len(pickle.dumps(one)):,} bytes")
        sinf = SINFClassifier(
            model,
            clusterer=SemanticClusterer(n_clusters=3),
            pruner=DCSPruner(budget=0.5),
            batch_size=64,
            random_state=0,
        )
        here = sinf.fit(images[train], y[train]).predict_proba(images[test])

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        register_ray()
        # Ray starts as many workers as n_jobs says. One GPU for each:
        # parallel_config("ray", n_jobs=4, ray_remote_args={"num_gpus": 1})
        with parallel_config("ray", n_jobs=2):
            sinf.fit(images[train], y[train])  # clusters side by side
            there = sinf.predict_proba(images[test])  # chunks of images
            search = GridSearchCV(sinf, {"pruner__budget": [0.6, 0.3]}, cv=2)
            search.fit(images[train], y[train])  # candidates and folds
        ray.shutdown()
        print(f"largest difference of a probability: {np.abs(there - here).max():.1e}")
        print(f"accuracy: {sinf.score(images[test], y[test]):.1%}")
        print(f"best of the search: {search.best_params_}")


if __name__ == "__main__":
    main()
