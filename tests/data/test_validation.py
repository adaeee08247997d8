"""What X and y may be, and how they reach the network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st

from sinfkit import CalibrationWarning, FrozenModel, SINFClassifier
from sinfkit.data import (
    Batcher,
    hold_out,
    match_classes,
    validate_weight,
    validate_X,
    validate_y,
    warn_if_mismatched,
)


def batcher(batch_size=4, dtype=torch.float32, **normalisation):
    frozen = FrozenModel(small_cnn(), **normalisation)
    return Batcher(frozen, torch.device("cpu"), dtype, batch_size)


def test_batches_cover_the_rows_in_order_and_are_normalised():
    X = np.arange(11 * 2, dtype=np.float32).reshape(11, 2, 1, 1)
    b = batcher(mean=[1.0, 2.0], std=[2.0, 4.0])
    expected = (X - np.array([1, 2]).reshape(1, 2, 1, 1)) / np.array([2, 4]).reshape(1, 2, 1, 1)
    parts = list(b(X))
    assert [len(p) for p in parts] == [4, 4, 3]
    np.testing.assert_allclose(torch.cat(parts).numpy(), expected)
    rows = np.array([7, 0, 3, 3, 10])
    np.testing.assert_allclose(torch.cat(list(b(X, rows))).numpy(), expected[rows])
    np.testing.assert_allclose(torch.cat(list(b.raw(X))).numpy(), X)


def test_uint8_is_divided_by_255_and_read_only_arrays_are_copied():
    X = np.full((3, 1, 2, 2), 51, dtype=np.uint8)
    X.setflags(write=False)
    out = batcher().load(X)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.full((3, 1, 2, 2), 0.2))
    floats = np.ones((3, 1, 2, 2), dtype=np.float32)
    batcher(mean=[1.0]).normalise(batcher().load(floats)).zero_()
    assert (floats == 1).all()  # the caller's array is never written to


def test_integer_labels_are_output_indices_others_are_sorted():
    table = match_classes(np.array([2, 0, 1]), 3, None)
    assert table.classes.tolist() == [0, 1, 2] and table.outputs.tolist() == [0, 1, 2]
    table = match_classes(np.array(["b", "a"]), 2, None)
    assert table.classes.tolist() == ["a", "b"] and table.outputs.tolist() == [0, 1]
    table = match_classes(np.array(["b", "a", "c"]), 3, ["c", "a", "b"])
    assert table.classes.tolist() == ["a", "b", "c"] and table.outputs.tolist() == [1, 2, 0]
    assert table.encode(np.array(["c", "a"])).tolist() == [2, 0]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 9))
def test_outputs_and_labels_agree_whatever_their_order(seed, k):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(100)[:k] - 50
    chosen = rng.permutation(labels)[: rng.integers(1, k + 1)]
    table = match_classes(labels, k, labels.tolist(), classes=chosen)
    assert table.classes.tolist() == sorted(chosen)
    assert labels[table.outputs].tolist() == table.classes.tolist()
    codes = table.encode(labels)
    assert all((c == -1) != (label in chosen) for c, label in zip(codes, labels, strict=True))


@pytest.mark.parametrize(
    ("y", "n", "model_classes", "match"),
    [
        ([0, 1, 5], 3, [0, 1, 2], "does not know: 5"),
        ([0, 1], 3, None, "No calibration samples for class.es. 2"),
        (["a", "b"], 3, None, "2 distinct labels, but the model has 3 outputs"),
        ([0, 1, 2], 3, [0, 1], "3 outputs"),
        ([0, 1, 2], 3, [0, 1, 1], "twice"),
    ],
)
def test_labels_that_do_not_fit(y, n, model_classes, match):
    with pytest.raises(ValueError, match=match):
        match_classes(np.array(y), n, model_classes)


def test_y_is_checked():
    assert validate_y(torch.tensor([1, 0]), 2).tolist() == [1, 0]
    for y, match in (
        (None, "y"),
        (np.array([0.5, 1.2, 3.3]), "Unknown label type|continuous"),
        (np.array([0, 1]), "3 samples"),
        (np.array([0.0, np.nan, 1.0]), "NaN"),
        (np.array(["2020-01-01"] * 3, dtype="M8[D]"), "y must hold class labels, got dates"),
        (np.eye(3), r"one label per sample, got shape \(3, 3\).*y.argmax"),
        (np.array([0, None, 1]), r"integers or strings, got objects \(NoneType, int\)"),
        (np.ma.masked_array([0, 1, 2], [False, True, False]), "y is a masked array"),
    ):
        with pytest.raises(ValueError, match=match):
            validate_y(y, 3)


def test_values_that_are_not_there_are_no_samples():
    X, y = np.zeros((4, 3)), np.arange(4)
    masked = np.ma.masked_array(X, X == 0)
    for form in (iter(X), (x for x in X), map(abs, X)):
        with pytest.raises(TypeError, match="X gives its values only once"):
            validate_X(SINFClassifier(), form, reset=True)
    with pytest.raises(ValueError, match="X is a masked array"):
        validate_X(SINFClassifier(), masked, reset=True)
    assert validate_X(SINFClassifier(), np.ma.masked_array(X), reset=True).shape == (4, 3)
    with pytest.raises(TypeError, match="y gives its values only once"):
        validate_y(iter(y), 4)
    with pytest.raises(TypeError, match="sample_weight gives its values only once"):
        validate_weight(iter(y), 4)
    with pytest.raises(ValueError, match="sample_weight is a masked array"):
        validate_weight(masked[:, 0], 4)


def test_tensors_that_numpy_has_no_type_for():
    y = torch.tensor([1, 0, 2], dtype=torch.bfloat16)
    assert validate_y(y, 3).tolist() == validate_weight(y, 3).tolist() == [1, 0, 2]


def test_arrays_of_images_are_lists_of_them():
    images = np.empty(3, dtype=object)
    images[:] = list(np.arange(12.0).reshape(3, 1, 2, 2))
    found = validate_X(SINFClassifier(), images, reset=True)
    np.testing.assert_array_equal(found, np.arange(12.0).reshape(3, 1, 2, 2))


def test_mismatch_warning_is_about_chance():
    with pytest.warns(UserWarning, match="no better"):
        warn_if_mismatched(0.12, 10, 400)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_mismatched(0.3, 10, 400)
        warn_if_mismatched(1.0, 1, 5)


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(2, 9), min_size=1, max_size=6),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
)
def test_hold_out_is_stratified_and_disjoint(counts, fraction, seed):
    codes = np.repeat(np.arange(len(counts)), counts)
    fit, held = hold_out(codes, fraction, np.random.default_rng(seed))
    assert sorted([*fit, *held]) == list(range(len(codes)))
    for k, n in enumerate(counts):
        n_held = int((codes[held] == k).sum())
        assert 1 <= n_held < n and abs(n_held - fraction * n) <= 1


def test_hold_out_with_single_samples_uses_all_for_both():
    with pytest.warns(CalibrationWarning, match="single calibration sample"):
        fit, held = hold_out(np.array([0, 1, 1]), 0.2, np.random.default_rng(0))
    assert fit.tolist() == held.tolist() == [0, 1, 2]
