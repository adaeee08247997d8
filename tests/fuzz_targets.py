"""Everything public, with arguments that are valid and a way to make each of them wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import blobs, small_cnn
from hostile import HUGE, Make, Returns, choice, images, labels, number, tensors, weights
from sklearn.base import clone
from torch import nn

import sinfkit
from sinfkit.criteria import CRITERIA, LayerData, get_criterion
from sinfkit.criteria import separability as separability
from sinfkit.export import to_exported
from sinfkit.zoo import default_network

SINF = sinfkit.SINFClassifier


@dataclass
class Target:
    """Something to call, with arguments that are valid, and values to try in their place.

    Attributes
    ----------
    name : str
    call : callable
        Of the keyword arguments.
    valid : dict
        Arguments with which the call succeeds.
    wrong : dict of str to callable
        What to draw in place of an argument, beside `anything`.
    weight : float
        How often it is called, relative to others.
    always : tuple of str
        Arguments that are made wrong each time, since success would take long.
    never : tuple of str
        Arguments that stay valid.
    paths : tuple of str
        Arguments for which an OSError is right.
    required : tuple of str
        Arguments that may be left out to see what is said.
    draws : bool
        Whether it draws from torch's global generator, as a new network does.
    """

    name: str
    call: Callable[..., Any]
    valid: dict[str, Any]
    wrong: dict[str, Make] = field(default_factory=dict)
    weight: float = 1.0
    always: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    draws: bool = False


class World:
    """Networks, samples, files and fitted estimators: made once, all small."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.X, self.y = blobs(n_classes=4, per_class=8)
        self.frozen = sinfkit.FrozenModel(small_cnn(4, 4), input_shape=(1, 8, 8))
        common = {"model": self.frozen, "random_state": 0, "batch_size": 16}
        self.fresh = {
            "SemanticClusterer": sinfkit.SemanticClusterer(**common, n_clusters=2),
            "DCSPruner": sinfkit.DCSPruner(**common),
            "SINFClassifier": sinfkit.SINFClassifier(
                **common,
                clusterer=sinfkit.SemanticClusterer(n_clusters=2),
                pruner=sinfkit.DCSPruner(),
                route_layer="3",
            ),
        }
        self.fitted = {name: clone(e).fit(self.X, self.y) for name, e in self.fresh.items()}
        self.before = self.answers()
        self.images = folder / "images"
        rng = np.random.default_rng(0)
        from PIL import Image

        for name in ("cat", "dog"):
            (self.images / name).mkdir(parents=True)
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.images / name / "0.png")
        self.table = folder / "table.csv"
        self.table.write_text("wnid,name,cluster\ncat,Cat,pets\ndog,Dog,pets\n")
        self.file = folder / "file"
        self.file.write_bytes(b"not what you think")
        self.damaged = folder / "damaged"
        (self.damaged / "cat").mkdir(parents=True)
        (self.damaged / "cat" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")

    def answers(self) -> list[np.ndarray]:
        """What the fitted estimators say."""
        return [
            self.fitted["SemanticClusterer"].transform(self.X),
            self.fitted["DCSPruner"].predict_proba(self.X),
            self.fitted["SINFClassifier"].predict_proba(self.X),
        ]

    def unchanged(self) -> bool:
        """Whether they still say it."""
        now = self.answers()
        return all(np.array_equal(a, b) for a, b in zip(self.before, now, strict=True))


def parameters_of(world: World, name: str) -> dict[str, Make]:
    """Wrong values for an estimator's parameters."""
    network = small_cnn(4, 4)
    strange = [
        *(Returns(what) for what in ("raises", "tuple", "none", "dict", "cube")),
        *(network, nn.Linear(9, 4), nn.Sequential(), nn.Flatten(), nn.Embedding(3, 4)),
        *(type(network), nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), nn.Conv2d(1, 4, 3)),
        *(small_cnn(7, 4), sinfkit.FrozenModel(network, mean=[0.0, 1.0], std=[1.0, 1.0])),
        *(sinfkit.FrozenModel(network, input_shape=(2, 4, 8)), small_cnn(4, 4).double()),
    ]
    ratios = choice(-0.1, 1.0, 1.5, "0.5", None, True, [0.5], 0.999, np.float64(0.2))
    classes = choice([0], [0, 1, 2, 3], [3, 3], ["a"], [[0]], "ab", 5, [0.5], [None], [7], [])
    table: dict[str, Make] = {
        "model": choice(*strange),
        "clusterer": choice(
            sinfkit.DCSPruner(),
            sinfkit.SemanticClusterer(method="given"),
            sinfkit.SemanticClusterer(model=network),
            sinfkit.SemanticClusterer(pool_size=-1),
            sinfkit.SemanticClusterer(n_clusters=3, max_cluster_size=1),
            sinfkit.SemanticClusterer,
        ),
        "pruner": choice(
            sinfkit.SemanticClusterer(),
            sinfkit.DCSPruner(schedule="iterative"),
            sinfkit.DCSPruner(classes=[0]),
            sinfkit.DCSPruner(options=sinfkit.PruningOptions(penalty="a")),
            sinfkit.DCSPruner(schedule="global"),
            sinfkit.DCSPruner(schedule="global", budget=1e-6),
            sinfkit.DCSPruner,
        ),
        "mapping": choice(
            *({0: "a"}, {0: "a", 1: "a", 2: "b", 3: "b"}, {"a": [0, 1], "b": [1, 2, 3]}),
            *({"a": [[0]]}, {0: object(), 1: 1, 2: "a", 3: None}, {(0,): 1}, {"a": [0, 1, 2, 3]}),
            *([0, 0, 1, 1], {0: [0], 1: {"a": 1}}, {0: np.nan, 1: 0, 2: 0, 3: 0}),
        ),
        "method": choice("given", "activation", "Confusion", "random"),
        "layer": choice("nowhere", "11", "0", "", "3"),
        "route_layer": choice("nowhere", "11", "0", "", "auto"),
        "first_layer": choice("nowhere", "7", "1", ""),
        "criterion": choice("nothing", "l1", "random", weights, lambda data: torch.ones(1), print),
        "prefix_criterion": choice("nothing", "l1", "dcs", lambda data: data.weight * np.nan),
        "schedule": choice("global", "iterative", "Linear", "uniform"),
        "repair": choice("mean", "fine_tune", "none"),
        "options": choice(
            *(sinfkit.PruningOptions(penalty=p) for p in (-1.0, "a", None, [1])),
            *(sinfkit.PruningOptions(validation_fraction=f) for f in (0.0, 1.0, "0.5")),
            *(sinfkit.PruningOptions(first_layer=name) for name in ("nowhere", "7", 3)),
            *(sinfkit.PruningOptions(budget_unit="flops"), sinfkit.PruningOptions, 3),
        ),
        "pruning_ratios": choice(0.5, (0.5,), (0.6, 0.5), ("a", 0.5), (0.1, 1.0), None, "ab"),
        "budget_unit": choice("flops", "params"),
        "answers": choice("some", "cluster"),
        "fallback": choice("base", "top2", "luck"),
        "model_classes": choice(
            [0, 1, 2, 3], list("abcd"), ["a", 1, None, 2], [0, 0, 1, 2], "abcd"
        ),
        "classes": classes,
        "device": choice("gpu", "cuda", "cuda:99", "cpu:x", "meta", torch.device("cpu"), "mps"),
        "memory": choice("cache", 3, Path("cache"), object()),
        "n_jobs": choice(0, "two", 1.5, -1, 2, [1]),
        "random_state": choice(-1, 1.5, "seed", np.random.default_rng(0), 2**40, [1, 2]),
        "batch_size": choice(0, -3, 2.0, "16", 3, np.int8(5), HUGE),
    }
    for ratio in ("max_accuracy_drop", "confidence", "budget", "prefix_ratio", "prefix_low_rank"):
        table[ratio] = ratios
    table["validation_fraction"] = ratios
    names = world.fresh[name].get_params(deep=False)
    return {parameter: table.get(parameter, number) for parameter in names}


