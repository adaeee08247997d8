"""How much semantically similar inputs share filters, by depth.

Of each class, the half of a layer's filters that it activates most, relative to all classes; of
each cluster, the half with the highest DCS. Overlap (Jaccard) of two classes of a cluster, of
random clusters, of different clusters; and of one with itself on other images, which is as much
as there can be::

    python -m benchmarks sharing --network vgg16 --weights vgg16.pt
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import hypergeom
from tqdm.auto import tqdm

from . import study as base
from .figures import COLOURS, panels, save
from .library import collect, discriminative_capability, layer_names, observation_nodes, trace
from .record import Table, read
from .stats import estimate
from .summary import Summary, files, show

NAME = "sharing"
KEYS = (*base.KEYS, "measure", "layer", "clusters", "draw", "cluster", "overlap_with")
VALUES = ("depth", "overlap", "chance", "filters")
MEASURES = ("activation", "dcs")
# (clusters, overlap with what): how the line is called.
LINES = {
    ("given", "itself"): "itself, other images",
    ("given", "same"): "same given cluster",
    ("random", "same"): "same random cluster",
    ("given", "other"): "other given cluster",
    ("random", "other"): "other random cluster",
}
QUESTION = "Do similar classes share filters?"
Partition = Mapping[str, np.ndarray]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then draw and say what was found."""
    parser = base.parser(__doc__)
    parser.add_argument("--random", type=int, default=5, help="random partitions of the classes")
    options = parser.parse_args(arguments)
    if not options.show:
        if options.quick:
            options.random = 1
        study = base.open_study(options)
        table = Table(options.out / f"{NAME}_{study.label}.csv", KEYS, VALUES)
        measure(study, table, options.images, options.random)
    for path in files(options.out, NAME):
        draw(path)
        show(summary(path))


def measure(study: base.Study, table: Table, images: int, n_random: int) -> None:
    """Fill the table; all layers are seen in one pass over the images."""
    given = {name: study.classes(name) for name in study.names}
    partitions = {("given", 0): given}
    partitions |= {("random", i): shuffled(given, i) for i in range(n_random)}
    graph = trace(study.model.module())
    nodes = observation_nodes(graph, layer_names(graph)[:-1])
    layers = list({node: layer for layer, node in reversed(nodes.items())}.values())[::-1]
    last = {"measure": "dcs", "layer": layers[-1], "clusters": "random", "draw": n_random - 1}
    if {**study.key(), **last, "cluster": str(len(given) - 1), "overlap_with": "other"} in table:
        return
    parts = {"activation": (study.X_test, study.y_test), "dcs": study.draw(images, 0)}
    for what, (X, y) in parts.items():
        seen = collect(graph, study.batches(X), {k: nodes[k] for k in layers}).pooled
        for depth, layer in enumerate(tqdm(layers, unit=" layers", mininterval=2), 1):
            features = seen[layer].numpy()
            features = features[:, features.std(0) > 0]  # those that never fire tell nothing
            n = features.shape[1]
            for (kind, number), partition in partitions.items():
                overlaps = (class_overlaps if what == "activation" else dcs_overlaps)(
                    features, y, partition
                )
                for cluster, pair, overlap in overlaps:
                    table.add(
                        **study.key(),
                        measure=what,
                        layer=layer,
                        clusters=kind,
                        draw=number,
                        cluster=cluster,
                        overlap_with=pair,
                        depth=depth,
                        overlap=f"{overlap:.5f}",
                        chance=f"{expected_overlap(n, n // 2):.5f}",
                        filters=n,
                    )


def shuffled(partition: Partition, seed: int) -> dict[str, np.ndarray]:
    """The same classes in random clusters of the same sizes."""
    order = np.random.default_rng(seed).permutation(np.concatenate(list(partition.values())))
    ends = np.cumsum([len(classes) for classes in partition.values()])[:-1]
    return {str(i): np.sort(part) for i, part in enumerate(np.split(order, ends))}


def class_overlaps(
    features: np.ndarray, y: np.ndarray, partition: Partition
) -> Iterator[tuple[str, str, float]]:
    """Of each cluster the mean overlap of its classes' filters: same cluster, other, itself."""
    classes = np.concatenate(list(partition.values()))
    cluster = np.repeat(np.arange(len(partition)), [len(v) for v in partition.values()])

    def preferred(rows: np.ndarray) -> np.ndarray:
        means = np.stack([features[rows & (y == k)].mean(0) for k in classes])
        middle = means.mean(0)
        return best_half(means / np.where(middle != 0, middle, 1.0))

    halves = base.places(y) % 2
    whole = overlap(preferred(np.ones(len(y), dtype=bool)))
    itself = overlap(preferred(halves == 0), preferred(halves == 1)).diagonal()
    for i, name in enumerate(partition):
        inside = cluster == i
        pairs = whole[np.ix_(inside, inside)][np.triu_indices(int(inside.sum()), 1)]
        if pairs.size:
            yield name, "same", float(pairs.mean())
        yield name, "other", float(whole[np.ix_(inside, ~inside)].mean())
        yield name, "itself", float(itself[inside].mean())


