from __future__ import annotations

import copy
import operator
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import randomise_batch_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import sinfkit
from sinfkit.graph import (
    CutPoint,
    channel_axis,
    copy_sharing_weights,
    cut_points,
    find_cut,
    find_layer,
    layer_names,
    observation_nodes,
    opaque_modules,
    output_layer,
    penultimate,
    split,
    trace,
    with_capture,
)

few = settings(deadline=None, max_examples=25)


# Random small networks: blocks that know what their cuts should be called.


class Plain(nn.Module):
    """Convolution, batch-norm, ReLU; the ReLU may be a function and overwrite its argument."""

    def __init__(self, n_in: int, n_out: int, relu: str, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.bn = nn.BatchNorm2d(n_out)
        self.act = nn.ReLU(inplace=relu == "module_")
        self.relu = relu
        self.pool = nn.MaxPool2d(2, 1) if pool else None
        self.cuts = ["conv"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        if self.relu.startswith("module"):
            x = self.act(x)
        elif self.relu == "method_":
            x = x.relu_()
        else:
            x = F.relu(x, inplace=self.relu.endswith("_"))
        return x if self.pool is None else self.pool(x)


class Residual(nn.Module):
    """Two convolutions, a shortcut, and one ReLU object that is called twice."""

    def __init__(self, n_in: int, n_out: int, inplace: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.relu = nn.ReLU(inplace=inplace)
        self.cuts = [""]

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class Concatenating(nn.Module):
    """As in a DenseNet: norm and ReLU first, the input kept beside the new channels."""

    def __init__(self, n_in: int, n_new: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(n_in)
        self.conv = nn.Conv2d(n_in, n_new, 3, padding=1)
        self.cuts = [""]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x), inplace=True))], 1)


