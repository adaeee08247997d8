"""Store a fitted classifier with joblib, load it in another process, and compare the answers.

joblib files are pickles: load only those that you trust.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import joblib
import numpy as np
from sklearn.datasets import load_digits

from sinfkit import SINFClassifier

LOAD = """
import sys, joblib, numpy as np
classifier = joblib.load(sys.argv[1])
np.save(sys.argv[3], classifier.predict_proba(np.load(sys.argv[2])))
print("loaded on", classifier.device_)
"""


def main() -> None:
    """Fit, dump, load elsewhere, compare."""
    X, y = load_digits(return_X_y=True)
    images = (X / 16).reshape(-1, 1, 8, 8).astype(np.float32)
    classifier = SINFClassifier(random_state=0).fit(images[:1200], y[:1200])
    with tempfile.TemporaryDirectory() as folder:
        stored, data, answers = (Path(folder) / n for n in ("sinf.joblib", "X.npy", "p.npy"))
        joblib.dump(classifier, stored)
        np.save(data, images[1200:])
        print(f"stored: {stored.stat().st_size / 1e6:.1f} MB")
        subprocess.run([sys.executable, "-c", LOAD, stored, data, answers], check=True)
        difference = np.abs(np.load(answers) - classifier.predict_proba(images[1200:])).max()
    print(f"largest difference of a probability: {difference:.1e}")
    print(f"accuracy: {classifier.score(images[1200:], y[1200:]):.1%}")


if __name__ == "__main__":
    main()
