"""X and y: what the estimators accept, and in what shape it reaches the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn import get_config
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, column_or_1d, validate_data
from torch import Tensor, nn

from ..errors import ArgumentError, CalibrationWarning
from ..graph.nodes import CONVOLUTIONS
from ..graph.recording import output_of
from ..utils.device import is_out_of_memory
from ..utils.params import naming, shown, values_of, warn
from .images import Images, LazyImages, images_of, match_range, seen_range

Shape = tuple[int, ...]


def check_shape(shape: Shape, expected: Shape) -> None:
    """Raise unless samples of an X of `shape` are of the shape `expected`."""
    if shape[1:] == expected:
        return
    hint = shape_hint(shape, lambda sample: sample == expected)
    raise ArgumentError(
        f"X has shape {shape}, but the model takes samples of shape {expected}: "
        f"(n_samples, {', '.join(map(str, expected))}).{hint}",
        "X",
    )


def count_outputs(module: nn.Module, samples: Tensor, shape: Shape) -> int:
    """Width of a network's output; a ValueError where it cannot take samples of an X of `shape`."""
    try:
        with torch.inference_mode():
            logits = output_of(module, samples)
    except Exception as error:  # a network may raise what it likes
        if is_out_of_memory(error):
            raise
        hint = shape_hint(shape, lambda sample: _accepts(module, samples, sample))
        whole = samples.long()
        if not hint and bool((whole == samples).all()) and _accepts(module, whole, shape[1:]):
            hint = (
                f" It takes integers, but samples are given to it as {samples.dtype}: let its "
                "forward begin with x = x.long()."
            )
        if (
            not hint
            and len(shape) == 2
            and any(isinstance(m, CONVOLUTIONS) for m in module.modules())
        ):
            hint = (
                " Of images that were flattened say the shape: FrozenModel(network, "
                "input_shape=(channels, height, width))."
            )
        raise ValueError(
            f"The model cannot take samples of shape {shape[1:]}.{hint or f' It says: {error}'}"
        ) from error
    if isinstance(logits, Tensor) and logits.shape == (len(samples),):
        return 1
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(samples):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"The model must return one row of class scores per sample (a 2-D tensor), got {got}."
            + ("" if isinstance(logits, Tensor) else _PICK)
        )
    if logits.dtype == torch.bool or logits.is_complex():
        raise ValueError(
            f"The model must return class scores that are real numbers, got {logits.dtype}."
        )
    return int(logits.shape[1])


_PICK = (
    " Of several outputs it takes the one named 'logits'; wrap the model in a module whose forward "
    "returns the scores: return self.model(x)[0], say."
)


def _accepts(module: nn.Module, samples: Tensor, shape: Shape) -> bool:
    """Whether a network can take samples of another shape."""
    try:
        with torch.inference_mode():
            output_of(module, samples.new_zeros((1, *shape)))
    except Exception:  # a network may raise what it likes
        return False
    return True


def shape_hint(shape: Shape, accepts: Callable[[Shape], bool]) -> str:
    """What makes an X of `shape` one of samples whose shape `accepts` is true for; or nothing."""
    for sample, text in _candidates(shape):
        if accepts(sample):
            return f" {text}"
    return ""


def _candidates(shape: Shape) -> list[tuple[Shape, str]]:
    """Shapes that samples would have if X were changed, and how to change it."""
    found: list[tuple[Shape, str]] = [(shape, "X is one sample: pass X[None].")]
    if len(shape) == 2:
        found.append(((1, *shape), "X is one grey image: pass X[None, None]."))
    if len(shape) == 3:
        n, height, width = shape
        found += [
            ((1, height, width), "These are grey images: pass X[:, None]."),
            (
                (width, n, height),
                "X looks like one image in HWC (channels last): pass X.transpose(2, 0, 1)[None].",
            ),
        ]
    if len(shape) == 4:
        _, first, second, last = shape
        found.append(
            (
                (last, first, second),
                "X looks like NHWC (channels last); pass NCHW: X.transpose(0, 3, 1, 2).",
            )
        )
        if first == 1:
            wide = "These are grey images: pass X.repeat(3, axis=1), as the model was trained."
            found.append(((3, second, last), wide))
        if first == 4:
            found.append(((3, second, last), "Leave the fourth channel out: pass X[:, :3]."))
        if first == 3:
            grey = "The model takes grey images: pass X.mean(axis=1, keepdims=True)."
            found.append(((1, second, last), grey))
    return found


def looks_like_nhwc(shape: Shape) -> bool:
    """Whether images are likely to be NHWC, where no network can tell."""
    if len(shape) != 4:
        return False
    _, first, second, last = shape
    return last in (1, 3, 4) and first not in (1, 3, 4) and min(first, second) >= 8


LARGEST_WEIGHT = 1e30  # whose sums are numbers still, in single precision as well


