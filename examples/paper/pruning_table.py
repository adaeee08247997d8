"""Table 3: DCS as a plain pruning criterion for all classes, without fine-tuning.

Filters are removed from the whole network until a fraction of its multiplications is left; nothing
is trained afterwards. Beside our schedules and repairs: IterTVSPrune, torch-pruning's pruners as
shipped, and torch-pruning's choice of filters with our repair::

    python pruning_table.py --weights vgg19.pt --network vgg19 --data ~/images --held-out
    python pruning_table.py --quick

Units: test image, grouped by semantic cluster; calibration resample. Criteria that draw at random
have several seeds, each with its own draw of calibration images. ``--clusters`` has no effect.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import figures
import numpy as np
import rst
import study as base
import torch
from pruned import Contestant, Found, label, needs
from record import Table, files, read, to_hex
from shipped import IMPORTANCES, SCOPES, Shipped
from stats import estimate
from suffix import answers
from torch import nn
from tqdm.auto import tqdm
from whole import Draw, Whole

from sinfkit import DCSPruner
from sinfkit.criteria import CRITERIA
from sinfkit.repair import REPAIRS

NAME = "pruning"
KEYS = ("network", "width", "base_seed", "split", "library", "criterion", "schedule", "repair")
KEYS += ("budget", "max_drop", "resample", "seed")
VALUES = ("macs", "params", "images", "right", "cluster_images", "answers")
SCHEDULES = ("global", "linear")
SEEDED = ("random", "dcs_shuffled")
CONTROLS = ("random", "activation_std", "activation_mean", "dcs_shuffled", "dcs_closed_form")
QUICK_IMPORTANCES = ["magnitude_l2", "taylor", "random"]
# Network: fraction of its multiplications, and points that may be lost there.
GOALS = {"vgg19": ("0.6666", 1.7), "resnet50": ("0.5263", 4.0)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then draw."""
    options = parse(arguments)
    study = base.open_study(options)
    path = options.out / f"{NAME}_{study.base.label}_{study.split}.csv"
    table = Table(path, KEYS, VALUES, study.constants())
    measure(study, table, options)
    draw(path)
    print(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what is not given comes from ``frozen.toml``."""
    frozen = base.frozen()
    own, units = frozen["pruning"], frozen["units"]
    parser = base.parser(__doc__)
    parser.add_argument("--criteria", nargs="*", choices=sorted(CRITERIA), default=own["criteria"])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument(
        "--importances", nargs="*", choices=sorted(IMPORTANCES), help="of torch-pruning"
    )
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=own["repairs"])
    parser.add_argument(
        "--budgets", nargs="+", type=float, help="fractions of the multiplications that stay"
    )
    parser.add_argument(
        "--drops", nargs="*", type=float, help="accuracy that IterTVSPrune may lose"
    )
    parser.add_argument("--resamples", type=int, default=units["resamples"])
    parser.add_argument("--seeds", type=int, default=units["seeds"])
    options = parser.parse_args(arguments)
    if options.quick:
        options.resamples = options.seeds = 1
    if options.importances is None:
        options.importances = QUICK_IMPORTANCES if options.quick else list(IMPORTANCES)
    if options.budgets is None:
        options.budgets = own["budgets"][1::2] if options.quick else own["budgets"]
    if options.drops is None:
        options.drops = own["drops"][-1:] if options.quick else own["drops"]
    return options


def measure(study: base.Study, table: Table, options: argparse.Namespace) -> None:
    """Fill the table, draw by draw."""
    rows = [row for row in _plan(study, options) if row not in table]
    bar = tqdm(total=len(table) + len(rows), initial=len(table), unit=" networks", mininterval=2)
    if rows:
        whole = Whole(study)
        names = study.names
        cluster = np.array([names.index(study.clusters[int(k)]) for k in study.y_test])
        order = np.argsort(cluster, kind="stable")
        x, truth = torch.cat(list(study.batches(study.X_test[order]))), study.y_test[order]
        sizes = " ".join(str(n) for n in np.bincount(cluster, minlength=len(names)))
        for row, module in _networks(whole, table, rows):
            found: dict[str, Any] = {"macs": "", "params": "", "images": 0, "right": 0}
            text = ""
            if module is not None:
                right = answers(module, x) == truth
                found = {**whole.counts(module), "images": len(right), "right": int(right.sum())}
                text = to_hex(right)
            table.add(**row, **found, cluster_images=sizes, answers=text)
            bar.update()
    bar.close()


def _plan(study: base.Study, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Keys of all rows; those with the same images, then those with the same scores, in a row."""
    key = study.key()
    ours, theirs = "sinfkit", "torch-pruning"
    wanted = [(ours, c, s) for c in options.criteria for s in options.schedules]
    wanted += [(theirs, c, s) for c in options.importances for s in SCOPES]
    rows: list[dict[str, Any]] = []

    def add(contestant: Contestant, budget: Any, drop: Any, resample: int, seed: int = 0) -> None:
        names = ("library", "criterion", "schedule", "repair")
        own = dict(zip(names, contestant, strict=True))
        where = {"budget": budget, "max_drop": drop, "resample": resample, "seed": seed}
        rows.append({**key, **own, **where})

    add(("", "unpruned", "", "none"), 1.0, "", 0)
    for resample in range(options.resamples):
        for library, criterion, schedule in wanted:
            seeds = range(resample, options.seeds, options.resamples)
            for seed in seeds if criterion in SEEDED else [0]:
                for repair in options.repairs:
                    contestant = (library, criterion, schedule, repair)
                    fixed = needs(contestant) == "nothing"
                    if fixed and resample and criterion not in SEEDED:
                        continue  # the same network for every draw of images
                    for budget in options.budgets:
                        add(contestant, budget, "", resample, seed)
        for drop in options.drops:
            add((ours, "hellinger", "iterative", "none"), "", drop, resample)
            for repair in options.repairs:  # at the multiplications that it came down to
                add((ours, "dcs", "global", repair), "", drop, resample)
    return rows


def _networks(
    whole: Whole, table: Table, rows: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], nn.Module | None]]:
    """The network of each row; None where a budget cannot be met."""
    images: Draw | None = None
    known: tuple[Any, ...] = ()
    pruner: Shipped | None = None
    for row in rows:
        if row["criterion"] == "unpruned":
            yield row, whole.graph
            continue
        if images is None or images.resample != row["resample"]:
            images, known = Draw(whole, row["resample"]), ()
        if row["schedule"] == "iterative":
            yield row, _in_rounds(whole, images, row["max_drop"])
            continue
        try:
            if row["library"] == "torch-pruning":
                which = row["criterion"], row["schedule"], row["seed"]
                if pruner is None or which != known:
                    pruner = Shipped(whole, *which[:2], images, row["seed"])
                    known = which
                ratio = pruner.ratio(row["budget"])
                if row["repair"] == "none":
                    yield row, pruner.pruned(ratio)
                    continue
                keep = pruner.keep(ratio)
            else:
                budget = row["budget"] or _came_down_to(whole, table, row)
                keep = images.keep(row["criterion"], row["schedule"], budget, row["seed"])
        except ValueError as error:
            tqdm.write(f"{row['criterion']}, {row['schedule']}, {row['budget']}: {error}")
            yield row, None
            continue
        yield row, images.pruned(keep, row["repair"])


