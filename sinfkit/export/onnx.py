"""A routed network as files for other runtimes: ONNX, and `torch.export` programs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from ..data.images import Images
from ..graph.cost import fold_batch_norm
from ..graph.tracing import difference, trace
from ..inference.network import Route, SINFNetwork, cluster_posterior
from ..utils.device import on_host_by_default, settle_after_fork
from ..utils.params import check_choice, check_flag, check_integer, check_kind, check_path
from ..utils.pickling import pack

__all__ = ["to_exported", "to_onnx"]

SCHEMA = 1
OPSET = 18  # what torch's exporter writes without converting; onnxruntime 1.14 reads it
MANIFEST, LOADER = "manifest.json", "sinf_onnx.py"
_CALIBRATION_SAMPLES = 256
_ONNX_TOLERANCE = 1e-2  # of the largest value: far above rounding, far below another operation
_DTYPES = ("float32", "int8")
_KINDS = {"U": "str", "b": "bool"}


class _Router(nn.Module):
    """What runs for every sample: normalisation, prefix and route predictor."""

    def __init__(self, network: SINFNetwork) -> None:
        super().__init__()
        self.normalise, self.router = network.normalise, network.router
        self.prefix = _folded(network.prefix)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prefix's output and the fine classes' log-posterior."""
        h = self.prefix(self.normalise(x))
        return h, self.router(h)


def to_exported(network: SINFNetwork, input_shape: tuple[int, ...]) -> dict[str, ExportedProgram]:
    """Turn each part of a routed network into a `torch.export` program.

    Parameters
    ----------
    network : SINFNetwork
        ``network_`` of a fitted `SINFClassifier`; it is not changed.
    input_shape : tuple of int
        Shape of one sample: the classifier's ``input_shape_``.

    Returns
    -------
    dict of str to torch.export.ExportedProgram
        ``"router"`` takes samples of shape (n_samples, ...) before normalisation, and gives the
        prefix's output and the route predictor's log-posterior of shape (n_samples, n_classes).
        ``"subgraph_<cluster>"`` and, with ``fallback="base"``, ``"base"`` take the prefix's output
        and give logits.  A cluster without subgraph has no entry.  All compute in float32 on the
        CPU, with batch-norms folded, for any n_samples >= 1.

    Raises
    ------
    TypeError
        If `network` is no routed network.
    ValueError
        If a part cannot be exported, as where its code depends on the values of a tensor.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import DCSPruner, SemanticClusterer, SINFClassifier
    >>> from sinfkit.export import to_exported
    >>> X, y = load_digits(return_X_y=True)
    >>> clusterer = SemanticClusterer(n_clusters=2)
    >>> clf = SINFClassifier(clusterer=clusterer, pruner=DCSPruner(budget=0.6), random_state=0)
    >>> clf = clf.fit(X[:500], y[:500])
    >>> sorted(to_exported(clf.network_, clf.input_shape_))
    ['router', 'subgraph_0'...]
    """
    check_kind("network", network, SINFNetwork, "the network_ of a fitted SINFClassifier")
    return _export_parts(_portable(network), input_shape)


