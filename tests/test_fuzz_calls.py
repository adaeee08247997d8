"""Generated calls of the public API, in short; `python tests/fuzz_calls.py` makes 10,000."""

from __future__ import annotations

import warnings

import pytest
from fuzz_calls import run


@pytest.mark.filterwarnings("ignore")
def test_wrong_calls_are_told_what_is_wrong():
    bugs: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = run(150, seed=2, report=bugs.append)
    assert not bugs
    assert sum(outcomes.values()) == 150
    # Most of what is wrong is seen as such, and some calls are right.
    assert outcomes["ValueError"] > 45 and outcomes["TypeError"] > 10 and outcomes["success"] > 5
