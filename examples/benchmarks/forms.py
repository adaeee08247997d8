"""One network in several forms: eager, folded, compiled, ONNX, int8, bfloat16."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from contenders import Contender
from torch import Tensor, nn

from sinfkit.inference import can_prepack, prepacked

FORMS = ("eager", "folded", "packed", "compiled", "onnx", "onnx-int8", "bfloat16")
_CALIBRATION = 512  # images from which ranges are taken for int8
_BATCH = 256


@dataclass(frozen=True, eq=False)
class Form:
    """A network that is ready to be timed.

    Attributes
    ----------
    run : callable
        Batch in its layout to scores of shape (n_samples, n_classes).
    layout : {"contiguous", "channels_last", "numpy"}
        What `run` takes, see `lay_out`: nobody is timed while it is given another's layout.
    """

    run: Callable[[Any], Any]
    layout: str


def lay_out(x: Tensor, layout: str, device: torch.device) -> Any:
    """Bring a batch into a form's layout, on its device."""
    if layout == "numpy":
        return np.ascontiguousarray(x.numpy())
    if layout == "contiguous":
        return x.contiguous().to(device)
    return x.to(device).contiguous(memory_format=torch.channels_last)


def why_not(contender: Contender, form: str, device: torch.device) -> str:
    """Say why a contender has no such form here; empty where it has."""
    if form == "eager" and contender.module is not None and contender.eager is None:
        return "table 4 keeps this network folded only"
    if contender.variant == "exit" and (form == "compiled" or form.startswith("onnx")):
        return "which images leave early hangs on their values, and one graph cannot say it"
    if form.startswith("onnx"):
        missing = [m for m in ("onnx", "onnxruntime", "onnxscript") if _is_missing(m)]
        if missing:
            return f"{', '.join(missing)} missing: pip install {' '.join(missing)}"
        if device.type != "cpu":
            return "ONNX Runtime is timed on the CPU only: add --device cpu"
    if contender.classifier is not None and form != "eager":
        module = "sinfkit.export.onnx" if form.startswith("onnx") else "sinfkit.inference.runtime"
        if _is_missing(module):
            return f"this version of sinfkit has no {module}: update it"
    return ""


def _is_missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def make(
    contender: Contender,
    form: str,
    n_threads: int,
    images: np.ndarray,
    device: torch.device,
    folder: Path,
) -> Form:
    """Build a form.

    Parameters
    ----------
    contender : Contender
    form : str
        One of `FORMS`, for which `why_not` has nothing to say.
    n_threads : int
        Of ONNX Runtime; PyTorch has its own setting.
    images : uint8 ndarray of shape (n_samples, channels, height, width)
        Calibration images, for the ranges of int8.
    device : torch.device
    folder : Path
        Where ONNX files are written, and found again; it must last as long as the form.

    Returns
    -------
    Form
    """
    if form.startswith("onnx"):
        folder = folder / joblib.hash((contender.name, form))
    if contender.classifier is not None:
        return _routed(contender.classifier, form, n_threads, images, device, folder)
    if form == "eager":
        assert contender.eager is not None
        return Form(contender.eager.to(device), "contiguous")
    assert contender.module is not None
    module = contender.module.to(device)
    if form == "compiled":
        # Every network is compiled for every batch size; they share one `forward`.
        torch._dynamo.config.recompile_limit = 256
        return Form(torch.compile(module, dynamic=False), "channels_last")
    if form == "bfloat16":
        return Form(_packed(_half(module)), "channels_last")
    if form == "packed":
        return Form(_packed(module), "channels_last")
    if form == "folded":
        return Form(module, "channels_last")
    path = folder / "network.onnx"
    if not folder.exists():
        folder.mkdir(parents=True)
        export(module, images[:2], path)
    if form == "onnx-int8":
        path = quantize(path, images)
    return Form(_session(path, n_threads), "numpy")


