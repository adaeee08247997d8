"""Generated networks and inputs: whatever is given, the answer is right or the error is clear.

    python tests/fuzz_networks.py --count 10000

A case is a small network made of random blocks, with hooks, writes into views, random draws, heads,
label orders, pixel scales, types and memory layouts that people bring.  Where nothing is removed,
answers must be those of the network itself; where something is, the smaller network must compute
what the network does with those filters masked, and cost no more than was asked.  Or there is a
ValueError or TypeError that says what is wrong.  Everything else is a bug of the package: a wrong
answer, another exception, an error where nothing is wrong, a traceback that is printed, a network
of the user's that has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import io
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fuzz_blocks as blocks
import numpy as np
import torch
from fuzz_blocks import Rng
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sinfkit
from sinfkit import DCSPruner, FrozenModel, PruningOptions, RoutingOptions, SINFClassifier

LIMIT = 100.0  # seconds for one case, after which the process ends with a traceback
PER_CLASS = 10
PIXELS = "uint8|scale|values|divided by 255"
ORDER = "model_classes|order|mismatched"


@dataclass
class Case:
    """A network and samples, what must come out, and what may be refused.

    Attributes
    ----------
    drawn : dict of str to str
        What was drawn, for a message.
    module, mean, std : what the user gives
    X, y, asked : samples and labels of `fit`, samples to predict
    labels : the label of each output
    model_classes : what the user says about that
    wanted : probabilities for `asked`; None where there is no right answer
    x : `asked` as the network gets it
    ranks : whether only the best class counts
    refusals : regular expressions of what errors may say; none may be raised without any
    tolerance : of probabilities
    """

    drawn: dict[str, str]
    module: nn.Module
    mean: list[float] | None
    std: list[float] | None
    X: Any
    y: Any
    asked: Any
    labels: np.ndarray
    model_classes: Any
    wanted: np.ndarray | None
    x: torch.Tensor
    ranks: bool
    tolerance: float
    masks: bool
    refusals: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(f"{key}: {value}" for key, value in self.drawn.items())

    def model(self) -> FrozenModel:
        """The network as it is given to an estimator."""
        return FrozenModel(self.module, mean=self.mean, std=self.std)


def draw(seed: int) -> Case:
    """Make case number `seed`."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    drawn: dict[str, str] = {}

    def choose(key: str, *usual: str, rare: tuple[str, ...] = (), often: float = 0.7) -> str:
        """One of what is usual, or sometimes something rare."""
        values = usual if not rare or rng.random() < often else rare
        drawn[key] = values[rng.integers(len(values))]
        return drawn[key]

    input_kind = choose("input", "image", "image", "image", rare=("table", "sequence"), often=0.85)
    shapes = {"image": [(1, 8, 8), (3, 8, 8)], "table": [(12,)], "sequence": [(2, 16)]}[input_kind]
    shape = shapes[rng.integers(len(shapes))]
    head = choose("head", "logits", rare=tuple(blocks.HEADS), often=0.6)
    n_classes = 2 if head.startswith("one_logit") else int(rng.choice([2, 3, 4, 4, 12]))
    fault = blocks.draw_fault(rng) if rng.random() < 0.35 else None
    drawn["fault"] = "none" if fault is None else fault.name

    pixels = choose("pixels", "normal", rare=("unit", "bytes", "large"), often=0.5)
    if input_kind != "image":
        pixels = drawn["pixels"] = "normal"
    pictures, codes = samples(shape, n_classes, rng)
    asked_pictures, _ = samples(shape, n_classes, rng)
    as_fit = SCALES[pixels]
    mean, std = normalisation(pixels, shape, rng)
    drawn["normalised"] = str(mean is not None)

    body, masks = blocks.network(shape, n_classes, head, fault, rng)
    drawn["network"] = " ".join(body.names)
    dtype = choose("dtype", "float32", rare=("float64", "bfloat16", "float16"), often=0.8)
    body = blocks.fitted(body.eval(), tensor(as_fit(pictures), mean, std), codes, head)
    module = blocks.finished(body, head, fault).to(getattr(torch, dtype)).eval()
    reference = copy.deepcopy(module)
    if rng.random() < 0.2 and len(shape) == 3:
        module, drawn["module"] = module.to(memory_format=torch.channels_last), "channels_last"
    if rng.random() < 0.2:
        module, drawn["mode"] = module.train(), "train"

    with torch.inference_mode():
        x = tensor(as_fit(pictures), mean, std).to(getattr(torch, dtype))
        found = blocks.probabilities(reference(x), head).argmax(1).numpy()
    # What order labels are in cannot be seen in the answers of a network that knows nothing.
    good = (found == codes).mean() >= 0.95
    names, y, model_classes, refusals = labelled(codes, n_classes, good, choose, rng)
    if mean is not None and not good:
        refusals.append("seem to be applied already")  # a network that is spoilt says anything
    if fault is not None:
        refusals.append(fault.says)
        if fault.finish is not None:  # after the output layer was fitted
            refusals.append(ORDER)
    refusals += blocks.HEADS.get(head, ())
    asked, wanted_input, says = rescaled(asked_pictures, pixels, choose, rng)
    refusals += says
    layout = choose("layout", "array", rare=tuple(LAYOUTS), often=0.5)
    halved = layout == "half" and asked.dtype.kind == "f"
    X, asked = as_fit(pictures), LAYOUTS[layout](asked)
    if layout == "nested list" and pixels == "bytes":
        refusals.append(PIXELS)  # which knows no type
    elif rng.random() < 0.5:
        X = LAYOUTS[layout](X)
    wanted = None
    x = tensor(wanted_input, mean, std).to(getattr(torch, dtype))
    if fault is None or fault.answers:
        with torch.inference_mode():
            wanted = blocks.probabilities(reference(x.clone()), head).double().numpy()
    if dtype == "float16":
        refusals.append("NaN or infinity|not finite")
    tolerance = {"float32": 3e-4, "float64": 1e-6, "bfloat16": 0.1, "float16": 2e-2}[dtype]
    if halved:
        tolerance = max(tolerance, 2e-2)
    if wanted is not None and dtype != "float64":
        # The network's own rounding, which another order of sums may make anew.
        with torch.inference_mode():
            exact = blocks.probabilities(copy.deepcopy(reference).double()(x.double()), head)
        tolerance = max(tolerance, 3 * float(np.abs(exact.double().numpy() - wanted).max()))
    return Case(
        drawn,
        module,
        mean,
        std,
        X,
        y,
        asked,
        names,
        model_classes,
        wanted,
        x,
        "sigmoid" in head and not head.startswith("one_logit"),
        tolerance,
        masks and fault is None and dtype in ("float32", "float64"),
        [r for r in refusals if r],
    )


