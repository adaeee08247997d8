"""Pieces of a results page in reStructuredText."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from stats import Estimate


@dataclass(frozen=True)
class Page:
    """A page of results.

    Attributes
    ----------
    name : str
        Of its file, without ``.rst``.
    title : str
    body : str
    """

    name: str
    title: str
    body: str

    def text(self) -> str:
        """The whole page."""
        return f"{self.title}\n{'=' * len(self.title)}\n\n{self.body.strip()}\n"


def section(title: str) -> str:
    """A heading below the page's title."""
    return f"{title}\n{'-' * len(title)}\n"


def figure(name: str, alt: str, width: int = 100) -> str:
    """An image that lies beside the page."""
    return f".. image:: {name}\n   :width: {width}%\n   :alt: {alt}\n"


def list_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> str:
    """A table; all rows have as many cells as the header."""
    lines = [f".. list-table:: {title}".rstrip(), "   :header-rows: 1", ""]
    for row in (header, *rows):
        if len(row) != len(header):
            raise ValueError(f"{len(row)} cells under {len(header)} headings: {row!r}")
        for i, cell in enumerate(row):
            lines.append(f"   {'* -' if i == 0 else '  -'} {cell}".rstrip())
    return "\n".join(lines) + "\n"


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f}"


def points(found: Estimate, column: int = 0) -> str:
    """A difference in percentage points with its 95 % interval."""
    low, high = 100 * found.low[column], 100 * found.high[column]
    return f"{100 * found.mean[column]:+.1f} [{low:+.1f}, {high:+.1f}]"


def provenance(rows: Sequence[Mapping[str, str]]) -> str:
    """One sentence on where rows come from: machine, versions, dates, training of the base."""

    def seen(column: str) -> list[str]:
        return sorted({row[column] for row in rows if row.get(column)})

    def joined(column: str) -> str:
        return ", ".join(seen(column)) or "?"

    dates = seen("date")
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    # Networks that nobody trained have neither seed nor epochs.
    base = f"Base: training seed {joined('base_seed')}, {joined('base_epochs')} epochs. "
    return (
        f"{base if seen('base_seed') else ''}Measured {when} on {joined('processor')}, "
        f"{joined('threads')} threads, with sinfkit {joined('sinfkit')}, "
        f"torch {joined('torch')}, Python {joined('python')}.\n"
    )


def units(rows: Sequence[Mapping[str, str]], *columns: str) -> str:
    """How many different clusters, resamples ... there are: ``10 clusters, 3 resamples``."""
    counts = []
    for column in columns:
        n = len({row[column] for row in rows})
        counts.append(f"{n} {column}" + ("s" if n != 1 else ""))
    return ", ".join(counts)


def split_note(split: str) -> str:
    """Which images a table was measured on, in words."""
    if split == "report":
        return "Measured on the report images, which chose nothing."
    return "Measured on the choosing images: these figures chose the configuration."


def in_order(values: Iterable[str]) -> list[str]:
    """Numbers stored as text, without repetition, ascending."""
    return sorted(set(values), key=float)


def column_means(values: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over clusters of the mean over images, for each column."""
    return np.mean([np.asarray(v).mean(0) for v in values], axis=0)
