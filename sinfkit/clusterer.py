"""SemanticClusterer: which classes belong together, and to which group a sample belongs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, fx, nn

from .base import TorchEstimator, all_or_nothing
from .criteria.activations import MAX_POOL_SIZE
from .data.images import with_labels
from .data.validation import hold_out, mean, validate_X
from .graph.cost import count_macs
from .graph.cuts import CutPoint, cut_points, find_cut, sides, split
from .inference.network import cluster_posterior, fit_route_predictor
from .pruning.scoring import gather
from .routing.clusters import METHODS, Clusters, Grouping, group_classes
from .utils.jobs import over_chunks
from .utils.params import check_choice, check_integer, check_number, naming
from .utils.progress import Progress


class SemanticClusterer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, TorchEstimator):
    """Group the classes of a trained network into semantic clusters.

    Classes in one cluster share a subgraph of the network in `SINFClassifier`.  The estimator also
    routes: a probe on an early layer predicts the cluster of a sample.

    Parameters
    ----------
    model : nn.Module or FrozenModel, optional
        The trained classifier.  None trains a small default network in ``fit``.
    method : {"confusion", "activation", "given"}, default="confusion"
        ``"confusion"``: classes that a probe on the early layer confuses go together, because then
        the router need not tell them apart.  ``"activation"``: classes that make the same filters
        fire go together.  ``"given"``: as `mapping` says.
    mapping : dict, optional
        For ``method="given"``: class to cluster, or cluster to a list of classes.
    n_clusters : int, optional
        Number of clusters; default the square root of the number of classes, rounded.
    max_cluster_size : int, optional
        No cluster gets more classes; default one and a half times the mean size, rounded up, since
        agglomerative clustering likes to make one cluster of nearly everything.
    layer : str, default="auto"
        The cut behind which the probe sits (see `sinfkit.graph.cut_points`); ``"auto"`` takes the
        one nearest to half of the network's multiplications.
    pool_size : int, default=2
        The probe sees feature maps averaged to ``pool_size x pool_size``.
    validation_fraction : float, default=0.2
        Share of the samples on which the probe's penalty is chosen.
    model_classes : sequence of labels, optional
        The label of each of the model's outputs.
    batch_size : int, default=256
    device : str or torch.device, default="auto"
    n_jobs : int, optional
        As in `DCSPruner`: workers that predict, inside ``joblib.parallel_config``.
    memory : str, joblib.Memory or None
        Where to cache the activations' statistics between fits.
    random_state : int, RandomState or None, default=None
    verbose : int, default=0
        1: a line at the start, a bar, and what came out.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
    class_clusters_ : int ndarray of shape (n_classes,)
        Cluster of each of `classes_`.
    cluster_names_ : ndarray of shape (n_clusters,)
        The mapping's names, sorted; else 0..n_clusters-1.
    affinity_ : ndarray of shape (n_classes, n_classes)
        Symmetric; how much two classes belong together.
    layer_ : str
        The cut that was used.
    route_accuracy_ : float
        Share of held-out samples whose cluster the probe predicts.
    base_model_ : FrozenModel
    n_features_in_ : int
    input_shape_ : tuple of int
    device_ : torch.device

    Notes
    -----
    The paper (arXiv 2310.01259) groups CIFAR-100 by its 20 superclasses; ``"confusion"`` and
    ``"activation"`` are our choices.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import SemanticClusterer
    >>> X, y = load_digits(return_X_y=True)
    >>> clusterer = SemanticClusterer(n_clusters=3, random_state=0)
    >>> clusterer.fit(X, y).class_clusters_.shape
    (10,)
    """

    classes_: np.ndarray
    class_clusters_: np.ndarray
    cluster_names_: np.ndarray
    affinity_: np.ndarray
    layer_: str
    network_: nn.Sequential

    _only_from_fit = frozenset({"affinity_"})

    def __init__(
        self,
        model: Any = None,
        *,
        method: str = "confusion",
        mapping: Any = None,
        n_clusters: int | None = None,
        max_cluster_size: int | None = None,
        layer: str = "auto",
        pool_size: int = 2,
        validation_fraction: float = 0.2,
        model_classes: Any = None,
        batch_size: int = 256,
        device: Any = "auto",
        n_jobs: int | None = None,
        memory: Any = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.method = method
        self.mapping = mapping
        self.n_clusters = n_clusters
        self.max_cluster_size = max_cluster_size
        self.layer = layer
        self.pool_size = pool_size
        self.validation_fraction = validation_fraction
        self.model_classes = model_classes
        self.batch_size = batch_size
        self.device = device
        self.n_jobs = n_jobs
        self.memory = memory
        self.random_state = random_state
        self.verbose = verbose

    @all_or_nothing
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> SemanticClusterer:
        """Group the classes, and fit the probe that predicts the cluster.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, channels, height, width) or (n_samples, \
n_features)
        y : array-like of shape (n_samples,)
        sample_weight : array-like of shape (n_samples,), optional
            How many times each sample counts, in the probe, the affinities and the held-out
            accuracy: 2 stands for the sample twice, 0 for none.  Default: once.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For a parameter out of range, a mapping that misses a class or names one twice, or
            samples, labels or weights that do not fit the model or each other.
        """
        self._check_parameters()
        X, y = with_labels(X, y)
        calibration = self._calibrate(
            X, y, sample_weight=sample_weight, held_out=self.validation_fraction
        )
        graph = calibration.graph
        if self.layer == "auto":
            cut = half_way_cut(graph, calibration.example)
        else:
            with naming("layer"):
                cut = find_cut(graph, self.layer)
        with Progress("SemanticClusterer", self.verbose) as progress:
            progress.begin(f"one pass over {len(calibration.X)} samples", 1)
            progress.doing("reads the samples")
            statistics = gather(calibration, {cut.name: cut.node}, self.pool_size, self.memory)
            self._check_base(statistics.logits, calibration)
        rng = np.random.default_rng(calibration.seed)
        fit, held = hold_out(calibration.y_encoded, self.validation_fraction, rng)
        features = statistics.pooled[cut.name]
        route = fit_route_predictor(
            features[fit],
            calibration.y_encoded[fit],
            features[held],
            calibration.y_encoded[held],
            pool_size=self.pool_size,
            weight=calibration.weights(fit),
            held_out_weight=calibration.weights(held),
        )
        self._adopt(
            group_classes(
                self._grouping(),
                self.classes_,
                features[fit],
                calibration.y_encoded[fit],
                route.penalty,
                calibration.seed,
                calibration.weights(fit),
            )
        )
        clusters = torch.as_tensor(self.class_clusters_)
        posterior = cluster_posterior(route.log_posterior, clusters, len(self.cluster_names_))
        truth = self.class_clusters_[calibration.y_encoded[held]]
        right = posterior.argmax(1).numpy() == truth
        self.route_accuracy_ = mean(right, calibration.weights(held))
        self.layer_ = cut.name
        self.network_ = nn.Sequential(split(graph, cut)[0], route.predictor.to(self.device_))
        progress.end(
            f"{len(self.cluster_names_)} clusters; behind {cut.name} the probe tells that of "
            f"{self.route_accuracy_:.0%} of held-out samples"
        )
        return self

    def _check_parameters(self) -> None:
        """Raise for parameters that are wrong whatever the data."""
        check_choice("method", self.method, METHODS)
        if (self.method == "given") != (self.mapping is not None):
            raise ValueError('mapping goes with method="given", and only with it.')
        for name in ("n_clusters", "max_cluster_size"):
            check_integer(name, getattr(self, name), optional=True)
        check_integer("pool_size", self.pool_size, high=MAX_POOL_SIZE)
        check_number("validation_fraction", self.validation_fraction, "(0, 1)")
        if not isinstance(self.layer, str):
            raise TypeError(f"layer must be a name, got {type(self.layer).__name__}.")

    def _grouping(self) -> Grouping:
        """Return how to group, as data."""
        return Grouping(
            self.method, self.mapping, self.n_clusters, self.max_cluster_size, self.pool_size
        )

    def _adopt(self, clusters: Clusters) -> None:
        """Take clusters as the fitted ones."""
        self.class_clusters_ = clusters.class_clusters
        self.cluster_names_ = clusters.names
        self.affinity_ = clusters.affinity

    def _without_network(self) -> SemanticClusterer:
        """A shallow copy of the clusters alone, which cannot route."""
        twin = SemanticClusterer(**self.get_params(deep=False))
        twin.__dict__.update({k: v for k, v in vars(self).items() if k != "network_"})
        return twin

    @over_chunks
    def predict(self, X: Any) -> Any:
        """Predict the cluster of each sample.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)

        Returns
        -------
        int ndarray of shape (n_samples,)
            Positions in `cluster_names_`.  Under scikit-learn's array API dispatch, a Tensor on the
            device of `X` where that is a Tensor.
        """
        return self._as_wanted(self._posterior(X).argmax(1), X)

    @over_chunks
    def transform(self, X: Any) -> Any:
        """Compute the route probability of each cluster.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)

        Returns
        -------
        ndarray of shape (n_samples, n_clusters)
            Rows sum to 1; float64 for float64 `X`, float32 otherwise.  A Tensor as with `predict`.
        """
        double = getattr(X, "dtype", None) in (np.float64, torch.float64)
        return self._as_wanted(self._posterior(X), X, double)

    def _posterior(self, X: Any) -> Tensor:
        """Cluster probabilities, on the host or where `X` is."""
        check_is_fitted(self)
        X = validate_X(self, X, reset=False)
        log_p = self._run(self.network_, self._batcher(self.network_)(X), X)
        clusters = torch.as_tensor(self.class_clusters_).to(log_p.device)
        return cluster_posterior(log_p, clusters, len(self.cluster_names_))

    @property
    def _n_features_out(self) -> int:
        """Number of clusters, which `get_feature_names_out` asks for."""
        return len(self.cluster_names_)


def half_way_cut(graph: fx.GraphModule, example: Tensor) -> CutPoint:
    """Cut nearest to half of the network's multiplications."""
    cuts = cut_points(graph)
    if not cuts:
        raise ValueError(
            "The model has no place where it can be cut in two. Pass it as "
            "nn.Sequential(prefix, rest)."
        )
    total, by_layer = count_macs(graph, example)
    before = [sides(graph, cut)[0] for cut in cuts]
    share = [sum(by_layer.get(n, 0) for n in names) / max(total, 1) for names in before]
    return cuts[int(np.argmin(np.abs(np.array(share) - 0.5)))]
