"""Accuracy lost at a measured speed: base, exits, int8, one network, SINF, torch-pruning.

Every contestant is fitted on three draws of calibration images, all of the first draw are timed in
turns in one run, in every form; a row of the answer is the least loss among those that are at
least so fast. Speed is that of the base in float32::

    python -m benchmarks main --network vgg16 --weights vgg16.pt --split report
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from . import study as base
from .contestants import (
    BASE,
    DISTILLED,
    EVERYBODY,
    FOUND,
    GIVEN,
    KEYS,
    ONE_EXITS,
    contestants,
    make,
)
from .figures import COLOURS, panels, save
from .forms import FORMS, answers, forms_of, times
from .paper import CLAIMS
from .record import Table, from_hex, read, to_hex
from .stats import estimate
from .summary import Summary, files, show

NAME = "main"
ANSWERS = (*base.KEYS, *KEYS, "form")
ANSWER_VALUES = ("images", "right", "answers", "macs", "params")
TIMES = (*base.KEYS, *KEYS, "form", "batch", "threads")
TIME_VALUES = ("ms", "ratio", "run")
SIZES = (0.7, 0.5, 0.4, 0.3, 0.2)
SPEEDS = (1.5, 2.0, 3.0, 4.0)
QUESTION = "How much accuracy does a measured speed cost?"


def main(arguments: Sequence[str] | None = None, name: str = NAME) -> None:
    """Fit and measure what is missing, then draw and say what was found."""
    options = parse(arguments)
    if not options.show:
        measure(options, name)
    for path in files(options.out, name):
        if not any(row["contestant"] == BASE for row in read(path)):
            print(f"{path}: measure the contestant {BASE!r} too, which the others stand beside")
            continue
        draw(path)
        show(summary(path))
        show(by_size(path))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    made = base.parser(__doc__)
    made.add_argument("--contestants", nargs="+", choices=EVERYBODY, default=EVERYBODY)
    made.add_argument("--sizes", nargs="+", type=float, help="shares of multiplications that stay")
    made.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    made.add_argument("--batches", nargs="+", type=int, default=(1, 256))
    made.add_argument("--rounds", type=int, default=21, help="of timing; 0: no times")
    options = made.parse_args(arguments)
    if options.quick:
        options.sizes, options.draws = options.sizes or [0.6], min(options.draws, 1)
        options.forms = ("torch",) if len(options.forms) == len(FORMS) else options.forms
        options.batches, options.rounds, options.images = (32,), min(options.rounds, 3), 40
    options.sizes = options.sizes or SIZES
    return options


def measure(options: argparse.Namespace, name: str) -> None:
    """Fill the two CSV files."""
    study = base.open_study(options)
    path = options.out / f"{name}_{study.label}.csv"
    table = Table(path, ANSWERS, ANSWER_VALUES)
    everybody = list(contestants(options.contestants, options.sizes, options.draws))
    runs: dict[tuple[Any, ...], Any] = {}
    for one in tqdm(everybody, unit=" networks", mininterval=2):
        rows = {form: {**study.key(), **one.key(), "form": form} for form in options.forms}
        timed = one.draw == 0 and options.rounds > 0
        if not timed and all(row in table for row in rows.values()):
            continue
        made = make(study, one, options.images, options.fitted)
        for form, run in forms_of(made, tuple(options.forms), study.X).items():
            if rows[form] not in table:
                right = answers(run, study.X_test) == study.y_test
                found = {"images": len(right), "right": int(right.sum()), "answers": to_hex(right)}
                table.add(
                    **rows[form], **found, macs=f"{made.macs:.5f}", params=f"{made.params:.5f}"
                )
            if timed:
                runs[tuple(rows[form].items())] = run
    if options.rounds:
        _times(options, path.with_name(f"{path.stem}_times.csv"), runs, study.X_test)


def _times(options: argparse.Namespace, path: Path, runs: Mapping[Any, Any], X: np.ndarray) -> None:
    """One run for each batch size; it is measured again as a whole if a contestant is missing."""
    table = Table(path, TIMES, TIME_VALUES)
    for batch in options.batches:
        rows = {key: {**dict(key), "batch": batch} for key in runs}
        if not all({**row, "threads": torch.get_num_threads()} in table for row in rows.values()):
            ms, ratio = times(runs, X, batch, options.rounds)
            for key, row in rows.items():
                table.add(**row, ms=f"{ms[key]:.4f}", ratio=f"{ratio[key]:.4f}", run=len(table))


class Results:
    """Answers by contestant, size and form, over draws; times where there are any."""

    def __init__(self, path: Path) -> None:
        self.rows = read(path)
        self.times = read(path.with_name(f"{path.stem}_times.csv"))
        self.right: dict[tuple[str, str, str], list[np.ndarray]] = {}
        self.macs: dict[tuple[str, str, str], float] = {}
        for row in self.rows:
            key = row["contestant"], row["size"], row["form"]
            self.right.setdefault(key, []).append(from_hex(row))
            self.macs[key] = float(row["macs"])
        self.base = self.right[BASE, "1", "torch"][0]

    def lost(self, key: tuple[str, str, str]) -> np.ndarray:
        """Base right minus ours right, by draw and image."""
        return self.base.astype(float) - np.stack(self.right[key])

    def speeds(self, batch: str) -> dict[tuple[str, str, str], float]:
        """Base's time in float32 over that of each."""
        return {
            (row["contestant"], row["size"], row["form"]): 1 / float(row["ratio"])
            for row in self.times
            if row["batch"] == batch
        }

    def best(self, contestant: str, speed: float, batch: str | None) -> tuple[str, str, str] | None:
        """The one that loses least among those that are at least so fast, or so small."""
        cost = self.speeds(batch) if batch else {k: 1 / m for k, m in self.macs.items()}
        able = [k for k, s in cost.items() if k[0] == contestant and s >= speed * (1 - 1e-9)]
        return min(able, key=lambda k: float(self.lost(k).mean())) if able else None


