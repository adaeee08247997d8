"""Modules as bytes and arrays."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest
import torch
from helpers import small_cnn
from torch import nn

from sinfkit.utils import pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_types_and_the_module_tree_come_back(dtype):
    network = small_cnn().to(dtype)
    again = pickle.loads(pickle.dumps(pack(network))).unpack()
    assert str(again) == str(network) and not again.training
    expected = network.state_dict()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def test_what_is_shared_is_stored_once_and_shared_again():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    frozen = nn.Linear(4, 4)
    frozen.weight = nn.Parameter(first.weight.detach(), requires_grad=False)  # same memory
    packed = pack({"a": first, "b": second, "c": frozen})
    assert len(packed.arrays) == 4  # one weight, three biases
    again = packed.unpack()
    assert again["a"].weight is again["b"].weight
    assert again["a"].weight.data_ptr() == again["c"].weight.data_ptr()
    assert again["a"].weight.requires_grad and not again["c"].weight.requires_grad


def test_unpacked_modules_do_not_write_into_the_arrays():
    packed = pack(nn.Linear(2, 2))
    before = [array.copy() for array in packed.arrays]
    module = packed.unpack()
    with torch.no_grad():
        module.weight.zero_()
    for array, old in zip(packed.arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_what_cannot_be_pickled_says_how_to_mend_it():
    for what in (threading.Lock(), (i for i in range(2)), torch.jit.CompilationUnit()):
        network = nn.Sequential(nn.Linear(2, 2))
        network.kept = what
        with pytest.raises(TypeError, match="out of its attributes and hooks"):
            pack(network)


def test_what_no_name_leads_to_is_copied_with_what_it_uses():
    scale = nn.Parameter(torch.tensor(2.0))

    class Local(nn.Linear):
        def forward(self, x):
            return super().forward(x) * scale

    network = Local(2, 2)
    network.register_forward_hook(lambda module, args, output: output + scale)
    x = torch.ones(3, 2)
    expected = network(x)
    packed = pickle.loads(pickle.dumps(pack(network)))
    with torch.no_grad():
        scale.fill_(5.0)
    assert torch.equal(packed.unpack()(x), expected)
