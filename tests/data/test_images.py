"""Data sets, loaders, PIL images and memory maps: the same answers as arrays, read in batches."""

from __future__ import annotations

import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from sinfkit import DCSPruner, FrozenModel, SemanticClusterer, train_network
from sinfkit.data import Batcher, LazyImages, images_of, with_labels


class Counting(Dataset):
    """Images with labels, of which it knows how many are alive and how often one was read."""

    def __init__(self, X, y, form="tensor"):
        self.X, self.y, self.form = X, y, form
        self.n_read = 0

    def __len__(self):
        return len(self.X)

    def image(self, i):
        x = self.X[i]
        if self.form == "tensor":
            return torch.from_numpy(x)
        if self.form == "pil":
            return Image.fromarray(x[0] if len(x) == 1 else x.transpose(1, 2, 0))
        return x

    def __getitem__(self, i):
        self.n_read += 1
        if self.form == "dict":
            return {"image": self.X[i], "label": int(self.y[i])}
        return self.image(i), self.y[i]


@pytest.fixture(scope="module")
def data():
    X, y = blobs(n_classes=4, per_class=40)
    return ((X - X.min()) / (X.max() - X.min()) * 255).astype(np.uint8), y


@pytest.fixture(scope="module")
def frozen(data):
    X, y = data
    return FrozenModel(train_network(small_cnn(4), X, y, epochs=8, batch_size=32, random_state=0))


def estimators(frozen):
    common = {"device": "cpu", "random_state": 0, "batch_size": 32}
    yield DCSPruner(frozen, criterion="l1", budget=0.6, repair="mean", **common)
    yield SemanticClusterer(frozen, n_clusters=2, **common)


