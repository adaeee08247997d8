"""Labelled images in memory: CIFAR-100 with its 20 superclasses, CIFAR-10, folders of images."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from ..utils.params import check_flag, check_integer, check_jobs, check_path

__all__ = [
    "CIFAR100_SUPERCLASSES",
    "ImageDataset",
    "load_cifar10",
    "load_cifar100",
    "load_image_folder",
]

CIFAR100_SUPERCLASSES: dict[str, tuple[str, ...]] = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
"""CIFAR-100's superclasses, each with its five classes (Krizhevsky, 2009)."""

_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_LARGEST_SIDE = 16_384  # pixels; more would be a slip, and fill the memory
_TABLE_COLUMNS = ("wnid", "name", "cluster")


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images, their labels and what the labels mean.

    Shapes: `X` (n_samples, 3, height, width), `y` (n_samples,).
    """

    X: np.ndarray
    y: np.ndarray
    class_names: tuple[str, ...]
    clusters: Mapping[int, str] | None = None
    paths: tuple[Path, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        n_clusters = 0 if self.clusters is None else len(set(self.clusters.values()))
        return (
            f"ImageDataset({len(self)} images of shape {self.X.shape[1:]}, "
            f"{len(self.class_names)} classes, {n_clusters} clusters)"
        )


def load_cifar100(
    root: str | os.PathLike[str], train: bool = True, download: bool = False
) -> ImageDataset:
    """Load CIFAR-100 with its 20 superclasses.

    Parameters
    ----------
    root : path-like
        Folder that holds ``cifar-100-python``, or will.
    train : bool, default=True
        The 50,000 training images; else the 10,000 test images.
    download : bool, default=False
        Fetch the files if they are not there.

    Returns
    -------
    ImageDataset
        Images of shape (3, 32, 32); `clusters` gives each label its superclass.

    Raises
    ------
    FileNotFoundError
        If the files are missing or damaged.

    References
    ----------
    Krizhevsky, "Learning multiple layers of features from tiny images", 2009.

    Examples
    --------
    >>> from sinfkit import load_cifar100
    >>> data = load_cifar100("data", download=True)  # doctest: +SKIP
    >>> data  # doctest: +SKIP
    ImageDataset(50000 images of shape (3, 32, 32), 100 classes, 20 clusters)
    """
    from torchvision.datasets import CIFAR100  # here, since importing torchvision takes seconds

    return _load_cifar(CIFAR100, root, train, download, CIFAR100_SUPERCLASSES)


def load_cifar10(
    root: str | os.PathLike[str], train: bool = True, download: bool = False
) -> ImageDataset:
    """Load CIFAR-10.

    Parameters
    ----------
    root : path-like
        Folder that holds ``cifar-10-batches-py``, or will.
    train : bool, default=True
        The 50,000 training images; else the 10,000 test images.
    download : bool, default=False
        Fetch the files if they are not there.

    Returns
    -------
    ImageDataset
        Images of shape (3, 32, 32); `clusters` is None.

    Raises
    ------
    FileNotFoundError
        If the files are missing or damaged.

    References
    ----------
    Krizhevsky, "Learning multiple layers of features from tiny images", 2009.

    Examples
    --------
    >>> from sinfkit import load_cifar10
    >>> data = load_cifar10("data", download=True)  # doctest: +SKIP
    >>> data  # doctest: +SKIP
    ImageDataset(50000 images of shape (3, 32, 32), 10 classes, 0 clusters)
    """
    from torchvision.datasets import CIFAR10  # here, since importing torchvision takes seconds

    return _load_cifar(CIFAR10, root, train, download, None)


def _load_cifar(
    source: type[Any],
    root: str | os.PathLike[str],
    train: bool,
    download: bool,
    superclasses: Mapping[str, Sequence[str]] | None,
) -> ImageDataset:
    """Read one of torchvision's CIFAR data sets, which check their files, into memory."""
    check_path("root", root)
    check_flag("train", train)
    check_flag("download", download)
    try:
        data = source(root, train=train, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{source.__name__} is not in {Path(root).absolute()}, or its files are damaged "
            f"({error}). Pass download=True, or unpack them there as {source.base_folder}."
        ) from error
    names = tuple(data.classes)
    return ImageDataset(
        np.ascontiguousarray(np.asarray(data.data).transpose(0, 3, 1, 2)),
        np.array(data.targets, dtype=np.int64),
        names,
        None if superclasses is None else _clusters_of(names, superclasses),
    )


def _clusters_of(names: Sequence[str], superclasses: Mapping[str, Sequence[str]]) -> dict[int, str]:
    """Cluster of each label, from the classes that each cluster lists."""
    owner = {name: cluster for cluster, members in superclasses.items() for name in members}
    unknown = [name for name in names if name not in owner]
    if unknown:
        raise ValueError(f"The data have classes without a superclass: {_listed(unknown)}.")
    return {label: owner[name] for label, name in enumerate(names)}


