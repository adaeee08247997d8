"""
Store a fitted classifier and load it elsewhere
===============================================

A fitted classifier is dumped with joblib, loaded in another process, and its answers are compared.
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

from sinfkit import DCSPruner, SINFClassifier

X, y = load_digits(return_X_y=True)
images = (X / 16).reshape(-1, 1, 8, 8).astype(np.float32)
classifier = SINFClassifier(pruner=DCSPruner(), random_state=0).fit(images[:1200], y[:1200])

# %%
# What the other process runs. It needs sinfkit, and nothing of this script. Where the classifier
# was fitted on a GPU and there is none, the networks go to the CPU, and one warning says so.

LOAD = """
import sys, joblib, numpy as np
classifier = joblib.load(sys.argv[1])
np.save(sys.argv[3], classifier.predict_proba(np.load(sys.argv[2])))
print("loaded on", classifier.device_)
"""

with tempfile.TemporaryDirectory() as folder:
    stored, data, answers = (Path(folder) / n for n in ("sinf.joblib", "X.npy", "p.npy"))
    joblib.dump(classifier, stored)
    np.save(data, images[1200:])
    print(f"stored: {stored.stat().st_size / 1e6:.1f} MB")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, stored, data, answers],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout.strip())
    difference = np.abs(np.load(answers) - classifier.predict_proba(images[1200:])).max()

# %%
# The same answers, up to rounding:

print(f"largest difference of a probability: {difference:.1e}")
print(f"accuracy: {classifier.score(images[1200:], y[1200:]):.1%}")
