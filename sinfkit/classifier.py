"""SINFClassifier: route each input to its semantic cluster, run only that one's subgraph."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from sklearn import get_config
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted
from torch import nn

from .base import (
    TorchClassifierMixin,
    TorchEstimator,
    all_or_nothing,
    answers_in_torch,
)
from .clusterer import SemanticClusterer
from .data.calibration import Batcher, Calibration
from .data.labels import encode
from .data.validation import (
    Images,
    hold_out,
    validate_weight,
    validate_X,
    validate_y,
    without_zeros,
)
from .errors import OutOfReachError
from .export.onnx import to_onnx
from .graph.cuts import cut_points, find_cut
from .inference.forms import fast_form, half_precision
from .inference.measure import make_report
from .inference.network import FALLBACKS, SINFNetwork
from .inference.report import SINFReport, promise_of
from .pruner import DCSPruner, recipe_of
from .pruning.recipe import Recipe, warn_about_whole
from .routing.builder import ANSWERS, Builder, Built, Held, Plan, Settings
from .routing.placement import rank_candidates, try_cuts, usable_cuts
from .routing.search import LADDER, Goal, Outcome, Size, climb
from .utils.jobs import over_chunks
from .utils.params import caller_level, check_choice, check_integer, check_number, naming

_ROUTE_SAMPLES = 5_000
# Of the ladder: two fifths of the multiplications stay.
_FIRST_RUNG = 3
_PREFIX_RATIO = 0.3
_LOW_RANK = 0.5  # tried in a search; at three quarters, two layers take as long as the one
_AUTOMATIC = (
    "prefix_ratio",
    "prefix_low_rank",
    "exit_threshold",
    "confidence_threshold",
    "router_weight",
)
_OPTIONAL = ("route_accuracy", "target_speedup", "exit_threshold")
_CLUSTERS = (1, 2, 5, 10, 20)  # tried where no clusterer is given


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

    _default_components = {
        "clusterer": SemanticClusterer,
        "pruner": functools.partial(DCSPruner, schedule="global"),
    }

    _only_from_fit = frozenset(
        {"clusterer_", "pruner_", "scores_", "supports_", "repair_errors_", "search_results_"}
    )

    def __init__(
        self,
        model: Any = None,
        *,
        clusterer: Any = None,
        pruner: Any = None,
        route_layer: str = "auto",
        route_accuracy: float | None = None,
        prefix_ratio: float | str = "auto",
        prefix_criterion: str | Callable[..., Any] = "obs",
        prefix_low_rank: float | str = "auto",
        answers: str = "all",
        exit_threshold: float | str | None = "auto",
        confidence_threshold: float | str = "auto",
        max_accuracy_drop: float = 0.01,
        target_speedup: float | None = None,
        fallback: str = "none",
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
        self.prefix_low_rank = prefix_low_rank
        self.answers = answers
        self.exit_threshold = exit_threshold
        self.confidence_threshold = confidence_threshold
        self.max_accuracy_drop = max_accuracy_drop
        self.target_speedup = target_speedup
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
    def fit(
        self,
        X: Any,
        y: Any,
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
            Calibration samples; uint8 images are divided by 255.
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
        clusterer, pruner = self._components()
        with naming("pruner"):
            recipe = recipe_of(pruner)
        self._check_parameters()
        with naming("prefix_criterion"):
            prefix_recipe = Recipe(
                criterion=self.prefix_criterion,
                schedule="uniform",
                pool_size=recipe.pool_size,
                penalty=recipe.penalty,
                round_to=recipe.round_to,
            )
        held_out = None if X_val is not None else self.validation_fraction
        calibration = self._calibrate(X, y, sample_weight=sample_weight, held_out=held_out)
        for one in (recipe, prefix_recipe):
            one.check_weights(calibration.weight)
        rng = np.random.default_rng(calibration.seed)
        index, held = self._hold_out(calibration, X_val, y_val, sample_weight_val, rng)
        builder = Builder(
            calibration,
            index,
            held,
            Settings(
                recipe,
                prefix_recipe,
                recipe.repair_samples,
                self.answers,
                self.exit_threshold,
                self.router_weight,
                self.confidence_threshold,
                self.fallback,
                self.top_k,
                self.max_accuracy_drop,
                self.n_jobs,
                self.memory,
                self.verbose,
            ),
        )
        sizes = self._sizes(pruner)
        warn_about_whole(calibration.groups)
        plans = self._plans(builder, clusterer, sizes, rng)
        self.search_results_ = []
        statistics = builder.gather(plans)
        self._check_base(statistics.logits, calibration)
        built = self._search(builder, plans, sizes)
        self._warn_of_miss(built)
        self._take(built, clusterer, pruner)
        return self

    def _sizes(self, pruner: DCSPruner) -> list[Size]:
        """What to choose from: one size where the user has said it, else a ladder."""
        auto = isinstance(self.prefix_ratio, str)
        low_rank = 1.0 if isinstance(self.prefix_low_rank, str) else float(self.prefix_low_rank)
        recipe = recipe_of(pruner)
        if recipe.schedule == "global" and recipe.budget is None:
            ladder = tuple(replace(s, low_rank=low_rank) for s in LADDER)
            if not auto:
                ladder = tuple(replace(s, prefix_ratio=float(self.prefix_ratio)) for s in ladder)
            if pruner.get_params()["options__max_ratio"] is not None:
                ladder = tuple(replace(s, max_ratio=recipe.max_ratio) for s in ladder)
            return list(ladder)
        given: float | None = None
        if not auto or recipe.schedule != "global":
            given = _PREFIX_RATIO if auto else float(self.prefix_ratio)
        first, last = recipe.pruning_ratios
        last = recipe.max_ratio if recipe.schedule == "global" else last
        return [Size(given, first, last, recipe.budget, low_rank)]

    def _plans(
        self,
        builder: Builder,
        clusterer: SemanticClusterer,
        sizes: list[Size],
        rng: np.random.Generator,
    ) -> list[Plan]:
        """Where to cut and how many clusters to make: the most promising plan first.

        One plan where the user has said it; else one for each number of clusters, with the cut that
        suits it best.  All of middle size.
        """
        calibration = builder.calibration
        graph, size = calibration.graph, sizes[min(_FIRST_RUNG, len(sizes) - 1)]
        n_classes = len(calibration.table.classes)
        groupings = {0: clusterer._grouping()}
        if self.clusterer is None:
            most = min(n_classes, max(2, n_classes // 2))
            numbers = [n for n in _CLUSTERS if n <= most]
            groupings = {n: replace(groupings[0], n_clusters=n) for n in numbers}
        if self.route_layer != "auto":
            with naming("route_layer"):
                cuts = [find_cut(graph, self.route_layer)]
        else:
            cuts = usable_cuts(graph, cut_points(graph), calibration.output)
        if not cuts:
            raise ValueError(
                "The model has no place where it can be cut in two. Pass it as "
                "nn.Sequential(prefix, rest)."
            )
        if len(cuts) == 1 and len(groupings) == 1:
            return [Plan(cuts[0], next(iter(groupings.values())), size)]

        few = _some_of_each(calibration.y_encoded, builder.index, _ROUTE_SAMPLES, rng)
        candidates = try_cuts(
            calibration,
            cuts,
            builder.settings.recipe,
            train=(builder.batches(few), calibration.y_encoded[few], calibration.weights(few)),
            held=(builder.held_batches(), builder.held.codes, builder.held.weight),
            base_logits=builder.base_logits,
            groupings=groupings,
            size=size,
            fallback=self.fallback,
            answers=self.answers,
            exits=self.exit_threshold is not None,
            target=builder.target,
        )
        ranked = rank_candidates(candidates, self.route_accuracy, builder.target)
        best: dict[int, Plan] = {}
        for candidate in ranked:
            plan = Plan(candidate.cut, groupings[candidate.n_clusters], size)
            best.setdefault(candidate.n_clusters, plan)
        return list(best.values())

    def _search(self, builder: Builder, plans: list[Plan], sizes: list[Size]) -> Built:
        """Build what is to be tried, and keep what serves the goal best.

        The first plan climbs the ladder of sizes; the others start where it stopped, and go up as
        long as they are better than all before.  Then the best one's prefix gets a low rank, on the
        same rung and, while that is better, on others.
        """
        goal = Goal(self.max_accuracy_drop, self.target_speedup)
        best: Built | None = None
        missed: list[OutOfReachError] = []

        def evaluate(plan: Plan, rung: int, low_rank: float | None = None) -> Outcome:
            nonlocal best
            size = sizes[rung] if low_rank is None else replace(sizes[rung], low_rank=low_rank)
            trial = Plan(plan.cut, plan.grouping, size)
            try:
                built = builder.build(trial, time_it=self.target_speedup is not None)
            except OutOfReachError as error:
                if len(sizes) == 1:
                    if "prefix_low_rank" in str(error):
                        raise
                    raise OutOfReachError(f"pruner: {error}") from error
                missed.append(error)
                return Outcome(drop=1.0, cost=math.inf, speedup=0.0)
            self._note(built)
            if best is None or goal.better(built.outcome, best.outcome):
                best = built  # the others' weights are let go
            return built.outcome

        first = min(_FIRST_RUNG, len(sizes) - 1)
        rung, found = climb(lambda i: evaluate(plans[0], i), len(sizes), first, goal)
        for plan in plans[1:]:
            for step in range(rung, len(sizes)):
                outcome = evaluate(plan, step)
                if not goal.better(outcome, found):
                    break
                rung, found = step, outcome
        if best is None:
            raise missed[0]
        if len(sizes) > 1 and isinstance(self.prefix_low_rank, str):
            plan = best.plan
            climb(lambda i: evaluate(plan, i, _LOW_RANK), len(sizes), rung, goal)
        return best

    def _note(self, built: Built) -> None:
        """Write down what was tried."""
        outcome = built.outcome
        row = {
            "route_layer": built.plan.cut.name,
            "n_clusters": built.network.n_clusters,
            **asdict(built.plan.size),
            "accuracy_drop": outcome.drop,
            "relative_macs": built.relative_macs,
            "fallback_share": built.fallback_share,
            "exit_share": built.exit_share,
        }
        if not math.isnan(built.relative_time):
            row["relative_time"] = built.relative_time
        if not math.isnan(outcome.speedup):
            row["speedup"] = outcome.speedup
        self.search_results_.append(row)
        if self.verbose:
            print("SINFClassifier: " + ", ".join(_shown(k, v) for k, v in row.items()))

    def _take(self, built: Built, clusterer: SemanticClusterer, pruner: DCSPruner) -> None:
        """Make a network that was built the fitted one."""
        network, plan, subgraphs = built.network, built.plan, built.subgraphs
        clusterer._adopt(built.clusters)
        if self.clusterer is None:
            clusterer.set_params(n_clusters=plan.grouping.n_clusters)
        self.network_ = network
        self.route_accuracy_ = clusterer.route_accuracy_ = built.route_accuracy
        self.router_weight_ = network.router_weight
        self.confidence_threshold_ = network.threshold
        self.exit_threshold_ = network.exit_threshold
        self.route_layer_ = clusterer.layer_ = plan.cut.name
        self.prefix_ratio_ = plan.size.prefix_ratio
        self.prefix_low_rank_ = plan.size.low_rank
        self.class_clusters_ = clusterer.class_clusters_
        self.cluster_names_ = clusterer.cluster_names_
        self.temperatures_ = network.temperatures.cpu().numpy()
        self.scores_ = [{} if s is None else s.scores for s in subgraphs]
        self.supports_ = [{} if s is None else s.support for s in subgraphs]
        self.repair_errors_ = [{} if s is None else s.repair_error for s in subgraphs]
        clusterer.classes_ = self.classes_
        clusterer.n_features_in_, clusterer.input_shape_ = self.n_features_in_, self.input_shape_
        if hasattr(self, "input_range_"):
            clusterer.input_range_ = self.input_range_
        clusterer.base_model_, clusterer.device_ = self.base_model_, self.device_
        pruner.set_params(budget=plan.size.budget)
        if plan.size.budget is not None:
            pruner.set_params(options__max_ratio=plan.size.max_ratio)
        self.clusterer_, self.pruner_ = clusterer, pruner
        self._link()

    def _warn_of_miss(self, built: Built) -> None:
        """Warn where a speed is not reached, or the held-out loss is beyond limit and noise."""
        speedup = built.outcome.speedup
        if self.target_speedup is not None and speedup < self.target_speedup:
            warnings.warn(
                f"No network that was tried is {self.target_speedup:g} times as fast as the base; "
                f"the one that is kept is {speedup:.2f} times as fast. A larger max_accuracy_drop "
                "sends fewer samples through the base.",
                UserWarning,
                stacklevel=caller_level(),
            )
        if self.target_speedup is not None or self.confidence_threshold != "auto":
            return
        drop = built.outcome.drop
        if drop - built.drop_error > self.max_accuracy_drop:
            warnings.warn(
                f"On held-out samples the routed network loses {drop:.1%} of accuracy, "
                f"more than max_accuracy_drop={self.max_accuracy_drop}, whatever the thresholds. "
                "A larger budget of the pruner (smaller ratios), or more repair_samples, keep "
                "more; fallback='base' lets unsure samples through the whole network.",
                UserWarning,
                stacklevel=caller_level(),
            )

    def _components(self) -> tuple[SemanticClusterer, DCSPruner]:
        """Clone the nested estimators, with this one's device, seed, jobs and verbosity."""
        clusterer, pruner = self._component("clusterer"), self._component("pruner")
        for name, nested, kind, outer in (
            ("clusterer", clusterer, SemanticClusterer, ("model", "model_classes")),
            (
                "pruner",
                pruner,
                DCSPruner,
                ("model", "model_classes", "classes", "options__first_layer"),
            ),
        ):
            if not isinstance(nested, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(nested).__name__}.")
            for parameter in outer:
                if nested.get_params()[parameter] is not None:
                    raise ValueError(
                        f"{name}.{parameter} must be None: SINFClassifier supplies it."
                    )
        if isinstance(pruner.schedule, str) and pruner.schedule == "iterative":
            raise ValueError(
                "pruner.schedule='iterative' prunes one whole network; choose another schedule."
            )
        clusterer, pruner = clone(clusterer), clone(pruner)
        for nested, defaults in ((clusterer, SemanticClusterer()), (pruner, DCSPruner())):
            for parameter in ("device", "random_state", "n_jobs", "verbose", "batch_size"):
                if parameter not in nested.get_params(deep=False):
                    continue
                if getattr(nested, parameter) == getattr(defaults, parameter):
                    setattr(nested, parameter, getattr(self, parameter))
        with naming("clusterer"):
            clusterer._check_parameters()
        return clusterer, pruner

    def _check_parameters(self) -> None:
        """Raise for parameters that are wrong whatever the data."""
        check_choice("fallback", self.fallback, FALLBACKS)
        check_integer("top_k", self.top_k)
        check_choice("answers", self.answers, ANSWERS)
        if not isinstance(self.route_layer, str):
            raise TypeError(f"route_layer must be a name, got {type(self.route_layer).__name__}.")
        for name, interval in (
            ("prefix_ratio", "[0, 1)"),
            ("prefix_low_rank", "(0, 1]"),
            ("route_accuracy", "[0, 1]"),
            ("max_accuracy_drop", "[0, 1]"),
            ("target_speedup", "[1, inf)"),
            ("confidence_threshold", "[0, 1]"),
            ("exit_threshold", "[0, 1]"),
            ("router_weight", "[0, inf)"),
            ("validation_fraction", "(0, 1)"),
        ):
            value = getattr(self, name)
            if name in _AUTOMATIC and isinstance(value, str):
                check_choice(name, value, ("auto",))
                continue
            check_number(name, value, interval, optional=name in _OPTIONAL)

    def _hold_out(
        self,
        calibration: Calibration,
        X_val: Any,
        y_val: Any,
        weight_val: Any,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, Held]:
        """Return fitting indices, and the held-out samples."""
        if X_val is None:
            if y_val is not None:
                raise ValueError("y_val is given without X_val.")
            if weight_val is not None:
                raise ValueError("sample_weight_val is given without X_val.")
            fit, held = hold_out(calibration.y_encoded, self.validation_fraction, rng)
            codes = calibration.y_encoded[held]
            return fit, Held(calibration.X, held, codes, calibration.weights(held))
        with naming("X_val"):
            X_val = validate_X(self, X_val, reset=False)
        weight = validate_weight(weight_val, len(X_val), "sample_weight_val")
        with naming("y_val"), naming("X_val"):
            y_val = validate_y(y_val, len(X_val))
            X_val, y_val, weight = without_zeros(X_val, y_val, weight)
            codes = calibration.table.encode(y_val)
        if (codes < 0).any():
            raise ValueError("y_val has labels that are not in y.")
        return np.arange(len(calibration.y_encoded)), Held(
            X_val, np.arange(len(codes)), codes, weight
        )

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
        check_integer("latency_batch", latency_batch, optional=True)
        check_integer("repeats", repeats, low=0)
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


def _shown(name: str, value: Any) -> str:
    """A result in a few characters."""
    return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"


def _some_of_each(
    codes: np.ndarray, index: np.ndarray, n: int, rng: np.random.Generator
) -> np.ndarray:
    """At most `n` of the samples `index`, drawn by chance, but one of each class in any case."""
    order = rng.permutation(index)
    first = np.unique(codes[order], return_index=True)[1]
    return np.concatenate((order[first], np.delete(order, first)[: max(n - len(first), 0)]))
