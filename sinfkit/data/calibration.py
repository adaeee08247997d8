"""The samples that a network is studied on: matched with its outputs, and read in batches."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln
from scipy.stats import binom
from torch import Tensor, fx

from ..errors import ArgumentError, CalibrationWarning
from ..frozen import FrozenModel
from ..graph.cost import count_macs
from ..graph.heads import logits_graph
from ..slicing.groups import ChannelGroup, find_groups
from ..utils.device import host_tensor, in_pieces, loaded_device, settle_after_fork
from ..utils.params import naming, warn
from ..utils.pickling import pack
from .images import Images, LazyImages, full_scale, spread, to_unit

_LEVEL = 1e-3  # how rarely labels in the right order may be taken for exchanged ones
_DOUBT = 1e-2  # and be doubted


@dataclass(frozen=True)
class ClassTable:
    """Which output of the network means which label.

    `classes` are the sorted labels in question, and `outputs` the network's output for each;
    `labels` are those of all its outputs, in their order.
    """

    classes: np.ndarray
    outputs: np.ndarray
    labels: np.ndarray

    def encode(self, y: np.ndarray) -> np.ndarray:
        """Labels to positions in `classes`; -1 for labels that are not among them."""
        position = np.searchsorted(self.classes, y)
        position = np.minimum(position, len(self.classes) - 1)
        return np.where(self.classes[position] == y, position, -1)


def match_classes(
    y: np.ndarray,
    n_outputs: int,
    model_classes: Sequence[Any] | None,
    classes: Sequence[Any] | None = None,
    *,
    complete: bool = True,
) -> ClassTable:
    """Match the labels of the calibration samples with the network's outputs.

    Without `model_classes`, integers within ``0..n_outputs-1`` are output indices; other labels
    are matched in sorted order if there are `n_outputs` of them.  `classes` are the labels to keep,
    by default all of the network's; where `complete`, each must occur.
    """
    present = np.unique(y)
    if model_classes is not None:
        with naming("model_classes"):
            labels = np.asarray(model_classes)
            np.unique(labels)
        if labels.ndim != 1 or len(labels) != n_outputs:
            raise ValueError(
                f"model_classes must have one label for each of the model's {n_outputs} outputs, "
                f"got shape {labels.shape}."
            )
        if len(np.unique(labels)) != len(labels):
            raise ValueError("model_classes names a label twice.")
    elif present.dtype.kind in "iub" and present.min() >= 0 and present.max() < n_outputs:
        labels = np.arange(n_outputs)
    elif len(present) == n_outputs:
        _check_text(present)
        labels = present
    else:
        raise ValueError(
            f"y has {len(present)} distinct labels, but the model has {n_outputs} outputs. Pass "
            "model_classes=[...], the label of each output in order."
        )
    unknown = present[~np.isin(present, labels)]
    if len(unknown):
        raise ValueError(
            f"y has labels that the model does not know: {_list(unknown)}. See model_classes."
        )
    if classes is not None:
        with naming("classes"):
            wanted = np.asarray(classes)
        if wanted.ndim != 1:
            raise ValueError("classes must be a sequence of labels, or None for all.")
        with naming("classes"):
            wanted = np.unique(wanted)
        if wanted.size == 0:
            raise ValueError("classes is empty; name at least one class, or pass None for all.")
        unknown = wanted[~np.isin(wanted, labels)]
        if len(unknown):
            raise ValueError(f"classes has labels that the model does not know: {_list(unknown)}.")
    else:
        wanted = np.unique(labels)
    missing = wanted[~np.isin(wanted, present)]
    if complete and len(missing):
        raise ValueError(
            f"No calibration samples for class(es) {_list(missing)} in y, or none of a "
            "sample_weight above 0. Give samples of every class of the model; DCSPruner can also "
            "be told the classes to keep (classes=...)."
        )
    order = np.argsort(labels, kind="stable")
    outputs = order[np.searchsorted(labels, wanted, sorter=order)]
    # The labels' own type: present may hold the same values in another one.
    return ClassTable(wanted.astype(present.dtype, copy=False), outputs, labels)


def _check_text(present: np.ndarray) -> None:
    """Raise where numbers are given as text, whose order is not that of the numbers."""
    if present.dtype.kind not in "OSU" or not all(str(label).isdecimal() for label in present):
        return
    numbers = [int(label) for label in present]
    if numbers != sorted(numbers):
        raise ValueError(
            f"y holds numbers as text, whose sorted order is {_list(present)}: the model's outputs "
            "are hardly in it. Pass integers, y.astype(int), or model_classes=[...], the label of "
            "each output in order."
        )


def _list(values: np.ndarray, limit: int = 5) -> str:
    """A few values, and how many more."""
    shown = ", ".join(repr(v.item() if hasattr(v, "item") else v) for v in values[:limit])
    return shown + (f" and {len(values) - limit} more" if len(values) > limit else "")


def warn_if_mismatched(accuracy: float, n_classes: int, n_samples: int) -> None:
    """Warn where the base answers the calibration samples no better than chance.

    Chance is 1/K; three standard errors above it tell a weak network from a wrong label order.
    """
    chance = 1.0 / n_classes
    if n_classes > 1 and accuracy <= chance + 3 * np.sqrt(chance * (1 - chance) / n_samples):
        warn(
            f"The model answers {accuracy:.1%} of the calibration samples correctly, no better "
            f"than chance ({chance:.1%}): its outputs and the labels seem mismatched. Check "
            "model_classes, and the normalisation (mean, std) of FrozenModel.",
            CalibrationWarning,
        )


def check_order(table: ClassTable, answers: np.ndarray, y_encoded: np.ndarray) -> None:
    """Raise, or warn, where the labels fit the network's answers far better in another order.

    Both are positions in ``table.classes``, of shape (n_samples,).  Classes that change places are
    told by an exact test, at a level divided by the number of ways in which they could.
    """
    n = len(table.classes)
    confusion = np.zeros((n, n))
    np.add.at(confusion, (y_encoded, answers), 1)
    best = linear_sum_assignment(confusion, maximize=True)[1]
    moved = np.flatnonzero(best != np.arange(n))
    share = confusion[np.arange(n), best].sum() / max(len(answers), 1)
    # Over classes: where most samples are of one, a network that always answers the same is no
    # better in another order.
    seen = confusion.sum(1)
    shares = confusion[np.arange(n), best][seen > 0] / seen[seen > 0]
    if not len(moved) or share <= 0.5 or shares.mean() <= 0.5:
        return
    now, then = confusion[moved, moved].sum(), confusion[moved, best[moved]].sum()
    ways = gammaln(n + 1) - gammaln(n - len(moved) + 1)
    chance = binom.logsf(then - 1, now + then, 0.5) + ways
    if chance > np.log(_DOUBT):
        return
    labels = table.labels.astype(object)
    labels[table.outputs[best]] = table.classes
    text = (
        "The model's outputs and the labels seem mismatched, in another order: "
        f"{np.trace(confusion) / len(answers):.1%} of the calibration samples are answered "
        f"correctly as it is, and {share:.1%} with model_classes={labels.tolist()!r}."
    )
    if chance > np.log(_LEVEL):
        warn(text, CalibrationWarning)
    else:
        raise ArgumentError(text, "model_classes")


_TRIED = 256  # samples that are asked about on other scales
_GOOD = 0.7  # of accuracy: a network that was trained for it; below this it may be by chance
_FAR = 0.1  # by so much of accuracy, averaged over classes, another scale must be better


def check_scale(calibration: Calibration) -> None:
    """Raise, or warn, where the network is far better at the same samples on another scale.

    Samples that are normalised twice, bytes for a network that wants shares of 255 or the other
    way round, and channels in reverse are told by the labels, with an exact test.
    """
    batcher, y = calibration.batcher, calibration.y_encoded
    rows = np.flatnonzero(y >= 0)
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _TRIED)).astype(int)]
    columns = torch.as_tensor(calibration.table.outputs)

    def right(change: Callable[[Tensor], Tensor]) -> np.ndarray:
        loaded = (batcher.load(calibration.X[part]) for part in _parts(rows, batcher.batch_size))
        with torch.inference_mode():
            answers = list(
                in_pieces(lambda x: calibration.graph(change(x)).cpu()[:, columns], loaded)
            )
        found: np.ndarray = torch.cat(answers).argmax(1).numpy() == y[rows]
        return found

    now = right(batcher.normalise)
    few = spread(calibration.X, min(_TRIED, batcher.batch_size))
    others = _other_scales(calibration, batcher.load(few))
    for what, change in others:
        then = right(change)
        better, worse = (then & ~now).sum(), (now & ~then).sum()
        gained = _over_classes(then, y[rows]) - _over_classes(now, y[rows])
        if gained < _FAR:
            continue
        if binom.sf(better - 1, better + worse, 0.5) * len(others) > _LEVEL:
            continue
        text = (
            f"The model answers {now.mean():.1%} of {len(rows)} calibration samples correctly as "
            f"they are, and {then.mean():.1%} {what}."
        )
        if then.mean() >= _GOOD:
            raise ArgumentError(text, "X")
        warn(text)


def _other_scales(
    calibration: Calibration, some: Tensor
) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """What else samples could have been meant to be, and how loaded ones become it."""
    normalise, low, high = calibration.batcher.normalise, float(some.min()), float(some.max())
    bytes_ = calibration.X.dtype in (np.uint8, torch.uint8)
    found: list[tuple[str, Callable[[Tensor], Tensor]]] = []
    if calibration.frozen.mean is not None:
        text = "where mean and std are not applied: they seem to be applied already, or wrong"
        found.append((text, lambda x: x))
    if low >= 0 and high > 8:
        white = full_scale(high)
        text = f"divided by {white}: pass {to_unit(high)}"
        found.append((text, lambda x: normalise(x / white)))
    elif low >= 0 and high <= 1.01:
        how = "X.astype(numpy.float32)" if bytes_ else "X * 255"
        found.append((f"as numbers from 0 to 255: pass {how}", lambda x: normalise(x * 255)))
    if some.ndim == 4 and some.shape[1] == 3:
        text = "with the channels in reverse order: pass X[:, ::-1]"
        found.append((text, lambda x: normalise(x.flip(1))))
    return found


def _parts(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Rows in parts of a size."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _over_classes(right: np.ndarray, y: np.ndarray) -> float:
    """Accuracy averaged over the classes that occur."""
    return float(np.mean([right[y == k].mean() for k in np.unique(y)]))


def encode(y: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Positions of labels in the sorted `classes`; a ValueError where one is not among them."""
    with naming("y"):
        position = np.minimum(np.searchsorted(classes, y), len(classes) - 1)
        unknown = np.asarray(classes[position] != y)
    if unknown.any():
        first = y[unknown][0] if unknown.ndim else y[0]
        raise ValueError(f"y has labels that were not in fit: {first!r} for one.")
    return position


