"""All that the tables take from sinfkit, in one place."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sinfkit import (
    DCSPruner,
    Distillation,
    FrozenModel,
    PruningOptions,
    RoutingOptions,
    SemanticClusterer,
    SINFClassifier,
    __version__,
    discriminative_capability,
    load_cifar100,
    load_image_folder,
    resnet50,
    train_network,
    vgg16,
    vgg19,
)
from sinfkit.criteria import CRITERIA, LayerData, collect
from sinfkit.graph import (
    check_traced,
    count_macs,
    count_parameters,
    cut_points,
    fold_batch_norm,
    layer_names,
    observation_nodes,
    output_layer,
    paired_latency,
    sides,
    trace,
)
from sinfkit.inference import Normalise, can_prepack, fast_form, fit_route_predictor, prepacked
from sinfkit.slicing import check_sliced, find_groups, slice_channels
from sinfkit.zoo import ImageDataset

__all__ = [
    "CRITERIA",
    "DCSPruner",
    "Distillation",
    "FrozenModel",
    "ImageDataset",
    "LayerData",
    "Normalise",
    "SINFClassifier",
    "SemanticClusterer",
    "__version__",
    "check_sliced",
    "check_traced",
    "collect",
    "count_macs",
    "count_parameters",
    "cut_points",
    "discriminative_capability",
    "fast",
    "fast_routed",
    "find_groups",
    "fit_route_predictor",
    "fold_batch_norm",
    "layer_names",
    "load_cifar100",
    "load_image_folder",
    "observation_nodes",
    "onnx_routed",
    "output_layer",
    "paired_latency",
    "pruner",
    "resnet50",
    "routed",
    "sides",
    "slice_channels",
    "trace",
    "train_network",
    "vgg16",
    "vgg19",
]


def pruner(model: Any = None, **settings: Any) -> DCSPruner:
    """A `DCSPruner` whose options are given beside its parameters."""
    return DCSPruner(model, **_sorted(settings, PruningOptions))


def routed(model: Any, **settings: Any) -> SINFClassifier:
    """A `SINFClassifier` whose options are given beside its parameters."""
    return SINFClassifier(model, **_sorted(settings, RoutingOptions))


def _sorted(settings: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Parameters as they are, options in an object of their own."""
    names = kind().get_params()
    options = {name: value for name, value in settings.items() if name in names}
    plain = {name: value for name, value in settings.items() if name not in names}
    return {**plain, "options": kind(**options)} if options else plain


def fast(module: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The fastest form of ``Sequential(normalisation, network)``: a batch of pixels to scores."""
    normalise, network = module.children()
    folded = copy.deepcopy(fold_batch_norm(trace(network))).eval()
    folded = folded.to(dtype, memory_format=torch.channels_last)
    ready = prepacked(folded) if can_prepack(dtype) else folded
    return lambda x: ready(normalise(x).to(dtype)).float()


def fast_routed(
    classifier: SINFClassifier, dtype: torch.dtype, images: np.ndarray
) -> Callable[[Tensor], Tensor]:
    """The form in which a routed classifier predicts: a batch of pixels to probabilities."""
    if dtype != torch.float32:
        return classifier.runtime("bfloat16")
    example = torch.as_tensor(images[:4]).float().div(255)
    return fast_form(classifier.network_, lambda: example)


def onnx_routed(
    classifier: SINFClassifier, folder: Path, int8: bool, images: np.ndarray
) -> Callable[[Tensor], np.ndarray]:
    """A routed classifier in ONNX Runtime: a batch of pixels to scores."""
    classifier.to_onnx(folder / "routed", dtype="int8" if int8 else "float32", X=images)
    # The loader that lies beside the files, as somebody without sinfkit has it.
    spec = importlib.util.spec_from_file_location("sinf_onnx", folder / "routed" / "sinf_onnx.py")
    assert spec is not None and spec.loader is not None
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    loaded = loader.load(folder / "routed", n_threads=torch.get_num_threads())
    return lambda x: loaded.predict_proba(np.ascontiguousarray(x))
