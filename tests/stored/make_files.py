"""Write the stored estimators that every later version must load.

    python tests/stored/make_files.py

Run it once for each schema version of `sinfkit.persistence.estimators`, and for each kind that is
new: what is there is left as it is, since the files are there to be read by versions that
did not write them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from sinfkit import (
    DCSPruner,
    FrozenModel,
    RoutingOptions,
    SemanticClusterer,
    SINFClassifier,
    save,
    train_network,
    vgg16,
)
from sinfkit.persistence import SCHEMA

FOLDER = Path(__file__).parent
ANSWERS = ("predict_proba", "predict_cluster", "transform")


def table() -> tuple[np.ndarray, np.ndarray]:
    """Digits as 16 numbers each."""
    X, y = load_digits(return_X_y=True)
    return X.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16).astype(np.float32), y


def images(n: int = 60) -> np.ndarray:
    """Waves of three lengths in three colours, 32 x 32."""
    phase, length = np.arange(n)[:, None], 1 + np.arange(n)[:, None] % 3
    wave = np.sin(np.arange(3 * 32 * 32) / (3.0 * length) + phase)
    return wave.reshape(n, 3, 32, 32).astype(np.float32)


def inputs(name: str) -> np.ndarray:
    """The samples whose answers are stored."""
    return images(12) if name == "images" else table()[0][1000:1012]


def estimators() -> dict[str, object]:
    """One of each kind, and a classifier of images."""
    X, y = table()
    X, y = X[:1000], y[:1000]
    Z, labels = images(), np.array(["long", "middle", "short"])[np.arange(60) % 3]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = vgg16(3, width=1 / 48)
    codes = np.unique(labels, return_inverse=True)[1]
    network = train_network(network, Z, codes, epochs=8, batch_size=20, random_state=0)
    frozen = FrozenModel(network, mean=[0.0] * 3, std=[0.7] * 3)
    two = {"clusterer": SemanticClusterer(n_clusters=2), "random_state": 0, "device": "cpu"}
    return {
        "pruner": DCSPruner(criterion="dcs", schedule="linear", random_state=0, device="cpu").fit(
            X, y
        ),
        "clusterer": SemanticClusterer(n_clusters=3, random_state=0, device="cpu").fit(X, y),
        "classifier": SINFClassifier(
            pruner=DCSPruner(criterion="dcs", schedule="linear"), **two
        ).fit(X, y),
        "low_rank": SINFClassifier(
            pruner=DCSPruner(criterion="dcs", schedule="linear"),
            **two,
            options=RoutingOptions(prefix_low_rank=0.5),
        ).fit(X, y),
        "images": SINFClassifier(
            frozen,
            pruner=DCSPruner(criterion="dcs", schedule="linear", repair="none"),
            route_layer="features.7",
            fallback="base",
            **two,
            prefix_pruner=DCSPruner(criterion="obs", schedule="uniform", pruning_ratios=(0.0, 0.0)),
            options=RoutingOptions(confidence_threshold=0.6, exit_threshold=None),
        ).fit(Z, labels),
    }


def main() -> None:
    """Fit, save, and write down what each answers."""
    for name, estimator in estimators().items():
        path = FOLDER / f"v{SCHEMA}_{name}.sinf"
        if path.exists():
            continue
        save(estimator, path)
        X = inputs(name)
        answers = {how: getattr(estimator, how)(X) for how in ANSWERS if hasattr(estimator, how)}
        np.savez_compressed(FOLDER / f"v{SCHEMA}_{name}.npz", **answers)


if __name__ == "__main__":
    main()
