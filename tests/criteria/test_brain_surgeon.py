"""Structured optimal brain surgeon: costs by hand, and on real layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import blobs, randomise_batch_norms, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sinfkit.criteria.brain_surgeon as obs
import sinfkit.repair.moments as moments
from sinfkit import DCSPruner
from sinfkit.criteria import (
    CRITERIA,
    Consumer,
    LayerData,
    costs_in_order,
    gather_consumers,
    removal_costs,
    weigh_outputs,
)
from sinfkit.graph import trace
from sinfkit.pruning import select_top
from sinfkit.repair import repair
from sinfkit.slicing import find_groups, slice_channels


def consumer(x: torch.Tensor, weight: torch.Tensor, cells: int, name: str = "next") -> Consumer:
    """A layer with one block whose inputs are `cells` neighbouring columns for each channel."""
    n = x.shape[1] // cells
    columns = ((np.arange(n * cells).reshape(n, cells), np.arange(n)),)
    return Consumer(name, x.T.cov(correction=0)[None], weight[None], columns)


def correlated(n_inputs: int, seed: int, n: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_inputs, n_inputs, generator=generator, dtype=torch.float64)
    return torch.randn(n, n_inputs, generator=generator, dtype=torch.float64) @ mixing


@pytest.fixture
def exact(monkeypatch):
    """Next to no damping: what the formula says."""
    monkeypatch.setattr(obs, "_DAMPING", 1e-10)


@pytest.mark.parametrize("cells", [1, 4])
def test_costs_are_what_least_squares_cannot_win_back(exact, cells):
    x = correlated(6 * cells, seed=cells)
    x = x - x.mean(0)
    weight = torch.randn(3, 6 * cells, generator=torch.Generator().manual_seed(1)).double()
    y = x @ weight.T
    found = removal_costs([consumer(x, weight, cells)], 6)
    # By hand: leave out whichever channel hurts least, refit, and go on.
    left, expected = list(range(6)), torch.zeros(6, dtype=torch.float64)
    while left:
        losses = {}
        for unit in left:
            rest = [u * cells + i for u in left if u != unit for i in range(cells)]
            fit = torch.linalg.lstsq(x[:, rest], y).solution if rest else None
            residual = y if fit is None else y - x[:, rest] @ fit
            losses[unit] = float(residual.square().sum() / y.square().sum())
        unit = min(losses, key=losses.__getitem__)
        expected[unit] = losses[unit]
        left.remove(unit)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_consumers_count_alike_whatever_their_scale(exact):
    x, z = correlated(5, seed=0), correlated(5, seed=1)
    w, v = (torch.randn(2, 5, generator=torch.Generator().manual_seed(i)).double() for i in (2, 3))
    small = removal_costs([consumer(x, w, 1, "a"), consumer(z, v, 1, "b")], 5)
    large = removal_costs([consumer(x, 100 * w, 1, "a"), consumer(z * 7, v, 1, "b")], 5)
    torch.testing.assert_close(small, large)
    assert float(small.max()) == pytest.approx(2.0, rel=1e-4)  # all of both is lost at the end


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 40), st.randoms(use_true_random=False))
def test_costs_are_shares_and_follow_their_channels(seed, n_channels, random):
    x = correlated(n_channels, seed)
    weight = torch.randn(4, n_channels, generator=torch.Generator().manual_seed(seed)).double()
    found = removal_costs([consumer(x, weight, 1)], n_channels)
    assert bool(torch.isfinite(found).all()) and float(found.min()) >= 0
    assert float(found.max()) <= 1 + 1e-9
    order = list(range(n_channels))
    random.shuffle(order)
    permuted = removal_costs([consumer(x[:, order], weight[:, order], 1)], n_channels)
    torch.testing.assert_close(permuted, found[order], rtol=1e-6, atol=1e-9)


def test_runs_leave_together_at_their_joint_cost(exact):
    x = correlated(6, seed=4)
    x[:, 3] = x[:, 0]  # alone either can be spared, together they cannot
    weight = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double()
    weight[:, [0, 3]] *= 3
    x = x - x.mean(0)
    y = x @ weight.T
    found = removal_costs([consumer(x, weight, 1)], 6, n_groups=2)
    left, expected = [0, 1, 2], torch.zeros(3, dtype=torch.float64)
    while left:
        losses = {}
        for unit in left:
            rest = [u + 3 * run for u in left if u != unit for run in (0, 1)]
            fit = torch.linalg.lstsq(x[:, rest], y, driver="gelsd").solution if rest else None
            residual = y if fit is None else y - x[:, rest] @ fit
            losses[unit] = float(residual.square().sum() / y.square().sum())
        unit = min(losses, key=losses.__getitem__)
        expected[unit] = losses[unit]
        left.remove(unit)
    torch.testing.assert_close(found, expected.repeat(2), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cells", [1, 3])
def test_losses_in_a_given_order_are_those_of_least_squares(exact, cells, monkeypatch):
    monkeypatch.setattr(obs, "_IN_ORDER", 4)  # several looks at all channels
    x = correlated(10 * cells, seed=cells)
    x = x - x.mean(0)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(n, 10 * cells, generator=generator).double() for n in (3, 5)]
    readers = [consumer(x, w, cells, name) for w, name in zip(weights, "ab", strict=True)]
    order = np.random.default_rng(cells).permutation(10)
    found = costs_in_order(readers, order)
    for n in range(1, 11):
        rest = [u * cells + i for u in order[n:] for i in range(cells)]
        expected = 0.0
        for weight in weights:
            y = x @ weight.T
            fitted = x[:, rest] @ torch.linalg.lstsq(x[:, rest], y).solution if rest else 0.0
            expected += float((y - fitted).square().sum() / y.square().sum())
        assert found[n - 1] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert costs_in_order([], order).tolist() == [0.0] * 10


@given(st.integers(0, 2**16), st.integers(2, 40))
@settings(max_examples=20, deadline=None)
def test_no_order_loses_less_than_the_greedy_one_at_first(seed, n):
    x = correlated(n, seed)
    weight = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)).double()
    reader = consumer(x, weight, 1)
    greedy = removal_costs([reader], n)
    own = costs_in_order([reader], greedy.argsort(stable=True).numpy())
    np.testing.assert_allclose(own, greedy.sort().values.numpy(), rtol=1e-6, atol=1e-9)
    other = costs_in_order([reader], np.random.default_rng(seed).permutation(n))
    assert (np.diff(other) >= -1e-9).all() and other[0] >= own[0] - 1e-9
    assert other[-1] == pytest.approx(own[-1], rel=1e-4)  # all are gone, in whatever order


@pytest.mark.parametrize("seed", range(3))
def test_many_channels_leave_almost_as_if_one_by_one(seed, monkeypatch):
    # Near-twins: each alone costs next to nothing, both together do not.
    x = correlated(40, seed)
    x = torch.cat([x, x + 0.05 * correlated(40, seed + 100)], 1)
    weight = torch.randn(6, 80, generator=torch.Generator().manual_seed(seed)).double()
    found = removal_costs([consumer(x, weight, 1)], 80)
    monkeypatch.setattr(obs, "_POOL", 80)  # all in one pool: strictly one after the other
    strict = removal_costs([consumer(x, weight, 1)], 80)
    for n in (20, 40, 60):
        assert float(found.sort().values[n]) <= 1.05 * float(strict.sort().values[n])
    gone = set(found.argsort()[:40].tolist())
    assert sum({i, i + 40} <= gone for i in range(40)) <= 1


def test_a_large_mean_and_constants_are_no_variance():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 12), nn.Identity(), nn.Linear(12, 3)).eval()
    x = torch.randn(300, 6)
    with torch.no_grad():
        network[0].weight *= 0.1
        network[0].bias += 1000.0
    graph = trace(network)
    groups = find_groups(graph, x[:1], "2")[:1]
    (found,) = gather_consumers(graph, groups, x.split(64), n_images=300)["0"]
    hidden = network[0](x).detach().double()
    expected = hidden.T.cov(correction=0)
    torch.testing.assert_close(found.gram[0], expected, atol=1e-5, rtol=1e-2)
    scores = removal_costs([found], 12)
    assert bool(torch.isfinite(scores).all()) and float(scores.max()) > 0.9
    with torch.no_grad():
        network[0].weight.zero_()
    (found,) = gather_consumers(graph, groups, x.split(64), n_images=300)["0"]
    assert removal_costs([found], 12).tolist() == [0.0] * 12


def test_nothing_reads_the_channels():
    assert removal_costs([], 3).tolist() == [0.0, 0.0, 0.0]
    silent = consumer(correlated(3, 0), torch.zeros(2, 3).double(), 1)
    assert removal_costs([silent], 3).tolist() == [0.0, 0.0, 0.0]


class Readers(nn.Module):
    """Channels read by a strided, a grouped, a depthwise and, flattened, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 4, 3, stride=2, padding="valid", bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(2, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 4, (3, 1), groups=2, dilation=(2, 1))
        self.third = nn.Conv2d(2, 6, 3)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.head = nn.Linear(6 * 16, 4)

    def forward(self, x):
        a = self.norm(self.strided(self.first(x).relu())).mean((2, 3))
        b = self.grouped(self.second(x).relu()).mean((2, 3))
        return a + b + self.head(self.depthwise(self.third(x).relu()).relu().flatten(1))


