"""Fitted estimators as files without code: what `save` writes and `load` reads, and nothing else.

A file holds weights, numbers and text.  Which classes are built from them is written here and not
in the file; nothing is unpickled, and no name in the file is imported, called or opened.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, fx, nn

from ..base import TorchEstimator
from ..classifier import SINFClassifier
from ..clusterer import SemanticClusterer
from ..errors import NotPlainError, StorageError
from ..frozen import FrozenModel, baked, unwrapped
from ..graph.cost import fold_batch_norm
from ..graph.cuts import feature_layer, find_cut, output_layer, split
from ..graph.heads import ENDINGS
from ..graph.nodes import LAYERS
from ..graph.recording import logits_of
from ..graph.tracing import of_torch_alone
from ..inference.network import FALLBACKS, Normalise, RoutePredictor, SINFNetwork
from ..pruner import DCSPruner, recipe_of
from ..pruning.recipe import PruningOptions
from ..repair.distillation import Distillation
from ..routing.study import RoutingOptions
from ..utils.device import (
    channels_last,
    float_type,
    loaded_device,
    on_host_by_default,
    resolve_device,
)
from ..utils.params import check_integer, check_path, is_integer
from ..utils.pickling import versions
from . import fields as fields
from .container import read, write
from .parts import (
    CUSTOM,
    PartReader,
    base_state,
    build,
    describe,
    describe_part,
    fill_base,
    output_of,
    probe,
    traced,
)
from .plain import decode, encode, take

__all__ = ["SCHEMA", "load", "save"]

SCHEMA = 1
MAX_BYTES = 8 * 2**30
_KINDS: dict[str, type[TorchEstimator]] = {
    kind.__name__: kind for kind in (DCSPruner, SemanticClusterer, SINFClassifier)
}
_NESTED: dict[str, dict[str, type[Any]]] = {
    "DCSPruner": {"options": PruningOptions, "distill": Distillation},
    "SINFClassifier": {
        "clusterer": SemanticClusterer,
        "pruner": DCSPruner,
        "prefix_pruner": DCSPruner,
        "distill": Distillation,
        "options": RoutingOptions,
    },
}
_PARTS = {part.__name__: part for parts in _NESTED.values() for part in parts.values()}
# Folders that a fit reads and writes: a file must not say where.
_NOT_STORED = ("model", "memory", "checkpoint")
_LONGEST = 800  # characters of an error
_TOLERANCE = 1e-3  # of the largest logit; another activation function is far beyond


@on_host_by_default()
@torch.random.fork_rng(devices=[])  # what is read back makes layers, which draw first weights
def save(estimator: Any, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator to one file that holds no code.

    Parameters
    ----------
    estimator : SINFClassifier, DCSPruner or SemanticClusterer
        Fitted; it is not changed.
    path : path-like
        Whatever is there is replaced when the new file is complete, and not before.

    Raises
    ------
    NotFittedError
        If the estimator is not fitted.
    TypeError
        If it holds something that is no data, such as a callable criterion; the message names it.
        Also if what was written would not load again as the same: each file is read back.
    OSError
        If the file cannot be written, as where its folder does not exist; what was there is left
        as it was.

    See Also
    --------
    load : The counterpart.

    Examples
    --------
    >>> import tempfile
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import SemanticClusterer, save
    >>> clusterer = SemanticClusterer(random_state=0).fit(*load_digits(return_X_y=True))
    >>> save(clusterer, tempfile.mkdtemp() + "/digits.sinf")
    """
    kind = type(estimator).__name__
    if _KINDS.get(kind) is not type(estimator):
        raise TypeError(
            f"estimator must be one of {', '.join(_KINDS)}, not a {kind}: a file without code "
            "cannot hold another class."
        )
    check_is_fitted(estimator)
    check_path("path", path)
    tensors: dict[str, Tensor] = {}
    try:
        manifest = {
            "schema": SCHEMA,
            "versions": versions(),
            "estimator": kind,
            **_describe_estimator(estimator, "", tensors),
            "base": _describe_base(estimator, tensors),
            "network": _DESCRIBERS[kind](estimator, tensors),
        }
    except NotPlainError as error:
        raise TypeError(
            f"This {kind} cannot be saved without code: {str(error).removeprefix('parameters/')} "
            "joblib.dump can store it, for those who trust the file."
        ) from error
    is_custom = manifest["base"]["architecture"]["name"] == CUSTOM
    factory = estimator.base_model_.module if is_custom else None
    write(Path(path), manifest, tensors, lambda new: _check_written(estimator, new, factory))


