"""One style for all figures, in colours that colour-blind readers tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's palette, its yellow last, which is hard to see on white.
COLOURS = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "0.6"),
    "#F0E442",
)
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "lines.markersize": 4,
    "legend.frameon": False,
}


def panels(n: int, *, width: float = 3.6, height: float = 3.4) -> Any:
    """A figure with `n` panels side by side: ``figure, [axis, ...]``."""
    plt.rcParams.update(_STYLE)
    size = (width * n + 0.6, height)
    figure, axes = plt.subplots(1, n, figsize=size, sharey=True, layout="constrained")
    return figure, [axes] if n == 1 else list(axes)


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG and let go of it."""
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path
