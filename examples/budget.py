"""
How much may I remove? Accuracy against budget for one network
==============================================================

Before any routing: how small can ONE network become before its accuracy goes? This draws the curve
for three ways of going about it, picks the smallest network that loses at most one point on
held-out images, and shows where its filters went.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from sinfkit import DCSPruner, FrozenModel, SpeedAccuracyDisplay, train_network
from sinfkit.zoo import default_network

# %%
# Three parts: one to train and calibrate with, one to choose with, and one for the final figure.

X, y = load_digits(return_X_y=True)
images = (X / 16).reshape(-1, 1, 8, 8).astype(np.float32)
X_train, X_rest, y_train, y_rest = train_test_split(
    images, y, train_size=0.5, stratify=y, random_state=0
)
X_choose, X_test, y_choose, y_test = train_test_split(
    X_rest, y_rest, train_size=0.5, stratify=y_rest, random_state=0
)
network = default_network((1, 8, 8), n_classes=10, random_state=0)
network = train_network(network, X_train, y_train, epochs=20, random_state=0)
model = FrozenModel(network)

# %%
# A ``budget`` says what may stay of the base's multiplications; the widths of the layers follow
# from it. Without one, the pruner would search for the smallest that keeps ``max_accuracy_drop``.
# Three candidates: filters chosen by the structured optimal brain surgeon and the layers behind
# them repaired; the same without repair; and filters drawn at random, repaired.

candidates = {
    "OBS, repaired": {"criterion": "obs"},
    "OBS, as cut": {"criterion": "obs", "repair": "none"},
    "random, repaired": {"criterion": "random"},
}
budgets = [0.7, 0.5, 0.3, 0.15, 0.08]
curves = {
    name: [
        DCSPruner(model, budget=budget, random_state=0, **options).fit(X_train, y_train)
        for budget in budgets
    ]
    for name, options in candidates.items()
}

# %%
# ``cost_ratio_`` is what each kept, exactly. The curves are drawn with images that took no part in
# the fit, but they are not the final figure, since a choice is made by them: the smallest of the
# repaired networks that loses at most one point.

with torch.inference_mode():
    answers = network(torch.as_tensor(X_choose)).argmax(1).numpy()
base_accuracy = float((answers == y_choose).mean())
accuracies = {
    name: [pruner.score(X_choose, y_choose) for pruner in line] for name, line in curves.items()
}
good = [i for i, a in enumerate(accuracies["OBS, repaired"]) if a >= base_accuracy - 0.01]
chosen = curves["OBS, repaired"][good[-1]]

# %%
# What decides is the repair: without it the network is lost at a third of its multiplications, and
# with it even filters drawn at random do nearly as well as chosen ones. Where filters can be spared
# differs from layer to layer, which is why one ratio for all layers is rarely a good choice.

points = {
    name: [(p.cost_ratio_, accuracy) for p, accuracy in zip(line, accuracies[name], strict=True)]
    for name, line in curves.items()
}
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for ax, lowest, title in ((left, 0, "what a budget costs"), (middle, 95, "magnified")):
    SpeedAccuracyDisplay(base_accuracy=base_accuracy, points=points, cost="macs").plot(ax)
    ax.axvline(chosen.cost_ratio_, color="0.8", zorder=0)
    ax.set(title=title, xlim=(0, None), ylim=(lowest, 100.5 if lowest else 105))
left.legend(loc="center right", fontsize=8)
middle.get_legend().remove()
layers = list(chosen.support_)
removed = np.array([chosen.ratios_[layer] for layer in layers])
right.barh(layers, 1 - removed, color="#3b6ea5", label="kept")
right.barh(layers, removed, left=1 - removed, color="0.88", label="removed")
right.invert_yaxis()
right.set(
    xlabel="fraction of the filters",
    ylabel="layer",
    title=f"the choice: {chosen.cost_ratio_:.0%} of the multiplications",
    xlim=(0, 1),
)
right.legend(loc="lower right", fontsize=8)
plt.show()

# %%
# The final figure comes from images that neither calibrated nor chose. :doc:`/start/choosing`
# tells how to choose with several networks, by time instead of multiplications, and with a router.

print(f"{chosen.cost_ratio_:.0%} of the multiplications, {chosen.score(X_test, y_test):.1%}")
