"""Fixtures that several files share."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

PAPER = Path(__file__).parent.parent / "examples" / "paper"


@pytest.fixture(scope="module")
def paper():
    """Import a script by name; its neighbours are found too."""
    sys.path.insert(0, str(PAPER))
    yield importlib.import_module
    sys.path.remove(str(PAPER))
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(PAPER)):
            del sys.modules[name]
