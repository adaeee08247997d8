"""Errors and warnings with types: caught as what Python calls them, and from other processes."""

from __future__ import annotations

import pickle

import pytest

import sinfkit
from sinfkit import SinfkitError, SinfkitWarning, SlicingError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (sinfkit.OutOfReachError("why"), ValueError),
        (sinfkit.StorageError("why"), ValueError),
        (SlicingError("why", "features.3"), RuntimeError),
    ],
)
def test_errors_are_what_python_calls_them_and_can_be_pickled(error, kind):
    assert isinstance(error, kind) and isinstance(error, SinfkitError)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == "why"
    assert vars(again) == vars(error)


@pytest.mark.parametrize("name", ["PromiseWarning", "CalibrationWarning", "SlicingWarning"])
def test_warnings_can_be_silenced_together(name):
    kind = getattr(sinfkit, name)
    assert issubclass(kind, SinfkitWarning) and issubclass(kind, UserWarning)
