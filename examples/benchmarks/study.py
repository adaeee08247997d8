"""What every table starts from: a trained network, its images, and which may be looked at.

``SINFKIT_DATA`` names the images: a folder with ``train/<class>/*`` and ``test/<class>/*`` (or
``val``), and ``classes.csv`` (wnid, name, cluster); or one with torchvision's CIFAR-100 files.

=========  ==========================================  =========================
images     a base trained without every tenth image    one that saw all of train
=========  ==========================================  =========================
calibrate  the rest of train                           train
choose     that tenth of train                         even places of test
report     test                                        odd places of test
=========  ==========================================  =========================

Places count the images of a class in the order of their files. All choices (exits, weights,
sizes) are made on the choosing images; ``--split report`` opens the others.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .library import (
    FrozenModel,
    ImageDataset,
    load_cifar100,
    load_image_folder,
    resnet50,
    train_network,
    vgg16,
    vgg19,
)
from .record import RESULTS
from .resnet56 import MEAN, STD, resnet56

BATCH = 256


def tiny(n_classes: int, width: float = 1.0) -> nn.Module:
    """The network of ``--quick``: five convolutions for 16 x 16 images."""
    layers: list[nn.Module] = []
    n_in = 3
    for n_out, pool in ((8, False), (8, True), (16, False), (16, True), (32, False)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
        n_in = n_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, n_classes))


# By name: how it is built, where routes are predicted, and the first layer that a cluster's own
# filters are taken from; both stand in the middle of the network.
NETWORKS: dict[str, tuple[Callable[..., nn.Module], str, str]] = {
    "vgg16": (vgg16, "features.24", "features.20"),
    "vgg19": (vgg19, "features.27", "features.20"),
    "resnet50": (resnet50, "layer3.1", "layer3.1.conv1"),
    "resnet56": (resnet56, "layer2.4", "layer2.0.conv1"),
    "tiny": (tiny, "7", "10"),
}


@dataclass(frozen=True)
class Study:
    """A network with images to calibrate on, to choose on and to measure on.

    `X` are uint8 images; `facts` say how the network came about.
    """

    network: str
    model: FrozenModel
    clusters: Mapping[int, str]
    X: np.ndarray = field(repr=False)
    y: np.ndarray = field(repr=False)
    X_choose: np.ndarray = field(repr=False)
    y_choose: np.ndarray = field(repr=False)
    X_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    split: str
    facts: Mapping[str, Any]

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.clusters)

    @property
    def names(self) -> list[str]:
        """Names of all clusters, sorted."""
        return sorted(set(self.clusters.values()))

    @property
    def label(self) -> str:
        """For names of files: network and split."""
        return f"{self.network}_{self.split}"

    def classes(self, cluster: str) -> np.ndarray:
        """Classes of a cluster, ascending; all of them for ``"all"``."""
        return np.array(sorted(k for k, name in self.clusters.items() if cluster in (name, "all")))

    def draw(
        self, per_class: int, number: int, classes: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Calibration images: up to `per_class` of each class, at random; the draw's `number`."""
        rows = []
        for k in self.classes("all") if classes is None else classes:
            rng = np.random.default_rng([number, int(k)])
            rows.append(rng.permutation(np.flatnonzero(self.y == k))[:per_class])
        chosen = np.concatenate(rows)
        return self.X[chosen], self.y[chosen]

    def batches(self, X: np.ndarray) -> Iterator[Tensor]:
        """Normalised batches."""
        model, shape = self.model, (1, -1, 1, 1)
        mean = torch.tensor(model.mean or (0.0,)).reshape(shape)
        std = torch.tensor(model.std or (1.0,)).reshape(shape)
        for x in raw_batches(X):
            yield (x - mean) / std

    def logits(self, module: nn.Module, X: np.ndarray) -> np.ndarray:
        """Outputs of a network that takes normalised images."""
        with torch.inference_mode():
            return torch.cat([module(x) for x in self.batches(X)]).numpy()

    def key(self) -> dict[str, Any]:
        """Columns that every table starts with."""
        return {"network": self.network, "split": self.split, **self.facts}


KEYS = ("network", "split", "width", "base_seed", "base_epochs")


