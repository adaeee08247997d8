"""
A folder of images: VGG16, VGG19 or ResNet50, from fit to report
================================================================

Routed inference for images of your own.

The folder holds ``train/<wnid>/*`` and ``val/<wnid>/*``, and may hold ``classes.csv`` with the
columns wnid, name, cluster. Name it on the command line or in the variable SINFKIT_DATA::

    python image_folder.py vgg16 ~/images --weights vgg16.pt --save vgg16.sinf
    python image_folder.py vgg19 ~/images --epochs 4
    python image_folder.py vgg16 ~/images --weights vgg16.pt --curve

Without ``--weights`` the network is trained first, on nine tenths of ``train`` (a checkpoint after
every epoch lets a stopped training go on). What is chosen (threshold, router weight, penalties) is
chosen on images that the network was not trained on: the last tenth of ``train`` or, where a given
network has seen all of it, every second file of ``val``. The report is on the other images of
``val``.

``--curve`` fits a row of sizes, a first one with the other kind of clusters, and the controls: ONE
network sliced for all classes with the same repair, by the criterion that suits it best. Each is
stored when it is fitted, so that a stopped run goes on where it was. All are timed in turns in one
run, and drawn.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from torch import nn

from sinfkit import (
    DCSPruner,
    FrozenModel,
    SemanticClusterer,
    SINFClassifier,
    __version__,
    load_image_folder,
    resnet50,
    train_network,
    vgg16,
    vgg19,
)
from sinfkit.graph import count_macs, fold_batch_norm, paired_latency, trace
from sinfkit.inference import Normalise
from sinfkit.zoo import ImageDataset

NETWORKS = {
    "vgg16": vgg16,
    "vgg19": vgg19,
    # At 32 x 32 a stem of stride 2 makes ResNet50 four times cheaper to train on a CPU.
    "resnet50": lambda n: resnet50(n, stem="half"),
}
ROUTE_LAYERS = {"vgg16": "features.24", "vgg19": "features.27", "resnet50": "layer3.1"}
# (prefix_ratio, min_ratio, max_ratio) from careful to bold
SIZES = ((0.3, 0.5, 0.8), (0.4, 0.6, 0.85), (0.5, 0.7, 0.9))
# The same for one network without routes: (criterion, min_ratio, max_ratio)
CONTROLS = (("obs", 0.3, 0.6), ("obs", 0.4, 0.7))


def main() -> None:
    """Load, train if need be, fit, report."""
    options = parse()
    torch.set_num_threads(options.threads)
    study = prepare(options)
    print(
        f"{len(study.X)} calibration, {len(study.X_val)} held-out and "
        f"{len(study.X_report)} report images"
    )
    if options.curve:
        curve(options, study)
        return
    sinf = classifier(options, study, options.clusters, options.size)
    start = time.perf_counter()
    sinf.fit(study.X, study.y, X_val=study.X_val, y_val=study.y_val)
    print(
        f"fitted in {time.perf_counter() - start:.0f} s; routed behind {sinf.route_layer_}, "
        f"threshold {sinf.confidence_threshold_:.2f}, router weight {sinf.router_weight_}"
    )
    print(sinf.report(study.X_report, study.y_report, latency_batch=options.batch))
    if options.save is not None:
        sinf.save(options.save)
        print(f"{options.save}: {options.save.stat().st_size / 2**20:.1f} MiB, for sinfkit.load")


@dataclass(frozen=True)
class Study:
    """A network, and images to calibrate, to choose and to report with."""

    model: FrozenModel
    clusters: dict[int, str] | None
    X: np.ndarray
    y: np.ndarray
    X_val: np.ndarray
    y_val: np.ndarray
    X_report: np.ndarray
    y_report: np.ndarray


def prepare(options: argparse.Namespace) -> Study:
    """Load the images and the network, which is trained if no weights are given."""
    train = load_image_folder(options.folder / "train", class_table(options.folder))
    val = load_image_folder(options.folder / "val", class_table(options.folder))
    held = positions(train) % 10 == 9  # by file name: every tenth of each class
    seen_all = bool(options.weights) and not options.weights_held_out
    if options.weights:
        model = load(options.weights, options.network, len(train.class_names))
    else:
        model = train_base(options, train, held)
    calibration = np.arange(len(train.y)) if seen_all else np.flatnonzero(~held)
    if options.calibration:
        rng = np.random.default_rng(options.seed)
        calibration = np.concatenate(
            [
                rng.permutation(calibration[train.y[calibration] == k])[: options.calibration]
                for k in range(len(train.class_names))
            ]
        )
    X, y = train.X[calibration], train.y[calibration]
    if seen_all:
        chosen = positions(val) % 2 == 0
        parts = val.X[chosen], val.y[chosen], val.X[~chosen], val.y[~chosen]
    else:
        parts = train.X[held], train.y[held], val.X, val.y
    return Study(model, train.clusters, X, y, *parts)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("network", choices=NETWORKS)
    default = os.environ.get("SINFKIT_DATA")
    parser.add_argument("folder", type=Path, nargs="?", default=default)
    parser.add_argument(
        "--weights", type=Path, help="state dict, or a dict with state_dict, mean, std"
    )
    parser.add_argument(
        "--weights-held-out",
        action="store_true",
        help="the weights were trained by this script, without every tenth image of train",
    )
    parser.add_argument("--epochs", type=int, default=4, help="of training, without --weights")
    parser.add_argument(
        "--clusters", choices=("confusion", "activation", "given"), default="confusion"
    )
    parser.add_argument("--n-clusters", type=int, default=10)
    parser.add_argument("--penalty", type=float, default=DCSPruner().penalty, help="of DCS")
    parser.add_argument(
        "--route-accuracy", type=float, help="take the earliest cut that has it, as the paper does"
    )
    parser.add_argument("--route-layer", help='a cut of the network, or "auto"')
    parser.add_argument(
        "--size", type=float, nargs=3, default=SIZES[0], help="prefix, first, last ratio"
    )
    parser.add_argument(
        "--max-drop", type=float, default=0.01, help="accuracy that the threshold may give away"
    )
    parser.add_argument("--calibration", type=int, default=0, help="images per class, 0 for all")
    parser.add_argument("--repair-samples", type=int, default=4000, help="per subgraph")
    parser.add_argument("--batch", type=int, default=256, help="images in the batch that is timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", type=Path, help="file that sinfkit.load reads")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument(
        "--out", type=Path, default=Path("."), help="where checkpoints and figures go"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.folder is None:
        parser.error("name the folder, or set SINFKIT_DATA")
    options.route_layer = options.route_layer or ROUTE_LAYERS[options.network]
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def class_table(folder: Path) -> Path | None:
    """The folder's class table, if it has one."""
    table = folder / "classes.csv"
    return table if table.exists() else None


