"""Sliced networks have the right shapes, and compute what the masked ones do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import randomise_batch_norms
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sinfkit import SlicingError
from sinfkit.graph import layer_names, output_layer, trace
from sinfkit.slicing import (
    ChannelGroup,
    Sliced,
    check_sliced,
    find_groups,
    slice_channels,
)

N_OUTPUTS = 5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors gain nothing from more, and lose much where others compute as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Networks ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Sum of a body and a shortcut, then an activation."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += self.shortcut(x)
        return self.activation(y)


class Concat(nn.Module):
    """Concatenation of branches along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Excite(nn.Module):
    """Squeeze and excitation: channels multiplied by gates computed from all of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, 3), nn.Linear(3, width)

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * gates[:, :, None, None]


class Net(nn.Module):
    """A network given by its forward function; keywords are its modules and parameters."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(n_in: int, n_out: int, size: int = 3, groups: int = 1, bias: bool = False) -> nn.Module:
    return nn.Conv2d(n_in, n_out, size, padding=size // 2, groups=groups, bias=bias)


def unit(n_in: int, n_out: int, act: Callable[[int], nn.Module], **options: int) -> nn.Sequential:
    """Convolution, batch-norm, activation."""
    return nn.Sequential(conv(n_in, n_out, **options), nn.BatchNorm2d(n_out), act(n_out))


def block(kind: str, n_in: int, n_out: int, act: Callable[[int], nn.Module]) -> nn.Module:
    """One stage of a random network; takes `n_in` channels and gives `n_out`, a multiple of 4."""
    if kind == "plain":
        return unit(n_in, n_out, act)
    if kind == "pre-activation":
        return nn.Sequential(nn.BatchNorm2d(n_in), act(n_in), conv(n_in, n_out, bias=True))
    if kind == "residual":
        body = nn.Sequential(unit(n_in, 6, act), conv(6, n_out), nn.BatchNorm2d(n_out))
        shortcut = nn.Sequential(conv(n_in, n_out, 1), nn.BatchNorm2d(n_out))
        return Residual(body, shortcut if n_in != n_out else nn.Identity(), act(n_out))
    if kind == "concat":
        left = nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(n_in, n_out - 3, act, size=1))
        return Concat(left, unit(n_in, 3, act))
    if kind == "dense":
        layer = nn.Sequential(Concat(nn.Identity(), unit(n_in, 4, act)), nn.BatchNorm2d(n_in + 4))
        return nn.Sequential(layer, conv(n_in + 4, n_out, 1))
    if kind == "depthwise":
        return nn.Sequential(
            unit(n_in, 6, act, size=1), unit(6, 6, act, groups=6), unit(6, n_out, act, size=1)
        )
    if kind == "grouped":
        return nn.Sequential(
            unit(n_in, 8, act, size=1), unit(8, 12, act, groups=4), unit(12, n_out, act, groups=2)
        )
    assert kind == "excite"
    return nn.Sequential(unit(n_in, n_out, act), Excite(n_out))


KINDS = (
    "plain",
    "pre-activation",
    "residual",
    "concat",
    "dense",
    "depthwise",
    "grouped",
    "excite",
)
ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "relu": lambda n: nn.ReLU(inplace=True),
    "silu": lambda n: nn.SiLU(),
    "prelu": nn.PReLU,
}


def head(kind: str, n_in: int, act: Callable[[int], nn.Module]) -> nn.Module:
    """From a feature map of 4 x 4 to the outputs."""
    if kind == "pool":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, N_OUTPUTS))
    if kind == "convolution":
        return nn.Sequential(conv(n_in, N_OUTPUTS, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    hidden = (nn.Linear(16 * n_in, 7, bias=False), nn.BatchNorm1d(7), act(7), nn.Dropout(0.5))
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16 * n_in), *hidden, nn.Linear(7, N_OUTPUTS))


