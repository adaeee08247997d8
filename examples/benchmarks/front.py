"""Loss against time in every form: batch 1, 8, 64 and 256, one thread and two.

The contestants of ``main``, which see, in all forms; run it once for each number of threads::

    python -m benchmarks front --network vgg16 --weights vgg16.pt --threads 1
    python -m benchmarks front --network vgg16 --weights vgg16.pt --threads 2
"""

from __future__ import annotations

from collections.abc import Sequence

from . import main_table

NAME = "front"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure with more batch sizes than ``main``."""
    given = list(arguments or [])
    if "--batches" not in given:
        given += ["--batches", "1", "8", "64", "256"]
    main_table.main(given, NAME)