def summary(path: Path) -> Summary | None:
    """Points lost at each speed, and the paper's trade."""
    found = Results(path)
    network, split = found.rows[0]["network"], found.rows[0]["split"]
    batches = sorted({row["batch"] for row in found.times}, key=int) or [None]
    names = list(dict.fromkeys(key[0] for key in found.right))
    claim = CLAIMS.get(network)
    speeds = [*SPEEDS, claim.speedup] if claim else list(SPEEDS)
    cells = []
    for batch in batches:
        for name in names:
            where = f", batch {batch}" if batch else ", by multiplications"
            cells.append([name + where])
            for speed in speeds:
                key = found.best(name, speed, batch)
                cells[-1].append("" if key is None else f"{estimate(found.lost(key))} ({key[2]})")
    header = ["points lost at", *(f"{s:g}x" for s in SPEEDS)]
    answer = _fastest(found, names, batches[-1])
    if claim:
        header.append(f"{claim.speedup:g}x, paper's: {claim.lost:g}")
        sinf = [k for n in (FOUND, GIVEN) if (k := found.best(n, claim.speedup, batches[-1]))]
        least = min((float(found.lost(k).mean()) for k in sinf), default=None)
        verdict = "not reached" if least is None else f"{100 * least:.2f} points"
        held = least is not None and 100 * least <= claim.lost
        answer += (
            f" Paper: {claim.lost:g} points at {claim.speedup:g}x; ours: {verdict}: "
            f"{'met' if held else 'not met'}."
        )
    accuracy = f"Base: {100 * found.base.mean():.1f} % of {len(found.base)} images."
    return Summary(
        f"{NAME}_{network}_{split}", f"{QUESTION} {network}", answer, accuracy, header, cells,
        found.rows, path.with_suffix(".png"),
    )  # fmt: skip


