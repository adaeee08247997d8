"""Networks and data that several test files use; all small, all real."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx, nn

from sinfkit.inference import Normalise, RoutePredictor, SINFNetwork, own_classes
from sinfkit.repair import RepairSettings, repair
from sinfkit.slicing import Sliced


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


def repaired(
    dense: fx.GraphModule,
    sliced: nn.Module,
    support: dict[str, np.ndarray],
    X: Tensor,
    *,
    X_sliced: Tensor | None = None,
    sample_weight: np.ndarray | None = None,
    **settings: object,
) -> dict[str, float]:
    """Repair with the settings given, in place; return the errors."""
    whole = Sliced(sliced, support, {})
    kind = RepairSettings(**settings)
    return repair(dense, whole, X, kind, X_sliced=X_sliced, sample_weight=sample_weight)


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


CLUSTERS = torch.tensor([0, 1, 0, 2, 1, 2, 3])  # cluster 3 has one class: no subgraph
K, M, WIDTH = 7, 4, 6


# A routed network of linear layers, small enough to compute by hand.
def make_network(
    fallback="base",
    threshold=0.45,
    seed=0,
    dtype=torch.float32,
    answered=None,
    exit_threshold=None,
):
    generator = torch.Generator().manual_seed(seed)

    def linear(n_in, n_out):
        layer = nn.Linear(n_in, n_out).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(n_out, n_in, generator=generator))
            layer.bias.copy_(torch.randn(n_out, generator=generator))
        return layer

    if answered is None:
        answered = own_classes(CLUSTERS, M)
    sizes = answered.sum(1).tolist()
    network = SINFNetwork(
        Normalise(torch.full((WIDTH,), 0.1, dtype=dtype), torch.full((WIDTH,), 2.0, dtype=dtype)),
        nn.Sequential(linear(WIDTH, WIDTH), nn.ReLU()),
        RoutePredictor(
            torch.randn(K, WIDTH, generator=generator).to(dtype),
            torch.randn(K, generator=generator).to(
                dtype
            ),  # no ties where the ReLU gives only zeros
            1,
        ),
        [linear(WIDTH, n) if n > 1 else None for n in sizes],
        linear(WIDTH, K + 1),
        CLUSTERS,
        torch.tensor([3, 0, 1, 7, 2, 5, 4]),
        torch.rand(M, generator=generator).to(dtype) + 0.5,
        router_weight=0.5,
        threshold=threshold,
        fallback=fallback,
        answered=answered,
        exit_threshold=exit_threshold,
    )
    return network.eval().requires_grad_(False)
