"""SINFClassifier: route each input to its semantic cluster, run only that one's subgraph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from sklearn import get_config
from sklearn.base import BaseEstimator, clone
from sklearn.utils.validation import check_is_fitted
from torch import nn

from .base import TorchClassifierMixin, TorchEstimator, all_or_nothing, answers_in_torch
from .clusterer import SemanticClusterer
from .data.calibration import Batcher, Calibration
from .data.images import with_labels
from .data.labels import encode
from .data.validation import (
    Images,
    hold_out,
    validate_weight,
    validate_X,
    validate_y,
    without_zeros,
)
from .export.onnx import to_onnx
from .inference.forms import fast_form, half_precision
from .inference.measure import make_report
from .inference.network import SINFNetwork
from .inference.report import SINFReport, promise_of
from .pruner import DCSPruner, recipe_of
from .pruning.recipe import Recipe, warn_about_whole
from .routing.builder import Builder, Built
from .routing.config import RoutingConfig, RoutingOptions
from .routing.placement import groupings_to_try, plan_networks
from .routing.search import Search
from .routing.study import Samples, Study
from .utils.jobs import over_chunks
from .utils.params import caller_level, check_integer, check_number, naming

# Shares of filters removed before the route predictor where no budget decides.
_PREFIX_RATIOS = (0.3, 0.3)


class SINFClassifier(TorchClassifierMixin, TorchEstimator):
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
        How the classes are grouped.  Leave its `model` and `model_classes` at None.  None:
        ``SemanticClusterer()`` with 1, 2, 5, 10 and 20 clusters (of two classes or more on
        average), of which the best on held-out samples is kept.  One cluster is the rival that
        routes have to beat: a single network pruned for all classes, with the predictor's second
        opinion and its exits.
    pruner : DCSPruner, optional
        How the subgraphs are cut out.  Leave its `model`, `model_classes`, `classes` and
        `first_layer` at None.  With ``schedule="global"`` and no budget, the budget is searched for
        the cheapest network within `max_accuracy_drop` (or for `target_speedup`).  Several networks
        are built for that (`search_results_` lists them), so a search takes longer than a fit with
        a budget given.  The cheapest has the fewest multiplications, or, with the pruner's
        ``budget_unit="latency"``, the least expected time for a batch of `batch_size` samples, by a
        model that is fitted on this machine (see Notes).  None: ``DCSPruner(schedule="global")``.
    route_layer : str, default="auto"
        The cut behind which the route predictor sits, see `sinfkit.graph.cut_points`.  ``"auto"``
        takes the one with the fewest multiplications of those that are expected to keep the
        accuracy.
    route_accuracy : float, optional
        Where given, ``route_layer="auto"`` takes the earliest cut whose held-out route accuracy
        reaches it, as the paper does with 0.75, if there is one.
    prefix_ratio : float or "auto", default="auto"
        Fraction of filters removed from each layer before the route predictor, for all classes.  0
        leaves the prefix whole.  Its last layer keeps its channels then and is refitted to the
        dense output.  ``"auto"``: with a pruner of ``schedule="global"``, and in a search, prefix
        and subgraph share the budget, and layers before and behind the predictor lose what
        `prefix_criterion` finds cheapest for what it saves; with another schedule 0.3.
    prefix_criterion : str or callable, default="obs"
        Which of the prefix's filters go; as `DCSPruner.criterion`.  All classes need the prefix,
        and its output is rebuilt by least squares: what counts there is not what tells classes
        apart, but what the other filters cannot make up for.
    prefix_low_rank : float or "auto", default="auto"
        Fraction of the sliced prefix's multiplications that stay when its layers become products
        of two with fewer outputs in between, see `sinfkit.repair.factorize`; on top of what
        slicing saves.  1 leaves the layers as they are.  ``"auto"``: a search tries a half, and
        keeps it where that serves its goal; without a search 1.
    answers : {"all", "cluster"}, default="all"
        Which classes a subgraph answers: ``"cluster"`` those of its cluster, repaired on samples of
        these (the paper's form: an input on the wrong route is lost); ``"all"`` every class,
        repaired on the samples that are routed to it, rightly or not.
    exit_threshold : float, "auto" or None, default="auto"
        Samples of which the route predictor gives one class at least this probability leave there,
        with its answer.  ``"auto"`` takes the smallest with which the held-out accuracy stays
        within `max_accuracy_drop` of the base's (or as it is without exits, where that is more than
        is allowed).  None: no sample leaves.
    confidence_threshold : float or "auto", default="auto"
        Samples whose route confidence is below it take the fallback.  ``"auto"`` takes the smallest
        with which the held-out accuracy stays within `max_accuracy_drop` of the base's; where none
        does, the smallest that is within a standard error of the best, with a warning if the loss
        is beyond the noise.
    max_accuracy_drop : float, default=0.01
        Accuracy (0.01 is one point) that the automatic choices may give away on held-out samples.
    target_speedup : float, optional
        Search for the most accurate network that is so many times as fast as the base, measured on
        a batch of held-out samples, instead of the fastest within `max_accuracy_drop`, which still
        sets ``confidence_threshold="auto"``.  A warning says so where no network is.
    fallback : {"none", "base", "topk"}, default="none"
        What runs below the confidence threshold: the one subgraph all the same, the rest of the
        base network, or the subgraphs of the `top_k` most likely clusters.  With ``"base"`` the
        prefix's last layer keeps all of its channels, so that the base's rest works behind it.
    top_k : int, default=2
    router_weight : float or "auto", default="auto"
        Exponent of the router's posterior in the product with the subgraph's, see
        `sinfkit.inference.fuse`.  ``"auto"`` chooses it by held-out log loss.
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
        Threads that score and build subgraphs side by side.  Inside ``joblib.parallel_config`` with
        a backend of processes (``"dask"``, ``"ray"``, ``"loky"``) they are jobs of its workers, and
        chunks of `X` in ``predict`` as well.
    memory : str, joblib.Memory or None
        Where to cache the activations' statistics and the filters' scores between fits.
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
    prefix_ratio_ : float or None
        None where prefix and subgraphs share a budget.
    prefix_low_rank_ : float
    search_results_ : list of dict
        What was tried, in order: route layer, number of clusters, size, accuracy lost on held-out
        samples, multiplications relative to the base, shares on the fallback and of exits, the
        modelled time relative to the base where the pruner's `budget_unit` is ``"latency"``, and
        the measured speed-up where `target_speedup` asks for it.
    confidence_threshold_, exit_threshold_ : float
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
    predictor on fine classes, the fusion of its posterior, subgraphs that answer all classes, exits
    at the predictor, the sliced prefix, the repair.

    With the pruner's ``budget_unit="latency"``, each layer's time for a batch is taken to be the
    overhead of its calls, plus what is left of it times the sum of the time for its weights, for
    each call, and of the time for its multiplications, for each sample.  Behind the predictor each
    cluster makes a call.  The three times are measured, see `sinfkit.pruning.layer_times`.

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
    search_results_: list[dict[str, Any]]
    classes_: np.ndarray
    class_clusters_: np.ndarray
    memory = None  # that of `pruner`

    _default_components: ClassVar[Mapping[str, Callable[[], BaseEstimator]]] = {
        "clusterer": SemanticClusterer,
        "pruner": DCSPruner,
        "options": RoutingOptions,
    }
    _only_from_fit = frozenset(
        {"clusterer_", "pruner_", "scores_", "supports_", "repair_errors_", "search_results_"}
    )

    def __init__(
        self,
        model: Any = None,
        *,
        clusterer: SemanticClusterer | None = None,
        pruner: DCSPruner | None = None,
        prefix_pruner: DCSPruner | None = None,
        route_layer: str | float = "auto",
        fallback: Literal["none", "base", "top2"] = "none",
        max_accuracy_drop: float = 0.01,
        target_speedup: float | None = None,
        options: RoutingOptions | None = None,
        model_classes: Any = None,
        batch_size: int = 256,
        device: str | torch.device = "auto",
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.clusterer = clusterer
        self.pruner = pruner
        self.prefix_pruner = prefix_pruner
        self.route_layer = route_layer
        self.fallback = fallback
        self.max_accuracy_drop = max_accuracy_drop
        self.target_speedup = target_speedup
        self.options = options
        self.model_classes = model_classes
        self.batch_size = batch_size
        self.device = device
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @all_or_nothing
    def fit(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
    ) -> SINFClassifier:
        """Group the classes, place the route predictor, extract and repair the subgraphs.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, channels, height, width) or (n_samples, \
n_features)
            Calibration samples; uint8 images are divided by 255.  Or a `Dataset` or `DataLoader`
            of torch, or a list of PIL images: read in batches, and labels taken from it where `y`
            is None.
        y : array-like of shape (n_samples,)
            Their labels; every class of the model must occur.
        sample_weight : array-like of shape (n_samples,), optional
            How many times each sample counts, in scores, router, repair and held-out choices: 2
            stands for the sample twice, 0 for none.  Default: once.
        X_val : array-like or Tensor of shape (n_held_out, ...), optional
            Held-out samples for the automatic choices.  Give samples that the base network was NOT
            trained on: on samples that it has memorised it is too sure of itself.  Default: a part
            of `X`.
        y_val : array-like of shape (n_held_out,), optional
        sample_weight_val : array-like of shape (n_held_out,), optional
            How many times each of these counts.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For a parameter out of range, samples, labels or weights that do not fit the model or
            each other, or weights where a criterion knows none.
        TypeError
            If `model` is not a module.
        """
        clusterer, pruner, options = self._parts()
        X, y = with_labels(X, y)
        config = self._config(pruner, options)
        fraction = None if X_val is not None else config.validation_fraction
        calibration = self._calibrate(X, y, sample_weight=sample_weight, held_out=fraction)
        for recipe in (config.subgraphs, config.prefix):
            recipe.check_weights(calibration.weight)
        warn_about_whole(calibration.groups)
        rng = np.random.default_rng(calibration.seed)
        fit, held = self._split(calibration, X_val, y_val, sample_weight_val, rng)
        study = Study(calibration, fit, held, config)
        grouping = clusterer._grouping()
        groupings = {0: grouping}
        if self.clusterer is None:
            groupings = groupings_to_try(grouping, len(study.classes))
        plans = plan_networks(study, groupings, self.route_layer, rng)
        self._check_base(study.gather([plan.cut for plan in plans]), calibration)
        search = Search(Builder(study))
        built = search.run(plans)
        self.search_results_ = search.rows
        self._warn_of_miss(built, config)
        self._adopt(built, clusterer, pruner, config)
        return self

    def _adopt(
        self, built: Built, clusterer: SemanticClusterer, pruner: DCSPruner, config: RoutingConfig
    ) -> None:
        """Make a network that was built the fitted one."""
        network, plan, subgraphs = built.network, built.plan, built.subgraphs
        self.network_ = network
        self.route_layer_ = plan.cut.name
        self.route_accuracy_ = built.route_accuracy
        self.router_weight_ = network.router_weight
        self.temperatures_ = network.temperatures.cpu().numpy()
        self.confidence_threshold_ = network.threshold
        self.exit_threshold_ = network.exit_threshold
        self.prefix_ratio_ = None if config.shares_budget else config.prefix.pruning_ratios[1]
        self.prefix_low_rank_ = plan.size.low_rank
        self.class_clusters_ = built.clusters.class_clusters
        self.cluster_names_ = built.clusters.names
        self.scores_ = [{} if s is None else s.scores for s in subgraphs]
        self.supports_ = [{} if s is None else s.support for s in subgraphs]
        self.repair_errors_ = [{} if s is None else s.repair_error for s in subgraphs]
        if self.clusterer is None:
            clusterer.set_params(n_clusters=plan.grouping.n_clusters)
        clusterer._adopt(built.clusters)
        clusterer.layer_, clusterer.route_accuracy_ = plan.cut.name, built.route_accuracy
        for name in (
            *("classes_", "n_features_in_", "input_shape_", "input_range_"),
            *("base_model_", "device_"),
        ):
            if hasattr(self, name):
                setattr(clusterer, name, getattr(self, name))
        self.clusterer_ = clusterer
        self.pruner_ = pruner.set_params(budget=plan.size.budget)
        self._link()

    def _warn_of_miss(self, built: Built, config: RoutingConfig) -> None:
        """Warn where a speed is not reached, or the held-out loss is beyond limit and noise."""
        speedup, passage = built.outcome.speedup, built.passage
        if self.target_speedup is not None and speedup < self.target_speedup:
            warnings.warn(
                f"No network that was tried is {self.target_speedup:g} times as fast as the base; "
                f"the one that is kept is {speedup:.2f} times as fast. A larger max_accuracy_drop "
                "sends fewer samples through the base.",
                UserWarning,
                stacklevel=caller_level(),
            )
        if self.target_speedup is not None or config.confidence_threshold != "auto":
            return
        if passage.drop - passage.drop_error > self.max_accuracy_drop:
            warnings.warn(
                f"On held-out samples the routed network loses {passage.drop:.1%} of accuracy, "
                f"more than max_accuracy_drop={self.max_accuracy_drop}, whatever the thresholds. "
                "A larger budget of the pruner (smaller ratios), or more repair_samples, keep "
                "more; fallback='base' lets unsure samples through the whole network.",
                UserWarning,
                stacklevel=caller_level(),
            )

    def _parts(self) -> tuple[SemanticClusterer, DCSPruner, RoutingOptions]:
        """Clone the nested estimators, with this one's device, seed, jobs and verbosity."""
        kinds = {"clusterer": SemanticClusterer, "pruner": DCSPruner, "options": RoutingOptions}
        found: dict[str, Any] = {}
        for name, kind in kinds.items():
            part = self._component(name)
            if not isinstance(part, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(part).__name__}.")
            found[name] = clone(part)
        for name in ("clusterer", "pruner"):
            _check_supplied(name, found[name])
            default, known = kinds[name](), found[name].get_params(deep=False)
            for parameter in ("device", "random_state", "n_jobs", "verbose", "batch_size"):
                if parameter in known and known[parameter] == getattr(default, parameter):
                    setattr(found[name], parameter, getattr(self, parameter))
        with naming("clusterer"):
            found["clusterer"]._check_parameters()
        return found["clusterer"], found["pruner"], found["options"]

    def _config(self, pruner: DCSPruner, options: RoutingOptions) -> RoutingConfig:
        """Check what is wrong whatever the data, and put all that routing needs into one."""
        if pruner.schedule == "iterative":
            raise ValueError(
                "pruner.schedule='iterative' prunes one whole network; choose another schedule."
            )
        with naming("pruner"):
            subgraphs = recipe_of(pruner)
        if not isinstance(self.route_layer, str):
            check_number("route_layer", self.route_layer, "(0, 1)")
        return RoutingConfig(
            subgraphs=subgraphs,
            prefix=self._prefix_recipe(subgraphs),
            fallback=self.fallback,
            max_accuracy_drop=self.max_accuracy_drop,
            target_speedup=self.target_speedup,
            n_jobs=self.n_jobs,
            memory=pruner.memory,
            verbose=self.verbose,
            **options.get_params(),
        )

    def _check_parameters(self) -> None:
        """Raise for parameters that are wrong whatever the data."""
        _, pruner, options = self._parts()
        self._config(pruner, options)

    def _prefix_recipe(self, subgraphs: Recipe) -> Recipe:
        """How the prefix is pruned: with the subgraphs' budget, or by ratios of its own."""
        shares = subgraphs.schedule == "global"
        if self.prefix_pruner is None:
            return Recipe(
                criterion="obs",  # what counts is what the other filters cannot make up for
                schedule="global" if shares else "uniform",
                pruning_ratios=_PREFIX_RATIOS,
                max_ratio=subgraphs.max_ratio,
                round_to=subgraphs.round_to,
                penalty=subgraphs.penalty,
                pool_size=subgraphs.pool_size,
            )
        if not isinstance(self.prefix_pruner, DCSPruner):
            kind = type(self.prefix_pruner).__name__
            raise TypeError(f"prefix_pruner must be a DCSPruner or None, got {kind}.")
        _check_supplied("prefix_pruner", self.prefix_pruner)
        with naming("prefix_pruner"):
            recipe = recipe_of(self.prefix_pruner)
        if recipe.schedule == "iterative" or recipe.budget is not None:
            raise ValueError(
                "prefix_pruner has either ratios of its own (schedule='linear', 'geometric' or "
                "'uniform'), or shares the budget of `pruner` (schedule='global', budget=None)."
            )
        if recipe.schedule == "global" and not shares:
            raise ValueError(
                "prefix_pruner.schedule='global' shares the budget of `pruner`, which has none: "
                f"pruner.schedule={subgraphs.schedule!r}."
            )
        if recipe.pool_size != subgraphs.pool_size:
            raise ValueError("prefix_pruner and pruner must have the same pool_size.")
        return replace(recipe, max_ratio=subgraphs.max_ratio)

    def _split(
        self,
        calibration: Calibration,
        X_val: Any,
        y_val: Any,
        weight_val: Any,
        rng: np.random.Generator,
    ) -> tuple[Samples, Samples]:
        """Samples that fit, and samples that are held out."""
        X, y = calibration.X, calibration.y_encoded
        if X_val is None:
            if y_val is not None:
                raise ValueError("y_val is given without X_val.")
            if weight_val is not None:
                raise ValueError("sample_weight_val is given without X_val.")
            fit, held = (
                Samples(X, rows, y[rows], calibration.weights(rows))
                for rows in hold_out(y, self._component("options").validation_fraction, rng)
            )
            return fit, held
        X_val, y_val = with_labels(X_val, y_val)
        with naming("X_val"):
            X_val = validate_X(self, X_val, reset=False)
        weight = validate_weight(weight_val, len(X_val), "sample_weight_val")
        with naming("y_val"), naming("X_val"):
            y_val = validate_y(y_val, len(X_val))
            X_val, y_val, weight = without_zeros(X_val, y_val, weight)
            y_held = calibration.table.encode(y_val)
        if (y_held < 0).any():
            raise ValueError("y_val has labels that are not in y.")
        everything = np.arange(len(y))
        fit = Samples(X, everything, y, calibration.weights(everything))
        return fit, Samples(X_val, np.arange(len(y_held)), y_held, weight)

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
            if len(self.input_shape_) == 3:
                # As in fit: NumPy's arrays, which pickles hold, know no memory formats.
                self.network_.to(memory_format=torch.channels_last)
            if "clusterer_" in self.__dict__:  # a twin that only predicts has none
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

    def predict(self, X: Any) -> Any:
        """Predict the class of each sample.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)

        Returns
        -------
        ndarray of shape (n_samples,)
            Under scikit-learn's array API dispatch, a Tensor on the device of `X` where that is a
            Tensor and labels are numbers.
        """
        return self._labels(self.predict_proba(X).argmax(1))

    @over_chunks
    def predict_proba(self, X: Any) -> Any:
        """Class probabilities: the routed subgraph's answer fused with the router's.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            Rows sum to 1; columns as in `classes_`.  A Tensor as with `predict`.
        """
        check_is_fitted(self)
        late = answers_in_torch(X) and not get_config()["assume_finite"]
        X = validate_X(self, X, reset=False, finite=not late)
        batcher = self._batcher(self.network_)
        network = self._fast(batcher, X)
        answers = self._run(network.forward_finite if late else network, batcher.raw(X), X)
        return self._as_wanted(answers, X)

    @over_chunks
    def predict_cluster(self, X: Any) -> Any:
        """Predict the semantic cluster of each sample; runs the prefix and the router only.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)

        Returns
        -------
        int ndarray of shape (n_samples,)
            Positions in `cluster_names_`.  Under scikit-learn's array API dispatch, a Tensor on the
            device of `X` where that is a Tensor.
        """
        check_is_fitted(self)
        X = validate_X(self, X, reset=False)
        batcher = self._batcher(self.network_)
        network = self._fast(batcher, X)
        posterior = self._run(lambda x: network.route(x).posterior, batcher.raw(X), X)
        return self._as_wanted(posterior.argmax(1), X)

    def runtime(self, dtype: Literal["bfloat16", "float16"] = "bfloat16") -> SINFNetwork:
        """Return the routed network in half precision, as a module.

        Parameters
        ----------
        dtype : {"bfloat16", "float16"}, default="bfloat16"
            What prefix, subgraphs and the base's rest compute in.

        Returns
        -------
        SINFNetwork
            Samples before normalisation in (a Tensor on `device_`), class probabilities out, in
            the route predictor's type.  A copy: what is certified is the float network.

        Raises
        ------
        NotFittedError
            If the classifier is not fitted.
        ValueError
            If `dtype` is another one.
        """
        check_is_fitted(self)
        return half_precision(self.network_, dtype)

    def _fast(self, batcher: Batcher, X: Images) -> SINFNetwork:
        """The routed network in the form that answers fastest."""
        return cast(SINFNetwork, fast_form(self.network_, lambda: batcher.load(X[:4])))

    def report(
        self, X: Any, y: Any = None, *, latency_batch: int | None = None, repeats: int = 15
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
        check_integer("latency_batch", latency_batch, optional=True)
        check_integer("repeats", repeats, low=0)
        X, y = with_labels(X, y)
        X = validate_X(self, X, reset=False)
        codes = encode(validate_y(y, len(X)), self.classes_)
        return make_report(
            self.network_,
            self.base_model_.module(self.device_),
            self._batcher(self.network_),
            X,
            codes,
            self.class_clusters_,
            self.cluster_names_,
            route_layer=self.route_layer_,
            promise=promise_of(self),
            latency_batch=min(latency_batch or self.batch_size, len(X)),
            repeats=repeats,
        )

    def to_onnx(self, folder: str | Path, *, X: Any = None, **options: Any) -> Path:
        """Write the fitted classifier as ONNX files that run without torch.

        Parameters
        ----------
        folder : str or Path
        X : array-like or Tensor of shape (n_samples, ...), optional
            Samples from which ``dtype="int8"`` takes the range of the activations.
        **options
            `dtype`, `opset` and `overwrite`, see `sinfkit.export.to_onnx`.

        Returns
        -------
        Path
            The folder; ``sinf_onnx.py`` in it loads the rest.

        Raises
        ------
        NotFittedError
            If the classifier is not fitted.
        """
        check_is_fitted(self)
        if X is not None:
            X = validate_X(self, X, reset=False)
        classes, shape = self.classes_, self.input_shape_
        return to_onnx(self.network_, folder, classes=classes, input_shape=shape, X=X, **options)


def _check_supplied(name: str, pruner: Any) -> None:
    """Raise where a nested estimator has parameters that the outer one supplies."""
    parameters = pruner.get_params()
    for parameter in ("model", "model_classes", "classes", "options__first_layer"):
        if parameters.get(parameter) is not None:
            raise ValueError(f"{name}.{parameter} must be None: SINFClassifier supplies it.")