def by_size(path: Path) -> Summary:
    """Points lost and speeds of every contestant and size, by form; SINF beside its control."""
    found = Results(path)
    forms = list(dict.fromkeys(key[2] for key in found.right))
    batches = sorted({row["batch"] for row in found.times}, key=int)
    speeds = {batch: found.speeds(batch) for batch in batches}
    cells = []
    for name, size in dict.fromkeys(key[:2] for key in found.right):
        keys = [(name, size, form) for form in forms]
        cells.append([name, f"{found.macs[keys[0]]:.2f}"])
        for key in keys:
            cells[-1].append(str(estimate(found.lost(key))) if key in found.right else "")
            times_as_fast = (speeds[batch].get(key) for batch in batches)
            cells[-1] += ["" if s is None else f"{s:.1f}x" for s in times_as_fast]
    header = ["contestant", "cost"]
    for form in forms:
        header += [f"points lost, {form}", *(f"batch {batch}" for batch in batches)]
    answer = []
    for routed, control in ((FOUND, ONE_EXITS), (DISTILLED[-1], DISTILLED[-2])):
        for size in dict.fromkeys(key[1] for key in found.right if key[0] == routed):
            pair = (routed, size, forms[0]), (control, size, forms[0])
            if pair[1] in found.right:
                behind = (found.lost(pair[0]) - found.lost(pair[1])).mean(0)
                answer.append(f"{routed} at {size} loses {estimate(behind)} more than {control}.")
    network = found.rows[0]["network"]
    return Summary(path.stem, f"{QUESTION} {network}, by size", " ".join(answer), "", header, cells,
        found.rows)  # fmt: skip


def _fastest(found: Results, names: Sequence[str], batch: str | None) -> str:
    """Who is ahead at twice the speed, and by how much SINF is ahead of its control there."""
    keys = {n: k for n in names if (k := found.best(n, 2.0, batch)) is not None}
    if not keys:
        return "Nobody is twice as fast as the base."
    lost = {n: float(found.lost(k).mean()) for n, k in keys.items()}
    first = min(lost, key=lambda n: lost[n])
    text = f"At twice the base's speed {first} loses least: {100 * lost[first]:.2f} points."
    routed = [n for n in (FOUND, GIVEN) if n in lost]
    if routed and ONE_EXITS in lost:
        own = min(routed, key=lambda n: lost[n])
        ahead = found.lost(keys[ONE_EXITS]).mean(0) - found.lost(keys[own]).mean(0)
        text += f" {own} is ahead of {ONE_EXITS} by {estimate(ahead)} points."
    return text


def draw(path: Path) -> Path | None:
    """Points lost against speed, a panel for each batch size; hollow where not in float32."""
    found = Results(path)
    batches = sorted({row["batch"] for row in found.times}, key=int) or [""]
    figure, axes = panels(len(batches), height=4.4)
    names = list(dict.fromkeys(key[0] for key in found.right))
    forms = list(dict.fromkeys(key[2] for key in found.right))
    others = f" (hollow: {', '.join(forms[1:])})" if forms[1:] else ""
    for axis, batch in zip(axes, batches, strict=True):
        cost = found.speeds(batch) if batch else {k: 1 / m for k, m in found.macs.items()}
        for i, name in enumerate(names):
            colour, marker = COLOURS[i % len(COLOURS)], "os^"[i // len(COLOURS) % 3]
            for form in forms:
                points = [
                    (s, 100 * float(found.lost(k).mean()))
                    for k, s in cost.items()
                    if (k[0], k[2]) == (name, form)
                ]
                if points:
                    x, y = np.transpose(sorted(points, key=lambda point: point[1]))
                    hollow = {} if form == forms[0] else {"markerfacecolor": "none"}
                    label = name if form == forms[0] else None
                    style = {"color": colour, "linewidth": 0.8, "label": label}
                    axis.plot(x, y, f"{marker}-", **style, **hollow)
        axis.set(xscale="log", xlabel="times as fast as the base in float32")
        axis.set_xticks([1, 1.5, 2, 3, 4, 6, 8], [], minor=True)
        axis.set_xticks([1, 1.5, 2, 3, 4, 6, 8], ["1", "1.5", "2", "3", "4", "6", "8"])
        axis.set_title((f"batch {batch}" if batch else "by multiplications") + others)
    axes[0].set_ylabel("points lost")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return save(figure, path.with_suffix(".png"))
