"""The README's main table, in Markdown, from the CSV files of ``latency.py``.

Time is that of the *packed* form on both sides, on natural batches; accuracy is paired with the
base's, image by image::

    python examples/benchmarks/main_table.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import _paper  # noqa: F401
import rst
from latency_page import Results, Row
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
    "(a) ONE network, all classes": ("one network", "obs", "one"),
    "(b) the same, with a probe": ("one network", "obs", "fused"),
    "(e) the same, exits at the probe": ("one network", "obs", "exit"),
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
    columns = [Results(folder / f"latency_{name}_report.csv") for name in NETWORKS]
    lines = [["", *NETWORKS.values()], ["---"] * (1 + len(NETWORKS)), ["base"]]
    lines[-1] += [f"{_accuracy(found)} %; {' / '.join('1' for _ in BATCHES)}" for found in columns]
    for title, who in BASES.items():
        lines.append([title, *(_cell(found, *who, "") for found in columns)])
    for budget in BUDGETS:
        for title, who in PRUNED.items():
            cells = [_cell(found, *who, budget) for found in columns]
            lines.append([f"{title}, {100 * float(budget):.0f} %", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines if any(line[1:]))


def _accuracy(found: Results) -> str:
    base = next(iter(_by_batch(found, "base", "", "one", "").values()))
    return rst.percent(float(base["accuracy"]))


def _cell(found: Results, *who: str) -> str:
    """Points to the base, and times as fast as the base in the same form; empty without both."""
    rows = _by_batch(found, *who)
    if not all(batch in rows for batch in BATCHES):
        return ""
    gain = found.gain(rows[BATCHES[0]])
    speed = " / ".join(f"{1 / float(rows[batch]['ratio_own']):.2f}" for batch in BATCHES)
    return f"{rst.points(estimate([gain]))}; {speed}" if gain is not None else ""


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