class Depthwise(nn.Module):
    """As in a MobileNet: depthwise, then pointwise, and a sum."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n, n, 3, padding=1, groups=n),
            nn.BatchNorm2d(n),
            nn.ReLU6(inplace=True),
            nn.Conv2d(n, n, 1),
            nn.BatchNorm2d(n),
        )
        self.cuts = [""]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Network(nn.Module):
    def __init__(self, blocks: list[nn.Module], n_channels: int, flatten: str) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(n_channels, 4)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.blocks(x), 1)
        if self.flatten == "view":
            x = x.view(x.size(0), -1)
        elif self.flatten == "shape":
            x = x.reshape(x.shape[0], -1)
        else:
            x = torch.flatten(x, 1)
        return self.fc(self.drop(x))

    def expected_cuts(self) -> list[str]:
        return [
            f"blocks.{i}.{cut}".rstrip(".")
            for i, block in enumerate(self.blocks)
            for cut in block.cuts
        ]


@st.composite
def networks(draw: Callable) -> Network:
    seed = draw(st.integers(0, 1000))
    kinds = draw(
        st.lists(
            st.sampled_from(["plain", "residual", "concatenating", "depthwise"]),
            min_size=1,
            max_size=5,
        )
    )
    blocks: list[nn.Module] = []
    n = 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for kind in kinds:
            n_out = draw(st.sampled_from([n, 2, 5]))
            if kind == "plain":
                relu = draw(
                    st.sampled_from(["module", "module_", "function", "function_", "method_"])
                )
                blocks.append(Plain(n, n_out, relu, pool=draw(st.booleans())))
                n = n_out
            elif kind == "residual":
                blocks.append(Residual(n, n_out, inplace=draw(st.booleans())))
                n = n_out
            elif kind == "concatenating":
                blocks.append(Concatenating(n, 2))
                n += 2
            else:
                blocks.append(Depthwise(n))
        flatten = draw(st.sampled_from(["view", "shape", "flatten"]))
        network = Network(blocks, n, flatten)
    return randomise_batch_norms(network, seed).eval()


def images(n: int = 2, size: int = 7, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in module.state_dict().values()}


def run(module: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return module(x)


@few
@given(networks())
def test_trace_computes_the_same(network: Network) -> None:
    x = images()
    kept = x.clone()
    gm = trace(network)
    assert torch.equal(run(gm, x), run(network, kept.clone()))
    assert torch.equal(x, kept)
    assert set(gm.state_dict()) == set(network.state_dict())
    assert storages(gm) == storages(network)
    names = dict(network.named_modules())
    assert all(names[name].weight is gm.get_submodule(name).weight for name in layer_names(gm))


@few
@given(networks())
def test_no_value_is_overwritten(network: Network) -> None:
    gm = trace(network)
    nodes = {n.name: n.name for n in gm.graph.nodes if n.op == "call_module"}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    watched = with_capture(gm, nodes, lambda key, v: seen.update({key: (v, v.clone())}))
    run(watched, images())
    assert seen.keys() == nodes.keys()
    assert all(torch.equal(now, then) for now, then in seen.values())


@few
@given(networks())
def test_cuts_are_where_they_should_be(network: Network) -> None:
    gm = trace(network)
    cuts = cut_points(gm)
    assert [cut.name for cut in cuts] == network.expected_cuts()
    order = [node.name for node in gm.graph.nodes]
    positions = [order.index(cut.node) for cut in cuts]
    assert positions == sorted(set(positions))


@few
@given(networks())
def test_prefix_and_rest_are_the_whole(network: Network) -> None:
    gm = trace(network)
    x = images()
    expected = run(gm, x)
    modules = dict(gm.named_modules())
    order = [node.name for node in gm.graph.nodes]
    for cut in cut_points(gm):
        prefix, rest = split(gm, cut)
        assert torch.equal(run(rest, run(prefix, x)), expected)
        # Other batch sizes, too: the number of samples is computed anew.
        assert torch.equal(run(rest, run(prefix, x[:1])), run(gm, x[:1]))
        assert layer_names(prefix) + layer_names(rest) == layer_names(gm)
        assert not set(prefix.state_dict()) & set(rest.state_dict())
        assert set(prefix.state_dict()) | set(rest.state_dict()) == set(gm.state_dict())
        for half in (prefix, rest):
            assert not half.training
            for name, module in half.named_modules():
                if not list(module.children()) and name:
                    assert module is modules[name]
        names = [n.name for half in (prefix, rest) for n in half.graph.nodes]
        assert set(names) - {"x", "output"} <= set(order) | {"size"}


@few
@given(networks(), st.integers(1, 3))
def test_activations_have_the_channels_of_their_layers(network: Network, n: int) -> None:
    gm = trace(network)
    nodes = observation_nodes(gm, layer_names(gm))
    assert list(nodes) == layer_names(gm)
    seen: dict[str, Tensor] = {}
    run(with_capture(gm, nodes, seen.__setitem__), images(n))
    for name, value in seen.items():
        layer = gm.get_submodule(name)
        width = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
        assert value.shape[channel_axis(gm, nodes[name])] == width
        assert len(value) == n


@few
@given(networks())
def test_activations_are_those_of_the_block(network: Network) -> None:
    outputs: dict[str, Tensor] = {}
    expected: dict[str, str] = {}
    for i, block in enumerate(network.blocks):
        before_pool = block.act if isinstance(block, Plain) else block
        if isinstance(block, Plain) and block.relu.startswith("module"):
            expected[f"blocks.{i}.conv"] = str(i)
        elif isinstance(block, Residual):
            expected[f"blocks.{i}.conv2"] = str(i)
            if isinstance(block.shortcut, nn.Conv2d):
                expected[f"blocks.{i}.shortcut"] = str(i)
        elif isinstance(block, Depthwise):
            # If the next block adds to this sum, the sum has two readers and is observed itself.
            expected[f"blocks.{i}.body.3"] = str(i)
        before_pool.register_forward_hook(
            lambda m, a, out, key=str(i): outputs.update({key: out.clone()})
        )
    run(network, images())
    for block in network.blocks:
        (block.act if isinstance(block, Plain) else block)._forward_hooks.clear()
    gm = trace(network)
    seen: dict[str, Tensor] = {}
    run(with_capture(gm, observation_nodes(gm, list(expected)), seen.__setitem__), images())
    for name, key in expected.items():
        follower = network.blocks[int(key) + 1 : int(key) + 2]
        if "body" in name and follower and isinstance(follower[0], Concatenating):
            continue  # read by the norm and by the concatenation: nothing to assert beyond shape
        assert torch.equal(seen[name], outputs[key]), name


@few
@given(networks())
def test_pickles_and_copies(network: Network) -> None:
    gm = trace(network)
    x = images()
    expected = run(gm, x)
    names = [n.name for n in gm.graph.nodes]
    for twin in (pickle.loads(pickle.dumps(gm)), copy.deepcopy(gm), trace(gm)):
        assert torch.equal(run(twin, x), expected)
        assert [n.name for n in twin.graph.nodes] == names
        assert cut_points(twin) == cut_points(gm)
    cut = cut_points(gm)[-1]
    halves = pickle.loads(pickle.dumps(split(gm, cut)))
    assert torch.equal(run(halves[1], run(halves[0], x)), expected)
    shared = copy_sharing_weights(gm)
    assert shared is not gm
    assert storages(shared) == storages(gm)
    assert not storages(copy.deepcopy(gm)) & storages(gm)


# torchvision's networks


def torchvision_network(name: str, **arguments: object) -> nn.Module:
    """One of torchvision's, with ten outputs and quickly drawn weights."""
    with torch.device("meta"):
        network = getattr(torchvision.models, name)(num_classes=10, **arguments)
        if name.startswith("vgg"):  # its two wide layers hold nine tenths of all parameters
            network.classifier[0] = nn.Linear(25088, 16)
            network.classifier[3] = nn.Linear(16, 16)
            network.classifier[6] = nn.Linear(16, 10)
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(0, (2 / max(p[0].numel(), 1)) ** 0.5, generator=generator)
    return randomise_batch_norms(network).eval()