@on_host_by_default()
def load(
    path: str | os.PathLike[str],
    *,
    factory: Callable[[], nn.Module] | None = None,
    device: str | torch.device | None = None,
    max_bytes: int = MAX_BYTES,
) -> Any:
    """Read a fitted estimator that `save` has written.

    Parameters
    ----------
    path : path-like
    factory : callable, optional
        Returns the unpruned network, with any weights; they are replaced.  Needed for networks that
        sinfkit does not have itself (`vgg16`, `vgg19`, `resnet50` and the default network).
    device : str or torch.device, optional
        Where the networks go.  Default: where they were, or the CPU, with a warning, if that device
        is not here.
    max_bytes : int, default=8 GiB
        A file that is larger, or whose networks would take more, is refused before any of that
        memory is taken.

    Returns
    -------
    SINFClassifier, DCSPruner or SemanticClusterer
        It answers as the one that was saved.  `model` is a `FrozenModel` where it was a network,
        and `memory` is None.

    Raises
    ------
    StorageError
        If the file is damaged, of a newer version, or not one of sinfkit's; if it needs a factory,
        or the factory's network is another one.
    OSError
        If it cannot be read.
    TypeError
        If `factory` is not a function that returns a module.
    ValueError
        If `device` is unknown or not available.

    Notes
    -----
    A file from a stranger can do no more than hold wrong weights.  Besides `max_bytes`, memory is
    bounded by about three times the size of the file and forty times that of its JSON header, which
    is 8 MiB at most.  The checksum tells damage, not malice: whoever changes a file can compute it
    anew.  With a factory, its code runs, and sees a small batch of the shape that the file says.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from sklearn.datasets import load_digits
    >>> import sinfkit
    >>> X, y = load_digits(return_X_y=True)
    >>> pruner = sinfkit.DCSPruner(random_state=0).fit(X[:1000], y[:1000])
    >>> path = Path(tempfile.mkdtemp()) / "pruner.sinf"
    >>> sinfkit.save(pruner, path)
    >>> again = sinfkit.load(path)
    >>> bool((again.predict(X) == pruner.predict(X)).all())
    True
    """
    if factory is not None and (isinstance(factory, nn.Module) or not callable(factory)):
        raise TypeError(
            "factory must be a function that returns the unpruned network, such as "
            f"lambda: MyNetwork(); got a {type(factory).__name__}."
        )
    if factory is not None and not _needs_nothing(factory):
        raise TypeError("factory must be callable without arguments.")
    check_path("path", path)
    check_integer("max_bytes", max_bytes, high=2**63 - 1)
    place = None if device is None else resolve_device(device)
    estimator = _read(Path(path), factory, max_bytes)
    stored = estimator.device_
    return estimator.to(loaded_device(stored) if place is None else place)


def _read(path: Path, factory: Callable[[], nn.Module] | None, max_bytes: int) -> Any:
    """The estimator in a file, on the CPU."""
    try:
        manifest, tensors = read(path, max_bytes, SCHEMA)
        reader = _Reader(manifest, tensors, max_bytes)
        with torch.random.fork_rng(devices=[]):  # a new layer draws its first weights
            module = build(reader.architecture, factory)
    except StorageError as error:
        raise StorageError(_failed(path, error)) from error
    try:
        with torch.random.fork_rng(devices=[]):
            return reader.estimator(module, factory is not None)
    except StorageError as error:
        raise StorageError(_failed(path, error)) from error
    except Exception as error:
        # The checks are meant to find everything; what they miss is the file's fault all the same.
        raise StorageError(
            _failed(path, f"its parts do not fit together ({type(error).__name__}: {error}).")
        ) from error


