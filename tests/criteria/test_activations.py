from __future__ import annotations

import gc
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import randomise_batch_norms, small_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sinfkit.criteria import collect, pool, taylor_scores
from sinfkit.graph import cut_points, layer_names, observation_nodes, split, trace

few = settings(deadline=None, max_examples=20)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pieces(x: Tensor, cuts: list[int]) -> Iterator[Tensor]:
    edges = [0, *sorted(cuts), len(x)]
    for start, stop in itertools.pairwise(edges):
        if stop > start:
            yield x[start:stop]


# Pooling


@few
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(4, 9), st.integers(4, 9), st.integers(1, 4)
)
def test_pool_is_the_mean_of_each_cell(n: int, c: int, h: int, w: int, size: int) -> None:
    x = rand(n, c, h, w)
    result = pool(x, size)
    assert result.shape == (n, c * size**2)
    for k, i, j in itertools.product(range(c), range(size), range(size)):
        rows = slice(i * h // size, -(-(i + 1) * h // size))
        columns = slice(j * w // size, -(-(j + 1) * w // size))
        expected = x[:, k, rows, columns].mean((1, 2))
        torch.testing.assert_close(result[:, k * size**2 + i * size + j], expected)


@pytest.mark.parametrize("size", [1, 2])
def test_pool_takes_channels_from_either_axis(size: int) -> None:
    x = rand(2, 3, 6, 5)
    torch.testing.assert_close(pool(x.movedim(1, -1), size, axis=-1), pool(x, size))


def test_pool_of_what_has_no_grid() -> None:
    x = rand(4, 3)
    assert pool(x, 2) is x
    sequence = rand(4, 7, 3)
    assert torch.equal(pool(sequence, 2), sequence.mean(1))
    assert pool(x.bfloat16(), 1).dtype == torch.float32
    assert torch.equal(pool(sequence, 2, axis=1), sequence.mean(2))
    volume = rand(2, 3, 4, 5, 6)
    assert torch.equal(pool(volume, 2), volume.mean((2, 3, 4)))
    with pytest.raises(ValueError, match="must be positive, got 0"):
        pool(x, 0)


def test_pool_in_half_precision_averages_in_single() -> None:
    x = torch.full((1, 1, 64, 64), 1.001, dtype=torch.float16)
    exact = float(x[0, 0, 0, 0])
    assert pool(x, 1).item() == pytest.approx(exact, rel=1e-6)
    assert pool(x, 2)[0].tolist() == pytest.approx([exact] * 4, rel=1e-6)


# Collecting


class Residual(nn.Module):
    """A residual sum, so that two layers share one observation; and images of 13 x 13."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 4, 1)
        self.fc1 = nn.Linear(4, 6)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv2(F.relu(self.bn(self.conv1(x)), inplace=True))
        x = F.relu(x + y, inplace=True)
        return self.fc2(F.relu(self.fc1(x.mean((2, 3)))))


def residual(dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Residual()
    return randomise_batch_norms(network).to(dtype).eval()


def test_collect_gathers_what_the_network_computes() -> None:
    network = residual()
    gm = trace(network)
    x = rand(7, 2, 13, 13)
    nodes = observation_nodes(gm, layer_names(gm))
    found = collect(gm, x.split(3), nodes, pool_size={k: 2 if "conv" in k else 1 for k in nodes})
    with torch.no_grad():
        stem = network.stem(x)
        inner = F.relu(network.bn(network.conv1(stem)))
        total = F.relu(stem + network.conv2(inner))
        hidden = F.relu(network.fc1(total.mean((2, 3))))
        logits = network(x)
    expected = {
        "stem": stem.mean((2, 3)),
        "conv1": F.adaptive_avg_pool2d(inner, 2).flatten(1),
        "conv2": F.adaptive_avg_pool2d(total, 2).flatten(1),
        "fc1": hidden,
        "fc2": logits,
    }
    assert list(found.pooled) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found.pooled[name], value)
    torch.testing.assert_close(found.logits, logits)


@few
@given(st.lists(st.integers(0, 9), max_size=5))
def test_batches_make_no_difference_to_what_is_collected(cuts: list[int]) -> None:
    gm = trace(residual())
    x = rand(9, 2, 13, 13)
    nodes = observation_nodes(gm, layer_names(gm))
    whole = collect(gm, [x], nodes)
    parts = collect(gm, pieces(x, cuts), nodes)
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-12, atol=1e-12)
    for name in nodes:
        torch.testing.assert_close(parts.pooled[name], whole.pooled[name], rtol=1e-12, atol=1e-12)


def n_feature_maps() -> int:
    """How many of the network's four-dimensional activations exist just now."""
    tensors = [o for o in gc.get_objects() if type(o) is Tensor]
    return sum(x.dim() == 4 and x.shape[-1] == 13 and x.shape[1] != 2 for x in tensors)


def test_only_pooled_values_are_kept() -> None:
    gm = trace(residual())
    nodes = observation_nodes(gm, layer_names(gm))
    alive = []

    def batches() -> Iterator[Tensor]:
        for seed in range(4):
            alive.append(n_feature_maps())
            yield rand(8, 2, 13, 13, seed=seed)

    found = collect(gm, batches(), nodes)
    alive.append(n_feature_maps())
    assert alive == [0] * 5
    for x in (*found.pooled.values(), found.logits):
        # No view, either, behind which a feature map would hide.
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
        assert len(x) == 32
        assert not x.requires_grad


def test_nothing_hides_behind_a_view() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)[:, 0]

    kept: list[int] = []

    def batches() -> Iterator[Tensor]:
        for seed in range(3):
            tensors = [o for o in gc.get_objects() if type(o) is Tensor and o.shape == (17, 2)]
            kept.append(sum(x.untyped_storage().nbytes() for x in tensors))
            yield rand(17, 50, 3, seed=seed, dtype=torch.float32)

    collect(trace(Token()), batches(), {})
    assert kept == [0, 17 * 2 * 4, 2 * 17 * 2 * 4]


def test_batches_are_read_one_at_a_time() -> None:
    gm = trace(residual())
    read: list[int] = []

    def batches() -> Iterator[Tensor]:
        for i in range(3):
            read.append(i)
            yield rand(2, 2, 13, 13)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        collect(gm, batches(), {})
    assert read == [0, 1, 2]


def test_layers_of_one_sum_share_their_features() -> None:
    class Projection(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.shortcut = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))
            return self.fc2(F.relu(self.fc1(y.mean((2, 3)))))

    gm = trace(Projection())
    nodes = observation_nodes(gm, ["conv2", "shortcut", "fc1"])
    x = rand(3, 2, 13, 13, dtype=torch.float32)
    found = collect(gm, [x], nodes)
    assert found.pooled["conv2"] is found.pooled["shortcut"]
    found = collect(gm, [x], nodes, {"conv2": 1, "shortcut": 2, "fc1": 1})
    assert found.pooled["shortcut"].shape == (3, 16)
    assert found.pooled["conv2"].shape == (3, 4)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_types_of_what_is_collected(dtype: torch.dtype, kept: torch.dtype) -> None:
    gm = trace(residual(dtype))
    x = rand(3, 2, 13, 13).to(dtype)
    found = collect(gm, [x], observation_nodes(gm, ["conv1"]), pool_size=np.int64(2))
    assert found.pooled["conv1"].dtype == found.logits.dtype == kept
    assert found.pooled["conv1"].shape == (3, 20)


