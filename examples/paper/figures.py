"""One style for all figures: colours that colour-blind readers tell apart, labels at the lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from sklearn.isotonic import isotonic_regression

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's palette, without its yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "0.72"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
}
plt.rcParams.update(_STYLE)


def panels(n: int, *, width: float = 3.6, height: float = 3.4, sharey: bool = True) -> Any:
    """A figure with `n` panels side by side: ``figure, [axis, ...]``."""
    figure, axes = plt.subplots(
        1, n, figsize=(width * n + 0.6, height), sharey=sharey, layout="constrained"
    )
    return figure, [axes] if n == 1 else list(axes)


def label_lines(axis: Any, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names beside the ends of lines, pushed apart where they would overlap.

    Parameters
    ----------
    axis : Axes
        Its limits must be final.
    labels : sequence of (x, y, text, colour)
        In data coordinates.
    """
    if not labels:
        return
    low, high = axis.get_ylim()
    height = axis.get_window_extent().height / axis.figure.dpi * 72
    gap = (high - low) * 9.5 / max(height, 1.0)
    ordered = sorted(labels, key=lambda label: label[1])
    # The heights closest to those wanted that are a gap apart: isotonic regression.
    steps = gap * np.arange(len(ordered))
    heights = isotonic_regression(np.array([label[1] for label in ordered]) - steps) + steps
    heights -= max(0.0, heights[-1] - high)
    for (x, _, text, colour), y in zip(ordered, heights, strict=True):
        axis.annotate(
            text,
            (x, y),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=8,
            annotation_clip=False,
        )


def finish(
    figure: Any, labels: Sequence[tuple[Any, Sequence[tuple[float, float, str, str]]]], path: Path
) -> Path:
    """Label the lines of each axis, once the layout is final, and write the figure; see `save`."""
    figure.draw_without_rendering()
    for axis, own in labels:
        label_lines(axis, own)
    return save(figure, path)


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG and let go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path
