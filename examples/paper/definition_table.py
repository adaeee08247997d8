"""Table 2: how DCS is best defined, and whether one penalty serves different widths.

The probe's penalty and the scaling of its inputs together, then pooling, norm and variant one at a
time, without repair. Run it once for each network; the figure sets them side by side::

    python definition_table.py --weights vgg16.pt --data ~/images --held-out
    python definition_table.py --quick

Units: cluster, calibration resample, test image.
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
from record import Table, from_hex, read
from stats import estimate
from suffix import Case
from sweep import RATIOS, UNPRUNED, VALUES, sweep
from torch import Tensor

from sinfkit.criteria import LayerData, discriminative_capability

NAME = "definition"
FACTORS = ("penalty", "rule", "scaling", "pool", "norm", "variant")
KEYS = ("network", "width", "base_seed", "split", "cluster", "resample", *FACTORS, *RATIOS)
PENALTIES = (0.01, 0.1, 1.0, 3.0, 10.0, float("inf"))
SCALINGS = ("layer", "root", "column")
COLUMNS = 256  # the width at which both rules for the penalty agree


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then draw all networks of the folder."""
    options = parse(arguments)
    # A made-up study has two widths, so that there is something to compare.
    for width in (0.125, 0.1875) if options.quick else (0.0,):
        study = base.open_study(options, width)
        path = options.out / f"{NAME}_{study.base.label}_{study.split}.csv"
        sweep(
            study,
            Table(path, KEYS, VALUES, study.constants()),
            recipes(),
            score,
            ratios=base.frozen()["slicing"]["two_ratios"],
            repairs=["none"],
            resamples=options.resamples,
            first_layer=options.first_layer,
        )
        print(path)
    draw(options.out, options.split)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what is not given comes from ``frozen.toml``."""
    parser = base.parser(__doc__)
    parser.add_argument("--first-layer", help="layers before it stay whole")
    parser.add_argument("--resamples", type=int, default=base.frozen()["units"]["resamples"])
    options = parser.parse_args(arguments)
    if options.quick:
        options.resamples = min(options.resamples, 2)
    return options


def default() -> dict[str, Any]:
    """The definition in ``frozen.toml``."""
    frozen = base.frozen()
    penalty = float(frozen["dcs"]["penalty"])
    return {**frozen["dcs"], "penalty": penalty, "rule": "fixed", "pool": frozen["pool"]["default"]}


def recipes() -> list[dict[str, Any]]:
    """The default first, then the grid of penalty and scaling, then one factor at a time."""
    usual = default()
    finite = [p for p in PENALTIES if p != float("inf")]
    changes: list[dict[str, Any]] = [{}]
    changes += [{"penalty": p, "scaling": s} for s in SCALINGS for p in PENALTIES]
    changes += [{"penalty": p, "rule": "columns"} for p in finite]
    changes += [{"pool": n} for n in (1, 2)]
    changes += [{"norm": n} for n in ("fro", "l1", "max")]
    changes += [{"variant": v} for v in ("norm", "contribution", "ablation")]
    found = [{factor: {**usual, **change}[factor] for factor in FACTORS} for change in changes]
    return [recipe for i, recipe in enumerate(found) if recipe not in found[:i]]


def score(case: Case, recipe: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """DCS by group, as the recipe defines it."""

    def criterion(layer: LayerData) -> Tensor:
        assert layer.features is not None and layer.y is not None
        columns = layer.features[0].numel()
        factor = columns / COLUMNS if recipe["rule"] == "columns" else 1.0
        return discriminative_capability(
            layer.features,
            layer.y,
            penalty=recipe["penalty"] * factor,
            variant=recipe["variant"],
            norm=recipe["norm"],
            scaling=recipe["scaling"],
        ).score

    criterion.needs = frozenset({"features", "y"})  # type: ignore[attr-defined]
    return case.scores(criterion, pool=recipe["pool"])


Key = tuple[str, ...]


def right_answers(rows: Sequence[Mapping[str, str]]) -> dict[Key, list[np.ndarray]]:
    """By recipe one array per cluster: right answers to each image, mean over ratios and draws.

    Of a run that is still under way only the clusters that are complete.
    """
    found: dict[tuple[Key, str], list[np.ndarray]] = {}
    for row in rows:
        if row["penalty"] != UNPRUNED:
            key = tuple(row[factor] for factor in FACTORS)
            right = from_hex(row["answers"], int(row["images"]))
            found.setdefault((key, row["cluster"]), []).append(right)
    most = max(map(len, found.values()), default=0)
    keys = list(dict.fromkeys(key for key, _ in found))
    clusters = sorted({cluster for _, cluster in found})
    whole = [c for c in clusters if all(len(found.get((key, c), ())) == most for key in keys)]
    return {key: [np.mean(found[key, c], axis=0) for c in whole] for key in keys if whole}


def _accuracy(values: Sequence[np.ndarray]) -> float:
    return float(np.mean([v.mean() for v in values]))


def draw(folder: Path, split: str) -> Path | None:
    """Accuracy against the penalty, one panel for each network, one line for each scaling."""
    studies = {}
    for path in sorted(folder.glob(f"{NAME}_*_{split}.csv")):
        found = right_answers(read(path))
        if found:
            studies[path.stem.removeprefix(f"{NAME}_").removesuffix(f"_{split}")] = found
    if not studies:
        return None
    figure, axes = figures.panels(len(studies))
    usual = {factor: str(value) for factor, value in default().items()}
    ends = []
    for axis, (label, found) in zip(axes, studies.items(), strict=True):
        labels = []
        lines = [({"scaling": s, "rule": "fixed"}, f"scaling {s}", "o-") for s in SCALINGS]
        lines.append(({"rule": "columns"}, f"{usual['scaling']}, penalty by columns", "s--"))
        for (change, name, style), colour in zip(lines, figures.COLOURS, strict=False):
            points = []
            for x, penalty in enumerate(PENALTIES):
                wanted = {**usual, **change, "penalty": str(penalty)}
                key = tuple(wanted[factor] for factor in FACTORS)
                if key in found:
                    points.append((x, 100 * _accuracy(found[key])))
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour)
                labels.append((len(PENALTIES) - 1, points[-1][1], name, colour))
        axis.set(title=label, xlabel="penalty of the probe")
        axis.set_xticks(range(len(PENALTIES)), [*(f"{p:g}" for p in PENALTIES[:-1]), "closed form"])
        ends.append((axis, labels))
    axes[0].set_ylabel("accuracy within the cluster (%)")
    return figures.finish(figure, ends, folder / f"{NAME}_{split}.png")


def page(folder: Path) -> rst.Page | None:
    """The page of this table, from all its files in a folder."""
    body = []
    for split in ("report", "choose"):
        image = draw(folder, split)
        if image is None:
            continue
        body.append(rst.section(f"On the {split} images"))
        body.append(rst.split_note(split) + "\n")
        body.append(rst.figure(image.name, "Accuracy against the probe's penalty, by scaling."))
        for path in sorted(folder.glob(f"{NAME}_*_{split}.csv")):
            rows = read(path)
            found = right_answers(rows)
            if found:
                label = path.stem.removeprefix(f"{NAME}_").removesuffix(f"_{split}")
                body.append(_section(found, label))
                body.append(f"{rst.units(rows, 'cluster', 'resample')}. {rst.provenance(rows)}")
    if not body:
        return None
    return rst.Page(NAME, "The definition of DCS", "\n".join([_INTRODUCTION, *body]))


def _section(found: Mapping[Key, list[np.ndarray]], label: str) -> str:
    """The table of one network, best definition first."""
    usual = tuple(str(default()[factor]) for factor in FACTORS)
    cells = []
    for key, values in sorted(found.items(), key=lambda item: -_accuracy(item[1])):
        difference = "(default)"
        if key != usual:
            difference = ""
            if usual in found:
                pairs = zip(values, found[usual], strict=True)
                difference = rst.points(estimate([a - b for a, b in pairs]))
        cells.append([*key, rst.percent(_accuracy(values)), difference])
    header = [*FACTORS, "accuracy (%)", "points to the default"]
    return rst.list_table(header, cells, label)


_INTRODUCTION = f"""\
Filters are removed by DCS in different definitions, without repair; accuracy among the cluster's
classes, mean over two pairs of ratios (10 to 50 % and 30 to 70 % of the filters of the first and
the last sliced layer). The rule ``columns`` multiplies the penalty by the layer's number of
columns (filters times cells) over {COLUMNS}. An infinite penalty is the closed form: differences
of class means. In brackets: 95 % interval of the paired difference, hierarchical bootstrap over
clusters and test images.

The paper leaves objective, penalty, scaling and norm open, and reports no such comparison.

``python examples/paper/definition_table.py --weights WEIGHTS --data FOLDER --split report``
"""


if __name__ == "__main__":
    main()