BLOCKS = {
    "resnet18": ["conv1", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))],
    "resnet50": ["conv1"]
    + [f"layer{i}.{j}" for i, n in enumerate((3, 4, 6, 3), start=1) for j in range(n)],
    "vgg16_bn": [f"features.{i}" for i in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)]
    + ["classifier.0", "classifier.3"],
    "densenet121": [
        "features.conv0",
        "features.denseblock1",
        "features.transition1.conv",
        "features.denseblock2",
        "features.transition2.conv",
        "features.denseblock3",
        "features.transition3.conv",
        "features.denseblock4",
    ],
    "googlenet": ["conv1.conv", "conv2.conv", "conv3.conv"]
    + [f"inception{i}" for i in "3a 3b 4a 4b 4c 4d 4e 5a 5b".split()],
}


@pytest.mark.parametrize(
    "name", [*BLOCKS, "mobilenet_v2", "squeezenet1_1", "shufflenet_v2_x0_5", "efficientnet_b0"]
)
def test_torchvision(name: str) -> None:
    arguments = {"init_weights": False} if name == "googlenet" else {}
    network = torchvision_network(name, **arguments)
    x = images(2, 64 if name == "squeezenet1_1" else 32)
    gm = trace(network)
    expected = run(network, x)
    assert torch.isfinite(expected).all() and expected.std() > 0
    assert torch.equal(run(gm, x), expected)
    cuts = cut_points(gm)
    if name in BLOCKS:
        assert [cut.name for cut in cuts] == BLOCKS[name]
    assert len({cut.name for cut in cuts}) == len(cuts)
    for cut in (cuts[1], cuts[-1]):
        prefix, rest = split(gm, cut)
        assert torch.equal(run(rest, run(prefix, x)), expected)
        prefix, rest = copy.deepcopy((prefix, rest))
        assert torch.equal(run(rest, run(prefix, x)), expected)
    assert output_layer(gm, 10) == layer_names(gm)[-1]
    nodes = observation_nodes(gm, layer_names(gm))
    channels: dict[str, int] = {}
    run(with_capture(gm, nodes, lambda k, v: channels.update({k: v.shape[1]})), x)
    assert channels == {k: gm.get_submodule(k).weight.shape[0] for k in layer_names(gm)}


def test_cuts_of_vgg_come_after_relu_and_pooling_but_before_flattening() -> None:
    with torch.device("meta"):
        gm = trace(torchvision.models.vgg16_bn())
    cuts = {cut.name: cut.node for cut in cut_points(gm)}
    assert cuts["features.0"] == "features_2"  # ReLU
    assert cuts["features.3"] == "features_6"  # maximum pooling
    assert cuts["features.40"] == "avgpool"
    assert cuts["classifier.0"] == "classifier_2"  # dropout
    nodes = observation_nodes(gm, ["features.3", "features.40", "classifier.0"])
    assert nodes == {
        "features.3": "features_5",
        "features.40": "features_42",
        "classifier.0": "classifier_1",
    }


