"""SINFClassifier: route each input to its semantic cluster, run only that one's subgraph."""

from __future__ import annotations

import math
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
from .data.calibration import Batcher, Calibration, encode
from .data.images import Images, with_labels
from .data.validation import hold_out, validate_weight, validate_X, validate_y, without_zeros
from .errors import PromiseWarning
from .export.onnx import to_onnx
from .graph.cuts import layer_names
from .inference.forms import fast_form, half_precision
from .inference.measure import make_report
from .inference.network import SINFNetwork
from .inference.report import SINFReport, promise_of
from .pruner import DCSPruner, recipe_of
from .pruning.costs import check_sliceable
from .pruning.recipe import Recipe, sliceable
from .pruning.search import Goal, split_samples
from .repair.distillation import Distillation, as_distillation
from .routing.builder import Builder, Built
from .routing.search import Kept, Search, announce, groupings_to_try, plan_networks
from .routing.study import RoutingConfig, RoutingOptions, Samples, Study
from .utils.device import channels_last, on_host_by_default
from .utils.jobs import over_chunks
from .utils.params import check_integer, check_number, naming, nested, warn
from .utils.progress import Progress

# Shares of filters removed before the route predictor where no budget decides.
_PREFIX_RATIOS = (0.3, 0.3)
# Parameters of nested pruners in whose place the classifier's own count.
_OWN = (
    *("max_accuracy_drop", "confidence", "distill"),
    *("options__validation_fraction", "options__n_jobs"),
)


