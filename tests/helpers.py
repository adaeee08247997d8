"""Networks and data that several test files use; all small, all real."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def randomise_batch_norms(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch-norm random weights and statistics: a fresh one is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return network


def small_cnn(n_classes: int = 6, width: int = 8, seed: int = 0) -> nn.Module:
    """Four convolutions for 8 x 8 grey images, with random batch-norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        channels = 1
        for i, out in enumerate((width, width, 2 * width, 2 * width)):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            if i == 1:
                layers.append(nn.MaxPool2d(2))
            channels = out
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, n_classes)]
        network = nn.Sequential(*layers)
    return randomise_batch_norms(network, seed).eval()


def blobs(
    n_classes: int = 6, per_class: int = 30, seed: int = 0, noise: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """8 x 8 grey images: one fixed pattern per class, plus noise."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(123).normal(size=(n_classes, 1, 8, 8))
    y = np.repeat(np.arange(n_classes), per_class)
    X = patterns[y] + noise * rng.normal(size=(len(y), 1, 8, 8))
    order = rng.permutation(len(y))
    return X[order].astype(np.float32), y[order]
