"""Images that are read when they are needed, and the scale of their pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)

from ..errors import ArgumentError, ArgumentTypeError
from ..frozen import FrozenModel
from ..utils.params import values_of, warn

Images = Any  # an array, a tensor, or LazyImages: rows can be asked for
Range = tuple[str, float, float]  # type, smallest and largest value

LOOKED_AT = 256  # samples, spread over all, that tell the scale of the others
_DARK = 64  # times below the largest value of `fit`: no image of the same kind, on any night
_TIMES = 8  # as large as the largest value of `fit`: no brightness, another scale


def seen_range(X: Images) -> Range:
    """Type and range of samples, from some of them."""
    if X.dtype in (np.uint8, torch.uint8):
        return "uint8", 0.0, 255.0
    low, high = _range(X)
    return "float", low, high


def match_range(X: Images, seen: Range, *, whole: bool, look: bool = True) -> Images:
    """Give `X` the scale that ``fit`` saw, or raise where it has another one.

    `whole`: X came as integers other than uint8.  Where not `look`, values are not looked at.
    """
    kind, low, high = seen
    unit = kind == "uint8" or (low >= -0.1 and high <= 1.1)
    if X.dtype in (np.uint8, torch.uint8):
        if unit:
            if look:
                _warn_of_black(_range(X)[1] / 255, 1.0 if kind == "uint8" else high)
            return X
        raise _error(
            "X holds uint8, which is divided by 255, but in fit its values went from "
            f"{low:.4g} to {high:.4g} and were taken as they are. Pass them as in fit."
        )
    if not look:
        return X
    first, last = _range(X)
    if unit and (first < -0.1 or last > 1.1):
        bytes_ = _as_bytes(X) if whole or kind == "uint8" else None
        if bytes_ is not None:
            return bytes_
    _warn_of_black(max(abs(first), abs(last)), 1.0 if kind == "uint8" else max(abs(low), abs(high)))
    if kind == "uint8":
        if first < -0.1 or last > 1.1:
            raise _error(
                f"X holds values from {first:.4g} to {last:.4g}, but in fit it was uint8, which is "
                "divided by 255. Pass uint8, or values from 0 to 1."
            )
        return X
    largest = max(abs(low), abs(high))
    now = max(abs(first), abs(last))
    negative = low >= 0 and first < -0.1 * now
    if negative or now > _TIMES * largest > 0:
        raise _error(
            f"X holds values from {first:.4g} to {last:.4g}, but in fit they went from {low:.4g} "
            f"to {high:.4g}. Pass them on the same scale"
            + (": uint8, or divided by 255." if unit else ".")
        )
    if low >= 0 and high > 64 and 0 <= first and 0 < last <= 1 and not whole:
        raise _error(
            f"X holds values up to {last:.4g}, but in fit they went up to {high:.4g}. Pass them on "
            "the same scale."
        )
    return X


def _warn_of_black(now: float, before: float) -> None:
    """Warn where the largest value is next to nothing beside that of ``fit``."""
    if 0 < now < before / _DARK:
        warn(
            f"X is next to black: its values reach {now:.2g}, but in fit they reached "
            f"{before:.3g}. "
            "Was it divided by 255 twice, or cast to integers when it went from 0 to 1?"
        )


def check_normalisation(frozen: FrozenModel, X: Images) -> None:
    """Raise if `mean` and `std` are for other channels, or another scale, than those of `X`."""
    if frozen.mean is None or frozen.std is None:
        return
    widths = {len(frozen.mean), len(frozen.std)} - {1}
    if widths and widths != {int(X.shape[1])}:
        last = X.ndim == 4 and widths == {int(X.shape[3])}
        raise ValueError(
            f"The mean and std of model are for {max(widths)} channels, but X has {X.shape[1]}."
            + (" X looks like NHWC; pass NCHW: X.transpose(0, 3, 1, 2)." if last else "")
        )
    if X.ndim < 3:
        return
    largest = max(map(abs, frozen.mean))
    if X.dtype in (np.uint8, torch.uint8):
        if largest > 1:
            raise ValueError(
                f"The mean of model is up to {largest:.4g}, but uint8 images are divided by 255 "
                "before it is subtracted: give mean and std on the scale from 0 to 1."
            )
        return
    low, high = _range(X)
    if low >= 0 and high > _TIMES and 0 < largest <= 1 and max(frozen.std) <= 1:
        raise ValueError(
            f"X holds values up to {high:.4g}, but mean and std of model are on the scale from 0 "
            f"to 1. Pass {to_unit(high)}."
        )


def full_scale(high: float) -> int:
    """What white is in pixels of whole numbers that reach `high`."""
    return 255 if high < 2 * 255 else 65535


def to_unit(high: float) -> str:
    """What is to be passed in place of such pixels, so that they go from 0 to 1."""
    white = full_scale(high)
    return f"{'uint8, or ' if white == 255 else ''}X / {white}"


def spread(X: Images, n: int) -> Images:
    """At most `n` of the samples, spread over all."""
    rows: Any = np.linspace(0, len(X) - 1, min(len(X), n)).astype(int)
    return X[torch.as_tensor(rows, device=X.device) if isinstance(X, torch.Tensor) else rows]


def _range(X: Images) -> tuple[float, float]:
    """Smallest and largest value of some samples."""
    some = spread(X, LOOKED_AT)
    return float(some.min()), float(some.max())


def _as_bytes(X: Images) -> Images | None:
    """The same values as uint8, or None where they are no bytes."""
    with np.errstate(invalid="ignore"):
        small: Any = X.to(torch.uint8) if isinstance(X, torch.Tensor) else X.astype(np.uint8)
    return small if bool((small == X).all()) else None


def _error(message: str) -> ArgumentError:
    return ArgumentError(message, "X")


_IMAGE_KEYS = ("image", "img", "pixel_values")
_LABEL_KEYS = ("label", "labels")
_AT_ONCE = 256  # images in memory where all are looked at


class LazyImages:
    """Images of a data set as an array (n_samples, ...) of which rows are read when asked."""

    ndim: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __init__(self, items: Any, n_threads: int = 0) -> None:
        self._items, self._threads = items, n_threads
        self._rows = np.arange(len(items))
        self._change: Callable[[np.ndarray], np.ndarray] | None = None
        if not len(items):
            raise ArgumentError("Found X with 0 samples; at least 1 is needed.", "X")
        first = _array(items[0])
        if not np.array_equal(first, _array(items[0]), equal_nan=first.dtype.kind == "f"):
            raise ArgumentError(
                "The data set gives another image when the same one is asked for again: its "
                "transform is random. Pass it with the transform that is used for testing.",
                "X",
            )
        self._sample, self._given = first.shape, first.dtype
        kept = first.dtype in (np.uint8, np.float32, np.float64)
        floating = np.dtype(np.float32 if first.dtype.kind == "f" else np.float64)
        self.dtype = first.dtype if kept else floating
        self._describe()

    @property
    def whole(self) -> bool:
        """Whether the images came as integers other than uint8."""
        return self._given.kind in "iu" and self._given != np.uint8

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any) -> np.ndarray:
        places = np.atleast_1d(
            self._rows[np.asarray(rows) if not isinstance(rows, slice) else rows]
        )
        if self._threads > 1 and len(places) > 1:
            with ThreadPoolExecutor(self._threads) as pool:
                read = list(pool.map(self._read, places.tolist()))
        else:
            read = [self._read(place) for place in places.tolist()]
        batch = np.stack(read) if read else np.empty((0, *self._sample), self.dtype)
        return batch if self._change is None else self._change(batch)

    def subset(self, rows: np.ndarray) -> LazyImages:
        """Some of the images, still unread."""
        twin = self._twin()
        twin._rows = self._rows[rows]
        twin._describe()
        return twin

    def changed(self, change: Callable[[np.ndarray], np.ndarray]) -> LazyImages:
        """The images as a function of a batch gives them, which keeps their shape."""
        twin = self._twin()
        twin._change = change
        return twin

    def digest(self) -> str:
        """SHA-256 of all images, for caches."""
        found = hashlib.sha256(str((self.shape, self.dtype)).encode())
        for start in range(0, len(self), _AT_ONCE):
            found.update(np.ascontiguousarray(self[start : start + _AT_ONCE]).data)
        return found.hexdigest()

    def _twin(self) -> LazyImages:
        twin = LazyImages.__new__(LazyImages)
        twin.__dict__.update(self.__dict__)
        return twin

    def _describe(self) -> None:
        """Say what an array would say."""
        self.shape = (len(self._rows), *self._sample)
        self.ndim = len(self.shape)

    def _read(self, place: int) -> np.ndarray:
        """One image, of the shape and type of the first one."""
        image = _array(self._items[place])
        if image.shape != self._sample or image.dtype != self._given:
            raise ArgumentError(
                f"Image {place} of X has shape {image.shape} and type {image.dtype}, but the first "
                f"one has {self._sample} and {self._given}. Resize and convert them in the data "
                "set's transform.",
                "X",
            )
        image = image.astype(self.dtype, copy=False)
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise ArgumentError(f"Image {place} of X contains NaN or infinity.", "X")
        return image


def images_of(X: Any) -> Any:
    """Samples of a data set, a data loader or a list of PIL images; others are given back."""
    if isinstance(X, DataLoader):
        return _images(_dataset_of(X), X.num_workers)
    if isinstance(X, Dataset):
        return _images(X)
    if getattr(getattr(X, "dtype", None), "kind", "") == "O" and X.ndim == 1:  # one in each place
        X = list(X)
    return LazyImages(X) if isinstance(X, (list, tuple)) and X and _is_pil(X[0]) else X


def with_labels(X: Any, y: Any) -> tuple[Any, Any]:
    """Samples, and their labels: `y`, or those of the data set where that is None."""
    images = images_of(X)
    if y is None and isinstance(X, (DataLoader, Dataset)):
        y = _labels(_dataset_of(X) if isinstance(X, DataLoader) else X)
    return images, y


def _images(dataset: Any, n_threads: int = 0) -> Any:
    """Samples of a data set; those of a TensorDataset lie in memory."""
    if type(dataset) is TensorDataset:
        return dataset.tensors[0]
    if isinstance(dataset, IterableDataset):
        raise ArgumentTypeError(
            "X is an IterableDataset, whose images have no numbers, and they are read more than "
            "once and in another order. Pass a data set with __getitem__ and __len__.",
            "X",
        )
    if not hasattr(dataset, "__len__"):
        raise ArgumentTypeError("The data set X has no __len__.", "X")
    return LazyImages(dataset, n_threads)


class _Collated(Dataset[Any]):
    """The items of a data set as the function makes them that a loader collates batches with."""

    def __init__(self, dataset: Any, collate: Callable[[Any], Any], *, batches: bool) -> None:
        self._dataset, self._collate, self._batches = dataset, collate, batches

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> Any:
        item = self._dataset[i]
        return _only(self._collate([item])) if self._batches else self._collate(item)


def _only(batch: Any) -> Any:
    """The one item of a batch."""
    if isinstance(batch, Mapping):
        return {key: _only(part) for key, part in batch.items()}
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return tuple(map(_only, batch))
    return batch[0] if hasattr(batch, "__getitem__") and not isinstance(batch, str) else batch


def _dataset_of(loader: DataLoader[Any]) -> Any:
    """The data set of a loader, with its items as the loader gives them."""
    dataset, collate = loader.dataset, loader.collate_fn
    if isinstance(dataset, IterableDataset):
        return dataset
    _check_sampler(loader)
    if collate in (default_collate, default_convert) or not hasattr(dataset, "__len__"):
        return dataset
    return _Collated(dataset, collate, batches=loader.batch_sampler is not None)


def _check_sampler(loader: DataLoader[Any]) -> None:
    """Raise where a loader does not give each image of its data set once."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    plain = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and len(sampler) == len(sampler.data_source)
    )
    if not plain:
        raise ArgumentTypeError(
            f"The loader X draws its images by a {type(sampler).__name__}, and answers are in the "
            "order of the data set. Pass the data set, or torch.utils.data.Subset of it.",
            "X",
        )


