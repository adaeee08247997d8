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
from sinfkit.models import default_network

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
# ``schedule="global"`` with a ``budget`` says what may stay of the base's multiplications, and
# finds the widths of the layers by itself. Three candidates: filters chosen by the structured
# optimal brain surgeon and the layers behind them repaired; the same without repair; and filters
# drawn at random, repaired.

candidates = {
    "OBS, repaired": {"criterion": "obs"},
    "OBS, as cut": {"criterion": "obs", "repair": "none"},
    "random, repaired": {"criterion": "random"},
}
budgets = [0.7, 0.5, 0.35, 0.25, 0.15, 0.08]
curves = {
    name: [
        DCSPruner(model, schedule="global", budget=budget, random_state=0, **options).fit(
            X_train, y_train
        )
        for budget in budgets
    ]
    for name, options in candidates.items()
}

# %%
# ``cost_ratio_`` is what each kept, exactly. The curve is drawn with images that took no part in
# the fit, but it is not the final figure: a choice is made by it.

with torch.inference_mode():
    answers = network(torch.as_tensor(X_choose)).argmax(1).numpy()
base_accuracy = float((answers == y_choose).mean())
accuracies = {
    name: [pruner.score(X_choose, y_choose) for pruner in line] for name, line in curves.items()
}
points = {
    name: [(p.cost_ratio_, accuracy) for p, accuracy in zip(line, accuracies[name], strict=True)]
    for name, line in curves.items()
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
SpeedAccuracyDisplay(base_accuracy=base_accuracy, points=points, cost="macs").plot(left)
left.set(title="what a budget costs", xlim=(0, None))

# %%
# The smallest of the repaired networks that loses at most one point, and what it kept of each
# layer. Where filters matter differs from layer to layer, which is why one ratio for all layers is
# rarely a good choice.

good = [i for i, a in enumerate(accuracies["OBS, repaired"]) if a >= base_accuracy - 0.01]
chosen = curves["OBS, repaired"][good[-1]]
left.axvline(chosen.cost_ratio_, color="0.8", zorder=0)
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
right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, fontsize=8, frameon=False)
plt.show()

# %%
# The final figure comes from images that neither calibrated nor chose. :doc:`/user_guide/budget`
# tells how to choose with several networks, by time instead of multiplications, and with a router.

print(f"{chosen.cost_ratio_:.0%} of the multiplications, {chosen.score(X_test, y_test):.1%}")
