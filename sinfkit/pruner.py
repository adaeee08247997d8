"""DCSPruner: any trained torch classifier in, a physically smaller one out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import fx, nn

from .base import TorchClassifierMixin, TorchEstimator, all_or_nothing
from .criteria.activations import pool
from .data.calibration import Calibration, encode
from .data.images import with_labels
from .data.validation import validate_X, validate_y
from .errors import PromiseWarning
from .frozen import FrozenModel
from .graph.cuts import (
    feature_layer,
    find_layer,
    layer_names,
    observation_nodes,
    one_row_each,
    penultimate,
)
from .graph.tracing import of_torch_alone
from .inference.forms import fast_form
from .inference.measure import make_pruning_report
from .inference.report import PruningReport, promise_of
from .pruning.costs import check_sliceable
from .pruning.recipe import PruningOptions, Recipe, sliceable
from .pruning.scoring import Scored, gather, score
from .pruning.search import (
    Builder,
    Goal,
    Judged,
    Split,
    finalists,
    judge,
    most_tried,
    search,
    split_samples,
    walk,
)
from .pruning.tvsprune import FACTORS, prune_in_rounds
from .repair.distillation import Distillation, as_distillation, block_passes
from .slicing.groups import ChannelGroup
from .utils.device import on_host_by_default
from .utils.jobs import over_chunks
from .utils.params import check_flag, check_integer, check_number, naming, nested, warn
from .utils.progress import Progress, about

# In times of a pass of the base over the samples: rough, counted from what a fit runs.
_PASSES_BEFORE, _PASSES_EACH, _PASSES_EPOCH = 6, 3, 3
_LAST_ROUNDS = 3  # that are distilled, of those that the choosing samples allow


class DCSPruner(
    ClassNamePrefixFeaturesOutMixin, TorchClassifierMixin, TransformerMixin, TorchEstimator
):
    """Make a trained network smaller without retraining it, within a limit of accuracy.

    Filters that the classes need least are sliced out of the weights, so that the network is
    smaller and faster on any hardware, and the layers behind are refitted in closed form.  By
    default the smallest network is searched whose accuracy is shown to drop by at most
    `max_accuracy_drop`; with a `budget`, or another `schedule`, you say how much goes.

    Parameters
    ----------
    model : nn.Module or FrozenModel, optional
        The trained classifier, which returns one score per class.  Wrap it in a `FrozenModel` for
        grid searches, and to give normalisation.  None trains a small default network in ``fit``.
    criterion : str or callable, default="dcs_obs"
        Filter score: ``"dcs_obs"``, ``"dcs"``, ``"obs"``, ``"taylor"``, ``"l1"`` or any key of
        `sinfkit.criteria.CRITERIA`; or a function of a `sinfkit.criteria.LayerData` that returns
        one score per filter, low for those to remove.
    schedule : {"global", "linear", "geometric", "uniform", "iterative"}, default="global"
        Which layers lose how much.  ``"global"`` removes, over all layers, what is lost most
        cheaply until `budget` is met.  ``"linear"`` and ``"geometric"`` let the share removed grow
        with depth, from the first of `pruning_ratios` to the second; ``"uniform"`` removes the
        second everywhere.  ``"iterative"`` removes what scores far below its layer's mean, scores
        again, and goes on while the accuracy allows (IterTVSPrune; theirs has
        ``criterion="hellinger"`` and ``repair="none"``).
    budget : float, optional
        With ``schedule="global"``, the share of the cost that STAYS, in (0, 1].  None: searched.
    pruning_ratios : tuple of float, default=(0.1, 0.5)
        Share of the filters REMOVED from the first and from the last layer, in [0, 1).
    repair : {"least_squares", "static_least_squares", "match", "mean", "none"}, \
