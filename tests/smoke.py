"""Does an installed sinfkit work? A minute's check of a wheel, without pytest or a checkout.

Run it from anywhere else than the repository, with the Python that the package was installed for::

    cd /tmp && python .../tests/smoke.py
"""

from __future__ import annotations

import importlib.metadata
import pickle
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import sinfkit
from sinfkit import DCSPruner, SemanticClusterer, SINFClassifier, vgg16


def main() -> None:
    """Check what was installed, fit all three estimators, pickle, predict, report."""
    start = time.perf_counter()
    folder = Path(sinfkit.__file__).parent
    assert folder.parent != Path(__file__).resolve().parents[1], "this is the checkout"
    assert (folder / "py.typed").is_file(), "py.typed is missing"
    assert importlib.metadata.version("sinfkit") == sinfkit.__version__
    assert all(hasattr(sinfkit, name) for name in sinfkit.__all__)

    X, y = load_digits(return_X_y=True)
    images = (X / 16).reshape(-1, 1, 8, 8).astype(np.float32)
    X_train, X_test, y_train, y_test = train_test_split(
        images, y, train_size=600, stratify=y, random_state=0
    )
    clusterer = SemanticClusterer(n_clusters=3, random_state=0).fit(X_train, y_train)
    pruner = DCSPruner(
        criterion="dcs", schedule="linear", pruning_ratios=(0.1, 0.5), random_state=0
    ).fit(X_train, y_train)
    sinf = SINFClassifier(
        clusterer=SemanticClusterer(n_clusters=3),
        pruner=DCSPruner(criterion="dcs", schedule="linear"),
        random_state=0,
    ).fit(X_train, y_train)

    scores = {type(e).__name__: e.score(X_test, y_test) for e in (pruner, sinf)}
    assert min(scores.values()) > 0.9, scores
    assert clusterer.transform(X_test).shape == (len(X_test), 3)
    # The file of an ONNX export carries its loader along: package data, which a wheel may lack.
    assert (folder / "export" / "onnx_loader.py").is_file()
    again = pickle.loads(pickle.dumps(sinf))
    np.testing.assert_allclose(again.predict_proba(X_test), sinf.predict_proba(X_test), atol=1e-5)
    assert "accuracy" in str(sinf.report(X_test[:200], y_test[:200]))
    assert sum(p.numel() for p in vgg16(10).parameters()) > 14_000_000
    print(
        f"sinfkit {sinfkit.__version__} in {folder}: "
        + ", ".join(f"{name} {score:.1%}" for name, score in scores.items())
        + f"; {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