def positions(data: ImageDataset) -> np.ndarray:
    """Position of each image in the sorted list of its class's files."""
    place = np.empty(len(data.y), dtype=np.int64)
    names = np.array([path.name for path in data.paths])
    for k in np.unique(data.y):
        rows = np.flatnonzero(data.y == k)
        place[rows[np.argsort(names[rows])]] = np.arange(len(rows))
    return place


def load(path: Path, network: str, n_classes: int) -> FrozenModel:
    """Read a trained network."""
    stored = torch.load(path, weights_only=True)
    weights = stored.get("state_dict", stored)
    module = NETWORKS[network](n_classes)
    module.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    )
    return FrozenModel(module, stored.get("mean"), stored.get("std"))


def train_base(options: argparse.Namespace, train: ImageDataset, held: np.ndarray) -> FrozenModel:
    """Train the network on nine tenths of the training images."""
    X, y = train.X[~held], train.y[~held]
    mean = (X.mean((0, 2, 3), dtype=np.float64) / 255).tolist()
    std = (X.std((0, 2, 3), dtype=np.float64) / 255).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = NETWORKS[options.network](len(train.class_names))
    trained = train_network(
        network,
        X,
        y,
        epochs=options.epochs,
        augment="crop_flip",
        mean=mean,
        std=std,
        checkpoint=options.out / f"{options.network}_{options.epochs}_epochs.ckpt",
        random_state=options.seed,
        verbose=1,
    )
    return FrozenModel(trained, mean, std)


