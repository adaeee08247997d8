"""Rows of measurements in a CSV file that a stopped run goes on with."""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sinfkit

LOW_RANK = "low rank"  # how the kind of networks with such layers ends


class Table:
    """An append-only CSV file whose rows are known by their key columns.

    Each row is written in one piece and flushed. A last line that a killed run left unfinished is
    dropped when the file is opened again.

    Parameters
    ----------
    path : Path
        The file; it is made, with its folder, if it does not exist.
    keys : sequence of str
        Columns that tell rows apart.
    values : sequence of str
        Columns of what was measured.
    constants : mapping of str to object
        Columns that are the same in every row of this run, in front of those of `provenance`.

    Raises
    ------
    ValueError
        If the file has other columns.

    Examples
    --------
    >>> table = Table(folder / "figures.csv", ["cluster"], ["right"])
    >>> if {"cluster": "birds"} not in table:
    ...     table.add(cluster="birds", right=17)
    """

    def __init__(
        self,
        path: Path,
        keys: Sequence[str],
        values: Sequence[str],
        constants: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.keys = Path(path), tuple(keys)
        self._constants = {**(constants or {}), **provenance()}
        # A key may be one of the constants: the number of threads, where a table compares them.
        self.columns = tuple(dict.fromkeys((*keys, *values, *self._constants)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_unfinished_line(self.path)
        self._known: set[tuple[str, ...]] = set()
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != self.columns:
                    raise ValueError(
                        f"{self.path} has the columns {reader.fieldnames}, not {self.columns}: "
                        "move it away, or write to another folder."
                    )
                self._known = {tuple(row[k] for k in self.keys) for row in reader}
        else:
            self._append(self.columns)

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return tuple(str(key[k]) for k in self.keys) in self._known

    def __len__(self) -> int:
        return len(self._known)

    def add(self, **row: Any) -> None:
        """Append a row, unless there is one with its key."""
        if row in self:
            return
        full = {**self._constants, **row}
        self._append([full[column] for column in self.columns])
        self._known.add(tuple(str(row[k]) for k in self.keys))

    def _append(self, cells: Sequence[Any]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        if text.getvalue().count("\n") != 1:
            raise ValueError(f"a cell holds a line break: {cells!r}")
        with self.path.open("ab") as file:
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())


def _drop_unfinished_line(path: Path) -> None:
    """Cut a file off behind its last line break."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def files(folder: Path, name: str) -> Iterator[tuple[Path, str, str]]:
    """The files of a table in a folder, sorted: ``(path, label of the network, split)``.

    What else a table writes (times, say) has a name behind the split and is passed over.
    """
    for path in sorted(folder.glob(f"{name}_*.csv")):
        label, split = path.stem.removeprefix(f"{name}_").rsplit("_", 1)
        if split in ("choose", "report"):
            yield path, label, split


def read(paths: Path | Sequence[Path]) -> list[dict[str, str]]:
    """All rows of some files; an unfinished last line is left out."""
    return [row for path in ([paths] if isinstance(paths, Path) else paths) for row in _rows(path)]


def _rows(path: Path) -> Iterator[dict[str, str]]:
    text = path.read_bytes()
    yield from csv.DictReader(io.StringIO(text[: text.rfind(b"\n") + 1].decode()))


def provenance() -> dict[str, Any]:
    """Date, versions and machine: the last columns of every table."""
    return {
        "date": datetime.date.today().isoformat(),
        "sinfkit": sinfkit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """Name of the GPU, if there is one, else of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def to_hex(right: np.ndarray) -> str:
    """Right and wrong answers as a string, four images to a character.

    Examples
    --------
    >>> to_hex(np.array([True, False, False, True, True]))
    '98'
    """
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()


def from_hex(text: str, n: int) -> np.ndarray:
    """The answers that `to_hex` wrote, as 0 and 1.

    Examples
    --------
    >>> from_hex("98", 5).tolist()
    [1, 0, 0, 1, 1]
    """
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=int(n))