def test_mobilenet_is_cut_in_and_after_blocks() -> None:
    with torch.device("meta"):
        gm = trace(torchvision.models.mobilenet_v2())
    names = [cut.name for cut in cut_points(gm)]
    # Block 2 has no shortcut, so it is a chain; block 3 has one.
    assert [n for n in names if n.startswith(("features.2.", "features.3"))] == [
        "features.2.conv.0.0",
        "features.2.conv.1.0",
        "features.2.conv.2",
        "features.3",
    ]
    assert observation_nodes(gm, ["features.3.conv.2"]) == {"features.3.conv.2": "add"}


def test_pickles_load_in_a_new_process(tmp_path: Path) -> None:
    # efficientnet_b0 calls a function that torch.fx must not look into when unpickling. Outputs are
    # close and no more: another process may have another number of threads, or other alignment.
    x = images(2, 32)
    record = {}
    for name in ("resnet18", "efficientnet_b0"):
        gm = trace(torchvision_network(name))
        cut = cut_points(gm)[4]
        nodes = [n.name for n in gm.graph.nodes]
        record[name] = (gm, split(gm, cut), cut_points(gm), nodes, run(gm, x))
    path = tmp_path / "networks.pkl"
    path.write_bytes(pickle.dumps((x, record)))
    code = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    x, record = pickle.load(file)
from sinfkit.graph import cut_points, split
from torch.testing import assert_close
with torch.inference_mode():
    for name, (gm, (prefix, rest), cuts, nodes, expected) in record.items():
        assert [n.name for n in gm.graph.nodes] == nodes, name
        assert cut_points(gm) == cuts, name
        near = {"rtol": 1e-4, "atol": 1e-5 * float(expected.abs().max()), "msg": name}
        assert_close(gm(x), expected, **near)
        assert_close(rest(prefix(x)), expected, **near)
        again = split(gm, cuts[2])
        assert_close(again[1](again[0](x)), expected, **near)
        shared = {t.data_ptr() for h in (prefix, rest) for t in h.parameters()}
        assert shared == {t.data_ptr() for t in gm.parameters()}, name
print("all good")
"""
    source = str(Path(sinfkit.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert done.stdout == "all good\n", done.stderr


# Operations that overwrite their arguments


class Bare(nn.Module):
    """Two layers around a function."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.last = nn.Conv2d(4, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.between(x)).mean((2, 3))


def sum_after_relu(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True) + x


def positional(x: Tensor) -> Tensor:
    return F.relu(x, True) - 2 * x


def discarded(x: Tensor) -> Tensor:
    torch.relu_(x)
    return x


def method(x: Tensor) -> Tensor:
    y = x.clamp_(min=0.1)
    x.add_(1)
    return x * y


def through_dropout(x: Tensor) -> Tensor:
    y = F.dropout(x, 0.5, training=False)
    F.relu_(y)
    return x + 3 * y


def explicit_operator(x: Tensor) -> Tensor:
    y = operator.iadd(x, 1)
    return x * y


def augmented(x: Tensor) -> Tensor:
    shortcut = x
    x += F.relu(x)
    x *= 2
    x -= 1
    x /= 3
    return shortcut * x


def augmented_number(x: Tensor) -> Tensor:
    n = before = x.shape[2]
    n += 1
    return x * n + before


def twice(x: Tensor) -> Tensor:
    y = x.mul_(2)
    y.add_(1)
    return x.relu_() + y


@pytest.mark.parametrize(
    "between",
    [
        sum_after_relu,
        positional,
        discarded,
        method,
        through_dropout,
        explicit_operator,
        augmented,
        augmented_number,
        twice,
    ],
)
def test_overwriting_keeps_its_meaning(between: Callable[[Tensor], Tensor]) -> None:
    network = Bare(between).eval()
    gm = trace(network)
    assert torch.equal(run(gm, images()), run(network, images()))
    mutating = [n for n in gm.graph.nodes if str(n.target).rstrip("_") != str(n.target)]
    assert not mutating
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    nodes = {n.name: n.name for n in gm.graph.nodes if n.op not in ("placeholder", "output")}

    def look(key: str, value: Tensor) -> None:
        if isinstance(value, Tensor):
            seen[key] = value, value.clone()

    run(with_capture(gm, nodes, look), images())
    assert all(torch.equal(now, then) for now, then in seen.values())