def _in_rounds(whole: Whole, images: Draw, drop: float) -> nn.Module:
    """IterTVSPrune: as many rounds as a fifth of the images, held out, allow."""
    study = whole.study
    pruner = DCSPruner(
        study.base.model,
        criterion="hellinger",
        schedule="iterative",
        repair="none",
        max_accuracy_drop=drop,
        batch_size=base.BATCH,
        device=study.device,
        random_state=images.resample,
    )
    with warnings.catch_warnings():
        # That nothing could be removed shows in the table.
        warnings.simplefilter("ignore", UserWarning)
        return pruner.fit(study.X[images.rows], images.y).model_


def _came_down_to(whole: Whole, table: Table, row: Mapping[str, Any]) -> float:
    """Fraction of the multiplications that IterTVSPrune left."""
    same = {name: str(row[name]) for name in (*KEYS[:4], "max_drop", "resample")}
    same["schedule"] = "iterative"
    (found,) = (r for r in read(table.path) if all(r[k] == v for k, v in same.items()))
    return int(found["macs"]) / whole.cost.base


def _shown(found: Found) -> dict[Contestant, tuple[str, str]]:
    """Contestants that are drawn in colour, with colour and name: ours, and the best of others."""
    ours: Contestant = ("sinfkit", *base.frozen()["pruning"]["ours"])
    shown = [ours, (*ours[:3], "none")]
    for repaired in (True, False):
        for library in ("sinfkit", "torch-pruning"):
            rest = [
                name
                for name in found.right
                if name[0] == library and (name[3] != "none") == repaired and name[1] != ours[1]
            ]
            shown += sorted(rest, key=found.overall)[-1:]
    return {
        name: (colour, label(name) + ("" if name[3] == "none" else " + repair"))
        for name, colour in zip(shown, figures.COLOURS, strict=False)
        if name in found.right
    }