@on_host_by_default()
def to_onnx(
    network: SINFNetwork,
    folder: str | Path,
    *,
    classes: np.ndarray,
    input_shape: tuple[int, ...],
    dtype: Literal["float32", "int8"] = "float32",
    X: Images | None = None,
    opset: int = OPSET,
    overwrite: bool = False,
) -> Path:
    """Write a routed network as ONNX files that run without torch.

    `SINFClassifier.to_onnx` calls it with what the classifier knows.

    Parameters
    ----------
    network : SINFNetwork
        ``network_`` of a fitted `SINFClassifier`; it is not changed.
    folder : str or Path
        Is made, with ``router.onnx``, one ``subgraph_<cluster>.onnx`` per subgraph, ``base.onnx``
        where the fallback is the base network, ``manifest.json`` with everything else, and
        ``sinf_onnx.py``, which loads them with numpy and onnxruntime alone.
    classes : ndarray of shape (n_classes,)
        Labels, in the network's order: the classifier's ``classes_``.
    input_shape : tuple of int
        Shape of one sample: the classifier's ``input_shape_``.
    dtype : {"float32", "int8"}, default="float32"
        ``"int8"`` quantises weights, one scale per channel, and activations, one scale per tensor.
        Logits and the route predictor stay in float32.
    X : ndarray or Tensor of shape (n_samples, ...), optional
        Samples from which int8 takes the range of the activations; 256 of them, evenly spaced, are
        enough.
    opset : int, default=18
        Version of ONNX's operators, 18 or later.
    overwrite : bool, default=False
        Replace an earlier export.  A folder that holds anything else is never replaced.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    TypeError
        If `network` is no routed network.
    ImportError
        If the packages of the extra ``sinfkit[onnx]`` are missing.
    FileExistsError
        If `folder` is a file or is not empty, unless it is an earlier export and `overwrite` is
        true.
    ValueError
        For a parameter out of range, labels that JSON cannot hold, or a part that cannot be
        exported.

    Notes
    -----
    All is written into a folder beside `folder` which is renamed at the end: a crash leaves no half
    export behind.

    Examples
    --------
    >>> import tempfile
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import DCSPruner, SemanticClusterer, SINFClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> clusterer = SemanticClusterer(n_clusters=2)
    >>> clf = SINFClassifier(clusterer=clusterer, pruner=DCSPruner(budget=0.6), random_state=0)
    >>> clf = clf.fit(X[:500], y[:500])
    >>> folder = clf.to_onnx(tempfile.mkdtemp())
    >>> sorted(path.name for path in folder.glob("*.onnx"))
    ['router.onnx', 'subgraph_0.onnx'...]
    """
    check_kind("network", network, SINFNetwork, "the network_ of a fitted SINFClassifier")
    check_choice("dtype", dtype, _DTYPES)
    check_integer("opset", opset, low=OPSET)
    check_flag("overwrite", overwrite)
    folder = check_path("folder", folder)
    if dtype == "int8" and X is None:
        raise ValueError('dtype="int8" needs X: some hundred samples, as the network will see.')
    _require("onnx", "onnxscript", *(("onnxruntime",) if dtype == "int8" else ()))
    _check_opset(opset)
    folder = folder.resolve()
    _check_target(folder, overwrite)
    manifest = _describe(network, np.asarray(classes), input_shape, dtype)
    samples = None
    if dtype == "int8":
        assert X is not None
        samples = _some_samples(X, input_shape)
    network = _portable(network)
    programs = _export_parts(network, input_shape)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    beside.mkdir()
    try:
        for name, program in programs.items():
            _save(program, beside / f"{name}.onnx", name == "router", opset)
        if samples is not None:
            _quantise(network, beside, list(programs), samples)
        shutil.copyfile(Path(__file__).with_name("onnx_loader.py"), beside / LOADER)
        manifest["sha256"] = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(beside.iterdir())
        }
        text = json.dumps(manifest, indent=1, allow_nan=False)
        (beside / MANIFEST).write_text(text, encoding="utf-8")
        _put_in_place(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _check_opset(opset: int) -> None:
    """Raise for a version that the installed `onnx` does not know."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise ValueError(f"opset must be at most {newest} with this onnx, got {opset!r}.")


def _portable(network: SINFNetwork) -> SINFNetwork:
    """Copy a network to the CPU, in float32."""
    copy: SINFNetwork = pack(network).unpack("cpu")
    return copy.eval().requires_grad_(False).float()


def _folded(module: nn.Module) -> fx.GraphModule:
    """Batch-norms folded, which quantisation needs: a layer and its norm share one scale."""
    return fold_batch_norm(module if isinstance(module, fx.GraphModule) else trace(module))


def _export_parts(network: SINFNetwork, input_shape: tuple[int, ...]) -> dict[str, ExportedProgram]:
    """Export the router, the subgraphs and the base's rest."""
    settle_after_fork()
    router = _Router(network).eval()
    # Two samples: torch takes a batch of one for a fixed size.
    x = torch.zeros(2, *input_shape)
    with torch.no_grad():
        h = router(x)[0]
    programs = {"router": _export("router", router, x)}
    for c in range(network.n_clusters):
        subgraph = network.subgraph(c)
        if subgraph is not None:
            name = f"subgraph_{c}"
            programs[name] = _export(name, _folded(subgraph), h)
    if network.fallback == "base":
        assert network.rest is not None
        programs["base"] = _export("base", _folded(network.rest), h)
    return programs


def _export(name: str, module: nn.Module, example: Tensor) -> ExportedProgram:
    """Export one part, for batches of any size."""
    shapes = ({0: Dim("batch", min=1)},)
    try:
        return torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch raises many kinds here, some of them private
        raise ValueError(
            f"torch.export cannot export {name!r}: {error}\nWrite the network's forward without "
            "Python code that depends on the values of tensors or on the size of the batch."
        ) from error


def _save(program: ExportedProgram, path: Path, is_router: bool, opset: int) -> None:
    """Write one part as ONNX, and see that it is read."""
    try:
        converted = torch.onnx.export(
            program,
            input_names=["x" if is_router else "h"],
            output_names=["h", "log_posterior"] if is_router else ["logits"],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # torch raises many kinds here
        text = re.sub(r"\x1b\[\d+m", "", str(error)).strip().splitlines()
        raise ValueError(
            f"{path.stem!r} cannot be written as ONNX: {text[0] if text else type(error).__name__}"
        ) from error
    assert converted is not None
    converted.save(str(path))
    _check_read(program, path)


def _check_read(program: ExportedProgram, path: Path) -> None:
    """Raise where onnxruntime, if it is installed, cannot run a file, or answers otherwise."""
    if importlib.util.find_spec("onnxruntime") is None:
        return
    import onnxruntime

    (example,) = program.example_inputs[0]
    # Below 1, so that a network that takes rows by their numbers is asked for one that is there.
    x = 2 * torch.rand(3, *example.shape[1:], generator=torch.Generator().manual_seed(0)) - 1
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        found = session.run(None, {session.get_inputs()[0].name: x.to(example.dtype).numpy()})
    except Exception as error:  # onnxruntime's own kinds, some of them private
        raise ValueError(
            f"{path.stem!r} was written as ONNX, but onnxruntime cannot run it: {error}"
        ) from error
    with torch.no_grad():
        wanted = program.module()(x.to(example.dtype))
    for ours, theirs in zip(found, wanted if len(found) > 1 else [wanted], strict=True):
        if difference(torch.as_tensor(ours), theirs) > _ONNX_TOLERANCE:
            raise ValueError(
                f"{path.stem!r} was written as ONNX, but onnxruntime gives other answers: an "
                "operation has another meaning there. Write it with more common ones."
            )


def _describe(
    network: SINFNetwork, classes: np.ndarray, input_shape: tuple[int, ...], dtype: str
) -> dict[str, Any]:
    """Everything that the loader must know and that is not in an ONNX file."""
    parts = range(network.n_clusters)
    return {
        "schema": SCHEMA,
        "dtype": dtype,
        "classes": _labels(classes),
        "input_shape": [int(n) for n in input_shape],
        "n_clusters": network.n_clusters,
        "class_clusters": network.class_clusters.tolist(),
        "answered": network.answered.tolist(),
        "outputs": network.outputs.tolist(),
        "temperatures": network.temperatures.tolist(),
        "router_weight": float(network.router_weight),
        "threshold": float(network.threshold),
        "exit_threshold": network.exit_threshold,
        "fallback": network.fallback,
        "router": "router.onnx",
        "subgraphs": [None if network.subgraph(c) is None else f"subgraph_{c}.onnx" for c in parts],
        "base": "base.onnx" if network.fallback == "base" else None,
    }


def _labels(classes: np.ndarray) -> dict[str, Any]:
    """Labels as JSON values, and the NumPy type to read them back into."""
    values = classes.tolist()
    simple = all(isinstance(value, (str, bool, int, float)) for value in values)
    if classes.dtype.kind not in "Ubiuf" and not (classes.dtype.kind == "O" and simple):
        raise ValueError(
            f"manifest.json cannot hold labels of type {classes.dtype}, such as {values[0]!r}. Fit "
            "with labels that are strings, integers, floats or booleans."
        )
    kind = _KINDS.get(classes.dtype.kind, str(classes.dtype))
    return {"kind": kind, "values": values}


def _some_samples(X: Images, input_shape: tuple[int, ...]) -> np.ndarray:
    """At most 256 samples, evenly spaced, as the router takes them."""
    if tuple(X.shape[1:]) != tuple(input_shape):
        raise ValueError(
            f"X must have shape (n_samples, {', '.join(map(str, input_shape))}), got "
            f"{tuple(X.shape)}."
        )
    rows = np.unique(np.linspace(0, len(X) - 1, _CALIBRATION_SAMPLES).round().astype(int))
    some = torch.as_tensor(X[rows])
    scale = 255.0 if some.dtype == torch.uint8 else 1.0
    return (some.cpu().to(torch.float32) / scale).numpy()


def _quantise(network: SINFNetwork, folder: Path, names: list[str], x: np.ndarray) -> None:
    """Replace the ONNX files by int8 ones, each calibrated on the samples that reach it."""
    import onnxruntime

    router = folder / "router.onnx"
    _quantise_file(router, "x", x)
    session = onnxruntime.InferenceSession(str(router), providers=["CPUExecutionProvider"])
    h, log_posterior = session.run(None, {"x": x})
    log_p = torch.as_tensor(log_posterior)
    posterior = cluster_posterior(log_p, network.class_clusters, network.n_clusters)
    confidence, cluster = posterior.max(1)
    rows, branch = (
        t.numpy() for t in network.branches(Route(log_p, posterior, cluster, confidence))
    )
    for name in names[1:]:
        number = network.n_clusters if name == "base" else int(name.removeprefix("subgraph_"))
        reached = rows[branch == number]
        # A branch that none of the samples takes is better off with strangers than with none.
        _quantise_file(folder / f"{name}.onnx", "h", h[reached] if len(reached) else h)


def _quantise_file(path: Path, name: str, samples: np.ndarray) -> None:
    """Static quantisation with nodes around each operator that say how its inputs are rounded."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[np.ndarray] = iter(
                samples[start : start + 32] for start in range(0, len(samples), 32)
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {name: batch}

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        # Weights of 7 bits: sums of full ones saturate on processors with AVX2 and without VNNI.
        reduce_range=True,
        # Signed ones would leave the layer in front of a cut in float32: ONNX Runtime makes them
        # unsigned on x86, but not those that leave the file, and mixes no signs in an operator.
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        nodes_to_exclude=_behind(onnx.load(str(prepared)).graph, "h"),
        # 256 steps for all classes' logits would make ties of near answers.
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
    )
    prepared.unlink()


def _behind(graph: Any, output: str) -> list[str]:
    """Names of the nodes that an output does not need: those of the route predictor."""
    outputs = {value.name for value in graph.output}
    if output not in outputs:
        return []
    needed = {output}
    for node in reversed(graph.node):  # ONNX lists nodes in the order in which they run
        if needed.intersection(node.output):
            needed.update(node.input)
    return [node.name for node in graph.node if not needed.intersection(node.output)]


def _require(*packages: str) -> None:
    """Raise where a package of the extra is missing."""
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ImportError(
            f"Export to ONNX needs {' and '.join(missing)}: pip install 'sinfkit[onnx]'."
        )


def _check_target(folder: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an earlier export, and that only if asked."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder for the export.")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder} is not empty. Name another folder, or pass overwrite=True to replace an "
            "earlier export."
        )
    if not ((folder / MANIFEST).is_file() and (folder / LOADER).is_file()):
        raise FileExistsError(
            f"{folder} is not empty and holds no earlier export ({MANIFEST} and {LOADER}), so "
            "overwrite=True does not replace it. Name another folder."
        )


def _put_in_place(beside: Path, folder: Path) -> None:
    """Rename the finished folder; an earlier export goes only once the new one is there."""
    if not folder.exists():
        beside.rename(folder)
        return
    old = folder.with_name(f"{beside.name}-old")
    folder.rename(old)
    try:
        beside.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)
