"""What a long call says of itself: an estimate, one bar over everything, and what came out."""

from __future__ import annotations

import time
from typing import Any

from tqdm.auto import tqdm

__all__ = ["Progress"]

_BAR = "{desc}: {percentage:3.0f}% |{bar:20}| {elapsed}, about {remaining} left{postfix}"


class Progress:
    """Says what is being done, where it is asked to (`verbose`); a bar that ends with the block."""

    def __init__(self, name: str, verbose: int = 0) -> None:
        self.verbose = bool(verbose)
        self._name, self._start = name, time.perf_counter()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def begin(self, plan: str, steps: int) -> None:
        """Say what is going to be done, and show a bar of at most so many steps."""
        if self.verbose:
            print(f"{self._name}: {plan}", flush=True)
            self._bar = tqdm(total=steps, leave=False, bar_format=_BAR)

    def doing(self, what: str) -> None:
        """Show what is being done."""
        if self._bar is not None:
            self._bar.set_description_str(what)

    def best(self, what: str) -> None:
        """Show the best so far."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"best: {what}")

    def done(self) -> None:
        """One step more is behind."""
        if self._bar is not None:
            self._bar.total = max(self._bar.total, self._bar.n + 1)
            self._bar.update()

    def end(self, result: str) -> None:
        """Close the bar, and say what came out."""
        self._close()
        if self.verbose:
            seconds = time.perf_counter() - self._start
            print(f"{self._name}: {result} ({_duration(seconds)}).", flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def about(seconds: float) -> str:
    """A duration as rough as an estimate is: two digits, in a unit that suits."""
    return _duration(float(f"{seconds:.2g}"))


def _duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
