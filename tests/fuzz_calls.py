"""Call everything public with wrong shapes, types, values and orders, and see what comes back.

    python tests/fuzz_calls.py --count 10000 --seed 0

A call may succeed, where what was generated happens to be valid; its numbers must be finite then.
Else it must raise ValueError, TypeError or NotFittedError, or OSError for a path, with a message
that names an argument that was made wrong.  Everything else is a bug of the package: another
exception, a warning about arithmetic, a call that does not end, or a fitted estimator, a random
generator or a setting of torch that has changed.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_targets import Target, World, targets
from hostile import Rng, anything
from sklearn.exceptions import NotFittedError

from sinfkit import StorageError

LIMIT = 120.0  # seconds for one call, after which the process ends with a traceback
_ROUNDS = ("epochs", "repeats", "max_iter", "max_batch", "distill")


@dataclass
class Case:
    """One call: what is called, with what, and which arguments are not as they should be."""

    target: Target
    arguments: dict[str, Any]
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        shown = {name: self.arguments.get(name, "(left out)") for name in self.wrong}
        return f"{self.target.name} with " + ", ".join(
            f"{name}={_brief(value)}" for name, value in shown.items()
        )


def _brief(value: Any) -> str:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return f"{type(value).__name__}{tuple(value.shape)} {value.dtype}"
    text = repr(value).replace("\n", " ")
    return text if len(text) < 90 else text[:90] + "..."


def draw(found: list[Target], rng: Rng) -> Case:
    """Choose something to call, and make one or two of its arguments wrong."""
    often = np.array([target.weight for target in found])
    target = found[rng.choice(len(found), p=often / often.sum())]
    arguments = dict(target.valid)
    names = [name for name in arguments if name not in target.never]
    n_wrong = min(len(names), int(rng.choice([0, 1, 2], p=[0.02, 0.73, 0.25])))
    # Samples and labels more often than the many parameters beside them.
    chances = np.array([3.0 if name in ("X", "y", "x", "features") else 1.0 for name in names])
    p = chances / max(chances.sum(), 1.0)
    chosen = rng.choice(len(names), size=n_wrong, replace=False, p=p) if n_wrong else []
    wrong = list(dict.fromkeys([*(names[i] for i in chosen), *target.always]))
    for name in wrong:
        special = target.wrong.get(name)
        value = (anything if special is None or rng.random() < 0.4 else special)(rng)
        # So many rounds would be a valid wish.
        endless = name in _ROUNDS and isinstance(value, int) and value > 100
        arguments[name] = -value if endless else value
    if rng.random() < 0.04 and target.required:
        name = target.required[rng.integers(len(target.required))]
        arguments.pop(name, None)
        wrong.append(name)
    if rng.random() < 0.02:
        arguments["surplus"] = anything(rng)
        wrong.append("surplus")
    if "fitted" in target.never and rng.random() < 0.1:
        arguments["fitted"] = False
    return Case(target, arguments, tuple(wrong))


def judge(case: Case) -> tuple[str, str]:
    """Call, and return an outcome and, where it is a bug, what is wrong."""
    with _settings_stay() as changed:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", RuntimeWarning)  # arithmetic that went wrong
                result = case.target.call(**case.arguments)
        except BaseException as error:
            outcome = _judge_error(case, error)
        else:
            outcome = ("success", "" if _is_finite(result) else "the answer is not finite")
    if case.target.draws:
        changed = [key for key in changed if key != "torch's generator"]
    if case.arguments.get("random_state", 0) is None:  # as in scikit-learn
        changed = [key for key in changed if key != "numpy's generator"]
    return outcome if not changed else (outcome[0], f"changed {', '.join(changed)}")


def _judge_error(case: Case, error: BaseException) -> tuple[str, str]:
    kind, message = type(error), str(error)
    said = f"{kind.__name__}: {message}"
    if kind is NotFittedError:
        return "NotFittedError", "" if case.arguments.get("fitted", True) is not True or any(
            name in case.wrong for name in ("estimator", "classifier")
        ) else said
    if kind is StorageError and "path" in case.wrong:  # which names the file
        return "StorageError", ""
    if isinstance(error, OSError):
        return "OSError", "" if set(case.wrong) & set(case.target.paths) else said
    if not isinstance(error, (ValueError, TypeError)) or isinstance(error, UnicodeError):
        return kind.__name__, said
    names = [*case.wrong, *(["network"] if "model" in case.wrong else [])]
    named = any(re.search(rf"\b{re.escape(name)}\b", message) for name in names)
    kind_name = "ValueError" if isinstance(error, ValueError) else "TypeError"
    return kind_name, "" if named else f"does not name the argument: {said}"


def _is_finite(result: Any) -> bool:
    """Whether numbers that came back are numbers."""
    if isinstance(result, torch.Tensor):
        result = result.numpy()
    if isinstance(result, float):
        return bool(np.isfinite(result))
    if isinstance(result, np.ndarray) and result.dtype.kind == "f":
        return bool(np.isfinite(result).all())
    score = getattr(result, "score", None)
    return _is_finite(score) if isinstance(score, torch.Tensor) else True


@contextmanager
def _settings_stay() -> Iterator[list[str]]:
    """Note what a call has changed for the whole process."""
    changed: list[str] = []
    before = _settings()
    yield changed
    changed += [key for key, value in _settings().items() if value != before[key]]


def _settings() -> dict[str, Any]:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "torch's generator": hash(torch.random.get_rng_state().numpy().tobytes()),
        "numpy's generator": hash((numpy_state[1].tobytes(), numpy_state[2])),
        "threads": torch.get_num_threads(),
    }


def run(count: int, seed: int, *, report: Callable[[str], None] = print) -> Counter[str]:
    """Make `count` calls; raise at the end if one of them showed a bug.

    Parameters
    ----------
    count, seed : int
    report : callable
        Takes a line about each bug.

    Returns
    -------
    Counter
        Calls by outcome; those that showed a bug under ``"bug"``.
    """
    rng = np.random.default_rng(seed)
    outcomes: Counter[str] = Counter()
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # some values are names of files that are then made
        try:
            world = World(Path(folder))
            found = targets(world)
            for number_ in range(count):
                case = draw(found, rng)
                faulthandler.dump_traceback_later(LIMIT, exit=True)
                outcome, bug = judge(case)
                faulthandler.cancel_dump_traceback_later()
                outcomes["bug" if bug else outcome] += 1
                if bug:
                    report(f"{number_}: {case}\n    {bug}")
            if not world.unchanged():
                outcomes["bug"] += 1
                report("The fitted estimators answer differently after all these calls.")
        finally:
            os.chdir(here)
    return outcomes


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("MPLBACKEND", "Agg")
    outcomes = run(arguments.count, arguments.seed)
    print(f"{sum(outcomes.values())} calls, seed {arguments.seed}:")
    for outcome, n in outcomes.most_common():
        print(f"{n:>8}  {outcome}")
    return 1 if outcomes["bug"] else 0


if __name__ == "__main__":
    sys.exit(main())
