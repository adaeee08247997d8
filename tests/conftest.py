"""Fixtures that several files share."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = (EXAMPLES / "paper", EXAMPLES / "benchmarks")


@pytest.fixture(scope="module")
def paper():
    """Import a script of a table or a benchmark by name; its neighbours are found too."""
    before = sys.path.copy()
    sys.path[:0] = map(str, SCRIPTS)
    yield importlib.import_module
    sys.path[:] = before
    for name, module in list(sys.modules.items()):
        if Path(str(getattr(module, "__file__", ""))).parent in SCRIPTS:
            del sys.modules[name]