def test_overwriting_module_keeps_its_meaning() -> None:
    class Odd(Bare):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = self.drop(x)
            self.act(y)
            return self.last(x + 2 * y).mean((2, 3))

    network = Odd(torch.relu).eval()
    gm = trace(network)
    assert torch.equal(run(gm, images()), run(network, images()))
    assert network.act.inplace  # the caller's own is as it was


def test_the_input_is_not_overwritten() -> None:
    gm = trace(nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 2, 1)))
    x = images()
    run(gm, x)
    assert torch.equal(x, images())


# What cannot be traced


class Gate(nn.Module):
    """Control flow that depends on values."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n, n, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > 0 else x


class Holder(nn.Module):
    """Its own code is harmless, but it hides a gate."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.before = nn.Conv2d(n, n, 1)
        self.gate = Gate(n)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.before(x))


def gated() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), Holder(4), nn.ReLU(), Gate(4), nn.Flatten(), nn.Linear(100, 5)
    ).eval()


def test_untraceable_parts_become_opaque() -> None:
    network = gated()
    with pytest.warns(UserWarning, match=r"Layers inside 1\.gate, 3 stay whole") as record:
        gm = trace(network)
    assert len(record) == 1
    assert opaque_modules(gm) == ["1.gate", "3"]
    assert layer_names(gm) == ["0", "1.before", "5"]
    assert [cut.name for cut in cut_points(gm)] == ["0", "1.before", "1.gate", "3"]
    for sign in (1, -1):
        x = sign * images().abs()
        expected = run(network, x)
        assert torch.equal(run(gm, x), expected)
        for cut in cut_points(gm):
            prefix, rest = split(gm, cut)
            assert torch.equal(run(rest, run(prefix, x)), expected)
    with pytest.warns(UserWarning):
        again = trace(gm)
    assert [n.name for n in again.graph.nodes] == [n.name for n in gm.graph.nodes]
    twin = pickle.loads(pickle.dumps(gm))
    assert torch.equal(run(twin, images()), run(gm, images()))


def test_untraceable_network_says_what_to_do_and_that_works() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else x[:, :2]

    with pytest.raises(ValueError, match=r"Root.*nn\.Sequential\(prefix, rest\)"):
        trace(Root())
    network = nn.Sequential(Root(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with pytest.warns(UserWarning, match="0 stay whole"):
        gm = trace(network)
    assert [cut.name for cut in cut_points(gm)] == ["0", "1"]
    both = nn.Sequential(Root(), Root()).eval()
    with pytest.warns(UserWarning, match="0, 1 stay whole"):
        gm = trace(both)
    assert cut_points(gm) == [CutPoint("0", "_0")]
    with pytest.raises(ValueError, match="'1', which torch.fx cannot look into"):
        output_layer(gm, 2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_by_hook_becomes_a_plain_layer() -> None:
    network = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    expected = network(x)  # leaves a computed weight behind, which cannot be copied
    gm = trace(network)
    assert layer_names(gm) == ["0", "2"]
    assert torch.equal(gm(x), expected)


# As text, because pytest rewrites the assertions of a test file.
CAREFUL = """
class Careful(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        assert x.dim() == 2 and x.shape[1] == 3, f"bad shape {x.shape}"
        assert x.shape[1] == self.fc.in_features
        assert not x.shape[0] < 1
        assert not (x.dim() < 2 or x.dim() > 3)
        return self.fc(x)
"""


def test_assertions_pass() -> None:
    scope: dict[str, type[nn.Module]] = {}
    exec(CAREFUL, {"nn": nn}, scope)
    network = scope["Careful"]()
    gm = trace(network)
    x = torch.ones(4, 3)
    assert torch.equal(run(gm, x), run(network, x))


def test_what_is_no_network() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got function"):
        trace(lambda x: x)  # type: ignore[arg-type]

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x + 1

    with pytest.raises(ValueError, match=r"Two\.forward must return one tensor"):
        trace(Two())
    with pytest.raises(ValueError, match="no convolution or Linear"):
        output_layer(trace(nn.Sequential(nn.ReLU())), 3)


def test_optional_arguments_keep_their_defaults() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
            return scale * self.fc(x if mask is None else x * mask)

    network = Masked()
    gm = trace(network)
    x = torch.ones(4, 3)
    assert torch.equal(run(gm, x), run(network, x))
    assert [n.op for n in gm.graph.nodes].count("placeholder") == 1


# The caller's network


def test_the_network_stays_as_it_was() -> None:
    network = torchvision.models.resnet18(num_classes=4)
    network.train()
    network.fc.weight.requires_grad_(False)
    modes = [m.training for m in network.modules()]
    tensors = {
        k: (v, v.clone(), v.requires_grad) for k, v in network.state_dict(keep_vars=True).items()
    }
    flags = [getattr(m, "inplace", None) for m in network.modules()]
    gm = trace(network)
    for cut in cut_points(gm)[:2]:
        prefix, rest = split(gm, cut)
        run(rest, run(prefix, images(2, 32)))
    assert not any(m.training for m in gm.modules())
    assert [m.training for m in network.modules()] == modes
    assert [getattr(m, "inplace", None) for m in network.modules()] == flags
    now = network.state_dict(keep_vars=True)
    for name, (tensor, value, requires_grad) in tensors.items():
        assert now[name] is tensor
        assert torch.equal(tensor, value)
        assert tensor.requires_grad == requires_grad
    gm.fc.weight.data[0] = 7.0
    assert (network.fc.weight[0] == 7).all()


# Names


def test_layers_are_in_the_order_of_execution() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 2)
            self.unused = nn.Linear(2, 2)
            self.first = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.first(x)))

    gm = trace(Backwards())
    assert layer_names(gm) == ["first", "last"]
    assert output_layer(gm, 2) == "last"


