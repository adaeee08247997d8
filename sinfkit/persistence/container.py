"""One file of tensors with a manifest, checked before anything in it is used.

The file is an ordinary safetensors file: a JSON header, then the tensors' bytes.  The manifest is
JSON too and lies in the header's metadata, with a SHA-256 over itself and over every tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import StorageError

__all__ = ["KEY", "checksum"]

KEY = "sinfkit"  # of the metadata's only entry
MAX_HEADER = 8 * 2**20  # bytes of JSON, which Python's objects take up to 40 times
_MAX_DIGITS = 20  # of an integer; longer ones take Python quadratic time to read
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
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
    path: Path,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    check: Callable[[Path], None],
) -> None:
    """Write a file; what lay at `path` before stays whole until the new file is complete.

    `check` gets the new file before it takes its place; what it raises leaves nothing behind.
    """
    own = {name: _own(tensor) for name, tensor in tensors.items()}
    full = {**manifest, "sha256": checksum(manifest, _told(own))}
    text = json.dumps(full, allow_nan=False, sort_keys=True, separators=(",", ":"))
    path = Path(os.path.realpath(path))  # a link stays one
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent}, to write {path.name} into.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it.")
    if path.exists() and not path.is_file():  # a device or a pipe, which a file would replace
        raise OSError(f"{path} is no regular file, and is not replaced by one.")
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        # safetensors makes a file for its owner alone; this is for whom the old or a new one is.
        mode = stat.S_IMODE((path if path.exists() else beside).stat().st_mode)
        try:
            safetensors.torch.save_file(own, beside, metadata={KEY: text})
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        check(beside)
        beside.chmod(mode)
        with beside.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def read(path: Path, max_bytes: int, newest: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read manifest and tensors of a file that need not be one; `newest` is the last schema known.

    StorageError if anything is wrong with it; OSError if it cannot be read.  safetensors itself
    checks that types, shapes and places of the tensors fit the file.
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
        file.seek(0)
        whole = file.read(size)
    manifest = _manifest(whole[8 : 8 + length], newest)
    stored = manifest.pop("sha256", None)
    try:
        tensors = safetensors.torch.load(whole)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        # Old releases let torch refuse a tensor without elements, with a ValueError.
        raise StorageError(f"safetensors cannot read it: {error}") from error
    unknown = [name for name, tensor in tensors.items() if not fits(tensor)]
    if unknown:
        raise StorageError(f"Tensor {unknown[0]!r:.80} is of a type that sinfkit does not store.")
    if stored != checksum(manifest, _told(tensors)):
        raise StorageError("Its SHA-256 does not fit its content: the file is damaged.")
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


def _manifest(header: bytes, newest: int) -> dict[str, Any]:
    """The manifest in a safetensors header, of a schema that is known."""
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
    return manifest


def checksum(
    manifest: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...], Any]]
) -> str:
    """SHA-256 of the manifest and of every tensor, given as type, shape and bytes."""
    found = hashlib.sha256(_canonical(manifest))
    for name in sorted(tensors):
        dtype, shape, content = tensors[name]
        found.update(_canonical([name, dtype, list(shape)]))
        found.update(content)
    return found.hexdigest()


def _told(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], memoryview]]:
    """Type, shape and bytes of each tensor."""
    return {k: (_NAMES[t.dtype], tuple(t.shape), _as_bytes(t)) for k, t in tensors.items()}


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