def quiet(estimator, *data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return estimator.fit(*data)


@pytest.mark.parametrize("form", ["tensor", "array", "pil", "dict", "loader", "subset", "both"])
def test_fit_and_predict_are_those_of_arrays(form, data, frozen):
    X, y = data
    if form == "loader":
        given = DataLoader(Counting(X, y), batch_size=7, shuffle=True, num_workers=2)
    elif form == "subset":
        order = np.random.default_rng(0).permutation(len(X))
        given = Subset(Counting(X[order], y[order]), np.argsort(order).tolist())
    elif form == "both":
        given = ConcatDataset(
            [Counting(X[:50], y[:50]), TensorDataset(*map(torch.tensor, (X[50:], y[50:])))]
        )
    else:
        given = Counting(X, y, form)
    for one, other in zip(estimators(frozen), estimators(frozen), strict=True):
        quiet(one, X, y)
        quiet(other, given)
        np.testing.assert_array_equal(other.predict(given), one.predict(X))
        np.testing.assert_allclose(other.transform(given), one.transform(X), atol=1e-6)
        if hasattr(one, "score"):
            assert other.score(given) == one.score(X, y)
        assert pickle.loads(pickle.dumps(other)).input_shape_ == X.shape[1:]


def test_sample_weights_of_zero_leave_images_unread(data, frozen):
    X, y = data
    weight = (np.arange(len(X)) % 3 > 0).astype(float)
    one, other = (next(estimators(frozen)) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        one.fit(X, y, weight)
        other.fit(Counting(X, y), sample_weight=weight)
    np.testing.assert_array_equal(one.predict(X), other.predict(X))


def test_no_more_than_a_batch_is_in_memory(data, frozen):
    """Rows come when they are asked for, and none is kept."""
    X, y = data
    dataset = Counting(X, y)
    lazy = images_of(dataset)
    assert lazy.shape == X.shape and lazy.dtype == np.uint8 and len(lazy) == len(X)
    before = dataset.n_read
    np.testing.assert_array_equal(lazy[5:9], X[5:9])
    np.testing.assert_array_equal(lazy[np.array([3, 1, 3])], X[[3, 1, 3]])
    np.testing.assert_array_equal(lazy.subset(np.array([8, 2]))[:], X[[8, 2]])
    assert dataset.n_read - before == 9


@pytest.mark.parametrize("n", [60, 300])
def test_what_is_read_is_let_go_again(n, data, frozen, monkeypatch):
    """Never more images at once than a few batches, however many there are."""
    X, y = (np.tile(part, (-(-n // len(part)), *[1] * (part.ndim - 1)))[:n] for part in data)
    alive, most, read = weakref.WeakValueDictionary(), [0], LazyImages.__getitem__

    def watched(self, rows):
        batch = read(self, rows)
        alive[id(batch)] = batch
        most[0] = max(most[0], sum(len(one) for one in alive.values()))
        return batch

    monkeypatch.setattr("sinfkit.data.images.LOOKED_AT", 32)
    monkeypatch.setattr(LazyImages, "__getitem__", watched)
    dataset = Counting(X, y)
    for estimator in estimators(frozen):
        quiet(estimator.set_params(batch_size=16), dataset).predict(dataset)
    assert 0 < most[0] <= 64


def test_memory_maps_are_read_in_batches(tmp_path, data, frozen, monkeypatch):
    X, y = data
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    loads, load = [], Batcher.load

    def watched(self, rows):
        # A part of the file itself, and no copy of all of it.
        loads.append(np.shares_memory(rows, mapped) or len(rows) <= 32)
        return load(self, rows)

    monkeypatch.setattr(Batcher, "load", watched)
    for one, other in zip(estimators(frozen), estimators(frozen), strict=True):
        quiet(one, X, y)
        loads.clear()
        quiet(other, mapped, y)
        found = other.predict(mapped)
        assert loads and all(loads)
        np.testing.assert_array_equal(found, one.predict(X))


@pytest.fixture(scope="module")
def pruner(data, frozen):
    return quiet(next(estimators(frozen)), *data)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["float", "float64", "int64", "int32", "unit", "pil", "tensor"]),
    seed=st.integers(0, 50),
)
def test_pixels_of_data_sets_are_those_of_fit(kind, seed, data, pruner):
    X, y = data
    rows = np.random.default_rng(seed).integers(0, len(X), 20)
    part = X[rows].copy()
    part[:, 0, 0, 0] = 255
    made = {
        "float": part.astype(np.float32),
        "float64": part.astype(np.float64),
        "int64": part.astype(np.int64),
        "int32": part.astype(np.int32),
        "unit": (part / 255).astype(np.float32),
    }.get(kind, part)
    dataset = Counting(made, y[rows], kind if kind in ("pil", "tensor") else "array")
    np.testing.assert_allclose(pruner.predict_proba(dataset), pruner.predict_proba(part), atol=1e-5)


def test_a_list_of_pil_images_is_one_of_images(data, frozen):
    X, y = data
    pictures = [Image.fromarray(x[0]) for x in X]
    pruner = quiet(next(estimators(frozen)), pictures, y)
    np.testing.assert_array_equal(pruner.predict(pictures[:9]), pruner.predict(X[:9]))
    assert images_of([p.convert("RGBA") for p in pictures[:2]]).shape == (2, 3, 8, 8)


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()


class Random(Counting):
    def image(self, i):
        return torch.rand(1, 8, 8)


class Uneven(Counting):
    def image(self, i):
        return torch.zeros(1, 8, 8 + i % 2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda X, y: Stream(), "IterableDataset"),
        (lambda X, y: DataLoader(Stream()), "IterableDataset"),
        (lambda X, y: Random(X, y), "transform is random"),
        (lambda X, y: Uneven(X, y), "Resize"),
        (lambda X, y: Counting(X[:0], y[:0]), "0 samples"),
        (
            lambda X, y: DataLoader(
                Counting(X, y), sampler=WeightedRandomSampler(np.ones(len(X)), len(X))
            ),
            "WeightedRandomSampler",
        ),
        (lambda X, y: Counting(np.full((9, 1, 8, 8), np.nan, np.float32), y), "NaN"),
        (lambda X, y: Counting(X.repeat(2, axis=1), y, "array"), "cannot take samples"),
        (lambda X, y: Counting(X.transpose(0, 2, 3, 1), y, "array"), "NHWC"),
    ],
)
def test_data_sets_that_do_not_do(make, match, data, frozen):
    with pytest.raises((TypeError, ValueError), match=match):
        quiet(next(estimators(frozen)), make(*data))


def test_labels_come_from_where_the_data_set_keeps_them(data):
    X, y = data
    plain = Counting(X, y)
    np.testing.assert_array_equal(with_labels(plain, None)[1], y)
    plain.targets = y.tolist()
    before = plain.n_read
    np.testing.assert_array_equal(with_labels(Subset(plain, [5, 3]), None)[1], y[[5, 3]])
    assert plain.n_read - before < 10
    plain.targets = y[::-1].tolist()  # not what it gives
    np.testing.assert_array_equal(with_labels(plain, None)[1], y)
    assert with_labels(plain, [1])[1] == [1] and with_labels(X, None)[1] is None


def halved(batch):
    """A collate function that changes the images, as those do that normalise."""
    images, labels = zip(*batch, strict=True)
    return torch.stack([image / 2 for image in images]), torch.tensor(labels)


@pytest.mark.parametrize("form", ["tuple", "dict", "item"])
def test_a_loader_gives_what_it_collates(form, data):
    X, y = data
    functions = {
        "tuple": halved,
        "dict": lambda batch: dict(zip(("image", "label"), halved(batch), strict=True)),
        "item": lambda item: (item[0] / 2, item[1]),
    }
    loader = DataLoader(
        Counting(X, y), collate_fn=functions[form], batch_size=None if form == "item" else 16
    )
    images, labels = with_labels(loader, None)
    np.testing.assert_allclose(images[:5], X[:5] / 2)
    np.testing.assert_array_equal(labels, y)


class OneOfEach:
    """Batches that are drawn in a way of their own."""

    def __init__(self, y):
        self.y = np.asarray(y)

    def __len__(self):
        return 1

    def __iter__(self):
        yield [int(np.flatnonzero(self.y == k)[0]) for k in np.unique(self.y)]


def test_a_loader_whose_batches_are_drawn_is_refused(data):
    X, y = data
    with pytest.raises(TypeError, match="OneOfEach"):
        images_of(DataLoader(Counting(X, y), batch_sampler=OneOfEach(y)))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pil_images_of_more_than_eight_bits_keep_their_values(dtype):
    pixels = np.array([[0, 300], [40_000, 65_535]], dtype)
    images = images_of([Image.fromarray(pixels)] * 2)
    assert images.shape == (2, 1, 2, 2)
    np.testing.assert_array_equal(images[:1], pixels[None, None])


def test_items_that_are_dictionaries_say_what_they_lack(data):
    X, _ = data
    with pytest.raises(TypeError, match="'pixel_values'.*has 'inputs', 'target'"):
        images_of(Items([{"inputs": X[0], "target": 1}]))


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]