def _routed(
    classifier: Any,
    form: str,
    n_threads: int,
    images: np.ndarray,
    device: torch.device,
    folder: Path,
) -> Form:
    """A routed network in a form."""
    network = classifier.network_.to(device)
    if form == "eager":
        return Form(network, "channels_last")
    if form.startswith("onnx"):
        from sinfkit.export import to_onnx
        from sinfkit.export.onnx_loader import load

        if not folder.exists():
            dtype = "int8" if form == "onnx-int8" else "float32"
            to_onnx(classifier, folder, dtype=dtype, X=_some(images))
        return Form(load(folder, n_threads=n_threads).predict_proba, "numpy")
    from sinfkit.inference import Runtime

    dtype = "bfloat16" if form == "bfloat16" else "float32"
    runtime = Runtime(
        network, dtype=dtype, compile=form == "compiled", prepack=form in ("packed", "bfloat16")
    )
    return Form(runtime, "channels_last")


def make_packed(contender: Contender) -> Any:
    """A contender's network as ``"packed"`` runs it, on its device: for the time of its parts."""
    if contender.classifier is None:
        assert contender.module is not None
        return _packed(contender.module)
    from sinfkit.inference import Runtime

    return Runtime(contender.classifier.network_)


def _packed(module: nn.Module) -> nn.Module:
    """What `Runtime` does for a routed network: weights as the CPU's library wants them."""
    on_cpu = next(module.parameters()).device.type == "cpu"
    return prepacked(module) if on_cpu and can_prepack() else module


class _Cast(nn.Module):
    """Another number format."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers, rounded."""
        return x.to(self.dtype)


def _half(module: nn.Module) -> nn.Module:
    """A network without routes in bfloat16; normalisation and probe stay in float32."""
    twin: Any = copy.deepcopy(module)
    for name, child in twin.named_children():
        if name not in ("normalise", "probe"):
            child.to(torch.bfloat16)
    twin.normalise = nn.Sequential(twin.normalise, _Cast(torch.bfloat16))
    return twin.eval()


def export(module: nn.Module, images: np.ndarray, path: Path) -> Path:
    """Write a network as ONNX, its batches of any size."""
    x = torch.as_tensor(images).float().div(255)
    with _quiet():
        torch.onnx.export(
            module.eval(),
            (x,),
            str(path),
            dynamo=True,
            external_data=False,  # one file, which quantisation can move
            dynamic_shapes=({0: torch.export.Dim("n")},),
            input_names=["x"],
            output_names=["scores"],
            verbose=False,
        )
    return path


def quantize(path: Path, images: np.ndarray) -> Path:
    """Quantise a network statically (QDQ, int8, one scale a channel of the weights)."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            x = torch.as_tensor(_some(images)).float().div(255)
            self._batches: Iterator[Tensor] = iter(x.split(64))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"x": batch.numpy()}

    clean, small = path.with_suffix(".clean.onnx"), path.with_suffix(".int8.onnx")
    if small.exists():
        return small
    with _quiet():
        # Symbolic shapes are for transformers, and ONNX Runtime 1.20 cannot find them here.
        quant_pre_process(str(path), str(clean), skip_symbolic_shape=True)
        quantize_static(
            str(clean), str(small), Reader(), quant_format=QuantFormat.QDQ, per_channel=True
        )
    return small


def _session(path: Path, n_threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A network in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    # Threads that wait by spinning would take the cores from whoever's turn it is.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def _some(images: np.ndarray) -> np.ndarray:
    """Some of the images, at random but the same every time."""
    rows = np.random.default_rng(0).permutation(len(images))[:_CALIBRATION]
    return images[rows]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' reports of what they do."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def answers(form: Form, X: np.ndarray, device: torch.device) -> np.ndarray:
    """Classes that a form gives for images, all batches of one size.

    Parameters
    ----------
    form : Form
    X : uint8 ndarray of shape (n_samples, channels, height, width)
    device : torch.device

    Returns
    -------
    int ndarray of shape (n_samples,)
    """
    size = min(_BATCH, len(X))
    found = []
    with torch.inference_mode():
        for start in range(0, len(X), size):
            rows = np.arange(start, start + size) % len(X)
            found.append(_classes(form.run(lay_out(batch_of(X, rows), form.layout, device))))
    return np.concatenate(found)[: len(X)]


def batch_of(X: np.ndarray, rows: Sequence[int] | np.ndarray) -> Tensor:
    """A batch before normalisation."""
    return torch.as_tensor(X[rows]).float().div(255)


def _classes(scores: Any) -> np.ndarray:
    if isinstance(scores, Tensor):
        return scores.argmax(1).cpu().numpy()
    return np.asarray(scores).argmax(1)