@pytest.fixture(scope="module")
def readers():
    torch.manual_seed(0)
    network = randomise_batch_norms(Readers()).double().eval().requires_grad_(False)
    x = torch.randn(30, 2, 8, 8, dtype=torch.float64)
    graph = trace(network)
    groups = [g for g in find_groups(graph, x[:1], "head") if not g.is_output]
    named = {g.name: g for g in groups}
    chosen = [named[name] for name in ("first", "second", "third")]
    found = gather_consumers(graph, chosen, x.split(7), n_images=30, max_rows=10**6)
    return network, x, found


def test_covariances_are_those_of_the_patches(readers):
    network, x, found = readers
    (strided,) = found["first"]
    patches = nn.functional.unfold(network.first(x).relu(), 3, stride=2)
    rows = patches.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(strided.gram[0], rows.T.cov(correction=0))
    gain = network.norm.weight / (network.norm.running_var + network.norm.eps).sqrt()
    torch.testing.assert_close(strided.weight[0], network.strided.weight.flatten(1) * gain[:, None])
    channel = strided.columns[0][0]
    assert channel.shape == (8, 9) and channel[2].tolist() == list(range(18, 27))

    (grouped,) = found["second"]
    patches = nn.functional.unfold(network.second(x).relu(), (3, 1), dilation=(2, 1))
    rows = patches.transpose(1, 2).flatten(0, 1)
    for block in range(2):
        own = rows[:, 12 * block : 12 * block + 12]
        torch.testing.assert_close(grouped.gram[block], own.T.cov(correction=0))
        assert grouped.columns[block][1].tolist() == list(range(4 * block, 4 * block + 4))

    (head,) = found["third"]  # the depthwise layer passes the channels on
    hidden = network.depthwise(network.third(x).relu()).relu().flatten(1)
    torch.testing.assert_close(head.gram[0], hidden.T.cov(correction=0))
    assert head.columns[0][0].shape == (6, 16)


