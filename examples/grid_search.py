"""A pipeline with a grid search that picks the fastest classifier within one point of the best.

`GridSearchCV` reaches the subgraphs' ratios as ``sinf__pruner__max_ratio`` and the confidence
threshold as ``sinf__confidence_threshold``. Its `refit` may be a function: this one takes, of all
candidates within one point of the best mean accuracy, the one that predicts fastest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import MinMaxScaler

from sinfkit import DCSPruner, FrozenModel, SemanticClusterer, SINFClassifier, train_network
from sinfkit.models import default_network


def fastest_within_one_point(results: dict[str, Any]) -> int:
    """Index of the candidate with the shortest scoring time among the accurate ones."""
    accuracy = results["mean_test_score"]
    good = np.flatnonzero(accuracy >= accuracy.max() - 0.01)
    return int(good[np.argmin(results["mean_score_time"][good])])


def main() -> None:
    """Train a network, search, print the candidates and the choice."""
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(
        X.astype(np.float32), y, test_size=0.3, stratify=y, random_state=0
    )
    network = default_network((1, 8, 8), n_classes=10)
    network = train_network(
        network, X_train.reshape(-1, 1, 8, 8) / 16, y_train, epochs=20, random_state=0
    )
    # Frozen: the candidates share one copy of the weights. input_shape lets flat rows in.
    model = FrozenModel(network, input_shape=(1, 8, 8))
    pipeline = Pipeline(
        [
            ("scale", MinMaxScaler()),
            (
                "sinf",
                SINFClassifier(
                    model,
                    clusterer=SemanticClusterer(n_clusters=3),
                    pruner=DCSPruner(),
                    random_state=0,
                ),
            ),
        ]
    )
    search = GridSearchCV(
        pipeline,
        {
            "sinf__pruner__max_ratio": [0.3, 0.6, 0.8],
            "sinf__confidence_threshold": [0.0, 0.9],
        },
        cv=3,
        refit=fastest_within_one_point,
    )
    search.fit(X_train, y_train)
    results = search.cv_results_
    print(f"{'max_ratio':>10}{'threshold':>11}{'accuracy':>10}{'ms to score':>13}")
    for i, parameters in enumerate(results["params"]):
        mark = "  <- chosen" if i == search.best_index_ else ""
        print(
            f"{parameters['sinf__pruner__max_ratio']:>10}"
            f"{parameters['sinf__confidence_threshold']:>11}"
            f"{results['mean_test_score'][i]:>10.1%}"
            f"{results['mean_score_time'][i] * 1e3:>13.1f}{mark}"
        )
    print(f"held-out accuracy of the choice: {search.score(X_test, y_test):.1%}")


if __name__ == "__main__":
    main()