def draw(path: Path) -> Path | None:
    """Accuracy against multiplications, and against parameters."""
    rows = read(path)
    found, rounds = Found(rows), Found(rows, "max_drop")
    if not found.right:
        return None
    shown = _shown(found)
    figure, axes = figures.panels(2, width=4.6, height=4.2)
    labels: list[tuple[float, float, str, str]] = []
    for axis, sizes, title in (
        (axes[0], found.macs, "multiplications left (%)"),
        (axes[1], found.params, "parameters left (%)"),
    ):
        for name in sorted(found.right, key=lambda name: name in shown):
            colour, text = shown.get(name, (figures.GREY, ""))
            x, y = 100 * sizes[name], 100 * found.accuracy(name)
            style = {"linestyle": "--" if name[3] == "none" else "-", "color": colour}
            width = {"linewidth": 1.8 if text else 0.7, "marker": "o" if text else None}
            axis.plot(x, y, **style, **width)
            there = np.flatnonzero(~np.isnan(y))
            if text and len(there) and axis is axes[0]:
                labels.append((float(x[there[-1]]), float(y[there[-1]]), text, colour))
        for name in rounds.right:
            if name[2] == "iterative":
                own = rounds.macs if axis is axes[0] else rounds.params
                y = 100 * rounds.accuracy(name)
                axis.plot(100 * own[name], y, "kx", markersize=6)
        whole = 100 * int(found.whole["right"]) / int(found.whole["images"])
        axis.axhline(whole, color="0.3", linestyle=":", linewidth=1)
        axis.set_xlabel(title)
        # From the whole network on, so that a single budget has its place too.
        low, high = sorted(axis.get_xlim())
        axis.set_xlim(max(high, 102), min(low, 90))
        axis.margins(x=0.05)
    axes[0].set_ylabel("accuracy, all classes (%)")
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes[0].annotate("unpruned", (0, whole), xytext=(3, 3), **where)
    axes[0].legend(
        handles=[
            *axes[0].plot([], [], "-", color="0.4", label="repaired"),
            *axes[0].plot([], [], "--", color="0.4", label="as sliced"),
            *axes[0].plot([], [], "kx", label="IterTVSPrune"),
        ],
        loc="lower left",
    )
    return figures.finish(figure, [(axes[0], labels)], path.with_suffix(".png"))


def page(folder: Path) -> rst.Page | None:
    """The page of this table, from all its files in a folder."""
    body = []
    for path, network, split in files(folder, NAME):
        rows = read(path)
        image = draw(path)
        if image is None:
            continue
        found = Found(rows)
        whole = int(found.whole["right"]) / int(found.whole["images"])
        body.append(rst.section(f"{network}, {split} images"))
        body.append(
            f"{rst.split_note(split)} {rst.units(rows, 'resample')}, {found.whole['images']} test "
            f"images; unpruned: {rst.percent(whole)} %, {int(found.whole['macs']) / 1e6:.0f} "
            f"million multiplications, {int(found.whole['params']) / 1e6:.2f} million parameters. "
            f"{rst.provenance(rows)}"
        )
        body.append(rst.figure(image.name, "Accuracy against multiplications and parameters."))
        body.append(_goal(found))
        for repair in REPAIRS:
            if any(name[3] == repair for name in found.right):
                body.append(_section(found, repair))
        rounds = Found(rows, "max_drop")
        if rounds.right:
            body.append(_rounds(rounds))
    if not body:
        return None
    return rst.Page(NAME, "Pruning for all classes", "\n".join([_INTRODUCTION, *body, _PUBLISHED]))


def _section(found: Found, repair: str) -> str:
    """The table of one repair."""
    ours = base.frozen()["pruning"]["ours"]
    reference: Contestant = ("sinfkit", ours[0], ours[1], repair)
    header = ["filters chosen by", "needs", *(f"{100 * float(b):.0f} %" for b in found.columns)]
    header += ["mean", "of the budget used, %", f"{label(reference)} ahead, points"]
    cells = []
    names = [name for name in found.right if name[3] == repair]
    for name in sorted(names, key=found.overall, reverse=True):
        accuracy, params = found.accuracy(name), found.params[name]
        own = [
            "not reached" if np.isnan(a) else f"{rst.percent(a)} ({100 * p:.0f})"
            for a, p in zip(accuracy, params, strict=True)
        ]
        used = found.macs[name] / np.array([float(column) for column in found.columns])
        text = label(name) + (" (control)" if name[1] in CONTROLS else "")
        mean, share = "", ""
        if not np.isnan(accuracy).any():
            mean, share = rst.percent(accuracy.mean()), f"{100 * used.min():.0f} to "
            share += f"{100 * used.max():.0f}"
        difference = None
        if name != reference and reference in found.right:
            difference = found.ahead(reference, name)
        ahead = "" if difference is None else rst.points(difference)
        cells.append([text, needs(name), *own, mean, share, ahead])
    what = "as sliced" if repair == "none" else f"repair: {repair}"
    title = f"Accuracy (%), in brackets parameters left (%), by multiplications left; {what}"
    return rst.list_table(header, cells, title)


