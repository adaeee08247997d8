"""What a table found: the answer in a sentence, the cells, where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .record import read


@dataclass(frozen=True)
class Summary:
    """A finished table.

    `answer` opens the page; `note` says what the base and the units are; the cells stand under
    `header`; `rows` are those of the CSV file, for their provenance.
    """

    name: str
    title: str
    answer: str
    note: str
    header: Sequence[str]
    cells: Sequence[Sequence[str]]
    rows: Sequence[Mapping[str, str]]
    figure: Path | None = None

    @property
    def source(self) -> str:
        """One sentence on machine, versions and dates."""

        def seen(column: str) -> str:
            return ", ".join(sorted({row[column] for row in self.rows if row.get(column)})) or "?"

        return (
            f"{self.note} Measured {seen('date')} on {seen('processor')}, {seen('threads')} "
            f"thread(s), sinfkit {seen('sinfkit')}, torch {seen('torch')}."
        )


def files(folder: Path, name: str) -> list[Path]:
    """The CSV files of a table in a folder, those with times left out."""
    found = [p for p in sorted(folder.glob(f"{name}_*.csv")) if read(p)]
    return [path for path in found if path.stem.rsplit("_", 1)[1] in ("choose", "report")]


def show(found: Summary | None) -> None:
    """Print a table as text."""
    if found is None:
        return
    lines = [list(found.header), *map(list, found.cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(found.header))]
    print(f"\n{found.title}\n{found.answer}\n")
    for line in lines:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
    print(f"\n{found.source}")