def _labels(dataset: Any) -> np.ndarray | None:
    """Labels of a data set, without its images where it keeps them apart; None without labels."""
    if isinstance(dataset, Subset):
        inner = _labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=int)]
    if isinstance(dataset, ConcatDataset):
        parts = [_labels(part) for part in dataset.datasets]
        return (
            None
            if any(p is None for p in parts)
            else np.concatenate([p for p in parts if p is not None])
        )
    if type(dataset) is TensorDataset:
        return values_of("y", dataset.tensors[1]) if len(dataset.tensors) > 1 else None
    n = len(dataset)
    known = getattr(dataset, "targets", None)
    if isinstance(known, (Sequence, np.ndarray, torch.Tensor)) and len(known) == n:
        found = np.asarray(known)
        # Not what the data set makes of them, should that be something else.
        if found.ndim == 1 and all(_label(dataset[i]) == found[i] for i in {0, n // 2, n - 1}):
            return found
    if _label(dataset[0]) is None:
        return None
    return np.asarray([_label(dataset[i]) for i in range(n)])


def _label(item: Any) -> Any:
    """The label in an item of a data set; None if there is none."""
    if isinstance(item, Mapping):
        found = next((item[key] for key in _LABEL_KEYS if key in item), None)
    else:
        found = item[1] if isinstance(item, (tuple, list)) and len(item) > 1 else None
    return found.item() if isinstance(found, (torch.Tensor, np.generic)) else found


def _array(item: Any) -> np.ndarray:
    """The image in an item of a data set, channels first."""
    image = item
    if isinstance(item, Mapping):
        image = next((item[key] for key in _IMAGE_KEYS if key in item), None)
    elif isinstance(item, (tuple, list)) and item:
        image = item[0]
    if _is_pil(image):
        if image.mode[0] not in "IF" and image.mode not in ("L", "RGB"):  # more than 8 bits
            image = image.convert("L" if image.mode == "1" else "RGB")
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    if isinstance(image, (torch.Tensor, np.ndarray)):
        found: np.ndarray = values_of("X", image)
        return found
    if isinstance(item, Mapping) and image is None:
        raise ArgumentTypeError(
            f"An item of the data set X must have its image under {_one_of(_IMAGE_KEYS)}, and its "
            f"label under {_one_of(_LABEL_KEYS)}, but has {', '.join(map(repr, item))}.",
            "X",
        )
    raise ArgumentTypeError(
        "An item of the data set X must be an image or start with one, and an image a tensor, an "
        f"array or a PIL image, not {type(image).__name__}.",
        "X",
    )


def _one_of(names: Sequence[str]) -> str:
    """Some names for a message."""
    return " or ".join(map(repr, names))


def _is_pil(image: Any) -> bool:
    """Whether this is an image of PIL, which need not be installed."""
    return hasattr(image, "getbands") and hasattr(image, "mode")