def validate_X(
    estimator: Any,
    X: Any,
    *,
    reset: bool,
    input_shape: tuple[int, ...] | None = None,
    any_shape: bool = False,
    finite: bool = True,
) -> Images:
    """Check samples and give them the shape and scale that the network takes.

    In ``fit`` (`reset`) `estimator` receives `n_features_in_` and, for images, `input_range_`;
    later X is compared with them.  `input_shape` lets flattened `X` through; `any_shape` those that
    are neither tables nor 2-D images.  Where not `finite`, the caller looks at tensors' values.
    """
    expected = input_shape if reset else estimator.input_shape_
    X = images_of(X)
    if isinstance(X, LazyImages):
        return _validate_lazy(estimator, X, expected, reset=reset, any_shape=any_shape)
    if isinstance(X, (list, tuple)):
        with naming("X"):
            X = np.asarray(X)
    elif not isinstance(X, torch.Tensor):
        X = values_of("X", X)
    shape = tuple(getattr(X, "shape", ()))
    if expected is not None and len(expected) > 1:
        if not _flattened(shape, expected):
            check_shape(shape, tuple(expected))
            if not reset and estimator.n_features_in_ != shape[1]:  # which saw them flattened
                X = X.reshape(shape[0], -1)
                shape = tuple(X.shape)
        elif not reset and estimator.n_features_in_ != shape[1]:
            sizes = ", ".join(map(str, expected))
            raise ArgumentError(
                f"X has shape {shape}, but in fit its samples had shape {tuple(expected)}. Pass "
                f"X.reshape(-1, {sizes}).",
                "X",
            )
    dtype = getattr(X, "dtype", None)
    whole = dtype not in (np.uint8, torch.uint8) and _is_integral(dtype)
    if isinstance(X, torch.Tensor):
        checked: Images = _validate_tensor(estimator, X, reset=reset, finite=finite)
    else:
        with naming("X"):
            checked = check_array(
                X,
                allow_nd=True,
                dtype=[np.float64, np.float32, np.uint8],
                estimator=estimator,
                input_name="X",
            )
        validate_data(estimator, X, reset=reset, skip_check_array=True)  # names and widths
    if expected is not None and _flattened(shape, expected):
        checked = checked.reshape(len(checked), *expected)
    if expected is not None:
        check_shape(tuple(checked.shape), tuple(expected))
    elif not any_shape:
        _check_ndim(tuple(checked.shape))
    if checked.ndim > 2:
        if reset:
            estimator.input_range_ = seen_range(checked)
        elif hasattr(estimator, "input_range_"):
            checked = match_range(
                checked,
                estimator.input_range_,
                whole=whole,
                look=finite and not get_config()["assume_finite"],
            )
    return checked


def _validate_lazy(
    estimator: Any,
    X: LazyImages,
    expected: tuple[int, ...] | None,
    *,
    reset: bool,
    any_shape: bool,
) -> Any:
    """`validate_X` for images that are not read yet: values are checked batch by batch."""
    if expected is not None:
        check_shape(X.shape, tuple(expected))
    elif not any_shape:
        _check_ndim(X.shape)
    if reset:
        estimator.n_features_in_ = X.shape[1]
        if X.ndim > 2:
            estimator.input_range_ = seen_range(X)
    elif hasattr(estimator, "input_range_"):
        seen, whole = estimator.input_range_, X.whole
        return X.changed(lambda batch: match_range(batch, seen, whole=whole))
    return X


def _check_ndim(shape: tuple[int, ...]) -> None:
    """Raise unless samples are rows of a table or 2-D images."""
    if len(shape) not in (2, 4):
        raise ValueError(
            f"X must have shape (n_samples, channels, height, width) or (n_samples, n_features), "
            f"not {shape}. For one image use X[None], for grey ones X[:, None]."
        )


