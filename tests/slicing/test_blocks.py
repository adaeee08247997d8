"""Residual branches that can be left out: which are found, and what is left without them."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sinfkit.graph import trace
from sinfkit.repair import RepairSettings, repair
from sinfkit.slicing import Sliced, find_blocks, leave_out, silenced, slice_channels


class Residual(nn.Module):
    """A branch beside an identity, added in one of several ways."""

    def __init__(self, branch: nn.Module, add=operator.add, shortcut=None, relu=True) -> None:
        super().__init__()
        self.branch, self.add, self.relu = branch, add, relu
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(self.shortcut(x), self.branch(x))
        return F.relu(x) if self.relu else x


class Scaled(nn.Module):
    """A layer scale, as ConvNeXt's."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((n, 1, 1), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Stochastic(nn.Module):
    """Stochastic depth: bare code that does nothing in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(()) if self.training else x


def conv(n_in: int = 4, n_out: int = 4, size: int = 3, **more) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, size, padding=size // 2, **more)


BRANCHES = {
    "one layer": lambda: conv(),
    "basic": lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4)),
    "before activation": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv()),
    "bottleneck": lambda: nn.Sequential(conv(4, 2, 1), nn.ReLU(), conv(2, 2), conv(2, 4, 1)),
    "inverted": lambda: nn.Sequential(conv(4, 8, 1), conv(8, 8, groups=8), conv(8, 4, 1)),
    "layer scale": lambda: nn.Sequential(conv(4, 8, 1), nn.GELU(), conv(8, 4, 1), Scaled(4)),
    "dropped in training": lambda: nn.Sequential(conv(), nn.GroupNorm(2, 4), Stochastic()),
    "dropout": lambda: nn.Sequential(conv(), nn.Dropout(0.3)),
}


def network(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(conv(3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            if module.affine:
                nn.init.normal_(module.bias)
    return net.eval().requires_grad_(False)


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ADDITIONS = {"operator": operator.add, "torch": torch.add, "in place": operator.iadd}


@pytest.mark.parametrize("relu", [True, False])  # without, a shortcut is the sum before
@pytest.mark.parametrize("add", ADDITIONS)
@pytest.mark.parametrize("kind", BRANCHES)
def test_a_branch_left_out_is_its_shortcut(kind, add, relu):
    net = network(*(Residual(BRANCHES[kind](), ADDITIONS[add], relu=relu) for _ in range(3)))
    before = copy.deepcopy(net.state_dict())
    graph = trace(net)
    blocks = find_blocks(graph, X)
    assert len(blocks) == 3
    for gone in ([1], [0, 1], [2, 1, 0]):  # those that follow each other, in any order
        by_hand = nn.Sequential(
            *(
                (nn.ReLU() if relu else nn.Identity()) if i - 1 in gone else part
                for i, part in enumerate(net)
            )
        )
        chosen = [blocks[i] for i in gone]
        silent = silenced(Sliced(trace(net), {}, {}), chosen).model
        support = {"0": torch.arange(4).numpy(), "2.branch.0": torch.arange(4).numpy()}
        smaller = leave_out(Sliced(trace(net), dict(support), {}), chosen)
        for model in (silent, smaller.model):
            torch.testing.assert_close(model(X), by_hand(X), rtol=0, atol=0)
        names = dict(smaller.model.named_modules())
        assert not any(name in names for block in chosen for name in block.modules)
        left = {"0", "2.branch.0"}.difference(m for block in chosen for m in block.modules)
        assert set(smaller.support) == left
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("kind", ["one layer", "basic", "layer scale"])
def test_a_repair_leaves_silent_branches_silent_and_refits_what_follows(kind):
    net = network(*(Residual(BRANCHES[kind]()) for _ in range(3)))
    x = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    dense, blocks = trace(net), find_blocks(trace(net), X)
    lost = []
    for method in ("none", "least_squares"):
        sliced = silenced(slice_channels(dense, X, {}), blocks[:2])
        repair(dense, sliced, x, RepairSettings(method))
        silent = sliced.model.get_submodule(blocks[1].last)
        assert not any(value.any() for value in silent.parameters())
        before = sliced.model(x)
        torch.testing.assert_close(leave_out(sliced, blocks[:2]).model(x), before)
        lost.append(float((before - dense(x)).square().sum()))
    assert lost[1] < 0.8 * lost[0]


class Attention(nn.Module):
    """Self-attention of one head over the positions."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(n, 3 * n), nn.Linear(n, n)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.attentions = nn.ModuleList(Attention(8) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(2):
            x = x + self.attentions[i](self.norms[2 * i](x))
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


def test_attention_and_mlp_are_blocks_of_their_own():
    torch.manual_seed(0)
    net, x = Transformer().eval().requires_grad_(False), torch.randn(2, 5, 6)
    blocks = find_blocks(trace(net), x)
    assert [block.last for block in blocks] == [
        "attentions.0.out", "mlps.0.2", "attentions.1.out", "mlps.1.2"
    ]  # fmt: skip
    for gone in ({0, 3}, {0, 1}, {1, 2, 3}):  # a shortcut may be the sum of a block that goes
        smaller = leave_out(Sliced(trace(net), {}, {}), [blocks[i] for i in gone]).model
        h = net.embed(x)
        for i in range(4):
            branch = (net.mlps if i % 2 else net.attentions)[i // 2]
            h = h if i in gone else h + branch(net.norms[i](h))
        torch.testing.assert_close(smaller(x), net.head(h.mean(1)))


class Reused(nn.Module):
    """A residual block whose branch somebody else reads as well, or whose layer is called again."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.branch, self.way = conv(3), conv(), way
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.branch(x)
        x = x + y
        if self.way == "read again":
            x = x * y.sigmoid()
        elif self.way == "called again":
            x = self.branch(x)
        return self.head(x.mean((2, 3)))


NO_BLOCKS = {
    "projection": lambda: network(Residual(conv(), shortcut=conv(4, 4, 1))),
    "other shape": lambda: network(Residual(nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1)))),
    "ends in an activation": lambda: network(Residual(nn.Sequential(conv(), nn.Sigmoid()))),
    "norm without weights": lambda: network(
        Residual(nn.Sequential(conv(), nn.BatchNorm2d(4, affine=False)))
    ),
    "no layers": lambda: network(Residual(nn.BatchNorm2d(4))),
    "plain": lambda: network(conv(), nn.ReLU()),
    "read again": lambda: Reused("read again").eval(),
    "called again": lambda: Reused("called again").eval(),
}


@pytest.mark.parametrize("kind", NO_BLOCKS)
def test_what_cannot_be_left_out_is_no_block(kind):
    assert find_blocks(trace(NO_BLOCKS[kind]()), X) == []
