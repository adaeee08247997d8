"""
Quick start: your trained network in, a faster classifier out
=============================================================

A trained network, images that it has not seen, and one sentence: *at most two points of accuracy
may go*. What comes back predicts like any classifier of scikit-learn, faster, and tells its loss.

Runs on what scikit-learn ships, in about two minutes on two cores. With images of yours (in
torchvision's files, and rather more time): ``python quickstart.py --cifar10 FOLDER``, or
``--cifar100 FOLDER``.
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from sinfkit import (
    DCSPruner,
    SemanticClusterer,
    SINFClassifier,
    load_cifar10,
    load_cifar100,
    train_network,
)

# %%
# Images
# ------
#
# Single digits are so easy that a linear probe on the first layer knows them. So the images here
# show two digits side by side, each shifted at random, under noise: 100 classes, from 00 to 99.
# The network learns from half of the digits; calibration and test draw pairs from the other half.


def digit_pairs(rows: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`n` images of 10 x 20 pixels that show two of the digits in `rows`, and their numbers."""
    digits, labels = load_digits(return_X_y=True)
    small = digits[rows].reshape(-1, 8, 8) / 16
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 0.2, (n, 1, 10, 20))
    pair = rng.integers(len(rows), size=(n, 2))
    for side in (0, 1):
        for i, (y, x) in enumerate(rng.integers(0, 3, (n, 2))):
            images[i, 0, y : y + 8, 10 * side + x :][:, :8] += small[pair[i, side]]
    return images.clip(0, 1).astype(np.float32), labels[rows][pair] @ [10, 1]


if "--cifar10" in sys.argv or "--cifar100" in sys.argv:
    load = load_cifar10 if "--cifar10" in sys.argv else load_cifar100
    train, test = load(sys.argv[2]), load(sys.argv[2], train=False)
    (X, y), (X_test, y_test) = (train.X[:40_000], train.y[:40_000]), (test.X, test.y)
    X_new, y_new = train.X[40_000:], train.y[40_000:]
else:
    seen, other = np.split(np.random.default_rng(0).permutation(1797), [900])
    X, y = digit_pairs(seen, 6000, seed=0)
    X_new, y_new = digit_pairs(other, 6000, seed=1)
    X_test, y_test = digit_pairs(other, 3000, seed=2)

# %%
# A trained network
# -----------------
#
# This is where yours comes in: any ``nn.Module`` from images to one score for each class.

torch.manual_seed(0)
widths = (X.shape[1], 32, 32, 64, 64, 128, 128)
layers: list[nn.Module] = []
for i, (n_in, n_out) in enumerate(zip(widths, widths[1:], strict=False)):
    layers += [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
    layers += [nn.MaxPool2d(2)] if i in (1, 3) else []
layers += [nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(256, int(y.max()) + 1)]
network = nn.Sequential(*layers)
network = train_network(network, X, y, epochs=5, batch_size=64, max_lr=0.05, random_state=0)

# %%
# Made faster
# -----------
#
# ``fit`` trains nothing. From the new images it learns which classes resemble each other, how to
# tell the groups apart, and what each group can do without; then it tries how far it may go. Some
# of the images choose, the others certify that no more is lost than allowed.

sinf = SINFClassifier(
    network,
    clusterer=SemanticClusterer(n_clusters=4),
    pruner=DCSPruner(budget=0.5),  # left out, this, the clusters and the layer are searched too
    route_layer="3",  # the second convolution
    max_accuracy_drop=0.02,
    random_state=0,
).fit(X_new, y_new)
print("the first five:", sinf.predict(X_test[:5]), "labels:", y_test[:5])

# %%
# The report compares both on images that neither has seen. Its rows: :doc:`/guide/report`.

report = sinf.report(X_test, y_test)
print(report)

# %%
# The same as a picture, with 95 % intervals.

report.plot()
plt.show()