default="least_squares"
        Closed-form repair after slicing, see `sinfkit.repair`.
    max_accuracy_drop : float, default=0.01
        Accuracy that may be lost, as a share.  It guides a search and ``schedule="iterative"``;
        where you say how much goes, you are told whether it was kept.
    confidence : float, default=0.9
        How sure that is to be, see Notes.
    distill : Distillation or int, optional
        Train the repaired network towards the base's answers to the calibration samples, without
        labels, for so many epochs.  In a search up to four sizes, from careful to bold.  None: no
        training.
    classes : sequence of labels, optional
        Keep only these classes: their outputs, and the filters that tell them apart.  Samples of
        other classes are ignored.
    options : PruningOptions, optional
        What few users need to set.
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
    model_ : nn.Module
        The smaller network, on `device_`, with weights of its own.  It takes normalised samples,
        as `model` does, and returns one logit for each of `classes_`, in that order.
    accuracy_drop_ : float
        Accuracy lost on held-out samples that have chosen nothing; nan without such samples.
    certified_ : bool
        Whether these samples show, with `confidence`, that at most `max_accuracy_drop` is lost.
    certified_drop_ : float
        The accuracy lost is at most this, with `confidence`; nan where nothing is certified.
    cost_ratio_ : float
        Cost of the smaller network over that of the base, in `budget_unit` with
        ``schedule="global"`` (for latency, as it was measured) and in multiplications otherwise.
    distillation_losses_ : list of float
        With `distill`, the mean divergence from the base's answers in each epoch.
    dropped_layers_ : list of str
        The layers of the residual blocks that were left out.
    search_results_ : list of dict
        With a search, each size that was tried: ``stage``, ``budget``, ``cost_ratio``, and
        ``accuracy_drop`` on the samples that choose.
    sliceable_share_ : float
        Share of the base's multiplications that slicing can reach.
    scores_, support_ : dict of str to ndarray
        By layer, the score of each ORIGINAL filter and the sorted indices of those kept.
    ratios_, repair_error_ : dict of str to float
        By layer, the share of filters removed, and the relative squared error of the repaired
        layer's pre-activations on held-out calibration samples.
    classes_, outputs_ : ndarray of shape (n_classes,)
        The labels, and the base's output for each.
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
    **The promise.** With probability at least `confidence` over the draw of the calibration
    samples, a result with ``certified_`` loses at most `max_accuracy_drop` on samples of the same
    distribution that the base was not trained on.  Networks are tested from careful to bold, on
    samples that chose nothing (arXiv 2110.01052).  Below about 230 such samples no point can be
    certified: then the best by an honest estimate is kept, with a `PromiseWarning`.

    **The paper** (arXiv 2310.01259, algorithm 1) states the probe and that scores are normalised
    over the layer; penalty, centring, scaling and norm are our choices.  Its own form is
    `DCSPruner.paper_settings`.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import DCSPruner
    >>> X, y = load_digits(return_X_y=True)
    >>> pruner = DCSPruner(budget=0.5, random_state=0).fit(X[:1000], y[:1000])
    >>> pruner.score(X[1000:], y[1000:]) > 0.85
    True
    """

    model_: fx.GraphModule
    scores_: dict[str, np.ndarray]
    support_: dict[str, np.ndarray]
    ratios_: dict[str, float]
    repair_error_: dict[str, float]
    cost_ratio_: float
    accuracy_drop_: float
    certified_: bool
    certified_drop_: float
    search_results_: list[dict[str, Any]]
    distillation_losses_: list[float]
    dropped_layers_: list[str]
    sliceable_share_: float
    classes_: np.ndarray
    outputs_: np.ndarray

    _default_components = {"options": PruningOptions}
    _only_from_fit = frozenset(
        {"scores_", "support_", "repair_error_", "search_results_", "distillation_losses_"}
        | {"dropped_layers_"}
    )

    def __init__(
        self,
        model: nn.Module | FrozenModel | None = None,
        *,
        criterion: str | Callable[..., Any] = "dcs_obs",
        schedule: Literal["global", "linear", "geometric", "uniform", "iterative"] = "global",
        budget: float | None = None,
        pruning_ratios: tuple[float, float] = (0.1, 0.5),
        repair: Literal[
            "least_squares", "static_least_squares", "match", "mean", "none"
        ] = "least_squares",
        max_accuracy_drop: float = 0.01,
        confidence: float = 0.9,
        distill: Distillation | int | None = None,
        classes: Sequence[Any] | None = None,
        options: PruningOptions | None = None,
        model_classes: Sequence[Any] | None = None,
        batch_size: int = 256,
        device: str | torch.device = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.criterion = criterion
        self.schedule = schedule
        self.budget = budget
        self.pruning_ratios = pruning_ratios
        self.repair = repair
        self.max_accuracy_drop = max_accuracy_drop
        self.confidence = confidence
        self.distill = distill
        self.classes = classes
        self.options = options
        self.model_classes = model_classes
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    @classmethod
    def paper_settings(cls, model: nn.Module | FrozenModel | None = None, **params: Any) -> Any:
        """Return a pruner with the settings of the paper (arXiv 2310.01259).

        DCS of the classes (algorithm 1), and ratios that grow linearly from the first layer to the
        last (algorithm 2; the paper sweeps 1 to 10 % and 10 to 90 %, and leaves the formula open),
        nothing repaired.

        Parameters
        ----------
        model : nn.Module or FrozenModel, optional
        **params : dict
            Other parameters, or other values of these.

        Returns
        -------
        DCSPruner
            Not fitted.

        Examples
        --------
        >>> from sinfkit import DCSPruner
        >>> DCSPruner.paper_settings()
        DCSPruner(criterion='dcs', repair='none', schedule='linear')
        """
        paper = {
            "criterion": "dcs",
            "schedule": "linear",
            "pruning_ratios": (0.1, 0.5),
            "repair": "none",
        }
        return cls(model, **(paper | params))

    @all_or_nothing
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> DCSPruner:
        """Score the filters on calibration samples, slice the network and repair it.

        Parameters
        ----------
        X : array-like or Tensor of shape (n_samples, channels, height, width) or (n_samples, \
n_features)
            Calibration samples; uint8 images are divided by 255.  Or a `Dataset` or `DataLoader`
            of torch, or a list of PIL images: read in batches, and labels taken from it where `y`
            is None.
        y : array-like of shape (n_samples,), optional
            Their labels.  None, where X has none, for a criterion that needs none (``"obs"``,
            ``"l1"``, ``"fpgm"`` ...): the base's own answers stand for them, so that every answer
            that changes counts as lost.
        sample_weight : array-like of shape (n_samples,), optional
            How many times each sample counts, in scores, repair and held-out accuracies: 2 stands
            for the sample twice, 0 for none.  Default: once.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            For a parameter out of range or without effect, samples, labels or weights that do not
            fit the model or each other, or weights or no labels where the criterion knows none.
        TypeError
            If `model` is not a module.
        UnsliceableError
            If less than 5 % of the multiplications can be sliced.
        SlicingError
            If the sliced network disagrees with the masked one; the message names the layer.

        Warns
        -----
        PromiseWarning
            Where `max_accuracy_drop` is exceeded, or cannot be certified.
        """
        recipe, goal = recipe_of(self), Goal(self.max_accuracy_drop, self.confidence)
        X, y = with_labels(X, y)
        calibration = self._calibration(X, y, sample_weight, recipe)
        chosen = self._chosen(calibration)
        split = self._split(calibration, recipe, goal, y is not None)
        nodes = observation_nodes(calibration.graph, [k for g in chosen for k in g.layers])
        with Progress("DCSPruner", self.verbose) as progress:
            self._announce(progress, calibration, recipe)
            progress.doing("reads the samples")
            statistics = gather(calibration, nodes, recipe.pool_size, self.memory)
            self._check_base(statistics.logits, calibration)
            progress.done()
            nothing = Scored({}, {})
            builder = Builder(calibration, recipe, chosen, nothing, statistics, split.fit, progress)
            judged = self._prune(builder, split, goal)
            self._adopt(judged, calibration)
            self._warn(judged, goal)
            progress.end(self._kept(judged))
        return self

    def _announce(self, progress: Progress, calibration: Calibration, recipe: Recipe) -> None:
        """Say, before anything is built, about what that takes."""
        if not progress.verbose:
            return
        n_networks, n_trained = 1, 1
        if recipe.searches:
            n_networks, n_trained = most_tried(recipe), len(finalists(recipe))
        n_steps = 1 + n_networks
        if recipe.schedule == "iterative":
            n_networks = n_steps = len(FACTORS)
            n_trained = _LAST_ROUNDS
        n_epochs = 0 if recipe.distill is None else n_trained * recipe.distill.epochs
        seconds, n_steps = calibration.pass_seconds(), n_steps + n_epochs
        n_passes = _PASSES_BEFORE + _PASSES_EACH * n_networks + _PASSES_EPOCH * n_epochs
        if recipe.distill is not None:
            n_passes += n_trained * block_passes(recipe.distill, len(calibration.X))
        others = int((calibration.y_encoded < 0).sum())
        progress.begin(
            f"up to {n_networks} network{'s' * (n_networks > 1)} on {len(calibration.X)} samples"
            + (f" ({others} of other classes ignored)" if others else "")
            + (f", up to {n_epochs} epochs of distillation" if n_epochs else "")
            + f"; that takes about as long as {n_passes} passes over them, of {about(seconds)} "
            f"each: {about(n_passes * seconds)}; {self.sliceable_share_:.0%} of the "
            "multiplications can be sliced",
            n_steps,
        )

    def _kept(self, judged: Judged) -> str:
        """What is kept, in a line."""
        if judged.is_base:
            return "the base itself is kept"
        text = f"{self.cost_ratio_:.0%} of the cost stays"
        if not math.isnan(judged.drop):
            text += f", {judged.drop:.1%} of accuracy lost"
        if self.certified_:
            return f"{text}, certified to be at most {self.certified_drop_:.1%}"
        return f"{text}, not certified"

    def _prune(self, builder: Builder, split: Split, goal: Goal) -> Judged:
        """Build the network that was asked for, or the smallest that serves the goal."""
        calibration, recipe = builder.calibration, builder.recipe
        if recipe.schedule == "iterative":
            within = self._layers_from(calibration)
            rounds = prune_in_rounds(builder, split, within, goal)
            if recipe.distill is not None:
                rounds = rounds[-_LAST_ROUNDS:]
            makers = [functools.partial(builder.distilled, pruned) for pruned in rounds]
            return walk(builder, split, goal, makers, len(rounds) - 1)
        classes = np.arange(len(calibration.table.classes))
        builder.progress.doing("scores the filters")
        builder.scored = score(
            calibration, builder.chosen, builder.statistics, split.fit, classes, recipe, self.memory
        )
        if not recipe.searches:
            if recipe.drop_blocks and recipe.budget is not None:
                builder.find_depth(recipe.budget, split.fit)
            builder.progress.doing("builds the network")
            pruned = builder.distilled(builder.build(recipe.budget))
            return judge(builder, pruned, split.certify, goal)
        # What chose the size may repair it; what certifies may not.
        builder.rows = np.sort(np.concatenate((split.fit, split.choose)))
        return search(builder, split, goal)

    def _chosen(self, calibration: Calibration) -> list[ChannelGroup]:
        """The groups that may lose channels, if they are worth it."""
        within, options = self._layers_from(calibration), self._component("options")
        chosen = sliceable(calibration.groups, within)
        self.sliceable_share_ = check_sliceable(
            calibration, chosen, within, options.allow_unsliceable
        )
        return chosen

    def _adopt(self, judged: Judged, calibration: Calibration) -> None:
        """Make a network the fitted one, and write down what is known of it."""
        pruned, certificate = judged.pruned, judged.certificate
        self.model_ = of_torch_alone(pruned.model)
        self.scores_, self.repair_error_ = pruned.scores, pruned.repair_error
        self.support_ = {k: v for k, v in pruned.support.items() if k != calibration.output}
        widths = {
            name: m.weight.shape[0]
            for name, m in calibration.graph.named_modules()
            if name in self.support_
        }
        self.ratios_ = {
            layer: 1 - len(kept) / widths[layer] for layer, kept in self.support_.items()
        }
        self.cost_ratio_ = pruned.cost_ratio
        self.accuracy_drop_ = judged.drop
        self.certified_, self.certified_drop_ = False, math.nan
        if certificate is not None and certificate.certified:
            self.certified_, self.certified_drop_ = True, certificate.bound
        left = set(layer_names(pruned.model))
        self.dropped_layers_ = [n for n in layer_names(calibration.graph) if n not in left]
        if judged.tried:
            self.search_results_ = judged.tried
        if pruned.distillation:
            self.distillation_losses_ = list(pruned.distillation)
        self.outputs_ = calibration.table.outputs
        self._output = feature_layer(calibration.graph, calibration.output)

    def _warn(self, judged: Judged, goal: Goal) -> None:
        """Say, once, where the promise was not kept or could not be shown."""
        certificate, limit = judged.certificate, f"max_accuracy_drop={goal.max_accuracy_drop:g}"
        n = 0 if certificate is None else certificate.n_images
        if judged.is_base:
            text = (
                f"Nothing was removed: no smaller network that was tried keeps within {limit}, and "
                "model_ is the base. More calibration samples, or a larger limit, allow a smaller "
                "one."
            )
        elif certificate is None or n == 0:
            if not self._component("options").validation_fraction:
                return  # nobody asked
            text = (
                f"No sample could be held out that chose nothing, so that it is not known what is "
                f"lost, and {limit} is not certified. Give a trained model, and more samples of "
                "each class."
            )
        elif not goal.met_by(judged.drop):
            text = (
                f"On {n} held-out samples the smaller network loses {judged.drop:.1%} of "
                f"accuracy, more than {limit}."
            )
        elif not self.certified_:
            needed = certificate.images_needed
            more = "" if needed is None else f"; about {needed} would show it"
            chosen = self.budget is None and self.schedule in ("global", "iterative")
            which = "the best by an estimate" if chosen else "what was asked for"
            text = (
                f"{n} held-out samples cannot show, with confidence {goal.confidence:g}, that "
                f"{limit} is kept{more}. The smaller network is {which}: {judged.drop:.1%} lost on "
                "them."
            )
        else:
            return
        warn(text, PromiseWarning)

    def _calibration(self, X: Any, y: Any, sample_weight: Any, recipe: Recipe) -> Calibration:
        """Everything that ``fit`` is given, checked and matched."""
        fraction = self._component("options").validation_fraction
        # A default network is not trained on what is held out.
        held_out = fraction if self.classes is None and fraction else None
        if y is None and self.model is not None:
            if recipe.criterion.needs & {"y", "taylor"}:
                raise ValueError(
                    f"criterion={recipe.criterion.name!r} needs labels, but y is None. Pass y, or "
                    "choose a criterion that needs none, such as 'obs' or 'l1'."
                )
        calibration = self._calibrate(
            X, y, self.classes, sample_weight, held_out, unlabelled=y is None
        )
        recipe.check_weights(calibration.weight)
        return calibration

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
        kind = torch.promote_types(batcher.dtype, torch.float32)
        answers = self._run(lambda x: torch.softmax(model(x), 1, dtype=kind), batcher(X), X)
        return self._as_wanted(answers, X)

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
        batcher = self._batcher(self.model_)
        with torch.inference_mode():
            rows = one_row_each(features, batcher.at(X, slice(0, 1)))
        answers = self._run(lambda x: pool(rows(features(x)), 1), batcher(X), X)
        return self._as_wanted(answers, X, X.dtype in (np.float64, torch.float64))

    @on_host_by_default()
    def report(
        self, X: Any, y: Any = None, *, latency_batch: int | None = None, repeats: int = 15
    ) -> PruningReport:
        """Compare the base network and the smaller one on samples that ``fit`` has not seen.

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
        PruningReport
            ``print`` it for a table: accuracy with an interval, multiplications, parameters and
            time, and whether the promise was kept here.

        Examples
        --------
        >>> from sklearn.datasets import load_digits
        >>> from sinfkit import DCSPruner
        >>> X, y = load_digits(return_X_y=True)
        >>> pruner = DCSPruner(budget=0.5, random_state=0).fit(X[:1000], y[:1000])
        >>> report = pruner.report(X[1000:], y[1000:], repeats=0)
        >>> report.macs / report.base_macs <= 0.5
        True
        """
        check_is_fitted(self)
        check_integer("latency_batch", latency_batch, optional=True)
        check_integer("repeats", repeats, low=0)
        X, y = with_labels(X, y)
        X = validate_X(self, X, reset=False)
        return make_pruning_report(
            self.model_,
            self._base(),
            self._batcher(self.model_),
            X,
            encode(validate_y(y, len(X)), self.classes_),
            self.outputs_,
            promise=promise_of(self),
            distilled_epochs=len(getattr(self, "distillation_losses_", ())),
            latency_batch=min(latency_batch or self.batch_size, len(X)),
            repeats=repeats,
        )

    @property
    def _n_features_out(self) -> int:
        """Width of `transform`, which `get_feature_names_out` asks for."""
        return int(dict(self.model_.named_modules())[self._output].weight.shape[1])

    def _split(self, calibration: Calibration, recipe: Recipe, goal: Goal, labelled: bool) -> Split:
        """Which samples fit, choose and certify."""
        index = np.flatnonzero(calibration.y_encoded >= 0)
        # Without labels there are no classes to divide by.
        y = calibration.y_encoded[index] if labelled else np.zeros(len(index), dtype=np.int64)
        split = split_samples(
            y,
            index,
            self._component("options").validation_fraction,
            goal if recipe.searches or recipe.schedule == "iterative" else None,
            calibration.seed,
            widen=self.model is not None,
        )
        if self.model is None and self.classes is not None:
            # The default network was trained on all samples.
            split = replace(split, certify=split.certify[:0])
        return split

    def _layers_from(self, calibration: Calibration) -> list[str]:
        """Names of the layers from `first_layer` on, the output layer among the consumers."""
        names, first = layer_names(calibration.graph), self._component("options").first_layer
        if first is None:
            return names
        if not isinstance(first, str):
            raise TypeError(f"options.first_layer must be a name, got {type(first).__name__}.")
        with naming("options.first_layer"):
            return names[names.index(find_layer(calibration.graph, first)) :]

    @property
    def n_jobs(self) -> int | None:  # type: ignore[override]
        """Workers that predict, see `PruningOptions`."""
        options: PruningOptions = self._component("options")
        return options.n_jobs

    @property
    def memory(self) -> Any:
        """Where statistics and scores are cached, see `PruningOptions`."""
        return self._component("options").memory


def recipe_of(pruner: DCSPruner) -> Recipe:
    """The recipe that a pruner's parameters make, checked; before anything costly."""
    options = pruner._component("options")
    if not isinstance(options, PruningOptions):
        raise TypeError(f"options must be a PruningOptions or None, got {type(options).__name__}.")
    with nested("options", options.get_params()):
        return _recipe(pruner, options)


