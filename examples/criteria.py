"""
Which filter score keeps most of a cluster's accuracy?
======================================================

DCS beside its rivals, without repair.

For each semantic cluster of an image folder (see ``image_folder.py``), every criterion ranks the
same network's filters on the cluster's training images; the same numbers of filters are sliced out
of each layer, and accuracy among the cluster's classes is measured on images that chose nothing::

    python criteria.py vgg16 ~/images --weights vgg16.pt --first-layer features.20
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from image_folder import NETWORKS, class_table, load, normaliser, positions
from sklearn.base import clone

from sinfkit import DCSPruner, load_image_folder
from sinfkit.criteria import LayerData

CRITERIA = ("dcs", "fdr", "taylor", "l1", "random")
RATIOS = ((0.1, 0.5), (0.3, 0.7))


def main() -> None:
    """Score, slice, measure; one row per cluster, criterion, pair of ratios and seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("folder", type=Path, nargs="?", default=os.environ.get("SINFKIT_DATA"))
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--first-layer")
    parser.add_argument("--penalty", type=float, default=DCSPruner().penalty, help="of DCS")
    parser.add_argument("--calibration", type=int, default=500, help="images per class")
    parser.add_argument("--half", choices=("even", "odd"), default="odd", help="of val, by file")
    parser.add_argument("--seeds", type=int, default=5, help="of the random criterion")
    parser.add_argument("--out", type=Path, default=Path("criteria.csv"))
    options = parser.parse_args()
    if options.folder is None:
        parser.error("name the folder, or set SINFKIT_DATA")
    train = load_image_folder(options.folder / "train", class_table(options.folder))
    val = load_image_folder(options.folder / "val", class_table(options.folder))
    place = positions(train)
    if train.clusters is None:
        parser.error("the folder needs classes.csv with a column cluster")
    model = load(options.weights, options.network, len(train.class_names))
    half = positions(val) % 2 == (0 if options.half == "even" else 1)
    first = place < options.calibration
    rows = []
    for cluster in sorted(set(train.clusters.values())):
        classes = sorted(k for k, name in train.clusters.items() if name == cluster)
        chosen = first & np.isin(train.y, classes)
        test = half & np.isin(val.y, classes)
        row = {"cluster": cluster, "criterion": "unpruned", "max_ratio": 0.0, "seed": 0}
        row["accuracy"] = restricted(model.module(), model, val.X[test], val.y[test], classes)
        rows.append(row)
        few = np.flatnonzero(chosen & (place < 4))
        with tempfile.TemporaryDirectory() as cache:
            pruner = DCSPruner(
                model,
                classes=classes,
                first_layer=options.first_layer,
                repair="none",
                penalty=options.penalty,
                repair_samples=64,
                memory=cache,
            )
            for criterion in CRITERIA:
                for seed in range(options.seeds if criterion == "random" else 1):
                    # Every image is scored, once; then the scores serve both pairs of ratios.
                    scored = clone(pruner).set_params(
                        criterion=criterion, random_state=seed, min_ratio=0.0, max_ratio=0.0
                    )
                    scored.fit(train.X[chosen], train.y[chosen])
                    for low, high in RATIOS:
                        pruned = clone(pruner).set_params(
                            criterion=replay(scored.scores_), min_ratio=low, max_ratio=high
                        )
                        pruned.fit(train.X[few], train.y[few])
                        score = pruned.score(val.X[test], val.y[test])
                        row = {"cluster": cluster, "criterion": criterion, "max_ratio": high}
                        rows.append(row | {"seed": seed, "accuracy": score})
        print(f"{cluster}: {len(np.flatnonzero(chosen))} images scored", flush=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table(rows)


def replay(scores: dict[str, np.ndarray]) -> Callable[[LayerData], torch.Tensor]:
    """A criterion that hands out scores found before."""

    def criterion(layer: LayerData) -> torch.Tensor:
        return torch.as_tensor(scores[layer.name])

    criterion.needs = frozenset()  # type: ignore[attr-defined]
    return criterion


def restricted(module, model, X, y, classes) -> float:  # type: ignore[no-untyped-def]
    """Accuracy of the unpruned network that answers with the cluster's classes only."""
    with torch.inference_mode():
        logits = module(normaliser(model)(torch.as_tensor(X).float() / 255))[:, classes]
    return float((np.array(classes)[logits.argmax(1).numpy()] == y).mean())


def table(rows: list[dict]) -> None:
    """Print the mean over clusters, its standard error, and the paired difference to DCS."""
    for low, high in ((0.0, 0.0), *RATIOS):
        means: dict[str, np.ndarray] = {}
        for criterion in ("unpruned", *CRITERIA):
            by_cluster: dict[str, list[float]] = {}
            for row in rows:
                if row["criterion"] == criterion and row["max_ratio"] == high:
                    by_cluster.setdefault(row["cluster"], []).append(row["accuracy"])
            if by_cluster:
                means[criterion] = np.array([np.mean(v) for v in by_cluster.values()])
        for criterion, values in means.items():
            line = f"{low:.0%}-{high:.0%}  {criterion:10}{values.mean():>8.1%} "
            line += f"± {values.std(ddof=1) / len(values) ** 0.5:.1%}"
            if criterion != "dcs" and "dcs" in means:
                difference = means["dcs"] - values
                error = difference.std(ddof=1) / len(difference) ** 0.5
                line += f"   DCS ahead by {difference.mean():+.1%} ± {error:.1%}"
            print(line)


if __name__ == "__main__":
    main()
