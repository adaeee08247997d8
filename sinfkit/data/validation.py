"""X and y: what the estimators accept, and how batches of it reach the network."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn import get_config
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, column_or_1d, validate_data

from ..frozen import FrozenModel
from ..utils.params import caller_level, naming, shown

__all__ = [
    "hold_out",
    "validate_weight",
    "validate_y",
]

Images = np.ndarray | torch.Tensor
LARGEST_WEIGHT = 1e30  # whose sums are numbers still, in single precision as well


def validate_X(
    estimator: Any,
    X: Any,
    *,
    reset: bool,
    input_shape: tuple[int, ...] | None = None,
    finite: bool = True,
) -> Images:
    """Check samples and give them the shape that the network takes.

    Parameters
    ----------
    estimator : BaseEstimator
        Receives `n_features_in_` and `input_shape_` where `reset` is true; is compared with them
        otherwise.
    X : array-like or Tensor of shape (n_samples, channels, height, width) or (n_samples, \
n_features)
        uint8 stays as it is; other integers become float64.
    reset : bool
        True in ``fit``.
    input_shape : tuple of int, optional
        Shape of one sample; lets flattened 2-D `X` through.
    finite : bool, default=True
        Whether tensors are searched for NaN and infinity here, for which the host waits for their
        device.  False: the caller does.

    Returns
    -------
    ndarray or Tensor of shape (n_samples, *input_shape)
        uint8, float32 or float64.

    Raises
    ------
    ValueError
        For a wrong shape, NaN or infinity, or no samples; the message names what and where.
    """
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
    expected = input_shape if reset else estimator.input_shape_
    if expected is not None and checked.ndim == 2 and len(expected) > 1:
        if checked.shape[1] != int(np.prod(expected)):
            raise ValueError(
                f"X has {checked.shape[1]} features per sample, but input_shape={expected} needs "
                f"{int(np.prod(expected))}."
            )
        checked = checked.reshape(len(checked), *expected)
    shape = tuple(checked.shape[1:])
    if checked.ndim not in (2, 4):
        raise ValueError(
            f"X must have shape (n_samples, channels, height, width) or (n_samples, n_features), "
            f"not {tuple(checked.shape)}. For one grey image use X[None, None]."
        )
    if expected is not None and shape != tuple(expected):
        raise ValueError(_shape_message(shape, tuple(expected)))
    return checked


def validate_y(y: Any, n_samples: int) -> np.ndarray:
    """Check labels: one class label per sample, as a 1-D NumPy array.

    Parameters
    ----------
    y : array-like or Tensor of shape (n_samples,)
    n_samples : int

    Returns
    -------
    ndarray of shape (n_samples,)
    """
    if y is None:
        raise ValueError(
            "requires y to be passed, but the target y is None: class labels are needed."
        )
    if isinstance(y, torch.Tensor):
        if y.layout != torch.strided or y.device.type == "meta":
            raise TypeError("y must be a dense tensor that holds its values.")
        y = y.detach().cpu().numpy()
    with naming("y"):
        y = column_or_1d(y, warn=True)
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError("Input y contains NaN or infinity.")
    if y.dtype.kind in "mM":
        raise ValueError(f"y must hold class labels, got dates or times ({y.dtype}).")
    with naming("y"):
        check_classification_targets(y)
        np.unique(y)  # labels that have no order are none
    if len(y) != n_samples:
        raise ValueError(f"X has {n_samples} samples, but y has {len(y)} labels.")
    return y


def validate_weight(sample_weight: Any, n_samples: int, name: str = "sample_weight") -> np.ndarray:
    """Check how many times each sample counts.

    Parameters
    ----------
    sample_weight : array-like or Tensor of shape (n_samples,), or None
    n_samples : int
    name : str, default="sample_weight"
        For messages.

    Returns
    -------
    ndarray of shape (n_samples,)
        Float64; ones where nothing is given.

    Raises
    ------
    ValueError
        For a single number, a wrong length, what is not finite or negative, or zeros throughout.
    """
    if sample_weight is None:
        return np.ones(n_samples)
    if isinstance(sample_weight, torch.Tensor):
        if sample_weight.layout != torch.strided or sample_weight.device.type == "meta":
            raise TypeError(f"{name} must be a dense tensor that holds its values.")
        sample_weight = sample_weight.detach().cpu()
    with naming(name):
        sample_weight = np.asarray(sample_weight)
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


def _shape_message(shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """Say what is wrong with the shape of a sample."""
    text = f"Each sample of X has shape {shape}, but the model takes {expected}."
    if len(shape) == 3 and len(expected) == 3 and (shape[2], shape[0], shape[1]) == expected:
        text += " X looks like NHWC (channels last); pass NCHW: X.transpose(0, 3, 1, 2)."
    return text


def check_channels(X: Images) -> None:
    """Raise if images look like NHWC; called in ``fit``, where no shape is known yet."""
    if X.ndim == 4 and X.shape[3] in (1, 3, 4) and X.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"X has shape {tuple(X.shape)}, which looks like NHWC (channels last). sinfkit takes "
            "NCHW: X.transpose(0, 3, 1, 2)."
        )


def check_normalisation(frozen: FrozenModel, X: Images) -> None:
    """Raise if `mean` and `std` do not have one value per channel of `X`."""
    if frozen.mean is None or frozen.std is None:
        return
    widths = {len(frozen.mean), len(frozen.std)} - {1}
    if widths and widths != {int(X.shape[1])}:
        raise ValueError(
            f"The mean and std of model are for {max(widths)} channels, but X has {X.shape[1]}."
        )


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

    Parameters
    ----------
    codes : int ndarray of shape (n_samples,)
        Class of each sample.
    fraction : float
        Share of each class that is held out, at least one sample.
    rng : Generator

    Returns
    -------
    fit, held : int ndarrays
        Sorted indices.  Where a class has fewer than two samples, all samples serve for both, with
        a warning: what is chosen on the held-out part is then too optimistic.
    """
    counts = np.bincount(codes)
    if counts[counts > 0].min() < 2:
        warnings.warn(
            "A class has a single calibration sample, so that none can be held out: the same "
            "samples fit and validate. Give at least two samples of each class.",
            UserWarning,
            stacklevel=caller_level(),
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
