"""What every table starts from: a trained network, its images, and which of them may be looked at.

The data are a folder with ``train/<wnid>/*`` and ``val/<wnid>/*`` (or ``test``), and a table
``classes.csv`` with the columns wnid, name, cluster. Choices are made on images and clusters that
the report does not use:

==========  ==============================================  ==============================
split       a network trained without every tenth image     one that saw all of ``train``
==========  ==============================================  ==============================
``choose``  that tenth of ``train``; even clusters          even places of ``val``; even clusters
``report``  all of ``val``; odd clusters                    odd places of ``val``; odd clusters
==========  ==============================================  ==============================

Places count from 0 in the sorted list of a class's files, clusters in the sorted list of names.
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

from sinfkit import FrozenModel, load_image_folder, resnet50, train_network, vgg16, vgg19
from sinfkit.zoo import ImageDataset

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "docs" / "results"
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "vgg16": vgg16,
    "vgg19": vgg19,
    "resnet50": resnet50,
}
BATCH = 256


@functools.lru_cache
def frozen() -> dict[str, Any]:
    """The configuration of the report, from ``frozen.toml``."""
    return tomllib.loads((HERE / "frozen.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Base:
    """A trained network, and how it came about.

    Attributes
    ----------
    model : FrozenModel
    network : str
        Key of `NETWORKS`.
    width : float
        Factor on the channels of every layer.
    epochs, seed : int or str
        Of its training; empty where the file does not say.
    held_out : bool
        Whether it was trained without every tenth image.
    """

    model: FrozenModel
    network: str
    width: float = 1.0
    epochs: int | str = ""
    seed: int | str = ""
    held_out: bool = False

    @property
    def label(self) -> str:
        """Short name for files and figures: ``vgg16``, or ``vgg16-0.5`` at half the width."""
        return self.network if self.width == 1 else f"{self.network}-{self.width:g}"


@dataclass(frozen=True)
class Study:
    """A network with images to calibrate on and images to measure on.

    Attributes
    ----------
    base : Base
    clusters : dict of int to str
        Semantic cluster of each class.
    class_names : tuple of str
    X, y : ndarray
        Calibration images, uint8, that the network was trained on, and their classes.
    X_test, y_test : ndarray
        Images of the split.
    split : str
        ``"choose"`` or ``"report"``.
    device : torch.device
    chosen : tuple of str
        Names of the clusters that were asked for.
    """

    base: Base
    clusters: Mapping[int, str]
    class_names: tuple[str, ...]
    X: np.ndarray = field(repr=False)
    y: np.ndarray = field(repr=False)
    X_test: np.ndarray = field(repr=False)
    y_test: np.ndarray = field(repr=False)
    split: str
    device: torch.device
    chosen: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Names of all clusters, sorted."""
        return sorted(set(self.clusters.values()))

    def classes(self, cluster: str) -> np.ndarray:
        """Classes of a cluster, ascending."""
        return np.array(sorted(k for k, name in self.clusters.items() if name == cluster))

    def draw(self, classes: Sequence[int], per_class: int, resample: int) -> np.ndarray:
        """Rows of `X`: up to `per_class` images of each class, drawn at random.

        The order within a class is random too, so that the first images are a smaller draw.
        """
        rows = []
        for k in classes:
            rng = np.random.default_rng([resample, int(k)])
            rows.append(rng.permutation(np.flatnonzero(self.y == k))[:per_class])
        return np.concatenate(rows)

    def test_rows(self, classes: Sequence[int]) -> np.ndarray:
        """Rows of `X_test` that show these classes."""
        return np.flatnonzero(np.isin(self.y_test, classes))

    def batches(self, X: np.ndarray) -> Iterator[Tensor]:
        """Normalised batches on the study's device."""
        model, shape = self.base.model, (1, -1, 1, 1)
        mean = torch.tensor(model.mean or (0.0,)).reshape(shape)
        std = torch.tensor(model.std or (1.0,)).reshape(shape)
        for start in range(0, len(X), BATCH):
            x = torch.as_tensor(X[start : start + BATCH]).float().div(255)
            x = ((x - mean) / std).to(self.device)
            yield x.contiguous(memory_format=torch.channels_last)

    def key(self) -> dict[str, Any]:
        """What tells this study's rows from those of others."""
        base = self.base
        return {
            "network": base.network,
            "width": f"{base.width:g}",
            "base_seed": base.seed,
            "split": self.split,
        }

    def constants(self) -> dict[str, Any]:
        """What a row says about the study beside its key."""
        return {"base_epochs": self.base.epochs}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all scripts share; read them with `open_study`."""
    made = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    made.add_argument("--network", choices=sorted(NETWORKS), default="vgg16")
    made.add_argument("--weights", type=Path, help="dict of state_dict, mean, std, width, stem")
    made.add_argument("--data", type=Path, default=os.environ.get("SINFKIT_DATA"))
    made.add_argument(
        "--held-out", action="store_true", help="trained without every tenth image of train"
    )
    made.add_argument("--split", choices=("choose", "report"), default="choose")
    made.add_argument(
        "--clusters",
        nargs="+",
        help="names, or one of tuning, report, all; default: those of the split",
    )
    made.add_argument("--quick", action="store_true", help="made-up images, a tiny network")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--device", default="auto")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of CSV and PNG files")
    return made


def open_study(options: argparse.Namespace, width: float = 0.125) -> Study:
    """Load, or make up, what the options ask for; `width` is that of a made-up network."""
    from sinfkit.utils import resolve_device

    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    if options.quick:
        base, train, test = _made_up(options.network, width)
    else:
        if options.data is None or options.weights is None:
            raise SystemExit("give --data (or SINFKIT_DATA) and --weights, or --quick")
        folder = Path(options.data)
        train = load_part(folder, "train")
        base = load_base(options.weights, options.network, len(train.class_names))
        if options.held_out and not base.held_out:
            base = Base(**(vars(base) | {"held_out": True}))
        val = None
        if options.split == "report" or not base.held_out:
            val = load_part(folder, "val" if (folder / "val").exists() else "test")
        train, test = parts(train, val, options.split, base.held_out)
    clusters = train.clusters or dict.fromkeys(range(len(train.class_names)), "all")
    return Study(
        base,
        clusters,
        train.class_names,
        train.X,
        train.y,
        test.X,
        test.y,
        options.split,
        device,
        select_clusters(sorted(set(clusters.values())), options.clusters, options.split),
    )


def select_clusters(
    names: Sequence[str], wanted: Sequence[str] | None, split: str
) -> tuple[str, ...]:
    """Names of clusters: those wanted, or the half that belongs to a split."""
    halves = {"tuning": names[::2], "report": names[1::2] or names, "all": names}
    if not wanted:
        wanted = ["tuning" if split == "choose" else "report"]
    if len(wanted) == 1 and wanted[0] in halves:
        return tuple(halves[wanted[0]])
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise SystemExit(f"there is no cluster {', '.join(unknown)}; there are {', '.join(names)}")
    return tuple(wanted)


def load_part(folder: Path, part: str) -> ImageDataset:
    """The images of a part of the data, with the class table where there is one."""
    table = folder / "classes.csv"
    return load_image_folder(folder / part, table if table.exists() else None, n_jobs=-1)


def places(data: ImageDataset) -> np.ndarray:
    """Place of each image in the sorted list of its class's files."""
    place = np.empty(len(data.y), dtype=np.int64)
    names = np.array([path.name for path in data.paths])
    for k in np.unique(data.y):
        rows = np.flatnonzero(data.y == k)
        place[rows[np.argsort(names[rows])]] = np.arange(len(rows))
    return place