def raw_batches(X: np.ndarray, size: int = BATCH) -> Iterator[Tensor]:
    """Batches of pixels / 255."""
    for start in range(0, len(X), size):
        yield torch.as_tensor(X[start : start + size]).float().div(255)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all tables share; read them with `open_study`."""
    made = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    made.add_argument("--network", choices=sorted(NETWORKS), default="vgg16")
    made.add_argument("--weights", type=Path, help="file of `train`, or a plain state dict")
    made.add_argument("--data", type=Path, default=os.environ.get("SINFKIT_DATA"))
    made.add_argument("--split", choices=("choose", "report"), default="choose")
    made.add_argument("--draws", type=int, default=3, help="draws of calibration images")
    made.add_argument("--images", type=int, default=200, help="calibration images per class")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--quick", action="store_true", help="made-up images, a tiny network")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of CSV and PNG files")
    made.add_argument("--fitted", type=Path, default=Path("fitted"), help="folder of networks")
    made.add_argument("--show", action="store_true", help="only say what the CSV file holds")
    return made


def open_study(options: argparse.Namespace) -> Study:
    """Load, or make up, what the options ask for."""
    torch.set_num_threads(options.threads)
    if options.quick:
        options.fitted = options.out / "fitted"
        return made_up_study(options.split)
    if options.data is None or options.weights is None:
        raise SystemExit("give --data (or SINFKIT_DATA) and --weights, or --quick")
    train, test = load_parts(options.data)
    network, model, facts, held_out = load_base(
        options.weights, options.network, len(train.class_names)
    )
    held = places(train.y) % 10 == 9 if held_out else np.zeros(len(train.y), dtype=bool)
    even = places(test.y) % 2 == 0
    choose = (train.X[held], train.y[held]) if held_out else (test.X[even], test.y[even])
    report = (test.X, test.y) if held_out else (test.X[~even], test.y[~even])
    clusters = train.clusters or dict.fromkeys(range(len(train.class_names)), "all")
    measured = choose if options.split == "choose" else report
    X, y = train.X[~held], train.y[~held]
    return Study(network, model, clusters, X, y, *choose, *measured, options.split, facts)


def load_parts(folder: Path) -> tuple[ImageDataset, ImageDataset]:
    """Training and test images, from a folder of images or torchvision's files."""
    folder = Path(folder)
    if not (folder / "train").is_dir():
        return load_cifar100(folder), load_cifar100(folder, train=False)
    table = folder / "classes.csv"
    other = "test" if (folder / "test").is_dir() else "val"
    parts = [
        load_image_folder(folder / part, table if table.exists() else None, n_jobs=-1)
        for part in ("train", other)
    ]
    return parts[0], parts[1]


def places(y: np.ndarray) -> np.ndarray:
    """Place of each image among those of its class."""
    place = np.empty(len(y), dtype=np.int64)
    for k in np.unique(y):
        rows = np.flatnonzero(y == k)
        place[rows] = np.arange(len(rows))
    return place


def load_base(
    path: Path, network: str, n_classes: int
) -> tuple[str, FrozenModel, dict[str, Any], bool]:
    """Read trained weights: name, network, facts, and whether every tenth image was held out.

    A plain state dict is that of a public ResNet-56, or of a network of ours without normalisation.
    """
    stored = torch.load(path, weights_only=True, map_location="cpu")
    if "state_dict" not in stored:
        public = {"mean": MEAN, "std": STD} if network == "resnet56" else {}
        stored = {"state_dict": stored, **public}
    network = stored.get("network", network)
    options = {"stem": stored["stem"]} if stored.get("stem") else {}
    width = float(stored.get("width", 1.0))
    module = NETWORKS[network][0](n_classes, width=width, **options)
    weights = stored["state_dict"].items()
    module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights})
    model = FrozenModel(module, stored.get("mean"), stored.get("std"))
    facts = {"width": f"{width:g}", "base_seed": stored.get("seed", "")}
    facts["base_epochs"] = stored.get("epochs", "")
    return network, model, facts, bool(stored.get("held_out", False))


@functools.lru_cache(maxsize=2)
def made_up_study(split: str) -> Study:
    """Eight classes in four clusters: noisy patterns, alike within a cluster."""
    X, y = made_up_images(40, 0)
    network = trained_tiny()
    choose, report = made_up_images(12, 1), made_up_images(12, 2)
    clusters = {k: "abcd"[k // 2] for k in range(8)}
    measured = choose if split == "choose" else report
    facts = {"width": "1", "base_seed": 0, "base_epochs": 8}
    model = FrozenModel(network, [0.5] * 3, [0.25] * 3)
    return Study("tiny", model, clusters, X, y, *choose, *measured, split, facts)


@functools.lru_cache(maxsize=1)
def trained_tiny() -> nn.Module:
    """The network of the made-up images, trained in a second."""
    X, y = made_up_images(40, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = tiny(8)
    return train_network(
        network,
        X,
        y,
        epochs=8,
        batch_size=32,
        max_lr=0.05,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        random_state=0,
    )


def made_up_images(per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy patterns of 16 x 16 pixels; two classes of a cluster share half of theirs."""
    patterns = np.random.default_rng(123)
    shared = patterns.normal(0, 30, (4, 3, 4, 4)).repeat(2, axis=0)
    pattern = (shared + patterns.normal(0, 20, (8, 3, 4, 4))).repeat(4, axis=2).repeat(4, axis=3)
    y = np.arange(8).repeat(per_class)
    noise = np.random.default_rng(seed).normal(0, 90, (len(y), 3, 16, 16))
    return (128 + pattern[y] + noise).clip(0, 255).astype(np.uint8), y.astype(np.int64)