def mlp(act: Callable[[int], nn.Module]) -> nn.Module:
    hidden = (nn.BatchNorm1d(9), act(9), nn.Linear(9, 6), act(6), nn.BatchNorm1d(6))
    return nn.Sequential(nn.Linear(3, 9), *hidden, nn.Linear(6, N_OUTPUTS))


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a network from a seed, with random batch-norm statistics, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise_batch_norms(make(), seed).eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """A random network, small enough to read when a test fails."""

    stages: tuple[tuple[str, int], ...]
    end: str
    activation: str
    seed: int

    def make(self) -> tuple[nn.Module, Tensor, str]:
        """Build the network, inputs for it, and the name of its output layer."""
        act = ACTIVATIONS[self.activation]
        if self.end == "mlp":
            network, x = build(lambda: mlp(act), self.seed), images(8, 3, seed=self.seed)
        else:
            network, x = build(lambda: self.stack(act), self.seed), images(4, 3, 4, 4)
        graph = trace(network)
        return graph, x, output_layer(graph, N_OUTPUTS)

    def stack(self, act: Callable[[int], nn.Module]) -> nn.Module:
        modules, width = [unit(3, 8, act)], 8
        for kind, n_out in self.stages:
            modules.append(block(kind, width, n_out, act))
            width = n_out
        if self.end == "flatten" and self.stages[-1][0] == "concat":
            modules.append(nn.BatchNorm2d(width))  # see "flattened concat" below
        return nn.Sequential(*modules, head(self.end, width, act))


cases = st.builds(
    Case,
    stages=st.lists(
        st.tuples(st.sampled_from(KINDS), st.sampled_from((4, 8))), min_size=1, max_size=3
    ).map(tuple),
    end=st.sampled_from(("pool", "convolution", "flatten", "mlp")),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    seed=st.integers(0, 1000),
)


def choose(groups: list[ChannelGroup], seed: int, outputs: bool = True) -> dict[str, np.ndarray]:
    """Keep a random part of every group that can be sliced; outputs in random order."""
    rng = np.random.default_rng(seed)
    keep = {}
    for group in groups:
        if not group.reason_unsliceable and (outputs or not group.is_output):
            run = group.n_channels // group.n_runs
            local = rng.permutation(run)[: rng.integers(1, run + 1)]
            kept = (np.arange(group.n_runs)[:, None] * run + local).ravel()
            keep[group.name] = kept if group.is_output else group.with_every_part(kept)
    return keep


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


# Properties --------------------------------------------------------------------------------------

few = settings(max_examples=6, deadline=None)


@few
@example(Case((("concat", 4), ("residual", 4)), "pool", "prelu", 0), 0)
@given(cases, st.integers(0, 1000))
def test_sliced_equals_masked_with_exact_counts(case, seed):
    network, x, output = case.make()
    groups = find_groups(network, x, output)
    assert [group.reason_unsliceable for group in groups] == [""] * len(groups)
    layers = [layer for group in groups for layer in group.layers]
    # Where joined channels are added to a layer's, the group goes by that layer; parts follow.
    joined = case.end != "mlp" and any(
        a[0] == "concat" and b == ("residual", a[1]) for a, b in pairwise(case.stages)
    )
    parts = set(layer_names(trace(network))) - set(layers)
    assert len(set(layers)) == len(layers) and bool(parts) == joined
    assert all(".branches." in name for name in parts)
    assert [group.name for group in groups if group.is_output] == [groups[-1].name]

    keep = choose(groups, seed)
    sliced = slice_channels(network, x, keep, groups=groups)
    assert check_sliced(network, sliced, x) <= 1e-4
    assert sliced.model(x).shape == (len(x), len(keep[groups[-1].name]))
    for group in groups:
        kept = keep[group.name] if group.is_output else np.sort(keep[group.name])
        for layer in group.layers:
            np.testing.assert_array_equal(sliced.support[layer], kept)
            assert sliced.support[layer].dtype == np.int64
    for name in layers:
        dense, small = network.get_submodule(name), sliced.model.get_submodule(name)
        removed = len(sliced.removed_inputs.get(name, ()))
        if isinstance(dense, nn.Linear):
            sizes = (small.out_features, small.in_features)
            assert small.in_features == dense.in_features - removed
            assert small.weight.shape == sizes
        else:
            sizes = (small.out_channels, small.in_channels // small.groups)
            assert small.in_channels == dense.in_channels - removed
            assert small.weight.shape[:2] == sizes
        assert sizes[0] == len(sliced.support[name])


@few
@given(cases, st.integers(0, 1000))
def test_tracing_again_gives_the_same_as_given_groups(case, seed):
    network, x, output = case.make()
    groups = find_groups(network, x, output)
    keep = choose(groups, seed)
    first, second = (
        slice_channels(network, x, keep, groups=groups),
        slice_channels(network, x, keep),
    )
    assert first.support.keys() == second.support.keys()
    for ours, theirs in zip(
        tensors(first.model).items(), tensors(second.model).items(), strict=True
    ):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])


