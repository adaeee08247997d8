"""Table 1: which filter score keeps most of a cluster's accuracy, under which repair.

Every criterion ranks the same network's filters on a cluster's images; the same number of filters
is sliced out of each layer; accuracy is measured among the cluster's classes::

    python criteria_table.py --weights vgg16.pt --data ~/images --held-out
    python criteria_table.py --quick

Units: cluster, calibration resample, test image. Criteria that draw at random have several seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import figures
import numpy as np
import rst
import study as base
from record import Table, files, from_hex, read
from stats import Estimate, estimate
from suffix import REPAIRS, Case
from sweep import RATIOS, UNPRUNED, VALUES, sweep

from sinfkit.criteria import CRITERIA

NAME = "criteria"
KEYS = ("network", "width", "base_seed", "split", "cluster", "resample", "criterion", "seed")
KEYS += ("pool", *RATIOS)
SEEDED = ("random", "dcs_shuffled")
CONTROLS = ("random", "activation_std", "activation_mean", "dcs_shuffled", "dcs_closed_form")
SHOWN = ("dcs", "taylor", "fdr", "obs", "l1", "activation_std", "random")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then draw."""
    options = parse(arguments)
    study = base.open_study(options)
    path = options.out / f"{NAME}_{study.base.label}_{study.split}.csv"
    sweep(
        study,
        Table(path, KEYS, VALUES, study.constants()),
        recipes(options),
        score,
        ratios=options.ratios,
        repairs=options.repairs,
        resamples=options.resamples,
        first_layer=options.first_layer,
    )
    draw(path)
    print(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what is not given comes from ``frozen.toml``."""
    frozen = base.frozen()
    parser = base.parser(__doc__)
    parser.add_argument("--first-layer", help="layers before it stay whole")
    parser.add_argument("--criteria", nargs="+", choices=sorted(CRITERIA))
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS)
    parser.add_argument(
        "--ratios", nargs="+", metavar="FIRST,LAST", help="fractions removed, such as 0.1,0.5"
    )
    parser.add_argument("--pools", nargs="+", type=int, help="cells per side, for all criteria")
    parser.add_argument("--resamples", type=int, default=frozen["units"]["resamples"])
    parser.add_argument("--seeds", type=int, default=frozen["units"]["seeds"])
    parser.add_argument(
        "--sequential",
        action="store_true",
        help="the best criteria under least squares layer by layer, at two pairs of ratios",
    )
    options = parser.parse_args(arguments)
    part = "sequential" if options.sequential else "full"
    chosen = {
        "full": (list(CRITERIA), ["none", "match", "static"], frozen["slicing"]["ratios"]),
        "sequential": (
            frozen["sequential"]["criteria"],
            ["least_squares"],
            frozen["slicing"]["two_ratios"],
        ),
    }[part]
    if options.quick:
        options.resamples, options.seeds = min(options.resamples, 2), min(options.seeds, 2)
    options.criteria = options.criteria or chosen[0]
    options.repairs = options.repairs or chosen[1]
    options.ratios = [_pair(text) for text in options.ratios or ()] or chosen[2]
    return options


def _pair(text: str) -> list[float]:
    """Two numbers from ``"0.1,0.5"``."""
    first, last = text.split(",")
    return [float(first), float(last)]


def recipes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Criterion, seed and cells per side of everything to be scored."""
    pools = base.frozen()["pool"]
    return [
        {"criterion": criterion, "seed": seed, "pool": pool}
        for criterion in options.criteria
        for seed in range(options.seeds if criterion in SEEDED else 1)
        for pool in options.pools or [pools.get(criterion, pools["default"])]
    ]


def score(case: Case, recipe: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Filter scores by group; all that know DCS's options get them."""
    return case.scores(
        recipe["criterion"], base.frozen()["dcs"], pool=recipe["pool"], seed=recipe["seed"]
    )


class Accuracies:
    """Right answers by criterion and ratio, under one repair.

    Each is an array per cluster, its rows test images and its columns ratios, averaged over
    calibration resamples and seeds.
    """

    def __init__(self, rows: Sequence[Mapping[str, str]], repair: str) -> None:
        found: dict[tuple[str, str, str], list[np.ndarray]] = {}
        ratios: dict[str, str] = {}
        for row in rows:
            if row["repair"] == repair and row["criterion"] != UNPRUNED:
                name = row["criterion"] + ("" if row["pool"] == "1" else f", {row['pool']} cells")
                right = from_hex(row["answers"], int(row["images"]))
                found.setdefault((name, row["cluster"], row["max_ratio"]), []).append(right)
                ratios[row["max_ratio"]] = row["min_ratio"]
        self.ratios = rst.in_order(ratios)
        self.removed = [(float(ratios[high]), float(high)) for high in self.ratios]
        names = list(dict.fromkeys(name for name, _, _ in found))
        clusters = sorted({cluster for _, cluster, _ in found})
        # A run that is still under way: compare where nothing is missing.
        self.clusters = [
            cluster
            for cluster in clusters
            if all((name, cluster, ratio) in found for name in names for ratio in self.ratios)
        ]
        self.right = {
            name: [
                np.stack([np.mean(found[name, cluster, r], axis=0) for r in self.ratios], axis=1)
                for cluster in self.clusters
            ]
            for name in names
            if self.clusters
        }

    def means(self, name: str) -> np.ndarray:
        """Mean accuracy at each ratio."""
        return rst.column_means(self.right[name])

    def overall(self, name: str) -> float:
        """Mean accuracy over ratios."""
        return float(self.means(name).mean())

    def ahead(self, name: str, other: str) -> Estimate:
        """Difference of two criteria on the mean over ratios, paired by image."""
        both = zip(self.right[name], self.right[other], strict=True)
        return estimate([(a - b).mean(1) for a, b in both])

    def best_other(self) -> str:
        """The best criterion that is no form of DCS."""
        others = [name for name in self.right if not name.startswith("dcs")]
        return max(others, key=self.overall)


def unpruned(rows: Sequence[Mapping[str, str]], clusters: Sequence[str]) -> float:
    """Accuracy of the unpruned network among each cluster's classes."""
    own = {row["cluster"]: row for row in rows if row["criterion"] == UNPRUNED}
    return float(np.mean([int(own[c]["right"]) / int(own[c]["images"]) for c in clusters]))


def draw(path: Path) -> Path | None:
    """Accuracy against the share of filters removed, one panel for each repair."""
    rows = read(path)
    present = [r for r in REPAIRS if any(row["repair"] == r for row in rows)]
    tables = {repair: Accuracies(rows, repair) for repair in present}
    tables = {repair: found for repair, found in tables.items() if found.right}
    if not tables:
        return None
    figure, axes = figures.panels(len(tables))
    ends = []
    for axis, (repair, found) in zip(axes, tables.items(), strict=True):
        x = [50 * (low + high) for low, high in found.removed]
        labels = []
        for name in sorted(found.right, key=lambda name: name in SHOWN):
            shown = name in SHOWN
            colour = figures.COLOURS[SHOWN.index(name)] if shown else figures.GREY
            y = 100 * found.means(name)
            axis.plot(x, y, "o-" if shown else "-", color=colour, linewidth=1.6 if shown else 0.8)
            if shown:
                labels.append((x[-1], float(y[-1]), name, colour))
        whole = 100 * unpruned(rows, found.clusters)
        axis.axhline(whole, color="0.3", linestyle="--", linewidth=1)
        axis.annotate("unpruned", (x[0], whole), xytext=(0, 3), textcoords="offset points")
        axis.set(title=f"repair: {repair}", xlabel="filters removed, mean over layers (%)")
        axis.margins(x=0.05)
        ends.append((axis, labels))
    axes[0].set_ylabel("accuracy within the cluster (%)")
    return figures.finish(figure, ends, path.with_suffix(".png"))


def page(folder: Path) -> rst.Page | None:
    """The page of this table, from all its files in a folder."""
    body = []
    for path, label, split in files(folder, NAME):
        rows = read(path)
        image = draw(path)
        if image is None:
            continue
        body.append(rst.section(f"{label}, {split} images"))
        body.append(
            f"{rst.split_note(split)} {rst.units(rows, 'cluster', 'resample')}; random criteria "
            f"with several seeds. {rst.provenance(rows)}"
        )
        body.append(rst.figure(image.name, "Accuracy against filters removed, by criterion."))
        for repair in REPAIRS:
            found = Accuracies(rows, repair)
            if found.right:
                body.append(_section(rows, found, repair))
    if not body:
        return None
    return rst.Page(NAME, "Filter scores", "\n".join([_INTRODUCTION, *body]))


def _section(rows: Sequence[Mapping[str, str]], found: Accuracies, repair: str) -> str:
    """The table of one repair."""
    header = ["criterion", *(f"{100 * a:g} to {100 * b:g} %" for a, b in found.removed)]
    header += ["mean", "DCS ahead, points"]
    cells = []
    for name in sorted(found.right, key=found.overall, reverse=True):
        ahead = ""
        if name != "dcs" and "dcs" in found.right:
            ahead = rst.points(found.ahead("dcs", name))
        label = f"{name} (control)" if name.split(",")[0] in CONTROLS else name
        means = [rst.percent(value) for value in found.means(name)]
        cells.append([label, *means, rst.percent(found.overall(name)), ahead])
    whole = rst.percent(unpruned(rows, found.clusters))
    cells.append(["unpruned (control)", *[""] * len(found.ratios), whole, ""])
    text = rst.list_table(header, cells, f"Accuracy within the cluster (%), repair: {repair}")
    if "dcs" in found.right and any(not name.startswith("dcs") for name in found.right):
        other = found.best_other()
        ahead = found.ahead("dcs", other)
        text += (
            f"\nBest score other than DCS: {other}. DCS is ahead of it by {rst.points(ahead)} "
            f"points; one-sided 95 % bound: at least {100 * ahead.at_least[0]:+.1f}.\n"
        )
    return text


_INTRODUCTION = """\
Every criterion ranks the same network's filters on the images of one semantic cluster. The same
number of filters is sliced out of each layer, from a layer in the middle of the network on; the
columns give the share removed from the first and from the last of these layers. Accuracy is among
the cluster's classes, so the unpruned network has the same restriction. In brackets: 95 % interval
of the paired difference, mean over all columns, from a hierarchical bootstrap over clusters and
test images.

Paper, CIFAR-100: DCS is ahead of other discriminative scores by up to 3.65 (VGG16), 4.25 (VGG19)
and 2.36 points (ResNet50).

``python examples/paper/criteria_table.py --weights WEIGHTS --data FOLDER --split report``
"""


if __name__ == "__main__":
    main()
