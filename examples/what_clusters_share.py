"""
What do clusters share? Displays of a fitted classifier
=======================================================

Four pictures that show what a :class:`~sinfkit.SINFClassifier` has found: which classes resemble
each other, where images are sent, which filters the subgraphs have in common, and how unequal the
filters are. Each takes a fitted estimator, draws on axes of yours if you give some, and keeps its
figures as attributes.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from sinfkit import (
    ClusterTreeDisplay,
    DCSPruner,
    FilterOverlapDisplay,
    FilterScoreDisplay,
    RouteConfusionDisplay,
    SemanticClusterer,
    SINFClassifier,
)

X, y = load_digits(return_X_y=True)
images = (X / 16).reshape(-1, 1, 8, 8).astype(np.float32)
X_train, X_test, y_train, y_test = train_test_split(
    images, y, test_size=0.4, stratify=y, random_state=0
)
sinf = SINFClassifier(
    clusterer=SemanticClusterer(n_clusters=4, method="activation", max_cluster_size=4),
    pruner=DCSPruner(schedule="linear", pruning_ratios=(0.3, 0.7)),
    random_state=0,
).fit(X_train, y_train)

# %%
# Classes and routes
# ------------------
#
# The tree joins the classes that are most alike first; colours are the clusters. Beside it, where
# the images of each cluster are sent. What lies off the diagonal takes a wrong route, and is not
# lost: by default every subgraph answers all classes, see :doc:`/method/routing`.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
ClusterTreeDisplay.from_estimator(sinf, ax=left)
left.set_title("classes that resemble each other")
RouteConfusionDisplay.from_estimator(sinf, X_test, y_test, ax=right)
right.set_title("where images are sent")
plt.show()

# %%
# Filters
# -------
#
# How many filters two subgraphs share is what clusters are for: if all shared nearly all, one
# pruned network would do as well, with no router to pay for. The curves show how unequal the
# scores of one cluster's filters are, layer by layer; a marker shows how many were kept.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
FilterOverlapDisplay.from_estimator(sinf, ax=left)
FilterScoreDisplay.from_estimator(sinf, ax=right)
right.set_title("scores of one cluster's filters")
plt.show()

# %%
# The figures behind the pictures. All subgraphs have the same widths, so that each costs the same:

widths = {layer: len(kept) for layer, kept in sinf.supports_[0].items()}
print(f"filters kept, by layer: {widths}")
for c, name in enumerate(sinf.cluster_names_):
    print(f"cluster {name}: digits {sinf.classes_[sinf.class_clusters_ == c].tolist()}")