def classifier(
    options: argparse.Namespace,
    study: Study,
    clusters: str,
    size: tuple[float, float, float],
) -> SINFClassifier:
    """A SINFClassifier of one size."""
    prefix_ratio, min_ratio, max_ratio = size
    if clusters == "given":
        if study.clusters is None:
            raise SystemExit("--clusters given needs classes.csv with a column cluster")
        clusterer = SemanticClusterer(method="given", mapping=study.clusters)
    else:
        clusterer = SemanticClusterer(method=clusters, n_clusters=options.n_clusters)
    return SINFClassifier(
        study.model,
        clusterer=clusterer,
        pruner=DCSPruner(
            min_ratio=min_ratio,
            max_ratio=max_ratio,
            penalty=options.penalty,
            repair_samples=options.repair_samples,
        ),
        route_layer=options.route_layer,
        route_accuracy=options.route_accuracy,
        prefix_ratio=prefix_ratio,
        max_accuracy_drop=options.max_drop,
        random_state=options.seed,
        verbose=1,
    )


def control(
    options: argparse.Namespace, study: Study, criterion: str, min_ratio: float, max_ratio: float
) -> DCSPruner:
    """One network without routes; its repair takes as many images as memory allows."""
    return DCSPruner(
        study.model,
        criterion=criterion,
        min_ratio=min_ratio,
        max_ratio=max_ratio,
        repair_samples=10 * options.repair_samples,
        random_state=options.seed,
    )


def curve(options: argparse.Namespace, study: Study) -> None:
    """Accuracy against time: SINF with two kinds of clusters, and one unrouted network."""
    normalise = normaliser(study.model)
    contestants: dict[str, nn.Module] = {"base": fast(normalise, study.model.module())}
    rows: dict[str, dict[str, Any]] = {"base": {"kind": "base", "macs": float("nan")}}
    held = {"X_val": study.X_val, "y_val": study.y_val}
    kinds = ("confusion", "given" if study.clusters is not None else "activation")
    for kind, sizes in zip(kinds, (SIZES, SIZES[:1]), strict=True):
        for size in sizes:
            sinf = fitted(options, classifier(options, study, kind, size), study.X, study.y, **held)
            name = f"SINF, {kind}, {size}"
            report = sinf.report(study.X_report, study.y_report, repeats=0)
            contestants[name] = sinf.network_
            rows["base"]["macs"] = report.base_macs
            rows[name] = {"kind": f"SINF, {kind} clusters", "size": size} | report.to_dict()
            print(f"{name}: {report.accuracy:.1%} (base {report.base_accuracy:.1%})", flush=True)
    example = normalise(torch.as_tensor(study.X[:1]).float() / 255)
    for criterion, *ratios in CONTROLS:
        one = fitted(options, control(options, study, criterion, *ratios), study.X, study.y)
        name = f"one network, {criterion}, {tuple(ratios)}"
        contestants[name] = fast(normalise, one.model_)
        rows[name] = {"kind": f"one unrouted network, {criterion}", "size": tuple(ratios)}
        rows[name]["macs"] = count_macs(one.model_, example)[0]
    X_report, y_report = study.X_report, study.y_report
    batch = torch.as_tensor(X_report[: options.batch]).float().div(255)
    batch = batch.contiguous(memory_format=torch.channels_last)
    latency = paired_latency({n: lambda m=m: m(batch) for n, m in contestants.items()}, repeats=11)
    for name, module in contestants.items():
        rows[name]["accuracy"] = accuracy(module, X_report, y_report)
        rows[name]["time"] = latency.ratio(name, "base")
        rows[name]["time_saved"] = 1 - rows[name]["time"]
        rows[name]["ms"] = latency.median[name] * 1e3
    write(options.out / f"{options.network}_curve.csv", rows)
    summarise(options.out / f"{options.network}_table.csv", rows)
    draw(options.out / f"{options.network}_curve.png", rows, options)
    for name, row in rows.items():
        print(f"{name:36}{row['accuracy']:>8.1%}{row['time']:>8.2f} of the base's time")