def test_the_rest_of_a_network_can_be_collected_from() -> None:
    gm = trace(small_cnn())
    x = rand(5, 1, 8, 8, dtype=torch.float32)
    prefix, rest = split(gm, cut_points(gm)[1])
    layers = layer_names(rest)
    with torch.inference_mode():
        middle = prefix(x)
    found = collect(rest, middle.split(2), observation_nodes(rest, layers))
    whole = collect(gm, [x], observation_nodes(gm, layers))
    torch.testing.assert_close(found.logits, whole.logits)
    for name in layers:
        torch.testing.assert_close(found.pooled[name], whole.pooled[name])


def test_collect_refuses_what_it_cannot_do() -> None:
    gm = trace(residual(torch.float32))
    with pytest.raises(ValueError, match="no batch"):
        collect(gm, [], {})
    with pytest.raises(ValueError, match="no node 'conv9'"):
        collect(gm, [], {"a": "conv9"})
    prefix, _ = split(gm, cut_points(gm)[0])
    with pytest.raises(ValueError, match=r"shape \(n_samples, n_outputs\), but it returns \(3, 4"):
        collect(prefix, [rand(3, 2, 13, 13, dtype=torch.float32)], {})


# Taylor scores


def reference(
    network: Residual, x: Tensor, y: Tensor, outputs: list[int] | None = None
) -> dict[str, Tensor]:
    """Sample by sample, the gradient by hand-placed leaves."""
    scores: dict[str, list[Tensor]] = {}
    for image, label in zip(x, y, strict=True):
        stem = network.stem(image[None]).detach().requires_grad_()
        inner = F.relu(network.bn(network.conv1(stem)))
        total = F.relu(stem + network.conv2(inner))
        hidden = F.relu(network.fc1(total.mean((2, 3))))
        logits = network.fc2(hidden)
        chosen = logits if outputs is None else logits[:, outputs]
        loss = F.cross_entropy(chosen, label[None])
        values = {"stem": stem, "conv1": inner, "conv2": total, "fc1": hidden, "fc2": logits}
        gradients = torch.autograd.grad(loss, list(values.values()))
        for (name, value), gradient in zip(values.items(), gradients, strict=True):
            product = (value * gradient)[0]
            score = product.flatten(1).sum(1) if product.dim() > 1 else product
            scores.setdefault(name, []).append(score.abs())
    return {name: torch.stack(parts).mean(0).detach() for name, parts in scores.items()}


