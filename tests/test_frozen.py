"""FrozenModel: one copy of the weights, the same bytes everywhere."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import os
import pickle
import subprocess
import sys
import threading
import types
import warnings
import weakref

import joblib
import numpy as np
import pytest
import torch
from helpers import blobs, small_cnn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from torch import nn

from sinfkit import DCSPruner, FrozenModel
from sinfkit.frozen import as_frozen
from sinfkit.graph import trace
from sinfkit.utils import pack
from sinfkit.utils.weights_file import WeightsFile
from sinfkit.zoo import default_network


def test_clone_and_deepcopy_give_the_same_object():
    frozen = FrozenModel(small_cnn())
    assert clone(frozen, safe=False) is frozen
    assert copy.deepcopy(frozen) is frozen and copy.copy(frozen) is frozen
    assert clone(DCSPruner(frozen, criterion="dcs", schedule="linear")).model is frozen


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


def test_two_copies_of_one_network_are_equal_and_hash_alike():
    a, b = FrozenModel(small_cnn()), FrozenModel(small_cnn())
    assert a == b and hash(a) == hash(b) and joblib.hash(a) == joblib.hash(b)
    assert a != FrozenModel(small_cnn(seed=1))
    assert a != FrozenModel(small_cnn(), mean=[0.1], std=[1.0])
    assert a.module() is b.module()  # one copy per device and process


def test_who_asks_first_in_inference_mode_leaves_gradients_to_others():
    frozen = FrozenModel(small_cnn(seed=8))
    with torch.inference_mode():
        network = frozen.module()
    x = torch.ones(1, 1, 8, 8, requires_grad=True)
    network(x).sum().backward()
    assert x.grad.abs().sum() > 0


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
    holding = type("Holding", (nn.Linear,), {"kept": None})(2, 2)
    holding.kept = iter([1]), threading.Lock()
    with pytest.raises(TypeError, match="locks"):
        FrozenModel(holding)


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


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(default_network((1, 8, 8), 4).state_dict(), path)
    return path


FACTORY = functools.partial(default_network, (1, 8, 8), 4)


def test_of_a_file_the_name_is_pickled_and_the_weights_are_loaded_once(weights, monkeypatch):
    frozen = FrozenModel.from_file(weights, FACTORY, mean=[0.5], std=[0.2], input_shape=(1, 8, 8))
    network = FACTORY()
    network.load_state_dict(torch.load(weights))
    answer = network.eval()(torch.ones(1, 1, 8, 8)).detach()
    in_memory = FrozenModel(network, mean=[0.5], std=[0.2], input_shape=(1, 8, 8))
    assert frozen == in_memory and frozen.digest == in_memory.digest
    data = pickle.dumps(frozen)
    assert len(data) < 800 < len(pickle.dumps(in_memory)) / 20
    assert sys.getsizeof(frozen) < 1000 < sys.getsizeof(in_memory)
    assert pickle.dumps(pickle.loads(data)) == data
    assert joblib.hash(pickle.loads(data)) == joblib.hash(frozen)

    for seed in (1, 2):  # what was loaded before, as in another process, makes room for these
        other = weights.with_name(f"{seed}.pt")
        torch.save(default_network((1, 8, 8), 4, random_state=seed).state_dict(), other)
        pickle.loads(pickle.dumps(FrozenModel.from_file(other, FACTORY))).module()
    loads, load = [], WeightsFile.load
    monkeypatch.setattr(WeightsFile, "load", lambda self: loads.append(1) or load(self))
    del frozen, in_memory
    a, b = pickle.loads(data), pickle.loads(data)
    assert a == b and not loads
    assert a.module() is b.module()
    del a, b
    gc.collect()  # between two jobs of a worker nobody holds it
    with torch.no_grad():
        assert torch.equal(pickle.loads(data).module()(torch.ones(1, 1, 8, 8)), answer)
    assert len(loads) == 1


def test_a_file_that_has_changed_is_not_taken_for_the_old_one(weights):
    data = pickle.dumps(FrozenModel.from_file(weights, FACTORY))
    before = joblib.hash(pickle.loads(data))
    torch.save(default_network((1, 8, 8), 4, random_state=1).state_dict(), weights)
    with pytest.raises(ValueError, match="has changed"):
        pickle.loads(data).module()
    assert joblib.hash(FrozenModel.from_file(weights, FACTORY)) != before  # no cache mixes them up
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="every machine"):
        pickle.loads(data).module()


def test_an_estimator_of_a_file_is_small_until_it_is_fitted_and_predicts_without_it(weights):
    X, y = blobs(n_classes=4, per_class=20)
    pruner = DCSPruner(
        FrozenModel.from_file(weights, FACTORY), criterion="dcs", schedule="linear", random_state=0
    )
    assert len(pickle.dumps(pruner)) < 2000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it is not trained
        pruner.fit(X, y)
    expected, data = pruner.predict_proba(X), pickle.dumps(pruner)
    weights.unlink()
    np.testing.assert_array_equal(pickle.loads(data).predict_proba(X), expected)


def test_state_dicts_of_other_forms(tmp_path):
    network = FACTORY()
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, tmp_path / "nested.pt")
    nested = FrozenModel.from_file(tmp_path / "nested.pt", FACTORY)
    assert nested == FrozenModel(network)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(network.state_dict(), tmp_path / "w.safetensors")
    assert FrozenModel.from_file(tmp_path / "w.safetensors", FACTORY) == nested


PARTS = st.sampled_from(["module", "_orig_mod", "model", "net", "backbone"])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    prefix=st.lists(PARTS, max_size=3),
    inside=st.booleans(),
    nested=st.lists(st.sampled_from(["state_dict", "model", "ema", "net"]), max_size=2),
    beside=st.booleans(),
)
def test_checkpoints_as_trainers_write_them(tmp_path, prefix, inside, nested, beside):
    network = FACTORY()
    state = {".".join([*prefix, key]): value for key, value in network.state_dict().items()}
    if inside:  # a part that was compiled by itself
        state = {key.replace("0.weight", "0._orig_mod.weight"): v for key, v in state.items()}
    if beside and prefix:
        state["criterion.weight"] = torch.ones(4)
    stored = state
    for name in nested:
        stored = {"epoch": 3, "optimizer": {"state": {}, "lr": [0.1]}, name: stored}
    torch.save(stored, tmp_path / "checkpoint.pt")
    found = FrozenModel.from_file(tmp_path / "checkpoint.pt", FACTORY).module().state_dict()
    for key, value in network.state_dict().items():
        assert torch.equal(found[key], value)


def test_of_several_networks_in_a_checkpoint_the_one_that_is_named_so_is_taken(tmp_path):
    network, average = FACTORY(), default_network((1, 8, 8), 4, random_state=5)
    stored = {"ema": average.state_dict(), "model": network.state_dict(), "step": 1}
    torch.save(stored, tmp_path / "two.pt")
    assert FrozenModel.from_file(tmp_path / "two.pt", FACTORY) == FrozenModel(network)


def test_wrapped_networks_give_the_module_inside():
    network, x = small_cnn(), torch.ones(1, 1, 8, 8)
    assert FrozenModel(nn.DataParallel(network)) == FrozenModel(network)
    for wrapped in (torch.compile(network), nn.DataParallel(torch.compile(network))):
        inner = FrozenModel(wrapped).module()
        assert type(inner) is nn.Sequential
        torch.testing.assert_close(inner(x), network(x))
    inside = nn.Sequential(network[:7], torch.compile(network[7:]), nn.Identity())
    frozen = FrozenModel(inside)
    assert not any("_orig_mod" in name for name in frozen.module().state_dict())
    assert any("_orig_mod" in name for name in inside.state_dict())
    torch.testing.assert_close(frozen.module()(x), network(x))


def test_what_stands_for_an_addition_that_will_be_quantised_is_none():
    class Stubs(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.ao.quantization.QuantStub(), nn.Linear(4, 3)
            self.three, self.add = (
                torch.ao.quantization.DeQuantStub(),
                torch.ao.nn.quantized.FloatFunctional(),
            )

        def forward(self, x):
            x = self.two(self.one(x))
            return self.three(self.add.add(x, x))

    x = torch.ones(2, 4)
    network = Stubs().eval()
    torch.testing.assert_close(trace(FrozenModel(network).module(), x)(x), network(x))


def test_scripted_and_quantised_networks_are_refused():
    network = small_cnn()
    for scripted in (torch.jit.script(network), torch.jit.trace(network, torch.ones(1, 1, 8, 8))):
        with pytest.raises(TypeError, match="made from"):
            FrozenModel(scripted)
        with pytest.raises(TypeError, match="made from"):
            FrozenModel(nn.Sequential(scripted))
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(TypeError, match="quantised"):
        FrozenModel(quantised)


SCRIPT = """
import sys
import joblib, torch
from torch import nn
from sinfkit import FrozenModel