def dcs_overlaps(
    features: np.ndarray, y: np.ndarray, partition: Partition
) -> Iterator[tuple[str, str, float]]:
    """Of each cluster the overlap of its best filters with other clusters' and with its own."""

    def best(rows: np.ndarray) -> np.ndarray:
        scores = []
        for own in partition.values():
            mine = rows & np.isin(y, own)
            with warnings.catch_warnings():
                # Where nothing is told apart the scores are 0, and the choice is random.
                warnings.simplefilter("ignore", UserWarning)
                x, k = torch.as_tensor(features[mine]), torch.as_tensor(y[mine])
                scores.append(discriminative_capability(x, k).score.numpy())
        return best_half(np.stack(scores))

    halves = base.places(y) % 2
    whole = overlap(best(np.ones(len(y), dtype=bool)))
    itself = overlap(best(halves == 0), best(halves == 1)).diagonal()
    for i, name in enumerate(partition):
        yield name, "itself", float(itself[i])
        yield name, "other", float(np.delete(whole[i], i).mean())


def best_half(scores: np.ndarray) -> np.ndarray:
    """The higher half of each row as a mask; equal scores are drawn, row by row."""
    chosen = np.zeros(scores.shape, dtype=bool)
    for i, row in enumerate(scores):
        tie = np.random.default_rng(i).random(len(row))
        chosen[i, np.lexsort((tie, -row))[: len(row) // 2]] = True
    return chosen


def overlap(a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """Jaccard overlap of each row of `a` with each of `b` (default: `a`)."""
    x = a.astype(np.float64)
    z = x if b is None else b.astype(np.float64)
    common = x @ z.T
    return common / np.maximum(x.sum(1)[:, None] + z.sum(1) - common, 1.0)


@functools.lru_cache
def expected_overlap(n: int, k: int) -> float:
    """Mean Jaccard overlap of two random sets of `k` out of `n`.

    >>> round(expected_overlap(2, 1), 3)  # the same one or the other: 1 or 0
    0.5
    """
    common = np.arange(k + 1)
    chance = hypergeom.pmf(common, n, k, k)
    return float((chance * common / np.maximum(2 * k - common, 1)).sum())


def by_depth(
    rows: Sequence[Mapping[str, str]], what: str, line: tuple[str, str]
) -> dict[int, list[float]]:
    """Overlaps of all clusters by depth."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["measure"] == what and (row["clusters"], row["overlap_with"]) == line:
            found.setdefault(int(row["depth"]), []).append(float(row["overlap"]))
    return found


def summary(path: Path) -> Summary:
    """Overlap in a layer early, in the middle and late."""
    rows = read(path)
    network, split = rows[0]["network"], rows[0]["split"]
    depths = sorted({int(row["depth"]) for row in rows})
    shown = [depths[int(q * (len(depths) - 1))] for q in (0.25, 0.5, 0.75, 1.0)]
    cells = []
    for what in MEASURES:
        for line, name in LINES.items():
            found = by_depth(rows, what, line)
            if found:
                values = [estimate(np.array(found[d])) for d in shown]
                cells.append([what, name, *(f"{v.mean:.3f}" for v in values)])
        chance = {int(r["depth"]): float(r["chance"]) for r in rows if r["measure"] == what}
        cells.append([what, "chance", *(f"{chance[d]:.3f}" for d in shown)])
    last = depths[-2] if len(depths) > 1 else depths[-1]
    same, other = (by_depth(rows, "activation", ("given", k)) for k in ("same", "other"))
    answer = ""
    if last in same and last in other:
        ahead = estimate(np.array(same[last]) - np.mean(other[last]))
        answer = (
            f"In the last layers classes of a cluster share {ahead} points more of their filters "
            "than classes of different clusters."
        )
    header = ["filters", "overlap with", *(f"layer {d}" for d in shown)]
    note = "Jaccard overlap of two halves of a layer's filters, mean over clusters."
    return Summary(
        f"{NAME}_{network}_{split}", f"{QUESTION} {network}", answer, note, header, cells, rows,
        path.with_suffix(".png"),
    )  # fmt: skip


def draw(path: Path) -> Path:
    """Overlap by depth, one panel for each measure."""
    rows = read(path)
    figure, axes = panels(len(MEASURES), width=4.2)
    for axis, what in zip(axes, MEASURES, strict=True):
        for (line, name), colour in zip(LINES.items(), COLOURS, strict=False):
            found = by_depth(rows, what, line)
            if found:
                axis.plot(
                    list(found),
                    [np.mean(v) for v in found.values()],
                    "o-",
                    label=name,
                    color=colour,
                )
        chance = {int(r["depth"]): float(r["chance"]) for r in rows if r["measure"] == what}
        axis.plot(list(chance), list(chance.values()), "--", color="0.6", label="chance")
        axis.set(title=f"filters by {what}", xlabel="layer, from the input on")
    axes[0].set_ylabel("overlap of two sets (Jaccard)")
    axes[0].legend(fontsize=7)
    return save(figure, path.with_suffix(".png"))
