"""DCS against other filter scores: within clusters and for all classes, by repair; TVSPrune.

The same share of filters goes from each layer, chosen by each score; accuracy is among the
classes that the filters were scored for, and so is that of the unpruned base. IterTVSPrune finds
its own size, and DCS is then sliced to the same multiplications::

    python -m benchmarks criteria --network vgg16 --weights vgg16.pt --split report
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from . import study as base
from .figures import COLOURS, panels, save
from .library import CRITERIA, LayerData, count_macs, count_parameters, pruner
from .paper import CLAIMS, TVSPRUNE_AHEAD
from .record import Table, from_hex, read, to_hex
from .stats import Estimate, estimate
from .summary import Summary, files, show

NAME = "criteria"
KEYS = (*base.KEYS, "scope", "criterion", "repair", "removed", "draw")
VALUES = ("images", "right", "answers", "macs", "params")
# The paper's six, then those of today; what is not (any more) among sinfkit's is left out.
OTHERS = ("fdr", "abs_snr", "sym_div", "t", "mmd", "di", "j_div", "hellinger")
OTHERS += ("taylor", "l1", "hrank", "chip", "dfpc", "obs", "dcs_obs", "random")
CONTROLS = ("activation_std",)
REPAIRS = ("none", "least_squares")
REMOVED = ("0.1-0.5", "0.2-0.6", "0.3-0.7")
DROPS = (0.01, 0.03)
TVSPRUNE, MATCHED = "IterTVSPrune", "dcs at IterTVSPrune's size"
QUESTION = "Which filter score keeps most accuracy, and under which repair?"


def activation_std(layer: LayerData) -> Tensor:
    """A control: how much a filter's mean activation varies, whatever the class."""
    assert layer.features is not None
    return layer.features.float().mean(2).std(0)


activation_std.needs = frozenset({"features"})  # type: ignore[attr-defined]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then draw and say what was found."""
    options = parse(arguments)
    if not options.show:
        study = base.open_study(options)
        table = Table(options.out / f"{NAME}_{study.label}.csv", KEYS, VALUES)
        measure(study, table, options)
    for path in files(options.out, NAME):
        draw(path)
        show(summary(path))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    known = [name for name in ("dcs", *OTHERS) if name in CRITERIA]
    made = base.parser(__doc__)
    made.add_argument("--criteria", nargs="+", default=[*known, *CONTROLS])
    made.add_argument("--repairs", nargs="+", default=REPAIRS)
    made.add_argument("--removed", nargs="+", default=REMOVED, help="from first and last layer")
    made.add_argument("--scopes", nargs="+", help="clusters, or all; default: all and each cluster")
    made.add_argument("--drops", nargs="*", type=float, default=DROPS, help="of IterTVSPrune")
    options = made.parse_args(arguments)
    if options.quick:
        options.draws, options.images, options.drops = 1, 20, options.drops[-1:]
        options.removed, options.scopes = options.removed[-1:], options.scopes or ["all", "a"]
        options.criteria = [c for c in options.criteria if c in ("dcs", "l1", *CONTROLS)]
    return options


def measure(study: base.Study, table: Table, options: argparse.Namespace) -> None:
    """Fill the table, scope by scope, so that scores are computed once for all ratios."""
    rows = [row for row in _plan(study, options) if row not in table]
    logits = study.logits(study.model.module(), study.X_test)
    for row in tqdm(rows, unit=" networks", mininterval=2):
        scope, draw = row["scope"], row["draw"]
        classes = study.classes(scope)
        inside = np.isin(study.y_test, classes)
        X, y = study.X_test[inside], study.y_test[inside]
        if row["criterion"] == "unpruned":
            right, macs, params = classes[logits[inside][:, classes].argmax(1)] == y, 1.0, 1.0
        else:
            budget = _size_of(table, row) if row["criterion"] == MATCHED else None
            made = _estimator(study, row, classes, budget, options)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                made.fit(*study.draw(options.images, draw, classes))
            example = next(study.batches(study.X[:1]))
            right = made.predict(X) == y
            module, whole = made.model_, study.model.module()
            macs = count_macs(module, example)[0] / count_macs(whole, example)[0]
            params = count_parameters(module) / count_parameters(whole)
        table.add(
            **row,
            images=len(right),
            right=int(right.sum()),
            answers=to_hex(right),
            macs=f"{macs:.6f}",
            params=f"{params:.6f}",
        )


