"""Figures and pages of tables 4 and 5, from the files that ``sinf_table.py`` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import figures
import numpy as np
import rst
from record import LOW_RANK, files, from_hex, read
from stats import Estimate, estimate

NAME = "sinf"
TIMES = ("ms", "ratio", "ratio_low", "ratio_high")
IDENTITY = ("contestant", "kind", "size", "seed", "variant")
SWITCHES = ("SINF", "no exit", "no fusion", "two clusters", "oracle", "no threshold", "no router")
CONTROLS = {
    "one": "one network (a)",
    "fused": "one network, fused with a probe (b)",
    "exit": "one network, fused, left early at the probe (e)",
}
BASES = {"fused": "base fused with a probe (c)", "exit": "base, fused, left early at the probe (d)"}


class Results:
    """All rows of one network and split.

    Parameters
    ----------
    path : Path
        The CSV; that of the times lies beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, read(path)
        self.by_key = {_identity(row): row for row in self.rows}
        times = path.with_name(f"{path.stem}_time.csv")
        self.time_rows = read(times) if times.exists() else []
        self.times = {_identity(row): row for row in self.time_rows}

    def of(self, contestant: str, variant: str) -> list[Mapping[str, str]]:
        """Rows of one kind, the largest networks first."""
        rows = [
            row
            for row in self.rows
            if row["contestant"] == contestant and row["variant"] == variant
        ]
        return sorted(rows, key=lambda row: -float(row["macs"]))

    @property
    def base(self) -> Mapping[str, str]:
        """The unpruned network's row."""
        return self.of("base", "one")[0]

    def right(self, row: Mapping[str, str]) -> np.ndarray:
        """1 for each image that was answered rightly."""
        return from_hex(row["answers"], int(row["images"])).astype(float)

    def gain(self, row: Mapping[str, str], other: np.ndarray | None = None) -> Estimate:
        """Accuracy of a row minus that of the base (or of other answers), paired by image."""
        right = self.right(self.base) if other is None else other
        return estimate([self.right(row) - right])

    def time(self, row: Mapping[str, str]) -> float | None:
        """Time relative to the base, where it was measured."""
        found = self.times.get(_identity(row))
        return float(found["ratio"]) if found else None

    def cost(self, row: Mapping[str, str], counted: bool = False) -> float | None:
        """Time relative to the base; where no times were taken, or `counted`, multiplications."""
        return self.time(row) if self.times and not counted else float(row["macs"])

    def at_equal_cost(
        self, row: Mapping[str, str], variant: str, counted: bool = False
    ) -> np.ndarray | None:
        """Answers of the control at a row's cost: between the two of its draw that are next to it.

        Each image counts as right in proportion to how near the control that has it right is; None
        outside the range that was measured.
        """
        cost = self.cost(row, counted)
        # Layers of low rank stand against layers of low rank.
        controls = [
            c
            for c in self.of("one network", variant)
            if c["seed"] == row["seed"] and _low_rank(c) == _low_rank(row)
        ]
        # The unpruned network is the control that nothing was taken from.
        controls += self.of("base", "one" if variant == "one" else variant)
        known = sorted(
            ((t, self.right(c)) for c in controls if (t := self.cost(c, counted)) is not None),
            key=lambda pair: pair[0],
        )
        if cost is None or not known or not known[0][0] <= cost <= known[-1][0]:
            return None
        above = next(i for i, (t, _) in enumerate(known) if t >= cost)
        (t0, fast), (t1, slow) = known[max(above - 1, 0)], known[above]
        share = 1.0 if t1 == t0 else (cost - t0) / (t1 - t0)
        return (1 - share) * fast + share * slow


def _low_rank(row: Mapping[str, str]) -> str:
    """What tells networks with layers of low rank from those without, for names."""
    return f", {LOW_RANK}" if row["kind"].endswith(LOW_RANK) else ""


def _identity(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[k] for k in IDENTITY)


