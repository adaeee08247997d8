"""
torchvision's ResNet18 and a torch Dataset
==========================================

A network and data as they lie in most projects: :func:`torchvision.models.resnet18`, and a
:class:`torch.utils.data.Dataset` that gives one image and one label at a time.
:class:`~sinfkit.DCSPruner` makes ONE smaller network for all classes: a plain ``nn.Module``, to be
used where the old one was.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.models import resnet18

from sinfkit import DCSPruner

# %%
# Digits as colour images of 32 x 32 pixels stand for yours.


class Digits(Dataset):
    """Images of shape (3, 32, 32) and their labels."""

    def __init__(self) -> None:
        self.images, self.labels = load_digits(return_X_y=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.as_tensor(self.images[index] / 16, dtype=torch.float32).reshape(1, 8, 8)
        large = image.repeat_interleave(4, 1).repeat_interleave(4, 2)
        return large.expand(3, -1, -1), int(self.labels[index])


data = Digits()
order = np.random.default_rng(0).permutation(len(data)).tolist()
train, new, test = (Subset(data, order[a:b]) for a, b in ((0, 800), (800, 1300), (1300, 1797)))

# %%
# Training as usual. Five short passes are enough for digits.

torch.manual_seed(0)
network = resnet18(num_classes=10)
optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
for _ in range(5):
    for x, y in DataLoader(train, batch_size=64, shuffle=True, drop_last=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
network.eval()

# %%
# The pruner sees images that the network was not trained on, here all of them as one batch, and
# keeps 10 % of the multiplications. Layers behind removed filters are repaired by least squares;
# nothing is trained. Without a budget it searches the smallest network that keeps the accuracy.

X, y = next(iter(DataLoader(new, batch_size=len(new))))
pruner = DCSPruner(network, budget=0.1, random_state=0).fit(X, y)


def accuracy(module: nn.Module) -> float:
    """Share of the test images that a network gets right."""
    with torch.inference_mode():
        pairs = [(module(x).argmax(1), y) for x, y in DataLoader(test, batch_size=256)]
    return float(torch.cat([answer == y for answer, y in pairs]).float().mean())


before, after = accuracy(network), accuracy(pruner.model_)
print(f"{before:.1%} before, {after:.1%} with {pruner.cost_ratio_:.0%} of the multiplications")

# %%
# Filters by layer. Where a shortcut adds two layers up, both keep the same ones.

layers = list(pruner.support_)
total = [network.get_submodule(name).out_channels for name in layers]
kept = [len(pruner.support_[name]) for name in layers]
figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
axis.barh(layers, total, color="0.88", label="removed")
axis.barh(layers, kept, color="#3b6ea5", label="kept")
axis.invert_yaxis()
axis.set(
    xlabel="filters",
    title=f"ResNet18: {before:.1%} → {after:.1%}, {pruner.cost_ratio_:.0%} of the multiplications",
)
axis.legend()
plt.show()
