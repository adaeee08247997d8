"""What classes and functions do, as a number: two of one name need not do the same.

Whoever runs a notebook's cell again has another class under the old name, and whoever mends a file
has one in the next process; a network with the same weights then is not the same network.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Iterable
from typing import Any

# These change with their versions only.
_FOREIGN = sys.stdlib_module_names | {"numpy", "torch"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def code_of(objects: Iterable[Any]) -> str:
    """SHA-256 of the code of classes and functions, and of their modules' that they use.

    The same in every process of one version of Python; what is built into it does not count.
    """
    code = _Code()
    for one in objects:
        code.add(one)
    return code.sha256.hexdigest() if code.found else ""


class _Code:
    """Code that was found, each piece once."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.found: dict[int, Any] = {}  # held, so that no other object gets its id

    def add(self, value: Any) -> None:
        """Add a class, a function or a plain value; others are left out."""
        value = getattr(value, "__func__", value)  # of a bound, a static or a class method
        if isinstance(value, property):
            value = (value.fget,)
        elif isinstance(value, (list, set, dict)):
            parts: Any = value.items() if isinstance(value, dict) else value
            parts = sorted(parts, key=repr) if isinstance(value, set) else parts
            value = tuple(part for part in parts if isinstance(part, (*_PLAIN, tuple)))
        if isinstance(value, tuple):
            self._write(len(value))
            for part in value:
                self.add(part)
        elif isinstance(value, _PLAIN):
            self._write(value)
        elif isinstance(value, type):
            for kind in value.__mro__:
                if self._is_new(kind):
                    for name, member in sorted(vars(kind).items()):
                        if not name.startswith("__") or isinstance(member, types.FunctionType):
                            self._write(name)
                            self.add(member)
        elif isinstance(value, types.FunctionType) and self._is_new(value):
            self._add_function(value)

    def _is_new(self, value: Any) -> bool:
        """Whether code is somebody's own, and was not found yet."""
        module = str(value.__module__)
        if id(value) in self.found or module.partition(".")[0] in _FOREIGN:
            return False
        self.found[id(value)] = value
        self._write((module, value.__qualname__))
        return True

    def _add_function(self, function: types.FunctionType) -> None:
        self.add(function.__defaults__)
        self.add(tuple(sorted((function.__kwdefaults__ or {}).items())))
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:  # not set yet
                continue
        for name in self._add_code(function.__code__):
            used = function.__globals__.get(name)
            if (
                isinstance(used, (*_PLAIN, tuple, list, set, dict))
                or getattr(used, "__module__", "") == function.__module__
            ):
                self.add(used)

    def _add_code(self, code: types.CodeType) -> list[str]:
        """Add what is run; returns the names that it looks up."""
        self._write((code.co_code, code.co_names, code.co_varnames))
        names = list(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                names += self._add_code(constant)
            else:
                self._write(
                    sorted(constant, key=repr) if isinstance(constant, frozenset) else constant
                )
        return names

    def _write(self, value: Any) -> None:
        self.sha256.update(f"{value!r};".encode())