@few
@given(cases)
def test_keeping_everything_changes_nothing_and_shares_storage(case):
    network, x, output = case.make()
    groups = find_groups(network, x, output)
    keep = {group.name: np.arange(group.n_channels) for group in groups}
    sliced = slice_channels(network, x, keep, groups=groups)
    assert sliced.model is not network
    assert torch.equal(sliced.model(x), network(x))
    ours = tensors(sliced.model)
    assert all(ours[name] is tensor for name, tensor in tensors(network).items())
    assert not sliced.removed_inputs and not sliced.norm_support and sliced.outputs is None
    for group in groups:
        for layer in group.layers:
            np.testing.assert_array_equal(sliced.support[layer], np.arange(group.n_channels))


@few
@given(cases, st.integers(0, 1000))
def test_the_given_network_stays_as_it_is(case, seed):
    network, x, output = case.make()
    network.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in tensors(network).items()}
    identities = {name: id(tensor) for name, tensor in tensors(network).items()}
    modules = {name: repr(module) for name, module in network.named_modules()}
    state = torch.get_rng_state()
    with torch.inference_mode(seed % 2 == 0):  # tracing must not mind
        groups = find_groups(network, x, output)
        sliced = slice_channels(network, x, choose(groups, seed), groups=groups)
    check_sliced(network, sliced, x)
    assert torch.equal(state, torch.get_rng_state())
    assert {name: repr(module) for name, module in network.named_modules()} == modules
    for name, tensor in tensors(network).items():
        assert torch.equal(tensor, before[name]), name
        assert id(tensor) == identities[name] and not tensor.requires_grad
    for module in network.modules():
        assert not module.training and not module._forward_hooks and not module._forward_pre_hooks
    assert not any(tensor.requires_grad for tensor in sliced.model.parameters())
    sliced.model.requires_grad_(True)


@few
@given(cases, st.integers(0, 1000))
def test_a_wrong_kept_index_is_noticed_and_named(case, seed):
    network, x, output = case.make()
    groups = find_groups(network, x, output)
    rng = np.random.default_rng(seed)
    able = [
        group
        for group in groups
        if group.n_channels > group.n_runs and not group.reason_unsliceable
    ]
    assume(able)
    group = rng.choice(able)
    layer = group.layers[rng.integers(len(group.layers))]
    run = group.n_channels // group.n_runs
    kept = (np.arange(group.n_runs)[:, None] * run + np.arange(1, run)).ravel()
    sliced = slice_channels(network, x, {group.name: kept}, groups=groups)

    # The layer keeps filter 0 in place of the first that it should keep.
    dense, small = network.get_submodule(layer), sliced.model.get_submodule(layer)
    assume(len(small.weight))  # a part of the group of its own may be all that it has
    row = dense.weight[0]
    if small.weight.shape[1] < dense.weight.shape[1]:
        row = np.delete(row.detach().numpy(), sliced.removed_inputs[layer], axis=0)
    wrong = small.weight.detach().clone()
    wrong[0] = torch.as_tensor(row)
    with torch.inference_mode():
        before = sliced.model(x)
        small.weight = nn.Parameter(wrong)
        change = (sliced.model(x) - before).abs().max()
    assume(change > 1e-3 * before.abs().max())  # behind a dead unit either filter is as good
    with pytest.raises(SlicingError, match="first layer that differs") as caught:
        check_sliced(network, sliced, x)
    assert caught.value.layer == layer


# Well-known networks -----------------------------------------------------------------------------


def torchvision_network(name: str) -> nn.Module:
    """A torchvision network for ten classes with random weights, made without their slow init."""
    with torch.device("meta"):
        network = getattr(torchvision.models, name)(weights=None, num_classes=10)
    network = network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.uniform_(-((6 / fan_in) ** 0.5), (6 / fan_in) ** 0.5, generator=generator)
    return randomise_batch_norms(network).eval()


