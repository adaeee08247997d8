"""The README's main table, in Markdown, from the CSV files of ``latency.py`` and ``sinf_table.py``.

Time is that of the *packed* form on both sides, on natural batches; accuracy is paired with the
base's, image by image::

    python examples/benchmarks/main_table.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / "paper"), str(HERE)]

import latency_page  # noqa: E402
import rst  # noqa: E402
import sinf_page  # noqa: E402
from study import RESULTS  # noqa: E402

NETWORKS = {
    "vgg16": "VGG16",
    "vgg19-0.5": "VGG19, half width",
    "resnet50-0.5": "ResNet50, half width",
}
BUDGETS = ("0.55", "0.4", "0.3", "0.22")
# Title, and the contestant, kind and variant of the two files.
NAMES = (
    ("SINF", "SINF", "confusion 5", "SINF"),
    ("(a) ONE network, all classes", "one network", "obs", "one"),
    ("(b) the same, with a probe", "one network", "obs", "fused"),
    ("(e) the same, exits at the probe", "one network", "obs", "exit"),
)
SHIPPED = "torch-pruning's choice by L2, our repair"
BATCHES = ("1", "256")
THREADS = "2"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    print(table(parser.parse_args(arguments).out))


def table(folder: Path) -> str:
    """One column per network, one row per contestant and budget."""
    header, first, columns = [""], ["base"], []
    for name, title in NETWORKS.items():
        scores = sinf_page.Results(folder / f"sinf_{name}_report.csv")
        times = latency_page.Results(folder / f"latency_{name}_report.csv").rows
        header.append(title)
        first.append(f"{100 * scores.right(scores.base).mean():.1f} %; 1 / 1")
        columns.append((scores, times))
    lines = [header, ["---"] * len(header), first]
    for budget in BUDGETS:
        for label, *who in NAMES:
            cells = [_ours(*column, budget, *who) for column in columns]
            lines.append([f"{label}, {_kept(budget)}", *cells])
        cells = [_theirs(*column, budget) for column in columns]
        lines.append([f"(t) {SHIPPED}, {_kept(budget)}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines if any(line[1:]))


def _ours(
    scores: sinf_page.Results, times: Sequence[Mapping[str, str]], budget: str, *who: str
) -> str:
    contestant, kind, variant = who
    found = [row for row in scores.of(contestant, variant) if _is(row, kind, budget)]
    speed = _speeds(times, *who, budget)
    return f"{rst.points(scores.gain(found[0]))}; {speed}" if found and speed else ""


def _theirs(scores: sinf_page.Results, times: Sequence[Mapping[str, str]], budget: str) -> str:
    who = ("torch-pruning", "magnitude_l2 local")
    speed = _speeds(times, *who, "repaired", budget)
    if speed is None:
        return ""
    base = scores.right(scores.base).mean()
    lost = [_lost(times, base, *who, variant, budget) for variant in ("repaired", "shipped")]
    return f"{lost[0]} (as shipped {lost[1]}); {speed}"


def _kept(budget: str) -> str:
    return f"{100 * float(budget):.0f} %"


def _is(row: Mapping[str, str], kind: str, budget: str) -> bool:
    return row["kind"] == kind and row["size"] == budget and row["seed"] == "0"


def _cells(
    rows: Sequence[Mapping[str, str]], contestant: str, kind: str, variant: str, budget: str
) -> dict[str, Mapping[str, str]]:
    """By batch size."""
    return {
        row["batch"]: row
        for row in rows
        if _is(row, kind, budget)
        and (row["contestant"], row["variant"]) == (contestant, variant)
        and (row["form"], row["threads"], row["mix"]) == ("packed", THREADS, "natural")
    }


def _speeds(rows: Sequence[Mapping[str, str]], *who: str) -> str | None:
    """Times as fast as the base in the same form, for each batch size."""
    cells = _cells(rows, *who)
    if not all(batch in cells for batch in BATCHES):
        return None
    return " / ".join(f"{1 / float(cells[batch]['ratio_own']):.2f}" for batch in BATCHES)


def _lost(rows: Sequence[Mapping[str, str]], base: float, *who: str) -> str:
    cell = next(iter(_cells(rows, *who).values()))
    return f"{100 * (float(cell['accuracy']) - base):+.1f}"


if __name__ == "__main__":
    main()
