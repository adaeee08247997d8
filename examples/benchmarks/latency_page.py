"""Figures and the page of ``latency.py``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _paper  # noqa: F401
import figures
import numpy as np
import rst
from parts import PARTS
from record import LOW_RANK, files, from_hex, read
from stats import estimate

NAME = "latency"
WHO = ("contestant", "kind", "size", "seed", "variant")
LIMITS = (0.5, 1.0, 2.0, 3.75)  # points lost at which fronts are compared
WORST = -12.0  # points; what loses more stands at the lower edge
_COLUMNS = 3
Row = Mapping[str, str]


class Results:
    """All rows of one network and split.

    Parameters
    ----------
    path : Path
        The CSV of the times; those of answers, parts and layers lie beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, read(path)
        self.parts, self.layers = self._beside("parts"), self._beside("layers")
        self.answers = {(*who(row), row["form"]): row for row in self._beside("answers")}
        base = [row for row in self.answers.values() if row["contestant"] == "base"]
        own = [row for row in base if row["variant"] == "one"]
        float32 = [
            row for row in own if row["form"] in ("eager", "folded", "packed", "compiled", "onnx")
        ]
        self._base = self.right((float32 or own)[0]) if own else np.zeros(0)

    def _beside(self, name: str) -> list[dict[str, str]]:
        path = self.path.with_name(f"{self.path.stem}_{name}.csv")
        return read(path) if path.exists() else []

    def right(self, row: Row) -> np.ndarray:
        """1 for each image that was answered rightly."""
        return from_hex(row["answers"], int(row["images"])).astype(float)

    def gain(self, row: Row) -> np.ndarray | None:
        """Right answers minus those of the base in float32, image by image."""
        found = self.answers.get((*who(row), row["form"]))
        return None if found is None or not len(self._base) else self.right(found) - self._base

    def lost(self, row: Row) -> float:
        """The same in points, mean over images; NaN where nothing is known."""
        gain = self.gain(row)
        return float("nan") if gain is None else 100 * float(gain.mean())

    def threads(self) -> str:
        """The largest number of threads: what figures show."""
        return rst.in_order(row["threads"] for row in self.rows)[-1]


def who(row: Row) -> tuple[str, ...]:
    """What tells contenders apart."""
    return tuple(row[k] for k in WHO)


def series(row: Row) -> str:
    """What a contender's line is called: its kind, without the size."""
    name = {
        "one network": "one network, pruned",
        "torch-pruning": "torch-pruning",
    }.get(row["contestant"], row["contestant"])
    if row["contestant"] == "SINF":
        return f"SINF, {row['kind']}"
    if row["kind"].endswith(LOW_RANK):
        name += f", {LOW_RANK}"
    ending = {
        "fused": ", with a probe",
        "exit": ", with a probe and exits",
        "shipped": ", as shipped",
        "repaired": " + our repair",
    }
    return name + ending.get(row["variant"], "")


def colours(rows: Sequence[Row]) -> dict[str, str]:
    """One colour for each line, the same in all figures of a network."""
    # Those of low rank have the colour of what they were made of.
    names = dict.fromkeys(series(row).replace(f", {LOW_RANK}", "") for row in rows)
    palette = [*figures.COLOURS, "#999999", "#7F3C8D", "#6B4C2A"]
    return {name: palette[i % len(palette)] for i, name in enumerate(names)}


def draw(path: Path) -> list[Path]:
    """Accuracy lost against speed-up, a figure for each form; and where the time goes."""
    found = Results(path)
    if not found.rows:
        return []
    forms = dict.fromkeys(row["form"] for row in found.rows if row["mix"] == "natural")
    made = [_trade(found, form) for form in forms]
    if found.parts:
        made.append(_split(found))
    return made