@dataclass
class Calibration:
    """A base network and the samples it is studied on, checked and matched.

    Shapes: `X` (n_samples, ...), `y_encoded` (n_samples,), `example` (1, ...), `weight`
    (n_samples,).
    """

    frozen: FrozenModel
    graph: fx.GraphModule
    ending: str  # of the network, see `graph.heads`
    output: str
    X: Images
    y_encoded: np.ndarray
    table: ClassTable
    n_outputs: int
    batcher: Batcher
    example: torch.Tensor
    seed: int
    weight: np.ndarray

    def weights(self, index: np.ndarray) -> np.ndarray:
        """How many times each of the samples `index` counts."""
        return self.weight[index]

    @functools.cached_property
    def key(self) -> tuple[str, ...]:
        """Tells network, samples and batches apart from others, for caches."""
        return (
            self.frozen.digest,
            self.X.digest() if isinstance(self.X, LazyImages) else joblib.hash(self.X),
            str(self.batcher.device),
            str(self.batcher.batch_size),
        )

    @functools.cached_property
    def groups(self) -> list[ChannelGroup]:
        """The network's coupled channels, in forward order."""
        with naming("model"):
            return find_groups(self.graph, self.example, self.output)

    @functools.cached_property
    def macs(self) -> tuple[int, dict[str, int]]:
        """The network's multiplications for one sample: all, and by layer."""
        return count_macs(self.graph, self.example)

    def pass_seconds(self) -> float:
        """Seconds of one pass over the samples, from one batch of them."""
        few = spread(self.X, self.batcher.batch_size)
        with torch.inference_mode():
            self.graph(self.example)
            start = time.perf_counter()
            for x in self.batcher(few):
                self.graph(x).cpu()
        return (time.perf_counter() - start) * len(self.X) / len(few)

    def __getstate__(self) -> dict[str, Any]:
        """For a job elsewhere: the samples stay here, and the graph is traced anew there."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("X", "graph", "batcher")}
        state["example"] = pack(self.example)
        batcher = self.batcher
        state["batcher"] = (str(batcher.device), batcher.dtype, batcher.batch_size)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        stored, dtype, batch_size = state.pop("batcher")
        device = loaded_device(stored)
        self.__dict__.update(state)
        self.example = state["example"].unpack(device)
        self.batcher = Batcher(self.frozen, device, dtype, batch_size)
        self.graph = logits_graph(self.frozen.module(device), self.example, self.ending)


class Batcher:
    """Batches of samples as the network wants them: on its device, in its type, normalised."""

    def __init__(
        self, frozen: FrozenModel, device: torch.device, dtype: torch.dtype, batch_size: int
    ) -> None:
        settle_after_fork()  # whatever computes needs batches first
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self._mean = None if frozen.mean is None else torch.tensor(frozen.mean, dtype=dtype)
        self._std = None if frozen.std is None else torch.tensor(frozen.std, dtype=dtype)

    def load(self, X: Images) -> torch.Tensor:
        """Put samples on the device: float, uint8 divided by 255.  Not normalised."""
        if isinstance(X, np.ndarray):
            X = host_tensor(X)
        x = X.to(self.device)
        x = x.to(self.dtype).div_(255) if x.dtype == torch.uint8 else x.to(self.dtype)
        return x

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """(x - mean) / std per channel."""
        if self._mean is None or self._std is None:
            return x
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x - self._mean.to(x.device).view(shape)) / self._std.to(x.device).view(shape)

    def raw(self, X: Images) -> Iterator[torch.Tensor]:
        """Batches that are loaded, not normalised (SINFNetwork normalises by itself)."""
        for start in range(0, len(X), self.batch_size):
            yield self.load(X[start : start + self.batch_size])

    def __call__(self, X: Any, index: np.ndarray | None = None) -> Iterator[torch.Tensor]:
        """Normalised batches of `X`, or of its rows `index` in that order."""
        n = len(X) if index is None else len(index)
        for start in range(0, n, self.batch_size):
            stop = min(start + self.batch_size, n)
            yield self.at(X, slice(start, stop) if index is None else index[start:stop])

    def at(self, X: Any, rows: Any) -> torch.Tensor:
        """One normalised batch: these rows of `X`."""
        return self.normalise(self.load(X[rows]))

    def stacked(self, X: Any, index: np.ndarray) -> torch.Tensor:
        """The rows `index` of `X` as one normalised batch."""
        return stack(self(X, index), len(index))


def stack(batches: Iterable[torch.Tensor], n: int) -> torch.Tensor:
    """Batches of `n` samples in all as one, never held twice as `torch.cat` would."""
    start, whole = 0, torch.empty(0)
    for batch in batches:
        if start == 0:
            whole = batch.new_empty((n, *batch.shape[1:]))
        whole[start : start + len(batch)] = batch
        start += len(batch)
    return whole