def test_outputs_that_do_not_stay_do_not_count():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6)).double().eval()
    x = torch.randn(50, 5, dtype=torch.float64)
    graph = trace(network)
    groups = find_groups(graph, x[:1], "2")[:1]
    (found,) = gather_consumers(graph, groups, [x], n_images=50, outputs=[1, 4, 5])["0"]
    rows = network[2].weight.detach()[[1, 4, 5]]
    torch.testing.assert_close(found.weight[0], rows - rows.mean(0))
    with torch.no_grad():
        network[2].weight[[1, 4, 5]] += 3.0  # common to all three: no answer depends on it
    (again,) = gather_consumers(graph, groups, [x], n_images=50, outputs=[1, 4, 5])["0"]
    torch.testing.assert_close(again.weight, found.weight)


def test_what_is_too_wide_is_left_out_and_the_rest_ranked_by_norm(monkeypatch):
    for module in (moments, obs):
        monkeypatch.setattr(module, "MAX_INPUTS", 50)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.randn(20, 1, 6, 6)
    graph = trace(network)
    groups = find_groups(graph, x[:1], "3")[:1]
    with pytest.warns(UserWarning, match="leaves out what 3 would lose: more than 50 inputs"):
        found = gather_consumers(graph, groups, [x], n_images=20)
    assert found == {"0": []}
    weight = network[0].weight
    ranked = CRITERIA["obs"].function(LayerData(weight=weight, consumers=()))
    assert ranked.argsort().tolist() == weight.abs().sum((1, 2, 3)).argsort().tolist()