def _plan(study: base.Study, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for scope in options.scopes or ["all", *study.names]:
        key = {**study.key(), "scope": scope}
        yield {**key, "criterion": "unpruned", "repair": "", "removed": "", "draw": 0}
        for draw in range(options.draws):
            own = {**key, "draw": draw}
            for criterion in options.criteria:
                for repair in options.repairs:
                    for removed in options.removed:
                        names = {"criterion": criterion, "repair": repair, "removed": removed}
                        yield {**own, **names}
            for drop in options.drops if scope == "all" else ():
                for criterion in (TVSPRUNE, MATCHED):
                    names = {"criterion": criterion, "repair": "none", "removed": f"drop {drop:g}"}
                    yield {**own, **names}


def _estimator(
    study: base.Study,
    row: Mapping[str, Any],
    classes: np.ndarray,
    budget: float | None,
    options: argparse.Namespace,
) -> Any:
    """The pruner of a row."""
    criterion, removed = row["criterion"], row["removed"]
    settings: dict[str, Any] = {"repair": row["repair"], "random_state": row["draw"]}
    if criterion == TVSPRUNE:
        drop = float(removed.split()[1])
        settings |= {"criterion": "hellinger", "schedule": "iterative", "max_accuracy_drop": drop}
    elif criterion == MATCHED:
        settings |= {"criterion": "dcs", "schedule": "global", "budget": budget}
        settings["drop_blocks"] = False  # TVSPrune takes filters alone
    else:
        first, last = map(float, removed.split("-"))
        named = activation_std if criterion == "activation_std" else criterion
        settings |= {"criterion": named, "schedule": "linear", "pruning_ratios": (first, last)}
        settings["memory"] = str(options.fitted / "scores")
        if row["scope"] != "all":
            settings |= {
                "classes": classes.tolist(),
                "first_layer": base.NETWORKS[study.network][2],
            }
    return pruner(study.model, **settings)


def _size_of(table: Table, row: Mapping[str, Any]) -> float:
    """Share of the multiplications that IterTVSPrune left."""
    wanted = {k: str(row[k]) for k in ("network", "split", "scope", "removed", "draw")}
    same = (r for r in read(table.path) if all(r[k] == v for k, v in wanted.items()))
    return float(next(r["macs"] for r in same if r["criterion"] == TVSPRUNE))


class Results:
    """Right answers by criterion under one repair, within clusters or for all classes."""

    def __init__(self, rows: Sequence[Mapping[str, str]], repair: str, clusters: bool) -> None:
        self.cells: dict[tuple[str, str, str], list[np.ndarray]] = {}
        for row in rows:
            if row["repair"] == repair and "-" in row["removed"]:
                if (row["scope"] != "all") == clusters:
                    key = row["criterion"], row["scope"], row["removed"]
                    self.cells.setdefault(key, []).append(from_hex(row))
        self.names = list(dict.fromkeys(key[0] for key in self.cells))
        self.scopes = list(dict.fromkeys(key[1] for key in self.cells))
        self.removed = sorted({key[2] for key in self.cells})
        # A run that is under way, or others than DCS at some ratios only: compare what is complete.
        self.names = [
            n
            for n in self.names
            if any(all((n, s, r) in self.cells for r in self.removed) for s in self.scopes)
        ]
        self.scopes = [
            s
            for s in self.scopes
            if all((n, s, r) in self.cells for n in self.names for r in self.removed)
        ]

    def right(self, name: str) -> list[np.ndarray]:
        """For each scope, how often each image was right, mean over ratios and draws."""
        return [
            np.mean([np.mean(self.cells[name, s, r], axis=0) for r in self.removed], axis=0)
            for s in self.scopes
        ]

    def mean(self, name: str, removed: str | None = None) -> float:
        """Accuracy, mean over scopes; at one ratio, or over all."""
        if removed is None:
            return float(np.mean([v.mean() for v in self.right(name)]))
        return float(np.mean([np.mean(self.cells[name, s, removed]) for s in self.scopes]))

    def ahead(self, name: str, other: str) -> Estimate:
        """Difference, paired; units are clusters, or images where all classes are one scope."""
        pairs = zip(self.right(name), self.right(other), strict=True)
        differences = [a - b for a, b in pairs]
        return estimate(
            differences[0] if len(differences) == 1 else [d.mean() for d in differences]
        )


def summary(path: Path) -> Summary | None:
    """Every criterion in each setting; how far DCS is ahead of the best other score."""
    rows = read(path)
    network, split = rows[0]["network"], rows[0]["split"]
    header = [
        "",
        "filters removed, %",
        "best",
        "second",
        "DCS",
        "ahead of the best other",
        "verdict",
    ]
    cells, answer = [], ""
    for clusters in (True, False):
        for repair in REPAIRS:
            found = Results(rows, repair, clusters)
            if "dcs" not in found.names or not found.scopes:
                continue
            order = sorted(found.names, key=found.mean, reverse=True)
            # Those that contain DCS are no rivals of it.
            other = next((n for n in order if not n.startswith("dcs")), None)
            if other is None:
                continue
            ahead = found.ahead("dcs", other)
            where = "within clusters" if clusters else "all classes"
            verdict = "DCS ahead" if ahead.low > 0 else "behind" if ahead.high < 0 else "undecided"
            named = [f"{n} {100 * found.mean(n):.1f}" for n in order[:2]]
            cells.append(
                [
                    f"{where}, repair {repair}",
                    ", ".join(found.removed),
                    *named,
                    *[""] * (2 - len(named)),
                    f"{100 * found.mean('dcs'):.1f}",
                    f"{ahead} ({other})",
                    verdict,
                ]
            )
            if clusters and repair == "none" or not answer:
                claim = CLAIMS.get(network)
                papers = f" Paper: up to +{claim.dcs_ahead}." if claim else ""
                how = "Without repair" if repair == "none" else f"Repaired by {repair}"
                answer = (
                    f"{how}, {where}: DCS against {other}, the best other score: {ahead} "
                    f"points ({verdict}).{papers}"
                )
    for drop in sorted({row["removed"] for row in rows if row["removed"].startswith("drop")}):
        cells.append(_against_tvsprune(rows, drop))
    note = (
        "Accuracy in per cent, mean over ratios and draws; 95 % intervals over clusters, or images."
    )
    return Summary(
        f"{NAME}_{network}_{split}", f"{QUESTION} {network}", answer, note, header, cells, rows,
        path.with_suffix(".png"),
    )  # fmt: skip


def _against_tvsprune(rows: Sequence[Mapping[str, str]], drop: str) -> list[str]:
    """DCS and IterTVSPrune at the same multiplications."""
    own = {
        name: [r for r in rows if r["criterion"] == name and r["removed"] == drop]
        for name in (MATCHED, TVSPRUNE)
    }
    n = min(map(len, own.values()))
    if not n:
        return [f"IterTVSPrune, {drop}", "not finished", *[""] * 5]
    right = {name: np.stack([from_hex(r) for r in found[:n]]) for name, found in own.items()}
    ahead = estimate(right[MATCHED].astype(float) - right[TVSPRUNE])
    params = {k: np.mean([float(r["params"]) for r in found[:n]]) for k, found in own.items()}
    fewer = 100 * (1 - params[MATCHED] / params[TVSPRUNE])
    return [
        f"IterTVSPrune, {drop}",
        f"{100 * (1 - np.mean([float(r['macs']) for r in own[TVSPRUNE]])):.0f} of multiplications",
        f"IterTVSPrune {100 * right[TVSPRUNE].mean():.1f}",
        "",
        f"{100 * right[MATCHED].mean():.1f}",
        f"{ahead}, {fewer:.1f} % fewer parameters",
        f"paper: +{TVSPRUNE_AHEAD} with 5.82 % fewer",
    ]


def draw(path: Path) -> Path:
    """Accuracy against the share removed, a panel for each scope and repair."""
    rows = read(path)
    settings = [(c, r) for c in (True, False) for r in REPAIRS]
    found = {s: f for s in settings if (f := Results(rows, s[1], s[0])).scopes}
    figure, axes = panels(max(1, len(found)))
    names = sorted({name for f in found.values() for name in f.names})
    shown = [n for n in ("dcs", "dcs_obs", "obs", "taylor", "fdr", "l1", "random") if n in names]
    for axis, ((clusters, repair), own) in zip(axes, found.items(), strict=False):
        for name in sorted(own.names, key=lambda n: n in shown):
            y = [100 * own.mean(name, removed) for removed in own.removed]
            known = name in shown
            axis.plot(
                own.removed,
                y,
                "o-" if known else "-",
                color=COLOURS[shown.index(name)] if known else "0.8",
                label=name if known else None,
            )
        axis.set_title(f"{'within clusters' if clusters else 'all classes'}, {repair}")
        axis.set_xlabel("filters removed, first to last layer")
    axes[0].set_ylabel("accuracy (%)")
    axes[0].legend(fontsize=7)
    return save(figure, path.with_suffix(".png"))
