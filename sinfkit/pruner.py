"""DCSPruner: any trained torch classifier in, a physically smaller one out."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import fx

from .base import TorchClassifierMixin, TorchEstimator, all_or_nothing
from .criteria.activations import Statistics, pool
from .data.calibration import Calibration
from .data.validation import hold_out, validate_X
from .graph.cuts import find_layer, observation_nodes, penultimate
from .inference.forms import fast_form
from .pruning.budget import budgeted_widths
from .pruning.recipe import Recipe, choose_channels, extract, sliceable, warn_about_whole
from .pruning.scoring import gather, score
from .pruning.tvsprune import Pruned, prune_in_rounds
from .repair.sequential import affordable_images, repair
from .slicing.groups import ChannelGroup
from .utils.jobs import over_chunks
from .utils.params import check_integer, check_number, naming


class DCSPruner(
    ClassNamePrefixFeaturesOutMixin, TorchClassifierMixin, TransformerMixin, TorchEstimator
):
    """Remove the filters of a trained network that discriminate its classes least.

    Each filter gets a Discriminative Capability Score (DCS): how much a linear probe on the layer's
    pooled activations relies on it to tell the classes apart.  The lowest are sliced out of the
    weights, so that the network is smaller and faster on any hardware, and the layers behind are
    refitted in closed form.  No gradient training takes place.

    Parameters
    ----------
    model : nn.Module or FrozenModel, optional
        The trained classifier, which returns one score per class.  Wrap it in a `FrozenModel` for
        grid searches, and to give normalisation.  None trains a small default network in ``fit``.
    criterion : str or callable, default="dcs"
        Filter score: ``"dcs"``, ``"fdr"``, ``"taylor"``, ``"obs"``, ``"l1"``, ``"random"`` or any
        key of `sinfkit.criteria.CRITERIA`; or a function of a `sinfkit.criteria.LayerData` that
        returns one score per filter, low for those to remove.
    schedule : {"linear", "geometric", "uniform", "global", "iterative"}, default="linear"
        How many filters each layer loses.  The first three say how the fraction removed grows from
        the first layer to the last; ``"uniform"`` removes `max_ratio` everywhere.  ``"global"``
        removes, over all layers, what is lost most cheaply until `budget` is met; the criterion
        orders the filters of a layer, and layers are compared by what their readers lose for good
        (see `sinfkit.criteria.costs_in_order`).  ``"iterative"`` removes what scores far below its
        layer's mean, scores again, and goes on while the accuracy on held-out samples allows
        (IterTVSPrune; theirs has ``criterion="hellinger"`` and ``repair="none"``).
    min_ratio : float, default=0.1
        Fraction of filters removed from the first layer (the paper's r_M).
    max_ratio : float, optional
        Fraction of filters removed from the last layer (the paper's r_L); with ``"global"`` the
        largest fraction that any layer may lose.  Default: 0.5, and 0.9 with ``"global"``.
    budget : float, optional
        With ``schedule="global"``: the fraction of the base's cost that may stay, in (0, 1].  In
        `SINFClassifier` prefix and one subgraph together keep to it, and all clusters' subgraphs
        have the same widths.
    budget_unit : {"macs", "params", "latency"}, default="macs"
        What the cost is: multiply-accumulates, parameters, or time, measured on this machine with
        `batch_size` samples (or all that there are) at a time.  Measured times are noisy.
    round_to : int, default=1
        The number of filters that stay in a layer is a multiple of it, rounded up: 8 suits most
        hardware in bfloat16.  With ``schedule="global"`` layers whose own width is no multiple are
        left as they come; ``schedule="iterative"`` does not round.
    max_accuracy_drop : float, default=0.01
        With ``schedule="iterative"``: how much accuracy may be lost on the held-out samples.
    validation_fraction : float, default=0.2
        With ``schedule="iterative"``: share of the samples of each class that is held out.
    first_layer : str, optional
        Layers before it stay whole.
    classes : sequence of labels, optional
        Keep only these classes: their outputs, and the filters that tell them apart.  Samples of
        other classes are ignored.
    repair : {"least_squares", "static_least_squares", "match", "mean", "none"}, \
default="least_squares"
        Closed-form repair after slicing, see `sinfkit.repair.sequential`.
    penalty : float, default=3.0
        Ridge penalty of the DCS probe.
    pool_size : int, default=1
        Activations are averaged to ``pool_size x pool_size`` before they are scored.
    repair_samples : int, default=4000
        At most so many of the samples are used for the repair (drawn with `random_state`); every
        sample is scored.  The repair holds their activations at one layer in memory, so fewer are
        taken where those of one layer would exceed 2 GiB.
    model_classes : sequence of labels, optional
        The label of each of the model's outputs.  Default: integer labels are output indices,
        others are matched in sorted order.
    batch_size : int, default=256
    device : str or torch.device, default="auto"
        ``"auto"``: the first GPU where there is one.
    n_jobs : int, optional
        Inside ``joblib.parallel_config`` with a backend of processes: workers that predict chunks
        of `X`.  ``fit`` is one job.
    memory : str, joblib.Memory or None
        Where to cache the activations' statistics and the filters' scores between fits.
    random_state : int, RandomState or None, default=None
    verbose : int, default=0
        Show progress bars.

    Attributes
    ----------
    model_ : nn.Module
        The smaller network, on `device_`.  It takes normalised samples, as `model` does, and
        returns one logit for each of `classes_`, in that order.
    scores_ : dict of str to ndarray of shape (n_filters,)
        Score of each ORIGINAL filter, by layer.  With ``schedule="iterative"`` its last one: what
        was removed in different rounds was scored in different networks.
    support_ : dict of str to int ndarray
        Sorted indices of the original filters kept, by layer.
    ratios_ : dict of str to float
        Fraction of filters removed, by layer.
    repair_error_ : dict of str to float
        Relative squared error of each repaired layer's pre-activations on held-out calibration
        samples.
    cost_ratio_ : float
        With ``schedule="global"``: cost of the smaller network over that of the base, in
        `budget_unit`; for latency, as it was measured.
    classes_ : ndarray of shape (n_classes,)
    base_model_ : FrozenModel
        The network that was pruned.
    n_features_in_ : int
        ``X.shape[1]``.
    input_shape_ : tuple of int
        Shape of one sample.
    device_ : torch.device

    See Also
    --------
    SINFClassifier : One such subgraph for each semantic cluster, and a router in front.

    Notes
    -----
    The paper (arXiv 2310.01259, algorithm 1) states the probe and that scores are normalised over
    the layer.  The ridge penalty, the centring, the scaling and the Frobenius norm are our
    choices, see the user guide.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import DCSPruner
    >>> X, y = load_digits(return_X_y=True)
    >>> pruner = DCSPruner(max_ratio=0.5, random_state=0).fit(X[:1000], y[:1000])
    >>> pruner.score(X[1000:], y[1000:]) > 0.85
    True
    """

    model_: fx.GraphModule
    scores_: dict[str, np.ndarray]
    support_: dict[str, np.ndarray]
    ratios_: dict[str, float]
    repair_error_: dict[str, float]
    cost_ratio_: float
    classes_: np.ndarray

    _only_from_fit = frozenset({"scores_", "support_", "repair_error_"})

    def __init__(
        self,
        model: Any = None,
        *,
        criterion: Any = "dcs",
        schedule: str = "linear",
        min_ratio: float = 0.1,
        max_ratio: float | None = None,
        budget: float | None = None,
        budget_unit: str = "macs",
        round_to: int = 1,
        max_accuracy_drop: float = 0.01,
        validation_fraction: float = 0.2,
        first_layer: str | None = None,
        classes: Any = None,
        repair: str = "least_squares",
        penalty: float = 3.0,
        pool_size: int = 1,
        repair_samples: int = 4000,
        model_classes: Any = None,
        batch_size: int = 256,
        device: Any = "auto",
        n_jobs: int | None = None,
        memory: Any = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.criterion = criterion
        self.schedule = schedule
        self.min_ratio = min_ratio
        self.max_ratio = max_ratio
        self.budget = budget
        self.budget_unit = budget_unit
        self.round_to = round_to
        self.max_accuracy_drop = max_accuracy_drop
        self.validation_fraction = validation_fraction
        self.first_layer = first_layer
        self.classes = classes
        self.repair = repair
        self.penalty = penalty
        self.pool_size = pool_size
        self.repair_samples = repair_samples
        self.model_classes = model_classes
        self.batch_size = batch_size
        self.device = device
        self.n_jobs = n_jobs
        self.memory = memory
        self.random_state = random_state
        self.verbose = verbose

    @all_or_nothing
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> DCSPruner:
        """Score the filters on calibration samples, slice the network and repair it.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, channels, height, width) or (n_samples, \
n_features)
            Calibration samples; uint8 images are divided by 255.
        y : array-like of shape (n_samples,)
            Their labels.
        sample_weight : array-like of shape (n_samples,), optional
            How many times each sample counts, in scores, repair and held-out accuracies: 2 stands
            for the sample twice, 0 for none.  Default: once.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For a parameter out of range, samples, labels or weights that do not fit the model or
            each other, or weights where the criterion knows none.
        TypeError
            If `model` is not a module.
        SlicingError
            If the sliced network disagrees with the masked one; the message names the layer.
        """
        recipe = self._recipe()
        chooses = recipe.schedule == "iterative" and self.classes is None
        held_out = self.validation_fraction if chooses else None
        calibration = self._calibrate(X, y, self.classes, sample_weight, held_out)
        recipe.check_weights(calibration.weight)
        graph, groups = calibration.graph, calibration.groups
        within = self._layers_from(graph, calibration.output)
        warn_about_whole(groups, within)
        chosen = sliceable(groups, within)

        nodes = observation_nodes(graph, [layer for group in chosen for layer in group.layers])
        statistics = gather(calibration, nodes, recipe.pool_size, self.memory, self.verbose)
        self._check_base(statistics.logits, calibration)

        index = np.flatnonzero(calibration.y_encoded >= 0)
        if self.verbose and len(index) < len(calibration.y_encoded):
            ignored = len(calibration.y_encoded) - len(index)
            print(f"DCSPruner: {ignored} samples of other classes ignored")
        prune = self._in_rounds if recipe.schedule == "iterative" else self._at_once
        pruned = prune(calibration, recipe, chosen, nodes, statistics, index)
        self.model_ = pruned.model
        self.scores_ = pruned.scores
        self.repair_error_ = pruned.repair_error
        self.support_ = {
            layer: kept for layer, kept in pruned.support.items() if layer != calibration.output
        }
        widths = {
            name: m.weight.shape[0] for name, m in graph.named_modules() if name in self.support_
        }
        self.ratios_ = {
            layer: 1 - len(kept) / widths[layer] for layer, kept in self.support_.items()
        }
        self._output = calibration.output
        return self

    def _at_once(
        self,
        calibration: Calibration,
        recipe: Recipe,
        chosen: list[ChannelGroup],
        nodes: dict[str, str],
        statistics: Statistics,
        index: np.ndarray,
    ) -> Pruned:
        """Score once, slice once, repair once."""
        graph, groups, outputs = calibration.graph, calibration.groups, calibration.table.outputs
        batches = functools.partial(calibration.batcher, calibration.X)
        classes = np.arange(len(calibration.table.classes))
        scored = score(calibration, chosen, statistics, index, classes, recipe, self.memory)
        others = {_output_group(groups): outputs}
        widths = None
        if recipe.schedule == "global":
            batch = next(iter(batches(index)))
            budgeted = budgeted_widths(graph, groups, chosen, scored, recipe, batch, others)
            widths, self.cost_ratio_ = budgeted.widths, budgeted.cost_ratio
        keep = choose_channels(chosen, scored.groups, recipe, widths) | others

        rng = np.random.default_rng(calibration.seed)
        n_images = affordable_images(graph, calibration.example, int(self.repair_samples))
        drawn = draw(rng, index, n_images)
        samples = torch.cat(list(batches(drawn)))
        small, support = extract(graph, groups, keep, samples[:64], outputs=outputs.tolist())
        errors = repair(
            graph,
            small,
            support,
            samples,
            method=recipe.repair,
            batch_size=self.batch_size,
            seed=calibration.seed,
            sample_weight=calibration.weights(drawn),
        )
        return Pruned(small, support, scored.layers, errors)

    def _in_rounds(
        self,
        calibration: Calibration,
        recipe: Recipe,
        chosen: list[ChannelGroup],
        nodes: dict[str, str],
        statistics: Statistics,
        index: np.ndarray,
    ) -> Pruned:
        """Score, slice and repair until the held-out samples say stop."""
        graph, codes = calibration.graph, calibration.y_encoded[index]
        rng = np.random.default_rng(calibration.seed)
        fit, held = hold_out(codes, self.validation_fraction, rng)
        return prune_in_rounds(
            graph,
            calibration.groups,
            calibration.output,
            calibration.table.outputs.tolist(),
            self._layers_from(graph, calibration.output),
            statistics,
            (index[fit], codes[fit]),
            (index[held], codes[held]),
            functools.partial(calibration.batcher, calibration.X),
            recipe,
            n_images=affordable_images(graph, calibration.example, int(self.repair_samples)),
            batch_size=int(self.batch_size),
            seed=calibration.seed,
            verbose=self.verbose,
            weight=calibration.weight,
        )

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
        """Softmax of the smaller network's outputs.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            float64 for float64 networks, float32 otherwise; columns as in `classes_`.  A Tensor as
            with `predict`.
        """
        check_is_fitted(self)
        X = validate_X(self, X, reset=False)
        batcher = self._batcher(self.model_)
        model = fast_form(self.model_, lambda: batcher.normalise(batcher.load(X[:4])))
        return self._as_wanted(self._run(lambda x: torch.softmax(model(x), 1), batcher(X), X), X)

    @over_chunks
    def transform(self, X: Any) -> Any:
        """Compute the smaller network's penultimate features.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, ...)

        Returns
        -------
        ndarray of shape (n_samples, n_features_out)
            Input of the output layer; float64 for float64 `X`, float32 otherwise.  A Tensor as with
            `predict`.
        """
        check_is_fitted(self)
        X = validate_X(self, X, reset=False)
        features = penultimate(self.model_, self._output)
        batches = self._batcher(self.model_)(X)
        answers = self._run(lambda x: pool(features(x), 1), batches, X)
        return self._as_wanted(answers, X, X.dtype in (np.float64, torch.float64))

    @property
    def _n_features_out(self) -> int:
        """Width of `transform`, which `get_feature_names_out` asks for."""
        return int(dict(self.model_.named_modules())[self._output].weight.shape[1])

    def _recipe(self, *, searched: bool = False) -> Recipe:
        """Check this pruner's parameters, before anything costly; a budget may be `searched`."""
        check_integer("repair_samples", self.repair_samples)
        check_number("penalty", self.penalty, "(0, inf)")
        check_number("validation_fraction", self.validation_fraction, "(0, 1)")
        largest = {} if self.max_ratio is None or self.schedule != "global" else self.max_ratio
        last = 0.5 if self.max_ratio is None or self.schedule == "global" else self.max_ratio
        if self.schedule == "global" and self.budget is None and not searched:
            raise ValueError("schedule='global' needs a budget.")
        return Recipe(
            criterion=self.criterion,
            schedule=self.schedule,  # type: ignore[arg-type]
            pruning_ratios=(self.min_ratio, last),
            pool_size=self.pool_size,
            repair=self.repair,
            repair_samples=self.repair_samples,
            penalty=self.penalty,
            budget=self.budget,
            budget_unit=self.budget_unit,  # type: ignore[arg-type]
            max_accuracy_drop=self.max_accuracy_drop,
            round_to=self.round_to,
            **({"max_ratio": largest} if largest != {} else {}),  # type: ignore[arg-type]
        )

    def _layers_from(self, graph: fx.GraphModule, output: str) -> list[str]:
        """Names of the layers from `first_layer` on, the output layer among the consumers."""
        from .graph.cuts import layer_names

        names = layer_names(graph)
        if self.first_layer is None:
            return names
        if not isinstance(self.first_layer, str):
            raise TypeError(f"first_layer must be a name, got {type(self.first_layer).__name__}.")
        with naming("first_layer"):
            return names[names.index(find_layer(graph, self.first_layer)) :]


def draw(rng: np.random.Generator, index: np.ndarray, n: int) -> np.ndarray:
    """At most `n` of the indices, without replacement, in random order."""
    return rng.permutation(index)[:n]


def _output_group(groups: Any) -> str:
    """Name of the group of the output layer."""
    return next(group.name for group in groups if group.is_output)