def test_one_output_alone_still_counts():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6)).eval()
    x = torch.randn(50, 5)
    graph = trace(network)
    groups = find_groups(graph, x[:1], "2")[:1]
    (found,) = gather_consumers(graph, groups, [x], n_images=50, outputs=[2])["0"]
    assert float(removal_costs([found], 7).max()) > 0.5


def test_batch_norms_without_scales_and_over_other_axes():
    torch.manual_seed(0)
    conv = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, affine=False)
    )
    network = nn.Sequential(*conv, nn.Flatten(), nn.Linear(12, 2)).eval()
    network[3].running_var.copy_(torch.tensor([0.01, 1.0, 4.0]))
    x = torch.randn(10, 2, 2, 2)
    graph = trace(network)
    groups = find_groups(graph, x[:1], "5")[:1]
    (found,) = gather_consumers(graph, groups, [x], n_images=10)["0"]
    expected = (
        network[2].weight.flatten(1).double() / network[3].running_var.double().sqrt()[:, None]
    )
    torch.testing.assert_close(found.weight[0], expected, rtol=1e-2, atol=1e-6)
    sequence = nn.Sequential(
        nn.Linear(5, 4), nn.Linear(4, 4), nn.BatchNorm1d(6), nn.Flatten(), nn.Linear(24, 2)
    )
    graph = trace(sequence.eval())
    x = torch.randn(10, 6, 5)  # here the norm is over the six positions
    groups = find_groups(graph, x[:1], "4")[:1]
    (found,) = gather_consumers(graph, groups, [x], n_images=10)["0"]
    torch.testing.assert_close(found.weight[0], sequence[1].weight.double())


def test_positions_are_drawn_and_batches_do_not_matter():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten())
    network = nn.Sequential(*network, nn.Linear(48, 2)).eval()
    x = torch.randn(40, 1, 8, 8)
    graph = trace(network)
    groups = find_groups(graph, x[:1], "4")[:1]

    def gram(batch: int, rows: int, seed: int = 0) -> torch.Tensor:
        batches = x.split(batch)
        found = gather_consumers(graph, groups, batches, n_images=40, max_rows=rows, seed=seed)
        return found["0"][0].gram

    every = gram(40, 10**6)
    torch.testing.assert_close(gram(7, 10**6), every, atol=1e-6, rtol=1e-5)
    few = gram(40, 80)
    assert torch.equal(gram(40, 80), few) and not torch.equal(gram(40, 80, seed=1), few)
    assert 0.2 < float((few - every).norm() / every.norm()) < 0.6  # two positions of 16, not all


