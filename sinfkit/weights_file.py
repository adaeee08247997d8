"""Weights that stay in their file: whoever needs them loads them there, once per process."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

_KEEP = 2  # networks that a process keeps after their last user has gone: the next job's, mostly
_LOCK = threading.Lock()


@dataclass(frozen=True)
class WeightsFile:
    """A state dict in a file, and what builds the network that it belongs to.

    Attributes
    ----------
    path : str
        Absolute.
    factory : callable
        Without arguments, returns the network; its weights are replaced by those of the file.
    sha256 : str
        Of the file's content, which is compared with it whenever the file is loaded.
    """

    path: str
    factory: Callable[[], nn.Module]
    sha256: str

    @classmethod
    def of(cls, path: Any, factory: Any) -> WeightsFile:
        """Take note of a file as it is now.

        Raises
        ------
        TypeError
            If `factory` is not a function that can be pickled.
        FileNotFoundError
        """
        if not callable(factory) or isinstance(factory, nn.Module):
            raise TypeError(
                "factory must be a function without arguments that returns the network, such as "
                f"functools.partial(vgg16, 100), not {type(factory).__name__}."
            )
        try:
            pickle.dumps(factory)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"factory cannot be pickled ({error}), and so no worker can call it. Define it at "
                "the top level of an importable module; functools.partial gives it arguments."
            ) from error
        absolute = Path(path).expanduser().absolute()
        with _open(absolute) as file:
            return cls(str(absolute), factory, _sha256(file))

    def load(self) -> nn.Module:
        """Build the network with the file's weights, on the CPU.

        Raises
        ------
        FileNotFoundError
        ValueError
            If the file has changed, holds no state dict, or one of another network.
        TypeError
            If `factory` returns no module.
        """
        with _open(Path(self.path)) as file:
            # One open file: what is checked is what is read, though another take its place.
            found = _sha256(file)
            if found != self.sha256:
                raise ValueError(
                    f"{self.path} has changed since the FrozenModel was made (SHA-256 {found[:12]}"
                    f"... instead of {self.sha256[:12]}...). Make it anew with "
                    "FrozenModel.from_file, or put the old file back."
                )
            file.seek(0)
            state = _read_state(file, self.path)
        with torch.random.fork_rng(devices=[]):  # weights that are drawn first, and replaced
            module = self.factory()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"factory must return a torch.nn.Module, but it returned {type(module).__name__}."
            )
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"The weights in {self.path} do not fit the network of factory: {error}"
            ) from error
        return module


class Loaded:
    """The networks that were loaded last in this process, by digest; they are held here."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, Any] = OrderedDict()

    def get(self, digest: str, load: Callable[[], Any]) -> Any:
        """Return what was loaded under `digest`, or load it now."""
        with _LOCK:
            if digest not in self._held:
                self._held[digest] = load()
            self._held.move_to_end(digest)
            value = self._held[digest]
            while len(self._held) > _KEEP:
                self._held.popitem(last=False)
            return value


def _open(path: Path) -> BinaryIO:
    """Open a file of weights for reading."""
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no file {path}. A FrozenModel that names a file needs it at the same place "
            "on every machine that works with it."
        ) from error


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _read_state(file: BinaryIO, path: str) -> Mapping[str, torch.Tensor]:
    """Read a state dict; no code in the file is run."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load

            state: Any = load(file.read())
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader makes of bytes that are no weights
        raise ValueError(f"{path} cannot be read as a state dict: {error}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds no state dict, but a {type(state).__name__}.")
    return state
