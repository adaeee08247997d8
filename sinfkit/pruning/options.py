"""What few users of `DCSPruner` need to set."""

from __future__ import annotations

from typing import Literal

from sklearn.base import BaseEstimator

__all__ = ["PruningOptions"]


class PruningOptions(BaseEstimator):
    """What few users of `DCSPruner` need to set.

    Parameters
    ----------
    budget_unit : {"macs", "params", "latency"}, default="macs"
        With ``schedule="global"``, what a budget counts: multiply-accumulates, parameters, or time,
        measured on this machine with `batch_size` samples at a time.  Measured times are noisy.
    round_to : int, default=1
        The number of filters that stay in a layer is a multiple of it, rounded up: 8 suits most
        hardware in bfloat16.  With ``schedule="global"`` layers whose own width is no multiple are
        left as they come; ``schedule="iterative"`` does not round.
    first_layer : str, optional
        Layers before it stay whole.
    max_ratio : float, optional
        With ``schedule="global"``, the largest share of its filters that any layer may lose, in
        [0, 1).  Default: 0.9, and 0.95 where the budget is searched.
    penalty : float, default=3.0
        Ridge penalty of the probe behind DCS.
    pool_size : int, default=1
        Activations are averaged to ``pool_size x pool_size`` before they are scored.
    repair_samples : int, default=4000
        At most so many of the samples are used for the repair (drawn with `random_state`); every
        sample is scored.  Fewer where the activations of one layer would exceed 2 GiB.
    validation_fraction : float, default=0.2
        Share of the samples of each class, in [0, 1), that is held out to see what accuracy is
        lost.  0: none, then nothing is said about it; with a search or ``schedule="iterative"`` an
        error.  A search holds out up to half of the samples, where fewer can certify nothing.
    n_jobs : int, optional
        Inside ``joblib.parallel_config`` with a backend of processes: workers that predict chunks
        of `X`.  ``fit`` is one job.
    allow_unsliceable : bool, default=False
        Whether to go on where less than 5 % of the multiplications can be sliced.

    Examples
    --------
    >>> from sinfkit import DCSPruner, PruningOptions
    >>> DCSPruner(budget=0.5, options=PruningOptions(round_to=8))
    DCSPruner(budget=0.5, options=PruningOptions(round_to=8))
    """

    def __init__(
        self,
        *,
        budget_unit: Literal["macs", "params", "latency"] = "macs",
        round_to: int = 1,
        first_layer: str | None = None,
        max_ratio: float | None = None,
        penalty: float = 3.0,
        pool_size: int = 1,
        repair_samples: int = 4000,
        validation_fraction: float = 0.2,
        n_jobs: int | None = None,
        allow_unsliceable: bool = False,
    ) -> None:
        self.budget_unit = budget_unit
        self.round_to = round_to
        self.first_layer = first_layer
        self.max_ratio = max_ratio
        self.penalty = penalty
        self.pool_size = pool_size
        self.repair_samples = repair_samples
        self.validation_fraction = validation_fraction
        self.n_jobs = n_jobs
        self.allow_unsliceable = allow_unsliceable
