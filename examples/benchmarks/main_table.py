"""The README's main table, in Markdown, from the CSV files of ``latency.py``.

Time is that of the *packed* form on both sides, on natural batches; accuracy is paired with the
base's, image by image::

    python examples/benchmarks/main_table.py
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import _paper  # noqa: F401
import numpy as np
import rst
from latency_page import Results, Row
from record import LOW_RANK
from stats import estimate
from study import RESULTS

NETWORKS = {
    "vgg16": "VGG16",
    "vgg19-0.5": "VGG19, half width",
    "resnet50-0.5": "ResNet50, half width",
}
BUDGETS = ("0.55", "0.4", "0.3", "0.22")
# By title: contestant, kind and variant.
BASES = {
    "(c) base, with a probe": ("base", "", "fused"),
    "(d) the same, exits at the probe": ("base", "", "exit"),
}
PRUNED = {
    "SINF": ("SINF", "confusion 5", "SINF"),
    "SINF, low rank in its prefix": ("SINF", f"confusion 5, {LOW_RANK}", "SINF"),
    "(a) ONE network, all classes": ("one network", "obs", "one"),
    "(b) the same, with a probe": ("one network", "obs", "fused"),
    "(e) the same, exits at the probe": ("one network", "obs", "exit"),
    "(r) the same, low rank": ("one network", f"obs, {LOW_RANK}", "exit"),
    "(t) torch-pruning's choice by L2, our repair": (
        "torch-pruning",
        "magnitude_l2 local",
        "repaired",
    ),
    "(t) as shipped": ("torch-pruning", "magnitude_l2 local", "shipped"),
}
BATCHES = ("1", "256")
THREADS = "2"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    print(table(parser.parse_args(arguments).out))


def table(folder: Path) -> str:
    """One column per network, one row per contestant and budget."""
    titles = {title: (*who, "") for title, who in BASES.items()}
    for budget in BUDGETS:
        kept = f"{100 * float(budget):.0f} %"
        titles |= {f"{title}, {kept}": (*who, budget) for title, who in PRUNED.items()}
    lines = [["", *NETWORKS.values()], ["---"] * (1 + len(NETWORKS))]
    columns = [_column(Results(folder / f"latency_{name}_report.csv"), titles) for name in NETWORKS]
    for title in ("base", *titles):
        lines.append([title, *(column.get(title, "") for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines if any(line[1:]))


def _column(found: Results, titles: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Points to the base, and times as fast as it in the same form, by title where both are known.

    All are estimated at once: one bootstrap, the same draws of images for each.
    """
    base = _by_batch(found, "base", "", "one", "")[BATCHES[0]]
    speeds, gains = {}, {}
    for title, who in titles.items():
        rows = _by_batch(found, *who)
        if all(batch in rows for batch in BATCHES):
            gain = found.gain(rows[BATCHES[0]])
            if gain is not None:
                speed = (f"{1 / float(rows[batch]['ratio_own']):.2f}" for batch in BATCHES)
                speeds[title], gains[title] = " / ".join(speed), gain
    points = estimate([np.stack(list(gains.values()), axis=1)])
    cells = {title: f"{rst.points(points, i)}; {speeds[title]}" for i, title in enumerate(gains)}
    accuracy = rst.percent(float(base["accuracy"]))
    return {"base": f"{accuracy} %; {' / '.join('1' for _ in BATCHES)}"} | cells


def _by_batch(
    found: Results, contestant: str, kind: str, variant: str, size: str
) -> dict[str, Row]:
    wanted = {
        **{"contestant": contestant, "kind": kind, "variant": variant, "size": size, "seed": "0"},
        **{"form": "packed", "threads": THREADS, "mix": "natural"},
    }
    return {row["batch"]: row for row in found.rows if all(row[k] == v for k, v in wanted.items())}


if __name__ == "__main__":
    main()