def activation(x):
    return x.clamp(0, 2)

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.activation = nn.Linear(4, 3), activation

    def forward(self, x):
        return self.activation(self.layer(x))

def answer(frozen):
    again = FrozenModel(frozen.module())
    return frozen.module()(torch.ones(2, 4)), again

if __name__ == "__main__":
    torch.manual_seed(0)
    frozen = FrozenModel(Own())
    with joblib.parallel_config("loky", n_jobs=2):  # one job, one worker
        results = joblib.Parallel()(joblib.delayed(answer)(frozen) for _ in range(1))
    for there, again in results:
        assert torch.equal(there, frozen.module()(torch.ones(2, 4)))
        assert again == frozen
"""


def test_classes_of_a_script_reach_the_workers(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_files_and_factories_that_do_not_do(weights, tmp_path):
    state = torch.get_rng_state()
    FrozenModel.from_file(weights, FACTORY)
    assert torch.equal(torch.get_rng_state(), state)
    for factory, match in (
        (lambda: None, "top level"),
        (default_network((1, 8, 8), 4), "function without arguments"),
        (dict, "returned dict"),
    ):
        with pytest.raises(TypeError, match=match):
            FrozenModel.from_file(weights, factory)
    with pytest.raises(ValueError, match="do not fit the network"):
        FrozenModel.from_file(weights, functools.partial(default_network, (1, 8, 8), 5))
    with pytest.raises(FileNotFoundError, match="no file"):
        FrozenModel.from_file(tmp_path / "none.pt", FACTORY)
    for name, content in (("a.pt", b"no weights"), ("b.safetensors", b"no"), ("c.pt", None)):
        if content is None:
            torch.save([1, 2], tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, ImportError), match=f"{name} (cannot be|holds no|needs)"):
            FrozenModel.from_file(tmp_path / name, FACTORY)


SOURCE = """
from torch import nn
SCALE = 2.0
def act(x):
    return x.relu()
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    @property
    def factor(self):
        return SCALE
    def forward(self, x, shift=0.0):
        return act(self.layer(x)) * self.factor + shift
