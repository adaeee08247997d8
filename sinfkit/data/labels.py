"""Labels: which output of the network means which, and whether the samples agree."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln
from scipy.stats import binom

from ..errors import ArgumentError
from ..utils.params import caller_level, naming

__all__ = ["ClassTable", "check_order", "encode", "match_classes", "warn_if_mismatched"]

_LEVEL = 1e-3  # how rarely labels in the right order may be taken for exchanged ones


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
        warnings.warn(
            f"The model answers {accuracy:.1%} of the calibration samples correctly, no better "
            f"than chance ({chance:.1%}): its outputs and the labels seem mismatched. Check "
            "model_classes, and the normalisation (mean, std) of FrozenModel.",
            UserWarning,
            stacklevel=caller_level(),
        )


def check_order(table: ClassTable, answers: np.ndarray, y_encoded: np.ndarray) -> None:
    """Raise where the labels fit the network's answers far better in another order.

    Both are positions in ``table.classes``, of shape (n_samples,).  Classes that change places are
    told by an exact test, at a level divided by the number of ways in which they could.
    """
    n = len(table.classes)
    confusion = np.zeros((n, n))
    np.add.at(confusion, (y_encoded, answers), 1)
    best = linear_sum_assignment(confusion, maximize=True)[1]
    moved = np.flatnonzero(best != np.arange(n))
    share = confusion[np.arange(n), best].sum() / max(len(answers), 1)
    if not len(moved) or share <= 0.5:
        return
    now, then = confusion[moved, moved].sum(), confusion[moved, best[moved]].sum()
    ways = gammaln(n + 1) - gammaln(n - len(moved) + 1)
    if binom.logsf(then - 1, now + then, 0.5) + ways > np.log(_LEVEL):
        return
    labels = table.labels.astype(object)
    labels[table.outputs[best]] = table.classes
    raise ArgumentError(
        "The model's outputs seem to be in another order than the labels: "
        f"{np.trace(confusion) / len(answers):.1%} of the calibration samples are answered "
        f"correctly as it is, and {share:.1%} with model_classes={labels.tolist()!r}.",
        "model_classes",
    )


def encode(y: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Positions of labels in the sorted `classes`; a ValueError where one is not among them."""
    with naming("y"):
        position = np.minimum(np.searchsorted(classes, y), len(classes) - 1)
        unknown = np.asarray(classes[position] != y)
    if unknown.any():
        first = y[unknown][0] if unknown.ndim else y[0]
        raise ValueError(f"y has labels that were not in fit: {first!r} for one.")
    return position
