"""Importing this file lets the benchmarks import the scripts of ``examples/paper``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "paper"))