# --- samples ----------------------------------------------------------------------------------


def samples(shape: tuple[int, ...], n_classes: int, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of 0 to 255, one pattern per class and noise, and their classes."""
    patterns = np.random.default_rng(5).normal(size=(n_classes, *shape))
    codes = np.repeat(np.arange(n_classes), PER_CLASS)
    z = patterns[codes] + 0.4 * rng.normal(size=(len(codes), *shape))
    order = rng.permutation(len(codes))
    pictures = np.clip(128 + 45 * z, 0, 255).astype(np.uint8)
    pictures.reshape(len(pictures), -1)[:, :2] = [0, 255]  # as real pictures have somewhere
    return pictures[order], codes[order]


SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bytes": lambda p: p,
    "unit": lambda p: (p / 255).astype(np.float32),
    "large": lambda p: p.astype(np.float32),
    "normal": lambda p: ((p - 128.0) / 45).astype(np.float32),
}


def normalisation(
    pixels: str, shape: tuple[int, ...], rng: Rng
) -> tuple[list[float] | None, list[float] | None]:
    """Mean and standard deviation on the scale of the samples, or none."""
    if len(shape) != 3 or rng.random() < 0.4:
        return None, None
    middle, spread = {"normal": (0.1, 1.2), "large": (128.0, 45.0)}.get(pixels, (0.5, 0.18))
    n = shape[0] if rng.random() < 0.7 else 1
    return [middle] * n, [spread] * n


def tensor(x: np.ndarray, mean: list[float] | None, std: list[float] | None) -> torch.Tensor:
    """Samples as the network gets them."""
    x = torch.as_tensor(x / 255.0 if x.dtype == np.uint8 else x).double()
    if mean is not None and std is not None:
        x = (x - torch.tensor(mean).double().view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    return x.float()


def rescaled(
    pictures: np.ndarray, pixels: str, choose: Any, rng: Rng
) -> tuple[Any, np.ndarray, list[str]]:
    """The samples to predict, perhaps on another scale or of another type; and as in fit."""
    same = SCALES[pixels](pictures)
    if pixels == "normal" or choose("asked", "same", rare=("other",), often=0.6) == "same":
        return same, same, []
    others: list[Callable[[np.ndarray], Any]] = [
        *(SCALES[scale] for scale in ("bytes", "unit", "large")),
        *(lambda p, t=t: p.astype(t) for t in (np.int64, np.int16, np.uint16, np.float64)),
        lambda p: (p / 255).astype(np.float64),
    ]
    asked = others[rng.integers(len(others))](pictures)
    choose("asked", f"{asked.dtype} up to {asked.max():g}")
    return asked, same, [PIXELS]


def _reversed(x: np.ndarray) -> np.ndarray:
    """A view with negative strides."""
    return np.ascontiguousarray(x[::-1, ..., ::-1])[::-1, ..., ::-1]


def _inner(x: np.ndarray) -> np.ndarray:
    """A view of every other element."""
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def _read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def _torch(x: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(x.astype(np.int64) if x.dtype == np.uint16 else x)


def _last(x: np.ndarray) -> torch.Tensor:
    t = _torch(x)
    return t.to(memory_format=torch.channels_last) if t.ndim == 4 else t.mT.contiguous().mT


LAYOUTS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda x: x,
    "fortran": np.asfortranarray,
    "reversed": _reversed,
    "strided": _inner,
    "read only": _read_only,
    "other endian": lambda x: x.astype(x.dtype.newbyteorder()),
    "list": lambda x: list(x),
    "nested list": lambda x: x.tolist(),
    "half": lambda x: x.astype(np.float16) if x.dtype.kind == "f" else x,
    "tensor": _torch,
    "channels_last": _last,
    "tensor with gradient": lambda x: (
        _torch(x).double().requires_grad_() if x.dtype.kind == "f" else _torch(x)
    ),
    "expanded": lambda x: _torch(np.repeat(x[..., None], 2, -1))[..., 1],
}


def labelled(
    codes: np.ndarray, n: int, good: bool, choose: Any, rng: Rng
) -> tuple[np.ndarray, np.ndarray, Any, list[str]]:
    """Label of each output, labels of the samples, `model_classes`, and what may be said."""
    kind = choose(
        "labels",
        "indices",
        rare=("strings", "numbers as text", "numbers", "floats", "flags", "objects", "bytes"),
        often=0.5,
    )
    names: np.ndarray = {
        "indices": np.arange(n),
        "strings": np.array(sorted(f"c{i:02d}" for i in range(n))),
        "numbers as text": np.array([str(3 * i) for i in range(n)]),
        "numbers": np.arange(n) * 7 - 3,
        "floats": np.arange(n).astype(float),
        "flags": np.arange(n) > 0 if n == 2 else np.arange(n),
        "objects": np.array([f"c{i:02d}" for i in range(n)], dtype=object),
        "bytes": np.array([f"c{i:02d}".encode() for i in range(n)]),
    }[kind]
    refusals = {"numbers as text": [ORDER], "bytes": ["y|labels|bytes"]}.get(kind, [])
    wrong = ("permuted", "one pair", "said wrong") if good else ()
    order = choose("order", "sorted", rare=("said", *wrong))
    if order != "sorted" and n > 1:
        places = rng.permutation(n)
        if order == "one pair":
            places = np.arange(n)
            places[[0, -1]] = places[[-1, 0]]
        if order == "said wrong":
            return names, names[codes], names[places].tolist(), [*refusals, ORDER]
        names = names[places]
    y = names[codes]
    if order == "said":
        return names, y, names if rng.random() < 0.5 else names.tolist(), refusals
    return names, y, None, refusals if order == "sorted" else [*refusals, ORDER]


# --- what must hold ---------------------------------------------------------------------------


def judge(case: Case, check: str) -> tuple[str, str]:
    """Run one check, and return an outcome and, where it is a bug, what is wrong."""
    printed, before = io.StringIO(), state(case.module)
    with (
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stderr(printed),
    ):
        warnings.simplefilter("always")
        warnings.simplefilter("error", RuntimeWarning)  # arithmetic that went wrong
        try:
            outcome = "right", CHECKS[check](case)
        except (ValueError, TypeError) as error:
            outcome = judge_error(case, error)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = "error", f"{type(error).__name__} at {where.name}: {error}"
    if outcome[1] and outcome[0] == "right":
        # A wrong order of labels of which too little is seen for an error.
        said = " ".join(str(warning.message) for warning in warned)
        if ORDER in case.refusals and "seem mismatched" in said:
            outcome = "warned", ""
    if "Traceback" in printed.getvalue():
        return outcome[0], f"printed: {printed.getvalue()[-300:]}"
    if not outcome[1] and state(case.module) != before:
        return outcome[0], "the user's network has changed"
    return outcome


def judge_error(case: Case, error: Exception) -> tuple[str, str]:
    """Whether an error is about something that is wrong with the case."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error}"
    if any(re.search(pattern, str(error)) for pattern in case.refusals):
        return "refused", ""
    return "error", f"nothing of that kind is wrong: {said}"


def state(module: nn.Module) -> list[Any]:
    """What a fit must leave as it is."""
    tensors = [(k, v._version, v.data_ptr()) for k, v in module.state_dict(keep_vars=True).items()]
    flags = [(m.training, len(m._forward_hooks), len(m._modules)) for m in module.modules()]
    return [tensors, flags]


def nothing_removed(case: Case) -> str:
    """A pruner that removes nothing answers as the network does."""
    pruner = a_pruner(case, (0.0, 0.0)).fit(case.X, case.y)
    return compare(case, pruner, pruner.predict_proba(case.asked), case.wanted)


def budget_of_one(case: Case) -> str:
    """So does one with a budget of all, which is stored and read again."""
    pruner = DCSPruner(
        case.model(),
        criterion="l1",
        budget=1.0,
        repair="none",
        options=PruningOptions(validation_fraction=0, allow_unsliceable=True),
        **common(case),
    ).fit(case.X, case.y)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruner.sinf"
        sinfkit.save(pruner, path)
        pruner = sinfkit.load(path, factory=lambda: copy.deepcopy(case.module))
    return compare(case, pruner, pruner.predict_proba(case.asked), case.wanted)


def routed(case: Case) -> str:
    """A routed network of which nothing is removed answers as the network does."""
    n = len(case.labels)
    half = {label: int(i >= n / 2) for i, label in enumerate(case.labels.tolist())}
    clusterer = sinfkit.SemanticClusterer(n_clusters=1)
    if n >= 4:
        clusterer = sinfkit.SemanticClusterer(method="given", mapping=half)
    kept = {"criterion": "l1", "schedule": "uniform", "pruning_ratios": (0.0, 0.0)}
    sinf = SINFClassifier(
        case.model(),
        clusterer=clusterer,
        pruner=DCSPruner(**kept, repair="none"),
        prefix_pruner=DCSPruner(**kept, repair="none"),
        options=RoutingOptions(exit_threshold=None, router_weight=0.0, prefix_low_rank=1.0),
        **common(case),
    )
    try:
        sinf.fit(case.X, case.y)
    except ValueError as error:
        if re.search("route_layer|cut", str(error)):  # nowhere to cut in two
            return ""
        raise
    wanted = case.wanted
    if wanted is not None:
        position = {name: i for i, name in enumerate(sinf.cluster_names_.tolist())}
        cluster = [position[name] for name in sinf.predict_cluster(case.asked).tolist()]
        # Each subgraph has a temperature of its own.
        scaled = np.log(np.maximum(wanted, 1e-30)) / sinf.temperatures_[cluster][:, None]
        scaled = np.exp(scaled - scaled.max(1, keepdims=True))
        wanted = scaled / scaled.sum(1, keepdims=True)
        # Rounding, which the temperatures may multiply.
        sharper = max(1.0, 1 / float(min(sinf.temperatures_)))
        case = replace(case, ranks=case.tolerance > 1e-3, tolerance=sharper * case.tolerance)
    return compare(case, sinf, sinf.predict_proba(case.asked), wanted)


def masked(case: Case) -> str:
    """A smaller network computes what the network does with the same filters masked."""
    pruner = a_pruner(case, (0.3, 0.5)).fit(case.X, case.y)
    answers = pruner.predict_proba(case.asked)
    if not case.masks or case.wanted is None:
        return "" if np.isfinite(np.asarray(answers)).all() else "the answer is not finite"
    case = copy.copy(case)
    module = copy.deepcopy(case.module).eval()
    parts = dict(module.named_modules())
    for name, kept in pruner.support_.items():
        for part in (parts[name], blocks.norm_behind(parts, name)):
            if part is not None:
                part.register_forward_hook(masking(kept))
    with torch.inference_mode():
        case.wanted = blocks.probabilities(module(case.x), case.drawn["head"]).double().numpy()
    return compare(case, pruner, answers, case.wanted)


def masking(kept: np.ndarray) -> Callable[..., torch.Tensor]:
    """A hook that lets only some channels through."""

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        channels = torch.zeros(output.shape[1], dtype=output.dtype)
        channels[torch.as_tensor(kept)] = 1
        return output * channels.view(-1, *[1] * (output.ndim - 2))

    return hook


def within_budget(case: Case) -> str:
    """What is left, whole blocks left out, costs no more than was asked, as torch counts."""
    budget = 0.7
    pruner = DCSPruner(
        case.model(),
        criterion="l1",
        budget=budget,
        repair="none",
        options=PruningOptions(validation_fraction=0, drop_blocks=True),
        **common(case),
    )
    try:
        pruner.fit(case.X, case.y)
    except (sinfkit.OutOfReachError, sinfkit.errors.UnsliceableError):
        return ""
    counts = []
    for network in (pruner.model_, pruner.base_model_.module()):
        # Attention counts the same in every form only where it is made of products.
        with (
            _no_fast_path(),
            torch.inference_mode(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            network(case.x[:2].clone())
        counts.append(counter.get_total_flops())
    # Behind an ending of its own a network gets an output layer.
    own = 2 * 2 * len(case.labels) ** 2 if hasattr(pruner.model_, "outputs") else 0
    left = (counts[0] - own) / max(counts[1], 1)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(TypeError):  # as it says
        sinfkit.save(pruner, Path(folder) / "pruner.sinf")
        again = sinfkit.load(
            Path(folder) / "pruner.sinf", factory=lambda: copy.deepcopy(case.module)
        )
        difference = np.abs(
            again.predict_proba(case.asked) - pruner.predict_proba(case.asked)
        ).max()
        if not difference <= 1e-2:
            return f"stored and read again it differs by {difference:.3g}"
    return f"{left:.3f} of the cost is left, not {budget}" if left > budget + 0.02 else ""


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Let torch's own attention be made of plain operations inside the block."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


CHECKS: dict[str, Callable[[Case], str]] = {
    "nothing removed": nothing_removed,
    "budget of one": budget_of_one,
    "routed": routed,
    "masked": masked,
    "within budget": within_budget,
}
_SHARES = [0.3, 0.15, 0.15, 0.25, 0.15]


def a_pruner(case: Case, ratios: tuple[float, float]) -> DCSPruner:
    """A pruner that takes filters by their weights and repairs nothing."""
    return DCSPruner(
        case.model(),
        criterion="l1",
        schedule="uniform" if ratios[0] == ratios[1] else "linear",
        pruning_ratios=ratios,
        repair="none",
        options=PruningOptions(validation_fraction=0, allow_unsliceable=True),
        **common(case),
    )


def common(case: Case) -> dict[str, Any]:
    """Parameters of every estimator."""
    model_classes = case.model_classes
    return {
        "model_classes": model_classes,
        "batch_size": 16,
        "device": "cpu",
        "random_state": 0,
    }


def compare(case: Case, estimator: Any, answers: Any, wanted: np.ndarray | None) -> str:
    """What is wrong with answers, if anything."""
    if wanted is None:
        return "no error, where the network has no answer of its own"
    columns = {label: i for i, label in enumerate(case.labels.tolist())}
    order = [columns[label] for label in estimator.classes_.tolist()]
    wanted, found = wanted[:, order], np.asarray(answers, dtype=float)
    gap = np.abs(found - wanted).max()
    if not case.ranks and not gap <= case.tolerance:
        return f"probabilities are off by {gap:.2g}"
    second, best = np.sort(wanted, 1)[:, -2:].T
    sure = best - second > 4 * case.tolerance
    labels = np.asarray(estimator.predict(case.asked))
    wrong = sure & (labels != estimator.classes_[wanted.argmax(1)])
    return f"{wrong.sum()} of {len(sure)} labels are wrong" if wrong.any() else ""


def run(count: int, seed: int, *, report: Callable[[str], None] = print) -> Counter[str]:
    """Judge `count` cases; outcomes by name, those that showed a bug under ``"bug"``."""
    outcomes: Counter[str] = Counter()
    names = list(CHECKS)
    for number in range(seed, seed + count):
        case = draw(number)
        check = names[np.random.default_rng([number, 1]).choice(len(names), p=_SHARES)]
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        outcome, bug = judge(case, check)
        faulthandler.cancel_dump_traceback_later()
        outcomes["bug" if bug else outcome] += 1
        if bug:
            report(f"{number}, {check}: {case}\n    {bug}")
    return outcomes


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    arguments = parser.parse_args()
    outcomes = run(arguments.count, arguments.seed, report=lambda line: print(line, flush=True))
    print(f"{sum(outcomes.values())} networks, from number {arguments.seed}:")
    for outcome, n in outcomes.most_common():
        print(f"{n:>8}  {outcome}")
    return 1 if outcomes["bug"] else 0


if __name__ == "__main__":
    sys.exit(main())