def targets(world: World) -> list[Target]:
    """Everything public, each with valid arguments and a way to make them wrong."""
    X, y, X_wrong, y_wrong = world.X, world.y, images(world.X), labels(world.y)
    data, wrong = {"X": X, "y": y}, {"X": X_wrong, "y": y_wrong}
    weight_wrong = labels(np.ones(len(y)) + y)
    small_ints = choice(0, -1, 1, 2.5, "3", True, None, [2])
    flags = choice("yes", 2, None, [], np.array([True, False]))
    found: list[Target] = []

    def add(name: str, call: Callable[..., Any], valid: dict[str, Any], **more: Any) -> None:
        found.append(Target(name, call, valid, **more))

    for name, fresh in world.fresh.items():
        fitted = world.fitted[name]
        valid = fresh.get_params(deep=False)

        def fit(fitted: Any = fitted, **a: Any) -> Any:
            estimator = _twin(fitted)
            held = dict(vars(estimator))
            given = ("X", "y", "X_val", "y_val", "sample_weight", "sample_weight_val")
            samples = {k: a.pop(k) for k in given if k in a}
            estimator.set_params(**a)
            parameters = set(a)
            try:
                estimator.fit(**samples)
            except BaseException as error:
                same = all(vars(estimator)[k] is v for k, v in held.items() if k not in parameters)
                if not same or vars(estimator).keys() != held.keys():
                    raise AssertionError(
                        f"A failed fit has changed {type(fitted).__name__}"
                    ) from error
                raise
            return estimator.predict(X)

        more: dict[str, Any] = {"sample_weight": None}
        more_wrong = {"sample_weight": weight_wrong}
        if name == "SINFClassifier":
            more |= {"X_val": X[:8], "y_val": y[:8], "sample_weight_val": None}
            more_wrong |= {"X_val": X_wrong, "y_val": y_wrong, "sample_weight_val": weight_wrong}
        add(
            f"{name}.fit",
            fit,
            valid | data | more,
            wrong=parameters_of(world, name) | wrong | more_wrong,
            weight=6,
            paths=("memory",),
            required=("X", "y"),
        )
        add(f"{name}()", type(fresh), valid, wrong=parameters_of(world, name))
        methods = ["predict", "transform", "predict_proba", "predict_cluster"]
        for method in methods:
            if hasattr(fitted, method):
                add(
                    f"{name}.{method}",
                    _method(fresh, fitted, method),
                    {"X": X, "batch_size": 16, "fitted": True},
                    wrong={"X": X_wrong, "batch_size": parameters_of(world, name)["batch_size"]},
                    weight=3,
                    never=("fitted",),
                    required=("X",),
                )
        if hasattr(fitted, "score"):
            add(
                f"{name}.score",
                _method(fresh, fitted, "score"),
                data | {"sample_weight": None, "fitted": True},
                wrong=wrong | {"sample_weight": weight_wrong},
                weight=2,
                never=("fitted",),
                required=("X", "y"),
            )
        add(
            f"{name}.to",
            _method(fresh, fitted, "to"),
            {"device": "cpu", "fitted": True},
            wrong={"device": parameters_of(world, name)["device"]},
            never=("fitted",),
            required=("device",),
        )
        add(
            f"{name}.set_params",
            lambda fitted=fitted, **a: _twin(fitted).set_params(**a) and None,
            {"verbose": 0},
            weight=0.5,
        )
        if hasattr(fitted, "get_feature_names_out"):
            add(
                f"{name}.get_feature_names_out",
                _method(fresh, fitted, "get_feature_names_out"),
                {"fitted": True},
                never=("fitted",),
                weight=0.2,
            )

    fresh, sinf = world.fresh["SINFClassifier"], world.fitted["SINFClassifier"]
    add(
        "SINFClassifier.report",
        _method(fresh, sinf, "report"),
        data | {"latency_batch": 4, "repeats": 0, "fitted": True},
        wrong=wrong | {"latency_batch": small_ints, "repeats": choice(-1, 1.5, "2", None, [1])},
        weight=2,
        never=("fitted",),
        required=("X", "y"),
    )
    add(
        "SINFClassifier.runtime",
        _method(fresh, sinf, "runtime"),
        {"dtype": "bfloat16", "fitted": True},
        wrong={"dtype": choice("float32", torch.float16, "int8", 3)},
        never=("fitted",),
    )
    add(
        "to_onnx",
        sinf.to_onnx,
        {"folder": "onnx", "dtype": "int8", "X": X} | {"opset": 18, "overwrite": False},
        wrong={"X": X_wrong, "folder": choice(world.file, "", "a\0b", world.images, 3)}
        | {"opset": small_ints, "dtype": choice("float16", "int4", np.int8), "overwrite": flags},
        paths=("folder",),
        always=("opset",),
        required=("folder",),
    )
    add(
        "to_exported",
        to_exported,
        {"network": sinf.network_, "input_shape": sinf.input_shape_},
        wrong={"network": choice(fresh, sinf, world.fitted["DCSPruner"], SINF, None)},
        always=("network",),
        required=("input_shape",),
        weight=0.3,
    )
    stored = world.folder / "stored.sinf"
    sinfkit.save(sinf, stored)
    add(
        "save",
        sinfkit.save,
        {"estimator": sinf, "path": world.folder / "again.sinf"},
        wrong={"path": choice(world.images, "", "a\0b", 3, world.folder / "none" / "x.sinf")}
        | {"estimator": choice(fresh, SINF, None, 3)},
        paths=("path",),
        required=("estimator", "path"),
    )
    add(
        "load",
        lambda **a: sinfkit.load(**a).predict(X),
        {"path": stored, "factory": lambda: small_cnn(4, 4), "device": None} | {"max_bytes": 10**9},
        wrong={"path": choice(world.file, world.images, "", "a\0b", 3, "nowhere")}
        | {"factory": choice(None, 3, small_cnn(4, 4), int, print)}
        | {"device": parameters_of(world, "DCSPruner")["device"], "max_bytes": small_ints},
        paths=("path",),
        weight=1.5,
        required=("path",),
    )
    pixel = choice("a", [1, "a"], [np.nan], [[0.5]], [0.0], [1.0, 2.0], -1.0, [], {}, 0.5)
    add(
        "FrozenModel()",
        lambda **a: sinfkit.FrozenModel(**a).digest,
        {"module": small_cnn(4, 4), "mean": [0.5], "std": [0.5], "input_shape": (1, 8, 8)},
        wrong={"module": parameters_of(world, "DCSPruner")["model"], "mean": pixel, "std": pixel}
        | {"input_shape": choice((1, -8, 8), "abc", (1, "a"), 5, (0,), [], (1.5, 2), (1, 8, HUGE))},
        weight=2,
        required=("module",),
    )
    add(
        "FrozenModel.module",
        world.frozen.module,
        {"device": "cpu"},
        wrong={"device": parameters_of(world, "DCSPruner")["device"]},
        weight=0.5,
    )
    features, codes = (
        torch.randn(12, 3, 2, generator=torch.Generator().manual_seed(0)),
        np.arange(12),
    )
    classes = torch.as_tensor(codes % 3)
    wrong_features = tensors(features)
    activations = {"features": features, "y": classes}
    wrong_activations = {"features": wrong_features, "y": tensors(classes)}
    add(
        "discriminative_capability",
        sinfkit.discriminative_capability,
        activations | {"penalty": 3.0} | {"tol": 1e-6, "max_iter": 20, "sample_weight": None},
        wrong=wrong_activations
        | {"penalty": number, "tol": number}
        | {"max_iter": small_ints, "sample_weight": tensors(torch.ones(len(features)))},
        weight=3,
        required=("features", "y"),
    )
    for name in separability.__all__:
        options = {
            "discriminant_information": {"ridge": 1e-3},
            "max_mean_discrepancy": {"max_samples": 100, "generator": None},
        }.get(name, {})
        weighted = {} if name == "max_mean_discrepancy" else {"sample_weight": None}
        add(
            f"separability.{name}",
            getattr(separability, name),
            activations | options | weighted,
            wrong=wrong_activations
            | dict.fromkeys(options, number)
            | dict.fromkeys(weighted, tensors(torch.ones(len(features)))),
            weight=0.3,
            required=("features", "y"),
        )
    add(
        "get_criterion",
        lambda **a: get_criterion(**a) and None,
        {"criterion": "dcs"},
        wrong={"criterion": choice("DCS", print, weights, sorted(CRITERIA))},
        weight=0.5,
    )
    for name, criterion in CRITERIA.items():
        valid = {key: value for key, value in activations.items() if key in criterion.needs}
        if not valid:
            continue
        options = {k: 1.0 for k in criterion.options if k in ("penalty", "share", "power")}

        def call(criterion: Any = criterion, **a: Any) -> Any:
            chosen = {k: a.pop(k) for k in criterion.options if k in a}
            return criterion.function(LayerData(name="layer", **a), **chosen)

        if criterion.needs <= {"features", "y"}:
            add(
                f"criterion {name}",
                call,
                valid | options,
                wrong={k: v for k, v in wrong_activations.items() if k in valid}
                | dict.fromkeys(options, number),
                weight=0.2,
                required=tuple(sorted(valid)),
            )
    for name in ("vgg16", "vgg19", "resnet50"):
        stem = {"stem": "half"} if name == "resnet50" else {}
        add(
            name,
            getattr(sinfkit, name),
            {"n_classes": 2, "width": 0.02, "in_channels": 1} | stem,
            wrong={"n_classes": small_ints, "in_channels": small_ints, "stem": choice("CIFAR", 1)}
            | {"width": choice(0, -1.0, "1", None, np.nan, [1.0], True, np.inf)},
            draws=True,
            weight=0.5,
        )
    add(
        "default_network",
        default_network,
        {"input_shape": (1, 8, 8), "n_classes": 3, "dtype": torch.float32, "random_state": 0},
        wrong={"input_shape": choice((1, 8), (0, 8, 8), "abc", 5, (1, "a", 8), (1, 8, 8, 8), None)}
        | {"n_classes": small_ints, "dtype": choice("float32", torch.int64, np.float32, None)}
        | {"random_state": parameters_of(world, "DCSPruner")["random_state"]},
        required=("input_shape", "n_classes"),
    )
    training = {"model": small_cnn(4, 4), "X": X, "y": y, "epochs": 1, "batch_size": 16}
    training |= {"max_lr": 0.01, "augment": None}
    training |= {"mean": 0.0, "std": 1.0, "checkpoint": None}
    training |= {"device": "cpu", "random_state": 0, "verbose": 0}
    training |= {"sample_weight": None}
    add(
        "train_network",
        lambda **a: sinfkit.train_network(**a) and None,
        training,
        wrong={k: v for k, v in parameters_of(world, "DCSPruner").items() if k in training}
        | {"X": X_wrong, "y": y_wrong, "epochs": small_ints}
        | {"sample_weight": weight_wrong}
        | {"mean": pixel, "std": pixel, "augment": choice("flip", "crop_flip", 1), "max_lr": number}
        | {"checkpoint": choice(world.file, world.images, "", "a\0b", 3)},
        weight=4,
        paths=("checkpoint",),
        required=("model", "X", "y", "epochs"),
    )
    for name in ("load_cifar10", "load_cifar100"):
        add(
            name,
            getattr(sinfkit, name),
            {"root": "nowhere", "train": True, "download": False},
            always=("root",),
            wrong={"root": choice("nowhere", world.file, "", "a\0b", 3), "train": flags}
            | {"download": choice("yes", 2, None, [], 0)},
            paths=("root",),
            weight=0.5,
            required=("root",),
            never=("download",),
        )
    add(
        "load_image_folder",
        sinfkit.load_image_folder,
        {"folder": world.images, "class_table": world.table, "size": None, "n_jobs": None},
        wrong={"folder": choice("nowhere", world.file, "", "a\0b", world.damaged, 3, world.folder)}
        | {"class_table": choice("nowhere", world.images, world.file, "a\0b"), "size": small_ints}
        | {"n_jobs": parameters_of(world, "SemanticClusterer")["n_jobs"]},
        paths=("folder", "class_table"),
        weight=2,
        required=("folder",),
    )
    add(
        "ImageDataset()",
        lambda **a: repr(sinfkit.zoo.ImageDataset(**a)),
        {"X": X, "y": y, "class_names": ("a", "b"), "clusters": None},
        weight=0,
    )
    found += displays(world, wrong, y_wrong)
    return found


