"""Networks for small images: VGG16, VGG19 and ResNet50 at 32 x 32, and a small default network.

The 32 x 32 versions follow the ImageNet ones layer by layer and use torchvision's parameter names,
so that state dicts can be exchanged. What differs is VGG's head (one linear layer after global
average pooling) and ResNet50's stem.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.params import check_integer, check_number, is_integer, naming, shown

__all__ = ["default_network", "resnet50", "vgg16", "vgg19"]

# Channels of each convolution, "M" a 2 x 2 max-pooling: columns D and E of the paper's table 1.
_VGG16 = (64, 64, "M", 128, 128, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3, "M")
_VGG19 = (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M")
_RESNET50_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
_LARGEST = 10_000_000  # outputs or inputs; more would be a slip, and fill the memory
_STEM_STRIDES = {"cifar": 1, "half": 2}


def vgg16(n_classes: int = 100, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """Build a VGG16 with batch normalisation for 32 x 32 images.

    Parameters
    ----------
    n_classes : int, default=100
        Number of outputs.
    width : float, default=1.0
        Factor on the channels of every convolution (rounded, at least 1).
    in_channels : int, default=3
        Channels of the images.

    Returns
    -------
    torch.nn.Module
        Maps images of shape (n, in_channels, H, W), H and W at least 32, to logits of shape
        (n, n_classes). Freshly initialised, with draws from PyTorch's global generator as in
        every module.

    Raises
    ------
    ValueError
        If `n_classes` or `in_channels` is no positive integer, or `width` is not in (0, 100].

    Notes
    -----
    Parameter names are those of torchvision's ``vgg16_bn`` with ``avgpool = AdaptiveAvgPool2d(1)``
    and ``classifier = Linear(512, n_classes)``: state dicts of either load into the other.

    References
    ----------
    Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition",
    ICLR 2015.

    Examples
    --------
    >>> import torch
    >>> from sinfkit.zoo import vgg16
    >>> network = vgg16(n_classes=10, width=0.125).eval()
    >>> network(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    network = _VGG(_VGG16, n_classes, width, in_channels)
    return _named("vgg16", network, n_classes, width=float(width), in_channels=int(in_channels))


def vgg19(n_classes: int = 100, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """Build a VGG19 with batch normalisation for 32 x 32 images.

    Parameters
    ----------
    n_classes : int, default=100
        Number of outputs.
    width : float, default=1.0
        Factor on the channels of every convolution (rounded, at least 1).
    in_channels : int, default=3
        Channels of the images.

    Returns
    -------
    torch.nn.Module
        As `vgg16`, with sixteen convolutions in place of thirteen.

    Raises
    ------
    ValueError
        If `n_classes` or `in_channels` is no positive integer, or `width` is not in (0, 100].

    See Also
    --------
    vgg16 : The smaller network, with the reference and the notes on names.

    Examples
    --------
    >>> import torch
    >>> from sinfkit.zoo import vgg19
    >>> network = vgg19(n_classes=10, width=0.125).eval()
    >>> network(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    network = _VGG(_VGG19, n_classes, width, in_channels)
    return _named("vgg19", network, n_classes, width=float(width), in_channels=int(in_channels))


def resnet50(
    n_classes: int = 100, width: float = 1.0, in_channels: int = 3, stem: str = "cifar"
) -> nn.Module:
    """Build a ResNet50 for 32 x 32 images.

    Parameters
    ----------
    n_classes : int, default=100
        Number of outputs.
    width : float, default=1.0
        Factor on the channels of every convolution (rounded, at least 1).
    in_channels : int, default=3
        Channels of the images.
    stem : {"cifar", "half"}, default="cifar"
        The first convolution is 3 x 3 and no pooling follows it. With ``"cifar"`` its stride is 1,
        the usual choice for CIFAR; with ``"half"`` it is 2, which quarters the cost of the whole
        network.

    Returns
    -------
    torch.nn.Module
        Maps images of shape (n, in_channels, H, W) to logits of shape (n, n_classes). Freshly
        initialised, with draws from PyTorch's global generator as in every module.

    Raises
    ------
    ValueError
        If `n_classes` or `in_channels` is no positive integer, `width` is not in (0, 100], or
        `stem` is unknown.

    Notes
    -----
    Parameter names are those of torchvision's ``resnet50``; only the shape of ``conv1`` differs.
    As there, the stride of a block sits in its 3 x 3 convolution.

    References
    ----------
    He, Zhang, Ren and Sun, "Deep residual learning for image recognition", CVPR 2016.

    Examples
    --------
    >>> import torch
    >>> from sinfkit.zoo import resnet50
    >>> network = resnet50(n_classes=10, width=0.125, stem="half").eval()
    >>> network(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if not isinstance(stem, str) or stem not in _STEM_STRIDES:
        raise ValueError(f"stem={stem!r} is unknown; choose one of {sorted(_STEM_STRIDES)}.")
    network = _ResNet50(n_classes, width, in_channels, _STEM_STRIDES[stem])
    given = {"width": float(width), "in_channels": int(in_channels), "stem": stem}
    return _named("resnet50", network, n_classes, **given)


def default_network(
    input_shape: Sequence[int],
    n_classes: int,
    dtype: torch.dtype = torch.float32,
    random_state: int | None = None,
) -> nn.Module:
    """Build a small network that suits the shape of one sample."""
    with naming("input_shape"):
        shape = tuple(input_shape)
    if len(shape) not in (1, 3) or not all(is_integer(n) and n > 0 for n in shape):
        raise ValueError(
            "input_shape is the shape of one sample, (channels, height, width) or "
            f"(n_features,), with sizes of at least 1; got {shown(shape)}."
        )
    check_integer("input_shape", max(shape), high=_LARGEST)
    check_integer("n_classes", n_classes, high=_LARGEST)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {shown(dtype)}.")
    check_integer("random_state", random_state, low=0, optional=True)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed every GPU too, which nothing here restores.
        if random_state is None:
            torch.random.default_generator.seed()
        else:
            torch.random.default_generator.manual_seed(random_state)
        build = _small_mlp if len(shape) == 1 else _small_cnn
        network = build(shape, n_classes).to(dtype)
    return _named("default", network, n_classes, input_shape=[int(n) for n in shape])


def _named(name: str, network: nn.Module, n_classes: int, **arguments: Any) -> nn.Module:
    """Note what builds the network again, for files that hold it without its code."""
    described: Any = {"name": name, "n_classes": int(n_classes), **arguments}
    network.architecture = described
    return network


def _small_mlp(shape: tuple[int, ...], n_classes: int) -> nn.Sequential:
    """Two hidden layers with batch-norm."""
    hidden = 64
    return nn.Sequential(
        nn.Linear(shape[0], hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, n_classes),
    )


def _small_cnn(shape: tuple[int, ...], n_classes: int) -> nn.Sequential:
    """Three stages of two convolutions, halved in between while there are pixels to halve."""
    channels, side = shape[0], min(shape[1:])
    stride = max(1, side // 32)
    side = -(-side // stride)
    layers: list[nn.Module] = []
    for width in (32, 64, 128):
        if layers and side >= 4:
            layers.append(nn.MaxPool2d(2))
            side //= 2
        for _ in range(2):
            layers += [
                nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels, stride = width, 1
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, n_classes))


class _VGG(nn.Module):
    """VGG with batch-norm, global average pooling and one linear layer."""

    def __init__(
        self, plan: Sequence[int | str], n_classes: int, width: float, in_channels: int
    ) -> None:
        super().__init__()
        _check_sizes(n_classes, width, in_channels)
        layers: list[nn.Module] = []
        channels = in_channels
        for entry in plan:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
                continue
            out = _scaled(entry, width)
            layers += [
                nn.Conv2d(channels, out, 3, padding=1),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            ]
            channels = out
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, n_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, n_classes) of images (n, in_channels, H, W)."""
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class _Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions around a shortcut; the last quadruples the channels."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(channels, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu3 = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(branch(x) + shortcut(x))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu3(x + shortcut)


class _ResNet50(nn.Module):
    """ResNet50 with a 3 x 3 stem and no max-pooling."""

    def __init__(self, n_classes: int, width: float, in_channels: int, stem_stride: int) -> None:
        super().__init__()
        _check_sizes(n_classes, width, in_channels)
        channels = _scaled(64, width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        stages = []
        for index, (base, n_blocks) in enumerate(_RESNET50_STAGES):
            inner = _scaled(base, width)
            blocks = []
            for block in range(n_blocks):
                stride = 2 if index > 0 and block == 0 else 1
                blocks.append(_Bottleneck(channels, inner, stride))
                channels = inner * _Bottleneck.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, n_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, n_classes) of images (n, in_channels, H, W)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _initialise(network: nn.Module) -> None:
    """He initialisation (fan-out) of convolutions, small normal weights for linear layers."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)


def _scaled(channels: int, width: float) -> int:
    """Channels times width, rounded, at least 1."""
    return max(1, round(channels * width))


def _check_sizes(n_classes: int, width: float, in_channels: int) -> None:
    """Refuse networks without outputs, channels or inputs."""
    check_integer("n_classes", n_classes, high=_LARGEST)
    check_integer("in_channels", in_channels, high=_LARGEST)
    check_number("width", width, "(0, 100]")
