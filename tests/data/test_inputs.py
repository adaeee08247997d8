"""X at prediction is what it was in ``fit``, or a clear error; shapes get the hint that helps."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sinfkit import DCSPruner, FrozenModel
from sinfkit.data import validate_X

PROPERTY = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def small_net(channels: int = 3, n_classes: int = 4, seed: int = 0) -> nn.Module:
    """Two convolutions for images of any size, whose answers differ from image to image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, n_classes),
        ).eval()


def fitted(network: nn.Module, X: np.ndarray, mean=None, std=None) -> DCSPruner:
    """A pruner of that network, on its own answers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return DCSPruner(
            FrozenModel(network, mean, std), criterion="l1", budget=0.7, repair="mean", device="cpu"
        ).fit(X)


def images(shape=(24, 3, 8, 8), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def bytes_pruner():
    return fitted(small_net(), images(), mean=[0.5] * 3, std=[0.25] * 3)


@pytest.fixture(scope="module")
def unit_pruner():
    return fitted(small_net(), (images() / 255).astype(np.float32), mean=[0.5] * 3, std=[0.25] * 3)


@pytest.fixture(scope="module")
def wide_pruner():
    mean, std = [128.0] * 3, [64.0] * 3
    return fitted(small_net(), images().astype(np.float32), mean=mean, std=std)


# The same pixels, as people hand them over.
FORMS = {
    "int64": lambda X: X.astype(np.int64),
    "int16": lambda X: X.astype(np.int16),
    "list": lambda X: X.tolist(),
    "float of bytes": lambda X: X.astype(np.float64),
    "float32 of bytes": lambda X: X.astype(np.float32),
    "unit": lambda X: X / 255,
    "tensor": torch.from_numpy,
    "tensor of ints": lambda X: torch.from_numpy(X).long(),
    "tensor of floats": lambda X: torch.from_numpy(X).float(),
    "tensor of units": lambda X: torch.from_numpy(X).float() / 255,
    "normalised": lambda X: (X / 255 - 0.5) / 0.25,
    "centred": lambda X: X.astype(np.float32) - 128,
}


@pytest.mark.parametrize("name", ["bytes_pruner", "unit_pruner", "wide_pruner"])
@PROPERTY
@given(form=st.sampled_from(sorted(FORMS)), seed=st.integers(0, 99), n=st.integers(1, 9))
def test_pixels_in_any_form_are_answered_rightly_or_refused(request, name, form, seed, n):
    pruner, X = request.getfixturevalue(name), images((n, 3, 8, 8), seed + 1)
    X[0, 0, 0, :2] = 0, 255
    as_in_fit = {
        "bytes_pruner": X,
        "unit_pruner": (X / 255).astype(np.float32),
        "wide_pruner": X.astype(np.float32),
    }
    expected = pruner.predict_proba(as_in_fit[name])
    try:
        found = pruner.predict_proba(FORMS[form](X))
    except ValueError as error:
        assert "fit" in str(error) and "X" in str(error)
        return
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_which_forms_are_taken_and_which_are_refused(bytes_pruner, unit_pruner, wide_pruner):
    X = images((5, 3, 8, 8), 7)
    X[0, 0, 0, :2] = 0, 255
    for pruner, refused in (
        (bytes_pruner, {"normalised", "centred"}),
        (
            unit_pruner,
            {"normalised", "centred", "float of bytes", "float32 of bytes", "tensor of floats"},
        ),
        (wide_pruner, {"normalised", "centred", "unit", "tensor", "tensor of units"}),
    ):
        for form in FORMS:
            if form in refused:
                with pytest.raises(ValueError, match="in fit"):
                    pruner.predict(FORMS[form](X))
            else:
                pruner.predict(FORMS[form](X))


@pytest.mark.parametrize(
    ("X", "mean", "match"),
    [
        (images(), [123.7, 116.3, 103.5], "divided by 255"),
        (images().astype(np.float32), [0.48, 0.45, 0.41], "scale from 0 to 1"),
        (images().astype(np.int64), [0.48, 0.45, 0.41], "scale from 0 to 1"),
        (images((24, 8, 8, 3)), [0.48, 0.45, 0.41], "NHWC"),
    ],
)
def test_a_normalisation_of_another_scale_is_refused(X, mean, match):
    with pytest.raises(ValueError, match=match):
        fitted(small_net(), X, mean=mean, std=[0.25 * max(1, mean[0])] * 3)


@PROPERTY
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(5, 12),
    width=st.integers(5, 12),
    wrong=st.sampled_from(["one", "nhwc", "one hwc", "flat", "channels", "grey", "size"]),
    seed=st.integers(0, 9),
)
def test_a_wrong_shape_gets_a_hint_at_prediction(channels, height, width, wrong, seed):
    X = images((6, channels, height, width), seed)
    pruner = DCSPruner()
    pruner.input_shape_, pruner.n_features_in_ = X.shape[1:], channels
    given, hint = {
        "one": (X[0], r"X\[None\]"),
        "nhwc": (X.transpose(0, 2, 3, 1), r"X.transpose\(0, 3, 1, 2\)"),
        "one hwc": (X[0].transpose(1, 2, 0), r"transpose\(2, 0, 1\)\[None\]|X\[:, None\]"),
        "flat": (X.reshape(6, -1)[:, 1:], "takes samples of shape"),
        "channels": (X.repeat(4, axis=1)[:, :4], r"X\[:, :3\]|takes samples of shape"),
        "grey": (X[:, 0], r"X\[:, None\]|takes samples of shape"),
        "size": (X[:, :, 1:], "takes samples of shape"),
    }[wrong]
    with pytest.raises(ValueError, match=hint):
        validate_X(pruner, given, reset=False)


@pytest.mark.parametrize(
    ("X", "hint"),
    [
        (images((8, 9, 9, 3)), r"X.transpose\(0, 3, 1, 2\)"),
        (images((3, 9, 9)), r"X\[None\]"),
        (images((9, 9, 3)), r"transpose\(2, 0, 1\)\[None\]"),
        (images((8, 1, 9, 9)), r"X.repeat\(3, axis=1\)"),
        (images((8, 4, 9, 9)), r"X\[:, :3\]"),
    ],
)
def test_a_wrong_shape_gets_a_hint_in_fit(X, hint):
    with pytest.raises(ValueError, match=hint):
        DCSPruner(small_net(), device="cpu").fit(X, np.arange(len(X)) % 4)


@settings(PROPERTY, max_examples=12)
@given(
    channels=st.integers(2, 9),
    height=st.integers(4, 40),
    width=st.sampled_from([1, 3, 4]),
    with_mean=st.booleans(),
)
def test_narrow_images_are_not_taken_for_nhwc(channels, height, width, with_mean):
    network = small_net(channels)
    normalisation = {"mean": [0.0] * channels, "std": [1.0] * channels} if with_mean else {}
    X = np.random.default_rng(0).normal(size=(12, channels, height, width)).astype(np.float32)
    assert fitted(network, X, **normalisation).input_shape_ == (channels, height, width)


class MeanOverBatch(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


@PROPERTY
@given(
    kind=st.sampled_from(["norm 2d", "norm 1d", "mean", "norm, affine"]),
    n=st.integers(8, 20),
    seed=st.integers(0, 20),
)
def test_answers_that_depend_on_batch_mates_are_refused(kind, n, seed):
    network = small_net(seed=seed)
    part, place = {
        "norm 2d": (nn.BatchNorm2d(6, affine=False, track_running_stats=False), 1),
        "norm, affine": (nn.BatchNorm2d(6, track_running_stats=False), 1),
        "norm 1d": (nn.BatchNorm1d(8, track_running_stats=False), 6),
        "mean": (MeanOverBatch(), 6),
    }[kind]
    network.insert(place, part)
    X = np.random.default_rng(seed).normal(size=(n, 3, 8, 8)).astype(np.float32)
    told = "one sample alone|others of its batch|could not be followed"
    with pytest.raises(ValueError, match=told):
        DCSPruner(network.eval(), budget=0.7, device="cpu").fit(X, np.arange(n) % 4)


def test_running_statistics_are_no_batch_statistics():
    network = small_cnn()
    X = np.random.default_rng(0).normal(size=(12, 1, 8, 8)).astype(np.float32)
    fitted(network, X)


@pytest.mark.parametrize("fitted", ["bytes_pruner", "unit_pruner"])
@pytest.mark.parametrize("form", ["float", "bytes", "tensor"])
def test_samples_that_are_next_to_black_are_warned_of(request, fitted, form):
    pruner = request.getfixturevalue(fitted)
    shape = (5, *pruner.input_shape_)
    X = np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)
    twice = {
        "float": X / 255,
        "tensor": torch.as_tensor(X / 255),
        "bytes": np.ones(shape, np.uint8),
    }
    with pytest.warns(UserWarning, match="next to black.*divided by 255 twice"):
        pruner.predict(twice[form])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.predict(X)
        pruner.predict(np.zeros(shape, np.float32))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_flattened_samples_and_images_are_told_apart_at_prediction(as_tensor):
    X, y = blobs(n_classes=4, per_class=8)
    flat = X.reshape(len(X), -1)
    model = FrozenModel(small_cnn(n_classes=4), input_shape=X.shape[1:])
    as_given = torch.as_tensor if as_tensor else np.asarray
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_flat = DCSPruner(model, budget=0.8, random_state=0).fit(as_given(flat), y)
        of_images = DCSPruner(model, budget=0.8, random_state=0).fit(as_given(X), y)
    expected = of_flat.predict(as_given(flat))
    np.testing.assert_array_equal(of_flat.predict(as_given(X)), expected)
    with pytest.raises(ValueError, match="flattened say the shape: FrozenModel"):
        DCSPruner(small_net(channels=3), budget=0.8).fit(as_given(np.tile(flat, 3)), y)
    with pytest.raises(ValueError, match=re.escape("X.reshape(-1, 1, 8, 8)")):
        of_images.predict(as_given(flat))
