"""Half of every group of channels of trained networks: what least squares brings back.

A small vision transformer and a small convolutional network learn scikit-learn's digits, lose half
of every group of channels, and are compared on images that neither trained nor calibrated them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from .library import pruner
from .record import RESULTS, Table, read

NAME = "halves"
KEYS = ("network", "seed", "repair")
VALUES = ("base", "removed", "accuracy")
REPAIRS = ("none", "least_squares")
N_TRAIN, N_CALIBRATE = 900, 300


class Transformer(nn.Module):
    """16 patches of 2 x 2 pixels, four blocks."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The class scores."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class Convolutions(nn.Module):
    """A stem and three residual blocks."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = self._unit(1, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(self._unit(width, width), nn.ReLU(), self._unit(width, width))
            for _ in range(3)
        )
        self.head = nn.Linear(width, 10)

    @staticmethod
    def _unit(given: int, made: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(given, made, 3, padding=1, bias=False), nn.BatchNorm2d(made))

    def forward(self, x: Tensor) -> Tensor:
        """The class scores."""
        x = self.stem(x).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


NETWORKS: dict[str, type[nn.Module]] = {"transformer": Transformer, "convolutions": Convolutions}


def trained(kind: str, X: Tensor, y: Tensor, seed: int, epochs: int) -> nn.Module:
    """A network that has learnt the digits."""
    torch.manual_seed(seed)
    network = NETWORKS[kind]()
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    steps = epochs * -(-len(X) // 100)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(X)).split(100):
            shift = torch.randint(-1, 2, (2,)).tolist()
            loss = F.cross_entropy(network(X[rows].roll(shift, (2, 3))), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return network.eval()


def answer(rows: Sequence[dict[str, str]]) -> str:
    """What was found, in two sentences."""

    def mean(kind: str, repair: str, key: str) -> float:
        found = [r for r in rows if r["network"] == kind and r["repair"] == repair]
        return statistics.mean(float(row[key]) for row in found)

    told = []
    for kind, name in (("transformer", "a vision transformer"), ("convolutions", "a residual one")):
        base, share = mean(kind, "none", "base"), mean(kind, "none", "removed")
        before, after = (mean(kind, repair, "accuracy") for repair in REPAIRS)
        told.append(
            f"{name} of {base:.1%} loses {share:.0%} of its multiplications and is left with "
            f"{before:.1%} as cut, {after:.1%} with least squares"
        )
    seeds = len({row["seed"] for row in rows})
    return (
        "Trained networks come back by least squares, transformers as convolutional ones "
        f"(scikit-learn's digits, {seeds} networks of each kind, half of every group, criterion "
        f"``dcs_obs``): {told[0]}; {told[1]}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, cut and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--quick", action="store_true", help="one seed, a short training")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = Table(options.out / f"{NAME}.csv", KEYS, VALUES)
    X, y = load_digits(return_X_y=True)
    images = (X / 16 - 0.3).reshape(-1, 1, 8, 8).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(X))
    train, calibrate, test = np.split(order, [N_TRAIN, N_TRAIN + N_CALIBRATE])
    for seed in range(1 if options.quick else options.seeds):
        for kind in NETWORKS:
            todo = [r for r in REPAIRS if {"network": kind, "seed": seed, "repair": r} not in table]
            if not todo:
                continue
            given = torch.as_tensor(images[train]), torch.as_tensor(y[train])
            network = trained(kind, *given, seed, 3 if options.quick else options.epochs)
            with torch.inference_mode():
                right = network(torch.as_tensor(images[test])).argmax(1).numpy() == y[test]
            for repair in todo:
                cut = pruner(
                    network,
                    schedule="uniform",
                    pruning_ratios=(0.5, 0.5),
                    repair=repair,
                    validation_fraction=0.0,
                    random_state=seed,
                ).fit(images[calibrate], y[calibrate])
                found = {
                    "base": f"{right.mean():.4f}",
                    "removed": f"{1 - cut.cost_ratio_:.4f}",
                    "accuracy": f"{cut.score(images[test], y[test]):.4f}",
                }
                table.add(network=kind, seed=seed, repair=repair, **found)
                print(kind, seed, repair, *found.values(), flush=True)
    print(answer(read(table.path)))


if __name__ == "__main__":
    main()