class SINFClassifier(TorchClassifierMixin, TorchEstimator):
    """Semantic Inference: a trained network made faster by running one cluster's part of it.

    The first layers run for every input.  A small predictor on their output says which semantic
    cluster (group of classes) the input belongs to, and only that cluster's subgraph of the
    remaining layers runs.  Subgraphs are sliced out of the trained network and repaired in closed
    form; the network is not retrained.

    Parameters
    ----------
    model : nn.Module or FrozenModel, optional
        The trained classifier, which returns one score per class.  Wrap it in a `FrozenModel` for
        grid searches, and to give normalisation.  None trains a small default network in ``fit``.
    clusterer : SemanticClusterer, optional
        How the classes are grouped.  None: by what the predictor confuses, with 1, 2, 5, 10 and 20
        clusters (of two classes or more on average), of which the best is kept.
    pruner : DCSPruner, optional
        How the subgraphs are cut out.  Without a budget, the smallest size is searched that keeps
        `max_accuracy_drop`.  None: ``DCSPruner()``.
    prefix_pruner : DCSPruner, optional
        How the layers before the predictor are cut, for all classes: by ratios of its own, or with
        ``schedule="global"`` within the budget of `pruner`.  None: by the criterion ``"obs"``,
        within that budget if there is one, else 30 % of the filters of each layer.
    route_layer : str or float, default="auto"
        The cut behind which the predictor sits, see `sinfkit.graph.cut_points`.  ``"auto"``: the
        cheapest that is expected to keep the accuracy.  A number in (0, 1): the earliest whose
        held-out route accuracy reaches it (the paper: 0.75).
    fallback : {"none", "base", "top2"}, default="none"
        What unsure samples run: their one subgraph all the same, the rest of the base network, or
        the subgraphs of the two likeliest clusters.
    max_accuracy_drop : float, default=0.01
        Accuracy that may be lost (0.01 is one point), see Notes.
    confidence : float, default=0.9
        How sure that is to be.
    target_speedup : float, optional
        Search for the most accurate network that is so many times as fast as the base, measured on
        one batch.  What it loses is reported, not kept within `max_accuracy_drop`.
    distill : Distillation or int, optional
        Train the routed network towards the base's answers to the calibration samples, without
        labels, for so many epochs: each subgraph on what is routed to it, and the prefix on all
        (not with ``fallback="base"``, which reads it as well).  After a search up to three sizes.
        None: no training.
    options : RoutingOptions, optional
        Answers, exits, thresholds and what else few need to set.
    model_classes : sequence of labels, optional
        The label of each of the model's outputs.  Default: integer labels are output indices,
        others are matched in sorted order.
    batch_size : int, default=256
    device : str or torch.device, default="auto"
        ``"auto"``: the first GPU where there is one.
    random_state : int, RandomState or None, default=None
    verbose : int, default=0
        1: an estimate at the start, one bar over everything, and what came out.

    Attributes
    ----------
    network_ : SINFNetwork
        The routed network, on `device_`: samples before normalisation in, probabilities out.
    certified_ : bool
        Whether it is shown that at most `max_accuracy_drop` is lost.
    certified_drop_ : float
        What is lost at most, with `confidence`; nan where that is not certified.
    accuracy_drop_ : float
        Accuracy lost on the `n_certifying_` samples that chose nothing; nan without any.
    n_certifying_ : int
    classes_ : ndarray of shape (n_classes,)
    class_clusters_ : int ndarray of shape (n_classes,)
        Cluster of each of `classes_`.
    cluster_names_ : ndarray of shape (n_clusters,)
    clusterer_, pruner_ : estimators
        The clones that were used.
    route_layer_ : str
    route_accuracy_ : float
        Held-out share of samples that are sent to the right cluster.
    prefix_ratio_ : float or None
        None where prefix and subgraphs share a budget.
    prefix_low_rank_, confidence_threshold_, exit_threshold_, router_weight_ : float or None
        As chosen; with an exit threshold of None nobody leaves.
    distillation_losses_ : list of float
        With `distill`, the mean divergence from the base's answers in each epoch.
    temperatures_ : ndarray of shape (n_clusters,)
    search_results_ : list of dict
        What was tried, in order, with the loss on the samples that choose.
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
    **The promise.** With probability at least `confidence` over the draw of the calibration
    samples, a result with ``certified_`` loses at most `max_accuracy_drop` on samples of the same
    distribution that the base was not trained on.  Some samples order networks and thresholds from
    careful to bold, others, which chose nothing, test them in that order (arXiv 2110.01052,
    2210.07913).  Below about 230 of these no point can be certified: then the best by an honest
    estimate is kept, with a `PromiseWarning` that says how many would do.  Where nothing smaller
    seems within the limit, the base itself is kept.

    **The paper** (arXiv 2310.01259) states the four parts, the cluster's own filters and outputs,
    the confidence threshold and 75 % route accuracy; see `paper_settings`.  What else there is are
    our choices, see the user guide.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import SINFClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> clf = SINFClassifier(max_accuracy_drop=0.02, random_state=0).fit(X[:1000], y[:1000])
    >>> clf.score(X[1000:], y[1000:]) > 0.85
    True
    """

    network_: SINFNetwork
    search_results_: list[dict[str, Any]]
    distillation_losses_: list[float]
    classes_: np.ndarray
    class_clusters_: np.ndarray
    memory = None  # that of `pruner.options`

    _default_components: ClassVar[Mapping[str, Callable[[], BaseEstimator]]] = {
        "clusterer": SemanticClusterer,
        "pruner": DCSPruner,
        "options": RoutingOptions,
    }
    _only_from_fit = frozenset(
        {"clusterer_", "pruner_", "scores_", "supports_", "repair_errors_", "search_results_"}
        | {"distillation_losses_"}
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
        confidence: float = 0.9,
        target_speedup: float | None = None,
        distill: Distillation | int | None = None,
        options: RoutingOptions | None = None,
        model_classes: Any = None,
        batch_size: int = 256,
        device: str | torch.device = "auto",
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
        self.confidence = confidence
        self.target_speedup = target_speedup
        self.distill = distill
        self.options = options
        self.model_classes = model_classes
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    @classmethod
    def paper_settings(cls, model: Any = None, **params: Any) -> SINFClassifier:
        """Return a classifier with the settings of the paper (arXiv 2310.01259).

        The earliest layer with 75 % route accuracy, a whole prefix, subgraphs by DCS with the
        cluster's own outputs and ratios that grow linearly, nothing repaired, no exits, and the
        base network below the confidence threshold.

        Parameters
        ----------
        model : nn.Module or FrozenModel, optional
        **params : dict
            Other parameters, or other values of these; the paper's clusters are the data set's
            superclasses: ``clusterer=SemanticClusterer(method="given", mapping=...)``.

        Returns
        -------
        SINFClassifier
            Not fitted.

        Examples
        --------
        >>> from sinfkit import SINFClassifier
        >>> SINFClassifier.paper_settings().route_layer
        0.75
        """
        paper: dict[str, Any] = {
            "pruner": DCSPruner.paper_settings(),
            "prefix_pruner": DCSPruner(schedule="uniform", pruning_ratios=(0.0, 0.0)),
            "route_layer": 0.75,
            "fallback": "base",
            "options": RoutingOptions(
                answers="cluster", exit_threshold=None, router_weight=0.0, prefix_low_rank=1.0
            ),
        }
        return cls(model, **{**paper, **params})

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
            Samples that certify what is lost; they choose nothing.  The base network must NOT have
            been trained on them: what it has memorised says nothing.  Default: a part of `X`.
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

        Warns
        -----
        PromiseWarning
            Where `max_accuracy_drop` is exceeded, or cannot be certified.
        """
        clusterer, pruner, options = self._parts()
        X, y = with_labels(X, y)
        config = self._config(pruner, options)
        fraction = None if X_val is not None else config.validation_fraction
        calibration = self._calibrate(X, y, sample_weight=sample_weight, held_out=fraction)
        for recipe in (config.subgraphs, config.prefix):
            recipe.check_weights(calibration.weight)
        groups, layers = calibration.groups, layer_names(calibration.graph)
        check_sliceable(calibration, sliceable(groups), layers, allow=True)
        parts = self._split(calibration, X_val, y_val, sample_weight_val, config)
        grouping = clusterer._grouping()
        groupings = {0: grouping}
        if self.clusterer is None:
            groupings = groupings_to_try(grouping, len(calibration.table.classes))
        with Progress("SINFClassifier", self.verbose) as progress:
            study = Study(calibration, *parts, config, progress)
            announce(study, len(groupings))
            plans = plan_networks(study, groupings, self.route_layer)
            cuts = [plan.cut for plan in plans]
            self._check_base(study.gather(cuts), calibration)
            study.score_prefixes(cuts)
            study.find_depth(cuts[0])
            search = Search(Builder(study))
            kept = search.judged(search.run(plans))
            self.search_results_ = search.rows
            self._adopt(kept.built, clusterer, pruner, config)
            self._promise(kept, study)
            progress.end(f"{len(search.rows)} networks tried; {self._kept(kept)}")
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
        temperatures = network.temperatures.cpu()
        kind = torch.promote_types(temperatures.dtype, torch.float32)  # NumPy knows no bfloat16
        self.temperatures_ = temperatures.to(kind).numpy()
        self.confidence_threshold_ = network.threshold
        self.exit_threshold_ = network.exit_threshold
        self.prefix_ratio_ = None if config.shares_budget else config.prefix.pruning_ratios[1]
        self.prefix_low_rank_ = plan.size.low_rank
        self.class_clusters_ = built.clusters.class_clusters
        self.cluster_names_ = built.clusters.names
        self.scores_ = [{} if s is None else s.scores for s in subgraphs]
        self.supports_ = [{} if s is None else s.support for s in subgraphs]
        self.repair_errors_ = [{} if s is None else s.repair_error for s in subgraphs]
        if built.distillation:
            self.distillation_losses_ = list(built.distillation)
        if self.clusterer is None:
            clusterer.set_params(n_clusters=plan.grouping.n_clusters)
        clusterer._adopt(built.clusters)
        clusterer.layer_, clusterer.route_accuracy_ = plan.cut.name, built.route_accuracy
        for name in (
            *("classes_", "n_features_in_", "input_shape_", "input_range_"),
            *("base_model_", "device_", "_ending"),
        ):
            if hasattr(self, name):
                setattr(clusterer, name, getattr(self, name))
        self.clusterer_ = clusterer
        self.pruner_ = pruner.set_params(budget=plan.size.budget)
        self._link()

    def _promise(self, kept: Kept, study: Study) -> None:
        """Write down what is known of the loss; warn, once, where the promise is not certified."""
        limit, verdict = f"max_accuracy_drop={self.max_accuracy_drop:g}", kept.verdict
        self.n_certifying_ = 0 if study.certify is study.choose else len(study.certify.y)
        self.certified_, self.certified_drop_, self.accuracy_drop_ = True, 0.0, 0.0
        text, certificate = "", None if verdict is None else verdict.certificate
        if verdict is not None and certificate is not None:
            self.certified_ = certificate.certified and self.n_certifying_ > 0
            self.certified_drop_ = certificate.bound if self.certified_ else math.nan
            self.accuracy_drop_ = verdict.drop if self.n_certifying_ else math.nan
        if verdict is None or certificate is None:
            text = (
                f"No smaller network that was tried keeps within {limit} on held-out samples, and "
                "the base itself is kept: nothing gets faster. More calibration samples, a larger "
                "limit, or fallback='base', which lets unsure samples through the whole network, "
                "allow more."
            )
        elif self.accuracy_drop_ > self.max_accuracy_drop:
            text = (
                f"On {self.n_certifying_} held-out samples the routed network loses "
                f"{verdict.drop:.1%} of accuracy, more than {limit}. A larger budget of the pruner "
                "(smaller ratios) keeps more, and so does fallback='base'."
            )
        elif not self.certified_:
            needed = certificate.images_needed
            more = "" if needed is None else f" About {needed} such samples would certify it."
            text = (
                f"{limit} is not certified (confidence {self.confidence:g}): "
                f"{self.n_certifying_} samples that chose nothing are too few, with "
                f"{verdict.drop:.1%} lost on them.{more} Give more calibration samples, or X_val "
                "and y_val."
            )
        if text:
            warn(text, PromiseWarning)
        speedup = kept.built.outcome.speedup
        if self.target_speedup is not None and speedup < self.target_speedup:
            warn(
                f"No network that was tried is {self.target_speedup:g} times as fast as the base; "
                f"the one that is kept is {speedup:.2f} times as fast. A smaller budget of the "
                "pruner, an exit (options.exit_threshold) and larger batches help; on networks as "
                "small as this one, the calls take the time."
            )

    def _kept(self, kept: Kept) -> str:
        """What is kept, in a line."""
        if kept.verdict is None:
            return "the base itself is kept"
        n, passage = self.network_.n_clusters, kept.verdict.passage
        text = f"kept: {n} cluster{'s' * (n > 1)} behind {self.route_layer_}, "
        text += f"{passage.cost:.0%} of the multiplications, {passage.drop:.1%} of accuracy lost, "
        return text + (
            f"certified to be at most {self.certified_drop_:.1%}"
            if self.certified_
            else "not certified"
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
        prefix, given = self._prefix_recipe(subgraphs), options.get_params()
        distillation = as_distillation(self.distill)
        if distillation is not None and distillation.block_steps:
            raise ValueError("distill.block_steps has no effect inside SINFClassifier.")
        with nested("options", given):
            return RoutingConfig(
                subgraphs=subgraphs,
                prefix=prefix,
                fallback=self.fallback,
                max_accuracy_drop=self.max_accuracy_drop,
                confidence=self.confidence,
                target_speedup=self.target_speedup,
                distill=distillation,
                memory=pruner.memory,
                **given,
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
                drop_blocks=subgraphs.drop_blocks,
                penalty=subgraphs.penalty,
                pool_size=subgraphs.pool_size,
                repair_samples=subgraphs.repair_samples,
            )
        own = self.prefix_pruner
        if not isinstance(own, DCSPruner):
            raise TypeError(f"prefix_pruner must be a DCSPruner or None, got {type(own).__name__}.")
        _check_supplied("prefix_pruner", own)
        with naming("prefix_pruner"):
            recipe = recipe_of(own)
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
        if recipe.schedule != "global":
            return recipe
        for name in ("max_ratio", "round_to", "budget_unit"):
            value, default = (p.get_params()[f"options__{name}"] for p in (own, DCSPruner()))
            if value != default:
                raise ValueError(
                    f"prefix_pruner.options.{name} has no effect with schedule='global', which "
                    "shares the budget of `pruner`: that of `pruner` counts."
                )
        return replace(recipe, max_ratio=subgraphs.max_ratio, round_to=subgraphs.round_to)

    def _split(
        self,
        calibration: Calibration,
        X_val: Any,
        y_val: Any,
        weight_val: Any,
        config: RoutingConfig,
    ) -> tuple[Samples, Samples, Samples]:
        """Samples that fit, samples that choose, and samples that certify."""
        X, y, seed = calibration.X, calibration.y_encoded, calibration.seed
        fraction = config.validation_fraction

        def own(rows: np.ndarray) -> Samples:
            return Samples(X, rows, y[rows], calibration.weights(rows))

        if X_val is None:
            if y_val is not None:
                raise ValueError("y_val is given without X_val.")
            if weight_val is not None:
                raise ValueError("sample_weight_val is given without X_val.")
            goal = Goal(self.max_accuracy_drop, self.confidence)
            # A default network was trained on all but this share.
            parts = split_samples(
                y, np.arange(len(y)), fraction, goal, seed, widen=self.model is not None
            )
            fit, choose = own(parts.fit), own(parts.choose)
            return fit, choose, own(parts.certify) if len(parts.certify) else choose
        X_val, y_val = with_labels(X_val, y_val)
        with naming("X_val"):
            X_val = validate_X(self, X_val, reset=False)
        weight = validate_weight(weight_val, len(X_val), "sample_weight_val")
        with naming("y_val"), naming("X_val"):
            y_val = validate_y(y_val, len(X_val))
            X_val, y_val, weight = without_zeros(X_val, y_val, weight)
            y_certify = calibration.table.encode(y_val)
        if (y_certify < 0).any():
            raise ValueError("y_val has labels that are not in y.")
        fit, choose = map(own, hold_out(y, fraction, np.random.default_rng(seed)))
        return fit, choose, Samples(X_val, np.arange(len(y_certify)), y_certify, weight)

    def _link(self) -> None:
        """Let `clusterer_` route through this network's own prefix, which is stored once."""
        network = self.network_
        self.clusterer_.network_ = nn.Sequential(network.prefix, network.router)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if "clusterer_" in state:
            # The shared network is left out; `_link` puts it back.
            state["clusterer_"] = self.clusterer_._without_network()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "network_" in self.__dict__:
            if len(self.input_shape_) == 3:
                # As in fit: NumPy's arrays, which pickles hold, know no memory formats.
                channels_last(self.network_)
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

    @property
    def n_jobs(self) -> int | None:  # type: ignore[override]
        """Jobs that build subgraphs, see `RoutingOptions`."""
        options: RoutingOptions = self._component("options")
        return options.n_jobs

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

    @on_host_by_default()
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
            self._base(),
            self._batcher(self.network_),
            X,
            codes,
            self.class_clusters_,
            self.cluster_names_,
            route_layer=self.route_layer_,
            promise=promise_of(self),
            distilled_epochs=len(getattr(self, "distillation_losses_", ())),
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
    if not isinstance(pruner, DCSPruner):
        return
    for parameter, default in DCSPruner().get_params().items():
        if parameter in _OWN and parameters[parameter] != default:
            raise ValueError(
                f"{name}.{parameter} has no effect inside SINFClassifier, which has its own "
                f"{parameter.removeprefix('options__')}."
            )
