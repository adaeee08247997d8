"""One network in several forms, and their times in turns.

``torch``      float32 as sinfkit runs it: batch-norms folded, layouts as the processor wants them
``bfloat16``   the same in bfloat16
``onnx``       ONNX Runtime, float32
``int8``       ONNX Runtime, static quantisation, one scale a channel of the weights
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .contestants import Made, raw
from .library import fast, fast_routed, onnx_routed, paired_latency

FORMS = ("torch", "bfloat16", "onnx", "int8")
Run = Callable[[Any], Any]


def forms_of(made: Made, wanted: tuple[str, ...], images: np.ndarray) -> dict[str, Run]:
    """Functions from a batch of raw images (Tensor) to scores; what is not there is left out."""
    found: dict[str, Run] = {}
    for form in wanted:
        with contextlib.suppress(ImportError), quiet():
            found[form] = _form(made, form, images)
    return found


def _form(made: Made, form: str, images: np.ndarray) -> Run:
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    if form in ("torch", "bfloat16"):
        if made.classifier is not None:
            return fast_routed(made.classifier, dtype, images)
        assert made.module is not None
        return fast(made.module, dtype)
    some = images[np.random.default_rng(0).permutation(len(images))[:512]]
    folder = Path(tempfile.mkdtemp(prefix="forms"))
    if made.classifier is not None:
        return onnx_routed(made.classifier, folder, form == "int8", some)
    assert made.module is not None
    return _session(_exported(made.module, folder, form == "int8", some))


def _exported(module: nn.Module, folder: Path, int8: bool, images: np.ndarray) -> Path:
    """Write a network without routes as ONNX."""
    path = folder / "network.onnx"
    torch.onnx.export(
        module.eval(),
        (next(raw(images[:2])),),
        str(path),
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: torch.export.Dim("n")},),
        input_names=["x"],
        output_names=["scores"],
        verbose=False,
    )
    if not int8:
        return path
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Batches for the ranges."""

        def __init__(self) -> None:
            self._batches = iter([x.contiguous().numpy() for x in raw(images, 64)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"x": batch}

    clean, small = folder / "clean.onnx", folder / "int8.onnx"
    # Symbolic shapes are for transformers, and ONNX Runtime 1.20 cannot find them here.
    quant_pre_process(str(path), str(clean), skip_symbolic_shape=True)
    # As sinfkit quantises.
    quantize_static(
        str(clean),
        str(small),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
    )
    return small


def _session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Threads that wait by spinning would take the cores from whoever's turn it is.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": np.ascontiguousarray(x)})[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' reports of what they do."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def answers(run: Run, X: np.ndarray) -> np.ndarray:
    """Classes that a form gives to images."""
    with torch.inference_mode():
        return np.concatenate(
            [np.asarray(torch.as_tensor(run(x)).float()).argmax(1) for x in raw(X)]
        )


def times(
    runs: Mapping[Any, Run], X: np.ndarray, batch: int, rounds: int
) -> tuple[dict[Any, float], dict[Any, float]]:
    """Median milliseconds, and median ratio to the first one, all in turns in one run.

    At batch 1 each round takes several images, since routed ones differ in time.
    """
    n = 16 if batch == 1 else 1
    inputs = [next(raw(X[(i * batch + np.arange(batch)) % len(X)], batch)) for i in range(n)]

    def each(run: Run) -> Callable[[], None]:
        def go() -> None:
            for x in inputs:
                run(x)

        return go

    names = {f"{i}": key for i, key in enumerate(runs)}
    latency = paired_latency({i: each(runs[key]) for i, key in names.items()}, rounds, 2)
    ms = {key: latency.median[i] * 1e3 / n for i, key in names.items()}
    return ms, {key: latency.ratio(i, "0") for i, key in names.items()}
