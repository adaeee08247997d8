"""Block-wise reconstruction: parts between cuts, and what training them alone brings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import blobs, randomise_batch_norms, small_cnn
from sklearn.base import clone
from torch import nn

from sinfkit import DCSPruner, Distillation, FrozenModel, SemanticClusterer, SINFClassifier
from sinfkit.graph import output_layer, trace
from sinfkit.repair import parts_of, reconstruct
from sinfkit.slicing import find_groups, slice_channels

pytestmark = pytest.mark.filterwarnings("ignore")


class Residual(nn.Module):
    """A stem, two residual blocks of another width each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 1))
        self.two = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 1))
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.one(x))
        x = torch.relu(x + self.two(x))
        return self.head(x.mean((2, 3)))


def network(kind):
    torch.manual_seed(0)
    made = small_cnn() if kind == "plain" else randomise_batch_norms(Residual())
    return made.eval()


def sliced(graph, x, share):
    groups = find_groups(graph, x, output_layer(graph, 6))
    keep = {
        g.name: np.arange(max(1, round(share * g.n_channels)))
        for g in groups
        if not g.is_output and not g.reason_unsliceable
    }
    return slice_channels(graph, x, keep, groups=groups)


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_parts_one_after_the_other_are_the_network_up_to_its_last_cut(kind, share):
    x = torch.randn(4, 1, 8, 8)
    graph = trace(network(kind), x)
    small = sliced(graph, x, share)
    parts = parts_of(graph, small.model, small.support, x)
    assert len(parts) >= 3
    dense, little = x, x
    for part in parts:
        dense, little = part.dense(dense), part.sliced(little)
        assert part.wanted(dense).shape == little.shape
        if share == 1.0:
            torch.testing.assert_close(dense, little)
    # What is trained is the network itself.
    trained = {id(p) for part in parts for p in part.sliced.parameters()}
    assert trained <= {id(p) for p in small.model.parameters()}
    layers = [m for part in parts for m in part.sliced.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == sum(isinstance(m, nn.Conv2d) for m in small.model.modules())


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_every_part_comes_closer(kind):
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = trace(network(kind), x[:2])

    def errors(steps):
        small = sliced(graph, x[:2], 0.5)
        parts = parts_of(graph, small.model, small.support, x[:4])
        for parameter in small.model.parameters():
            parameter.requires_grad_(True)
        generator = torch.Generator().manual_seed(0)
        how = (torch.ones(len(x)), steps, 32, lambda share: 1e-2, generator)
        with torch.enable_grad():
            return list(reconstruct(parts, x, *how))

    before, after, again = errors(0), errors(40), errors(40)
    assert sum(before) > 0 and after == again
    assert all(b < a or a < 1e-9 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_a_pruner_comes_closer_to_its_base(kind, tmp_path):
    X, y = blobs(per_class=30)
    base = FrozenModel(network(kind))
    x = torch.as_tensor(X)
    with torch.inference_mode():
        wanted = torch.log_softmax(base.module("cpu")(x), 1)

    def far(answers):
        return float((wanted.exp() * (wanted - torch.as_tensor(answers).log())).sum(1).mean())

    how = Distillation(1, block_steps=60, checkpoint=tmp_path)
    plain = DCSPruner(base, budget=0.4, distill=Distillation(1), random_state=0, device="cpu")
    blocks = clone(plain).set_params(distill=how)
    answers = blocks.fit(X, y).predict_proba(X)
    assert far(answers) < far(plain.fit(X, y).predict_proba(X))
    again = clone(blocks).fit(X, y)  # goes on behind the last epoch of the checkpoint
    np.testing.assert_array_equal(again.predict_proba(X), answers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_types_keep_theirs(dtype):
    X, y = blobs(per_class=20)
    model = FrozenModel(network("residual").to(dtype))
    how = Distillation(0, block_steps=5)
    pruner = DCSPruner(model, budget=0.5, distill=how, random_state=0, device="cpu").fit(X, y)
    assert not hasattr(pruner, "distillation_losses_") and pruner.cost_ratio_ <= 0.5
    assert {p.dtype for p in pruner.model_.parameters()} == {dtype}
    assert np.isfinite(pruner.predict_proba(X)).all()


class SequenceFirst(nn.Module):
    """Samples lie along the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 12), nn.Linear(12, 12)
        self.three, self.head = nn.Linear(12, 12), nn.Linear(12, 6)

    def forward(self, x):
        x = torch.relu(self.one(x[:, 0].transpose(0, 1)))
        return self.head(torch.relu(self.three(torch.relu(self.two(x)).mean(0))))


def test_cuts_where_rows_are_no_samples_are_left_out():
    torch.manual_seed(0)
    x = torch.randn(8, 1, 8, 8)
    graph = trace(SequenceFirst().eval(), x[:1])
    small = sliced(graph, x[:1], 0.5)
    parts = parts_of(graph, small.model, small.support, x)
    value = x
    for part in parts:
        value = part.dense(value)
        assert value.shape == (8, 12)
    assert parts


def test_a_routed_network_has_none():
    X, y = blobs(per_class=20)
    sinf = SINFClassifier(
        FrozenModel(network("plain")),
        clusterer=SemanticClusterer(n_clusters=2),
        distill=Distillation(block_steps=5),
    )
    with pytest.raises(ValueError, match=r"distill\.block_steps"):
        sinf.fit(X, y)
    with pytest.raises(ValueError, match="block_steps"):
        DCSPruner(network("plain"), distill=Distillation(block_steps=-1)).fit(X, y)