@pytest.mark.parametrize(("name", "n_groups"), [("resnet18", 13), ("mobilenet_v2", 26)])
def test_torchvision_networks(name, n_groups):
    network = trace(torchvision_network(name))
    x = images(2, 3, 32, 32)
    groups = find_groups(network, x, output_layer(network, 10))
    assert len(groups) == n_groups
    assert not any(group.reason_unsliceable for group in groups)
    keep = {}
    for group in groups:
        run = group.n_channels // group.n_runs
        local = np.arange(0, run, 2) if not group.is_output else np.array([7, 2, 3])
        keep[group.name] = (np.arange(group.n_runs)[:, None] * run + local).ravel()
    sliced = slice_channels(network, x, keep, groups=groups)
    assert check_sliced(network, sliced, x, keep_outputs=[7, 2, 3]) <= 1e-4
    count = sum(p.numel() for p in network.parameters())
    assert sum(p.numel() for p in sliced.model.parameters()) < 0.3 * count


def test_groups_of_a_residual_network():
    network = torchvision_network("resnet18")
    groups = {group.name: group for group in find_groups(network, images(1, 3, 32, 32), "fc")}
    stream = groups["conv1"]
    assert stream.layers == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert stream.consumers == (
        "layer1.0.conv1",
        "layer1.1.conv1",
        "layer2.0.conv1",
        "layer2.0.downsample.0",
    )
    inner = groups["layer3.1.conv1"]
    assert (inner.layers, inner.consumers) == (("layer3.1.conv1",), ("layer3.1.conv2",))
    assert (inner.n_channels, inner.n_runs) == (256, 1)
    assert [name for name, group in groups.items() if group.is_output] == ["fc"]


def test_groups_with_depthwise_and_grouped_convolutions():
    def make() -> nn.Module:
        act = ACTIVATIONS["relu"]
        return nn.Sequential(
            unit(3, 6, act),
            block("depthwise", 6, 8, act),
            block("grouped", 8, 8, act),
            head("pool", 8, act),
        )

    groups = {g.name: g for g in find_groups(build(make), images(1, 3, 4, 4), "3.2")}
    depthwise = groups["1.0.0"]
    assert depthwise.layers == ("1.0.0", "1.1.0")
    assert depthwise.consumers == ("1.1.0", "1.2.0")
    assert groups["2.0.0"].n_runs == 4  # it feeds the convolution of 4 groups
    assert groups["2.1.0"].n_runs == 4  # 12 channels from 4 groups into 2
    assert groups["2.2.0"].n_runs == 2


# What stays whole --------------------------------------------------------------------------------


def flat(kind: Callable[..., Tensor]) -> nn.Module:
    """Convolution, `kind` from its 8 x 4 x 4 output to 128 features, linear."""
    return Net(
        lambda s, x: s.out(kind(s.a(x))), a=conv(3, 8, bias=True), out=nn.Linear(128, N_OUTPUTS)
    )


def between(kind: Callable[..., Tensor], n_in: int = 8, **parts: nn.Module) -> nn.Module:
    """Convolution to 8 channels, `kind` to `n_in` channels, convolution, pooling, linear."""

    def forward(s: Net, x: Tensor) -> Tensor:
        return s.out(F.relu(s.b(kind(s, F.relu(s.a(x))))).mean((2, 3)))

    return Net(
        forward, a=conv(3, 8, bias=True), b=conv(n_in, 6, 1), out=nn.Linear(6, N_OUTPUTS), **parts
    )


WHOLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer norm": (
        lambda: between(lambda s, x: s.n(x), n=nn.LayerNorm((8, 4, 4))),
        "run through the LayerNorm 'n'",
    ),
    "functional norm": (lambda: between(lambda s, x: F.group_norm(x, 2)), "group_norm"),
    "softmax in double": (
        lambda: between(lambda s, x: x.softmax(1, torch.float64).float()),
        "soft",
    ),
    "transposed": (
        lambda: between(lambda s, x: s.n(x), n=nn.ConvTranspose2d(8, 8, 1)),
        "Transpose",
    ),
    "maximum over channels": (
        lambda: between(lambda s, x: x.amax(1, keepdim=True), 1),
        "reduced by amax",
    ),
    "executed twice": (lambda: between(lambda s, x: s.n(s.n(x)), n=conv(8, 8)), "executed 2 times"),
    "added to the input": (
        lambda: Net(
            lambda s, x: s.out(F.relu(s.b(x + s.a(x))).mean((2, 3))),
            a=conv(3, 3, bias=True),
            b=conv(3, 6),
            out=nn.Linear(6, N_OUTPUTS),
        ),
        "values that stay",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_sliced_stays_whole_and_says_why(name):
    make, reason = WHOLE[name]
    network, x = build(make), images(3, 3, 4, 4)
    groups = find_groups(network, x, "out")
    whole = next(group for group in groups if "a" in group.layers)
    assert whole.reason_unsliceable and reason in whole.reason_unsliceable
    others = choose(groups, seed=0)
    assert others["out"].size  # the rest of the network can still be sliced
    assert check_sliced(network, slice_channels(network, x, others, groups=groups), x) <= 1e-4
    with pytest.raises(ValueError, match="must name all"):
        slice_channels(network, x, {whole.name: [0]}, groups=groups)


SLICED: dict[str, Callable[[], nn.Module]] = {
    "padded channels": lambda: between(lambda s, x: F.pad(x, (0, 0, 0, 0, 1, 1)), 10),
    "one channel per group": lambda: between(lambda s, x: s.n(x), 16, n=conv(8, 16, groups=8)),
    "group norm": lambda: between(lambda s, x: s.n(x), n=nn.GroupNorm(2, 8)),
    "instance norm": lambda: between(lambda s, x: s.n(x), n=nn.InstanceNorm2d(8)),
    "its weights": lambda: between(lambda s, x: s.n(x), n=nn.InstanceNorm2d(8, affine=True)),
    "its statistics": lambda: between(
        lambda s, x: s.n(x), n=nn.InstanceNorm2d(8, track_running_stats=True)
    ),
    "local response": lambda: between(lambda s, x: s.n(x), n=nn.LocalResponseNorm(3)),
    "softmax": lambda: between(lambda s, x: x * x.softmax(1)),
    "softmax of maps": lambda: between(lambda s, x: s.n(x), n=nn.Softmax2d()),
    "gated half": lambda: between(lambda s, x: s.n(x), 4, n=nn.GLU(1)),
    "half that gates": lambda: between(lambda s, x: F.glu(x, -3), 4),
    "larger of two": lambda: between(lambda s, x: torch.max(x, s.n(x)), n=conv(8, 8)),
    "channels in a row": lambda: between(
        lambda s, x: x * s.n(x.mean((2, 3))[:, None]).sigmoid().transpose(1, 2)[..., None],
        n=nn.Conv1d(1, 1, 3, padding=1, bias=False),
    ),
    "expanded like another": lambda: between(
        lambda s, x: x * s.n(x.mean((2, 3), keepdim=True)).sigmoid().expand_as(x), n=conv(8, 8, 1)
    ),
    "shaped like another": lambda: between(lambda s, x: s.n(x.flatten(1).view_as(x)), n=conv(8, 8)),
    "parameter": lambda: between(lambda s, x: x * s.n, n=nn.Parameter(torch.ones(8, 1, 1))),
    "buffer": lambda: between(lambda s, x: s.n(x), n=torchvision.ops.FrozenBatchNorm2d(8)),
    "chunk": lambda: between(lambda s, x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "part": lambda: between(lambda s, x: x[:, 2:], 6),
    "channel shuffle": lambda: between(
        lambda s, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    ),
    "grouped after concat": lambda: between(
        lambda s, x: s.n(torch.cat([x, s.m(x)], 1)), n=conv(16, 8, groups=2), m=conv(8, 8)
    ),
    "flattened concat": lambda: Net(
        lambda s, x: s.out(torch.cat([s.a(x), s.b(x)], 1).flatten(1)),
        a=conv(3, 6, bias=True),
        b=conv(3, 2),
        out=nn.Linear(128, N_OUTPUTS),
    ),
    "weight norm": lambda: between(
        lambda s, x: s.n(x), n=nn.utils.parametrizations.weight_norm(conv(8, 8))
    ),
    "no gradient": lambda: between(lambda s, x: x.detach()),
    "written-out width": lambda: flat(lambda x: x.view(-1, 8 * 16)),
    "channels last": lambda: flat(lambda x: x.permute(0, 2, 3, 1).flatten(1)),
    "one map for all": lambda: between(
        lambda s, x: x * torch.sigmoid(s.n(x)), n=conv(8, 1, bias=True)
    ),
    "flatten by -1": lambda: flat(lambda x: x.view(x.size(0), -1)),
    "every second pixel": lambda: between(lambda s, x: x[:, :, ::2, ::2]),
    "concat with itself": lambda: between(lambda s, x: torch.cat([x, x], 1), 16),
    "concat with the input": lambda: Net(
        lambda s, x: s.out(torch.cat([x, s.a(x)], 1).mean((2, 3))),
        a=conv(3, 8, bias=True),
        out=nn.Linear(11, N_OUTPUTS),
    ),
    "concat in space": lambda: between(lambda s, x: torch.cat([x, s.n(x)], -1), n=conv(8, 8)),
    "concat by negative axis": lambda: between(
        lambda s, x: torch.cat([x, s.n(x)], -3), 12, n=conv(8, 4)
    ),
    "chain of concats": lambda: between(
        lambda s, x: (lambda y: torch.cat([s.m(y), y], 1))(torch.cat([x, s.n(x)], 1)),
        17,
        n=conv(8, 4),
        m=conv(12, 5),
    ),
    "batch-norm without weights": lambda: between(
        lambda s, x: s.n(x), n=nn.Sequential(conv(8, 8), nn.Sequential(BareBatchNorm(8)))
    ),
    "one slope for all": lambda: between(
        lambda s, x: torch.cat([s.n(x), s.n(s.m(x))], 1), 12, n=nn.PReLU(), m=conv(8, 4)
    ),
    "sequence of tokens": lambda: Net(
        lambda s, x: s.out(F.gelu(s.a(x.flatten(2).transpose(1, 2))).mean(1)),
        a=nn.Linear(3, 8),
        out=nn.Linear(8, N_OUTPUTS),
    ),
    "overwrites its input": lambda: between(lambda s, x: x.mul_(2.0)),
}


class BareBatchNorm(nn.BatchNorm2d):
    """Batch-norm with statistics only."""

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False)
        self.weight = self.bias = None


@pytest.mark.parametrize("name", SLICED)
def test_unusual_but_sliceable(name):
    if name == "batch-norm without weights":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = SLICED[name]().eval()
    else:
        network = build(SLICED[name])
    x = images(3, 3, 4, 4)
    groups = find_groups(network, x, "out")
    assert not any(group.reason_unsliceable for group in groups)
    keep = choose(groups, seed=3)
    assert len(keep["a"]) < groups[0].n_channels
    sliced = slice_channels(network, x, keep, groups=groups)
    assert check_sliced(network, sliced, x) <= 1e-4


class Opaque(nn.Module):
    """Control flow by values, which torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if float(x.detach().sum()) > -1e9 else x


def test_inside_an_opaque_module_nothing_is_sliced():
    network = build(lambda: between(lambda s, x: s.n(x), n=nn.Sequential(Opaque(), nn.ReLU())))
    with pytest.warns(UserWarning, match="stay whole"):
        graph = trace(network)
    x = images(2, 3, 4, 4)
    groups = {group.name: group for group in find_groups(graph, x, "out")}
    for name in ("a", "n.0.first", "n.0.second"):
        assert "'n.0', which torch.fx cannot look into" in groups[name].reason_unsliceable
    assert not groups["b"].reason_unsliceable


def test_channels_that_leave_past_the_output_layer():
    network = build(
        lambda: Net(
            lambda s, x: torch.cat([s.out(x), s.a(x)], 1),
            a=nn.Linear(3, 8),
            out=nn.Linear(3, N_OUTPUTS),
        )
    )
    groups = {group.name: group for group in find_groups(network, images(2, 3), "out")}
    assert groups["a"].reason_unsliceable and not groups["a"].is_output


# Arguments and errors ----------------------------------------------------------------------------


@pytest.fixture
def grouped() -> tuple[nn.Module, Tensor, list[ChannelGroup]]:
    """Convolutions of 8, 12 and 8 channels, the second with 4 groups; 5 outputs."""
    act = ACTIVATIONS["silu"]
    network = build(
        lambda: nn.Sequential(unit(3, 8, act), unit(8, 12, act, groups=4), head("pool", 12, act))
    )
    x = images(70, 3, 4, 4)
    return network, x, find_groups(network, x, "2.2")


@pytest.mark.parametrize("given_groups", [True, False])
@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nowhere": [0]}, "not a layer"),
        ({"0.1": [0]}, "not a layer"),
        ({"0.0": []}, "at least one"),
        ({"0.0": [[0, 1]]}, "at least one"),
        ({"0.0": [0.0, 1.0]}, "integer"),
        ({"0.0": np.ones(8, dtype=bool)}, "integer"),
        ({"0.0": [0, 8]}, r"0\.\.7"),
        ({"2.2": [-1, 2]}, r"0\.\.4"),
        ({"2.2": [1, 1]}, "twice"),
        ({"0.0": [0, 1]}, "same local indices"),
        ({"0.0": [0, 2, 5, 7]}, "same local indices"),
        ({"1.0": [0, 3, 6]}, "same local indices"),
    ],
)
def test_bad_indices(grouped, keep, message, given_groups):
    network, x, groups = grouped
    with pytest.raises(ValueError, match=message):
        slice_channels(network, x, keep, groups=groups if given_groups else None)


def test_a_layer_that_is_not_the_name_of_its_group():
    network = torchvision_network("resnet18")
    with pytest.raises(ValueError, match="belong to the group 'conv1'"):
        slice_channels(network, images(1, 3, 32, 32), {"layer1.0.conv2": [0]})


def test_outputs_come_in_the_order_given(grouped):
    network, x, groups = grouped
    for rows in ([4, 0, 2], [4, 3, 2, 1, 0]):
        sliced = slice_channels(network, x, {"2.2": rows}, groups=groups)
        torch.testing.assert_close(sliced.model(x), network(x)[:, rows])
        np.testing.assert_array_equal(sliced.support["2.2"], rows)
        np.testing.assert_array_equal(sliced.outputs, rows)
        assert check_sliced(network, sliced, x) <= 1e-4
        with pytest.raises(SlicingError):
            check_sliced(network, sliced, x, keep_outputs=sorted(rows))
        with pytest.raises(SlicingError):
            check_sliced(network, sliced, x, keep_outputs=rows[:-1])


def test_outputs_that_are_read_again_keep_their_order():
    def forward(s: Net, x: Tensor) -> Tensor:
        logits = s.out(x)
        return logits + s.again(logits)

    network = build(
        lambda: Net(forward, out=nn.Linear(3, N_OUTPUTS), again=nn.Linear(N_OUTPUTS, N_OUTPUTS))
    )
    x = images(4, 3)
    (group,) = find_groups(network, x, "out")
    assert (group.layers, group.consumers, group.reason_unsliceable) == (
        ("out", "again"),
        ("again",),
        "",
    )
    assert check_sliced(network, slice_channels(network, x, {"out": [0, 3]}), x) <= 1e-4
    with pytest.raises(ValueError, match="must be sorted: 'again' reads"):
        slice_channels(network, x, {"out": [3, 0]})


def test_a_support_that_lies_is_noticed(grouped):
    network, x, groups = grouped
    sliced = slice_channels(network, x, {"0.0": [0, 2, 4, 6]}, groups=groups)
    assert check_sliced(network, sliced, x) <= 1e-4
    support = {**sliced.support, "0.0": np.array([0, 2, 4, 7])}
    with pytest.raises(SlicingError) as caught:
        check_sliced(network, Sliced(sliced.model, support, sliced.removed_inputs), x)
    assert caught.value.layer == "0.0"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.layer) == (str(caught.value), "0.0")


def test_wrong_inputs_and_wrong_batch_norms_are_noticed(grouped):
    network, x, groups = grouped
    sliced = slice_channels(network, x, {"1.0": [0, 1, 3, 4, 6, 7, 9, 10]}, groups=groups)
    np.testing.assert_array_equal(sliced.norm_support["1.1"], [0, 1, 3, 4, 6, 7, 9, 10])
    np.testing.assert_array_equal(sliced.removed_inputs["2.2"], [2, 5, 8, 11])

    linear = copy.deepcopy(sliced)
    linear.model.get_submodule("2.2").weight = nn.Parameter(
        network[2][2].weight[:, 1:9].detach().clone()
    )
    with pytest.raises(SlicingError) as caught:
        check_sliced(network, linear, x)
    assert caught.value.layer == "2.2"

    norm = copy.deepcopy(sliced)
    norm.model.get_submodule("1.1").running_mean = network[1][1].running_mean[1:9].clone()
    with pytest.raises(SlicingError) as caught:
        check_sliced(network, norm, x)
    assert caught.value.layer == "1.1"

    shapes = copy.deepcopy(sliced)
    shapes.model.get_submodule("2.2").weight = nn.Parameter(
        network[2][2].weight[:, 1:8].detach().clone()
    )
    with pytest.raises(SlicingError) as caught:
        check_sliced(network, shapes, x)
    assert caught.value.layer == "2.2"

    with pytest.raises(SlicingError) as caught:
        check_sliced(network, sliced, x * torch.nan)
    assert caught.value.layer


def test_only_what_was_sliced_has_storage_of_its_own(grouped):
    network, x, groups = grouped
    sliced = slice_channels(network, x, {"1.0": [0, 3, 6, 9]}, groups=groups)
    dense, small = tensors(network), tensors(sliced.model)
    changed = {name for name in dense if small[name] is not dense[name]}
    assert changed == {
        "1.0.weight",
        "1.1.weight",
        "1.1.bias",
        "1.1.running_mean",
        "1.1.running_var",
        "2.2.weight",
    }
    pointers = {tensor.data_ptr() for tensor in dense.values()}
    assert not any(small[name].data_ptr() in pointers for name in changed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(grouped, dtype):
    network, x, _ = grouped
    network, x = network.to(dtype), x.to(dtype)
    groups = find_groups(network, x, "2.2")
    assert not any(group.reason_unsliceable for group in groups)
    sliced = slice_channels(network, x, choose(groups, seed=1), groups=groups)
    assert all(p.dtype == dtype for p in sliced.model.parameters())
    difference = check_sliced(network, sliced, x)
    assert difference <= (1e-12 if dtype == torch.float64 else 1e-4)
    assert all(p.dtype == dtype for p in network.parameters())


def test_modes_are_kept_and_do_not_matter(grouped):
    network, x, groups = grouped
    network.train()
    assert find_groups(network, x, "2.2") == groups
    sliced = slice_channels(network, x, {"0.0": [0, 2, 4, 6]}, groups=groups)
    assert sliced.model.training
    check_sliced(network, sliced, x)
    assert sliced.model.training and network.training


def test_a_blank_example_will_do(grouped):
    network, x, groups = grouped
    assert find_groups(network, torch.zeros(1, 3, 4, 4), "2.2") == groups


def test_groups_pickle_and_copy(grouped):
    network, x, groups = grouped
    again = pickle.loads(pickle.dumps(groups))
    assert again == groups == copy.deepcopy(groups)
    keep = choose(groups, seed=5)
    first = slice_channels(network, x, keep, groups=groups).model
    second = slice_channels(network, x, keep, groups=again).model
    assert torch.equal(first(x), second(x))


def test_bad_models_and_examples(grouped):
    network, x, groups = grouped
    with pytest.raises(ValueError, match="output_layer .*2.2.*'fc'"):
        find_groups(network, x, "fc")
    with pytest.raises(ValueError, match="to have 3 channels"):
        find_groups(network, x[:, :2], "2.2")
    with pytest.raises(ValueError, match="floating-point tensor"):
        find_groups(network, x.to(torch.uint8), "2.2")
    with pytest.raises(ValueError, match="floating-point tensor"):
        find_groups(network, x.numpy(), "2.2")
    with pytest.raises(ValueError, match="must return one tensor"):
        find_groups(Net(lambda s, x: (s.a(x), x), a=nn.Linear(3, 2)), images(1, 3), "a")
    sliced = slice_channels(network, x, {}, groups=groups)
    with pytest.raises(ValueError, match="X is empty"):
        check_sliced(network, sliced, x[:0])
    with torch.no_grad():
        network[0][0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        find_groups(network, x, "2.2")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_whatever_the_precision_of_its_products(grouped):
    network, x, _ = grouped
    network, x = network.cuda(), x.cuda()
    groups = find_groups(network, x, "2.2")
    assert not any(group.reason_unsliceable for group in groups)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        sliced = slice_channels(network, x, choose(groups, seed=1), groups=groups)
        assert check_sliced(network, sliced, x.cpu()) <= 1e-5
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(tensor.is_cuda for tensor in tensors(sliced.model).values())
