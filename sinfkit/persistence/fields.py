"""What a stored estimator's parameters and fitted attributes may be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..errors import StorageError

MAX_INPUT = 2**22  # values of one sample
_DEVICE = re.compile(r"(cpu|cuda|mps)(:\d{1,3})?")


def _require(right: bool, what: str, wanted: str, value: Any) -> None:
    if not right:
        raise StorageError(f"{what} must be {wanted}; the file has {value!r:.80}.")


def labels(what: str, value: Any) -> np.ndarray:
    """Class labels: sorted, none twice."""
    right = isinstance(value, np.ndarray) and value.ndim == 1 and value.size > 0
    _require(right and value.dtype.kind in "biufUO", what, "an array of labels", value)
    if value.dtype.kind == "f":
        _require(bool(np.isfinite(value).all()), what, "an array of finite labels", value)
    _require(np.array_equal(np.unique(value), value), what, "sorted labels, none twice", value)
    return value


def names(what: str, value: Any) -> np.ndarray:
    """Names of clusters."""
    right = isinstance(value, np.ndarray) and value.ndim == 1 and value.size > 0
    _require(right and value.dtype.kind in "biufUO", what, "an array of names", value)
    return value


def feature_names(what: str, value: Any) -> np.ndarray:
    """Names of columns, as scikit-learn keeps them."""
    right = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind == "O"
    _require(right, what, "an array of text", value)
    return value


def clusters(what: str, value: Any) -> np.ndarray:
    """A cluster for each class."""
    right = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype == np.int64
    right = right and value.size > 0 and value.min() >= 0 and value.max() < value.size
    _require(right, what, "an array of cluster numbers", value)
    return value


def indices(what: str, value: Any) -> np.ndarray:
    """Which of the base's outputs mean which class."""
    right = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype == np.int64
    _require(right and value.size > 0 and value.min() >= 0, what, "an array of indices", value)
    return value


def square(what: str, value: Any) -> np.ndarray:
    """Affinities."""
    right = isinstance(value, np.ndarray) and value.ndim == 2 and value.shape[0] == value.shape[1]
    _require(right and value.dtype.kind == "f", what, "a square matrix", value)
    return value


def number(what: str, value: Any) -> float:
    """A finite number."""
    right = type(value) in (int, float) and math.isfinite(value)
    _require(right, what, "a finite number", value)
    return float(value)


def number_or_nan(what: str, value: Any) -> float:
    """A number, or NaN where there is none."""
    _require(type(value) is float and not math.isinf(value), what, "a number or NaN", value)
    return float(value)


def flag(what: str, value: Any) -> bool:
    """True or False."""
    _require(type(value) is bool, what, "true or false", value)
    return bool(value)


def optional_number(what: str, value: Any) -> float | None:
    """A finite number, or None."""
    return None if value is None else number(what, value)


def positive(what: str, value: Any) -> int:
    """A positive integer."""
    _require(type(value) is int and 0 < value < 2**31, what, "a positive integer", value)
    return value


def not_negative(what: str, value: Any) -> int:
    """An integer that is not negative."""
    _require(type(value) is int and 0 <= value < 2**31, what, "an integer from 0 on", value)
    return value


def text(what: str, value: Any) -> str:
    """Text."""
    _require(isinstance(value, str), what, "text", value)
    return value


def shape(what: str, value: Any) -> tuple[int, ...]:
    """Shape of one sample."""
    right = isinstance(value, tuple) and 1 <= len(value) <= 4
    right = right and all(type(n) is int and n > 0 for n in value)
    _require(right and math.prod(value) <= MAX_INPUT, what, "the shape of one sample", value)
    return value


def device(what: str, value: Any) -> str:
    """A device's name."""
    right = isinstance(value, str) and _DEVICE.fullmatch(value) is not None
    _require(right, what, "cpu, cuda or mps", value)
    return value


def arrays(what: str, value: Any) -> dict[str, np.ndarray]:
    """One array per layer."""
    right = isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(item, np.ndarray) and item.ndim == 1
        for key, item in value.items()
    )
    _require(right, what, "an array for each layer", value)
    return value


def floats(what: str, value: Any) -> dict[str, float]:
    """One number per layer."""
    right = isinstance(value, dict) and all(
        isinstance(key, str) and type(item) in (int, float) for key, item in value.items()
    )
    _require(right, what, "a number for each layer", value)
    return value


