"""Stacked subgraphs: side by side they say what each says alone, and no sample is dropped."""

from __future__ import annotations

import pytest
import torch
from helpers import make_network, randomise_batch_norms
from test_runtime import conv_network, images
from torch import nn

from sinfkit.inference import Runtime, StackedSubgraphs, gather_slots


def chain(seed, width=6, bias=True, last=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(4, width, 3, stride=2, padding=2, dilation=2, bias=bias),
            nn.BatchNorm2d(width, eps=1e-3),
            nn.ReLU(),
            nn.Conv2d(width, 5, (1, 3), padding="same"),
            nn.AvgPool2d(2),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(20, 8, bias=bias),
            nn.BatchNorm1d(8, affine=False),
            nn.ReLU(),
            nn.Linear(8, last),
        )
        for part in network.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.running_mean.copy_(torch.randn(8))
        return randomise_batch_norms(network[:9], seed).extend(network[9:]).eval()


@pytest.mark.parametrize("bias", [True, False])
def test_each_network_answers_for_its_own_rows(bias):
    networks = [chain(seed, bias=bias) for seed in range(3)]
    h = torch.randn(5, 3, 4, 11, 12, generator=torch.Generator().manual_seed(0))
    out = StackedSubgraphs(networks)(h)
    assert out.shape == (5, 3, 3)
    for i, network in enumerate(networks):
        torch.testing.assert_close(out[:, i], network(h[:, i]), atol=1e-5, rtol=0)


def test_slots_hold_every_run_once():
    branch = torch.tensor([2, 0, 2, 3, 2, 0, 4])
    order = torch.argsort(branch, stable=True)
    slots = gather_slots(branch, order, 3, 2)
    assert slots.shape == (2, 3)
    assert slots[:, 0].tolist() == [1, 5] and slots[:, 2].tolist() == [0, 2]  # run 4: overflow


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.layer(x) + x


@pytest.mark.parametrize(
    "networks, message",
    [
        ([chain(0), chain(1, width=7)], "equal structure and widths.*Conv2d"),
        ([chain(0), chain(1, last=2)], "equal structure and widths.*Linear"),
        ([chain(0), chain(1)[:3]], "number of layers"),
        ([Sum(), Sum()], "does not read what the layer before"),
        ([nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))] * 2, "groups=2"),
        ([nn.Sequential(nn.Conv2d(4, 4, 3, padding_mode="reflect"))] * 2, "reflect"),
        ([nn.Sequential(nn.Sigmoid())] * 2, "Sigmoid"),
        ([nn.Sequential(nn.Flatten(2))] * 2, "Flatten"),
    ],
)
def test_what_cannot_be_stacked_is_refused(networks, message):
    with pytest.raises(ValueError, match=message):
        StackedSubgraphs(networks)


@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize("fallback", ["base", "topk", "none"])
@pytest.mark.parametrize("exit_threshold", [2.0, 0.6])
def test_padded_answers_are_the_networks(n, fallback, exit_threshold):
    network = conv_network((6, 6, 6), fallback, fold=True, exit_threshold=exit_threshold)
    runtime = Runtime(network, padded=True)
    x = images(n)
    torch.testing.assert_close(runtime(x), network(x), atol=1e-5, rtol=0)
    assert runtime(images(0)).shape == (0, 9)


def test_what_finds_no_place_runs_in_a_second_pass():
    network = conv_network((6, 6, 6), "none")
    runtime = Runtime(network, padded=True)
    h, _ = network.features(images(9))
    ran = []
    runtime.subgraphs["1"].register_forward_hook(lambda m, inputs, out: ran.append(len(out)))
    # Six places for each of three clusters.
    for branch, left in (([1] * 9, [3]), ([0, 1, 2] * 3, []), ([1] * 7 + [0, 2], [1])):
        ran.clear()
        branch = torch.tensor(branch)
        out = runtime.branch_logits(h, branch)
        assert ran == left
        torch.testing.assert_close(out, network.branch_logits(h, branch), atol=1e-5, rtol=0)


def test_padded_refuses_what_it_cannot_do():
    network = conv_network((6, 6, 6))
    for options in ({"compile": True}, {"offload": 1}):
        with pytest.raises(ValueError, match="neither compile nor offload"):
            Runtime(network, padded=True, **options)
    with pytest.raises(ValueError, match="clusters of one class"):
        Runtime(make_network(), padded=True)
    with pytest.raises(ValueError, match="equal structure and widths"):
        Runtime(conv_network((6, 6, 4)), padded=True)