def _trade(found: Results, form: str) -> Path:
    """Accuracy lost against speed-up, a panel for each batch size."""
    threads = found.threads()
    rows = [r for r in found.rows if r["form"] == form and r["threads"] == threads]
    rows = [r for r in rows if r["mix"] == "natural" and not np.isnan(found.lost(r))]
    batches = rst.in_order(row["batch"] for row in rows)
    columns = min(_COLUMNS, len(batches))
    lines = -(-len(batches) // columns)
    figure, axes = figures.plt.subplots(
        lines,
        columns,
        figsize=(max(3.5 * columns, 5.5) + 0.4, 3.0 * lines + 1.1),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    palette = colours(found.rows)
    for axis, batch in zip(axes.flat, batches, strict=False):
        own = [row for row in rows if row["batch"] == batch]
        for name in dict.fromkeys(series(row) for row in own):
            points = sorted(
                (1 / float(r["ratio"]), found.lost(r)) for r in own if series(r) == name
            )
            x, y = np.transpose(points)
            shown = np.maximum(y, WORST)
            routed = name.startswith("SINF")
            colour = palette[name.replace(f", {LOW_RANK}", "")]
            style: dict[str, Any] = {"color": colour, "markersize": 5 if routed else 4}
            line = ("D" if routed else "o") + ("--" if LOW_RANK in name else "-")
            axis.plot(x, shown, line, label=name, linewidth=1.2, **style)
            if (y < WORST).any():
                axis.plot(x[y < WORST], shown[y < WORST], "v", clip_on=False, **style)
        axis.axhline(0, color="0.3", linestyle="--", linewidth=1)
        axis.axvline(1, color="0.3", linestyle="--", linewidth=1)
        axis.set(title=f"batch {batch}", xlabel="speed-up over the folded base")
    for axis in axes.flat[len(batches) :]:
        axis.set_visible(False)
    low = min(float(axis.get_ylim()[0]) for axis in axes.flat)
    axes.flat[0].set_ylim(bottom=max(low, WORST))
    for axis in axes[:, 0]:
        axis.set_ylabel("points against the base")
    note = f"{form}, threads: {threads} (triangles: {-WORST:g} points lost or more)"
    figure.suptitle(note, fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    return figures.save(figure, found.path.with_name(f"{found.path.stem}_{form}.png"))


def _split(found: Results) -> Path:
    """Bars: each part's share of the base's time, by batch size."""
    threads = found.threads()
    rows = [row for row in found.parts if row["threads"] == threads]
    networks = list(dict.fromkeys(who(row) for row in rows))
    figure, axes = figures.plt.subplots(
        len(networks),
        1,
        figsize=(7.4, 0.9 + 1.75 * len(networks)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, one in zip(axes.flat, networks, strict=True):
        own = sorted((r for r in rows if who(r) == one), key=lambda r: -int(r["batch"]))
        left = np.zeros(len(own))
        y = np.arange(len(own))
        for part, colour in zip(PARTS, figures.COLOURS, strict=False):
            share = 100 * np.array([float(r[part]) / float(r["base"]) for r in own])
            width = np.maximum(share, 0)  # differences of times may fall below 0
            axis.barh(y, width, left=left, color=colour, label=part, height=0.75)
            for i, value in enumerate(width):
                if value > 5:
                    middle = left[i] + value / 2
                    axis.text(middle, i, f"{value:.0f}", color="white", fontsize=7, **_CENTRED)
            left += width
        axis.axvline(100, color="0.3", linestyle="--", linewidth=1)
        axis.set_yticks(y, [f"batch {row['batch']}" for row in own])
        axis.set_title(f"SINF, {one[1]}, {one[2]}")
        axis.grid(axis="y", visible=False)
    axes.flat[-1].set_xlabel(
        f"time, % of the base's (dashed) on the same batch, threads: {threads}"
    )
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(PARTS), fontsize=8)
    return figures.save(figure, found.path.with_name(f"{found.path.stem}_parts.png"))


_CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}


def page(folder: Path) -> rst.Page | None:
    """The page, from all files in a folder."""
    body = []
    for path, network, split in files(folder, NAME):
        found = Results(path)
        images = draw(path)
        if not images:
            continue
        body.append(rst.section(f"{network}, {split} images"))
        seen = found.rows[0]
        more = [seen["libraries"], f"TF32: {seen['tf32']}" if seen["tf32"] else ""]
        body.append(
            f"{rst.split_note(split)} {rst.provenance(found.rows)}"
            + (f"Libraries: {'; '.join(filter(None, more))}.\n" if any(more) else "")
        )
        for image in images:
            what = image.stem.rsplit("_", 1)[1]
            alt = "Where the time goes." if what == "parts" else f"Accuracy and speed-up, {what}."
            body.append(rst.figure(image.name, alt))
        body += [_fronts(found), _natural(found), _mixed(found), _parts(found), _by_layer(found)]
    return rst.Page(NAME, "Latency", "\n".join([_INTRODUCTION, *body])) if body else None


def _label(row: Row) -> str:
    return f"{series(row)}, {row['size']}" if row["size"] else series(row)


def _fronts(found: Results) -> str:
    """The fastest routed network and the fastest other within a number of points lost."""
    rows = [row for row in found.rows if row["mix"] == "natural" and not np.isnan(found.lost(row))]
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["threads"], row["form"], row["batch"]), []).append(row)
    cells = []
    for (threads, form, batch), own in sorted(
        lines.items(), key=lambda item: (item[0][0], item[0][1], int(item[0][2]))
    ):
        cell = [form, threads, batch]
        for limit in LIMITS:
            within = [row for row in own if found.lost(row) >= -limit]
            routed = _fastest(row for row in within if row["contestant"] == "SINF")
            other = _fastest(row for row in within if row["contestant"] != "SINF")
            cell.append(
                f"{_times(routed)} / {_times(other)}" + (f" {_label(other)}" if other else "")
            )
        cells.append(cell)
    header = ["form", "threads", "batch", *(f"at most {limit:g}" for limit in LIMITS)]
    title = "Speed-up over the folded base within so many points: SINF / the fastest without routes"
    return rst.list_table(header, cells, title)


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=lambda row: float(row["ratio"]), default=None)


def _times(row: Row | None) -> str:
    return "none" if row is None else f"{1 / float(row['ratio']):.2f}"


