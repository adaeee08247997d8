"""Errors and warnings with a type, so that callers can tell them apart without reading messages.

Each error is also what Python calls it (a ``ValueError``, a ``TypeError``), so that code which
knows nothing of sinfkit catches it as well.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CalibrationWarning",
    "NotPlainError",
    "OutOfReachError",
    "PromiseWarning",
    "SinfkitError",
    "SinfkitWarning",
    "SlicingError",
    "SlicingWarning",
    "StorageError",
    "UnreachableShareError",
    "UnsliceableError",
]


class SinfkitError(Exception):
    """Base of the errors that have a type of their own."""


class ArgumentError(SinfkitError, ValueError):
    """A value that an argument or parameter must not have."""

    def __init__(self, message: str, argument: str) -> None:
        super().__init__(message)
        self.argument = argument

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Pickled with both arguments, for errors that come from another process."""
        return type(self), (str(self), self.argument)


class ArgumentTypeError(SinfkitError, TypeError):
    """A value of a type that an argument or parameter must not have."""

    def __init__(self, message: str, argument: str) -> None:
        super().__init__(message)
        self.argument = argument

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Pickled with both arguments, for errors that come from another process."""
        return type(self), (str(self), self.argument)


class SlicingError(SinfkitError, RuntimeError):
    """A sliced network does not compute what the masked one does.

    Parameters
    ----------
    message : str
        What differs, and by how much.
    layer : str
        The first module, in order of execution, whose output differs; an attribute as well.
    """

    def __init__(self, message: str, layer: str) -> None:
        super().__init__(message)
        self.layer = layer

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Pickled with both arguments, for errors that come from another process."""
        return type(self), (str(self), self.layer)


class OutOfReachError(SinfkitError, ValueError):
    """A budget is smaller than the smallest network that can be cut from the base."""


class UnreachableShareError(SinfkitError, ValueError):
    """With ranks of 1, more multiplications are left than wanted."""


class UnsliceableError(SinfkitError, ValueError):
    """Hardly anything of a network can be sliced."""


class StorageError(SinfkitError, ValueError):
    """A stored file is damaged, of a newer version, or not one of sinfkit's.

    `sinfkit.load` raises it for whatever is wrong with a file's content, and says what.  A file
    that cannot be opened or read is an ``OSError``, as everywhere.
    """


class NotPlainError(SinfkitError, TypeError):
    """A value that cannot be stored as data."""


class SinfkitWarning(UserWarning):
    """Base of the warnings that have a type of their own; a filter for it catches them all."""


class PromiseWarning(SinfkitWarning):
    """`max_accuracy_drop` is not certified, or not kept on the images at hand."""


class CalibrationWarning(SinfkitWarning):
    """The calibration images look wrong, or are too few for what they are used for."""


class SlicingWarning(SinfkitWarning):
    """Some layers stay whole, or as they were sliced without a repair."""