def parts(
    train: ImageDataset, val: ImageDataset | None, split: str, held_out: bool
) -> tuple[ImageDataset, ImageDataset]:
    """Images to calibrate on, and those of the split."""
    if held_out:
        held = places(train) % 10 == 9
        if split == "choose":
            return take(train, ~held), take(train, held)
        assert val is not None
        return take(train, ~held), val
    assert val is not None
    return train, take(val, places(val) % 2 == (0 if split == "choose" else 1))


def take(data: ImageDataset, rows: np.ndarray) -> ImageDataset:
    """Some of the images."""
    chosen = np.flatnonzero(rows) if rows.dtype == bool else rows
    paths = tuple(data.paths[i] for i in chosen) if data.paths else ()
    return ImageDataset(data.X[chosen], data.y[chosen], data.class_names, data.clusters, paths)


def build(network: str, n_classes: int, width: float = 1.0, stem: str | None = None) -> nn.Module:
    """An untrained network."""
    options = {} if stem is None else {"stem": stem}
    return NETWORKS[network](n_classes, width=width, **options)


def load_base(path: Path, network: str, n_classes: int) -> Base:
    """Read trained weights, as `save_base` and the plain format of README.md have them."""
    stored = torch.load(path, weights_only=True, map_location="cpu")
    weights = stored["state_dict"]
    network = stored.get("network", network)
    module = build(network, n_classes, float(stored.get("width", 1.0)), stored.get("stem"))
    module.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    )
    return Base(
        FrozenModel(module, stored.get("mean"), stored.get("std")),
        network,
        float(stored.get("width", 1.0)),
        stored.get("epochs", ""),
        stored.get("seed", ""),
        bool(stored.get("held_out", False)),
    )