def _natural(found: Results) -> str:
    """Points and speed-up by batch size, for each form and number of threads."""
    rows = [row for row in found.rows if row["mix"] == "natural"]
    batches = rst.in_order(row["batch"] for row in rows)
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["threads"], row["form"], *who(row)), {})[row["batch"]] = row
    cells = []
    for (threads, form, *_), own in sorted(lines.items(), key=lambda item: item[0][:2]):
        first = next(iter(own.values()))
        gain = found.gain(first)
        points = "" if gain is None else rst.points(estimate([gain]))
        times = [_speed(own[batch]) if batch in own else "" for batch in batches]
        cells.append([_label(first), form, threads, points, *times])
    header = ["", "form", "threads", "points against the base", *(f"batch {b}" for b in batches)]
    title = "Speed-up over the folded base [quartiles over rounds], natural mix of images"
    return rst.list_table(header, cells, title)


def _speed(row: Row) -> str:
    low, high = 1 / float(row["ratio_high"]), 1 / float(row["ratio_low"])
    return f"{1 / float(row['ratio']):.2f} [{low:.2f}, {high:.2f}]"


def _mixed(found: Results) -> str:
    """Routed networks by composition of the batch."""
    rows = [row for row in found.rows if row["contestant"] == "SINF"]
    mixes = list(dict.fromkeys(row["mix"] for row in rows))
    if len(mixes) < 2:
        return ""
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row["threads"], row["form"], row["batch"], *who(row))
        lines.setdefault(key, {})[row["mix"]] = row
    cells = [
        [_label(next(iter(own.values()))), form, threads, batch]
        + [f"{1 / float(own[mix]['ratio']):.2f}" if mix in own else "" for mix in mixes]
        for (threads, form, batch, *_), own in lines.items()
    ]
    title = "Speed-up of routed networks over the folded base, by what a batch holds"
    return rst.list_table(["", "form", "threads", "batch", *mixes], cells, title)


def _parts(found: Results) -> str:
    """Where the time goes, in numbers."""
    cells = []
    for row in found.parts:
        own = [f"{100 * float(row[part]) / float(row['base']):.1f}" for part in ("whole", *PARTS)]
        head = [f"{row['kind']}, {row['size']}", row["threads"], row["batch"]]
        cells.append(
            [*head, f"{1e3 * float(row['base']):.2f}", *own, rst.percent(float(row["rows"]))]
        )
    if not cells:
        return ""
    header = ["SINF", "threads", "batch", "base, ms", "whole", *PARTS, "images on base's rest, %"]
    title = "Time of each part, % of the base's, both packed; parts timed in turns"
    return rst.list_table(header, cells, title)


def _by_layer(found: Results) -> str:
    """Multiplications and time saved, layer by layer, at the largest batch of each network."""
    if not found.layers:
        return ""
    threads = found.threads()
    batch = rst.in_order(row["batch"] for row in found.layers)[-1]
    rows = [r for r in found.layers if r["threads"] == threads and r["batch"] == batch]
    networks = list(dict.fromkeys(who(row) for row in rows))
    by = {(*who(row), row["layer"]): row for row in rows}
    header = ["layer", "share of the base's multiplications", "share of its time"]
    header += [f"{one[1]}, {one[2]}: multiplications / time" for one in networks]
    own = [row for row in rows if who(row) == networks[0]]
    macs, seconds = (sum(float(r[k]) for r in own) for k in ("base_macs", "base_seconds"))
    cells = []
    for row in own:
        line = [row["layer"], rst.percent(float(row["base_macs"]) / macs)]
        line.append(rst.percent(float(row["base_seconds"]) / seconds))
        for one in networks:
            other = by[(*one, row["layer"])]
            line.append(f"{_saved(other, 'macs')} / {_saved(other, 'seconds')}")
        cells.append(line)
    title = f"Saved layer by layer (%), batch {batch}, threads: {threads}"
    return rst.list_table(header, cells, title)


def _saved(row: Row, what: str) -> str:
    before = float(row[f"base_{what}"])
    return "" if before == 0 else f"{100 * (1 - float(row[what]) / before):.0f}"


_INTRODUCTION = """\
The networks of table 4, each in several forms: *eager* (the base as it comes, batch-norms apart;
a routed network as ``predict`` runs it), *folded* (batch-norms folded, channels_last), *compiled*
(``torch.compile``), *packed* (folded, and the weights of convolutions kept as oneDNN wants them,
ReLUs inside; ``clf.runtime()`` for a routed network), *onnx* and *onnx-int8* (ONNX Runtime; int8:
static QDQ), *bfloat16* (packed).
All contenders of a form, batch size and number of threads take turns in one run, after a
warm-up; several batches take turns too. Speed-up: median over rounds of the time of the folded
base over that of the contender in the same round. Networks: the base; one network pruned for all
classes (structured OBS, global budget), alone, fused with a probe like the router's, and left early
where that probe is sure, also with layers of low rank; torch-pruning's at the same budgets, as
shipped and with our repair; SINF, also with a prefix of low rank. Where batches are mixed by routed
cluster (*uniform*: equally many of each, *single*: all of one, none on the fallback) the base runs
natural ones.

``python examples/benchmarks/latency.py --weights WEIGHTS --data FOLDER --split report``
"""