def displays(world: World, wrong: dict[str, Make], y_wrong: Make) -> list[Target]:
    """The pictures: constructed, drawn, and made from estimators."""
    sinf, pruner = world.fitted["SINFClassifier"], world.fitted["DCSPruner"]
    clusterer = world.fitted["SemanticClusterer"]
    estimators = choice(
        world.fresh["SINFClassifier"], pruner, clusterer, sinf, SINF, None, "a", world.frozen
    )
    data = {"X": world.X, "y": world.y}
    report = sinf.report(world.X, world.y, repeats=0)
    cost = {"cost": choice("time", "latency")}
    table: list[tuple[str, dict[str, Any], dict[str, Make]]] = [
        (
            "SpeedAccuracyDisplay",
            {"base_accuracy": 0.7, "points": {"a": [(0.5, 0.7)]}, "cost": "macs"},
            cost,
        ),
        ("FilterScoreDisplay", {"scores": {"a": np.ones(3)}, "kept": {"a": 2}, "name": "dcs"}, {}),
        ("FilterOverlapDisplay", {"overlap": np.eye(2), "names": ["a", "b"]}, {}),
        (
            "ClusterTreeDisplay",
            {"affinity": np.eye(2), "names": ["a", "b"], "clusters": np.arange(2)},
            {},
        ),
    ]
    found = []
    for name, valid, values in table:
        kind = getattr(sinfkit, name)
        found.append(
            Target(
                f"{name}().plot",
                lambda ax, kind=kind, **a: _drawn(kind(**a).plot(ax=ax)),
                valid | {"ax": None},
                values,
                weight=0.7,
                never=tuple({"ax", *valid} - {"cost"}),  # displays check no data that they draw
                required=tuple(valid)[:1],
            )
        )
    sources: list[tuple[str, dict[str, Any], dict[str, Make]]] = [
        ("SpeedAccuracyDisplay.from_estimator", data | {"cost": "macs", "repeats": 1}, wrong),
        ("FilterScoreDisplay.from_estimator", {"cluster": 0}, {"cluster": choice(-1, 9, "a", 1.0)}),
        ("FilterOverlapDisplay.from_estimator", {"layer": "7"}, {"layer": choice("0", "no", 7)}),
        ("RouteConfusionDisplay.from_estimator", data | {"normalize": "true"}, wrong),
        ("ClusterTreeDisplay.from_estimator", {"names": list("abcd")}, {}),
    ]
    for name, valid, values in sources:
        kind, method = name.split(".")
        call = getattr(getattr(sinfkit, kind), method)
        found.append(
            Target(
                name,
                lambda call=call, **a: _drawn(call(**a)),
                {"estimator": sinf, "ax": None} | valid,
                {"estimator": estimators, "normalize": choice("rows", "all", None)}
                | {"cost": choice("time", "latency"), "repeats": choice(-1, "a", 0)}
                | {"names": choice(["a"], None, [1, 2, 3, 4], "abcd", "abc")}
                | values,
                weight=0.7,
                never=("ax", "names", "repeats"),
                required=("estimator",),
            )
        )
    found.append(
        Target(
            "SpeedAccuracyDisplay.from_reports",
            lambda **a: _drawn(sinfkit.SpeedAccuracyDisplay.from_reports(**a)),
            {"reports": {"a": [report]}, "cost": "macs", "ax": None},
            cost,
            never=("ax", "reports"),
            weight=0.5,
        )
    )
    return found


def _drawn(display: Any) -> None:
    import matplotlib.pyplot as plt

    display.figure_.canvas.draw()
    plt.close("all")


def _twin(estimator: Any) -> Any:
    """A fitted estimator that shares everything with another one but its own attributes."""
    twin = object.__new__(type(estimator))
    twin.__dict__.update(estimator.__dict__)
    return twin


def _method(fresh: Any, fitted: Any, name: str) -> Callable[..., Any]:
    """Call a method, of an estimator that is not fitted where the case says so."""

    def call(**a: Any) -> Any:
        estimator = _twin(fitted) if a.pop("fitted") else clone(fresh)
        if "batch_size" in a:
            estimator.set_params(batch_size=a.pop("batch_size"))
        result = getattr(estimator, name)(**a)
        return None if name in ("report", "runtime", "to") else result

    return call
