from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from sinfkit.zoo import default_network, resnet50, vgg16, vgg19


def randomise_batch_norms(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch-norm random parameters and statistics: a fresh one is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            shape = module.weight.shape
            module.weight.data = 0.5 + torch.rand(shape, generator=generator)
            module.bias.data = 0.1 * torch.randn(shape, generator=generator)
            module.running_mean = 0.1 * torch.randn(shape, generator=generator)
            module.running_var = 0.5 + torch.rand(shape, generator=generator)
    return network.eval()


def torchvision_vgg(name: str, n_classes: int) -> nn.Module:
    network = getattr(torchvision.models, name)(num_classes=n_classes, init_weights=False)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Linear(512, n_classes)
    return network


@pytest.mark.parametrize(("build", "name"), [(vgg16, "vgg16_bn"), (vgg19, "vgg19_bn")])
def test_vgg_is_torchvisions(build, name):
    reference = randomise_batch_norms(torchvision_vgg(name, 7))
    network = build(n_classes=7).eval()
    network.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(network(x), reference(x))


def test_resnet50_is_torchvisions_but_for_the_stem():
    reference = torchvision.models.resnet50(num_classes=7)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    randomise_batch_norms(reference)
    network = resnet50(n_classes=7).eval()
    network.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(network(x), reference(x))


@pytest.mark.parametrize("build", [vgg16, vgg19, resnet50])
def test_width_channels_and_classes(build):
    network = build(n_classes=4, width=0.125, in_channels=1).eval()
    assert network(torch.zeros(3, 1, 32, 32)).shape == (3, 4)
    full = build(n_classes=4)
    for small, large in zip(network.modules(), full.modules(), strict=True):
        if isinstance(small, nn.Conv2d):
            assert small.out_channels == large.out_channels // 8
    assert build(n_classes=2, width=1e-4).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("half", 16)])
def test_resnet50_stem_sets_the_resolution(stem, side):
    network = resnet50(n_classes=2, width=0.0625, stem=stem).eval()
    assert network.layer1(network.conv1(torch.zeros(1, 3, 32, 32))).shape[2:] == (side, side)


@pytest.mark.parametrize("build", [vgg16, vgg19, resnet50])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_classes": 0}, "n_classes"),
        ({"in_channels": 0}, "in_channels"),
        ({"width": 0.0}, "width"),
        ({"width": float("nan")}, "width"),
    ],
)
def test_bad_sizes(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_unknown_stem():
    with pytest.raises(ValueError, match="stem='imagenet' is unknown"):
        resnet50(stem="imagenet")


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (3, 1, 1), (3, 2, 5), (3, 32, 32), (3, 64, 48), (3, 224, 224), (5,), (1,)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_default_network_takes_any_sample(shape, dtype):
    network = default_network(shape, n_classes=3, dtype=dtype, random_state=0).eval()
    logits = network(torch.zeros(2, *shape, dtype=dtype))
    assert logits.shape == (2, 3)
    assert logits.dtype == dtype


def test_default_network_reduces_large_images():
    assert default_network((3, 224, 224), 2)[0].stride == (7, 7)
    assert default_network((3, 63, 200), 2)[0].stride == (1, 1)


def test_default_network_seed_and_global_generator():
    before = torch.random.get_rng_state()
    first, second = (default_network((1, 8, 8), 3, random_state=5) for _ in range(2))
    other, fresh = default_network((1, 8, 8), 3, random_state=6), default_network((1, 8, 8), 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert not torch.equal(fresh[0].weight, default_network((1, 8, 8), 3)[0].weight)


@pytest.mark.parametrize("shape", [(), (3, 8), (2, 3, 8, 8), (0,), (3, 0, 8)])
def test_default_network_bad_shape(shape):
    with pytest.raises(ValueError, match="shape of one sample"):
        default_network(shape, n_classes=2)


def test_default_network_without_classes():
    with pytest.raises(ValueError, match="n_classes"):
        default_network((3,), n_classes=0)
