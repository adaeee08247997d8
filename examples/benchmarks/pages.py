"""One documentation page for each finished table: answer, table, figure, command.

Only figures of report images become pages. ``python -m benchmarks pages --to ../docs/results``
"""

from __future__ import annotations

import argparse
import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from .record import RESULTS
from .summary import Summary, files

TABLES = ("main_table", "criteria", "per_cluster", "routing", "sharing")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pages of all tables that have a CSV file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of CSV and PNG files")
    parser.add_argument("--to", type=Path, required=True, help="folder of the pages")
    parser.add_argument("--split", default="report", help="which images' figures become pages")
    options = parser.parse_args(arguments)
    options.to.mkdir(parents=True, exist_ok=True)
    for name in TABLES:
        table = importlib.import_module(f"{__package__}.{name}")
        found = [table.summary(p) for p in files(options.out, table.NAME)]
        found = [s for s in found if s is not None and s.name.endswith(options.split)]
        if found:
            path = options.to / f"{table.NAME}.rst"
            path.write_text(page(table.QUESTION, table.NAME, found), encoding="utf-8")
            for one in found:
                if one.figure is not None and one.figure.exists():
                    shutil.copy(one.figure, options.to / one.figure.name)
            print(path)


def page(title: str, name: str, found: Sequence[Summary]) -> str:
    """The page of one table, a section for each network."""
    parts = [title, "=" * len(title), ""]
    for one in found:
        heading = one.name.removeprefix(f"{name}_").rsplit("_", 1)[0]
        parts += [heading, "-" * len(heading), "", one.answer, "", ".. list-table::"]
        parts += ["   :header-rows: 1", ""]
        for line in (one.header, *one.cells):
            parts += [f"   {'* -' if i == 0 else '  -'} {c}".rstrip() for i, c in enumerate(line)]
        if one.figure is not None and one.figure.exists():
            parts += ["", f".. image:: {one.figure.name}", f"   :alt: {title}"]
        parts += ["", one.source, ""]
    parts += [
        f"``python -m benchmarks {name} --network NETWORK --weights FILE --split report``",
        "",
    ]
    return "\n".join(parts)
