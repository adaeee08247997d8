"""Checks of single arguments: each names the argument, what it may be, and what it was."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import NotFittedError

from ..errors import ArgumentError, ArgumentTypeError, SinfkitError

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


def caller_level() -> int:
    """Find out which line outside this package called into it."""
    frame, level, found = sys._getframe(1), 1, 1
    while frame.f_back is not None:
        level += 1
        if frame.f_code.co_filename.startswith(_PACKAGE):
            found = level
        frame = frame.f_back
    return found


_told: ContextVar[set[str] | None] = ContextVar("told", default=None)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside this package that called into it; within `once_each`, once."""
    told = _told.get()
    if told is not None:
        if message in told:
            return
        told.add(message)
    warnings.warn(message, category, stacklevel=caller_level())


@contextmanager
def once_each() -> Iterator[None]:
    """Let `warn` say the same thing once, however often it comes up inside."""
    token = _told.set(set())
    try:
        yield
    finally:
        _told.reset(token)


LARGEST = 2**31 - 1  # what counts rows or seeds fits into the integers of every library
_MOST_JOBS = 100_000  # joblib computes with no number of jobs above 500,000


def is_integer(value: Any) -> bool:
    """Whether a value counts something; True and False do not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number other than NaN; True and False are not."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return real and not math.isnan(value)


def check_integer(
    name: str, value: Any, low: int = 1, high: int = LARGEST, *, optional: bool = False
) -> None:
    """Raise a ValueError unless `value` is an integer from `low` to `high`."""
    if value is None and optional:
        return
    if not is_integer(value) or not low <= value <= high:
        kind = {0: "an integer that is not negative", 1: "a positive integer"}.get(
            low, f"an integer of at least {low}"
        )
        most = f", at most {high:,}" if is_integer(value) and value > high else ""
        raise ArgumentError(
            f"{name} must be {kind}{_or_none(optional)}{most}, got {shown(value)}.", name
        )


def check_jobs(value: Any) -> None:
    """Raise a ValueError unless `n_jobs` is one that joblib understands."""
    if value is not None and (not is_integer(value) or value == 0 or abs(value) > _MOST_JOBS):
        raise ArgumentError(
            f"n_jobs must be None or an integer other than 0 within +-{_MOST_JOBS}, got "
            f"{shown(value)}.",
            "n_jobs",
        )


def check_verbose(value: Any) -> None:
    """Raise a ValueError unless `verbose` is a flag or a level."""
    if not isinstance(value, (bool, np.bool_)) and not (is_integer(value) and value >= 0):
        raise ArgumentError(
            f"verbose must be an integer that is not negative, or a flag, got {shown(value)}.",
            "verbose",
        )


def check_number(name: str, value: Any, interval: str, *, optional: bool = False) -> None:
    """Raise a ValueError unless `value` is a number in an interval, such as ``"[0, 1)"``."""
    if value is None and optional:
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = is_number(value) and (
        (low < value or (value == low and interval[0] == "["))
        and (value < high or (value == high and interval[-1] == "]"))
    )
    if not inside:
        kind = "a positive number" if interval == "(0, inf)" else f"in {interval}"
        raise ArgumentError(f"{name} must be {kind}{_or_none(optional)}, got {shown(value)}.", name)


def check_choice(name: str, value: Any, choices: Iterable[Any], *, optional: bool = False) -> None:
    """Raise a ValueError unless `value` is one of some strings."""
    if value is None and optional:
        return
    known = tuple(choices)
    # An array, which compares item by item, is none of them.
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(
            f"{name} must be one of {known}{_or_none(optional)}, got {shown(value)}.", name
        )


def check_flag(name: str, value: Any) -> None:
    """Raise a TypeError unless `value` is true or false."""
    if not isinstance(value, (bool, np.bool_)):
        raise ArgumentTypeError(f"{name} must be True or False, got {shown(value)}.", name)


def check_kind(name: str, value: Any, kinds: type | tuple[type, ...], what: str) -> None:
    """Raise a TypeError unless `value` is of some type."""
    if not isinstance(value, kinds):
        raise ArgumentTypeError(f"{name} must be {what}, got {type(value).__name__}.", name)


def values_of(name: str, value: Any) -> Any:
    """A tensor as an array, and anything else as it is; raise where values are not there."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            raise ArgumentTypeError(f"{name} must be a dense tensor that holds its values.", name)
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # it has none
    if isinstance(value, Iterator):
        raise ArgumentTypeError(
            f"{name} gives its values only once ({type(value).__name__}). Pass an array or a list, "
            f"such as list({name}).",
            name,
        )
    if np.ma.is_masked(value):
        raise ArgumentError(
            f"{name} is a masked array, and some of its values are masked. Fill them in, or leave "
            "these samples out.",
            name,
        )
    return value


def check_path(name: str, value: Any) -> Path:
    """Return a path, or raise where `value` cannot be one."""
    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentTypeError(f"{name} must be a path, got {type(value).__name__}.", name)
    with naming(name):
        path = Path(value)
    if "\0" in str(path):
        raise ArgumentError(
            f"{name} must be a path, and has a null character: {shown(value)}.", name
        )
    return path


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Let the errors of others say which argument they are about.

    A ValueError or TypeError raised inside that is not known to be about it is raised anew.
    """
    try:
        yield
    except NotFittedError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        if isinstance(error, (ArgumentError, ArgumentTypeError)):
            if error.argument == name:
                raise
        elif isinstance(error, SinfkitError):
            raise
        kind = ArgumentTypeError if isinstance(error, TypeError) else ArgumentError
        raise kind(f"{name}: {error}", name) from error


@contextmanager
def nested(name: str, parameters: Iterable[str]) -> Iterator[None]:
    """Let errors about some parameters say which nested object has them: ``options.penalty``."""
    try:
        yield
    except (ArgumentError, ArgumentTypeError) as error:
        if error.argument not in parameters:
            raise
        raise type(error)(f"{name}.{error}", name) from error


def shown(value: Any, limit: int = 60) -> str:
    """A value for a message: on one line, and not too long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _or_none(optional: bool) -> str:
    return " or None" if optional else ""