def _flattened(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether rows of an X of that shape are samples laid out flat."""
    return len(shape) == 2 and len(expected) > 1 and shape[1] == int(np.prod(expected))


def _is_integral(dtype: Any) -> bool:
    """Whether a type of NumPy or torch counts in whole numbers."""
    if isinstance(dtype, torch.dtype):
        return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    return getattr(dtype, "kind", "") in ("i", "u")


def validate_y(y: Any, n_samples: int) -> np.ndarray:
    """Check labels: one class label per sample, as a 1-D NumPy array.

    Shapes: `y` (n_samples,).
    """
    if y is None:
        raise ValueError(
            "requires y to be passed, but the target y is None: class labels are needed."
        )
    y = values_of("y", y)
    shape: Shape = getattr(y, "shape", ())
    if len(shape) == 2 and shape[1] > 1:
        raise ArgumentError(
            f"y must hold one label per sample, got shape {shape}. Of one row of zeros and a one "
            "per sample pass y.argmax(1).",
            "y",
        )
    with naming("y"):
        y = column_or_1d(y, warn=True)
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError("Input y contains NaN or infinity.")
    if y.dtype.kind in "mM":
        raise ValueError(f"y must hold class labels, got dates or times ({y.dtype}).")
    if y.dtype == object and not all(isinstance(label, str) for label in y):
        kinds = sorted({type(label).__name__ for label in y})
        raise ArgumentError(
            f"Unknown label type: y must be an array of integers or strings, got objects "
            f"({', '.join(kinds)}). Pass y.astype(int) or y.astype(str), without what is no label.",
            "y",
        )
    with naming("y"):
        check_classification_targets(y)
        np.unique(y)  # labels that have no order are none
    if len(y) != n_samples:
        raise ValueError(f"X has {n_samples} samples, but y has {len(y)} labels.")
    return y


def validate_weight(sample_weight: Any, n_samples: int, name: str = "sample_weight") -> np.ndarray:
    """Check how many times each sample counts.

    Shapes: `sample_weight` (n_samples,), returns (n_samples,).
    """
    if sample_weight is None:
        return np.ones(n_samples)
    with naming(name):
        sample_weight = np.asarray(values_of(name, sample_weight))
    if sample_weight.ndim == 0:
        raise ValueError(
            f"{name} must hold one number for each of the {n_samples} samples, got "
            f"{shown(sample_weight.item())}."
        )
    with naming(name):
        weight = check_array(
            sample_weight, ensure_2d=False, allow_nd=True, dtype=np.float64, input_name=name
        )
    if weight.shape != (n_samples,):
        raise ValueError(
            f"{name} must hold one number for each of the {n_samples} samples, got shape "
            f"{weight.shape}."
        )
    if (weight < 0).any():
        raise ValueError(f"{name} must not be negative, but its smallest value is {weight.min()}.")
    if weight.max() > LARGEST_WEIGHT:
        raise ValueError(f"{name} must be at most {LARGEST_WEIGHT:g}, but holds {weight.max()}.")
    if not weight.any():
        raise ValueError(f"{name} holds only zeros; at least one sample weight must not be zero.")
    return weight


def without_zeros(
    X: Images, y: np.ndarray, weight: np.ndarray
) -> tuple[Images, np.ndarray, np.ndarray]:
    """Leave samples of weight 0 out."""
    if weight.all():
        return X, y, weight
    kept = np.flatnonzero(weight)
    if isinstance(X, LazyImages):
        return X.subset(kept), y[kept], weight[kept]
    rows = torch.as_tensor(kept, device=X.device) if isinstance(X, torch.Tensor) else kept
    return X[rows], y[kept], weight[kept]


def mean(values: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Mean over samples, of which some may count more than others."""
    return float(np.average(values, weights=weight))


def _validate_tensor(estimator: Any, X: torch.Tensor, *, reset: bool, finite: bool) -> torch.Tensor:
    """`validate_data` for tensors, which stay on their device."""
    X = X.detach()
    if X.layout != torch.strided or X.is_quantized or X.device.type == "meta":
        raise TypeError("X must be a dense tensor that holds its values.")
    if X.ndim < 2:
        raise ValueError(f"X must have at least 2 dimensions, got shape {tuple(X.shape)}.")
    if len(X) == 0:
        raise ValueError(f"Found X with 0 samples (shape={tuple(X.shape)}); at least 1 is needed.")
    if X.numel() == 0:
        raise ValueError(f"X has samples without values, shape {tuple(X.shape)}.")
    if X.is_complex():
        raise ValueError("Complex data not supported: X must be real.")
    if X.dtype not in (torch.uint8, torch.float32, torch.float64):
        X = X.to(torch.float32 if X.is_floating_point() else torch.float64)
    finite = finite and not get_config()["assume_finite"]
    if finite and X.is_floating_point() and not bool(torch.isfinite(X).all()):
        raise ValueError(f"X contains NaN or infinity, as {type(estimator).__name__} cannot use.")
    if reset:
        estimator.n_features_in_ = int(X.shape[1])
    elif X.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {X.shape[1]} features, but {type(estimator).__name__} is expecting "
            f"{estimator.n_features_in_} features as input."
        )
    return X


def check_answers(answers: torch.Tensor) -> torch.Tensor:
    """Return the answers for `X`, or raise where they are not numbers."""
    finite = torch.isfinite(answers).flatten(1).all(1)
    if not bool(finite.all()):
        raise ValueError(
            f"The network's answer for sample {int((~finite).nonzero()[0, 0])} of X is NaN or "
            "infinite. Look for very large values in X."
        )
    return answers


def hold_out(
    codes: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Split calibration samples class by class into a fitting part and a held-out part.

    Shapes: `codes` (n_samples,).
    """
    counts = np.bincount(codes)
    if counts[counts > 0].min() < 2:
        warn(
            "A class has a single calibration sample, so that none can be held out: the same "
            "samples fit and validate. Give at least two samples of each class.",
            CalibrationWarning,
        )
        everything = np.arange(len(codes))
        return everything, everything
    held = []
    for k in np.flatnonzero(counts):
        rows = rng.permutation(np.flatnonzero(codes == k))
        n = int(np.clip(round(fraction * len(rows)), 1, len(rows) - 1))
        held.append(rows[:n])
    index = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(codes)), index), index
