"""Samples on another scale than the network was trained on are told by its answers."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sinfkit import DCSPruner, FrozenModel, PruningOptions

K, SHAPE = 5, (3, 6, 6)
PATTERNS = (
    np.random.default_rng(7).normal(size=(K, *SHAPE)) + np.array([0.9, 0, -0.9])[:, None, None]
)


def pictures(seed, n=100):
    """Bytes, of which classes are told by patterns that differ from channel to channel."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % K
    z = PATTERNS[y] + 0.5 * rng.normal(size=(n, *SHAPE))
    return np.clip(128 + 40 * z, 0, 255).astype(np.uint8), y


def network(scale, middle):
    """The nearest pattern, of images that are ``middle + pattern / scale``."""
    flat = torch.as_tensor(PATTERNS.reshape(K, -1)).float()
    first, last = nn.Conv2d(3, 3, 1), nn.Linear(flat.shape[1], K)
    with torch.no_grad():
        first.weight.copy_(scale * torch.eye(3)[:, :, None, None])
        first.bias.fill_(-scale * middle)
        last.weight.copy_(flat)
        last.bias.copy_(-flat.square().sum(1) / 2)
    return nn.Sequential(first, nn.Flatten(), last)


def fitted(model, X, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        options = PruningOptions(validation_fraction=0, allow_unsliceable=True)
        return DCSPruner(
            model, criterion="l1", budget=1.0, repair="none", options=options, device="cpu"
        ).fit(X, y)


UNIT = (255 / 40, 128 / 255)  # takes 0 to 1
NORMAL = (1.0, 0.0)
BYTES = (1 / 40, 128.0)  # takes 0 to 255
SPREAD = {"mean": [128 / 255] * 3, "std": [40 / 255] * 3}
FORMS = {
    "uint8": lambda p: p,
    "float up to 255": lambda p: p.astype(np.float32),
    "int64": lambda p: p.astype(np.int64),
    "uint16": lambda p: p.astype(np.uint16) * 257,
    "up to 1": lambda p: (p / 255).astype(np.float32),
    "double up to 1": lambda p: p / 255,
    "normalised": lambda p: ((p - 128.0) / 40).astype(np.float32),
    "reversed": lambda p: p[:, ::-1],
    "reversed, up to 1": lambda p: p[:, ::-1] / 255,
}
# What each network takes: scale, middle, and what is said of mean and std.
TAKES = {
    "unit": (*UNIT, {}),
    "bytes": (*BYTES, {}),
    "with mean and std": (*NORMAL, SPREAD),
    "normalised": (*NORMAL, {}),
}
# What it is told where it gets something else; None where that is right.
TOLD = {
    **{("unit", form): None for form in ("uint8", "up to 1", "double up to 1")},
    **{("unit", form): "divided by 255" for form in ("float up to 255", "int64")},
    ("unit", "uint16"): "divided by 65535: pass X / 65535",
    **{("unit", form): "channels in reverse" for form in ("reversed", "reversed, up to 1")},
    **{("bytes", form): None for form in ("float up to 255", "int64")},
    **{("bytes", form): r"pass X \* 255" for form in ("up to 1", "double up to 1")},
    ("bytes", "uint8"): "pass X.astype",
    **{("with mean and std", form): None for form in ("uint8", "up to 1", "double up to 1")},
    **{
        ("with mean and std", form): "Pass uint8, or X / 255"
        for form in ("float up to 255", "int64")
    },
    ("with mean and std", "uint16"): "Pass X / 65535",
    ("with mean and std", "normalised"): "seem to be applied already",
    ("with mean and std", "reversed"): "channels in reverse",
    ("normalised", "normalised"): None,
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=st.sampled_from(sorted(TOLD)), as_tensor=st.booleans(), seed=st.integers(0, 99))
def test_another_scale_is_refused_with_the_remedy_and_the_right_one_is_not(case, as_tensor, seed):
    (takes, form), says = case, TOLD[case]
    scale, middle, normalisation = TAKES[takes]
    model = FrozenModel(network(scale, middle), **normalisation)
    p, y = pictures(seed)
    X = FORMS[form](p)
    X = torch.as_tensor(np.ascontiguousarray(X)) if as_tensor else X
    try:
        pruner = fitted(model, X, y)
    except ValueError as error:
        assert says is not None and re.search(says, str(error)), str(error)
    else:  # on a wrong scale, too, answers may be right
        assert (pruner.predict(X) == y).mean() > 0.85


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), form=st.sampled_from(["uint8", "up to 1", "float up to 255"]))
def test_a_network_that_knows_nothing_is_no_matter_of_scale(seed, form):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K)
    )
    rng = np.random.default_rng(seed)
    p, _ = pictures(seed)
    y = np.where(rng.random(len(p)) < 0.6, 0, rng.integers(0, K, len(p)))  # most of one class
    y[:K] = range(K)
    fitted(model, FORMS[form](p), y)


def test_labels_decide_and_not_the_range():
    p, y = pictures(0)
    X = FORMS["normalised"](p)
    # The network was trained on what `mean` and `std` make of values that are centred already.
    model = FrozenModel(network(0.5, -0.2), mean=[0.1] * 3, std=[0.5] * 3)
    assert (fitted(model, X, y).predict(X) == y).mean() > 0.9
    with pytest.raises(ValueError, match="applied already"):
        fitted(FrozenModel(network(*NORMAL), mean=[3.0] * 3, std=[0.2] * 3), X, y)
