"""SINFClassifier: route each input to its semantic cluster, run only that one's subgraph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.base import ClassifierMixin, clone
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from ._base import Calibration, TorchEstimator, all_or_nothing, gather, progress
from ._validation import Images, hold_out, validate_X, validate_y
from .assembly import (
    ROUTER_WEIGHTS,
    Subgraph,
    build_subgraph,
    choose_cut,
    choose_weight,
    observe,
    pooled_output,
    routed_answers,
    sides,
    slice_prefix,
    try_cuts,
    usable_cuts,
)
from .clusterer import SemanticClusterer
from .graph import CutPoint, cut_points, find_cut, observation_nodes, split
from .network import FALLBACKS, Normalise, SINFNetwork
from .profiling import fold_batch_norm
from .pruner import DCSPruner
from .repair import affordable_images
from .report import SINFReport, make_report
from .routing import choose_threshold, fit_route_predictor
from .subgraph import Recipe, make_recipe, sliceable, warn_about_whole
from .surgery import ChannelGroup

_ROUTE_SAMPLES = 5_000


class SINFClassifier(ClassifierMixin, TorchEstimator):
    """Semantic Inference: a trained network made faster by running one cluster's part of it.

    The first layers run for every input.  A small predictor on their output says which semantic
    cluster (group of classes) the input belongs to, and only that cluster's subgraph of the
    remaining layers runs.  Subgraphs are sliced out of the trained network by the Discriminative
    Capability Score and repaired in closed form; the network is not retrained.

    Parameters
    ----------
    model : nn.Module or FrozenModel, optional
        The trained classifier, which returns one score per class.  Wrap it in a `FrozenModel` for
        grid searches, and to give normalisation.  None trains a small default network in ``fit``.
    clusterer : SemanticClusterer, optional
        How the classes are grouped.  Leave its `model` and `model_classes` at None.  None means
        ``SemanticClusterer()``; pass one to reach ``clusterer__n_clusters`` in a grid search.
    pruner : DCSPruner, optional
        How the subgraphs are cut out.  Leave its `model`, `model_classes`, `classes` and
        `first_layer` at None.  None means ``DCSPruner()``; pass one to reach ``pruner__max_ratio``.
    route_layer : str, default="auto"
        The cut behind which the route predictor sits, see `sinfkit.graph.cut_points`.  ``"auto"``
        takes the earliest whose held-out route accuracy reaches `route_accuracy`; where none does,
        the one that keeps the accuracy and saves the most.
    route_accuracy : float, default=0.75
    prefix_ratio : float, default=0.3
        Fraction of filters removed from each layer before the route predictor, for all classes.  0
        leaves the prefix whole.  Its last layer keeps its channels and is refitted to the dense
        output, so that the base's rest still works behind it.
    prefix_criterion : str or callable, default="obs"
        Which of the prefix's filters go; as `DCSPruner.criterion`.  All classes need the prefix,
        and its output is rebuilt by least squares: what counts there is not what tells classes
        apart, but what the other filters cannot make up for.
    confidence_threshold : float or "auto", default="auto"
        Samples whose route confidence is below it take the fallback.  ``"auto"`` takes the smallest
        with which the held-out accuracy stays within `max_accuracy_drop` of the base's; where none
        does, the smallest that is within a standard error of the best, with a warning if the loss
        is beyond the noise.
    max_accuracy_drop : float, default=0.01
        Accuracy (0.01 is one point) that the automatic choices may give away on held-out samples.
    fallback : {"base", "topk", "none"}, default="base"
        What runs below the threshold: the rest of the base network, the subgraphs of the `top_k`
        most likely clusters, or the one subgraph all the same.
    top_k : int, default=2
    router_weight : float or "auto", default="auto"
        Exponent of the router's posterior in the product with the subgraph's, see
        `sinfkit.routing.fuse`.  ``"auto"`` chooses it by held-out log loss.
    validation_fraction : float, default=0.2
        Share of the calibration samples that is held out for the automatic choices, where ``fit``
        is not given samples for them.
    model_classes : sequence of labels, optional
        The label of each of the model's outputs.  Default: integer labels are output indices,
        others are matched in sorted order.
    batch_size : int, default=256
    device : str or torch.device, default="auto"
        ``"auto"``: the first GPU where there is one.
    n_jobs : int, optional
        Threads that build subgraphs side by side.
    memory : str, joblib.Memory or None
        Where to cache the activations' statistics between fits.
    random_state : int, RandomState or None, default=None
    verbose : int, default=0
        Show progress bars.

    Attributes
    ----------
    network_ : SINFNetwork
        The routed network, on `device_`: samples before normalisation in, probabilities out.
    clusterer_, pruner_ : estimators
        The clones that were used.
    classes_ : ndarray of shape (n_classes,)
    class_clusters_ : int ndarray of shape (n_classes,)
        Cluster of each of `classes_`.
    cluster_names_ : ndarray of shape (n_clusters,)
    route_layer_ : str
    confidence_threshold_ : float
    router_weight_ : float
    temperatures_ : ndarray of shape (n_clusters,)
    route_accuracy_ : float
        Held-out share of samples that are sent to the right cluster.
    scores_, supports_, repair_errors_ : list of dict
        For each cluster, as `DCSPruner` has them; empty for a cluster of one class.
    base_model_ : FrozenModel
    n_features_in_ : int
    input_shape_ : tuple of int
    device_ : torch.device

    See Also
    --------
    DCSPruner : One smaller network for all classes, without routing.
    SemanticClusterer : The clusters alone.

    Notes
    -----
    Stated by the paper (arXiv 2310.01259): the four parts, the cluster's own filters and outputs,
    the confidence threshold, 75 % route accuracy.  Our choices: what runs below the threshold, the
    predictor on fine classes, the fusion of its posterior, the sliced prefix, the repair.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import SINFClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> clf = SINFClassifier(random_state=0).fit(X[:1000], y[:1000])
    >>> clf.score(X[1000:], y[1000:]) > 0.85
    True
    """

    network_: SINFNetwork
    classes_: np.ndarray
    class_clusters_: np.ndarray

    def __init__(
        self,
        model: Any = None,
        *,
        clusterer: Any = None,
        pruner: Any = None,
        route_layer: str = "auto",
        route_accuracy: float = 0.75,
        prefix_ratio: float = 0.3,
        prefix_criterion: str | Callable[..., Any] = "obs",
        confidence_threshold: float | str = "auto",
        max_accuracy_drop: float = 0.01,
        fallback: str = "base",
        top_k: int = 2,
        router_weight: float | str = "auto",
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
        self.clusterer = clusterer
        self.pruner = pruner
        self.route_layer = route_layer
        self.route_accuracy = route_accuracy
        self.prefix_ratio = prefix_ratio
        self.prefix_criterion = prefix_criterion
        self.confidence_threshold = confidence_threshold
        self.max_accuracy_drop = max_accuracy_drop
        self.fallback = fallback
        self.top_k = top_k
        self.router_weight = router_weight
        self.validation_fraction = validation_fraction
        self.model_classes = model_classes
        self.batch_size = batch_size
        self.device = device
        self.n_jobs = n_jobs
        self.memory = memory
        self.random_state = random_state
        self.verbose = verbose

    @all_or_nothing
    def fit(self, X: Any, y: Any, *, X_val: Any = None, y_val: Any = None) -> SINFClassifier:
        """Group the classes, place the route predictor, extract and repair the subgraphs.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, channels, height, width) or (n_samples, \
n_features)
            Calibration samples; uint8 images are divided by 255.
        y : array-like of shape (n_samples,)
            Their labels; every class of the model must occur.
        X_val : array-like or Tensor of shape (n_held_out, ...), optional
            Held-out samples for the automatic choices.  Give samples that the base network was NOT
            trained on: on samples that it has memorised it is too sure of itself.  Default: a part
            of `X`.
        y_val : array-like of shape (n_held_out,), optional

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For a parameter out of range, or samples or labels that do not fit the model.
        TypeError
            If `model` is not a module.
        """
        clusterer, pruner = self._components()
        recipe = pruner._recipe()
        self._check_parameters()
        prefix_recipe = make_recipe(
            self.prefix_criterion,
            "uniform",
            0.0,
            self.prefix_ratio,
            recipe.pool_size,
            "least_squares",
            {"penalty": pruner.penalty},
        )
        calibration = self._calibrate(X, y)
        rng = np.random.default_rng(calibration.seed)
        fit, held_X, held = self._hold_out(calibration, X_val, y_val, rng)
        codes = calibration.codes
        held_codes = held[1]

        def batches(index: np.ndarray) -> Any:
            return calibration.batcher(calibration.X, index)

        def held_batches() -> Any:
            return calibration.batcher(held_X, held[0])

        graph = calibration.graph
        groups = calibration.groups
        clusterer.classes_ = calibration.table.classes
        with torch.inference_mode():
            answers = torch.cat([graph(x).cpu() for x in held_batches()])
        held_base = answers[:, torch.as_tensor(calibration.table.outputs)]
        base_right = held_base.argmax(1).numpy() == held_codes
        target = float(base_right.mean()) - self.max_accuracy_drop

        def group_classes(features: Tensor, y: np.ndarray, route: Any) -> np.ndarray:
            clusterer._group(features, y, route, calibration.seed)
            return clusterer.class_clusters_

        cut = self._cut(
            calibration,
            recipe,
            (rng.permutation(fit)[:_ROUTE_SAMPLES], batches),
            (held_codes, held_batches, held_base),
            clusterer.pool_size,
            group_classes,
            target,
        )
        inside, behind = sides(graph, cut)
        rest_groups = sliceable(groups, behind)
        prefix_groups = sliceable(groups, inside) if self.prefix_ratio else []
        warn_about_whole(groups, None if self.prefix_ratio else behind)

        layers = {
            name: chosen
            for chosen, part in ((prefix_recipe, prefix_groups), (recipe, rest_groups))
            for group in part
            for name in group.layers
        }
        nodes = observation_nodes(graph, layers)
        watched = {k: nodes[k] for k, own in layers.items() if "features" in own.criterion.needs}
        statistics = gather(calibration, watched, recipe.pool_size, self.memory, self.verbose)
        self._check_base(statistics.logits, calibration)

        dense_prefix = split(graph, cut)[0]
        prefix: nn.Module = dense_prefix
        if prefix_groups:
            n_images = affordable_images(
                dense_prefix, calibration.example, int(pruner.repair_samples)
            )
            prefix = slice_prefix(
                calibration,
                cut,
                prefix_groups,
                nodes,
                statistics,
                fit,
                prefix_recipe,
                batches,
                torch.cat(list(batches(rng.permutation(fit)[:n_images]))),
            )

        features = pooled_output(
            prefix, progress(batches(fit), "Routes", self.verbose), clusterer.pool_size
        )
        route = fit_route_predictor(
            features,
            codes[fit],
            pooled_output(prefix, held_batches(), clusterer.pool_size),
            held_codes,
            pool_size=clusterer.pool_size,
        )
        group_classes(features, codes[fit], route)
        class_clusters = clusterer.class_clusters_

        subgraphs = self._subgraphs(
            calibration,
            cut,
            (rest_groups, next(g.name for g in groups if g.is_output)),
            nodes,
            statistics,
            fit,
            class_clusters,
            (dense_prefix, prefix),
            recipe,
            batches,
            rng,
            pruner.repair_samples,
        )
        network = self._network(
            calibration, cut, prefix, route.predictor, subgraphs, class_clusters
        )
        self._calibrate_network(network, held_batches, held_codes, base_right)

        clusterer.layer_ = self.route_layer_ = cut.name
        self.network_ = network
        self.class_clusters_ = class_clusters
        self.cluster_names_ = clusterer.cluster_names_
        self.temperatures_ = network.temperatures.cpu().numpy()
        self.scores_ = [{} if s is None else s.scores for s in subgraphs]
        self.supports_ = [{} if s is None else s.support for s in subgraphs]
        self.repair_errors_ = [{} if s is None else s.repair_error for s in subgraphs]
        clusterer.route_accuracy_ = self.route_accuracy_
        clusterer.n_features_in_, clusterer.input_shape_ = self.n_features_in_, self.input_shape_
        clusterer.base_model_, clusterer.device_ = self.base_model_, self.device_
        self.clusterer_, self.pruner_ = clusterer, pruner
        self._link()
        return self

    def _components(self) -> tuple[SemanticClusterer, DCSPruner]:
        """Clone the nested estimators, with this one's device, seed, jobs and verbosity."""
        clusterer = SemanticClusterer() if self.clusterer is None else self.clusterer
        pruner = DCSPruner() if self.pruner is None else self.pruner
        for name, nested, kind, outer in (
            ("clusterer", clusterer, SemanticClusterer, ("model", "model_classes")),
            ("pruner", pruner, DCSPruner, ("model", "model_classes", "classes", "first_layer")),
        ):
            if not isinstance(nested, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(nested).__name__}.")
            for parameter in outer:
                if getattr(nested, parameter) is not None:
                    raise ValueError(
                        f"{name}.{parameter} must be None: SINFClassifier supplies it."
                    )
        clusterer, pruner = clone(clusterer), clone(pruner)
        for nested, defaults in ((clusterer, SemanticClusterer()), (pruner, DCSPruner())):
            for parameter in ("device", "random_state", "n_jobs", "verbose", "batch_size"):
                if getattr(nested, parameter) == getattr(defaults, parameter):
                    setattr(nested, parameter, getattr(self, parameter))
        clusterer._check_parameters()
        return clusterer, pruner

    def _check_parameters(self) -> None:
        """Raise for parameters that are wrong whatever the data."""
        if self.fallback not in FALLBACKS:
            raise ValueError(f"fallback must be one of {FALLBACKS}, got {self.fallback!r}.")
        if not isinstance(self.top_k, (int, np.integer)) or self.top_k < 1:
            raise ValueError(f"top_k must be a positive integer, got {self.top_k!r}.")
        for name, low, high, closed in (
            ("prefix_ratio", 0.0, 1.0, False),
            ("route_accuracy", 0.0, 1.0, True),
            ("max_accuracy_drop", 0.0, 1.0, True),
            ("confidence_threshold", 0.0, 1.0, True),
            ("router_weight", 0.0, np.inf, False),
        ):
            value = getattr(self, name)
            automatic = name in ("confidence_threshold", "router_weight")
            if automatic and isinstance(value, str) and value == "auto":
                continue
            number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            if not number or not (low <= value <= high) or (value == high and not closed):
                interval = f"[{low:g}, {high:g}{']' if closed else ')'}"
                extra = ' or "auto"' if automatic else ""
                raise ValueError(f"{name} must be in {interval}{extra}, got {value!r}.")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must be in (0, 1), got {self.validation_fraction!r}."
            )

    def _hold_out(
        self, calibration: Calibration, X_val: Any, y_val: Any, rng: np.random.Generator
    ) -> tuple[np.ndarray, Images, tuple[np.ndarray, np.ndarray]]:
        """Return fitting indices, and the held-out samples with their indices and codes."""
        if X_val is None:
            if y_val is not None:
                raise ValueError("y_val is given without X_val.")
            fit, held = hold_out(calibration.codes, self.validation_fraction, rng)
            return fit, calibration.X, (held, calibration.codes[held])
        X_val = validate_X(self, X_val, reset=False)
        codes = calibration.table.encode(validate_y(y_val, len(X_val)))
        if (codes < 0).any():
            raise ValueError("y_val has labels that are not in y.")
        return np.arange(len(calibration.codes)), X_val, (np.arange(len(codes)), codes)

    def _cut(
        self,
        calibration: Calibration,
        recipe: Recipe,
        train: tuple[np.ndarray, Any],
        held: tuple[np.ndarray, Any, Tensor],
        pool_size: int,
        group_classes: Any,
        target: float,
    ) -> CutPoint:
        """Find the place of the route predictor."""
        graph = calibration.graph
        if self.route_layer != "auto":
            return find_cut(graph, self.route_layer)
        cuts = usable_cuts(graph, cut_points(graph), calibration.output)
        if not cuts:
            raise ValueError(
                "The model has no place where it can be cut in two. Pass it as "
                "nn.Sequential(prefix, rest)."
            )
        if len(cuts) == 1:
            return cuts[0]
        index, batches = train
        codes, held_batches, held_base = held
        candidates = try_cuts(
            calibration,
            cuts,
            recipe,
            train=(batches(index), calibration.codes[index]),
            held=(held_batches(), codes),
            base_logits=held_base,
            group_classes=group_classes,
            pool_size=pool_size,
            prefix_ratio=self.prefix_ratio,
            fallback=self.fallback,
            target=target,
        )
        return choose_cut(candidates, self.route_accuracy, target).cut

    def _subgraphs(
        self,
        calibration: Calibration,
        cut: CutPoint,
        groups: tuple[list[ChannelGroup], str],
        nodes: dict[str, str],
        statistics: Any,
        fit: np.ndarray,
        class_clusters: np.ndarray,
        prefixes: tuple[nn.Module, nn.Module],
        recipe: Recipe,
        batches: Any,
        rng: np.random.Generator,
        repair_samples: int,
    ) -> list[Subgraph | None]:
        """One subgraph per cluster, built side by side where `n_jobs` says so."""
        jobs = []
        with torch.inference_mode():
            h = prefixes[0](calibration.example)
        n_images = affordable_images(split(calibration.graph, cut)[1], h, repair_samples)
        for c in range(int(class_clusters.max()) + 1):
            classes = np.flatnonzero(class_clusters == c)
            if len(classes) < 2:
                jobs.append(delayed(_nothing)())
                continue
            index = fit[class_clusters[calibration.codes[fit]] == c]
            jobs.append(
                delayed(build_subgraph)(
                    calibration,
                    cut,
                    groups[0],
                    groups[1],
                    nodes,
                    statistics,
                    index,
                    classes,
                    prefixes,
                    recipe,
                    batches,
                    rng.permutation(index)[:n_images],
                )
            )
        # Threads: the work is in torch, which releases the interpreter, and shares the weights.
        return Parallel(n_jobs=self.n_jobs, prefer="threads")(
            progress(jobs, "Subgraphs", self.verbose)
        )

    def _network(
        self,
        calibration: Calibration,
        cut: CutPoint,
        prefix: nn.Module,
        predictor: nn.Module,
        subgraphs: list[Subgraph | None],
        class_clusters: np.ndarray,
    ) -> SINFNetwork:
        """Put the parts together, batch-norms folded."""
        frozen, dtype = calibration.frozen, calibration.batcher.dtype
        rest = None
        if self.fallback == "base":
            rest = fold_batch_norm(split(calibration.graph, cut)[1])
        network = SINFNetwork(
            Normalise(
                None if frozen.mean is None else torch.tensor(frozen.mean, dtype=dtype),
                None if frozen.std is None else torch.tensor(frozen.std, dtype=dtype),
            ),
            fold_batch_norm(prefix),
            predictor,  # type: ignore[arg-type]
            [None if s is None else fold_batch_norm(s.module) for s in subgraphs],
            rest,
            torch.as_tensor(class_clusters),
            torch.as_tensor(calibration.table.outputs),
            torch.ones(len(subgraphs), dtype=dtype),
            router_weight=0.5,
            threshold=0.0,
            fallback=self.fallback,
            top_k=self.top_k,
        )
        # A copy: what folding left as it was is the frozen model's own.
        network = copy.deepcopy(network).eval().requires_grad_(False)
        network = network.to(calibration.batcher.device)
        if calibration.example.ndim == 4:
            network = network.to(memory_format=torch.channels_last)
        return network

    def _calibrate_network(
        self, network: SINFNetwork, batches: Any, codes: np.ndarray, base_right: np.ndarray
    ) -> None:
        """Choose router weight, temperatures and threshold on the held-out samples."""
        held = observe(network, batches())
        truth = network.class_clusters.cpu()[torch.as_tensor(codes)]
        self.route_accuracy_ = float((held.cluster == truth).double().mean())
        automatic = self.router_weight == "auto"
        weights = ROUTER_WEIGHTS if automatic else (float(self.router_weight),)
        weight, temperatures = choose_weight(held, codes, network.class_clusters.cpu(), weights)
        self.router_weight_ = network.router_weight = weight
        network.temperatures.copy_(temperatures)
        if self.confidence_threshold != "auto":
            self.confidence_threshold_ = float(self.confidence_threshold)
        elif self.fallback == "none" or network.n_clusters == 1:
            self.confidence_threshold_ = 0.0
        else:
            routed = routed_answers(held, network.class_clusters.cpu(), temperatures, weight)
            network.threshold = 2.0  # above every confidence: everybody takes the fallback
            fallback = _answers(network, batches())
            self.confidence_threshold_ = choose_threshold(
                held.confidence.numpy(),
                routed == codes,
                fallback == codes,
                target=float(base_right.mean()) - self.max_accuracy_drop,
            )
            trusted = held.confidence.numpy() >= self.confidence_threshold_
            lost = base_right.astype(float) - (np.where(trusted, routed, fallback) == codes)
            if lost.mean() - lost.std() / len(lost) ** 0.5 > self.max_accuracy_drop:
                warnings.warn(
                    f"On held-out samples the routed network loses {lost.mean():.1%} of accuracy, "
                    f"more than max_accuracy_drop={self.max_accuracy_drop}, whatever the "
                    "confidence threshold. A smaller prefix_ratio or pruner.max_ratio, or more "
                    "repair_samples, keep more.",
                    UserWarning,
                    stacklevel=4,
                )
        network.threshold = self.confidence_threshold_

    def _link(self) -> None:
        """Let `clusterer_` route through this network's own prefix, which is stored once."""
        network = self.network_
        self.clusterer_.network_ = nn.Sequential(network.prefix, network.router)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if "clusterer_" in state:
            # Shallow: only the shared network is left out, `_link` puts it back.
            bare = object.__new__(SemanticClusterer)
            bare.__dict__.update(
                {k: v for k, v in self.clusterer_.__dict__.items() if k != "network_"}
            )
            state["clusterer_"] = bare
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "network_" in self.__dict__:
            self._link()

    def to(self, device: str | torch.device) -> SINFClassifier:
        """Move the routed network to a device.

        Parameters
        ----------
        device : str or torch.device

        Returns
        -------
        self
        """
        super().to(device)
        if "clusterer_" in self.__dict__:
            self.clusterer_.device_ = self.device_
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predict the class of each sample.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities: the routed subgraph's answer fused with the router's.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Rows sum to 1; columns as in `classes_`.
        """
        check_is_fitted(self)
        X = validate_X(self, X, reset=False)
        with torch.inference_mode():
            batches = self._batcher(self.network_).raw(X)
            return torch.cat([self.network_(x).cpu() for x in batches]).numpy()

    def predict_cluster(self, X: Any) -> np.ndarray:
        """Predict the semantic cluster of each sample; runs the prefix and the router only.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)

        Returns
        -------
        int ndarray of shape (n_samples,)
            Positions in `cluster_names_`.
        """
        check_is_fitted(self)
        X = validate_X(self, X, reset=False)
        with torch.inference_mode():
            batches = self._batcher(self.network_).raw(X)
            return torch.cat([self.network_.route(x).cluster.cpu() for x in batches]).numpy()

    def report(
        self, X: Any, y: Any, *, latency_batch: int | None = None, repeats: int = 15
    ) -> SINFReport:
        """Compare the base network and the routed one on samples that `fit` has not seen.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)
        y : array-like of shape (n_samples,)
        latency_batch : int, optional
            Samples in the batch that is timed; default `batch_size`, at most all of `X`.
        repeats : int, default=15
            Paired runs of which the median is taken; 0 measures no time.

        Returns
        -------
        SINFReport
            ``print`` it for a table.

        Notes
        -----
        Base and SINF are timed in the same form: evaluation and inference mode, batch-norms folded
        into the convolutions, channels_last for images, normalisation included, one run of each in
        turn.
        """
        check_is_fitted(self)
        X = validate_X(self, X, reset=False)
        codes = self._encode(validate_y(y, len(X)))
        return make_report(
            self.network_,
            self.base_model_.module(self.device_),
            self._batcher(self.network_),
            X,
            codes,
            self.class_clusters_,
            self.cluster_names_,
            latency_batch=min(latency_batch or self.batch_size, len(X)),
            repeats=repeats,
        )

    def _encode(self, y: np.ndarray) -> np.ndarray:
        """Labels to positions in `classes_`."""
        position = np.minimum(np.searchsorted(self.classes_, y), len(self.classes_) - 1)
        unknown = self.classes_[position] != y
        if unknown.any():
            raise ValueError(f"y has labels that were not in fit: {y[unknown][0]!r} for one.")
        return position


def _answers(network: SINFNetwork, batches: Any) -> np.ndarray:
    """Predicted classes for normalised batches."""
    with torch.inference_mode():
        rows = []
        for x in batches:
            h = network.prefix(x)
            rows.append(network.process(h, network.route_features(h)).argmax(1).cpu())
    return torch.cat(rows).numpy()


def _nothing() -> None:
    """What a cluster of one class needs: no subgraph."""
