"""ResNet-56 for 32 x 32 images (He et al., 2016), with the names of public weights.

Weights of https://github.com/chenyaofo/pytorch-cifar-models load as they are.
"""

from __future__ import annotations

from torch import Tensor, nn

# Normalisation of those weights for CIFAR-100: mean and deviation of pixels / 255.
MEAN = (0.5070, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2761)


class BasicBlock(nn.Module):
    """Two convolutions of 3 x 3, and a shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
            if stride != 1 or n_in != n_out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features of the next layer."""
        h = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(h)) + self.downsample(x)).relu()


class CifarResNet(nn.Module):
    """Three stages of basic blocks at full, half and quarter resolution."""

    def __init__(self, n_classes: int, n_blocks: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        n_in = width
        for stage in range(3):
            n_out = width * 2**stage
            blocks = [
                BasicBlock(n_in if i == 0 else n_out, n_out, 2 if stage and i == 0 else 1)
                for i in range(n_blocks)
            ]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            n_in = n_out
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(n_in, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        h = self.bn1(self.conv1(x)).relu()
        h = self.layer3(self.layer2(self.layer1(h)))
        return self.fc(self.pool(h).flatten(1))


def resnet56(n_classes: int, width: float = 1.0) -> CifarResNet:
    """ResNet-56: 9 blocks a stage; `width` is a factor on its 16, 32 and 64 channels."""
    return CifarResNet(n_classes, 9, max(1, round(16 * width)))
