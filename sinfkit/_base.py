"""What the three estimators share: fitting as a whole or not at all, pickling, preparing data."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import joblib
import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from torch import fx, nn
from tqdm.auto import tqdm

from ._device import loaded_device, resolve_device
from ._packing import Borrowed, Packed, borrow, pack
from ._validation import (
    Batcher,
    ClassTable,
    Images,
    check_channels,
    match_classes,
    validate_X,
    validate_y,
    warn_if_mismatched,
)
from ._versions import versions, warn_of_versions
from .frozen import FrozenModel, as_frozen
from .graph import output_layer, trace
from .surgery import ChannelGroup, find_groups

Fit = TypeVar("Fit", bound=Callable[..., Any])
T = TypeVar("T")


def all_or_nothing(fit: Fit) -> Fit:
    """Make a ``fit`` method change its estimator only when it succeeds.

    The method runs on a blank twin that has the parameters alone; its attributes replace the
    estimator's at the very end.  An error or Ctrl-C therefore leaves what was fitted before.
    """

    @functools.wraps(fit)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = self._get_param_names()
        twin = object.__new__(type(self))
        twin.__dict__.update({k: v for k, v in self.__dict__.items() if k in names})
        fit(twin, *args, **kwargs)
        self.__dict__.update(twin.__dict__)
        for stale in self.__dict__.keys() - twin.__dict__.keys():
            if stale.endswith("_") and not stale.startswith("_"):
                del self.__dict__[stale]
        return self

    return cast(Fit, wrapper)


@dataclass
class Calibration:
    """A base network and the samples it is studied on, checked and matched.

    Attributes
    ----------
    frozen : FrozenModel
    graph : GraphModule
        The traced network on `batcher.device`; it shares the frozen weights.
    output : str
        Name of the output layer.
    X : ndarray or Tensor of shape (n_samples, ...)
    codes : ndarray of shape (n_samples,)
        Class of each sample as a position in `table.classes`; -1 if it is none of them.
    table : ClassTable
    n_outputs : int
    batcher : Batcher
    example : Tensor of shape (1, ...)
        One normalised sample.
    seed : int
    """

    frozen: FrozenModel
    graph: fx.GraphModule
    output: str
    X: Images
    codes: np.ndarray
    table: ClassTable
    n_outputs: int
    batcher: Batcher
    example: torch.Tensor
    seed: int

    @functools.cached_property
    def key(self) -> tuple[str, ...]:
        """Tells network, samples and batches apart from others, for caches."""
        return (
            self.frozen.digest,
            joblib.hash(self.X),
            str(self.batcher.device),
            str(self.batcher.batch_size),
        )

    @functools.cached_property
    def groups(self) -> list[ChannelGroup]:
        """The network's coupled channels, in forward order."""
        return find_groups(self.graph, self.example, self.output)


