"""
A routed network in a Pipeline and GridSearchCV
===============================================

The estimators take their place in a pipeline, and a grid search reaches into the pruner and the
clusterer as ``sinf__pruner__budget`` and ``sinf__clusterer__n_clusters``. By accuracy alone it
would always choose the largest network; here ``refit`` is a function that takes, of all candidates
within one point of the best, the one that predicts fastest.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MinMaxScaler

from sinfkit import FrozenModel, SINFClassifier, train_network
from sinfkit.zoo import default_network

X, y = load_digits(return_X_y=True)
X_train, X_test, y_train, y_test = train_test_split(
    X.astype(np.float32), y, test_size=0.3, stratify=y, random_state=0
)
network = default_network((1, 8, 8), n_classes=10, random_state=0)
network = train_network(
    network, X_train.reshape(-1, 1, 8, 8) / 16, y_train, epochs=20, random_state=0
)

# %%
# Scalers work on flat rows, so the model is told the shape of an image. ``FrozenModel`` also keeps
# the search from copying the weights for every candidate.

pipeline = Pipeline(
    [
        ("scale", MinMaxScaler()),
        (
            "sinf",
            SINFClassifier(
                FrozenModel(network, input_shape=(1, 8, 8)),
                random_state=0,
            ),
        ),
    ]
)


# %%
# What ``refit`` gets is ``cv_results_``; what it returns is the index of the candidate to refit.


def fastest_within_one_point(results: dict[str, Any]) -> int:
    """Index of the candidate with the shortest scoring time among the accurate ones."""
    accuracy = results["mean_test_score"]
    good = np.flatnonzero(accuracy >= accuracy.max() - 0.01)
    return int(good[np.argmin(results["mean_score_time"][good])])


search = GridSearchCV(
    pipeline,
    {"sinf__pruner__budget": [0.6, 0.4, 0.25], "sinf__clusterer__n_clusters": [2, 4]},
    cv=2,
    refit=fastest_within_one_point,
)
search.fit(X_train, y_train)
print(f"held-out accuracy of the choice: {search.score(X_test, y_test):.1%}")

# %%
# All candidates, and the choice. Times of so small a network are noisy: on yours, use more images
# and larger batches, or search for the fewest multiplications with ``max_accuracy_drop`` instead
# (:doc:`/start/choosing`).

results = search.cv_results_
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
budgets = np.array([p["sinf__pruner__budget"] for p in results["params"]])
n_clusters = np.array([p["sinf__clusterer__n_clusters"] for p in results["params"]])
panels = (
    (left, "test_score", 100, "cross-validated accuracy (%)"),
    (right, "score_time", 1e3, "time to score one fold (ms)"),
)
for ax, name, unit, label in panels:
    mean, deviation = results[f"mean_{name}"] * unit, results[f"std_{name}"] * unit
    for k, style, color in ((2, "o-", "#3b6ea5"), (4, "s--", "#d9822b")):
        own = n_clusters == k
        ax.errorbar(
            budgets[own],
            mean[own],
            yerr=deviation[own],
            fmt=style,
            color=color,
            capsize=3,
            label=f"{k} clusters",
        )
    best = search.best_index_
    ax.plot(budgets[best], mean[best], "o", ms=16, mfc="none", mec="0.3", ls="", label="chosen")
    ax.set(xlabel="budget: share of the multiplications that may stay", ylabel=label)
    ax.margins(0.1)
left.legend(fontsize=8)
plt.show()
