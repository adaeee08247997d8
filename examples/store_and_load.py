"""
Store a fitted classifier and load it elsewhere
===============================================

Two ways. A file of ``save`` holds weights, numbers and text, no code: it can come from anyone.
A file of joblib is a pickle, which may run anything when it is loaded: load only those that you
trust.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import joblib
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits

import sinfkit
from sinfkit import DCSPruner, SINFClassifier

X, y = load_digits(return_X_y=True)
images = (X / 16).reshape(-1, 1, 8, 8).astype(np.float32)
classifier = SINFClassifier(pruner=DCSPruner(budget=0.5), random_state=0).fit(
    images[:1200], y[:1200]
)
expected = classifier.predict_proba(images[1200:])

# %%
# Without code. The network here is sinfkit's own; for one of yours, ``load`` takes a ``factory``
# that builds it.

folder = tempfile.TemporaryDirectory()
stored = Path(folder.name) / "digits.sinf"
sinfkit.save(classifier, stored)
again = sinfkit.load(stored)
print(f"{stored.name}: {stored.stat().st_size / 1e6:.2f} MB, loaded on {again.device_}")
print("same answers:", np.array_equal(again.predict_proba(images[1200:]), expected))

# %%
# Whatever is wrong with a file is one error, which says what.

content = bytearray(stored.read_bytes())
content[-1] ^= 1
stored.write_bytes(content)
try:
    sinfkit.load(stored)
except sinfkit.StorageError as error:
    print(str(error).replace(folder.name, "..."))

# %%
# With joblib, in another process. That one needs sinfkit, and nothing of this script. Where the
# classifier was fitted on a GPU and there is none, the networks go to the CPU, and one warning says
# so; another warns where sinfkit, torch or scikit-learn are of another major version.

LOAD = """
import sys, joblib, numpy as np
classifier = joblib.load(sys.argv[1])
np.save(sys.argv[3], classifier.predict_proba(np.load(sys.argv[2])))
print("loaded on", classifier.device_)
"""

pickled, data, answers = (Path(folder.name) / n for n in ("digits.joblib", "X.npy", "p.npy"))
joblib.dump(classifier, pickled)
np.save(data, images[1200:])
print(f"{pickled.name}: {pickled.stat().st_size / 1e6:.2f} MB")
done = subprocess.run(
    [sys.executable, "-c", LOAD, pickled, data, answers],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
)
print(done.stdout.strip())
print(f"largest difference of a probability: {np.abs(np.load(answers) - expected).max():.1e}")

# %%
# What the files weigh, beside the weights of the network that the classifier was made from. It
# holds one subgraph for each cluster, and what they are refitted and reported with.

weights = Path(folder.name) / "base.pt"
torch.save(classifier.base_model_.module().state_dict(), weights)
sizes = {path.name: path.stat().st_size / 1e6 for path in (weights, stored, pickled)}
figure, axis = plt.subplots(figsize=(5, 2.2), layout="constrained")
axis.bar_label(axis.barh(list(sizes), list(sizes.values()), color="#3b6ea5"), fmt=" %.2f MB")
axis.margins(x=0.2)
axis.set_xlabel("size on disk (MB)")
plt.show()
folder.cleanup()
