"""One file of tensors with a manifest, checked from end to end before anything in it is used.

The file is an ordinary safetensors file: a JSON header, then the tensors' bytes.  The manifest is
JSON too and lies in the header's metadata, with a SHA-256 over itself and over every tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import StorageError

__all__ = ["KEY"]

KEY = "sinfkit"  # of the metadata's only entry
MAX_HEADER = 8 * 2**20  # bytes of JSON, which Python's objects take up to 40 times
_MAX_DIMENSIONS = 8
_MAX_DIGITS = 20  # of an integer; longer ones take Python quadratic time to read
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def fits(tensor: Tensor) -> bool:
    """Whether a tensor is of a kind that the file can hold."""
    return tensor.dtype in _NAMES and tensor.layout == torch.strided and not tensor.is_quantized


def write(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a file; what lay at `path` before stays whole until the new file is complete.

    Parameters
    ----------
    path : path-like
    manifest : mapping
        Plain JSON values.
    tensors : mapping of str to Tensor
        Of kinds for which `fits` is true.

    Raises
    ------
    OSError
        If the file cannot be written.  Nothing is left behind then.
    """
    own = {name: _own(tensor) for name, tensor in tensors.items()}
    kinds = {name: (_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in own.items()}
    digest = _digest(manifest, {name: _as_bytes(tensor) for name, tensor in own.items()}, kinds)
    full = {**manifest, "sha256": digest}
    text = json.dumps(full, allow_nan=False, sort_keys=True, separators=(",", ":"))
    path = Path(os.path.realpath(path))  # a link stays one
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        # safetensors makes a file for its owner alone; this is for whom the old or a new one is.
        mode = stat.S_IMODE((path if path.exists() else beside).stat().st_mode)
        try:
            safetensors.torch.save_file(own, beside, metadata={KEY: text})
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        beside.chmod(mode)
        with beside.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def read(
    path: str | os.PathLike[str], max_bytes: int, newest: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file that need not be one.

    Parameters
    ----------
    path : path-like
    max_bytes : int
        A larger file is refused before it is read.
    newest : int
        The newest schema that is known.

    Returns
    -------
    manifest : dict
    tensors : dict of str to Tensor
        On the CPU, with memory of their own.

    Raises
    ------
    StorageError
        If anything is wrong with the file.
    OSError
        If it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise StorageError(f"It has {size} bytes, more than max_bytes={max_bytes}.")
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise StorageError("It is cut short, or no safetensors file at all.")
        if length > MAX_HEADER:
            raise StorageError(
                f"Its header has {length} bytes, more than the {MAX_HEADER} allowed."
            )
        header = file.read(length)
        manifest, table = _checked_header(header, size - 8 - length, newest)
        file.seek(0)
        whole = file.read(size)
    if len(whole) != size or whole[: 8 + length] != start + header:
        raise StorageError("It was changed while it was read.")
    stored = manifest.pop("sha256", None)
    data = memoryview(whole)[8 + length :]
    parts = {name: data[begin:end] for name, (_, _, begin, end) in table.items()}
    kinds = {name: (dtype, shape) for name, (dtype, shape, _, _) in table.items()}
    if stored != _digest(manifest, parts, kinds):
        raise StorageError("Its SHA-256 does not fit its content: the file is damaged.")
    try:
        tensors = safetensors.torch.load(whole)
    except (safetensors.SafetensorError, ValueError) as error:
        # Old releases let torch refuse a tensor without elements, with a ValueError.
        raise StorageError(f"safetensors cannot read it: {error}") from error
    return manifest, tensors


def strict_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object; duplicate keys, huge numbers, NaN and deep nesting are refused."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            raise StorageError(f"{what} has a key twice.")
        return found

    def constant(name: str) -> NoReturn:
        raise StorageError(f"{what} holds {name}, which is no JSON.")

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise StorageError(f"{what} holds an integer of {len(digits)} digits.")
        return int(digits)

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        found = json.loads(
            text, object_pairs_hook=pairs, parse_constant=constant, parse_int=integer
        )
    except StorageError:
        raise
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{what} is no JSON ({type(error).__name__}).") from error
    if not isinstance(found, dict):
        raise StorageError(f"{what} is no JSON object.")
    return found


def _checked_header(
    header: bytes, n_bytes: int, newest: int
) -> tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...], int, int]]]:
    """The manifest, and each tensor's type, shape and place; they fill the file without a gap."""
    entries = strict_json(header, "The header")
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or set(metadata) != {KEY}:
        raise StorageError("It is not one of sinfkit's files: it has no manifest.")
    if not isinstance(metadata[KEY], str):
        raise StorageError("The manifest is no text.")
    manifest = strict_json(metadata[KEY], "The manifest")
    schema = manifest.get("schema")
    if type(schema) is not int or schema < 1:
        raise StorageError(f"The manifest's schema version is {schema!r:.40}, no positive integer.")
    if schema > newest:
        raise StorageError(
            f"It has schema version {schema}, and this version of sinfkit reads versions up to "
            f"{newest}. Install a newer sinfkit."
        )
    table = {}
    for name, entry in entries.items():
        what = f"The header's entry for tensor {name!r:.80}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise StorageError(f"{what} is not dtype, shape and data_offsets.")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _SIZES:
            raise StorageError(f"{what} has the unknown dtype {dtype!r:.40}.")
        if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
            raise StorageError(f"{what} has the impossible shape {shape!r:.80}.")
        if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= n_bytes:
            raise StorageError(f"{what} lies outside of the file.")
        expected = _SIZES[dtype]
        for length in shape:
            expected *= length
        if expected != offsets[1] - offsets[0]:
            raise StorageError(f"{what} has a shape that does not fit its number of bytes.")
        table[name] = (dtype, tuple(shape), offsets[0], offsets[1])
    reached = 0
    for name, (_, _, begin, end) in sorted(table.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            raise StorageError(f"Tensor {name!r:.80} overlaps another, or lies behind a gap.")
        reached = end
    if reached != n_bytes:
        raise StorageError(f"The file has {n_bytes - reached} bytes too many, or is cut short.")
    return manifest, table


def _are_sizes(values: Any) -> bool:
    """Whether this is a list of integers from 0 on."""
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _digest(
    manifest: Mapping[str, Any],
    data: Mapping[str, memoryview],
    kinds: Mapping[str, tuple[str, tuple[int, ...]]],
) -> str:
    """SHA-256 of the manifest and of every tensor's name, type, shape and bytes."""
    found = hashlib.sha256(_canonical(manifest))
    for name in sorted(data):
        dtype, shape = kinds[name]
        found.update(_canonical([name, dtype, list(shape)]))
        found.update(data[name])
    return found.hexdigest()


def _canonical(value: Any) -> bytes:
    """The same bytes for the same JSON value, however it was written."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _own(tensor: Tensor) -> Tensor:
    """A dense host tensor that shares its memory with no other."""
    host = tensor.detach().to("cpu").contiguous()
    shared = host.data_ptr() == tensor.data_ptr()
    return host.clone(memory_format=torch.contiguous_format) if shared else host


def _as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy."""
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data


def _sync_folder(folder: Path) -> None:
    """Let the new name survive a loss of power, where the system can."""
    try:
        place = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(place)
    except OSError:
        pass
    finally:
        os.close(place)
