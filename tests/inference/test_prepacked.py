"""Prepacked convolutions: the same answers, weights shared, and ReLUs inside."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchvision
from helpers import randomise_batch_norms
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from sinfkit.graph import fold_batch_norm, trace
from sinfkit.inference import PrepackedConv2d, can_prepack, group_size, prepacked

pytestmark = pytest.mark.skipif(not can_prepack(torch.float32), reason="PyTorch without oneDNN")


def network(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torchvision.models.get_model(name, weights=None, num_classes=7)
    return randomise_batch_norms(module).eval()


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_networks_answer_as_before(name):
    module = fold_batch_norm(trace(network(name))).eval()
    module = module.to(memory_format=torch.channels_last)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    code = module.code
    fast = prepacked(module)
    with torch.inference_mode():
        for n in (1, 3, 20):
            x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))
            x = x.contiguous(memory_format=torch.channels_last)
            same(fast(x), module(x))
    assert sum(isinstance(m, PrepackedConv2d) for m in fast.modules()) > 10
    assert fast.code.count("relu") < code.count("relu") or name == "mobilenet_v2"
    assert module.code == code  # and what it was made of is as it was
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    shared = {p.data_ptr() for p in module.parameters()}
    assert {p.data_ptr() for p in fast.parameters()} <= shared


class Forked(nn.Module):
    """A ReLU that must not go into the convolution, one that may, and a layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.d = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x):
        a = self.a(x)
        b = functional.relu(self.b(functional.relu(a) + a)) - 1
        return self.c(self.c(b)[:, :, ::2, ::2]) + self.d(b)[:, :, ::2, ::2]


def test_only_what_may_be_fused_is():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = trace(Forked().eval())
    fast = prepacked(module)
    assert (fast.a.activation, fast.b.activation) == ("none", "relu")
    assert type(fast.c) is type(fast.d) is nn.Conv2d
    x = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        same(fast(x), module(x))
        if can_prepack(torch.bfloat16):
            half = prepacked(copy.deepcopy(module).to(torch.bfloat16))
            off = (half(x.bfloat16()).float() - module(x)).abs().max()
            assert type(half.b) is PrepackedConv2d and 0 < float(off) < 0.05
    again = pickle.loads(pickle.dumps(fast))
    with torch.inference_mode():
        same(again(x), module(x))


class Padded(nn.Conv2d):
    """A convolution with parts of its own, as PyPI's efficientnet-lite has it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return functional.conv2d(self.pad(x), self.weight, self.bias)


def test_parts_of_a_convolution_are_kept():
    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    module = trace(nn.Sequential(Padded(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU()).eval(), x)
    for form in (module, fold_batch_norm(module)):
        fast = prepacked(form)
        assert type(fast.get_submodule("0")) is PrepackedConv2d
        with torch.inference_mode():
            same(fast(x), form(x))


def test_traced_parts_of_other_modules_are_found():
    whole = nn.Sequential(nn.Identity(), trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))).eval()
    fast = prepacked(whole)
    assert isinstance(fast[1].get_submodule("0"), PrepackedConv2d)
    assert isinstance(whole[1].get_submodule("0"), nn.Conv2d)


@given(st.integers(1, 5000))
def test_group_sizes_are_few_and_hardly_larger(n):
    size = group_size(n)
    assert n <= size < n * 1.125 and group_size(size) == size
    assert len({group_size(k) for k in range(1, 257)}) == 16 + 4 * 8