"""
CHANGES = [
    ("x.relu()", "x.tanh()"),
    ("SCALE = 2.0", "SCALE = 3.0"),
    ("return SCALE", "return 1.5"),
    ("shift=0.0", "shift=1.0"),
    ("* self.factor", "- self.factor"),
]


@pytest.fixture
def other_code(monkeypatch):
    """A function that runs a module's code anew under the same name, as a reload does."""

    def build(source):
        module = types.ModuleType("other_code")
        monkeypatch.setitem(sys.modules, "other_code", module)
        exec(source, module.__dict__)
        return module.Net

    return build


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["module", "main", "local"])
def test_other_code_under_the_same_name_is_another_network(change, how, other_code, monkeypatch):
    def network(source):
        kind = other_code(source)
        if how == "main":
            kind.__module__ = "__main__"
            monkeypatch.setattr(sys.modules["__main__"], "Net", kind, raising=False)
        elif how == "local":
            kind.__qualname__ = "build.<locals>.Net"
        torch.manual_seed(0)
        return kind().eval()

    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    first = network(SOURCE)
    frozen, same = FrozenModel(first), FrozenModel(network(SOURCE))
    assert torch.equal(frozen.module()(x), first(x))  # held while the others are made
    assert same == frozen or how == "local"
    second = network(SOURCE.replace(*change))
    other = FrozenModel(second)
    assert other != frozen
    if how != "main":  # another process would find the one class that is there
        assert joblib.hash(other) != joblib.hash(frozen)
    assert torch.equal(other.module()(x), second(x))
    assert not torch.equal(second(x), first(x))
    if how == "module":
        again = pickle.loads(pickle.dumps(other))
        assert again == other and torch.equal(again.module()(x), second(x))


def test_pickles_and_digests_are_the_same_in_another_process(tmp_path, monkeypatch):
    frozen = FrozenModel(small_cnn(), mean=[0.5], std=[0.25])
    data = pickle.dumps(frozen)
    assert pickle.dumps(pickle.loads(data)) == data
    assert pickle.dumps(copy.deepcopy(frozen)) == data
    (tmp_path / "frozen.pkl").write_bytes(data)
    # A set's order, in which its code has it as well, is another one there.
    (tmp_path / "named.py").write_text(f"{SOURCE}    kinds = {set('abcdefghijklmnop')}\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    digest = FrozenModel(importlib.import_module("named").Net()).digest
    monkeypatch.delitem(sys.modules, "named")
    code = (
        "import joblib, pickle, torch; from named import Net; from sinfkit import FrozenModel\n"
        "f = pickle.load(open('frozen.pkl', 'rb')); f.module(); torch.manual_seed(0)\n"
        "print(joblib.hash(f), joblib.hash(pickle.dumps(f)), FrozenModel(Net()).digest)"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split() == [joblib.hash(frozen), joblib.hash(data), digest]


def test_layers_that_are_not_initialised_are_refused():
    with pytest.raises(ValueError, match="not initialised yet"):
        FrozenModel(torch.nn.Sequential(torch.nn.LazyLinear(3)))
