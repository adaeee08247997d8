"""The file from which a training run resumes."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch


class Checkpoint:
    """State of a run after each finished epoch, in a file if one is named.

    Parameters
    ----------
    path : path-like or None
        The file; None keeps nothing.
    settings : dict
        What the run depends on, in plain types. A file with other settings is refused.
    parts : dict
        Objects with ``state_dict`` and ``load_state_dict``, by name: model, optimiser and so on.

    Attributes
    ----------
    history : list of dict
        The record of each finished epoch.
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
        """Load the file if it exists.

        Parameters
        ----------
        seed : int
            Seed of a fresh run.
        given : bool
            Whether the caller chose it, so that the file's must be the same.

        Returns
        -------
        int
            Seed of the run that goes on.

        Raises
        ------
        ValueError
            If the file is damaged or belongs to another run or network.
        """
        if self.path is None or not self.path.exists():
            return seed
        way_out = "Delete the file or name another."
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found = {**state["settings"], "random_state": state["seed"]}
        except Exception as error:
            raise ValueError(
                f"checkpoint {self.path} is not one of train_network ({error}). {way_out}"
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
        """Add one epoch and write the file, never leaving half of one.

        Parameters
        ----------
        seed : int
            Seed of the run.
        record : dict of str to float
            Figures of the epoch.
        """
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