def test_output_layer_must_fit() -> None:
    gm = trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match="with 4 outputs, but its last layer, '2', is Linear"):
        output_layer(gm, 4)
    wide = trace(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten()))
    with pytest.raises(ValueError, match="1 x 1 convolution"):
        output_layer(wide, 5)
    narrow = trace(nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert output_layer(narrow, 5) == "0"


def test_a_cut_is_found_by_layer_and_by_module() -> None:
    with torch.device("meta"):
        gm = trace(torchvision.models.resnet18())
    for name, expected in {
        "layer2.1": "layer2.1",
        "layer2": "layer2.1",
        "layer2.0.conv1": "layer2.0",
        "layer2.0.downsample": "layer2.0",
        "layer1.1.conv2": "layer1.1",
        "conv1": "conv1",
    }.items():
        assert find_cut(gm, name).name == expected
    with pytest.raises(ValueError, match=r"cannot be cut after 'fc'.*conv1, layer1\.0"):
        find_cut(gm, "fc")
    for missing in ("layer9", "layer", "", "relu"):
        with pytest.raises(ValueError, match=r"has no layer or module.*layer4\.1"):
            find_cut(gm, missing)


def test_a_layer_is_found_by_module() -> None:
    gm = trace(nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(3, 4)), nn.Linear(4, 2)))
    assert find_layer(gm, "0") == "0.1"
    assert find_layer(gm, "1") == "1"
    with pytest.raises(ValueError, match=r"no layer '2'.*0\.1, 1"):
        find_layer(gm, "2")


# Where one tensor is live


