"""A routed classifier on the digits that ship with scikit-learn, from training to report.

Run ``python quickstart.py``: it trains the small default network, groups the ten digits, extracts
one subgraph per group, prints base and SINF side by side, and saves ``quickstart.png``.
"""

from __future__ import annotations

import time

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from sinfkit import DCSPruner, SemanticClusterer, SINFClassifier, SINFReport


def main() -> None:
    """Fit, report, draw."""
    X, y = load_digits(return_X_y=True)
    # 8 x 8 pixels with values 0..16, enlarged so that there is something to save.
    images = np.kron((X / 16).reshape(-1, 1, 8, 8), np.ones((1, 1, 3, 3))).astype(np.float32)
    X_train, X_test, y_train, y_test = train_test_split(
        images, y, test_size=0.4, stratify=y, random_state=0
    )

    start = time.perf_counter()
    sinf = SINFClassifier(  # model=None: trains the default network first
        clusterer=SemanticClusterer(n_clusters=3),
        pruner=DCSPruner(min_ratio=0.3, max_ratio=0.7),
        random_state=0,
        verbose=1,
    )
    sinf.fit(X_train, y_train)
    print(
        f"fitted in {time.perf_counter() - start:.0f} s, routed behind layer {sinf.route_layer_!r}"
    )
    for c, name in enumerate(sinf.cluster_names_):
        print(f"  cluster {name}: digits {sinf.classes_[sinf.class_clusters_ == c].tolist()}")

    report = sinf.report(X_test, y_test)
    print()
    print(report)
    draw(report)
    print("\nfigure: quickstart.png")


def draw(report: SINFReport) -> None:
    """Draw what a sample costs, and what each cluster's subgraph knows."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
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
        title=f"Cost of one sample\naccuracy {report.base_accuracy:.1%} → {report.accuracy:.1%}",
    )
    rows = [row for row in report.clusters if not np.isnan(row.subgraph)]
    place = np.arange(len(rows))
    for i, (field, label, color) in enumerate(
        (
            ("restricted", "base, cluster's classes only", "0.65"),
            ("subgraph", "subgraph", "#3b6ea5"),
            ("routed", "SINF, routed", "#d9822b"),
        )
    ):
        right.bar(
            place + 0.27 * (i - 1),
            [getattr(r, field) for r in rows],
            0.25,
            label=label,
            color=color,
        )
    right.set(
        xticks=place,
        xticklabels=[f"cluster {row.name}" for row in rows],
        ylabel="accuracy",
        title="Within each cluster",
    )
    low = min(min(r.restricted, r.subgraph, r.routed) for r in rows)
    right.set_ylim(max(0.0, low - 0.05), 1.0)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=3, fontsize=8, frameon=False)
    figure.savefig("quickstart.png", dpi=150)


if __name__ == "__main__":
    main()