def draw(path: Path) -> Path | None:
    """Accuracy against time (where it was measured) and against multiplications."""
    found = Results(path)
    if not found.of("base", "one") or not found.of("SINF", "SINF"):
        return None
    series = _series(found)
    base = 100 * found.right(found.base).mean()
    timed = bool(found.times)
    figure, axes = figures.panels(2 if timed else 1, width=4.2, height=3.8)
    for axis, use_time in zip(axes, (True, False) if timed else (False,), strict=True):
        axis.axhline(base, color="0.3", linestyle="--", linewidth=1)
        axis.annotate(
            "base",
            (0, base),
            xycoords=axis.get_yaxis_transform(),
            xytext=(4, 3),
            textcoords="offset points",
            color="0.3",
        )
        # Those of low rank have the colour of what they were made of.
        plain = list(dict.fromkeys(name.removesuffix(f", {LOW_RANK}") for name in series))
        for name, rows in series.items():
            colour = figures.COLOURS[plain.index(name.removesuffix(f", {LOW_RANK}"))]
            points = []
            for row in rows:
                cost = found.time(row) if use_time else float(row["macs"])
                if cost is not None:
                    points.append((100 * (1 - cost), 100 * found.right(row).mean()))
            if points:
                points.sort()
                x, y = np.transpose(points)
                # (b) lies on (a) where the probe has no weight: a smaller, broken line on top.
                style = "D" if len(points) < 2 else "s--" if name in CONTROLS.values() else "o-"
                style = "o:" if name.endswith(LOW_RANK) else style
                size = 2.5 if style == "s--" else None
                axis.plot(x, y, style, color=colour, label=name, markersize=size)
        axis.set(xlabel=f"{'time' if use_time else 'multiplications'} saved (%)")
    axes[0].set_ylabel("accuracy (%)")
    # Not everything need have been timed.
    axes[0].legend(*axes[-1].get_legend_handles_labels(), fontsize=7, loc="lower left")
    return figures.save(figure, path.with_suffix(".png"))


def _series(found: Results) -> dict[str, list[Mapping[str, str]]]:
    """What the figure draws, by name."""
    rows = found.of("SINF", "SINF")
    searched = [row for row in rows if row["kind"] == "search"]
    kinds = [row["kind"] for row in rows]
    main = [kind for kind in kinds if kinds.count(kind) > 1 and not kind.startswith("random")]
    series = {}
    for kind in dict.fromkeys(main):
        own = [row for row in rows if row["kind"] == kind]
        series[f"SINF{_low_rank(own[0])}"] = own
        if not _low_rank(own[0]):
            stay = found.of("SINF", "no exit")
            series["SINF without exits"] = [row for row in stay if row["kind"] == kind]
    for variant, name in CONTROLS.items():
        controls = found.of("one network", variant)
        series[name] = [row for row in controls if not _low_rank(row)]
    series[f"{CONTROLS['exit']}, {LOW_RANK}"] = [
        row for row in found.of("one network", "exit") if _low_rank(row)
    ]
    series = {name: [row for row in own if row["seed"] == "0"] for name, own in series.items()}
    if searched:
        series["SINF, sizes searched"] = searched
    exits = found.of("base", "exit")
    if exits:
        series[BASES["exit"]] = exits
    return {name: rows for name, rows in series.items() if rows}


def page(folder: Path) -> rst.Page | None:
    """Table 4, from all its files in a folder."""
    body = []
    for path, network, split in files(folder, NAME):
        found, image = Results(path), draw(path)
        if image is None:
            continue
        body.append(rst.section(f"{network}, {split} images"))
        timed = ""
        if found.time_rows:
            row = found.time_rows[0]
            timed = (
                f"Times: batch {row['batch']}, {row['threads']} threads, all in turns in one run, "
                "median over rounds of the ratio to the base. "
            )
        body.append(
            f"{rst.split_note(split)} One training; in brackets the 95 % interval over test "
            f"images. {timed}{rst.provenance(found.rows)}"
        )
        body.append(rst.figure(image.name, "Accuracy against time and multiplications saved."))
        body += [_main(found), _verdict(found), _switches(found), _kinds(found)]
    return rst.Page(NAME, "Routed inference", "\n".join([_INTRODUCTION, *body])) if body else None


def _main(found: Results) -> str:
    """Every contestant: accuracy, points against the base, time and multiplications."""
    header = ["", "accuracy (%)", "points against the base", "time saved (%)", "speed-up"]
    header += ["multiplications saved (%)", "left early (%)"]
    cells = []
    named = [("base", found.of("base", "one"))]
    named += [(BASES[v], found.of("base", v)) for v in BASES]
    named += [
        ("SINF", found.of("SINF", "SINF")),
        ("SINF without exits", found.of("SINF", "no exit")),
    ]
    named += [(CONTROLS[v], found.of("one network", v)) for v in CONTROLS]
    for name, rows in named:
        for row in rows:
            label = f"{name}, {row['kind']}, {row['size']}" if row["kind"] else name
            if row["seed"] != "0":
                label += f", draw {row['seed']}"
            cells.append([label, *_numbers(found, row)])
    return rst.list_table(header, cells)


