"""Pictures of fitted estimators, in the manner of scikit-learn's displays.

Each class holds the figures that it draws, so that they can be drawn again, and has a
``from_estimator`` that takes them from a fitted estimator. Matplotlib is imported when something is
drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from sklearn.utils.validation import check_is_fitted

from .classifier import SINFClassifier
from .clusterer import SemanticClusterer
from .data.calibration import encode
from .data.validation import validate_y
from .inference.report import PruningReport
from .pruner import DCSPruner
from .utils.params import check_choice, check_kind, is_integer

__all__ = [
    "ClusterTreeDisplay",
    "FilterOverlapDisplay",
    "FilterScoreDisplay",
    "RouteConfusionDisplay",
    "SpeedAccuracyDisplay",
]

_COSTS = {
    "latency": "time of a batch, relative to the base",
    "macs": "multiplications per sample, relative to the base",
}


class _Display:
    """What all displays share: axes to draw on."""

    ax_: Any
    figure_: Any

    def _axes(self, ax: Any, figsize: tuple[float, float]) -> Any:
        """The given axes, or new ones."""
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots(figsize=figsize, layout="constrained")
        self.ax_, self.figure_ = ax, ax.figure
        return ax


class SpeedAccuracyDisplay(_Display):
    """Accuracy against cost, for any number of classifiers beside their base.

    Parameters
    ----------
    base_accuracy : float
        Of the unpruned network.
    points : mapping of str to array-like of shape (n_points, 2)
        For each line: cost relative to the base, and accuracy.
    cost : {"latency", "macs"}, default="macs"
        What the cost is.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    lines_ : list of matplotlib Line2D

    Examples
    --------
    >>> from sinfkit import SpeedAccuracyDisplay
    >>> points = {"SINF": [(0.5, 0.74), (0.35, 0.70)], "one network": [(0.6, 0.73), (0.4, 0.66)]}
    >>> display = SpeedAccuracyDisplay(base_accuracy=0.75, points=points).plot()
    >>> len(display.lines_)
    2
    """

    lines_: list[Any]

    def __init__(
        self,
        *,
        base_accuracy: float,
        points: Mapping[str, Any],
        cost: str = "macs",
    ) -> None:
        check_choice("cost", cost, _COSTS)
        self.base_accuracy = base_accuracy
        self.points = {name: np.atleast_2d(np.asarray(p, float)) for name, p in points.items()}
        self.cost = cost

    @classmethod
    def from_estimator(
        cls,
        estimator: SINFClassifier | DCSPruner | list[Any],
        X: Any,
        y: Any,
        *,
        name: str = "SINF",
        cost: str = "macs",
        repeats: int = 15,
        ax: Any = None,
    ) -> SpeedAccuracyDisplay:
        """Measure one or more fitted classifiers that have the same base, and draw them.

        Parameters
        ----------
        estimator : SINFClassifier, DCSPruner or list of them
        X : array-like or Tensor of shape (n_samples, ...)
            Samples that no `fit` has seen.
        y : array-like of shape (n_samples,)
        name : str, default="SINF"
            Of the line.
        cost : {"latency", "macs"}, default="macs"
        repeats : int, default=15
            Paired runs, for the latency.
        ax : matplotlib Axes, optional

        Returns
        -------
        SpeedAccuracyDisplay
        """
        check_choice("cost", cost, _COSTS)
        estimators: list[Any] = estimator if isinstance(estimator, list) else [estimator]
        if not estimators:
            raise ValueError("estimator must be one, or a list with at least one; got [].")
        for one in estimators:
            _check_estimator(one, SINFClassifier, DCSPruner)
        timed = repeats if cost == "latency" else 0
        reports = [e.report(X, y, repeats=timed) for e in estimators]
        return cls.from_reports({name: reports}, cost=cost, ax=ax)

    @classmethod
    def from_reports(
        cls, reports: Mapping[str, Sequence[PruningReport]], *, cost: str = "macs", ax: Any = None
    ) -> SpeedAccuracyDisplay:
        """Draw reports that were made before; one line for each key.

        Parameters
        ----------
        reports : mapping of str to sequence of SINFReport or PruningReport
            Of the same base on the same samples.
        cost : {"latency", "macs"}, default="macs"
            Latency needs reports with measured times.
        ax : matplotlib Axes, optional

        Returns
        -------
        SpeedAccuracyDisplay
        """
        check_choice("cost", cost, _COSTS)
        points: dict[str, list[tuple[float, float]]] = {}
        if not reports or not all(reports.values()):
            raise ValueError("reports: each line needs at least one report.")
        base = {r.base_accuracy for line in reports.values() for r in line}
        if len(base) != 1:
            raise ValueError("the reports must be of one base network, on the same samples.")
        for name, line in reports.items():
            points[name] = []
            for r in line:
                relative = r.macs / r.base_macs if cost == "macs" else 1.0 - r.time_saved
                if not np.isfinite(relative):
                    raise ValueError("cost='latency' needs reports with repeats of at least 1.")
                points[name].append((relative, r.accuracy))
        return cls(base_accuracy=base.pop(), points=points, cost=cost).plot(ax)

    def plot(self, ax: Any = None, **line: Any) -> SpeedAccuracyDisplay:
        """Draw the lines.

        Parameters
        ----------
        ax : matplotlib Axes, optional
        **line
            Passed to ``Axes.plot``.

        Returns
        -------
        self
        """
        ax = self._axes(ax, (6.0, 4.0))
        ax.axhline(self.base_accuracy * 100, color="0.4", linestyle="--", linewidth=1)
        ax.annotate(
            f"base, {self.base_accuracy:.1%}",
            (1, self.base_accuracy * 100),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize="small",
            color="0.4",
        )
        self.lines_ = []
        for (name, values), marker in zip(self.points.items(), _markers(), strict=False):
            cost, accuracy = values[np.argsort(values[:, 0])].T
            style = {"marker": marker, "label": name} | line
            self.lines_ += ax.plot(cost, accuracy * 100, **style)
        ax.set(xlabel=_COSTS[self.cost], ylabel="accuracy (%)")
        ax.margins(y=0.12)
        ax.legend(loc="lower right", fontsize="small")
        return self


class FilterScoreDisplay(_Display):
    """Filter scores of each layer, sorted: how unequal its filters are.

    Parameters
    ----------
    scores : mapping of str to ndarray of shape (n_filters,)
        By layer.
    kept : mapping of str to int, optional
        How many filters of each layer were kept; marked on its line.  These are the layer's highest
        unless several layers share their channels, or a grouped convolution has a say.
    name : str, default="score"
        What the scores are.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    lines_ : list of matplotlib Line2D

    Examples
    --------
    >>> import numpy as np
    >>> from sinfkit import FilterScoreDisplay
    >>> scores = {"conv1": np.array([0.7, 0.2, 0.1]), "conv2": np.array([0.4, 0.6])}
    >>> display = FilterScoreDisplay(scores=scores, kept={"conv1": 2, "conv2": 1}).plot()
    >>> len(display.lines_)
    2
    """

    lines_: list[Any]

    def __init__(
        self,
        *,
        scores: Mapping[str, np.ndarray],
        kept: Mapping[str, int] | None = None,
        name: str = "score",
    ) -> None:
        self.scores = {layer: np.asarray(values, float) for layer, values in scores.items()}
        self.kept, self.name = dict(kept or {}), name

    @classmethod
    def from_estimator(
        cls, estimator: DCSPruner | SINFClassifier, *, cluster: int | None = None, ax: Any = None
    ) -> FilterScoreDisplay:
        """Draw the scores of a fitted pruner, or those of one cluster.

        Parameters
        ----------
        estimator : DCSPruner or SINFClassifier
        cluster : int, optional
            Position in `cluster_names_`, for a `SINFClassifier`; default the first that has a
            subgraph.
        ax : matplotlib Axes, optional

        Returns
        -------
        FilterScoreDisplay
        """
        _check_estimator(estimator, DCSPruner, SINFClassifier)
        pruner = estimator
        if isinstance(estimator, SINFClassifier):
            with_subgraph = [c for c, own in enumerate(estimator.scores_) if own]
            if cluster is None and with_subgraph:
                cluster = with_subgraph[0]
            if not is_integer(cluster) or cluster not in with_subgraph:
                raise ValueError(
                    f"cluster must be one that was sliced, of {with_subgraph}; got {cluster!r}."
                )
            scores, support = estimator.scores_[cluster], estimator.supports_[cluster]
            pruner = estimator.pruner_
        else:
            scores, support = estimator.scores_, estimator.support_
        criterion = pruner.criterion
        name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "score")
        kept = {layer: len(support[layer]) for layer in scores if layer in support}
        return cls(scores=scores, kept=kept, name=name).plot(ax)

    def plot(self, ax: Any = None, **line: Any) -> FilterScoreDisplay:
        """Draw one line per layer, from the first (dark) to the last (light).

        Parameters
        ----------
        ax : matplotlib Axes, optional
        **line
            Passed to ``Axes.plot``.

        Returns
        -------
        self
        """
        import matplotlib as mpl

        ax = self._axes(ax, (6.0, 4.0))
        colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, max(len(self.scores), 1)))
        self.lines_ = []
        for (layer, values), color in zip(self.scores.items(), colors, strict=True):
            ranked = np.sort(np.asarray(values))[::-1]
            # Relative to an even share, so that layers of all widths can be compared.
            relative = ranked / (np.mean(ranked) or 1.0)
            place = (np.arange(len(ranked)) + 0.5) / len(ranked)
            self.lines_ += ax.plot(place, relative, **({"color": color, "label": layer} | line))
            if layer in self.kept:
                at = min(self.kept[layer], len(ranked)) - 1
                ax.plot(place[at], relative[at], "o", color=color, markersize=4)
        ax.set(
            xlabel="filters of the layer, highest score first (dots: number kept)",
            ylabel=f"{self.name}, relative to the layer's mean",
            xlim=(0, 1),
        )
        ax.legend(fontsize="x-small", ncol=1 + len(self.scores) // 9)
        return self


class FilterOverlapDisplay(_Display):
    """How many kept filters the subgraphs of two clusters share.

    Parameters
    ----------
    overlap : ndarray of shape (n_clusters, n_clusters)
        Share of common filters (intersection over union), mean over layers.
    names : sequence of str
        Of the clusters.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    im_ : matplotlib AxesImage

    Examples
    --------
    >>> import numpy as np
    >>> from sinfkit import FilterOverlapDisplay
    >>> overlap = np.array([[1.0, 0.4], [0.4, 1.0]])
    >>> display = FilterOverlapDisplay(overlap=overlap, names=["cats", "cars"]).plot()
    """

    im_: Any

    def __init__(self, *, overlap: np.ndarray, names: Sequence[str]) -> None:
        self.names = [str(name) for name in names]
        self.overlap = np.asarray(overlap, float)

    @classmethod
    def from_estimator(
        cls, estimator: SINFClassifier, *, layer: str | None = None, ax: Any = None
    ) -> FilterOverlapDisplay:
        """Compare the subgraphs of a fitted classifier.

        Parameters
        ----------
        estimator : SINFClassifier
        layer : str, optional
            One layer; default is the mean over all sliced ones.
        ax : matplotlib Axes, optional

        Returns
        -------
        FilterOverlapDisplay
            Clusters of one class have no subgraph and are left out.
        """
        _check_estimator(estimator, SINFClassifier)
        rows = [c for c, support in enumerate(estimator.supports_) if support]
        if not rows:
            raise ValueError("no cluster of estimator has a subgraph: each has a single class.")
        layers = [k for k in estimator.supports_[rows[0]] if k in estimator.scores_[rows[0]]]
        if layer is not None:
            if not isinstance(layer, str) or layer not in layers:
                raise ValueError(f"layer must be one of {layers}, got {layer!r}.")
            layers = [layer]
        if not layers:
            raise ValueError("no layer of estimator was sliced: the subgraphs share all filters.")
        overlap = np.zeros((len(rows), len(rows)))
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                for name in layers:
                    one, other = estimator.supports_[a][name], estimator.supports_[b][name]
                    common = len(np.intersect1d(one, other))
                    overlap[i, j] += common / (len(one) + len(other) - common) / len(layers)
        return cls(overlap=overlap, names=estimator.cluster_names_[rows].tolist()).plot(ax)

    def plot(self, ax: Any = None, *, cmap: str = "viridis") -> FilterOverlapDisplay:
        """Draw the matrix.

        Parameters
        ----------
        ax : matplotlib Axes, optional
        cmap : str, default="viridis"

        Returns
        -------
        self
        """
        n = len(self.names)
        ax = self._axes(ax, (2.4 + 0.32 * n, 1.8 + 0.32 * n))
        self.im_ = ax.imshow(self.overlap, vmin=0, vmax=1, cmap=cmap)
        if n <= 12:
            for (i, j), value in np.ndenumerate(self.overlap):
                color = "black" if value > 0.6 else "white"
                ax.text(j, i, f"{value:.0%}", ha="center", va="center", color=color, fontsize=7)
        ax.set_xticks(range(n), self.names, rotation=60, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(n), self.names)
        ax.set_title("filters kept by both, of those kept by either", fontsize="medium")
        ax.figure.colorbar(self.im_, ax=ax, shrink=0.8)
        return self


class RouteConfusionDisplay(ConfusionMatrixDisplay):
    """Which cluster the route predictor sends the samples of each cluster to.

    A `sklearn.metrics.ConfusionMatrixDisplay` of clusters.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import RouteConfusionDisplay, SemanticClusterer
    >>> X, y = load_digits(return_X_y=True)
    >>> clusterer = SemanticClusterer(n_clusters=3, random_state=0).fit(X[:600], y[:600])
    >>> display = RouteConfusionDisplay.from_estimator(clusterer, X[600:], y[600:])
    >>> display.confusion_matrix.shape
    (3, 3)
    """

    @classmethod
    def from_estimator(
        cls,
        estimator: SINFClassifier | SemanticClusterer,
        X: Any,
        y: Any,
        *,
        normalize: str | None = "true",
        ax: Any = None,
    ) -> RouteConfusionDisplay:
        """Route samples and compare with their classes' clusters.

        Parameters
        ----------
        estimator : SINFClassifier or SemanticClusterer
        X : array-like or Tensor of shape (n_samples, ...)
        y : array-like of shape (n_samples,)
            Classes.
        normalize : {"true", "pred", "all"} or None, default="true"
            As in `sklearn.metrics.confusion_matrix`.
        ax : matplotlib Axes, optional

        Returns
        -------
        RouteConfusionDisplay
        """
        _check_estimator(estimator, SINFClassifier, SemanticClusterer)
        routed = getattr(estimator, "predict_cluster", estimator.predict)(X)
        place = encode(validate_y(y, len(routed)), estimator.classes_)
        n = len(estimator.cluster_names_)
        matrix = confusion_matrix(
            estimator.class_clusters_[place], routed, labels=range(n), normalize=normalize
        )
        display = cls(matrix, display_labels=[str(name) for name in estimator.cluster_names_])
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots(figsize=(2.6 + 0.4 * n, 1.9 + 0.4 * n), layout="constrained")
        display.plot(
            ax=ax,
            xticks_rotation=60,
            values_format=".0%" if normalize else "d",
            include_values=n <= 12,
            text_kw={"fontsize": 7},
        )
        for label in ax.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
        ax.set(xlabel="routed to", ylabel="true cluster")
        return display


class ClusterTreeDisplay(_Display):
    """The tree of classes, from the most alike upwards.

    Parameters
    ----------
    affinity : ndarray of shape (n_classes, n_classes)
        Symmetric; how much two classes belong together.
    names : sequence of str
        Of the classes.
    clusters : int ndarray of shape (n_classes,), optional
        The cluster of each class, which colours its name.

    Attributes
    ----------
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure
    order_ : list of int
        The classes as the tree's leaves show them, from below.

    Notes
    -----
    Average linkage on ``max(affinity) - affinity``, without the limit on sizes that the clusterer
    has: a cluster of it need not be one branch.

    Examples
    --------
    >>> import numpy as np
    >>> from sinfkit import ClusterTreeDisplay
    >>> affinity = np.array([[1.0, 0.8, 0.1], [0.8, 1.0, 0.2], [0.1, 0.2, 1.0]])
    >>> ClusterTreeDisplay(affinity=affinity, names=["cat", "dog", "car"]).plot().order_
    [2, 0, 1]
    """

    order_: list[int]

    def __init__(
        self, *, affinity: np.ndarray, names: Sequence[str], clusters: np.ndarray | None = None
    ) -> None:
        self.names, self.affinity = [str(name) for name in names], np.asarray(affinity, float)
        self.clusters = None if clusters is None else np.asarray(clusters)

    @classmethod
    def from_estimator(
        cls,
        estimator: SemanticClusterer | SINFClassifier,
        *,
        names: Sequence[str] | None = None,
        ax: Any = None,
    ) -> ClusterTreeDisplay:
        """Draw the tree of a fitted clusterer.

        Parameters
        ----------
        estimator : SemanticClusterer or SINFClassifier
        names : sequence of str, optional
            Of the classes, in the order of `classes_`; default the labels.
        ax : matplotlib Axes, optional

        Returns
        -------
        ClusterTreeDisplay
        """
        _check_estimator(estimator, SemanticClusterer, SINFClassifier)
        names = list(estimator.classes_ if names is None else names)
        if len(names) != len(estimator.classes_):
            raise ValueError(
                f"names must name the {len(estimator.classes_)} classes, got {len(names)}."
            )
        owner = estimator.clusterer_ if isinstance(estimator, SINFClassifier) else estimator
        return cls(affinity=owner.affinity_, names=names, clusters=estimator.class_clusters_).plot(
            ax
        )

    def plot(self, ax: Any = None) -> ClusterTreeDisplay:
        """Draw the tree, leaves to the right.

        Parameters
        ----------
        ax : matplotlib Axes, optional

        Returns
        -------
        self
        """
        import matplotlib as mpl
        from scipy.cluster.hierarchy import dendrogram, linkage
        from scipy.spatial.distance import squareform

        n = len(self.names)
        if n < 2:
            raise ValueError("a tree needs at least two classes: names has fewer.")
        ax = self._axes(ax, (6.0, 1.0 + 0.16 * n))
        distance = self.affinity[~np.eye(n, dtype=bool)].max() - self.affinity
        np.fill_diagonal(distance, 0.0)
        tree = linkage(squareform(np.maximum(distance, 0.0), checks=False), method="average")
        drawn = dendrogram(
            tree,
            labels=self.names,
            orientation="left",
            ax=ax,
            link_color_func=lambda _: "0.45",
            leaf_font_size=7,
        )
        self.order_ = [int(leaf) for leaf in drawn["leaves"]]
        if self.clusters is not None:
            size = 10 if max(self.clusters) < 10 else 20
            palette = mpl.colormaps[f"tab{size}"]
            for label, leaf in zip(ax.get_yticklabels(), self.order_, strict=True):
                label.set_color(palette(int(self.clusters[leaf]) % size))
        ax.set_xlabel("distance (colours: clusters)" if self.clusters is not None else "distance")
        for side in ("top", "left", "right"):
            ax.spines[side].set_visible(False)
        return self


def _check_estimator(estimator: Any, *kinds: type) -> None:
    """Raise unless an estimator is one of those that can be drawn, and fitted."""
    what = " or a ".join(kind.__name__ for kind in kinds)
    check_kind("estimator", estimator, kinds, f"a {what}")
    check_is_fitted(estimator)


def _markers() -> list[str]:
    """Markers that can be told apart without colour."""
    return ["o", "s", "^", "v", "D", "P", "X", "*", "<", ">"] * 10
