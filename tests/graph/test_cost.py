from __future__ import annotations

import copy
import gc
import pickle
import time

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sinfkit.graph import (
    Latency,
    count_macs,
    count_parameters,
    fold_batch_norm,
    paired_latency,
    trace,
)
from sinfkit.zoo import resnet50, vgg16


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch-norm random parameters and statistics: a fresh one is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            n = m.num_features
            if m.affine:
                m.weight.data = 0.5 + torch.rand(n, generator=generator)
                m.bias.data = torch.randn(n, generator=generator)
            m.running_mean = torch.randn(n, generator=generator)
            m.running_var = 0.5 + torch.rand(n, generator=generator)
    return network.eval()


def images(n: int = 2, side: int = 16) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def n_batch_norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in network.modules())


class Residual(nn.Module):
    """A branch, a shortcut, one norm whose input is read twice and one behind no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.bn2 = nn.BatchNorm2d(8)
        self.bn3 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        self.bn4 = nn.BatchNorm1d(5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        y = self.conv2(x)
        x = self.bn3(x + self.bn2(y) * y.sigmoid()).relu()
        return self.bn4(self.fc(x.mean((2, 3))))


def test_count_parameters_counts_shared_ones_once():
    layer = nn.Linear(3, 3)
    twice = nn.Sequential(layer, nn.BatchNorm1d(3), layer)
    assert count_parameters(twice) == 3 * 3 + 3 + 2 * 3
    assert count_parameters(nn.ReLU()) == 0


def test_macs_of_vgg16_are_the_published_ones():
    total, by_layer = count_macs(vgg16(), torch.zeros(1, 3, 32, 32))
    millions = [round(macs / 1e6, 1) for macs in by_layer.values()]
    convolutions = [1.8, 37.7, 18.9, 37.7, 18.9, 37.7, 37.7, 18.9, 37.7, 37.7, 9.4, 9.4, 9.4]
    assert millions == [*convolutions, 0.1]
    assert total == sum(by_layer.values()) == 313_247_744
    assert list(by_layer)[0] == "features.0" and list(by_layer)[-1] == "classifier"


def test_macs_are_half_of_torchs_flops():
    network = torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.25).eval()
    x = torch.zeros(2, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    assert count_macs(network, x)[0] * 2 * 2 == counter.get_total_flops()


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 3),
    fan=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    transposed=st.booleans(),
    batch=st.integers(1, 3),
)
def test_macs_of_any_convolution(groups, fan, kernel, stride, transposed, batch):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(fan[0] * groups, fan[1] * groups, kernel, stride, groups=groups)
    x = torch.zeros(batch, fan[0] * groups, 5, 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    total, by_layer = count_macs(layer, x)
    assert by_layer == {"": total}
    assert 2 * batch * total == counter.get_total_flops()


def test_macs_of_repeated_layers_and_sequences():
    layer = nn.Linear(4, 4)
    total, by_layer = count_macs(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(3, 7, 4))
    # named_modules gives a shared layer one name.
    assert total == 2 * 7 * 16 and by_layer == {"0": total}


def test_macs_leave_the_module_alone():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    before = copy.deepcopy(network.state_dict())
    count_macs(network, images())
    assert network.training and not network[0]._forward_hooks
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_macs_of_a_traced_network_agree():
    network = resnet50(width=0.0625, stem="half")
    x = torch.zeros(1, 3, 32, 32)
    assert count_macs(trace(network), x) == count_macs(network, x)


@pytest.mark.parametrize("example", [torch.zeros(0, 3, 16, 16), torch.zeros(())])
def test_macs_need_a_sample(example):
    with pytest.raises(ValueError, match="at least one sample"):
        count_macs(nn.Conv2d(3, 4, 3), example)


@pytest.mark.parametrize(
    "build",
    [
        lambda: vgg16(n_classes=5, width=0.125),
        lambda: resnet50(n_classes=5, width=0.125),
        lambda: torchvision.models.resnet18(num_classes=5),
        lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25),
    ],
    ids=["vgg16", "resnet50", "resnet18", "mobilenet_v2"],
)
def test_folding_removes_every_batch_norm_and_changes_no_output(build):
    network = randomise(build())
    folded = fold_batch_norm(network)
    assert n_batch_norms(network) > 0 and n_batch_norms(folded) == 0
    with torch.inference_mode():
        x = images(side=32)
        reference = network(x)
        error = (folded(x) - reference).abs().max() / reference.abs().max()
    assert error < 1e-4


def test_folding_only_where_it_is_allowed():
    network = randomise(Residual())
    folded = fold_batch_norm(network)
    left = {n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)}
    # bn2's convolution is read twice, bn3 follows a sum.
    assert left == {"bn2", "bn3"}
    with torch.inference_mode():
        torch.testing.assert_close(folded(images()), network(images()), rtol=1e-4, atol=1e-4)


def test_folding_leaves_shared_layers_and_batch_statistics():
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    moving = nn.BatchNorm2d(3, track_running_stats=False)
    network = randomise(nn.Sequential(conv, norm, conv, nn.ReLU(), nn.Conv2d(3, 3, 1)))
    network.append(moving)
    folded = fold_batch_norm(network)
    assert n_batch_norms(folded) == 2
    with torch.inference_mode():
        torch.testing.assert_close(folded(images()), network(images()))


def test_computed_weights_are_folded_into():
    parametrised = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    network = randomise(nn.Sequential(parametrised, nn.BatchNorm2d(4), nn.Flatten()))
    folded = fold_batch_norm(network)
    assert n_batch_norms(folded) == 0
    with torch.inference_mode():
        torch.testing.assert_close(folded(images()), network(images()))


def test_attention_and_functions_are_counted():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.weight = nn.Parameter(torch.randn(5, 8))

        def forward(self, x):
            x = x + self.attention(x, x, x)[0]
            x = x + nn.functional.scaled_dot_product_attention(x, x, x)
            return nn.functional.linear(x, self.weight).mean(1)

    n, width = 6, 8  # tokens and channels
    network = Mixed().eval()
    total, by_module = count_macs(network, torch.zeros(2, n, width))
    products = 2 * n * n * width  # queries with keys, weights with values
    inside = 3 * n * width**2 + products + n * width**2
    assert sum(v for k, v in by_module.items() if k.startswith("attention")) == inside
    assert by_module[""] == products + n * width * 5
    assert total == sum(by_module.values())


def test_folding_leaves_the_module_alone_and_shares_the_rest():
    network = randomise(nn.Sequential(Residual(), nn.Linear(5, 2))).train()
    before = copy.deepcopy(network.state_dict())
    statistics = network[0].bn1.running_mean.clone()
    folded = fold_batch_norm(network)
    with torch.inference_mode():
        folded(images())
    assert network.training and not folded.training
    assert torch.equal(network[0].bn1.running_mean, statistics)
    assert list(network.state_dict()) == list(before)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert folded.get_parameter("1.weight") is network[1].weight
    assert folded.get_parameter("0.conv1.weight") is not network[0].conv1.weight
    # A mode set on the result is not the caller's.
    folded.get_submodule("1").train()
    folded.get_submodule("0.bn3").momentum = 0.5
    assert network[0].bn3.momentum == 0.1


def test_folding_a_graph_twice_and_pickling():
    network = randomise(Residual())
    once = fold_batch_norm(trace(network))
    twice = pickle.loads(pickle.dumps(fold_batch_norm(once)))
    assert [node.name for node in twice.graph.nodes] == [node.name for node in once.graph.nodes]
    with torch.inference_mode():
        torch.testing.assert_close(twice(images()), once(images()))


@pytest.mark.parametrize("bias", [False, True])
def test_folding_in_double_precision(bias):
    network = nn.Sequential(nn.Linear(4, 3, bias=bias), nn.BatchNorm1d(3))
    network = randomise(network).double()
    before = copy.deepcopy(network.state_dict())
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(fold_batch_norm(network)(x), network(x), rtol=1e-12, atol=1e-12)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_latency_figures():
    latency = Latency({"a": np.array([1.0, 2.0, 9.0]), "b": np.array([2.0, 4.0, 3.0])})
    assert latency.median == {"a": 2.0, "b": 3.0}
    assert latency.quartiles["a"] == (1.5, 5.5)
    # Of the pairwise ratios 0.5, 0.5 and 3; the ratio of the medians is 2/3.
    assert latency.ratio("a", "b") == 0.5
    assert latency.ratio_quartiles("a", "b") == (0.5, 1.75)
    assert pickle.loads(pickle.dumps(latency)).median == latency.median


def test_paired_latency_measures_in_turns_and_in_inference_mode():
    calls: list[str] = []

    def record(name: str, pause: float) -> None:
        assert torch.is_inference_mode_enabled()
        assert not gc.isenabled()
        calls.append(name)
        time.sleep(pause)

    latency = paired_latency(
        {"a": lambda: record("a", 0.012), "b": lambda: record("b", 0.003)}, repeats=4, warmup=1
    )
    assert gc.isenabled()
    rounds = ["".join(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert rounds == ["ba", "ab", "ba", "ab", "ba"]
    assert all(len(times) == 4 for times in latency.seconds.values())
    assert latency.seconds["a"].min() >= 0.012
    assert latency.ratio("b", "a") < latency.ratio("a", "b")


def test_paired_latency_restores_the_collector_after_an_error():
    def fail() -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        paired_latency({"a": fail})
    assert gc.isenabled()


@pytest.mark.parametrize(
    "arguments",
    [
        {"functions": {}},
        {"functions": {"a": int}, "repeats": 0},
        {"functions": {"a": int}, "warmup": -1},
    ],
)
def test_paired_latency_bad_input(arguments):
    with pytest.raises(ValueError, match="repeats >= 1"):
        paired_latency(**arguments)
