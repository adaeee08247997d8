"""Modules as bytes and arrays, so that pickles are device-free and byte-stable.

A pickled ``torch.Tensor`` remembers its device and is written by torch's own reducer, whose bytes
joblib cannot hash reliably.  Here the module tree is pickled with every tensor replaced by a
number, and the tensors themselves become NumPy arrays, each stored once however many modules
share it.
"""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sklearn
import torch
import torch.fx.graph_module
from cloudpickle import CloudPickler
from torch import nn

from ..version import __version__
from .code import code_of
from .params import warn
from .recording import RECORDING, reduce_graph_module

__all__ = ["pack"]

# As many leading numbers must agree: before 1.0, sinfkit's second one counts as the first.
_PLACES = {"sinfkit": 2 if __version__.startswith("0.") else 1, "torch": 1, "scikit-learn": 2}


def versions() -> dict[str, str]:
    """Versions of sinfkit and of what it builds on."""
    return {
        "sinfkit": __version__,
        "torch": str(torch.__version__),
        "scikit-learn": str(sklearn.__version__),
    }


def warn_of_versions(kind: str, stored: Mapping[str, str]) -> None:
    """Warn, once for all packages, where a pickle was written with other major versions.

    `kind` is the class that was pickled, `stored` what `versions` said then.
    """
    here = versions()
    differ = [
        f"{name} {stored[name]} (here {here[name]})"
        for name, places in _PLACES.items()
        if name in stored
        and str(stored[name]).split(".")[:places] != here[name].split(".")[:places]
    ]
    if differ:
        warn(
            f"This {kind} was pickled with {', '.join(differ)}. A pickle is made for the versions "
            "that wrote it: check the answers, or fit it again. Files of save and sinfkit.load do "
            "not depend on versions."
        )


_TAG = "sinfkit.tensor"
_MAIN = "sinfkit.main"


@dataclass(frozen=True)
class Packed:
    """A picklable object whose tensors have been taken out; `code` tells what its classes do."""

    structure: bytes
    arrays: tuple[np.ndarray, ...]
    dtypes: tuple[str, ...]
    main: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return len(self.structure) + sum(array.nbytes for array in self.arrays)

    def unpack(self, device: torch.device | str = "cpu") -> Any:
        """Build the object anew, with its tensors on `device`."""
        # Copies: the arrays may be read-only memory maps, and must not change with the module.
        tensors = [
            torch.from_numpy(np.array(a)).view(getattr(torch, dtype)).to(device)
            for a, dtype in zip(self.arrays, self.dtypes, strict=True)
        ]
        with RECORDING:
            return _Unpickler(io.BytesIO(self.structure), tensors, self.main).load()


def pack(obj: Any) -> Packed:
    """Take the tensors out of a picklable object (usually a dict of modules).

    Tensors that share memory, shape and strides are stored once.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    try:
        pickler.dump(obj)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
        raise TypeError(
            f"The model cannot be copied ({error}). Keep what cannot be pickled, such as open "
            "files, locks and generators, out of its attributes and hooks."
        ) from error
    code = code_of(pickler.classes_and_functions)
    arrays, dtypes = tuple(pickler.arrays), tuple(pickler.dtypes)
    return Packed(buffer.getvalue(), arrays, dtypes, pickler.main, code)


class _Pickler(CloudPickler):
    """Pickler that stores tensors beside the stream, and by value what no name leads to."""

    def __init__(self, file: io.BytesIO) -> None:
        # A fixed protocol: the default may change with Python, and with it the bytes.
        super().__init__(file, protocol=4)
        self.main: dict[str, Any] = {}
        self.classes_and_functions: list[Any] = []
        self.arrays: list[np.ndarray] = []
        self.dtypes: list[str] = []
        self._index: dict[tuple[Any, ...], int] = {}
        self._alive: list[torch.Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, (type, types.FunctionType)):
            self.classes_and_functions.append(obj)
        if _is_of_main(obj):
            # By name, so that the bytes do not depend on the process.
            self.main[obj.__qualname__] = obj
            return (_MAIN, obj.__qualname__)
        if not isinstance(obj, torch.Tensor):
            return None
        tensor = obj.detach()
        key = (
            tensor.device,
            tensor.data_ptr() if tensor.numel() else id(obj),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        index = self._index.get(key)
        if index is None:
            index = self._index[key] = len(self.arrays)
            self._alive.append(tensor)  # keeps data_ptr unique while we write
            self.arrays.append(_to_numpy(tensor))
            self.dtypes.append(str(tensor.dtype).removeprefix("torch."))
        is_parameter = isinstance(obj, nn.Parameter)
        return (_TAG, index, is_parameter, bool(is_parameter and obj.requires_grad))


class _Unpickler(pickle.Unpickler):
    """Counterpart of `_Pickler`."""

    def __init__(
        self, file: io.BytesIO, tensors: list[torch.Tensor], main: Mapping[str, Any]
    ) -> None:
        super().__init__(file)
        self._tensors, self._main = tensors, main
        self._parameters: dict[tuple[int, bool], nn.Parameter] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        found = super().find_class(module_name, global_name)
        return reduce_graph_module if found is torch.fx.graph_module.reduce_graph_module else found

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == _MAIN:
            return self._main[pid[1]]
        tag, index, is_parameter, requires_grad = pid
        if tag != _TAG:
            raise pickle.UnpicklingError(f"unknown persistent id {tag!r}")
        tensor = self._tensors[index]
        if not is_parameter:
            return tensor
        # One object per stored weight, so that tied weights stay tied.
        key = (index, requires_grad)
        if key not in self._parameters:
            self._parameters[key] = nn.Parameter(tensor, requires_grad=requires_grad)
        return self._parameters[key]


@dataclass(frozen=True)
class Pickled:
    """Any object on its way to another process: a pickle, its arrays, and what scripts define."""

    structure: bytes
    arrays: list[np.ndarray]
    main: Mapping[str, Any]


def dump(obj: Any) -> Pickled:
    """Pickle an object, its arrays beside it, uncopied."""
    buffer = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    pickler = _MainPickler(buffer, protocol=5, buffer_callback=buffers.append)
    pickler.dump(obj)
    return Pickled(buffer.getvalue(), [np.asarray(b.raw()) for b in buffers], pickler.main)


def load(pickled: Pickled) -> Any:
    """Counterpart of `dump`; arrays may be read-only."""
    unpickler = _MainUnpickler(io.BytesIO(pickled.structure), buffers=pickled.arrays)
    unpickler.main = pickled.main
    return unpickler.load()


class _MainPickler(pickle.Pickler):
    """Pickler that leaves classes and functions of scripts to the pickler around it."""

    main: dict[str, Any]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.main = {}

    def persistent_id(self, obj: Any) -> Any:
        if not _is_of_main(obj):
            return None
        self.main[obj.__qualname__] = obj
        return obj.__qualname__


class _MainUnpickler(pickle.Unpickler):
    """Counterpart of `_MainPickler`."""

    main: Mapping[str, Any]

    def persistent_load(self, pid: Any) -> Any:
        return self.main[pid]


def _is_of_main(obj: Any) -> bool:
    """Whether this is a class or function that a script or notebook defines at its top level."""
    kinds = (type, types.FunctionType)
    return isinstance(obj, kinds) and obj.__module__ == "__main__" and "<" not in obj.__qualname__


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to a host array of its own, in memory order of its indices."""
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return tensor.numpy().copy()
