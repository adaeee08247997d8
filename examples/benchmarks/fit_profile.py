"""How far does a call of `fit` reach?  Counts files, functions and the depth of calls.

    python -m benchmarks fit_profile [--list]

Only frames of the package count: its files, its functions, and how many of its calls lie on top of
one another.  The fewer, the easier a `fit` is to follow.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from sklearn.datasets import load_digits

import sinfkit

PACKAGE = str(Path(sinfkit.__file__).parent)


def profile(call: Callable[[], Any]) -> tuple[set[str], list[str]]:
    """Return which functions of the package were called, as file:name, and the deepest stack."""
    functions: set[str] = set()
    stack: list[str] = []
    deepest: list[str] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal deepest
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(PACKAGE):
            return
        if code.co_name.startswith("<"):  # modules and comprehensions
            return
        if event == "return":
            if stack:
                stack.pop()
            return
        stack.append(f"{Path(code.co_filename).relative_to(PACKAGE)}:{code.co_qualname}")
        functions.add(stack[-1])
        if len(stack) > len(deepest):
            deepest = stack.copy()

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return functions, deepest


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile `SINFClassifier.fit` on the digits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="list the files and the deepest calls")
    options = parser.parse_args(arguments)
    X, y = load_digits(return_X_y=True)
    warnings.simplefilter("ignore")
    model = sinfkit.DCSPruner(random_state=0).fit(X[:300], y[:300]).base_model_
    classifier = sinfkit.SINFClassifier(model, random_state=0)
    functions, deepest = profile(lambda: classifier.fit(X[:1000], y[:1000]))
    files = sorted({name.split(":")[0] for name in functions})
    print(f"{len(files)} files, {len(functions)} functions, {len(deepest)} calls deep")
    if options.list:
        print("\n".join(files))
        print("\n".join("  " * i + name for i, name in enumerate(deepest)))


if __name__ == "__main__":
    main()
