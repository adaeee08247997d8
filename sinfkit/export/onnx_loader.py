"""Run a routed classifier that sinfkit has exported to ONNX; needs numpy and onnxruntime alone.

This file lies in the exported folder as ``sinf_onnx.py``::

    from sinf_onnx import load

    classifier = load("folder")
    classifier.predict(X)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

__all__ = ["RoutedClassifier", "load"]

SCHEMA = 1


def load(
    folder: str | Path, *, n_threads: int | None = None, batch_size: int = 256
) -> RoutedClassifier:
    """Load an exported classifier.

    Parameters
    ----------
    folder : str or Path
    n_threads : int, optional
        Threads that compute; default: as many as there are cores for this process.
    batch_size : int, default=256
        Samples that are computed at once.

    Returns
    -------
    RoutedClassifier

    Raises
    ------
    FileNotFoundError
        If a file of the export is missing.
    ValueError
        If a file is not as it was exported, or a parameter is out of range.
    """
    for name, value in (("n_threads", n_threads), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    folder = Path(folder)
    manifest = _read_manifest(folder)
    options = onnxruntime.SessionOptions()
    # Sessions run one after the other.  Each has threads of its own, which sleep while it does not
    # run instead of spinning; a pool for all sessions would be one for the whole process, and would
    # be somebody else's where onnxruntime has been used before.
    options.intra_op_num_threads = _n_cores() if n_threads is None else n_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def open_part(name: str | None) -> Any:
        if name is None:
            return None
        return onnxruntime.InferenceSession(
            str(folder / name), sess_options=options, providers=["CPUExecutionProvider"]
        )

    return RoutedClassifier(manifest, open_part, batch_size)


class RoutedClassifier:
    """A routed classifier; made by `load`.

    Shapes: `classes_` (n_classes,), `class_clusters_` (n_classes,).
    """

    def __init__(
        self, manifest: dict[str, Any], open_part: Callable[[str | None], Any], batch_size: int
    ) -> None:
        labels = manifest["classes"]
        self.classes_ = np.array(labels["values"], dtype=labels["kind"])
        self.class_clusters_ = np.array(manifest["class_clusters"], dtype=np.int64)
        self.input_shape_ = tuple(manifest["input_shape"])
        self.n_clusters_ = int(manifest["n_clusters"])
        self.batch_size = batch_size
        self._answered = np.array(manifest["answered"], dtype=bool)
        self._outputs = np.array(manifest["outputs"], dtype=np.int64)
        self._temperatures = np.array(manifest["temperatures"], dtype=np.float32)
        self._router_weight = np.float32(manifest["router_weight"])
        self._threshold = np.float32(manifest["threshold"])
        self._exit_threshold = manifest["exit_threshold"]  # None: nobody leaves
        self._fallback = manifest["fallback"]
        self._one_hot = np.eye(self.n_clusters_, dtype=np.float32)[self.class_clusters_]
        self._router = open_part(manifest["router"])
        self._subgraphs = [open_part(name) for name in manifest["subgraphs"]]
        self._base = open_part(manifest["base"])

    def predict(self, X: Any) -> np.ndarray:
        """Predict the class of each sample.

        Shapes: `X` (n_samples, ...).
        """
        return self.classes_[self.predict_proba(X).argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities: the routed subgraph's answer fused with the router's.

        Shapes: `X` (n_samples, ...), returns (n_samples, n_classes).
        """
        return np.concatenate([self._process(x) for x in self._batches(X)])

    def predict_cluster(self, X: Any) -> np.ndarray:
        """Predict the semantic cluster of each sample; runs the prefix and the router only.

        Shapes: `X` (n_samples, ...).
        """
        return np.concatenate(
            [self._posterior(self._route(x)[1]).argmax(1) for x in self._batches(X)]
        )

    def _batches(self, X: Any) -> Iterator[np.ndarray]:
        """Check samples, and give them in float32 batches."""
        X = np.asarray(X)
        if X.ndim == 2 and X.shape[1] == math.prod(self.input_shape_):
            X = X.reshape(len(X), *self.input_shape_)
        if X.shape[1:] != self.input_shape_ or X.ndim == 0:
            raise ValueError(
                f"X must have shape (n_samples, {', '.join(map(str, self.input_shape_))}), not "
                f"{X.shape}."
            )
        if len(X) == 0:
            raise ValueError(f"Found X with 0 samples (shape={X.shape}); at least 1 is needed.")
        if X.dtype.kind not in "buif":
            raise ValueError(f"X must hold numbers, not {X.dtype}.")
        for start in range(0, len(X), self.batch_size):
            batch = X[start : start + self.batch_size]
            x = np.ascontiguousarray(batch, dtype=np.float32)
            if not np.isfinite(x).all():
                raise ValueError("X contains NaN, infinity, or numbers too large for float32.")
            yield x / np.float32(255) if batch.dtype == np.uint8 else x

    def _route(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the prefix's output and the log-posterior of the classes."""
        h, log_posterior = self._router.run(["h", "log_posterior"], {"x": x})
        return h, log_posterior

    def _posterior(self, log_posterior: np.ndarray) -> np.ndarray:
        """Sum class probabilities over each cluster: shape (n_samples, n_clusters)."""
        posterior: np.ndarray = np.exp(log_posterior) @ self._one_hot
        return posterior

    def _branches(
        self, log_posterior: np.ndarray, posterior: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample and branch of each run: a cluster, the base, or the way out behind the router."""
        rows = np.arange(len(posterior))
        branch = posterior.argmax(1)
        unsure = posterior.max(1) < self._threshold
        leaves = np.zeros(len(rows), dtype=bool)
        if self._exit_threshold is not None:
            sure = np.float32(math.log(max(self._exit_threshold, 1e-30)))
            leaves = log_posterior.max(1) >= sure
        if self._fallback == "base":
            branch = np.where(unsure, self.n_clusters_, branch)
        branch = np.where(leaves, self.n_clusters_ + 1, branch)
        if self._fallback != "top2" or self.n_clusters_ < 2:
            return rows, branch
        likely = np.argsort(-posterior, axis=1, kind="stable")[:, :2]
        likely[:, 0] = branch
        wanted = np.repeat((unsure & ~leaves)[:, None], 2, axis=1)
        wanted[:, 0] = True
        row, rank = wanted.nonzero()
        return row, likely[row, rank]

    def _process(self, x: np.ndarray) -> np.ndarray:
        """Class probabilities of one batch."""
        h, log_posterior = self._route(x)
        posterior = self._posterior(log_posterior)
        rows, branch = self._branches(log_posterior, posterior)
        router = np.exp(log_posterior)
        probabilities = router.copy()  # what stands for samples that leave
        mixed, total = np.zeros_like(router), np.zeros_like(router)
        for c in np.unique(branch):
            group = rows[branch == c]
            if c > self.n_clusters_:
                continue
            if c == self.n_clusters_:
                logits = self._base.run(["logits"], {"h": h[group]})[0]
                probabilities[group] = _softmax(logits[:, self._outputs])
                continue
            members = self._answered[c]
            answers = router[group]
            answers[:, members] = self._answer(int(c), h[group], log_posterior[group])
            if self._fallback == "top2":
                weight = posterior[group, c][:, None] * members
                total[group] += weight
                mixed[group] += weight * answers
            else:
                probabilities[group] = answers
        if self._fallback == "top2":
            ran = total > 0
            probabilities[ran] = mixed[ran] / np.maximum(total[ran], 1e-30)
            # Subgraphs that share some of their classes need not agree on their total; rows that
            # left sum to 1 already.
            probabilities /= probabilities.sum(1, keepdims=True)
        return probabilities

    def _answer(self, cluster: int, h: np.ndarray, log_posterior: np.ndarray) -> np.ndarray:
        """Probabilities of the classes that a cluster's subgraph answers, fused with the router."""
        log_router = log_posterior[:, self._answered[cluster]]
        joint = self._router_weight * log_router
        if self._subgraphs[cluster] is not None:
            logits = self._subgraphs[cluster].run(["logits"], {"h": h})[0]
            joint = joint + logits / self._temperatures[cluster]
        mass = np.exp(log_router).sum(1, keepdims=True)
        answer: np.ndarray = mass * _softmax(joint)
        return answer


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax along the second axis."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probabilities: np.ndarray = shifted / shifted.sum(1, keepdims=True)
    return probabilities


def _n_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest, and check that every file is as it was written."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no manifest.json, so it is no exported classifier.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema, hashes = manifest["schema"], manifest["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Copy or export the folder anew.") from error
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {schema!r}; this loader reads schema {SCHEMA}. Use the "
            "sinf_onnx.py that lies in the folder."
        )
    for name, expected in hashes.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise FileNotFoundError(f"{file} is missing. Copy or export the folder anew.")
        if name.endswith(".py"):
            continue  # code that was changed on purpose is the reader's own affair
        if hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise ValueError(
                f"{file} is not as it was exported: its SHA-256 differs from the one in "
                "manifest.json. Copy or export the folder anew."
            )
    files = [manifest["router"], *manifest["subgraphs"], manifest["base"]]
    unlisted = [name for name in files if name is not None and name not in hashes]
    if unlisted:
        raise ValueError(f"{path} gives no SHA-256 for {unlisted[0]}. Export the folder anew.")
    return manifest
