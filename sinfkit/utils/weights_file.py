"""Weights that stay in their file: whoever needs them loads them there, once per process."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

_KEEP = 2  # networks that a process keeps after their last user has gone: the next job's, mostly
_LOCK = threading.Lock()
_USUAL = ("state_dict", "model_state_dict", "model")  # of the network, in a checkpoint
_WRAPPERS = ("module", "_orig_mod")  # DataParallel's and torch.compile's


@dataclass(frozen=True)
class WeightsFile:
    """A state dict in a file, and what builds the network that it belongs to.

    `path` is absolute; `factory` returns the network, whose weights the file's replace; `sha256`
    of the file's content is compared with it whenever the file is loaded.
    """

    path: str
    factory: Callable[[], nn.Module]
    sha256: str

    @classmethod
    def of(cls, path: Any, factory: Any) -> WeightsFile:
        """Take note of a file as it is now; a TypeError if `factory` is none that is pickled."""
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

        A ValueError if the file has changed, holds no state dict, or one of another network.
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
            stored = _read(file, self.path)
        with torch.random.fork_rng(devices=[]):  # weights that are drawn first, and replaced
            module = self.factory()
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"factory must return a torch.nn.Module, but it returned {type(module).__name__}."
            )
        states = list(_state_dicts(stored))
        if not states:
            raise ValueError(f"{self.path} holds no state dict, but a {type(stored).__name__}.")
        expected = module.state_dict()
        state = next((s for s in (_fitted(s, expected) for s in states) if s), states[0])
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


def _read(file: BinaryIO, path: str) -> Any:
    """Read what a file of weights holds; no code in it is run."""
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load

            return load(file.read())
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader makes of bytes that are no weights
        raise ValueError(f"{path} cannot be read as a state dict: {error}") from error


def _state_dicts(stored: Any, depth: int = 2) -> Iterator[Mapping[str, torch.Tensor]]:
    """Dicts of tensors in what was read: checkpoints keep them among other things."""
    if not isinstance(stored, Mapping):
        return
    if stored and all(isinstance(value, torch.Tensor) for value in stored.values()):
        yield stored
    elif depth:
        # The usual names first: a checkpoint may hold an averaged copy as well.
        for key in sorted(stored, key=lambda key: key not in _USUAL):
            yield from _state_dicts(stored[key], depth - 1)


def _fitted(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor] | None:
    """The weights under the names that the network has, or None where they are not there.

    `torch.compile` and `DataParallel` write a part of their own into the names, and trainers keep
    the network under a name, beside a loss, say.
    """
    if state.keys() == expected.keys():
        return state
    first = min(expected, key=len, default="")
    for wrappers in ((), _WRAPPERS):
        for prefix in sorted(_prefixes(state, first, wrappers), key=lambda name: (len(name), name)):
            under = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
            named = {_without(key, wrappers): value for key, value in under.items()}
            if named.keys() == expected.keys() and len(named) == len(under):
                return named
    return None


def _prefixes(names: Iterable[str], ending: str, wrappers: tuple[str, ...]) -> set[str]:
    """Beginnings after which a name is `ending`, but for wrappers; each ends at a dot, or is ""."""
    found = set()
    for name in names:
        parts = name.split(".")
        for k in range(len(parts)):
            if _without(".".join(parts[k:]), wrappers) == ending:
                found.add("".join(f"{part}." for part in parts[:k]))
    return found


def _without(key: str, parts: tuple[str, ...]) -> str:
    """A name without some of its parts."""
    return ".".join(part for part in key.split(".") if part not in parts)