def _numbers(found: Results, row: Mapping[str, str]) -> list[str]:
    time = found.time(row)
    return [
        rst.percent(found.right(row).mean()),
        "" if row is found.base else rst.points(found.gain(row)),
        "" if time is None else rst.percent(1 - time),
        "" if time is None else f"{1 / time:.2f}",
        rst.percent(1 - float(row["macs"])),
        rst.percent(float(row["exits"])) if row["exits"] else "",
    ]


def _verdict(found: Results) -> str:
    """SINF against the unrouted controls at equal time, or equal multiplications without times."""
    cells = []
    for variant, name in (("SINF", "SINF"), ("no exit", "SINF without exits")):
        for row in found.of("SINF", variant):
            cost = found.cost(row)
            ahead = []
            for control in CONTROLS:
                equal = found.at_equal_cost(row, control)
                ahead.append("" if equal is None else rst.points(found.gain(row, equal)))
            if cost is not None and any(ahead):
                label = f"{name}, {row['kind']}, {row['size']}, draw {row['seed']}"
                cells.append([label, f"{1 / cost:.2f}", *ahead])
    if not cells:
        return ""
    what = "time" if found.times else "multiplications"
    header = [
        "",
        f"base's {what} over its own",
        *(f"points ahead of {n}" for n in CONTROLS.values()),
    ]
    caption = f"SINF against networks without routes of the same draw, at equal {what}"
    return rst.list_table(header, cells, caption) + _over_draws(found)


def _over_draws(found: Results) -> str:
    """Mean and spread over draws of calibration images, not all of which need have been timed."""
    budgets: dict[tuple[str, str, str], list[Mapping[str, str]]] = {}
    for variant in ("SINF", "no exit"):
        for row in found.of("SINF", variant):
            budgets.setdefault((variant, row["kind"], row["size"]), []).append(row)
    cells = []
    for (variant, kind, size), rows in budgets.items():
        if len({row["seed"] for row in rows}) < 2 or kind.startswith("random"):
            continue
        name = "SINF" if variant == "SINF" else "SINF without exits"
        gains = [found.gain(row).mean[0] for row in rows]
        cells.append([f"{name}, {kind}, {size}", str(len(rows)), _spread(gains)])
        for control in CONTROLS:
            equal = [found.at_equal_cost(row, control, counted=True) for row in rows]
            pairs = zip(rows, equal, strict=True)
            ahead = [found.gain(r, e).mean[0] for r, e in pairs if e is not None]
            cells[-1].append(_spread(ahead) if ahead else "")
    if not cells:
        return ""
    header = ["", "draws", "points against the base", *(f"ahead of {n}" for n in CONTROLS.values())]
    caption = "At equal multiplications, mean over draws of calibration images (least to most)"
    return rst.list_table(header, cells, caption)


def _spread(points: Sequence[float]) -> str:
    low, high = 100 * min(points), 100 * max(points)
    return f"{100 * np.mean(points):+.1f} ({low:+.1f} to {high:+.1f})"


def _switches(found: Results) -> str:
    """Each part switched off in turn."""
    cells = []
    for row in found.of("SINF", "SINF"):
        own = [found.by_key.get((*_identity(row)[:4], variant)) for variant in SWITCHES]
        accuracies = [rst.percent(found.right(r).mean()) if r else "" for r in own]
        route = rst.percent(float(row["routed_right"]))
        cells.append([f"{row['kind']}, {row['size']}", *accuracies, route])
    header = ["", *SWITCHES, "cluster predicted"]
    return rst.list_table(header, cells, "Accuracy (%) with parts switched off")


