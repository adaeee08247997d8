"""Run a function in a forked child, where it may be killed, interrupted or starved."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@dataclass
class Ended:
    """How a child ended.

    Attributes
    ----------
    status : int
        Exit code, or minus the number of the signal that ended it.
    value : object
        What the function returned.
    error : str
        What it raised, with the traceback.
    """

    status: int
    value: Any = None
    error: str = ""


def _lift_limits() -> None:
    if sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def in_child(function: Callable[[], Any], timeout: int = 120) -> Ended:
    """Fork, call a function in the child, and wait for it; after `timeout` seconds it is ended."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(timeout)
            try:
                result = Ended(0, function())
            except BaseException:
                _lift_limits()  # without memory the error could not be told
                result = Ended(1, error=traceback.format_exc())
            with os.fdopen(writer, "wb") as stream:
                pickle.dump(result, stream)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        data = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return pickle.loads(data) if data else Ended(status)


def value_of(function: Callable[[], Any], timeout: int = 120) -> Any:
    """What a function returns in a child; an AssertionError where it did not get so far."""
    ended = in_child(function, timeout)
    assert ended.status == 0, f"status {ended.status}: {ended.error}"
    return ended.value