def load_image_folder(
    folder: str | os.PathLike[str],
    class_table: str | os.PathLike[str] | None = None,
    size: int | None = None,
    n_jobs: int | None = None,
) -> ImageDataset:
    """Load a folder that holds one folder of images per class.

    Parameters
    ----------
    folder : path-like
        Its sub-folders are the classes; label k is the k-th of their names in sorted order.
    class_table : path-like or None, default=None
        CSV file with the columns ``wnid`` (name of the class's folder), ``name`` and ``cluster``
        (its semantic cluster). Every row must have its folder and every folder its row.
    size : int or None, default=None
        Side of the images in pixels: the shorter side is resized to it and the centre cut out.
        None keeps the images as they are; they must then all have one size.
    n_jobs : int or None, default=None
        Number of threads that decode; -1 for one per processor.

    Returns
    -------
    ImageDataset
        Images in the sorted order of (class folder, file name), in colour. Without a table
        `class_names` are the folders' names and `clusters` is None. Files whose names begin with a
        dot or do not end like an image's are left out.

    Raises
    ------
    FileNotFoundError
        If `folder` or `class_table` does not exist.
    ValueError
        If there are no classes; a class has no folder, no row or no images; the table lacks a
        column or an entry or names a class twice; an image cannot be read; or the images differ in
        size while `size` is None.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from sinfkit import load_image_folder
    >>> with tempfile.TemporaryDirectory() as root:
    ...     for name in ("cat", "dog"):
    ...         (Path(root) / name).mkdir()
    ...         Image.new("RGB", (8, 8), "red").save(Path(root) / name / "0.png")
    ...     data = load_image_folder(root)
    >>> data.X.shape, data.y.tolist(), data.class_names
    ((2, 3, 8, 8), [0, 1], ('cat', 'dog'))
    """
    root = check_path("folder", folder)
    class_table = None if class_table is None else check_path("class_table", class_table)
    check_integer("size", size, high=_LARGEST_SIDE, optional=True)
    check_jobs(n_jobs)
    if not root.is_dir():
        raise FileNotFoundError(f"folder {root} does not exist or is not a folder.")
    wnids = sorted(path.name for path in root.iterdir() if path.is_dir() and _is_shown(path))
    if not wnids:
        raise ValueError(f"folder {root} has no sub-folders; it needs one per class.")

    class_names, clusters = tuple(wnids), None
    if class_table is not None:
        try:
            table = _read_class_table(class_table)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"class_table {class_table} is no table: {error}.") from error
        _match_table(wnids, list(table), root, class_table)
        class_names = tuple(table[wnid][0] for wnid in wnids)
        clusters = {label: table[wnid][1] for label, wnid in enumerate(wnids)}

    files = [_image_files(root / wnid) for wnid in wnids]
    paths = [path for of_class in files for path in of_class]
    labels = np.repeat(np.arange(len(files), dtype=np.int64), [len(f) for f in files])
    return ImageDataset(
        _read_images(paths, size, n_jobs), labels, class_names, clusters, tuple(paths)
    )


def _is_shown(path: Path) -> bool:
    """Whether a file is not one of the hidden ones that systems leave behind."""
    return not path.name.startswith(".")


def _image_files(folder: Path) -> list[Path]:
    """The images of a class in sorted order; a ValueError if there are none."""
    files = [f for f in folder.iterdir() if f.suffix.lower() in _EXTENSIONS and _is_shown(f)]
    if not files:
        raise ValueError(f"class folder {folder} holds no images ({', '.join(_EXTENSIONS)}).")
    return sorted(files)


def _read_class_table(path: Path) -> dict[str, tuple[str, str]]:
    """Name and cluster of each wnid."""
    if not path.is_file():
        raise FileNotFoundError(f"class_table {path} does not exist.")
    table: dict[str, tuple[str, str]] = {}
    # Spreadsheets put a byte-order mark in front, which would become part of "wnid".
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        missing = [column for column in _TABLE_COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"class_table {path} lacks {', '.join(missing)}; its first line must name the "
                f"columns {', '.join(_TABLE_COLUMNS)}."
            )
        for row in reader:
            place = f"class_table {path}, line {reader.line_num}"
            wnid, name, cluster = ((row[column] or "").strip() for column in _TABLE_COLUMNS)
            if not (wnid and name and cluster):
                raise ValueError(f"{place}: wnid, name or cluster is empty.")
            if wnid in table:
                raise ValueError(f"{place}: {wnid} appears a second time.")
            table[wnid] = (name, cluster)
    return table


def _match_table(folders: Iterable[str], wnids: Iterable[str], root: Path, table: Path) -> None:
    """Every row needs its folder, every folder its row."""
    without_folder = sorted(set(wnids) - set(folders))
    if without_folder:
        raise ValueError(
            f"In class_table {table} but without a folder in {root}: {_listed(without_folder)}."
        )
    without_row = sorted(set(folders) - set(wnids))
    if without_row:
        raise ValueError(
            f"Folders in {root} but without a row in class_table {table}: {_listed(without_row)}."
        )


def _read_images(paths: Sequence[Path], size: int | None, n_jobs: int | None) -> np.ndarray:
    """Decode all images into one array, in threads: decoding releases the interpreter's lock."""
    first = _read_image(paths[0], size)
    images = np.empty((len(paths), *first.shape), dtype=np.uint8)

    def read(index: int) -> None:
        image = _read_image(paths[index], size)
        if image.shape != first.shape:
            raise ValueError(
                f"image {paths[index]} has {image.shape[2]} x {image.shape[1]} pixels, {paths[0]} "
                f"has {first.shape[2]} x {first.shape[1]}; give size= to bring them to one."
            )
        images[index] = image

    Parallel(n_jobs=n_jobs, prefer="threads")(delayed(read)(i) for i in range(len(paths)))
    return images


def _read_image(path: Path, size: int | None) -> np.ndarray:
    """One image as uint8 (3, height, width)."""
    from PIL import Image  # comes with torchvision; only readers of files need it

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # Decoders raise whatever they like on a damaged file.
        raise ValueError(f"image {path} cannot be read: {error}") from error
    if size is not None and image.size != (size, size):
        factor = size / min(image.size)
        width, height = (max(size, round(side * factor)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)


def _listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and a sign that there are more."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if names[limit:] else "")