class TorchEstimator(BaseEstimator):
    """Base class of the estimators: device, pickling, calibration data."""

    model: Any
    model_classes: Any
    batch_size: int
    device: Any
    random_state: Any
    verbose: int

    def _calibrate(self, X: Any, y: Any, classes: Any = None) -> Calibration:
        """Validate everything that ``fit`` is given, and trace the network."""
        if not isinstance(self.batch_size, (int, np.integer)) or self.batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {self.batch_size!r}.")
        device = resolve_device(self.device)
        frozen = None if self.model is None else as_frozen(self.model)
        X = validate_X(
            self, X, reset=True, input_shape=None if frozen is None else frozen.input_shape
        )
        check_channels(X)
        y = validate_y(y, len(X))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if frozen is None:
            if self.model_classes is not None:
                raise ValueError(
                    "model_classes describes the outputs of `model`, but model is None."
                )
            frozen = _train_default(X, y, device, seed, self.verbose)
        module = frozen.module(device)
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        batcher = Batcher(frozen, device, dtype, int(self.batch_size))
        check_normalisation(frozen, X)
        example = batcher.normalise(batcher.load(X[:1]))
        n_outputs = _n_outputs(module, example)
        table = match_classes(y, n_outputs, self.model_classes, classes)
        self.input_shape_ = tuple(X.shape[1:])
        self.classes_ = table.classes
        self.device_ = device
        self.base_model_ = frozen
        graph = trace(module)
        return Calibration(
            frozen,
            graph,
            output_layer(graph, n_outputs),
            X,
            table.encode(y),
            table,
            n_outputs,
            batcher,
            example,
            seed,
        )

    def _check_base(self, logits: torch.Tensor, calibration: Calibration) -> None:
        """Refuse outputs that are not finite; warn where outputs and labels disagree.

        Parameters
        ----------
        logits : Tensor of shape (n_samples, n_outputs)
            The base's outputs for all of `calibration.X`.
        """
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                "The model's output holds NaN or infinity on the calibration samples. Check the "
                "normalisation (mean, std) and the scale of X."
            )
        known = calibration.codes >= 0
        columns = torch.as_tensor(calibration.table.outputs)
        answers = logits[torch.as_tensor(known)][:, columns].argmax(1).cpu().numpy()
        accuracy = float(np.mean(answers == calibration.codes[known]))
        warn_if_mismatched(accuracy, len(calibration.table.classes), int(known.sum()))

    def _batcher(self, module: nn.Module) -> Batcher:
        """Batches for prediction with a fitted `module`."""
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        return Batcher(self.base_model_, self.device_, dtype, int(self.batch_size))

    def to(self, device: str | torch.device) -> Any:
        """Move the fitted networks to a device.

        Parameters
        ----------
        device : str or torch.device

        Returns
        -------
        self
        """
        self.device_ = resolve_device(device)
        for value in self.__dict__.values():
            if isinstance(value, nn.Module) and value is not self.model:
                value.to(self.device_)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to one file without code, for `sinfkit.load`.

        Parameters
        ----------
        path : path-like
            Whatever is there is replaced when the new file is complete, and not before.

        Raises
        ------
        NotFittedError
            If it is not fitted.
        TypeError
            If it holds something that is no data, such as a callable criterion.
        OSError
            If the file cannot be written; what was there is left as it was.
        """
        from .storage import save

        save(self, path)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state["_versions"] = versions()
        modules = {k: v for k, v in state.items() if isinstance(v, nn.Module)}
        for name in modules:
            del state[name]
        if modules:
            packed: Packed | Borrowed = (whole := pack(modules))
            base = state.get("base_model_")
            # Unsliced parts, and a `model` that is not frozen, hold the base's weights once more.
            # Where the base's own pickle only names a file, the others must do without it.
            if isinstance(base, FrozenModel) and getattr(base, "_source", None) is None:
                packed = borrow(whole, base._packed)
            state["_packed_modules"] = packed
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
        if isinstance(packed, Borrowed):
            packed = packed.complete(state["base_model_"]._packed)
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


def check_normalisation(frozen: FrozenModel, X: Images) -> None:
    """Raise if `mean` and `std` do not have one value per channel of `X`."""
    if frozen.mean is None or frozen.std is None:
        return
    widths = {len(frozen.mean), len(frozen.std)} - {1}
    if widths and widths != {int(X.shape[1])}:
        raise ValueError(
            f"FrozenModel has mean and std for {max(widths)} channels, but X has {X.shape[1]}."
        )


def progress(items: Iterable[T], description: str, verbose: int, total: int | None = None) -> Any:
    """Wrap an iterable in a progress bar if `verbose`, else return it as it is."""
    if not verbose:
        return items
    return tqdm(items, desc=description, total=total, leave=False)


def _n_outputs(module: nn.Module, example: torch.Tensor) -> int:
    """Width of the network's output; a ValueError where it cannot take the samples."""
    try:
        with torch.inference_mode():
            logits = module(example)
    except RuntimeError as error:
        raise ValueError(
            f"The model cannot take samples of shape {tuple(example.shape[1:])}: {error}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(
            f"The model must return one row of class scores per sample (a 2-D tensor), got {got}."
        )
    return int(logits.shape[1])


def _train_default(
    X: Images, y: np.ndarray, device: torch.device, seed: int, verbose: int
) -> FrozenModel:
    """Train the small default network on the calibration samples themselves."""
    from .models import default_network, train_network

    classes, codes = np.unique(y, return_inverse=True)
    double = X.dtype in (np.float64, torch.float64) and X.ndim == 2
    data = X.cpu().numpy() if isinstance(X, torch.Tensor) else X
    scale = 255.0 if data.dtype == np.uint8 else 1.0
    axes = (0,) if data.ndim == 2 else (0, 2, 3)
    mean = data.mean(axis=axes, dtype=np.float64) / scale
    std = data.std(axis=axes, dtype=np.float64) / scale
    std = np.where(std > 1e-12 * np.maximum(1.0, np.abs(mean)), std, 1.0)
    network = default_network(
        tuple(X.shape[1:]),
        len(classes),
        torch.float64 if double else torch.float32,
        random_state=seed,
    )
    # Small sets need more epochs for as many steps.
    epochs = int(np.clip(np.ceil(20_000 / len(codes)), 8, 60))
    trained = train_network(
        network,
        data,
        codes,
        epochs=epochs,
        mean=mean.tolist(),
        std=std.tolist(),
        device=device,
        random_state=seed,
        verbose=verbose,
    )
    return FrozenModel(trained, mean.tolist(), std.tolist())
