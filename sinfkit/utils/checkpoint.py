"""The state of a training after each epoch, in a file that a stopped run goes on with."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["Checkpoint"]


class Checkpoint:
    """State of a run after each finished epoch, in the file `path` if one is named.

    `settings` is what the run depends on, in plain types; a file with others is refused.  `parts`
    have a ``state_dict``; `history` is the record of each finished epoch.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        settings: dict[str, Any],
        parts: dict[str, Any],
    ) -> None:
        self.path = None if path is None else Path(path)
        self.settings, self.parts = settings, parts
        self.history: list[dict[str, float]] = []

    def resume(self, seed: int, *, given: bool) -> int:
        """Load the file if it exists; return the seed of the run that goes on.

        `given`: the caller chose the seed, so that the file's must be the same.
        """
        if self.path is None or not self.path.exists():
            return seed
        way_out = "Delete the file or name another."
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found = {**state["settings"], "random_state": state["seed"]}
        except Exception as error:
            raise ValueError(
                f"checkpoint {self.path} holds no training ({error}). {way_out}"
            ) from error
        expected = {**self.settings, "random_state": seed if given else state["seed"]}
        different = [key for key, value in expected.items() if found.get(key) != value]
        if different:
            raise ValueError(
                f"checkpoint {self.path} belongs to another run, of which {', '.join(different)} "
                f"differ. {way_out}"
            )
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"checkpoint {self.path} belongs to another network ({error}). {way_out}"
            ) from error
        self.history = state["history"]
        return int(state["seed"])

    def save(self, seed: int, record: dict[str, float]) -> None:
        """Add one epoch's record and write the file, never leaving half of one."""
        self.history.append(record)
        if self.path is None:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"settings": self.settings, "seed": seed, "history": self.history}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            # By way of memory: torch's own writer does not say why the disk refuses.
            buffer = io.BytesIO()
            torch.save(state, buffer)
            partial.write_bytes(buffer.getbuffer())
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
