"""Table 6: how much semantically similar inputs share filters, layer by layer.

That they share many is the reason for semantic subgraphs. Two measures of it, each an overlap of
sets of filters (Jaccard: common over joint)::

    python sharing_table.py --weights vgg16.pt --data ~/images --held-out
    python sharing_table.py --quick

``activation``
    Of each class the half of a layer's filters that it activates most, relative to all classes.
    Overlap of two classes of one cluster, of different clusters, and of a random cluster; and of
    one class with itself on other images, which is as much as there can be.
``dcs``
    Of each cluster the half of the filters with the highest DCS. Overlap of two clusters, of two
    random clusters of the same sizes, and of one cluster with itself on other images.

Units: cluster. Filters that never fire are left out of both.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import figures
import numpy as np
import rst
import study as base
import torch
from record import Table, files, read
from scipy.stats import hypergeom
from stats import Estimate, estimate
from tqdm.auto import tqdm

from sinfkit.criteria import collect, discriminative_capability
from sinfkit.graph import layer_names, observation_nodes, trace

NAME = "sharing"
KEYS = ("network", "width", "base_seed", "split", "measure", "layer", "clusters", "draw")
KEYS += ("cluster", "overlap_with")
VALUES = ("depth", "overlap", "chance", "filters")
MEASURES = ("activation", "dcs")
# Of each measure: (clusters, overlap with what), how it is called, and its line.
LINES = {
    "activation": (
        (("given", "itself"), "same class, other images", "k:"),
        (("given", "same"), "same given cluster", "o-"),
        (("random", "same"), "same random cluster", "s-"),
        (("given", "other"), "different clusters", "^-"),
    ),
    "dcs": (
        (("given", "itself"), "same cluster, other images", "k:"),
        (("given", "other"), "two given clusters", "o-"),
        (("random", "other"), "two random clusters", "s-"),
    ),
}

Partition = dict[str, np.ndarray]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then draw."""
    options = parse(arguments)
    study = base.open_study(options)
    path = options.out / f"{NAME}_{study.base.label}_{study.split}.csv"
    measure(study, Table(path, KEYS, VALUES, study.constants()), options)
    draw(path)
    print(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what is not given comes from ``frozen.toml``."""
    frozen = base.frozen()["sharing"]
    parser = base.parser(__doc__)
    parser.add_argument("--images", type=int, default=frozen["images"], help="per class, for DCS")
    parser.add_argument("--random", type=int, default=frozen["random"], help="random partitions")
    parser.set_defaults(clusters=["all"])
    return parser.parse_args(arguments)


def measure(study: base.Study, table: Table, options: argparse.Namespace) -> None:
    """Fill the table, layer by layer."""
    graph = trace(study.base.model.module(study.device))
    nodes = observation_nodes(graph, layer_names(graph)[:-1])
    layers = list({node: layer for layer, node in reversed(nodes.items())}.values())[::-1]
    partitions = {("given", 0): {name: study.classes(name) for name in study.chosen}}
    for number in range(options.random):
        partitions["random", number] = shuffled(partitions["given", 0], number)
    plan = [
        (what, layer, kind, number)
        for layer in layers
        for what in MEASURES
        for kind, number in partitions
    ]

    def key(what: str, layer: str, kind: str, number: int, **more: str) -> dict[str, Any]:
        own = {"measure": what, "layer": layer, "clusters": kind, "draw": number}
        return {**study.key(), **own, **more}

    def pairs(what: str, kind: str) -> list[str]:
        return [pair for (own, pair), _, _ in LINES[what] if own == kind]

    def is_done(what: str, layer: str, kind: str, number: int) -> bool:
        return all(
            key(what, layer, kind, number, cluster=cluster, overlap_with=pair) in table
            for cluster, classes in partitions[kind, number].items()
            for pair in pairs(what, kind)
            if len(classes) > 1 or pair != "same"
        )

    plan = [entry for entry in plan if not is_done(*entry)]
    if not plan:
        return
    classes = np.concatenate(list(partitions["given", 0].values()))
    images = {
        "activation": (study.X_test, study.y_test, study.test_rows(classes)),
        "dcs": (study.X, study.y, study.draw(np.sort(classes), options.images, 0)),
    }
    # All layers at once: one pass over the images, one number per image and filter.
    seen, labels = {}, {}
    for what, (X, y, rows) in images.items():
        seen[what] = collect(graph, study.batches(X[rows]), {k: nodes[k] for k in layers}).pooled
        labels[what] = y[rows]
    overlaps = {"activation": activation_overlaps, "dcs": dcs_overlaps}
    for what, layer, kind, number in tqdm(plan, unit=" partitions", mininterval=2):
        features = seen[what][layer].numpy()
        live = features.std(0) > 0
        partition, n_live = partitions[kind, number], int(live.sum())
        found = overlaps[what](features[:, live], labels[what], partition, pairs(what, kind))
        for cluster, pair, overlap in found:
            table.add(
                **key(what, layer, kind, number, cluster=cluster, overlap_with=pair),
                depth=layers.index(layer) + 1,
                overlap=f"{overlap:.5f}",
                chance=f"{expected_overlap(n_live, n_live // 2):.5f}",
                filters=n_live,
            )


def shuffled(partition: Partition, seed: int) -> Partition:
    """The same classes in random clusters of the same sizes."""
    order = np.random.default_rng(seed).permutation(np.concatenate(list(partition.values())))
    ends = np.cumsum([len(classes) for classes in partition.values()])[:-1]
    return {str(i): np.sort(part) for i, part in enumerate(np.split(order, ends))}


def activation_overlaps(
    features: np.ndarray, y: np.ndarray, partition: Partition, wanted: Collection[str]
) -> Iterator[tuple[str, str, float]]:
    """Of each cluster the mean overlap of its classes: with each other, others, and themselves."""
    classes = np.concatenate(list(partition.values()))
    half = _every_second(y)
    whole = _overlaps(preferred(features, y, classes))
    first, second = (preferred(features[half == i], y[half == i], classes) for i in (0, 1))
    itself = _overlaps(first, second).diagonal()
    start = 0
    for name, own in partition.items():
        inside = np.zeros(len(classes), dtype=bool)
        inside[start : start + len(own)] = True
        start += len(own)
        pairs = whole[np.ix_(inside, inside)][np.triu_indices(len(own), 1)]
        found = {"same": pairs, "other": whole[np.ix_(inside, ~inside)], "itself": itself[inside]}
        for pair in wanted:
            if found[pair].size:
                yield name, pair, float(found[pair].mean())


def preferred(features: np.ndarray, y: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Which half of the filters each class activates most, relative to the mean of all classes.

    Parameters
    ----------
    features : ndarray of shape (n_images, n_filters)
        Mean activations.
    y : ndarray of shape (n_images,)
    classes : ndarray of shape (n_classes,)

    Returns
    -------
    ndarray of bool, of shape (n_classes, n_filters)
    """
    means = np.stack([features[y == k].mean(0) for k in classes])
    middle = means.mean(0)
    relative = means / np.where(middle != 0, middle, 1.0)
    return _best_half(relative)


def dcs_overlaps(
    features: np.ndarray, y: np.ndarray, partition: Partition, wanted: Collection[str]
) -> Iterator[tuple[str, str, float]]:
    """Of each cluster the mean overlap of its best filters with other clusters' and its own."""
    half = _every_second(y)

    def best(rows: np.ndarray) -> np.ndarray:
        scores = []
        for own in partition.values():
            mine = rows & np.isin(y, own)
            with warnings.catch_warnings():
                # A filter set that tells nothing apart scores 0, and its choice is random.
                warnings.simplefilter("ignore", UserWarning)
                found = discriminative_capability(
                    torch.as_tensor(features[mine]),
                    torch.as_tensor(y[mine]),
                    **base.frozen()["dcs"],
                )
            scores.append(found.score.numpy())
        return _best_half(np.stack(scores))

    if "other" in wanted:
        whole = _overlaps(best(np.ones(len(y), dtype=bool)))
        for i, name in enumerate(partition):
            yield name, "other", float(np.delete(whole[i], i).mean())
    if "itself" in wanted:
        itself = _overlaps(best(half == 0), best(half == 1)).diagonal()
        for i, name in enumerate(partition):
            yield name, "itself", float(itself[i])


def _every_second(y: np.ndarray) -> np.ndarray:
    """0 and 1 in turns among the images of each class."""
    turn = np.empty(len(y), dtype=np.int64)
    for k in np.unique(y):
        rows = np.flatnonzero(y == k)
        turn[rows] = np.arange(len(rows)) % 2
    return turn


def _best_half(scores: np.ndarray) -> np.ndarray:
    """The higher half of each row as a mask; equal scores are drawn, row by row."""
    chosen = np.zeros(scores.shape, dtype=bool)
    for i, row in enumerate(scores):
        tie = np.random.default_rng(i).random(len(row))
        chosen[i, np.lexsort((tie, -row))[: len(row) // 2]] = True
    return chosen


def _overlaps(a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """Jaccard overlap of each row of `a` with each of `b` (default: `a`)."""
    x = a.astype(np.float64)
    z = x if b is None else b.astype(np.float64)
    common = x @ z.T
    joint = x.sum(1)[:, None] + z.sum(1) - common
    return common / np.maximum(joint, 1.0)


@functools.lru_cache
def expected_overlap(n: int, k: int) -> float:
    """Mean Jaccard overlap of two random sets of `k` out of `n`.

    Examples
    --------
    >>> round(expected_overlap(2, 1), 3)  # the same one or the other: 1 or 0
    0.5
    """
    common = np.arange(k + 1)
    chance = hypergeom.pmf(common, n, k, k)
    return float((chance * common / np.maximum(2 * k - common, 1)).sum())


def by_layer(rows: Sequence[Mapping[str, str]], what: str, line: tuple[str, str]) -> dict[int, Any]:
    """Mean overlap over clusters with its interval, by depth."""
    found: dict[int, list[np.ndarray]] = {}
    for row in rows:
        if row["measure"] == what and (row["clusters"], row["overlap_with"]) == line:
            found.setdefault(int(row["depth"]), []).append(np.array([float(row["overlap"])]))
    return {depth: estimate(found[depth]) for depth in sorted(found)}


def draw(path: Path) -> Path:
    """Overlap by depth, one panel for each measure."""
    rows = read(path)
    figure, axes = figures.panels(len(MEASURES), width=4.0)
    titles = ("filters that a class prefers", "filters that DCS keeps for a cluster")
    ends = []
    for axis, what, title in zip(axes, MEASURES, titles, strict=True):
        labels = []
        chance = {int(r["depth"]): float(r["chance"]) for r in rows if r["measure"] == what}
        depths = sorted(chance)
        axis.plot(depths, [chance[d] for d in depths], "--", color="0.6", linewidth=1)
        if depths:
            labels.append((depths[-1], chance[depths[-1]], "chance", "0.5"))
        colours = iter(figures.COLOURS)
        for line, name, style in LINES[what]:
            means = by_layer(rows, what, line)
            if not means:
                continue
            colour = "0.2" if style.startswith("k") else next(colours)
            x, y = list(means), [float(e.mean[0]) for e in means.values()]
            low = [float(e.low[0]) for e in means.values()]
            high = [float(e.high[0]) for e in means.values()]
            axis.plot(x, y, style.removeprefix("k"), color=colour)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            labels.append((x[-1], y[-1], name, colour))
        axis.set(title=title, xlabel="layer, from the input on")
        axis.xaxis.get_major_locator().set_params(integer=True)
        ends.append((axis, labels))
    axes[0].set_ylabel("overlap of two sets (Jaccard)")
    return figures.finish(figure, ends, path.with_suffix(".png"))


def page(folder: Path) -> rst.Page | None:
    """The page of this table, from all its files in a folder."""
    body = []
    for path, label, split in files(folder, NAME):
        rows = read(path)
        if not rows:
            continue
        body.append(rst.section(f"{label}, {split} images"))
        given = [row for row in rows if row["clusters"] == "given"]
        body.append(f"{rst.units(given, 'cluster')}. {rst.provenance(rows)}")
        body.append(rst.figure(draw(path).name, "Overlap of sets of filters by layer."))
        body += [_section(rows, what) for what in MEASURES]
    if not body:
        return None
    return rst.Page(NAME, "Sharing of filters", "\n".join([_INTRODUCTION, *body]))


def _section(rows: Sequence[Mapping[str, str]], what: str) -> str:
    """The table of one measure, a row for each layer."""
    means = [by_layer(rows, what, line) for line, _, _ in LINES[what]]
    named = {
        int(row["depth"]): (row["layer"], row["chance"]) for row in rows if row["measure"] == what
    }
    cells = []
    for depth, (layer, chance) in sorted(named.items()):
        estimates = [_interval(line[depth]) if depth in line else "" for line in means]
        cells.append([layer, *estimates, f"{float(chance):.3f}"])
    header = ["layer", *(name for _, name, _ in LINES[what]), "chance"]
    titles = {
        "activation": "Overlap of the filters that two classes prefer",
        "dcs": "Overlap of the filters that DCS keeps for two clusters",
    }
    return rst.list_table(header, cells, titles[what])


def _interval(found: Estimate) -> str:
    return f"{found.mean[0]:.3f} [{found.low[0]:.3f}, {found.high[0]:.3f}]"


_INTRODUCTION = """\
The paper starts from the observation that semantically similar inputs activate many of the same
filters, and that layers come to differ between clusters with depth. Here each set is half of a
layer's filters that fire at all; chance is the mean overlap of two random halves. For
``activation`` a set is what a class activates most, relative to the mean of all classes, on
images of the split; for ``dcs`` it is what scores highest for a cluster, on calibration images.
"Other images" compares sets from two halves of the images, so it shows how much of a difference
is noise. In brackets: 95 % interval over clusters.

``python examples/paper/sharing_table.py --weights WEIGHTS --data FOLDER --split report``
"""


if __name__ == "__main__":
    main()
