"""
Quick start: a routed classifier, from training to report
=========================================================

The shortest way through the package: train a small network, group the classes, extract one
subgraph per group, and set the result beside the network that it came from.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from sinfkit import DCSPruner, SemanticClusterer, SINFClassifier

# %%
# Images are arrays of shape (n, channels, height, width). The digits have 8 x 8 pixels with values
# from 0 to 16; here they are enlarged, so that there is some work to save.

X, y = load_digits(return_X_y=True)
images = np.kron((X / 16).reshape(-1, 1, 8, 8), np.ones((1, 1, 3, 3))).astype(np.float32)
X_train, X_test, y_train, y_test = train_test_split(
    images, y, test_size=0.4, stratify=y, random_state=0
)

# %%
# Without a model, ``fit`` first trains a small network. With ``SINFClassifier(model)`` it would be
# yours, and nothing would be trained. The clusterer groups the classes, and the pruner says how
# much goes: here 30 % of the filters in the first layer behind the router, rising to 70 % in the
# last.

sinf = SINFClassifier(
    clusterer=SemanticClusterer(n_clusters=3),
    pruner=DCSPruner(criterion="dcs", schedule="linear", pruning_ratios=(0.3, 0.7)),
    random_state=0,
)
sinf.fit(X_train, y_train)

print(f"routed behind layer {sinf.route_layer_!r}")
for c, name in enumerate(sinf.cluster_names_):
    print(f"cluster {name}: digits {sinf.classes_[sinf.class_clusters_ == c].tolist()}")

# %%
# It predicts like any classifier of scikit-learn, and the report tells what that costs, on images
# that ``fit`` has not seen. :doc:`/guide/report` explains its rows.

print(f"the first ten: {sinf.predict(X_test[:10])}, labels {y_test[:10]}")
report = sinf.report(X_test, y_test)
print(report)

# %%
# The same as a picture. On the right, the fair rival of a subgraph is not the base network but the
# base network *restricted* to the cluster's classes: choosing among few digits is easier.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
costs = {
    "time": 1 - report.time_saved,
    "MACs": report.macs / report.base_macs,
    "parameters\nused": report.active_parameters / report.base_parameters,
}
bars = left.bar(list(costs), list(costs.values()), color="#3b6ea5", width=0.6)
left.bar_label(bars, fmt=lambda v: f"{v:.0%}")
left.axhline(1, color="0.4", linestyle="--", linewidth=1)
left.set(
    ylim=(0, 1.15),
    ylabel="SINF relative to the base",
    title=f"cost of one sample\naccuracy {report.base_accuracy:.1%} → {report.accuracy:.1%}",
)
rows = [row for row in report.clusters if not np.isnan(row.subgraph)]
place = np.arange(len(rows))
series = (
    ("restricted", "base, cluster's classes only", "0.65"),
    ("subgraph", "subgraph", "#3b6ea5"),
    ("routed", "sent to the right cluster", "#d9822b"),
)
for i, (field, label, color) in enumerate(series):
    heights = [getattr(row, field) for row in rows]
    right.bar(place + 0.27 * (i - 1), heights, 0.25, label=label, color=color)
low = min(getattr(row, field) for row in rows for field, *_ in series)
right.set(
    xticks=place,
    xticklabels=[f"cluster {row.name}" for row in rows],
    ylim=(max(0.0, low - 0.05), 1.0),
    ylabel="accuracy",
    title="within each cluster",
)
right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=3, fontsize=8, frameon=False)
figure.savefig("quickstart.png", dpi=150)
plt.show()
