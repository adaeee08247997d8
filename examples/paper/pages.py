"""Rebuild every page of results, and its figures, from the CSV files beside them.

A table without a CSV file has no page. Pages that other scripts wrote stay, and are listed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import rst
from study import HERE, RESULTS

# Each has a function `page` from a folder to a `rst.Page`, or None without a CSV file.
TABLES = (
    "criteria_table",
    "definition_table",
    "pruning_table",
    "sinf_page",
    "clusters_page",
    "sharing_table",
    "low_rank_table",
    "latency_page",
    "large",
    "fit_cost",
)
FOLDERS = (HERE, HERE.parent / "benchmarks")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pages of all tables, and the index."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of CSV and PNG files")
    folder = parser.parse_args(arguments).out
    sys.path += [str(place) for place in FOLDERS if str(place) not in sys.path]
    written = []
    for name in TABLES:
        if not any((place / f"{name}.py").exists() for place in FOLDERS):
            continue
        page = importlib.import_module(name).page(folder)
        if page is not None:
            (folder / f"{page.name}.rst").write_text(page.text(), encoding="utf-8")
            written.append(page.name)
    others = sorted(path.stem for path in folder.glob("*.rst") if path.stem != "index")
    names = [*written, *(name for name in others if name not in written)]
    (folder / "index.rst").write_text(index(names).text(), encoding="utf-8")
    for name in ("index", *names):
        print(folder / f"{name}.rst")


def index(names: Sequence[str]) -> rst.Page:
    """The page that lists the others."""
    entries = "".join(f"   {name}\n" for name in names)
    tree = f".. toctree::\n   :maxdepth: 1\n\n{entries}"
    return rst.Page("index", "Results", f"{_INTRODUCTION}\n{tree}")


_INTRODUCTION = """\
What was measured, by scripts that anyone can run: ``examples/paper/`` holds one for each table,
``examples/benchmarks/`` those of speed; each writes the CSV file beside these pages.
``examples/paper/pages.py`` makes the pages of them.
Each row says with what seed, versions and hardware it was measured.

Figures marked "paper, CIFAR-100" are those of arXiv 2310.01259, on other images than ours.
"""


if __name__ == "__main__":
    main()