def fitted(options: argparse.Namespace, estimator: Any, *data: Any, **held: Any) -> Any:
    """Fit an estimator, or load it if the same was fitted on the same images before."""
    key = joblib.hash((__version__, estimator, data, held))
    path = options.out / f"{options.network}_{key[:16]}.joblib"
    if path.exists():
        return joblib.load(path).to("cpu")
    start = time.perf_counter()
    estimator.fit(*data, **held)
    joblib.dump(estimator, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)  # whole or not at all
    print(f"fitted in {time.perf_counter() - start:.0f} s", flush=True)
    return estimator.to("cpu")


def normaliser(model: FrozenModel) -> nn.Module:
    """The network's normalisation as a module."""
    if model.mean is None or model.std is None:
        return nn.Identity()
    return Normalise(torch.tensor(model.mean), torch.tensor(model.std))


def fast(normalise: nn.Module, module: nn.Module) -> nn.Module:
    """Batch-norms folded, channels_last: the form in which all are timed."""
    folded = fold_batch_norm(trace(module))
    return nn.Sequential(normalise, folded).eval().to(memory_format=torch.channels_last)


def accuracy(module: nn.Module, X: np.ndarray, y: np.ndarray) -> float:
    """Share of right answers."""
    right = 0
    with torch.inference_mode():
        for start in range(0, len(X), 256):
            x = torch.as_tensor(X[start : start + 256]).float().div(255)
            right += int((module(x).argmax(1).numpy() == y[start : start + 256]).sum())
    return right / len(X)


def write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write the rows as CSV."""
    columns = ["name", *dict.fromkeys(key for row in rows.values() for key in row)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({"name": name} | row for name, row in rows.items())


def summarise(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write the columns that are worth printing, rounded."""

    def percent(value: Any) -> str:
        return "" if value in (None, "") else f"{float(value) * 100:.1f}"

    base = float(rows["base"]["accuracy"])
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["", "accuracy (%)", "points", "time saved (%)", "speed-up", "ms", "MACs (millions)"]
            + ["cluster predicted (%)", "implied by the base (%)", "fallback (%)"]
        )
        for name, row in rows.items():
            routes = ("route_accuracy", "base_route_accuracy", "fallback_share")
            writer.writerow(
                [
                    name,
                    percent(row["accuracy"]),
                    f"{(float(row['accuracy']) - base) * 100:+.1f}",
                    percent(row["time_saved"]),
                    f"{1 / float(row['time']):.2f}",
                    f"{float(row['ms']):.0f}",
                    f"{float(row['macs']) / 1e6:.0f}",
                    *(percent(row.get(key)) for key in routes),
                ]
            )


def draw(path: Path, rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Draw accuracy against time saved."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    base = rows["base"]["accuracy"] * 100
    axis.axhline(base, color="0.4", linestyle="--", linewidth=1, label=f"base, {base:.1f} %")
    axis.axhline(base - 1, color="0.7", linestyle=":", linewidth=1, label="one point below")
    for kind, style in zip(
        dict.fromkeys(row["kind"] for row in rows.values() if row["kind"] != "base"),
        ("o-", "s-", "^--", "v--"),
        strict=False,
    ):
        points = sorted((1 - r["time"], r["accuracy"]) for r in rows.values() if r["kind"] == kind)
        saved, right = np.array(points).T * 100
        axis.plot(saved, right, style, label=kind)
    axis.set(
        xlabel=f"inference time saved (%), batch {options.batch}, {options.threads} threads",
        ylabel="accuracy on the report images (%)",
        title=options.network,
    )
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