def _recipe(pruner: DCSPruner, options: PruningOptions) -> Recipe:
    """`recipe_of`, with errors that name an option alone."""
    check_number("max_accuracy_drop", pruner.max_accuracy_drop, "[0, 1]")
    check_number("confidence", pruner.confidence, "(0, 1)")
    check_number("validation_fraction", options.validation_fraction, "[0, 1)")
    check_flag("allow_unsliceable", options.allow_unsliceable)
    searches = pruner.budget is None
    recipe = Recipe(
        criterion=pruner.criterion,
        schedule=pruner.schedule,
        pruning_ratios=pruner.pruning_ratios,
        budget=pruner.budget,
        budget_unit=options.budget_unit,
        max_ratio=(0.95 if searches else 0.9) if options.max_ratio is None else options.max_ratio,
        round_to=options.round_to,
        drop_blocks=options.drop_blocks,
        penalty=options.penalty,
        pool_size=options.pool_size,
        repair=pruner.repair,
        repair_samples=options.repair_samples,
        distill=as_distillation(pruner.distill),
    )
    if options.validation_fraction == 0 and (recipe.searches or recipe.schedule == "iterative"):
        raise ValueError(
            "options.validation_fraction must be above 0 where a size is searched, got 0."
        )
    _check_effects(pruner, options, recipe)
    return recipe


def _check_effects(pruner: DCSPruner, options: PruningOptions, recipe: Recipe) -> None:
    """Raise for a parameter that was set and has no effect with the others given."""
    by_depth = recipe.schedule in ("linear", "geometric", "uniform")
    budgeted, needs = recipe.schedule == "global", recipe.criterion.needs
    for name, is_set, has_effect in (
        ("pruning_ratios", tuple(pruner.pruning_ratios) != (0.1, 0.5), by_depth),
        ("options.budget_unit", options.budget_unit != "macs", budgeted),
        ("options.max_ratio", options.max_ratio is not None, budgeted),
        ("options.drop_blocks", not options.drop_blocks, budgeted),
    ):
        if is_set and not has_effect:
            raise ValueError(f"{name} has no effect with schedule={recipe.schedule!r}.")
    for name, is_set, has_effect in (
        ("options.penalty", options.penalty != 3.0, bool(recipe.options)),
        (
            "options.pool_size",
            options.pool_size != 1,
            bool(needs & {"features", "consumer_features"}),
        ),
    ):
        if is_set and not has_effect:
            raise ValueError(f"{name} has no effect with criterion={recipe.criterion.name!r}.")