def test_taylor_by_hand() -> None:
    """Identity weights, so that the logits are the activations."""
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for layer in (network[0], network[2]):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
    gm = trace(network)
    x = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    y = torch.tensor([0, 0])
    scores = taylor_scores(gm, [(x, y)], {"hidden": "_1"})["hidden"]
    # The gradient is softmax minus one-hot: (p - 1, 1 - p) where p is the first probability.
    p, q = 1 / (1 + math.exp(2 - 1)), 1 / (1 + math.exp(0.5 - 3))
    by_hand = [(1 * (1 - p) + 3 * (1 - q)) / 2, (2 * (1 - p) + 0.5 * (1 - q)) / 2]
    assert scores.tolist() == pytest.approx(by_hand, rel=1e-6)
    assert scores.dtype == torch.float64


def test_taylor_sums_over_positions_before_the_absolute_value() -> None:
    class Signed(nn.Module):
        """Reads one pixel with weight 1 and the other with -1."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1, bias=False)
            self.fc = nn.Linear(2, 2, bias=False)
            with torch.no_grad():
                self.conv.weight.fill_(1)
                self.fc.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.flatten(F.relu(self.conv(x)), 1))

    gm = trace(Signed())
    nodes = observation_nodes(gm, ["conv"])
    for left, right in ((2.0, 2.0), (3.0, 1.0)):
        x = torch.tensor([[[[left, right]]]])
        score = taylor_scores(gm, [(x, torch.tensor([1]))], nodes)["conv"]
        p = 1 / (1 + math.exp(right - left))
        assert score.item() == pytest.approx(abs(left - right) * p, rel=1e-6)


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    network = residual()
    gm = trace(network)
    x, y = rand(1, 2, 13, 13), torch.tensor([2])
    score = taylor_scores(gm, [(x, y)], observation_nodes(gm, ["conv1"]))["conv1"]
    with torch.no_grad():
        for channel in range(5):
            loss = []
            for scale in (1 + 1e-6, 1 - 1e-6):
                # Scaling what reads the channel is scaling the channel.
                weight = network.conv2.weight.clone()
                network.conv2.weight[:, channel] *= scale
                loss.append(F.cross_entropy(network(x), y).item())
                network.conv2.weight.copy_(weight)
            slope = abs(loss[0] - loss[1]) / 2e-6
            assert score[channel].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("outputs", [None, [2, 0]])
def test_taylor_is_that_of_single_samples(outputs: list[int] | None) -> None:
    network = residual()
    gm = trace(network)
    x = rand(6, 2, 13, 13)
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    nodes = observation_nodes(gm, layer_names(gm))
    found = taylor_scores(gm, zip(x.split(4), y.split(4), strict=True), nodes, outputs)
    expected = reference(network, x, y, outputs)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    if outputs is not None:
        assert found["fc2"][1] == 0  # an output that the loss does not see


@few
@given(st.lists(st.integers(0, 9), max_size=5), st.permutations(range(9)))
def test_batches_make_no_difference_to_taylor(cuts: list[int], order: list[int]) -> None:
    gm = trace(residual())
    x, y = rand(9, 2, 13, 13), torch.arange(9) % 3
    nodes = observation_nodes(gm, layer_names(gm))
    whole = taylor_scores(gm, [(x, y)], nodes)
    batches = zip(pieces(x[order], cuts), pieces(y[order], cuts), strict=True)
    parts = taylor_scores(gm, batches, nodes)
    for name in nodes:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_taylor_leaves_parameters_and_modes_alone(
    requires_grad: bool, context: Callable[[], torch.enable_grad]
) -> None:
    network = residual().requires_grad_(requires_grad)
    gm = trace(network)
    x, y = rand(4, 2, 13, 13), torch.tensor([0, 1, 2, 0])
    nodes = observation_nodes(gm, ["conv1", "fc1"])
    state = {k: v.clone() for k, v in network.state_dict().items()}
    with context():
        mode = torch.is_grad_enabled()
        scores = taylor_scores(gm, [(x, y)], nodes)
        assert torch.is_grad_enabled() == mode
    expected = reference(residual(), x, y)
    for name, value in scores.items():
        torch.testing.assert_close(value, expected[name])
    for name, parameter in network.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == requires_grad
        assert dict(gm.named_parameters())[name] is parameter
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert not x.requires_grad


def test_taylor_keeps_no_activation() -> None:
    gm = trace(residual())
    nodes = observation_nodes(gm, layer_names(gm))
    alive = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for seed in range(3):
            # Without a collection: nothing may hang in a cycle until there is one.
            alive.append(n_feature_maps())
            yield rand(8, 2, 13, 13, seed=seed), torch.arange(8) % 3

    gc.collect()
    gc.disable()
    try:
        taylor_scores(gm, batches(), nodes)
        alive.append(n_feature_maps())
    finally:
        gc.enable()
    assert alive == [0] * 4


def test_a_channel_without_effect_scores_zero() -> None:
    network = residual()
    with torch.no_grad():
        network.conv2.weight[:, 3] = 0
    gm = trace(network)
    batch = rand(4, 2, 13, 13), torch.tensor([0, 1, 2, 0])
    score = taylor_scores(gm, [batch], observation_nodes(gm, ["conv1"]))["conv1"]
    assert score[3] == 0
    assert (score[[0, 1, 2, 4]] > 0).all()


def test_taylor_of_channels_that_come_last() -> None:
    class ChannelsLast(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).permute(0, 2, 3, 1)
            return self.fc2(F.relu(self.fc1(x))).mean((1, 2))

    gm = trace(ChannelsLast().double())
    batch = rand(4, 2, 13, 12), torch.tensor([0, 1, 2, 0])
    nodes = observation_nodes(gm, ["stem", "fc1"])
    scores = taylor_scores(gm, [batch], nodes)
    assert {k: v.shape for k, v in scores.items()} == {"stem": (4,), "fc1": (6,)}
    assert collect(gm, [batch[0]], nodes, 2).pooled["fc1"].shape == (4, 24)


def test_taylor_refuses_what_it_cannot_do() -> None:
    gm = trace(residual(torch.float32))
    nodes = observation_nodes(gm, ["conv1"])
    x = rand(3, 2, 13, 13, dtype=torch.float32)
    with pytest.raises(ValueError, match="no sample"):
        taylor_scores(gm, [], nodes)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2.*found 0\.\.3"):
        taylor_scores(gm, [(x, torch.tensor([0, 1, 3]))], nodes)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1.*found -1\.\.1"):
        taylor_scores(gm, [(x, torch.tensor([0, 1, -1]))], nodes, outputs=[0, 2])
    with pytest.raises(ValueError, match=r"expected shape \(3,\), got \(2,\)"):
        taylor_scores(gm, [(x, torch.tensor([0, 1]))], nodes)
    with pytest.raises(ValueError, match="no node 'conv9'"):
        taylor_scores(gm, [], {"a": "conv9"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    gm = trace(residual())
    x, y = rand(6, 2, 13, 13), torch.arange(6) % 3
    nodes = observation_nodes(gm, layer_names(gm))
    on_cpu = collect(gm, [x], nodes, 2), taylor_scores(gm, [(x, y)], nodes)
    there = trace(residual().cuda())
    on_gpu = (
        collect(there, [x.cuda()], nodes, 2),
        taylor_scores(there, [(x.cuda(), y)], nodes),
    )
    for name in nodes:
        torch.testing.assert_close(on_gpu[0].pooled[name], on_cpu[0].pooled[name])
        torch.testing.assert_close(on_gpu[1][name], on_cpu[1][name])


def test_taylor_scores_leave_the_network_alone_while_threads_share_it():
    gm = trace(small_cnn())
    before = list(gm.parameters())
    nodes = observation_nodes(gm, ["0"])
    x, y = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    expected = taylor_scores(gm, [(x, y)], nodes)["0"]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool_of_threads:
            jobs = [pool_of_threads.submit(taylor_scores, gm, [(x, y)], nodes) for _ in range(40)]
            found = [job.result()["0"] for job in jobs]
    finally:
        sys.setswitchinterval(interval)
    for score in found:
        torch.testing.assert_close(score, expected)
    after = list(gm.parameters())
    assert len(after) == len(before) and all(a is b for a, b in zip(after, before, strict=True))
