"""What the three estimators share: fitting as a whole or not at all, pickling, preparing data."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from sklearn import get_config
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, check_memory
from torch import nn

from .data.calibration import (
    Batcher,
    Calibration,
    check_order,
    check_scale,
    match_classes,
    warn_if_mismatched,
)
from .data.images import Images, check_normalisation, spread, with_labels
from .data.validation import (
    check_answers,
    count_outputs,
    hold_out,
    looks_like_nhwc,
    mean,
    validate_weight,
    validate_X,
    validate_y,
    without_zeros,
)
from .frozen import FrozenModel, as_frozen, baked, describe
from .graph.cuts import output_layer
from .graph.heads import SINGLE, logits_graph, with_logits
from .graph.recording import output_of
from .graph.tracing import check_traced, trace
from .utils.device import (
    float_type,
    in_pieces,
    loaded_device,
    on_host_by_default,
    resolve_device,
)
from .utils.params import check_integer, check_jobs, check_verbose, naming, nested, once_each
from .utils.pickling import pack, versions, warn_of_versions
from .zoo.networks import default_network
from .zoo.training import train_network

Fit = TypeVar("Fit", bound=Callable[..., Any])
_FEW = 4  # samples on which a network is tried
_MANY = 256  # those that tell a single logit from a probability
_MANY_WRONG = 0.1  # of the answers: then another scale of the samples is tried
_TO_PREDICT = ("batch_size", "device", "n_jobs")  # parameters that prediction reads


def all_or_nothing(fit: Fit) -> Fit:
    """Make a ``fit`` method change its estimator only when it succeeds.

    The method runs on a blank twin that has the parameters alone; its attributes replace the
    estimator's at the very end.  An error or Ctrl-C therefore leaves what was fitted before.
    """

    @functools.wraps(fit)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        twin = type(self)(**self.get_params(deep=False))
        # Whoever makes a layer of torch draws its first weights from the global generator.
        with once_each(), torch.random.fork_rng(devices=[]), on_host_by_default():
            fit(twin, *args, **kwargs)
        kept = {k: v for k, v in self.__dict__.items() if not k.endswith("_") or k.startswith("_")}
        # One assignment: Ctrl-C comes before it or after it.
        self.__dict__ = kept | twin.__dict__
        return self

    return cast(Fit, wrapper)


class TorchClassifierMixin(ClassifierMixin):
    """scikit-learn's mixin, with labels, and a score whose errors say what they are about."""

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
        best = self.predict_proba(X).argmax(1)
        if isinstance(best, torch.Tensor):
            if self.classes_.dtype.kind in "biuf":
                return torch.from_numpy(self.classes_.copy()).to(best.device)[best]
            best = best.cpu().numpy()
        return self.classes_[best]

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Compute the share of samples whose class is predicted.

        Shapes: `X` (n_samples, ...), `y` (n_samples,), `sample_weight` (n_samples,).
        """
        check_is_fitted(self)
        X, y = with_labels(X, y)
        predicted = self.predict(X)
        if isinstance(predicted, torch.Tensor):
            predicted = predicted.cpu().numpy()
        y = validate_y(y, len(predicted))
        weight = validate_weight(sample_weight, len(predicted))
        with naming("y"):
            return float(accuracy_score(y, predicted, sample_weight=weight))


class TorchEstimator(BaseEstimator):
    """Base class of the estimators: device, pickling, calibration data."""

    model: Any
    model_classes: Any
    batch_size: int
    device: Any
    n_jobs: int | None
    memory: Any
    random_state: Any
    verbose: int
    base_model_: FrozenModel
    _ending: str  # of the base, see `graph.heads`

    # What stands in for parameters that are None and hold an estimator: name to factory.
    _default_components: ClassVar[Mapping[str, Callable[[], BaseEstimator]]] = {}

    # What ``fit`` found out and no prediction needs.
    _only_from_fit: ClassVar[frozenset[str]] = frozenset()

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Get the parameters; where a nested estimator is None, those of its default as well."""
        params: dict[str, Any] = super().get_params(deep=deep)
        if deep:
            for name, factory in self._default_components.items():
                if params[name] is None:
                    inner = factory().get_params()
                    params.update({f"{name}__{key}": value for key, value in inner.items()})
        return params

    def set_params(self, **params: Any) -> Any:
        """Set parameters, those of nested estimators as ``name__parameter``."""
        inner: dict[str, dict[str, Any]] = {}
        for key in list(params):
            name, _, parameter = key.partition("__")
            if parameter and name in self._default_components:
                inner.setdefault(name, {})[parameter] = params.pop(key)
        super().set_params(**params)
        for name, values in inner.items():
            component = self._component(name)
            before = component.get_params()
            component.set_params(**values)
            if any(not _same(before[key], value) for key, value in values.items()):
                setattr(self, name, component)
        return self

    def _component(self, name: str) -> Any:
        """Return the nested estimator `name`, or a new default where it is None."""
        given = getattr(self, name)
        return self._default_components[name]() if given is None else given

    def _calibrate(
        self,
        X: Any,
        y: Any,
        classes: Any = None,
        sample_weight: Any = None,
        held_out: float | None = None,
        *,
        unlabelled: bool = False,
    ) -> Calibration:
        """Validate everything that ``fit`` is given, and trace the network.

        Where `unlabelled`, the labels are the base's own answers.

        Samples of weight 0 are left out here, so that nothing behind knows of them.  A network that
        is trained here does not see the samples that ``hold_out`` gives for the share `held_out`
        and a generator of the calibration's seed.
        """
        self._check_shared()
        device = resolve_device(self.device)
        frozen = None if self.model is None else as_frozen(self.model)
        X = validate_X(
            self,
            X,
            reset=True,
            input_shape=None if frozen is None else frozen.input_shape,
            any_shape=frozen is not None,
        )
        if frozen is None and looks_like_nhwc(tuple(X.shape)):
            raise ValueError(
                f"X has shape {tuple(X.shape)}, which looks like NHWC (channels last). sinfkit "
                "takes NCHW: X.transpose(0, 3, 1, 2)."
            )
        if unlabelled and frozen is not None:
            y = self._own_answers(frozen, X, device)
        y = validate_y(y, len(X))
        X, y, weight = without_zeros(X, y, validate_weight(sample_weight, len(X)))
        with naming("random_state"):
            seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if frozen is None:
            if self.model_classes is not None:
                raise ValueError(
                    "model_classes describes the outputs of `model`, but model is None."
                )
            rows = _unseen(y, held_out, seed)
            frozen = _train_default(X[rows], y[rows], device, seed, weight[rows])
        batcher, samples, n_outputs = self._tried(frozen, X, device)
        complete = not unlabelled or self.model is None
        table = match_classes(y, max(2, n_outputs), self.model_classes, classes, complete=complete)
        self.input_shape_ = tuple(X.shape[1:])
        self.classes_ = table.classes
        self.device_ = device
        self.base_model_ = frozen
        with naming("model"):
            module = frozen.module(device)
            graph = trace(module, samples[:1])
            check_traced(graph, module, samples, lambda: frozen.packed.unpack(device))
            self._ending = with_logits(graph, samples if n_outputs > 1 else _many(batcher, X))
            n_outputs = max(2, n_outputs)
            output = output_layer(graph, n_outputs)
        return Calibration(
            frozen,
            graph,
            self._ending,
            output,
            X,
            table.encode(y),
            table,
            n_outputs,
            batcher,
            samples[:1],
            seed,
            weight,
        )

    def _tried(
        self, frozen: FrozenModel, X: Images, device: torch.device
    ) -> tuple[Batcher, torch.Tensor, int]:
        """A network's batches, samples it was tried on, and its number of outputs."""
        check_normalisation(frozen, X)
        module = frozen.module(device)
        batcher = Batcher(frozen, device, float_type(module), int(self.batch_size))
        samples = batcher.normalise(batcher.load(spread(X, _FEW)))
        n_outputs = count_outputs(module, samples, tuple(X.shape))
        return batcher, samples, n_outputs

    def _own_answers(self, frozen: FrozenModel, X: Images, device: torch.device) -> np.ndarray:
        """The label that the base gives to each sample."""
        module = frozen.module(device)
        batcher, samples, n_outputs = self._tried(frozen, X, device)
        if n_outputs == 1:
            with naming("model"):
                module, n_outputs = trace(module, samples[:1]), 2
                with_logits(module, _many(batcher, X))
        with torch.inference_mode():
            rows = list(in_pieces(lambda x: output_of(module, x).argmax(1).cpu(), batcher(X)))
        labels = np.arange(n_outputs) if self.model_classes is None else self.model_classes
        return np.asarray(labels)[torch.cat(rows).numpy()]

    def _base(self) -> nn.Module:
        """The base, on `device_`; one of a single output as a graph with two."""
        module = self.base_model_.module(self.device_)
        if self._ending not in SINGLE:
            return module
        example = torch.zeros(
            (1, *self.input_shape_), dtype=float_type(module), device=self.device_
        )
        return logits_graph(module, example, self._ending)

    def _check_shared(self) -> None:
        """Raise for values of the parameters that all estimators have, before anything costly."""
        check_integer("batch_size", self.batch_size)
        check_verbose(self.verbose)
        own = self.get_params(deep=False)
        with nested("options", {"n_jobs", "memory"}.difference(own)):
            check_jobs(self.n_jobs)
            with naming("memory"):
                check_memory(self.memory)

    def _check_base(self, logits: torch.Tensor, calibration: Calibration) -> None:
        """Refuse outputs that are not finite; warn where outputs and labels disagree.

        Shapes: `logits` (n_samples, n_outputs).
        """
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                "The model's output holds NaN or infinity on the calibration samples. Check the "
                "normalisation (mean, std) and the scale of X."
            )
        known = calibration.y_encoded >= 0
        columns = torch.as_tensor(calibration.table.outputs)
        answers = logits[torch.as_tensor(known)][:, columns].argmax(1).cpu().numpy()
        check_order(calibration.table, answers, calibration.y_encoded[known])
        if (answers != calibration.y_encoded[known]).mean() > _MANY_WRONG:
            check_scale(calibration)
        accuracy = mean(answers == calibration.y_encoded[known], calibration.weights(known))
        warn_if_mismatched(accuracy, len(calibration.table.classes), int(known.sum()))

    def _batcher(self, module: nn.Module) -> Batcher:
        """Batches for prediction with a fitted `module`."""
        check_integer("batch_size", self.batch_size)
        return Batcher(self.base_model_, self.device_, float_type(module), int(self.batch_size))

    def to(self, device: str | torch.device) -> Any:
        """Move the fitted networks to a device."""
        check_is_fitted(self)
        self.device_ = resolve_device(device)
        for value in self.__dict__.values():
            if isinstance(value, nn.Module) and value is not self.model:
                value.to(self.device_)
        return self

    def _home(self, X: Any) -> torch.device:
        """Where answers for `X` go batch by batch: to the host, or where `X` is."""
        return X.device if answers_in_torch(X) else torch.device("cpu")

    def _run(
        self, network: Callable[..., torch.Tensor], batches: Iterable[torch.Tensor], X: Any
    ) -> torch.Tensor:
        """Answers for all batches of `X`, which must be numbers, where `_home` wants them."""
        home = self._home(X)
        with torch.inference_mode():
            rows = list(in_pieces(lambda x: network(x).to(home), batches))
        # Not in inference mode: what that makes may not be changed in place, as scikit-learn does.
        joined = torch.cat(rows)
        # What stays on a device is not looked at, as the host would have to wait for it.
        return joined if answers_in_torch(X) else check_answers(joined)

    def _as_wanted(self, answers: torch.Tensor, X: Any, double: bool | None = None) -> Any:
        """Answers as a tensor or an array, see `answers_in_torch`.

        `double` asks for float64 (True) or float32 (False).
        """
        if double is not None:
            answers = answers.to(torch.float64 if double else torch.float32)
        return answers if answers_in_torch(X) else answers.numpy()

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        return BaseEstimator.__repr__(self._for_display(), N_CHAR_MAX)

    def _for_prediction(self) -> Any:
        """A twin for a worker, with no more than prediction needs: not the base network."""
        params = self.get_params(deep=False)
        twin: Any = type(self)(**{k: params[k] for k in params if k in _TO_PREDICT})
        leave = self._only_from_fit.union(params)
        twin.__dict__.update({k: v for k, v in self.__dict__.items() if k not in leave})
        base = self.base_model_
        twin.base_model_ = SimpleNamespace(mean=base.mean, std=base.std)
        return twin

    def _for_display(self) -> BaseEstimator:
        """An estimator of the same name and parameters, but with one line for a module."""
        # Not of this class: scikit-learn breaks the lines of those that keep its own `__repr__`.
        kind = type(self)
        twin: Any = object.__new__(
            type(kind.__name__, (BaseEstimator,), {"__init__": kind.__init__})
        )
        for name, value in self.get_params(deep=False).items():
            if isinstance(value, TorchEstimator):
                value = value._for_display()
            elif isinstance(value, nn.Module):
                value = _Text(describe(value))
            setattr(twin, name, value)
        return cast(BaseEstimator, twin)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state["_versions"] = versions()
        modules = {k: baked(v) for k, v in state.items() if isinstance(v, nn.Module)}
        for name in modules:
            del state[name]
        if modules:
            state["_packed_modules"] = pack(modules)
        if "device_" in state:
            state["device_"] = str(state["device_"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        warn_of_versions(type(self).__name__, state.pop("_versions", {}))
        packed = state.pop("_packed_modules", None)
        device = state.get("device_")
        if device is not None:
            state["device_"] = device = loaded_device(device)
        if packed is not None:
            modules = packed.unpack("cpu")
            for name, module in modules.items():
                state[name] = module if name == "model" or device is None else module.to(device)
        super().__setstate__(state)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.one_d_labels = True
        tags.input_tags.two_d_array = True
        tags.input_tags.three_d_array = False
        return tags


def _same(a: Any, b: Any) -> bool:
    """Whether two parameters are equal; arrays, which compare item by item, only to themselves."""
    if a is b:
        return True
    same = type(a) is type(b) and a == b
    return isinstance(same, bool) and same


class _Text:
    """Something whose repr is a given text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def answers_in_torch(X: Any) -> bool:
    """Whether answers for `X` are tensors: it is one, and scikit-learn's array API dispatch is on.

    Without dispatch they are NumPy arrays, whatever `X` is.
    """
    return isinstance(X, torch.Tensor) and bool(get_config()["array_api_dispatch"])


def _many(batcher: Batcher, X: Images) -> torch.Tensor:
    """Samples enough to see on which side of a limit outputs lie, normalised."""
    return batcher.normalise(batcher.load(spread(X, min(batcher.batch_size, _MANY))))


def _unseen(y: np.ndarray, held_out: float | None, seed: int) -> np.ndarray | slice:
    """The samples that a network may be trained on."""
    if held_out is None:
        return slice(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whoever splits for good warns of classes too small
        codes = np.unique(y, return_inverse=True)[1]
        return hold_out(codes, held_out, np.random.default_rng(seed))[0]


def _train_default(
    X: Images,
    y: np.ndarray,
    device: torch.device,
    seed: int,
    weight: np.ndarray,
) -> FrozenModel:
    """Train the small default network on the calibration samples themselves."""
    classes, codes = np.unique(y, return_inverse=True)
    double = X.dtype in (np.float64, torch.float64) and X.ndim == 2
    network_type = torch.float64 if double else torch.float32
    data = X.cpu().numpy() if isinstance(X, torch.Tensor) else X
    scale = 255.0 if data.dtype == np.uint8 else 1.0
    axes = (0,) if data.ndim == 2 else (0, 2, 3)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = data.mean(axis=axes, dtype=np.float64) / scale
        std = data.std(axis=axes, dtype=np.float64) / scale
    if not np.isfinite(std).all() or np.abs(mean).max() > torch.finfo(network_type).max:
        raise ValueError("X holds values too large to compute with. Scale them down.")
    std = np.where(std > 1e-12 * np.maximum(1.0, np.abs(mean)), std, 1.0)
    network = default_network(tuple(X.shape[1:]), len(classes), network_type, random_state=seed)
    # Small sets need more epochs for as many steps.
    epochs = int(np.clip(np.ceil(20_000 / len(codes)), 8, 60))
    trained = train_network(
        network,
        data,
        codes,
        epochs=epochs,
        mean=mean.tolist(),
        std=std.tolist(),
        sample_weight=weight,
        device=device,
        random_state=seed,
    )
    return FrozenModel(trained, mean.tolist(), std.tolist())
