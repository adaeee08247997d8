"""Accuracy cluster by cluster, with the control that the paper lacks: the restricted base.

Part of what a subgraph gains on its cluster comes from answering with the cluster's classes only,
which the untouched base can do as well. Given clusters, three draws; units are clusters::

    python -m benchmarks per_cluster --network vgg16 --weights vgg16.pt --split report
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from . import study as base
from .contestants import FOUND, GIVEN, Contestant, make
from .figures import COLOURS, panels, save
from .paper import CLAIMS
from .record import Table, read
from .stats import estimate, spread
from .summary import Summary, files, show

NAME = "per_cluster"
KEYS = (*base.KEYS, "contestant", "size", "draw", "cluster")
VALUES = ("classes", "images", "base", "restricted", "subgraph", "routed", "route", "macs")
SIZE = 0.4
QUESTION = "Is a cluster's subgraph better on its cluster than the base?"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then draw and say what was found."""
    parser = base.parser(__doc__)
    parser.add_argument("--size", type=float, default=SIZE, help="multiplications that stay")
    parser.add_argument("--contestants", nargs="+", choices=(GIVEN, FOUND), default=(GIVEN,))
    options = parser.parse_args(arguments)
    if not options.show:
        if options.quick:
            options.draws, options.images = 1, 40
        study = base.open_study(options)
        table = Table(options.out / f"{NAME}_{study.label}.csv", KEYS, VALUES)
        for name in options.contestants:
            for draw in tqdm(range(options.draws), unit=" draws"):
                one = Contestant(name, options.size, draw)
                _measure(study, table, one, options.images, options.fitted)
    for path in files(options.out, NAME):
        draw_figure(path)
        show(summary(path))


def _measure(study: base.Study, table: Table, one: Contestant, images: int, folder: Path) -> None:
    key = {**study.key(), **one.key()}
    if one.name == GIVEN and all({**key, "cluster": name} in table for name in study.names):
        return
    made = make(study, one, images, folder)
    report = made.classifier.report(study.X_test, study.y_test, repeats=0)
    for row in report.clusters:
        table.add(
            **key,
            cluster=str(row.name),
            classes=row.n_classes,
            images=row.n_samples,
            **{k: f"{getattr(row, k):.5f}" for k in VALUES[2:7]},
            macs=f"{row.macs / report.base_macs:.5f}",
        )


def by_cluster(rows: Sequence[Mapping[str, str]], column: str) -> np.ndarray:
    """Values of shape (n_draws, n_clusters); found clusters are numbered within each draw."""
    draws: dict[str, list[float]] = {}
    for row in rows:
        draws.setdefault(row["draw"], []).append(float(row[column]))
    if len({len(v) for v in draws.values()}) > 1:  # found clusters: draws are units
        return np.array([[np.mean(v) for v in draws.values()]])
    return np.array(list(draws.values()))


def summary(path: Path) -> Summary:
    """What the subgraph gains over the base, and over the base with the same restriction."""
    rows = read(path)
    network, split = rows[0]["network"], rows[0]["split"]
    cells, answer = [], ""
    for name in dict.fromkeys(row["contestant"] for row in rows):
        own = [r for r in rows if r["contestant"] == name and r["subgraph"] != "nan"]
        values = {k: by_cluster(own, k) for k in ("base", "restricted", "subgraph", "routed")}
        over_base = values["subgraph"] - values["base"]
        over_control = values["subgraph"] - values["restricted"]
        gain, controlled = estimate(over_base), estimate(over_control)
        claim = CLAIMS.get(network)
        cells.append(
            [
                name,
                *(f"{100 * v.mean():.1f}" for v in values.values()),
                str(gain),
                f"+{claim.cluster_gain}" if claim else "",
                str(controlled),
                spread(over_control.mean(1)),
            ]
        )
        holds = "gains" if gain.low > 0 else "does not gain"
        real = "is ahead of" if controlled.low > 0 else "is not ahead of"
        answer += (
            f"With {name.removeprefix('SINF, ')}, a subgraph {holds} on its cluster "
            f"({gain} points), and {real} the restricted base ({controlled}). "
        )
    header = ["", "base", "base, restricted", "subgraph", "routed", "over the base", "paper"]
    header += ["over the restricted base", "draws"]
    note = "Accuracy in per cent, mean over clusters; 95 % intervals over clusters."
    return Summary(
        f"{NAME}_{network}_{split}", f"{QUESTION} {network}", answer.strip(), note, header, cells,
        rows, path.with_suffix(".png"),
    )  # fmt: skip


def draw_figure(path: Path) -> Path:
    """One row for each cluster: base, restricted base, subgraph; mean over draws."""
    rows = read(path)
    own = [r for r in rows if r["contestant"] == rows[0]["contestant"]]
    names = list(dict.fromkeys(row["cluster"] for row in own))
    figure, (axis,) = panels(1, width=5.5, height=1.2 + 0.22 * len(names))
    series = (("base", "o"), ("restricted", "s"), ("subgraph", "D"), ("routed", "x"))
    for (column, marker), colour in zip(series, COLOURS, strict=False):
        means = [np.mean([float(r[column]) for r in own if r["cluster"] == n]) for n in names]
        axis.plot(100 * np.array(means), names, marker, color=colour, label=column)
    axis.set_xlabel("accuracy on the cluster's images (%)")
    axis.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.12))
    return save(figure, path.with_suffix(".png"))
