"""FrozenModel: one copy of the weights, the same bytes everywhere."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref

import joblib
import numpy as np
import pytest
import torch
from helpers import small_cnn
from sklearn.base import clone
from torch import nn

from sinfkit import DCSPruner, FrozenModel
from sinfkit._packing import pack
from sinfkit.frozen import as_frozen


def test_clone_and_deepcopy_give_the_same_object():
    frozen = FrozenModel(small_cnn())
    assert clone(frozen, safe=False) is frozen
    assert copy.deepcopy(frozen) is frozen and copy.copy(frozen) is frozen
    assert clone(DCSPruner(frozen)).model is frozen


def test_takes_a_private_copy_and_leaves_the_callers_model_alone():
    model = small_cnn().train()
    for p in model.parameters():
        p.requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = FrozenModel(model)
    assert model.training and all(p.requires_grad for p in model.parameters())
    inner = frozen.module()
    assert not inner.training and not any(p.requires_grad for p in inner.parameters())
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(inner[0].weight, before["0.weight"])


def test_pickles_are_byte_stable_across_copies_and_processes(tmp_path):
    frozen = FrozenModel(small_cnn(), mean=[0.5], std=[0.25])
    data = pickle.dumps(frozen)
    assert pickle.dumps(pickle.loads(data)) == data
    assert pickle.dumps(copy.deepcopy(frozen)) == data
    path = tmp_path / "frozen.pkl"
    path.write_bytes(data)
    code = (
        "import pickle, joblib, sys; "
        f"f = pickle.load(open({str(path)!r}, 'rb')); f.module(); "
        "sys.stdout.write(joblib.hash(f) + ' ' + joblib.hash(pickle.dumps(f)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [joblib.hash(frozen), joblib.hash(data)]


def test_two_copies_of_one_network_are_equal_and_hash_alike():
    a, b = FrozenModel(small_cnn()), FrozenModel(small_cnn())
    assert a == b and hash(a) == hash(b) and joblib.hash(a) == joblib.hash(b)
    assert a != FrozenModel(small_cnn(seed=1))
    assert a != FrozenModel(small_cnn(), mean=[0.1], std=[1.0])
    assert a.module() is b.module()  # one copy per device and process


def test_device_copies_die_with_their_owners():
    frozen = FrozenModel(small_cnn(seed=7))
    reference = weakref.ref(frozen.module())
    del frozen
    gc.collect()
    assert reference() is None


def test_repr_is_short_and_names_the_size():
    assert repr(FrozenModel(nn.Linear(10, 100))) == "FrozenModel(Linear, 1.1k parameters)"


def test_fitted_skorch_net_is_taken_and_an_unfitted_one_refused():
    skorch = pytest.importorskip("skorch")
    net = skorch.NeuralNetClassifier(nn.Sequential(nn.Linear(4, 3)), max_epochs=1, verbose=0)
    net.set_params(train_split=None)
    with pytest.raises(TypeError, match="not fitted"):
        FrozenModel(net)
    X = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    net.fit(X, np.arange(12) % 3)
    frozen = FrozenModel(net)
    assert torch.equal(frozen.module()[0].weight, net.module_[0].weight.detach().cpu())
    with pytest.raises(TypeError, match=r"FrozenModel\(net\)"):
        as_frozen(net)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mean": [0.0, 1.0], "std": [1.0, 1.0, 1.0]}, "mean has 2 values and std has 3"),
        ({"std": [0.0]}, "positive"),
        ({"mean": [np.nan]}, "finite"),
    ],
)
def test_wrong_normalisation(arguments, match):
    with pytest.raises(ValueError, match=match):
        FrozenModel(small_cnn(), **arguments)


def test_non_finite_weights_and_wrong_types():
    model = small_cnn()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'0\.weight'"):
        FrozenModel(model)
    with pytest.raises(TypeError, match="not str"):
        FrozenModel("resnet50")
    with pytest.raises(TypeError, match="top level"):
        FrozenModel(type("Local", (nn.Module,), {})())


def test_packing_stores_shared_tensors_once_and_keeps_ties_and_types():
    first = nn.Linear(3, 3)
    second = nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    half = nn.Linear(2, 2).to(torch.bfloat16)
    packed = pack({"a": first, "b": second, "c": half})
    assert len(packed.arrays) == 4
    out = packed.unpack()
    assert out["a"].weight is out["b"].weight
    assert torch.equal(out["a"].weight, first.weight)
    assert out["c"].weight.dtype == torch.bfloat16 and torch.equal(out["c"].weight, half.weight)
    out["a"].weight.data.zero_()
    assert not torch.equal(out["a"].weight, first.weight)
    assert np.abs(packed.arrays[0]).max() > 0  # unpacking copies
