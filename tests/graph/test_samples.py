"""Where the samples lie: not always along the first axis, and not always one row each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import blobs
from torch import Tensor, nn
from torch.nn import functional as F

from sinfkit import DCSPruner, SINFClassifier
from sinfkit.graph import cut_points, trace

N_CLASSES = 4


class Tokens(nn.Module):
    """Layers over tokens, pixel by pixel; `way` says in which order they see them."""

    def __init__(self, way: str, channels: int) -> None:
        super().__init__()
        self.way, self.stem = way, nn.Conv2d(channels, 12, 3, padding=1)
        kind = nn.Conv2d if way.startswith("maps") else nn.Linear
        more = (1,) if kind is nn.Conv2d else ()
        self.a, self.b = kind(12, 16, *more), kind(16, 12, *more)
        self.out, self.head = nn.Conv2d(12, 10, 1), nn.Linear(10, N_CLASSES)

    def mixed(self, t: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(t)))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        n, c, height, width = h.shape
        if self.way == "tokens":
            t = self.mixed(h.flatten(2).transpose(1, 2)).transpose(1, 2)
        elif self.way == "tokens first":
            t = self.mixed(h.flatten(2).permute(2, 0, 1)).permute(1, 2, 0)
        elif self.way == "tokens in rows":  # rows of an image as samples
            t = self.mixed(h.permute(0, 2, 3, 1).flatten(0, 1)).view(n, height * width, c)
            t = t.transpose(1, 2)
        elif self.way == "tokens alone":
            t = self.mixed(h.permute(0, 2, 3, 1).reshape(-1, c))
            t = t.view(n, height * width, c).transpose(1, 2)
        elif self.way == "maps":
            t = self.mixed(h)
        else:  # halves of an image as samples
            halves = h.view(n, c, 2, height // 2, width).transpose(1, 2).flatten(0, 1)
            t = self.mixed(halves).view(n, 2, c, height // 2, width).transpose(1, 2)
        return self.head(F.relu(self.out(t.reshape(n, c, height, width))).mean((2, 3)))


@pytest.fixture(scope="module")
def data():
    return blobs(n_classes=N_CLASSES, per_class=12)


def fitted(way, data, **settings):
    X, y = data
    torch.manual_seed(0)
    network = Tokens(way, X.shape[1])
    settings = {"schedule": "uniform", "pruning_ratios": (0.25, 0.25)} | settings
    weight = settings.pop("sample_weight", None)
    pruner = DCSPruner(network, random_state=0, device="cpu", **settings)
    return pruner.fit(X, y, sample_weight=weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ways", ["tokens|first|in rows|alone", "maps|in halves"])
@pytest.mark.parametrize(
    ("criterion", "repair"),  # neither knows of the other: what is kept is all they share
    [
        ("dcs_obs", "least_squares"),
        ("dcs", "match"),
        ("taylor", "static_least_squares"),
        ("apoz", "match"),
    ],
)
def test_the_order_in_which_layers_see_samples_does_not_matter(ways, criterion, repair, data):
    first, *others = ways.split("|")
    rng = np.random.default_rng(0)
    settings = {
        "criterion": criterion,
        "repair": repair,
        "sample_weight": rng.integers(1, 4, len(data[0])),
    }
    expected = fitted(first, data, **settings)
    for other in others:
        found = fitted(f"{first} {other}", data, **settings)
        for name, scores in expected.scores_.items():
            np.testing.assert_allclose(found.scores_[name], scores, rtol=2e-3, atol=1e-6)
            np.testing.assert_array_equal(found.support_[name], expected.support_[name])
        X = data[0][:7]
        np.testing.assert_allclose(found.transform(X), expected.transform(X), atol=2e-2)
        if repair != "least_squares":  # which draws positions to hold out
            np.testing.assert_allclose(found.predict_proba(X), expected.predict_proba(X), atol=2e-3)


@pytest.mark.parametrize(
    "way", ["tokens first", "tokens in rows", "tokens alone", "maps in halves"]
)
def test_a_network_is_cut_only_where_samples_are_whole(way, data):
    network = Tokens(way, data[0].shape[1]).eval()
    graph = trace(network, torch.as_tensor(data[0][:1]))
    assert [cut.name for cut in cut_points(graph)] == ["stem", "b", "out"]


class Sequence(nn.Module):
    """torch's encoder, with its default order of axes or the other one."""

    def __init__(self, channels: int, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        self.stem, self.batch_first = nn.Conv2d(channels, 8, 2, 2), batch_first
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        t = self.stem(x).flatten(2)
        if self.batch_first:
            return self.head(self.encoder(t.transpose(1, 2))).mean(1)
        return self.head(self.encoder(t.permute(2, 0, 1))).mean(0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pruner", "classifier"])
def test_encoders_take_both_orders(kind, data):
    X, y = data
    answers = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        network = Sequence(X.shape[1], batch_first)
        if kind == "pruner":
            pruner = DCSPruner(network, criterion="taylor", budget=0.7, random_state=0)
            pruner.fit(X, y)
            answers.append(pruner.transform(X))
            assert len(answers[-1]) == len(X)
        else:
            sinf = SINFClassifier(network, max_accuracy_drop=0.5, random_state=0).fit(X, y)
            answers.append(sinf.predict_proba(X))
    if kind == "pruner":
        np.testing.assert_allclose(*answers, atol=1e-2)


class Mixer(nn.Module):
    """Layers that mix tokens, each channel for itself, beside those that mix channels."""

    def __init__(self, channels: int, tokens: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 2, 2)
        self.tokens = nn.Sequential(nn.Linear(tokens, 6), nn.GELU(), nn.Linear(6, tokens))
        self.channels = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        t = self.stem(x).flatten(2).transpose(1, 2)
        t = t + self.tokens(t.transpose(1, 2)).transpose(1, 2)
        return self.head((t + self.channels(t)).mean(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("repair", ["least_squares", "match", "static_least_squares"])
def test_channels_may_be_positions_of_another_layer(repair, data):
    X, y = data
    torch.manual_seed(0)
    network = Mixer(X.shape[1], (X.shape[2] // 2) * (X.shape[3] // 2))
    pruner = DCSPruner(network, budget=0.5, repair=repair, random_state=0).fit(X, y)
    assert pruner.cost_ratio_ <= 0.5
    assert len(pruner.support_["stem"]) < 8


class Flipped(Tokens):
    """Answers to an image and its mirror image are averaged, in one batch."""

    def forward(self, x: Tensor) -> Tensor:
        here, there = super().forward(torch.cat([x, x.flip(-1)])).chunk(2)
        return (here + there) / 2


def test_forms_of_all_samples_one_after_the_other_are_refused(data):
    X, y = data
    with pytest.raises(ValueError, match="several forms of its samples.*average its answers"):
        DCSPruner(Flipped("maps", X.shape[1]), budget=0.5).fit(X, y)