class Case(nn.Module):
    """Two layers and room for oddities."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3, padding=1)
        self.b = nn.Conv2d(3, 3, 3, padding=1)
        self.c = nn.Conv2d(3, 3, 1)
        self.offset = nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("scale", torch.full((3, 1, 1), 2.0))


class LongShortcut(Case):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)) + x)


class SharedLayer(Case):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(F.relu(self.a(F.relu(self.b(x))))))


class BatchSize(Case):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        m = x.size(0)
        x = self.b(self.a(x)).reshape(n, 3, -1)
        return self.c(x.view(m, 3, -1, 1))


class LateBatchSize(Case):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return self.c(y.reshape(x.shape[0], 3, -1, 1))


class Width(Case):
    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = self.b(self.a(x)).reshape(n, -1)
        return self.c(x.view(n, 3, h, w))


class Constants(Case):
    def forward(self, x: Tensor) -> Tensor:
        shift = self.offset * self.scale
        return self.c(self.b(self.a(x) + shift) - shift)


class SharedParameter(Case):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x + self.offset)) * self.offset)


class EarlyConstant(Case):
    def forward(self, x: Tensor) -> Tensor:
        shift = self.offset * 2
        x = self.b(self.a(x))
        return self.c(x * shift)


class Swish(Case):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x * torch.sigmoid(x)
        return self.c(F.avg_pool2d(self.b(x), 2))


class Chunks(Case):
    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.a(x).chunk(3, 1)
        return self.c(self.b(torch.cat([third, first, second], 1)))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (LongShortcut, ["b"]),
        (SharedLayer, ["b"]),
        (BatchSize, ["a", "b"]),
        (LateBatchSize, ["a", "b"]),
        (Width, ["b"]),
        (Constants, ["a", "b"]),
        (SharedParameter, ["a", "b"]),
        (EarlyConstant, ["a", "b"]),
        (Swish, ["a", "b"]),
        (Chunks, ["a", "b"]),
    ],
)
def test_one_live_tensor(kind: type[Case], expected: list[str]) -> None:
    network = kind().eval()
    gm = trace(network)
    cuts = cut_points(gm)
    assert [cut.name for cut in cuts] == expected
    for n in (1, 3):
        x = images(n, 6)
        assert torch.equal(run(gm, x), run(network, x))
        for cut in cuts:
            prefix, rest = split(gm, cut)
            assert torch.equal(run(rest, run(prefix, x)), run(network, x))
            assert set(prefix.state_dict()) | set(rest.state_dict()) == set(gm.state_dict())
            if kind is EarlyConstant and cut is cuts[0]:
                assert "offset" not in prefix.state_dict()


def test_the_cut_after_a_swish_is_after_its_product() -> None:
    cuts = cut_points(trace(Swish()))
    assert [cut.node for cut in cuts] == ["mul", "avg_pool2d"]


def test_only_the_last_of_several_sums_has_the_name_of_the_module() -> None:
    class TwoSums(Case):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.b(F.relu(self.a(x)))
            return x + self.c(x)

    gm = trace(nn.Sequential(TwoSums(), nn.Conv2d(3, 2, 1)))
    assert cut_points(gm) == [CutPoint("0.b", "add"), CutPoint("0", "add_1")]


def test_a_module_has_its_name_though_it_can_be_cut_inside() -> None:
    with torch.device("meta"):
        gm = trace(torchvision.models.squeezenet1_1())
    names = [cut.name for cut in cut_points(gm)]
    assert names[:5] == [
        "features.0",
        "features.3.squeeze",
        "features.3",
        "features.4.squeeze",
        "features.4",
    ]


def test_chunks_are_no_tensor() -> None:
    gm = trace(Chunks())
    with pytest.raises(ValueError, match="not a place where"):
        split(gm, CutPoint("a", "chunk"))
    assert cut_points(gm)[0].node != "chunk"


def test_a_cut_of_another_network_is_refused() -> None:
    gm = trace(LongShortcut())
    for node in ("a", "nowhere"):
        with pytest.raises(ValueError, match="not a place where this network can be cut"):
            split(gm, CutPoint("a", node))


def test_penultimate() -> None:
    network = torchvision_network("resnet18")
    gm = trace(network)
    features = penultimate(gm, "fc")
    x = images(2, 32)
    with torch.inference_mode():
        assert torch.equal(network.fc(features(x)), network(x))
    assert "fc" not in dict(features.named_modules())
    with pytest.raises(ValueError, match="no layer 'nope'"):
        penultimate(gm, "nope")


# Observation


def observed(network: nn.Module, *layers: str) -> list[str]:
    gm = trace(network.eval())
    names = {n.name: str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    return [names.get(n, n) for n in observation_nodes(gm, layers).values()]


def test_a_branch_ends_after_the_sum() -> None:
    block = Residual(3, 5, inplace=True)
    head = nn.Sequential(block, nn.MaxPool2d(2), nn.Conv2d(5, 2, 1))
    assert observed(head, "0.conv1", "0.conv2", "0.shortcut", "2") == ["0.relu"] * 3 + ["2"]
    gm = trace(head)
    nodes = observation_nodes(gm, ["0.conv1", "0.conv2", "0.shortcut"])
    assert nodes["0.conv1"] != nodes["0.conv2"] == nodes["0.shortcut"]


def test_a_broadcast_sum_is_not_followed() -> None:
    class Broadcast(Case):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.a(x) + F.relu(self.one(x))))

    assert observed(Broadcast(), "a", "one") == ["a", "relu"]


def test_sums_with_constants_are_not_followed() -> None:
    class Shifted(Case):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x)) + 1) + self.offset))

    assert observed(Shifted(), "a", "b") == ["relu", "b"]


def test_a_doubled_value_is_not_a_residual_sum() -> None:
    class Doubled(Case):
        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.c(self.b(y + y))

    assert observed(Doubled(), "a") == ["a"]


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU6(),
        nn.GELU(),
        nn.SiLU(inplace=True),
        nn.Hardswish(),
        nn.LeakyReLU(),
        nn.PReLU(),
        nn.Sigmoid(),
    ],
)
def test_activation_modules_are_followed(activation: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), activation, nn.Conv2d(4, 2, 1))
    assert observed(network, "0", "3") == ["2", "3"]


@pytest.mark.parametrize(
    "function", [F.gelu, F.silu, F.hardswish, F.leaky_relu, torch.tanh, F.relu6]
)
def test_activation_functions_are_followed(function: Callable[[Tensor], Tensor]) -> None:
    class Functional(Case):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(function(self.a(x)))

    network = Functional().eval()
    gm = trace(network)
    nodes = observation_nodes(gm, ["a"])
    seen: dict[str, Tensor] = {}
    run(with_capture(gm, nodes, seen.__setitem__), images())
    with torch.inference_mode():
        assert torch.equal(seen["a"], function(network.a(images())))


def test_softmax_is_no_activation_to_follow() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(1))
    assert observed(network, "0", "2") == ["1", "2"]


def test_dropout_is_looked_through_only_for_what_follows() -> None:
    ends = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))
    assert observed(ends, "0") == ["0"]
    goes_on = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.ReLU(), nn.Linear(4, 2))
    assert observed(goes_on, "0") == ["2"]


def test_reading_the_shape_is_not_reading_the_value() -> None:
    class Shaped(Case):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            n, size = x.size(0), x.shape[2]
            return self.c(F.relu(x).reshape(n, 3, size, -1))

    assert observed(Shaped(), "a") == ["relu"]


def test_channels_of_linear_layers_come_last() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.fc = nn.Linear(4, 6)
            self.out = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.fc(self.conv(x).permute(0, 2, 3, 1)))
            return self.out(x.mean((1, 2)))

    gm = trace(Mixer())
    nodes = observation_nodes(gm, layer_names(gm))
    axes = {name: channel_axis(gm, node) for name, node in nodes.items()}
    assert axes == {"conv": 1, "fc": -1, "out": -1}
    shapes: dict[str, torch.Size] = {}
    run(with_capture(gm, nodes, lambda k, v: shapes.update({k: v.shape})), images())
    assert shapes == {"conv": (2, 4, 5, 5), "fc": (2, 5, 5, 6), "out": (2, 2)}


def test_unknown_names_are_refused() -> None:
    gm = trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match="no layer '1' that can be observed.*: 0, 2"):
        observation_nodes(gm, ["0", "1"])
    with pytest.raises(ValueError, match="no node 'nope'"):
        with_capture(gm, {"a": "nope"}, lambda k, v: None)


def test_capture_shows_values_in_order_and_keeps_none() -> None:
    gm = trace(nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(3, 3), nn.ReLU()))))
    alive: list[int] = []
    seen: list[tuple[str, weakref.ref]] = []

    def look(key: str, value: Tensor) -> None:
        seen.append((key, weakref.ref(value)))
        alive.append(sum(ref() is not None for _, ref in seen))

    nodes = {f"{n.name}!": n.name for n in gm.graph.nodes if n.op == "call_module"}
    x = torch.ones(2, 3)
    assert torch.equal(run(with_capture(gm, nodes, look), x), run(gm, x))
    assert [key for key, _ in seen] == list(nodes)
    assert alive == [1, *[2] * 7] or max(alive) <= 2
    assert not any(ref() is not None for _, ref in seen)


def test_capture_leaves_the_network_alone() -> None:
    gm = trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    code = gm.code
    keys: list[str] = []
    watched = with_capture(gm, {"one": "_1", "two": "_1"}, lambda k, v: keys.append(k))
    x = torch.ones(2, 3)
    run(gm, x)
    assert keys == []
    run(watched, x)
    assert keys == ["one", "two"]
    assert gm.code == code
    assert watched.get_submodule("0") is gm.get_submodule("0")
    assert isinstance(gm, fx.GraphModule)


def test_nothing_is_said_about_what_works() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(torchvision_network("resnet18"))