def _kinds(found: Results) -> str:
    """Clusters of several kinds at one size."""
    rows = found.of("SINF", "SINF")
    given = [row for row in rows if row["kind"].startswith("given")]
    if not given:
        return ""
    n, size = given[0]["kind"].split()[1], given[0]["size"]
    same = [r for r in rows if r["size"] == size and r["kind"].split()[-1] == n]
    cells = []
    for row in same:
        label = f"{row['kind']}, draw {row['seed']}"
        points = [found.gain(row)]
        oracle = found.by_key.get((*_identity(row)[:4], "oracle"))
        shown = rst.percent(found.right(oracle).mean()) if oracle else ""
        cells.append(
            [
                label,
                rst.percent(float(row["routed_right"])),
                rst.percent(found.right(row).mean()),
                rst.points(points[0]),
                shown,
                rst.percent(1 - float(row["macs"])),
            ]
        )
    header = ["clusters", "cluster predicted (%)", "accuracy (%)", "points against the base"]
    header += ["true cluster given (%)", "multiplications saved (%)"]
    return rst.list_table(header, cells, f"Kinds of clusters, {n} of them, budget {size}")


def cluster_page(folder: Path) -> rst.Page | None:
    """Table 5: accuracy cluster by cluster."""
    body = []
    for path, network, split in files(folder, NAME):
        found = Results(path)
        rows = [r for r in found.of("SINF", "SINF") if r["kind"].split()[0] != "random"]
        if not rows or not found.base["labels"]:
            continue
        body.append(rst.section(f"{network}, {split} images"))
        body.append(rst.split_note(split) + "\n")
        for row in _one_per_kind(rows):
            body.append(_by_cluster(found, row))
    if not body:
        return None
    return rst.Page("clusters", "Accuracy by cluster", "\n".join([_CLUSTERS, *body]))


def _one_per_kind(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The middle size of each kind of clusters."""
    kinds: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    return [own[len(own) // 2] for own in kinds.values()]


def _by_cluster(found: Results, row: Mapping[str, str]) -> str:
    """Base, base restricted to the cluster, subgraph with the true cluster, routed."""
    y = np.array(found.base["labels"].split(), dtype=int)
    clusters = np.array(row["clusters"].split(), dtype=int)
    names = row["cluster_names"].split("|")
    variants = ("base", "restricted", "oracle", "SINF")
    own = [found.by_key[(*_identity(row)[:4], variant)] for variant in variants]
    right = [found.right(r) for r in own]
    cells: list[list[Any]] = []
    differences = []
    for c, name in enumerate(names):
        inside = clusters[y] == c
        cells.append([name, str(int((clusters == c).sum())), str(int(inside.sum()))])
        cells[-1] += [rst.percent(r[inside].mean()) for r in right]
        differences.append((right[2] - right[1])[inside])
    total = ["all", str(len(clusters)), str(len(y)), *(rst.percent(r.mean()) for r in right)]
    text = rst.list_table(
        ["cluster", "classes", "images", "base", "base, restricted", "subgraph, fused", "SINF"],
        [*cells, total],
        f"Accuracy (%), {row['kind']} clusters, budget {row['size']}",
    )
    ahead = estimate(differences)
    return text + (
        "\nSubgraph with the true cluster, fused with the router, minus the restricted base, mean "
        f"over clusters: {rst.points(ahead)} points (95 % interval over clusters and images).\n"
    )


_INTRODUCTION = """\
SINF (the routed network, prefix and subgraph under one budget of multiplications) beside networks
without routes. Controls at equal repair: (a) one network pruned for all classes by structured
optimal brain surgeon under the same budgets; (b) the same fused with a probe like the router's, at
the same layer; (c) the base fused with such a probe; (d) and (e): (c) and (b), left early where the
probe is sure, by the rule that SINF leaves by: all of SINF but the clusters. Weights, temperatures
and thresholds were chosen on the choosing images. All are timed in the same form: batch-norm
folded, channels_last, float32, normalisation, routing and exits inside the time.

Paper, CIFAR-100 (time saved / points lost): VGG16 29 % / 3.75, VGG19 35 % / 0.17, ResNet50
15 % / 6.75.

``python examples/paper/sinf_table.py --weights WEIGHTS --data FOLDER --split report``, then the
same with ``--time``
"""
_CLUSTERS = """\
Part of what a subgraph gains comes from answering with its cluster's classes only. So the base with
the same restriction stands beside it: ``base, restricted`` and ``subgraph`` know the true cluster,
``base`` and ``SINF`` do not. The subgraph's answer is fused with the router's, as in SINF; the
base's is not, so that a gain may be the router's.

Paper, CIFAR-100 (cluster's accuracy over that of the base): VGG16 +5.73, VGG19 +8.38, ResNet50
+6.36.

``python examples/paper/sinf_table.py --weights WEIGHTS --data FOLDER --split report``
"""