def _goal(found: Found) -> str:
    """What ours loses, and whether the goal of its network is met."""
    ours: Contestant = ("sinfkit", *base.frozen()["pruning"]["ours"])
    if ours not in found.right:
        return ""
    network = found.whole["network"]
    lines = []
    for i, budget in enumerate(found.columns):
        if np.isnan(found.accuracy(ours)[i]):
            continue
        lost = found.lost(ours, i)
        line = (
            f"- {1 / found.macs[ours][i]:.2f} x fewer multiplications: {rst.points(lost)} points "
            f"lost; one-sided 95 % bound: at most {100 * lost.at_most[0]:.1f}"
        )
        if GOALS.get(network, ("", 0.0))[0] == budget:
            limit = GOALS[network][1]
            met = "met" if 100 * lost.at_most[0] <= limit else "not met"
            if met == "not met" and 100 * lost.mean[0] <= limit:
                met = "met by the point estimate only"
            line += f". Goal, at most {limit:g} points: {met}"
        lines.append(f"{line}.")
    repair = "no repair" if ours[3] == "none" else f"repair {ours[3]}"
    return f"Ours, {label(ours)}, {repair}:\n\n" + "\n".join(lines) + "\n"


def _rounds(found: Found) -> str:
    """IterTVSPrune, and ours at the same multiplications."""
    theirs = next((name for name in found.right if name[2] == "iterative"), None)
    if theirs is None:
        return ""
    others = [name for name in found.right if name != theirs]
    header = ["it may lose", "multiplications, %", "IterTVSPrune"]
    for name in others:
        what = "as sliced" if name[3] == "none" else name[3]
        header += [f"{label(name)}, {what}", "ahead, points"]
    cells = []
    for i, drop in enumerate(found.columns):
        cell = [f"{100 * float(drop):g} points", rst.percent(found.macs[theirs][i])]
        for name in (theirs, *others):
            accuracy, params = found.accuracy(name)[i], found.params[name][i]
            missing = np.isnan(accuracy)
            cell.append("" if missing else f"{rst.percent(accuracy)} ({100 * params:.1f})")
            if name != theirs:
                pairs = zip(found.right[name], found.right[theirs], strict=True)
                ahead = "" if missing else rst.points(estimate([(a - b)[:, i] for a, b in pairs]))
                cell.append(ahead)
        cells.append(cell)
    title = "IterTVSPrune, and ours at the multiplications that it came down to: accuracy (%), "
    return rst.list_table(header, cells, title + "in brackets parameters left (%)")


_INTRODUCTION = """\
Filters are removed from every hidden layer of the network, for all classes, until a fraction of the
multiplications is left. Nothing is trained afterwards. Every network is the largest of its kind
that keeps to the budget. ``global``: ours, what is lost most cheaply goes first, over all layers
(filters of a layer in the criterion's order, layers compared by what their readers lose for good);
``linear``: ours, the share removed grows from layer to layer; ``torch-pruning``: that package's
pruners (version 1.6) with their own choice of filters, the same share everywhere (``local``) or
all filters in one ranking (``global``). Where nothing is repaired these are also sliced by that
package. The column *needs* says what was known beside the weights. IterTVSPrune (criterion
``hellinger``) needs images and labels, and measures what it loses on a fifth of the calibration
images.

In brackets behind differences: 95 % interval, paired by image, from a hierarchical bootstrap over
clusters and test images.

``python examples/paper/pruning_table.py --weights WEIGHTS --data FOLDER --split report``
"""

_PUBLISHED = (
    rst.section("Published figures, CIFAR-100")
    + "\n"
    + rst.list_table(
        ["published, CIFAR-100", "network", "fewer multiplications", "points lost"],
        [
            ["best published without fine-tuning", "VGG19", "1.51 x", "1.8"],
            ["DFPC", "VGG19", "1.26 x", "1.9"],
            ["best published without fine-tuning", "ResNet50", "1.93 x", "7.9"],
        ],
        "Other images and other training than here",
    )
)
_PUBLISHED += (
    "\nPaper, CIFAR-100: as a pruning criterion DCS is ahead of TVSPrune by up to 8.13 points, "
    "with 5.82 % fewer parameters.\n"
)


if __name__ == "__main__":
    main()
