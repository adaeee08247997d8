"""The tables' package, and networks that several files share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session", autouse=True)
def examples_on_path():
    """Lets `benchmarks` be imported, as it is when examples/ is the current folder."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="session")
def table(examples_on_path):
    """Run a table in its quick form; the same folder for all of them, so that fits are shared."""
    from benchmarks.__main__ import main

    def run(name: str, folder: Path, *more: str) -> Path:
        main([name, "--quick", "--threads", "1", "--out", str(folder), *more])
        return folder / f"{name}_tiny_choose.csv"

    return run
