"""Where routing pays: how much lies behind the router, how many clusters, what is known before.

SINF against ONE network of the same multiplications, and against that network answering with a
cluster's classes only. ``natural``: images as they come. ``known``: the cluster of each image is
known before (a stream of one cluster), so SINF runs that subgraph alone and ONE network is
restricted to its classes. ``zipf``: clusters in proportion 1, 1/2, 1/3 ..., in sorted order::

    python -m benchmarks routing --network vgg16 --weights vgg16.pt --split report
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from . import study as base
from .contestants import MAX_DROP, REPAIR_SAMPLES
from .figures import COLOURS, panels, save
from .library import SemanticClusterer, count_macs, pruner, routed
from .record import Table, read
from .stats import estimate, spread
from .summary import Summary, files, show

NAME = "routing"
KEYS = (*base.KEYS, "route_layer", "n_clusters", "size", "draw", "cluster")
VALUES = ("classes", "images", "behind", "router", "exits", "macs", "known_macs", "one_macs")
VALUES += ("base", "restricted", "routed", "known", "one", "one_restricted")
CONTEXTS = ("natural", "known", "zipf")
# Cuts from early to late; the share of the cost behind each is measured.
CUTS = {
    "vgg16": ("features.14", "features.24", "features.34"),
    "vgg19": ("features.14", "features.27", "features.40"),
    "resnet50": ("layer2.1", "layer3.1", "layer4.0"),
    "resnet56": ("layer1.8", "layer2.4", "layer3.2"),
    "tiny": ("3", "7"),
}
QUESTION = "When do subgraphs for clusters beat one network of the same cost?"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then draw and say what was found."""
    parser = base.parser(__doc__)
    parser.add_argument("--cuts", nargs="+", help="layers behind which routes are predicted")
    parser.add_argument("--n-clusters", nargs="+", type=int, default=(2, 5, 10, 20))
    parser.add_argument("--sizes", nargs="+", type=float, default=(0.5, 0.3))
    options = parser.parse_args(arguments)
    if options.quick:
        options.draws, options.images, options.n_clusters = 1, 40, (4,)
        options.sizes, options.cuts = (0.5,), options.cuts or CUTS["tiny"][-1:]
    if not options.show:
        study = base.open_study(options)
        table = Table(options.out / f"{NAME}_{study.label}.csv", KEYS, VALUES)
        for settings in tqdm(list(_plan(study, options)), unit=" networks"):
            if {**study.key(), **settings, "cluster": "all"} not in table:
                _measure(study, table, settings, options.images)
    for path in files(options.out, NAME):
        draw(path)
        show(summary(path))


