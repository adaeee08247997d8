"""What a pruned network was made from, and what all of them got right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import rst
from record import from_hex
from stats import Estimate, estimate

from sinfkit.criteria import CRITERIA

Contestant = tuple[str, str, str, str]  # library, criterion, schedule, repair


def needs(contestant: Contestant) -> str:
    """What filters are chosen by beside the weights, and whether the repair sees images."""
    library, criterion, schedule, repair = contestant
    if library == "torch-pruning":
        found = ["images", "labels", "gradients"] if criterion == "taylor" else []
    else:
        fields = CRITERIA[criterion].needs
        gradients = bool(fields & {"taylor", "taylor_squared"})
        data = fields - {"weight", "norm_scale", "norm_gain", "couplings", "generator"}
        wanted = {"images": data, "labels": gradients or "y" in fields, "gradients": gradients}
        found = [name for name, value in wanted.items() if value]
    if library != "torch-pruning" and schedule == "global" and "images" not in found:
        found.append("images (widths)")  # what a layer's readers lose is measured
    elif repair != "none" and "images" not in found:
        found.append("images (repair)")
    return ", ".join(found) or "nothing"


class Found:
    """Right answers and sizes by contestant and budget, averaged over resamples and seeds.

    Parameters
    ----------
    rows : sequence of mapping
        Of one file.
    at : {"budget", "max_drop"}
        What the columns are: fractions of the multiplications, or what IterTVSPrune may lose.

    Attributes
    ----------
    columns : list of str
        Budgets, the largest first, or drops.
    right : dict of Contestant to list of ndarray of shape (n_images, n_columns)
        An array for each cluster; NaN where nothing was measured or the budget cannot be met.
    macs, params : dict of Contestant to ndarray of shape (n_columns,)
        As fractions of the base's.
    """

    def __init__(self, rows: Sequence[Mapping[str, str]], at: str = "budget") -> None:
        self.whole = next(row for row in rows if row["criterion"] == "unpruned")
        cells: dict[tuple[Contestant, str], list[Mapping[str, str]]] = {}
        for row in rows:
            if row[at] and row["criterion"] != "unpruned":
                name = row["library"], row["criterion"], row["schedule"], row["repair"]
                cells.setdefault((name, row[at]), []).append(row)
        self.columns = rst.in_order(column for _, column in cells)
        if at == "budget":
            self.columns.reverse()
        self.right: dict[Contestant, list[np.ndarray]] = {}
        self.macs: dict[Contestant, np.ndarray] = {}
        self.params: dict[Contestant, np.ndarray] = {}
        for name in dict.fromkeys(name for name, _ in cells):
            own = [
                [row for row in cells.get((name, column), []) if row["images"] != "0"]
                for column in self.columns
            ]
            self.right[name] = [np.stack(c, 1) for c in zip(*map(self._mean, own), strict=True)]
            self.macs[name] = np.array([self._share(found, "macs") for found in own])
            self.params[name] = np.array([self._share(found, "params") for found in own])

    def _mean(self, rows: Sequence[Mapping[str, str]]) -> list[np.ndarray]:
        """How often each image was right, by cluster."""
        n = int(self.whole["images"])
        right = np.full(n, np.nan)
        if rows:
            right = np.mean([from_hex(row["answers"], n) for row in rows], axis=0)
        sizes = [int(size) for size in self.whole["cluster_images"].split()]
        return [part for part in np.split(right, np.cumsum(sizes)[:-1]) if len(part)]

    def _share(self, rows: Sequence[Mapping[str, str]], unit: str) -> float:
        """Mean size over that of the base."""
        sizes = [int(row[unit]) / int(self.whole[unit]) for row in rows]
        return float(np.mean(sizes)) if sizes else np.nan

    def accuracy(self, name: Contestant) -> np.ndarray:
        """Share of right answers in each column."""
        return np.concatenate(self.right[name]).mean(0)

    def overall(self, name: Contestant) -> float:
        """Mean accuracy over columns; a contestant that lacks some of them comes last."""
        found = self.accuracy(name)
        return float(found.mean()) if not np.isnan(found).any() else float(np.nanmean(found)) - 1

    def base_right(self) -> list[np.ndarray]:
        """Right answers of the unpruned network, by cluster."""
        return self._mean([self.whole])

    def ahead(self, name: Contestant, other: Contestant) -> Estimate | None:
        """Difference on the mean over the columns that both have, paired by image."""
        both = ~np.isnan(self.accuracy(name) + self.accuracy(other))
        if not both.any():
            return None
        pairs = zip(self.right[name], self.right[other], strict=True)
        return estimate([(a - b)[:, both].mean(1) for a, b in pairs])

    def lost(self, name: Contestant, column: int) -> Estimate:
        """Accuracy lost against the unpruned network."""
        pairs = zip(self.base_right(), self.right[name], strict=True)
        return estimate([before - after[:, column] for before, after in pairs])


def label(name: Contestant) -> str:
    """A contestant in words, without its repair."""
    library, criterion, schedule, _ = name
    if schedule == "iterative":
        return "IterTVSPrune"
    text = f"{criterion}, {schedule}"
    return f"torch-pruning {text}" if library == "torch-pruning" else text