def train_base(
    network: str,
    width: float,
    train: ImageDataset,
    *,
    epochs: int,
    seed: int,
    stem: str | None = None,
    max_lr: float = 0.1,
    batch_size: int = 128,
    augment: str | None = "crop_flip",
    **options: Any,
) -> Base:
    """Train a network on `train`; more options as in `sinfkit.train_network`."""
    mean = (train.X.mean((0, 2, 3), dtype=np.float64) / 255).tolist()
    std = (train.X.std((0, 2, 3), dtype=np.float64) / 255).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(network, len(train.class_names), width, stem)
    trained = train_network(
        module,
        train.X,
        train.y,
        epochs=epochs,
        batch_size=batch_size,
        max_lr=max_lr,
        weight_decay=5e-4,
        augment=augment,
        mean=mean,
        std=std,
        random_state=seed,
        **options,
    )
    return Base(FrozenModel(trained, mean, std), network, width, epochs, seed, True)


def accuracy(base: Base, X: np.ndarray, y: np.ndarray, device: torch.device | str = "cpu") -> float:
    """Share of images that a network labels correctly."""
    device = torch.device(device)
    study = Study(base, {}, (), X, y, X, y, "", device, ())
    module = base.model.module(device)
    with torch.inference_mode():
        answers = torch.cat([module(x).argmax(1).cpu() for x in study.batches(X)])
    return float((answers.numpy() == y).mean())


@functools.lru_cache
def _made_up(network: str, width: float) -> tuple[Base, ImageDataset, ImageDataset]:
    """Eight classes in four clusters: noisy patterns, alike within a cluster; a tiny network."""
    train, test = made_up_images(48, seed=0), made_up_images(12, seed=1)
    base = train_base(
        network,
        width,
        train,
        epochs=6,
        seed=0,
        stem="half" if network == "resnet50" else None,
        max_lr=0.05,
        batch_size=32,
        augment=None,
        device="cpu",
    )
    return base, train, test


def made_up_images(per_class: int, seed: int) -> ImageDataset:
    """Noisy patterns of 32 x 32 pixels; two classes of a cluster share half of theirs."""
    patterns = np.random.default_rng(123)
    shared = patterns.normal(0, 30, (4, 3, 8, 8)).repeat(2, axis=0)
    pattern = (shared + patterns.normal(0, 20, (8, 3, 8, 8))).repeat(4, axis=2).repeat(4, axis=3)
    y = np.arange(8).repeat(per_class)
    noise = np.random.default_rng(seed).normal(0, 130, (len(y), 3, 32, 32))
    X = (128 + pattern[y] + noise).clip(0, 255).astype(np.uint8)
    names = tuple(f"class {k}" for k in range(8))
    return ImageDataset(X, y.astype(np.int64), names, {k: "abcd"[k // 2] for k in range(8)})
