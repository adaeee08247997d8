"""Plain values to JSON and back: numbers, text, lists, tuples, dicts, sets and NumPy arrays.

What is no plain value is refused: nothing here can name a class or a function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NotPlainError, StorageError

_DEPTH = 12
_MAX_TEXT = 64 * 2**20  # bytes of an array of text, all entries as wide as the widest
# Arrays of these become tensors; of the others, lists.
_TENSORS = frozenset("float64 float32 float16 int64 int32 int16 int8 uint8 bool".split())
_LISTS = frozenset("uint16 uint32 uint64".split())
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any, name: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """Turn a value into JSON; numeric arrays go to `tensors`, under `name`."""
    if depth > _DEPTH:
        raise NotPlainError(f"{name} is nested more than {_DEPTH} levels deep.")
    if isinstance(value, np.ndarray):
        return _encode_array(value, name, tensors)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise NotPlainError(f"{name} is an integer of more than 64 bits.")
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    for kind, key in ((list, ""), (tuple, "tuple"), (set, "set"), (frozenset, "frozenset")):
        if isinstance(value, kind):
            items: Any = value
            if key.endswith("set"):  # in a fixed order, so that equal files have equal bytes
                items = sorted(value, key=repr)
            found = [encode(v, f"{name}.{i}", tensors, depth + 1) for i, v in enumerate(items)]
            return {key: found} if key else found
    if isinstance(value, Mapping):
        rows = []
        for i, (key, item) in enumerate(value.items()):
            # Layers' names in tensors' names make the file readable.
            label = key if isinstance(key, str) else i
            rows.append(
                [
                    encode(key, f"{name}.{i}.key", tensors, depth + 1),
                    encode(item, f"{name}.{label}", tensors, depth + 1),
                ]
            )
        return {"dict": rows}
    raise NotPlainError(
        f"{name} is {_describe(value)}, which is no plain value (number, text, list, tuple, dict, "
        "set, NumPy array)."
    )


def decode(node: Any, tensors: Mapping[str, Tensor], used: set[str], depth: int = 0) -> Any:
    """Turn JSON from `encode` into the value; names of the tensors it takes are added to `used`."""
    if depth > 2 * _DEPTH:
        raise StorageError("A value in the manifest is nested too deeply.")
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    if isinstance(node, list):
        return [decode(item, tensors, used, depth + 1) for item in node]
    if not isinstance(node, dict) or len(node) != 1:
        raise StorageError(f"The manifest holds a value of unknown kind: {node!r:.60}.")
    [(key, content)] = node.items()
    if key == "tensor":
        return take(content, tensors, used).numpy().copy()
    if key == "float" and isinstance(content, str) and content in _NOT_FINITE:
        return _NOT_FINITE[content]
    if key == "array" and isinstance(content, dict):
        return _decode_array(content)
    if key in ("tuple", "set", "frozenset", "dict") and isinstance(content, list):
        items = [decode(item, tensors, used, depth + 1) for item in content]
        try:
            if key == "dict":
                found: Any = {k: v for k, v in items}
            else:
                found = {"tuple": tuple, "set": set, "frozenset": frozenset}[key](items)
        except (TypeError, ValueError) as error:
            raise StorageError(f"The manifest holds a {key} that cannot be one.") from error
        if len(found) != len(items):
            raise StorageError(f"The manifest holds a {key} with an entry twice.")
        return found
    raise StorageError(f"The manifest holds a value of unknown kind: {node!r:.60}.")


def take(name: Any, tensors: Mapping[str, Tensor], used: set[str]) -> Tensor:
    """The tensor of a given name; each is asked for once."""
    if not isinstance(name, str) or name not in tensors:
        raise StorageError(f"The manifest names the tensor {name!r:.80}, which is not there.")
    if name in used:
        raise StorageError(f"The manifest names the tensor {name!r:.80} twice.")
    used.add(name)
    return tensors[name]


def _encode_array(array: np.ndarray, name: str, tensors: dict[str, Tensor]) -> Any:
    """Numbers as a tensor, text as a list."""
    kind = array.dtype.name
    if kind in _TENSORS:
        if name in tensors:
            raise NotPlainError(f"{name} stands for two arrays.")
        tensors[name] = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
        return {"tensor": name}
    values = array.ravel().tolist()
    if array.dtype.kind == "O" and all(isinstance(v, str) for v in values):
        kind = "object"
    elif array.dtype.kind == "U":
        kind = "str"
    elif kind not in _LISTS:
        raise NotPlainError(f"{name} is an array of {array.dtype}, which cannot be stored.")
    return {"array": {"dtype": kind, "shape": list(array.shape), "values": values}}


def _decode_array(content: dict[str, Any]) -> np.ndarray:
    """Counterpart of `_encode_array` for lists."""
    if set(content) != {"dtype", "shape", "values"}:
        raise StorageError("An array in the manifest is not dtype, shape and values.")
    kind, shape, values = content["dtype"], content["shape"], content["values"]
    if not isinstance(values, list) or not isinstance(shape, list) or len(shape) > 4:
        raise StorageError("An array in the manifest has no list of values, or no shape.")
    n = 1
    for length in shape:
        if type(length) is not int or length < 0:
            raise StorageError("An array in the manifest has an impossible shape.")
        n *= length
    if n != len(values):
        raise StorageError("An array in the manifest has another number of values than its shape.")
    if kind in ("str", "object"):
        if not all(isinstance(v, str) for v in values):
            raise StorageError("An array of text in the manifest holds something else.")
        if 4 * len(values) * max(map(len, values), default=0) > _MAX_TEXT:
            raise StorageError("An array of text in the manifest is too large.")
        return np.array(values, dtype=str if kind == "str" else object).reshape(shape)
    if not isinstance(kind, str) or kind not in _LISTS or any(type(v) is not int for v in values):
        raise StorageError("An array in the manifest has an unknown type.")
    try:
        return np.array(values, dtype=kind).reshape(shape)
    except OverflowError as error:
        raise StorageError("An array in the manifest holds a number out of its range.") from error


def _describe(value: Any) -> str:
    """What a value is, in a few words."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"the function or class {value.__qualname__!r}"
    return f"a {type(value).__name__}"