def value_range(what: str, value: Any) -> tuple[str, float, float]:
    """Type, smallest and largest value of images."""
    right = (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and value[0] in ("uint8", "float")
        and all(type(item) in (int, float) and math.isfinite(item) for item in value[1:])
        and value[1] <= value[2]
    )
    _require(right, what, "a type and two numbers", value)
    return value[0], float(value[1]), float(value[2])


def rows(what: str, value: Any) -> list[dict[str, Any]]:
    """A list of records."""
    right = isinstance(value, list) and all(
        isinstance(row, dict)
        and all(
            isinstance(key, str) and (item is None or isinstance(item, (bool, int, float, str)))
            for key, item in row.items()
        )
        for row in value
    )
    _require(right, what, "a list of records", value)
    return value


def list_of(one: Callable[[str, Any], Any]) -> Callable[[str, Any], list[Any]]:
    """The same for each cluster."""

    def check(what: str, value: Any) -> list[Any]:
        _require(isinstance(value, list), what, "a list", value)
        return [one(what, item) for item in value]

    return check


# A fitted attribute is in the file always, where it is there, or never.
Checks = dict[str, Callable[[str, Any], Any]]
COMMON: Checks = {
    "classes_": labels,
    "n_features_in_": positive,
    "input_shape_": shape,
    "device_": device,
}
PROMISE: Checks = {
    "accuracy_drop_": number_or_nan,
    "certified_": flag,
    "certified_drop_": number_or_nan,
}
ALWAYS: dict[str, Checks] = {
    "DCSPruner": {
        **COMMON,
        **PROMISE,
        "scores_": arrays,
        "support_": arrays,
        "ratios_": floats,
        "repair_error_": floats,
        "cost_ratio_": number,
        "sliceable_share_": number,
        "outputs_": indices,
    },
    "SemanticClusterer": {
        **COMMON,
        "class_clusters_": clusters,
        "cluster_names_": names,
        "affinity_": square,
        "layer_": text,
        "route_accuracy_": number,
    },
    "SINFClassifier": {
        **COMMON,
        "class_clusters_": clusters,
        "cluster_names_": names,
        "route_layer_": text,
        "prefix_ratio_": optional_number,
        "prefix_low_rank_": number,
        **PROMISE,
        "n_certifying_": not_negative,
        "confidence_threshold_": optional_number,
        "exit_threshold_": optional_number,
        "router_weight_": number,
        "route_accuracy_": number,
        "scores_": list_of(arrays),
        "supports_": list_of(arrays),
        "repair_errors_": list_of(floats),
    },
}
SOMETIMES: Checks = {
    "feature_names_in_": feature_names,
    "input_range_": value_range,
    "search_results_": rows,
}
DISTILLED: Checks = {"distillation_losses_": list_of(number)}
OPTIONAL: dict[str, Checks] = {
    "DCSPruner": SOMETIMES | DISTILLED | {"dropped_layers_": list_of(text)},
    "SemanticClusterer": SOMETIMES,
    "SINFClassifier": SOMETIMES | DISTILLED,
}
# They are built again, or follow from the rest.
NEVER = frozenset("base_model_ model_ network_ clusterer_ pruner_ temperatures_".split())


def check_parameters(what: str, parameters: dict[str, Any]) -> None:
    """Check the parameters that decide how predictions run, whatever the estimator."""
    positive(f"{what}.batch_size", parameters.get("batch_size", 1))
    for name in ("n_jobs", "random_state"):
        value = parameters.get(name)
        right = value is None or (type(value) is int and abs(value) < 2**32)
        _require(right, f"{what}.{name}", "an integer or None", value)
    value = parameters.get("verbose", 0)
    _require(type(value) in (bool, int), f"{what}.verbose", "an integer", value)
    value = parameters.get("device", "auto")
    if value != "auto":
        device(f"{what}.device", value)


def floating(what: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A float32 or float64 tensor of finite values, of a given shape."""
    right = tensor.dtype in (torch.float32, torch.float64) and tuple(tensor.shape) == shape
    if not right or not bool(torch.isfinite(tensor).all()):
        raise StorageError(
            f"{what} must be finite float32 or float64 values of shape {shape}; the file has "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}."
        )
    return tensor
