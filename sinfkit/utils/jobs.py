"""Jobs on joblib's backends: what they take along into another process, and what they share there.

Threads of this process share everything, and nothing here is in their way.  On Dask, Ray or loky a
job is pickled: then it takes the rows that it is for and no others, what all jobs have in common is
sent and unpacked once per process, and a method that answers sample by sample is cut into chunks.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, cast
from uuid import uuid4

import joblib
import numpy as np
import torch
from joblib.parallel import get_active_backend
from sklearn import get_config

from .device import host_tensor, on_host_by_default
from .params import check_integer
from .pickling import Pickled, dump, load

__all__ = ["Rows", "Shared", "elsewhere", "run", "run_with", "with_shared"]

Value = TypeVar("Value")
Method = TypeVar("Method", bound=Callable[..., Any])

_CHUNKS_PER_JOB = 4  # so that a slow worker holds the others up for a quarter of its share at most
_LOCK = threading.RLock()
_UNPACKED: dict[str, Any] = {}


def run(jobs: Iterable[Any], n_jobs: int | None) -> list[Any]:
    """Run `joblib.delayed` calls on the active backend; by default in threads of this process.

    Threads, since the work is in torch, which releases the interpreter, and they share the weights.
    On a worker, jobs stay there: whatever sent the work has given every worker something to do.
    """
    result: list[Any] = joblib.Parallel(**_options(n_jobs))(jobs)
    return result


def _options(n_jobs: int | None) -> dict[str, Any]:
    """How joblib is to run jobs."""
    options: dict[str, Any] = (
        {"require": "sharedmem"} if _on_dask_worker() else {"prefer": "threads"}
    )
    if n_jobs is not None:  # which joblib 1.3 would take for 1, not for the active backend's number
        options["n_jobs"] = n_jobs
    return options


def run_with(
    shared: Any,
    function: Callable[..., Any],
    arguments: Sequence[Sequence[Any]],
    n_jobs: int | None,
) -> list[Any]:
    """Call a function with `shared` in front of each of some arguments, side by side.

    A single call is not worth sending; where calls go elsewhere, `shared` goes once.
    """
    if len(arguments) == 1:
        return [function(shared, *arguments[0])]
    if elsewhere():
        sent = Shared(shared)
        jobs = [joblib.delayed(with_shared)(function, sent, *own) for own in arguments]
    else:
        jobs = [joblib.delayed(function)(shared, *own) for own in arguments]
    result: list[Any] = joblib.Parallel(**_options(n_jobs))(jobs)
    return result


def elsewhere() -> bool:
    """Whether the active backend of joblib runs jobs in other processes."""
    backend = get_active_backend(prefer="threads")[0]
    return not getattr(backend, "supports_sharedmem", False) and not _on_dask_worker()


def _on_dask_worker() -> bool:
    """Whether this is a task of Dask; joblib, which knows when it is nested, does not say so."""
    get_worker = getattr(sys.modules.get("distributed"), "get_worker", None)
    if get_worker is None:
        return False
    try:
        get_worker()
    except ValueError:
        return False
    return True


class Shared(Generic[Value]):
    """What several jobs have in common: its state is taken once, and unpacked once per process."""

    def __init__(self, value: Value) -> None:
        self._value: Value | None = value
        self._pickled: Pickled | None = None
        self._token = uuid4().hex

    def get(self) -> Value:
        """Return the object: itself in its own process, elsewhere the copy."""
        if self._value is None:
            # Not on arrival: that is another thread's, where what cannot be imported would hang
            # Dask, and rebuilding traced networks patches torch for a moment, which a job that
            # runs meanwhile must not see.
            with _LOCK:
                if self._token not in _UNPACKED:
                    _UNPACKED.clear()  # one, or a worker would fill up with old ones
                    assert self._pickled is not None
                    _UNPACKED[self._token] = load(self._pickled)
                self._value, self._pickled = _UNPACKED[self._token], None
        return cast(Value, self._value)

    def __getstate__(self) -> dict[str, Any]:
        if self._pickled is None:
            # Kept, so that all jobs send the same arrays, of which joblib maps large ones once.
            self._pickled = dump(self._value)
        return {"_value": None, "_pickled": self._pickled, "_token": self._token}

    def __sizeof__(self) -> int:
        """Large: Dask sends such arguments once per worker, by itself."""
        return 1 << 20


def with_shared(function: Callable[..., Any], shared: Shared[Any], *args: Any) -> Any:
    """Call a function with the shared object in front; a job's entry."""
    return function(shared.get(), *args)