def _check_written(estimator: Any, path: Path, factory: Callable[[], nn.Module] | None) -> None:
    """Read a file back; a TypeError unless it holds the networks of the estimator."""
    why = ""
    try:
        again = _read(path, factory, sys.maxsize)
        for name in ("model_", "network_"):
            if hasattr(estimator, name):
                own = getattr(estimator, name).state_dict()
                found = getattr(again, name).state_dict()
                differ = [
                    key
                    for key in own.keys() | found.keys()
                    if key not in own or key not in found or not _equal(own[key], found[key])
                ]
                if differ:
                    why = f"{name}.{min(differ)} comes back as another tensor"
    except StorageError as error:
        why = str(error).partition(" cannot be loaded. ")[2]
    if why:
        raise TypeError(
            f"This {type(estimator).__name__} cannot be saved so that it loads again: {why} "
            "joblib.dump can store it, for those who trust the file."
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


def _needs_nothing(function: Callable[..., Any]) -> bool:
    """Whether a function can be called without arguments, as far as its signature tells."""
    try:
        inspect.signature(function).bind()
    except ValueError:  # some that are written in C have no signature
        return True
    except TypeError:
        return False
    return True


def _failed(path: str | os.PathLike[str], why: object) -> str:
    text = str(why)  # which may quote the file
    text = text if len(text) < _LONGEST else text[:_LONGEST] + " ..."
    return f"{os.fspath(path)!r} cannot be loaded. {text}"


def _describe_estimator(estimator: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Parameters and fitted attributes as plain data; `name` is where the estimator is nested."""
    return {
        "parameters": _describe_parameters(estimator, name, tensors),
        "attributes": _describe_attributes(estimator, name, tensors),
    }


def _describe_parameters(estimator: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Parameters, those of nested estimators within; what such a one was fitted to is left out."""
    parameters: dict[str, Any] = {}
    parts = _NESTED.get(type(estimator).__name__, {})
    for key, value in estimator.get_params(deep=False).items():
        what = f"{name}{key}"
        if key in parts and not is_integer(value):  # a number of epochs is stored as it is
            if value is not None:
                if type(value) is not parts[key]:
                    raise NotPlainError(
                        f"{what} is a {type(value).__name__}, not a {parts[key].__name__}."
                    )
                value = _describe_parameters(value, f"{what}.", tensors)
            parameters[key] = value
        elif key == "model":
            parameters[key] = value is not None
            if value is not None:
                _check_model(what, value, estimator)
        elif key not in _NOT_STORED:
            value = str(value) if isinstance(value, torch.device) else value
            parameters[key] = encode(value, f"parameters/{what}", tensors)
    return parameters


def _describe_attributes(estimator: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fitted attributes, apart from what is built again."""
    attributes: dict[str, Any] = {}
    kind = type(estimator).__name__
    known = fields.ALWAYS[kind] | fields.OPTIONAL[kind]
    for key, value in vars(estimator).items():
        if key in fields.NEVER or not key.endswith("_") or key[0] == "_":
            continue
        if key not in known:
            raise NotPlainError(
                f"{name}{key} is an attribute that the file's format does not know."
            )
        value = str(value) if isinstance(value, torch.device) else value
        attributes[key] = encode(value, f"attributes/{name}{key}", tensors)
    return attributes


def _check_model(what: str, model: Any, estimator: Any) -> None:
    """Refuse a `model` that is not the one the estimator was fitted with."""
    base = getattr(estimator, "base_model_", None)
    if base is None or model is base:
        return
    same = model == base
    if isinstance(model, nn.Module):
        same = _same(baked(unwrapped(model)), base)
    if not same:
        raise NotPlainError(f"{what} is not the network that it was fitted with; fit it again.")


def _same(model: nn.Module, base: FrozenModel) -> bool:
    """Whether a base has a network's weights."""
    own, other = model.state_dict(), base.module().state_dict()
    if own.keys() != other.keys():
        return False
    pairs = [(t.cpu(), other[key]) for key, t in own.items() if isinstance(t, Tensor)]
    return all(torch.equal(a, b) for a, b in pairs)


def _describe_base(estimator: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The base network: its architecture by name, its weights once."""
    frozen: FrozenModel = estimator.base_model_
    ending = estimator._ending
    module = frozen.module()
    state = base_state(module)
    tensors |= {f"base/{name}": tensor for name, tensor in state.items()}
    architecture = describe(module)
    if architecture["name"] == CUSTOM:
        with torch.inference_mode():
            tensors["probe"] = logits_of(module(probe(estimator.input_shape_, module)))
    return {
        "architecture": architecture,
        "tensors": list(state),
        "mean": None if frozen.mean is None else list(frozen.mean),
        "std": None if frozen.std is None else list(frozen.std),
        "input_shape": None if frozen.input_shape is None else list(frozen.input_shape),
        **({} if ending == "logits" else {"ending": ending}),
    }


def _describe_pruner(pruner: DCSPruner, tensors: dict[str, Tensor]) -> dict[str, Any]:
    base = of_torch_alone(traced(pruner.base_model_.module(), pruner.input_shape_, pruner._ending))
    return {"model": describe_part("model", base, pruner.model_, tensors)}


def _describe_clusterer(clusterer: SemanticClusterer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    base = traced(clusterer.base_model_.module(), clusterer.input_shape_, clusterer._ending)
    dense = split(base, find_cut(base, clusterer.layer_))[0]
    prefix, router = clusterer.network_
    # The clusterer inside of a classifier runs that one's prefix, whose batch-norms are folded.
    folded = not dict(dense.named_modules()).keys() <= dict(prefix.named_modules()).keys()
    reference = fold_batch_norm(dense) if folded else dense
    return {
        "folded": folded,
        "prefix": describe_part("prefix", reference, prefix, tensors),
        "pool_size": _describe_router(router, tensors),
    }


def _describe_router(router: Any, tensors: dict[str, Tensor]) -> int:
    tensors["router/weight"], tensors["router/bias"] = router.weight, router.bias
    return int(router.pool_size)


def _describe_classifier(classifier: SINFClassifier, tensors: dict[str, Tensor]) -> dict[str, Any]:
    network = classifier.network_
    base = traced(classifier.base_model_.module(), classifier.input_shape_, classifier._ending)
    dense, rest = map(fold_batch_norm, split(base, find_cut(base, classifier.route_layer_)))
    parts: dict[str, Any] = {
        "prefix": describe_part("prefix", dense, network.prefix, tensors),
        "rest": None,
        "subgraphs": [],
    }
    if network.rest is not None:
        parts["rest"] = describe_part("rest", rest, network.rest, tensors)
    for cluster in range(network.n_clusters):
        subgraph = network.subgraph(cluster)
        if subgraph is None:
            parts["subgraphs"].append(None)
            continue
        part = describe_part(f"subgraph.{cluster}", rest, subgraph, tensors)
        parts["subgraphs"].append(part)
    tensors["outputs"], tensors["answered"] = network.outputs, network.answered
    tensors["temperatures"] = network.temperatures
    return {
        **parts,
        "pool_size": _describe_router(network.router, tensors),
        "router_weight": float(network.router_weight),
        "threshold": float(network.threshold),
        "exit_threshold": network.exit_threshold,
        "fallback": network.fallback,
        "clusterer": _describe_estimator(classifier.clusterer_, "clusterer_.", tensors),
        "pruner": _describe_parameters(classifier.pruner_, "pruner_.", tensors),
    }


_DESCRIBERS: dict[str, Callable[[Any, dict[str, Tensor]], dict[str, Any]]] = {
    "DCSPruner": _describe_pruner,
    "SemanticClusterer": _describe_clusterer,
    "SINFClassifier": _describe_classifier,
}


def _n_outputs(graph: fx.GraphModule) -> int:
    """Outputs of a base network: rows of its last layer."""
    layers = [m for n in graph.graph.nodes if (m := _called(graph, n)) is not None]
    return int(layers[-1].weight.shape[0])


def _called(graph: fx.GraphModule, node: fx.Node) -> Any:
    if node.op != "call_module":
        return None
    module = graph.get_submodule(str(node.target))
    return module if isinstance(module, LAYERS) else None


class _Reader:
    """Builds an estimator from a manifest and tensors that nobody vouches for."""

    def __init__(
        self, manifest: dict[str, Any], tensors: Mapping[str, Tensor], max_bytes: int
    ) -> None:
        kind = manifest.get("estimator")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise StorageError(f"It holds a {kind!r:.40}, which is none of {', '.join(_KINDS)}.")
        wanted = {"schema", "versions", "estimator", "parameters", "attributes", "base", "network"}
        _check_keys("The manifest", manifest, wanted)
        keys, base = {"architecture", "tensors", "mean", "std", "input_shape"}, manifest["base"]
        if isinstance(base, dict) and "ending" in base:
            keys.add("ending")
        self.base = _check_keys("The base network", base, keys)
        self.ending = self.base.get("ending", "logits")
        if self.ending not in ENDINGS:
            raise StorageError(f"The base network returns {self.ending!r:.40}, which is unknown.")
        self.architecture = self.base["architecture"]
        self.kind, self.manifest, self.tensors = kind, manifest, tensors
        self.network = manifest["network"]
        self.used: set[str] = set()
        self.parts = PartReader(tensors, self.used, max_bytes)

    def estimator(self, module: nn.Module, is_custom: bool) -> Any:
        """Build everything; `module` is the base network without its weights."""
        attributes = self._attributes(self.kind, self.manifest["attributes"])
        shape = attributes["input_shape_"]
        features = attributes["n_features_in_"]
        if features not in (shape[0], int(np.prod(shape))):
            raise StorageError(f"n_features_in_={features} does not fit input_shape_={shape}.")
        if len(attributes.get("feature_names_in_", ())) not in (0, features):
            raise StorageError("feature_names_in_ has not one name for each feature.")
        frozen = self._frozen(module, shape)
        base = traced(frozen.module(), shape, self.ending)
        self.parts.shared = {tensor.data_ptr() for tensor in base.state_dict().values()}
        x = torch.empty((2, *shape), dtype=float_type(frozen.module()), device="meta")
        self.is_custom = is_custom
        if is_custom:
            self._check_probe(frozen.module(), shape)
        if self._output("base network", base, x).shape != (len(x), _n_outputs(base)):
            raise StorageError("The base network does not give one row of logits per sample.")
        estimator = self._estimator(self.kind, self.manifest["parameters"], frozen)
        vars(estimator).update(attributes)
        estimator.base_model_, estimator._ending = frozen, self.ending
        if self.kind == "DCSPruner":
            self._pruner(estimator, base, x)
        elif self.kind == "SemanticClusterer":
            self._clusterer(estimator, base, x)
        else:
            self._classifier(estimator, base, x)
        unused = self.tensors.keys() - self.used - {"probe"}
        if unused:
            raise StorageError(f"It has a tensor that nothing needs: {min(unused)!r:.80}.")
        return estimator

    def _output(self, what: str, part: fx.GraphModule, x: Tensor) -> Tensor:
        return output_of(what, part, x, self.is_custom)

    def _take(self, name: str) -> Tensor:
        return take(name, self.tensors, self.used)

    def _estimator(self, kind: str, stored: Any, frozen: FrozenModel | None) -> Any:
        """An estimator with its parameters."""
        factory, parts = {**_KINDS, **_PARTS}[kind], _NESTED.get(kind, {})
        known = set(factory._get_param_names()) - {"memory", "checkpoint"}
        if not isinstance(stored, dict) or not set(stored) <= known:
            raise StorageError(f"The parameters of {kind} are not those that it has.")
        parameters = {}
        for key, value in stored.items():
            if key in parts and not is_integer(value):
                if value is not None:
                    value = self._estimator(parts[key].__name__, value, None)
            elif key == "model":
                if type(value) is not bool:
                    raise StorageError(f"{kind}.model is neither true nor false.")
                value = frozen if value else None
            else:
                value = decode(value, self.tensors, self.used)
            parameters[key] = value
        fields.check_parameters(kind, parameters)
        estimator: Any = factory(**parameters)
        try:
            if isinstance(estimator, DCSPruner):
                recipe_of(estimator)
            elif isinstance(estimator, (SemanticClusterer, SINFClassifier)):
                estimator._check_parameters()
        except (TypeError, ValueError) as error:
            raise StorageError(f"A parameter of {kind} is out of range: {error}") from error
        return estimator

    def _attributes(self, kind: str, stored: Any) -> dict[str, Any]:
        """Fitted attributes, each of its kind."""
        always = fields.ALWAYS[kind]
        known = always | fields.OPTIONAL[kind]
        if not isinstance(stored, dict) or not always.keys() <= stored.keys() <= known.keys():
            raise StorageError(f"The attributes of {kind} are not those that it has.")
        return {
            key: known[key](key, decode(value, self.tensors, self.used))
            for key, value in stored.items()
        }

    def _frozen(self, module: nn.Module, shape: tuple[int, ...]) -> FrozenModel:
        """The base network with its weights and its normalisation."""
        names = self.base["tensors"]
        if not isinstance(names, list):
            raise StorageError("The base network has no list of tensors.")
        state = {str(name): self._take(f"base/{name}") for name in names}
        self.parts.left -= sum(tensor.nbytes for tensor in state.values())
        fill_base(module, state)
        mean, std = (self._statistics(key, shape) for key in ("mean", "std"))
        expected = self.base["input_shape"]
        if expected is not None:
            expected = tuple(expected) if isinstance(expected, list) else expected
            expected = fields.shape("input_shape", expected)
            if expected != shape:
                raise StorageError(f"input_shape={expected} does not fit input_shape_={shape}.")
        try:
            return FrozenModel(module, mean, std, expected)
        except ValueError as error:
            raise StorageError(str(error)) from error

    def _statistics(self, key: str, shape: tuple[int, ...]) -> list[float] | None:
        """Mean or standard deviation: one value, or one per channel."""
        values = self.base[key]
        if values is None:
            return None
        if not isinstance(values, list) or len(values) not in (1, shape[0]):
            raise StorageError(f"{key} has not one value per channel.")
        return [fields.number(key, value) for value in values]

    def _check_probe(self, module: nn.Module, shape: tuple[int, ...]) -> None:
        """Compare a factory's network with the one that was saved, by their logits."""
        if "probe" not in self.tensors:
            return
        expected = self.tensors["probe"]
        with torch.inference_mode():
            found = logits_of(module(probe(shape, module)))
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            raise StorageError("The factory's network has another output than the one saved.")
        difference = (found.double() - expected.double()).abs().max()
        if not difference <= _TOLERANCE * expected.double().abs().max().clamp_min(1e-6):
            raise StorageError(
                "The factory's network has the stored weights' shapes, and yet answers differently "
                "from the one saved: check its activation functions, strides and options."
            )

    def _pruner(self, pruner: DCSPruner, base: fx.GraphModule, x: Tensor) -> None:
        entry = _check_keys("The network", self.network, {"model"})
        model = self.parts.read("model", base, entry["model"])
        logits = self._output("smaller network", model, x)
        if tuple(logits.shape) != (len(x), len(pruner.classes_)):
            raise StorageError("The smaller network has not one output for each class.")
        pruner.model_ = of_torch_alone(model).eval().requires_grad_(False)
        pruner._output = feature_layer(base, output_layer(base, _n_outputs(base)))
        _check_outputs(torch.as_tensor(pruner.outputs_), len(pruner.classes_), base)

    def _clusterer(self, clusterer: SemanticClusterer, base: fx.GraphModule, x: Tensor) -> None:
        entry = _check_keys("The network", self.network, {"folded", "prefix", "pool_size"})
        _check_clusters(clusterer)
        reference = self._split(base, clusterer.layer_)[0]
        if entry["folded"]:
            reference = fold_batch_norm(reference)
        prefix = self.parts.read("prefix", reference, entry["prefix"])
        h = self._output("prefix", prefix, x)
        router = self._router(entry["pool_size"], h, len(clusterer.classes_))
        # A copy: what equals the base's tensors is not to move with this network.
        network = nn.Sequential(copy.deepcopy(prefix), router)
        clusterer.network_ = network.eval().requires_grad_(False)
        if entry["folded"] and len(clusterer.input_shape_) == 3:
            channels_last(clusterer.network_)

    def _classifier(self, classifier: SINFClassifier, base: fx.GraphModule, x: Tensor) -> None:
        numbers = ("router_weight", "threshold")
        keys = {"prefix", "rest", "subgraphs", "pool_size", "fallback", "exit_threshold", *numbers}
        entry = _check_keys("The network", self.network, keys | {"clusterer", "pruner"})
        _check_clusters(classifier)
        n_classes, n_clusters = len(classifier.classes_), len(classifier.cluster_names_)
        for key in ("scores_", "supports_", "repair_errors_"):
            if len(getattr(classifier, key)) != n_clusters:
                raise StorageError(f"{key} has not one entry for each cluster.")
        dense, rest = map(fold_batch_norm, self._split(base, classifier.route_layer_))
        prefix = self.parts.read("prefix", dense, entry["prefix"])
        h = self._output("prefix", prefix, x)
        router = self._router(entry["pool_size"], h, n_classes)
        outputs, n_outputs = self._take("outputs"), _n_outputs(base)
        _check_outputs(outputs, n_classes, base)
        answered = self._take("answered")
        if answered.dtype != torch.bool or tuple(answered.shape) != (n_clusters, n_classes):
            raise StorageError("answered does not say which classes each subgraph answers.")
        temperatures = fields.floating("temperatures", self._take("temperatures"), (n_clusters,))
        if float(temperatures.min()) <= 0:
            raise StorageError("A temperature is not positive.")
        subgraphs = self._subgraphs(entry["subgraphs"], rest, h, answered.sum(1).tolist())
        rest_part = None
        if entry["rest"] is not None:
            rest_part = self.parts.read("rest", rest, entry["rest"])
            logits = self._output("base network's rest", rest_part, h)
            if tuple(logits.shape) != (len(h), n_outputs):
                raise StorageError("The base network's rest has not all of its outputs.")
        fallback = entry["fallback"]
        if not isinstance(fallback, str) or fallback not in FALLBACKS:
            raise StorageError(f"The fallback {fallback!r:.40} is unknown.")
        if fallback == "base" and rest_part is None:
            raise StorageError("The fallback is the base network, whose rest is missing.")
        weight, threshold = (fields.number(key, entry[key]) for key in numbers)
        exit_threshold = fields.optional_number("exit_threshold", entry["exit_threshold"])
        if weight < 0:
            raise StorageError("router_weight is negative.")
        frozen, dtype = classifier.base_model_, x.dtype
        network = SINFNetwork(
            Normalise(
                None if frozen.mean is None else torch.tensor(frozen.mean, dtype=dtype),
                None if frozen.std is None else torch.tensor(frozen.std, dtype=dtype),
            ),
            prefix,
            router,
            subgraphs,
            rest_part,
            torch.as_tensor(classifier.class_clusters_).clone(),
            outputs,
            temperatures,
            router_weight=weight,
            threshold=threshold,
            fallback=fallback,
            answered=answered,
            exit_threshold=exit_threshold,
        )
        network = copy.deepcopy(network).eval().requires_grad_(False)
        if x.ndim == 4:
            network = channels_last(network)
        classifier.network_ = network
        classifier.temperatures_ = network.temperatures.numpy().copy()
        self._nest(classifier, entry["clusterer"], entry["pruner"])

    def _subgraphs(
        self, entries: Any, rest: fx.GraphModule, h: Tensor, n_answered: list[int]
    ) -> list[nn.Module | None]:
        """Each cluster's subgraph, which answers so many classes of the prefix's output `h`."""
        if not isinstance(entries, list) or len(entries) != len(n_answered):
            raise StorageError("There is not one entry for each cluster's subgraph.")
        subgraphs: list[nn.Module | None] = []
        for cluster, (entry, expected) in enumerate(zip(entries, n_answered, strict=True)):
            name = f"subgraph.{cluster}"
            subgraph = None if entry is None else self.parts.read(name, rest, entry)
            if subgraph is not None:
                logits = self._output(name, subgraph, h)
                if tuple(logits.shape) != (len(h), expected) or expected == 0:
                    raise StorageError(f"The {name} has not one output for each class it answers.")
            subgraphs.append(subgraph)
        return subgraphs

    def _nest(self, classifier: SINFClassifier, clusterer: Any, pruner: Any) -> None:
        """Put back the estimators that were used inside."""
        stored = _check_keys("clusterer_", clusterer, {"parameters", "attributes"})
        inner = self._estimator("SemanticClusterer", stored["parameters"], None)
        vars(inner).update(self._attributes("SemanticClusterer", stored["attributes"]))
        _check_clusters(inner)
        if not np.array_equal(inner.class_clusters_, classifier.class_clusters_) or (
            len(inner.cluster_names_) != len(classifier.cluster_names_)
        ):
            raise StorageError("clusterer_ has other clusters than the classifier.")
        for key in (
            "n_features_in_",
            "input_shape_",
            "input_range_",
            "base_model_",
            "classes_",
            "_ending",
        ):
            if hasattr(classifier, key):
                setattr(inner, key, getattr(classifier, key))
        classifier.clusterer_ = inner
        classifier.pruner_ = self._estimator("DCSPruner", pruner, None)
        classifier._link()

    def _split(self, base: fx.GraphModule, name: str) -> tuple[fx.GraphModule, fx.GraphModule]:
        try:
            return split(base, find_cut(base, name))
        except ValueError as error:
            raise StorageError(str(error)) from error

    def _router(self, pool_size: Any, h: Tensor, n_classes: int) -> RoutePredictor:
        """The route predictor, whose weight fits the prefix's output `h`."""
        size = fields.positive("pool_size", pool_size)
        n_features = int(h.shape[-1] if h.ndim == 3 else h.shape[1])
        n_features *= size**2 if h.ndim == 4 else 1
        weight, bias = self._take("router/weight"), self._take("router/bias")
        fields.floating("The router's weight", weight, (n_classes, n_features))
        fields.floating("The router's bias", bias, (n_classes,))
        if weight.dtype != bias.dtype:
            raise StorageError("The router's weight and bias have different types.")
        return RoutePredictor(weight.clone(), bias.clone(), size)


def _check_keys(what: str, value: Any, keys: set[str]) -> dict[str, Any]:
    """A dict with just these keys."""
    if not isinstance(value, dict) or set(value) != keys:
        raise StorageError(f"{what} is not told by {', '.join(sorted(keys))}.")
    return value


def _check_outputs(outputs: Tensor, n_classes: int, base: fx.GraphModule) -> None:
    """One of the base's outputs for each class."""
    right = outputs.dtype == torch.int64 and outputs.shape == (n_classes,)
    right = right and len(outputs.unique()) == n_classes
    if not right or int(outputs.min()) < 0 or int(outputs.max()) >= _n_outputs(base):
        raise StorageError("outputs is not one output of the base network for each class.")


def _check_clusters(estimator: Any) -> None:
    """Classes, clusters and their names agree."""
    n_classes = len(estimator.classes_)
    clusters, names = estimator.class_clusters_, estimator.cluster_names_
    if len(clusters) != n_classes or int(clusters.max()) >= len(names):
        raise StorageError("class_clusters_ has not one of the clusters for each class.")
    if len(names) > n_classes:
        raise StorageError("There are more clusters than classes.")
