"""What the estimators share: fitting as a whole or not at all, and the cached pass."""

from __future__ import annotations

import pytest
import torch
from helpers import blobs, small_cnn
from sklearn.base import BaseEstimator

from sinfkit import DCSPruner, FrozenModel
from sinfkit._base import all_or_nothing, progress


class Counter(BaseEstimator):
    """Counts, and fails where it is told to."""

    def __init__(self, fail=None):
        self.fail = fail

    @all_or_nothing
    def fit(self, n):
        self.count_ = n
        if n > 1:
            self.many_ = True
        if self.fail is not None:
            raise self.fail("in the middle of fit")
        return self


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_fit_changes_nothing(error):
    counter = Counter().fit(5)
    counter.fail = error
    with pytest.raises(error, match="in the middle"):
        counter.fit(7)
    assert counter.count_ == 5 and counter.many_
    never = Counter(error)
    with pytest.raises(error):
        never.fit(1)
    assert vars(never) == {"fail": error}


def test_a_second_fit_leaves_nothing_of_the_first():
    counter = Counter().fit(5)
    assert counter.fit(1) is counter
    assert counter.count_ == 1 and not hasattr(counter, "many_")


def test_progress_is_silent_unless_asked_for(capsys):
    items = [1, 2]
    assert progress(items, "Items", verbose=0) is items
    assert list(progress(iter(items), "Items", verbose=1, total=2)) == items
    assert "Items" in capsys.readouterr().err


def test_the_estimator_follows_its_device():
    X, y = blobs(per_class=10)
    pruner = DCSPruner(FrozenModel(small_cnn()), device="cpu").fit(X, y)
    assert pruner.to("cpu") is pruner and pruner.device_ == torch.device("cpu")
    with pytest.raises(ValueError, match="not a torch device"):
        pruner.to("nowhere")