class Rows:
    """Some rows of an array or a tensor, by their numbers in it; pickled, no others go along."""

    def __init__(self, X: np.ndarray | torch.Tensor, index: np.ndarray) -> None:
        self._X, self._index = X, index
        self._cut = False

    def __getitem__(self, rows: np.ndarray | torch.Tensor) -> Any:
        if self._cut:
            rows = np.searchsorted(self._index, np.asarray(rows))
            return self._X[torch.as_tensor(rows) if isinstance(self._X, torch.Tensor) else rows]
        return self._X[rows]

    def __getstate__(self) -> dict[str, Any]:
        index, X = self._index, self._X
        if not self._cut:
            index = np.unique(index)
            X = X[torch.as_tensor(index) if isinstance(X, torch.Tensor) else index]
        if isinstance(X, torch.Tensor):
            return {"rows": X.cpu().numpy(), "tensor": True, "index": index}
        return {"rows": X, "tensor": False, "index": index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        X = state["rows"]
        if state["tensor"]:
            X = host_tensor(X)  # may be a memory map
        self._X, self._index, self._cut = X, state["index"], True

    def __sizeof__(self) -> int:
        """Bytes of its pickle, roughly."""
        row = int(np.prod(self._X.shape[1:])) * self._X.dtype.itemsize
        return object.__sizeof__(self) + len(self._index) * (row + 8)


def over_chunks(method: Method) -> Method:
    """Let a method that answers sample by sample use the workers of joblib's backend.

    Inside ``joblib.parallel_config("dask")``, or another backend of several processes, chunks of
    `X` go to the workers, and ``self._for_prediction()`` once to each of them.  Otherwise the
    method runs as it is: torch has threads of its own.  A single batch stays here.
    """

    @functools.wraps(method)
    @on_host_by_default()
    def wrapper(self: Any, X: Any) -> Any:
        if not elsewhere() or not hasattr(self, "classes_"):
            return method(self, X)
        data = X
        if isinstance(X, torch.Tensor):
            if X.device.type != "cpu" or get_config()["array_api_dispatch"]:
                return method(self, X)
            data = X.detach().numpy()
        check_integer("batch_size", self.batch_size)
        if not isinstance(data, np.ndarray) or data.ndim < 2 or len(data) <= self.batch_size:
            return method(self, X)
        backend, default = get_active_backend(prefer="threads")
        workers = backend.effective_n_jobs(
            self.n_jobs or (default if isinstance(default, int) else backend.default_n_jobs)
        )
        # Whole batches, the same as here: what is computed does not depend on where.
        n_batches = -(-len(data) // self.batch_size)
        step = -(-n_batches // (_CHUNKS_PER_JOB * max(workers, 1))) * self.batch_size
        twin = Shared(self._for_prediction())
        jobs = (
            joblib.delayed(with_shared)(_answer, twin, method.__name__, data[start : start + step])
            for start in range(0, len(data), step)
        )
        return np.concatenate(run(jobs, self.n_jobs))

    return cast(Method, wrapper)


def _answer(estimator: Any, name: str, X: np.ndarray) -> np.ndarray:
    """Run a method that `over_chunks` has wrapped, without the wrapper and scikit-learn's."""
    answer: np.ndarray = inspect.unwrap(getattr(type(estimator), name))(estimator, X)
    return answer