def _plan(study: base.Study, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for draw in range(options.draws):
        for cut in options.cuts or CUTS[study.network]:
            for n in options.n_clusters:
                for size in options.sizes:
                    yield {"route_layer": cut, "n_clusters": n, "size": f"{size:g}", "draw": draw}


def _measure(study: base.Study, table: Table, settings: Mapping[str, Any], images: int) -> None:
    """Fit both, and write down their accuracy by cluster; the last row is that of all images."""
    size, draw = float(settings["size"]), settings["draw"]
    X, y = study.draw(images, draw)
    common = {"criterion": "dcs_obs", "schedule": "global"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sinf = routed(
            study.model,
            clusterer=SemanticClusterer(n_clusters=settings["n_clusters"]),
            pruner=pruner(budget=size, repair_samples=REPAIR_SAMPLES, **common),
            route_layer=settings["route_layer"],
            max_accuracy_drop=MAX_DROP,
            random_state=draw,
        ).fit(X, y, X_val=study.X_choose, y_val=study.y_choose)
        report = sinf.report(study.X_test, study.y_test, repeats=0)
        # As large as SINF is on average where nothing is known, and of a subgraph's full way.
        known = float(np.mean([row.macs for row in report.clusters])) / report.base_macs
        one = pruner(
            study.model,
            budget=min(known, 1.0),
            repair_samples=2 * REPAIR_SAMPLES,
            random_state=draw,
            **common,
        ).fit(X, y)
    example = next(study.batches(study.X[:1]))
    one_macs = count_macs(one.model_, example)[0] / count_macs(study.model.module(), example)[0]
    logits = study.logits(one.model_, study.X_test)
    right = logits.argmax(1) == study.y_test
    own = sinf.class_clusters_
    restricted = np.where(own[None, :] == own[study.y_test][:, None], logits, -np.inf).argmax(1)
    behind = 1 - _prefix_macs(study, settings["route_layer"])
    shared = {
        **study.key(),
        **settings,
        "behind": f"{behind:.4f}",
        "exits": f"{report.exit_share:.4f}",
        "macs": f"{report.macs / report.base_macs:.5f}",
        "one_macs": f"{one_macs:.5f}",
    }
    rows = []
    for c, row in enumerate(report.clusters):
        inside = own[study.y_test] == c
        rows.append(
            {
                "classes": row.n_classes,
                "images": row.n_samples,
                "router": row.route,
                "known_macs": row.macs / report.base_macs,
                "base": row.base,
                "restricted": row.restricted,
                "routed": row.routed,
                "known": row.subgraph if row.subgraph == row.subgraph else row.routed,
                "one": float(right[inside].mean()),
                "one_restricted": float((restricted == study.y_test)[inside].mean()),
            }
        )
        table.add(**shared, cluster=str(row.name), **rows[-1])
    weight = np.array([row["images"] for row in rows], dtype=float)
    names = [name for name in rows[0] if name not in ("classes", "images")]
    means = {k: float(np.average([row[k] for row in rows], weights=weight)) for k in names}
    totals = {"classes": study.n_classes, "images": int(weight.sum())}
    table.add(**shared, cluster="all", **totals, **means)


def _prefix_macs(study: base.Study, cut: str) -> float:
    """Share of the base's multiplications up to a layer."""
    module, example = study.model.module(), next(study.batches(study.X[:1]))
    total, layers = count_macs(module, example)
    order = [name for name, _ in module.named_modules()]
    last = max(i for i, name in enumerate(order) if name == cut or name.startswith(f"{cut}."))
    return sum(macs for name, macs in layers.items() if order.index(name) <= last) / total


def gains(rows: Sequence[Mapping[str, str]], context: str) -> np.ndarray:
    """SINF minus ONE network on each draw, in a context; rows are those of one setting."""
    found = []
    for draw in sorted({row["draw"] for row in rows}):
        own = [r for r in rows if r["draw"] == draw and r["cluster"] != "all"]
        routed, rival = ("known", "one_restricted") if context == "known" else ("routed", "one")
        weights = [float(r["images"]) for r in own]
        if context == "zipf":
            ranked = sorted(range(len(own)), key=lambda i: own[i]["cluster"])
            weights = [1 / (1 + ranked.index(i)) for i in range(len(own))]
        difference = [float(r[routed]) - float(r[rival]) for r in own]
        found.append(np.average(difference, weights=weights))
    return np.array(found)


def _settings(rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, ...], list[Mapping[str, str]]]:
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        key = row["route_layer"], row["n_clusters"], row["size"]
        groups.setdefault(key, []).append(row)
    return groups


def summary(path: Path) -> Summary:
    """SINF minus ONE network for each setting and context."""
    rows = read(path)
    network, split = rows[0]["network"], rows[0]["split"]
    cells, best = [], {context: (-np.inf, "") for context in CONTEXTS}
    for (cut, n, size), own in _settings(rows).items():
        overall = [r for r in own if r["cluster"] == "all"]
        means = {
            k: np.mean([float(r[k]) for r in overall])
            for k in ("behind", "router", "exits", "macs", "known_macs", "one_macs")
        }
        cell = [cut, f"{100 * means['behind']:.0f}", n, size]
        cell += [f"{100 * means[k]:.1f}" for k in ("router", "exits", "macs", "one_macs")]
        for context in CONTEXTS:
            gain = gains(own, context)
            found = estimate(gain)  # draws are the units here
            cell.append(f"{found} ({spread(gain)})" if len(gain) > 1 else str(found))
            if found.mean > best[context][0]:
                best[context] = (found.mean, f"{found} with {n} clusters behind {cut}")
        cells.append(cell)
    where = {
        "natural": "On images as they come",
        "known": "Where the cluster is known before",
        "zipf": "Under a Zipf mix",
    }
    answer = " ".join(
        f"{where[context]} SINF is at best {text} points ahead of one network."
        for context, (_, text) in best.items()
    )
    header = [
        "routed behind",
        "cost behind it, %",
        "clusters",
        "size",
        "router right, %",
        "exits, %",
    ]
    header += ["multiplications, %", "those of ONE, %", *CONTEXTS]
    note = "Points ahead of ONE network; 95 % intervals over draws, in brackets least and most."
    return Summary(
        f"{NAME}_{network}_{split}", f"{QUESTION} {network}", answer, note, header, cells, rows,
        path.with_suffix(".png"),
    )  # fmt: skip


def draw(path: Path) -> Path:
    """Points ahead of ONE network against the number of clusters, a panel for each context."""
    rows = read(path)
    figure, axes = panels(len(CONTEXTS))
    lines = sorted({(row["route_layer"], row["size"]) for row in rows})
    for axis, context in zip(axes, CONTEXTS, strict=True):
        for (cut, size), colour in zip(lines, COLOURS * 3, strict=False):
            points = [
                (int(n), 100 * float(gains(own, context).mean()))
                for (c, n, s), own in _settings(rows).items()
                if (c, s) == (cut, size)
            ]
            x, y = np.transpose(sorted(points))
            axis.plot(x, y, "o-", color=colour, label=f"{cut}, {size}")
        axis.axhline(0, color="0.4", linewidth=1)
        axis.set(title=context, xlabel="clusters")
    axes[0].set_ylabel("points ahead of one network")
    axes[0].legend(fontsize=7)
    return save(figure, path.with_suffix(".png"))