def test_least_squares_wins_back_more_than_after_other_choices():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 12, 3), nn.Flatten(), nn.Linear(192, 4)
    )
    with torch.no_grad():
        # Few are rectified, so the last third can be made up for by the first; the second third is
        # small, and cannot.
        network[0].bias += 2.0
        network[0].weight[16:] = network[0].weight[:8]
        network[0].bias[16:] = network[0].bias[:8] + 1.0
        network[0].weight[8:16] *= 0.3
        network[2].weight[:, 8:16] *= 5.0
    network = network.eval().requires_grad_(False)
    x = torch.randn(120, 3, 8, 8)
    graph = trace(network)
    groups = find_groups(graph, x[:1], "4")
    found = gather_consumers(graph, groups[:1], [x], n_images=120)["0"]
    weight = network[0].weight
    scores = {
        "obs": removal_costs(found, 24),
        "l1": weight.abs().sum((1, 2, 3)),
        "random": torch.rand(24),
    }
    error = {}
    for name, score in scores.items():
        kept = select_top(score.numpy().astype(float), 16)
        sliced = slice_channels(graph, x[:1], {"0": kept}, groups=groups)
        error[name] = repair(graph, sliced, x)["2"]
    assert error["obs"] < 0.5 * min(error["l1"], error["random"])


# Together with DCS --------------------------------------------------------------------------------


def test_what_is_lost_counts_where_it_matters():
    """Two inputs, each behind one output of a reader: the output that counts keeps its input."""
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(1)).double()
    reader = consumer(x, torch.eye(2).double(), 1)
    for counts in ([5.0, 1.0], [1.0, 5.0]):
        weighed = weigh_outputs([reader], {"next": torch.tensor(counts)})
        assert removal_costs(weighed, 2).argmax() == int(np.argmax(counts))
    equal = removal_costs([reader], 2)
    for importance in ({}, {"next": torch.zeros(2)}, {"next": torch.full((2,), 9.0)}):
        torch.testing.assert_close(removal_costs(weigh_outputs([reader], importance), 2), equal)
    nothing = weigh_outputs([reader], {"next": torch.tensor([1.0, 0.0])})
    assert float(removal_costs(nothing, 2)[1]) == pytest.approx(0.0, abs=1e-2)


def layer_data(seed: int = 0) -> LayerData:
    """Six filters, the first two alike; a reader whose first output alone tells classes apart."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(200) % 2
    x = torch.randn(200, 6, generator=generator).double()
    x[:, 0] += 3.0 * y
    x[:, 1] = x[:, 0]
    weight = torch.tensor([[0, 2, 1, 0, 0, 0], [0, 0, 0, 5, 5, 5.0]]).double()
    read = (x @ weight.T).relu()
    return LayerData(
        features=x[:, :, None],
        y=y,
        weight=torch.ones(6, 3),
        consumers=(consumer(x - x.mean(0), weight, 1),),
        consumer_features={"next": read},
    )


def test_dcs_obs_keeps_what_feeds_outputs_that_discriminate():
    data = layer_data()
    plain, weighed = (CRITERIA[name].function(data) for name in ("obs", "dcs_obs"))
    assert set(plain.argsort()[-3:].tolist()) == {3, 4, 5}  # the large output
    assert int(weighed.argmax()) in (0, 1) and int(plain.argmax()) not in (0, 1)
    unseen = LayerData(**{**data.__dict__, "consumer_features": {}})
    torch.testing.assert_close(CRITERIA["dcs_obs"].function(unseen), plain)


def test_where_no_reader_is_known():
    data = LayerData(**{**layer_data().__dict__, "consumers": ()})
    scores = (CRITERIA[name].function(data) for name in ("dcs_obs", "obs"))
    torch.testing.assert_close(*scores)


@pytest.mark.filterwarnings("ignore:The model answers")  # it is not trained
def test_both_together_in_the_pruner():
    X, y = blobs(n_classes=4)
    pruner = DCSPruner(
        small_cnn(n_classes=4),
        schedule="linear",
        criterion="dcs_obs",
        repair="static_least_squares",
        random_state=0,
    ).fit(X, y)
    scores = pruner.scores_
    assert all(np.isfinite(s).all() and (s >= 0).all() for s in scores.values())
    other = (
        DCSPruner(small_cnn(n_classes=4), schedule="linear", criterion="obs", random_state=0)
        .fit(X, y)
        .scores_
    )
    assert any(not np.allclose(scores[layer], other[layer]) for layer in scores)
