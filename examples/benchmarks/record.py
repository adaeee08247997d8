"""Rows of measurements in a CSV file that a stopped run goes on with."""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .library import __version__

RESULTS = Path(__file__).parent / "results"


class Table:
    """An append-only CSV file whose rows are known by their key columns.

    Each row is written in one piece; a last line that a killed run left unfinished is dropped.
    `constants` and the provenance are columns that are the same in every row of a run.
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
        self.columns = tuple(dict.fromkeys((*keys, *values, *self._constants)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_unfinished_line(self.path)
        if not (self.path.exists() and self.path.stat().st_size):
            self._append(self.columns)
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != self.columns:
                raise ValueError(
                    f"{self.path} has the columns {reader.fieldnames}, not {self.columns}: "
                    "move it away, or write to another folder."
                )
            self._known = {self._key(row) for row in reader}

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str({**self._constants, **row}[k]) for k in self.keys)

    def __contains__(self, row: Mapping[str, Any]) -> bool:
        return self._key(row) in self._known

    def __len__(self) -> int:
        return len(self._known)

    def add(self, **row: Any) -> None:
        """Append a row, unless there is one with its key."""
        if row not in self:
            full = {**self._constants, **row}
            self._append([full.get(column, "") for column in self.columns])
            self._known.add(self._key(row))

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
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a file; an unfinished last line is left out, and no file has no rows."""
    if not path.exists():
        return []
    text = path.read_bytes()
    return list(csv.DictReader(io.StringIO(text[: text.rfind(b"\n") + 1].decode())))


def provenance() -> dict[str, Any]:
    """Date, versions and machine: the last columns of every table."""
    return {
        "date": datetime.date.today().isoformat(),
        "sinfkit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """Name of the GPU, if there is one, else of the CPU."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def to_hex(right: np.ndarray) -> str:
    """Right and wrong answers as a string, four images to a character.

    >>> to_hex(np.array([True, False, False, True, True]))
    '98'
    """
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()


def from_hex(row: Mapping[str, str]) -> np.ndarray:
    """The answers in a row, as 0 and 1.

    >>> from_hex({"answers": "98", "images": "5"}).tolist()
    [1, 0, 0, 1, 1]
    """
    packed = np.frombuffer(bytes.fromhex(row["answers"]), dtype=np.uint8)
    return np.unpackbits(packed, count=int(row["images"]))
