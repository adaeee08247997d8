"""How fast the networks of table 4 are: by batch size, threads, form and mix of clusters.

All contenders of a cell (threads, form, batch size, mix) take turns in one run, and so does the
base in its folded form, which all are set against::

    python latency.py --weights vgg16.pt --data ~/images --fitted fits --split report
    python latency.py --quick

Networks that ``sinf_table.py`` stored in the folder ``--fitted`` are used again; the others are
fitted first. Let nothing else run beside it. A cell that was measured is not measured again.
"""

from __future__ import annotations

import os

# Contenders take turns here, but whoever uses one has oneDNN's memory for it alone. With room for
# the usual 1,024 prepared layers they would push each other out. It is read with PyTorch.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

import argparse
import contextlib
import datetime
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _paper  # noqa: F401
import latency_page
import numpy as np
import sinf_table
import study as base
import torch
from contenders import KEYS as WHO
from contenders import Contender, contenders
from forms import FORMS, Form, answers, batch_of, lay_out, make, make_packed, why_not
from mixes import MIXES, draw, n_batches, routed_clusters
from parts import PARTS, by_layer, split_cost
from record import Table, to_hex
from shipped import IMPORTANCES, SCOPES
from tqdm.auto import tqdm

from sinfkit.graph import paired_latency

NAME = "latency"
STUDY = ("network", "width", "base_seed", "split")
KEYS = (*STUDY, *WHO, "form", "threads", "batch", "mix")
VALUES = ("ms", "ms_low", "ms_high", "ms_mean", "ratio", "ratio_low", "ratio_high", "ratio_own")
VALUES += ("accuracy", "device_ms", "joules", "batches", "rounds", "run")
RIGHT = ("images", "right", "answers")
COST = ("base", "whole", *PARTS, "rows")
LAYER = ("base_macs", "macs", "base_seconds", "seconds")
SMALL, LARGE = 8, 1024  # up to the one three times as many rounds, from the other a third
_REFERENCE = "the base, folded"


def main(arguments: Sequence[str] | None = None) -> None:
    """Time what is missing, then draw."""
    options = parse(arguments)
    held = base.open_study(_of_table(options, split="choose"))
    test = held if options.split == "choose" else base.open_study(_of_table(options))
    found = list(contenders(_of_table(options), held))
    path = options.out / f"{NAME}_{test.base.label}_{test.split}.csv"
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, held, test, found, path, Path(scratch))
        cells = list(bench.cells())
        for cell in tqdm(cells, unit=" cells"):
            bench.measure(cell)
    latency_page.draw(path)
    print(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        parents=[base.parser("")],
        add_help=False,
        conflict_handler="resolve",
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=MIXES)
    parser.add_argument(
        "--rounds",
        type=int,
        default=21,
        help="three times as many up to batch 8, a third from 1024",
    )
    parser.add_argument("--fitted", type=Path, default=Path("fitted"), help="folder of networks")
    parser.add_argument("--kinds", nargs="*", choices=sinf_table.KINDS, default=())
    parser.add_argument("--no-search", action="store_true", help="only given sizes")
    parser.add_argument("--stored", action="store_true", help="only what was fitted before")
    parser.add_argument("--importance", choices=sorted(IMPORTANCES), default="magnitude_l2")
    parser.add_argument("--scope", choices=(*SCOPES, "none"), default="local")
    options = parser.parse_args(arguments)
    if options.quick:
        options.fitted, options.rounds = options.out / "fitted", 3
    return options


def _of_table(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """Options as ``sinf_table.py`` has them, with the defaults of those that this script lacks."""
    own = vars(options) | {"threads": max(options.threads)} | changes
    return argparse.Namespace(**vars(sinf_table.parse([])) | own)


@dataclass(frozen=True)
class Cell:
    """What is measured in one run: these contenders, one of which lacks its row at least."""

    threads: int
    form: str
    batch: int
    mix: str
    contenders: tuple[Contender, ...]


class Bench:
    """Contenders, images, and the tables of what they take.

    Parameters
    ----------
    options : Namespace
    held, test : Study
    found : sequence of Contender
        The base first.
    path : Path
        Of the times; the other tables lie beside it.
    scratch : Path
        Folder for ONNX files, until the end of the run.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        held: base.Study,
        test: base.Study,
        found: Sequence[Contender],
        path: Path,
        scratch: Path,
    ) -> None:
        self.options, self.held, self.test, self.found = options, held, test, found
        self.device, self.scratch = test.device, scratch
        constants = {**test.constants(), **_policy(self.device)}

        def table(suffix: str, keys: Sequence[str], values: Sequence[str]) -> Table:
            return Table(path.with_name(f"{path.stem}{suffix}.csv"), keys, values, constants)

        self.times = table("", KEYS, VALUES)
        self.right = table("_answers", (*STUDY, *WHO, "form"), RIGHT)
        self.parts = table("_parts", (*STUDY, *WHO, "threads", "batch"), COST)
        self.layers = table("_layers", (*STUDY, *WHO, "threads", "batch", "layer"), LAYER)
        self._forms: dict[tuple[int, str, str], Form] = {}
        self._accuracy: dict[tuple[str, str], float] = {}
        self._clusters: dict[str, np.ndarray] = {}

    def key(self, contender: Contender, **more: Any) -> dict[str, Any]:
        """Key of a row."""
        return {**self.test.key(), **contender.key(), **more}

    def cells(self) -> Iterator[Cell]:
        """What is missing: forms in a row, so that each is built once."""
        said = set()
        options = self.options
        for threads, form in itertools.product(options.threads, options.forms):
            able = []
            for one in self.found:
                reason = why_not(one, form, self.device)
                if not reason:
                    able.append(one)
                elif (who := (one.contestant, one.variant, form)) not in said:
                    said.add(who)
                    tqdm.write(f"{' '.join(who[:2])} is not timed as {form}: {reason}")
            for batch, mix in itertools.product(options.batches, options.mixes):
                # What a batch shows is the same to a network without routes.
                those = able if mix == "natural" else [c for c in able if c.classifier is not None]
                own = {"form": form, "threads": threads, "batch": batch, "mix": mix}
                if any(self.key(c, **own) not in self.times for c in those):
                    yield Cell(threads, form, batch, mix, tuple(those))

    def measure(self, cell: Cell) -> None:
        """Time one cell and write its rows down, then what its routed networks' parts take."""
        torch.set_num_threads(cell.threads)
        if cell.mix == "natural" and cell.batch < LARGE:
            self._measure_parts(cell)
        rounds = self._rounds(cell.batch)
        n = n_batches(cell.batch, rounds)
        runs = {_REFERENCE: self._run(self.found[0], "folded", cell, n)}
        runs |= {c.name: self._run(c, cell.form, cell, n) for c in cell.contenders}
        begun = datetime.datetime.now().isoformat(timespec="seconds")
        seconds = paired_latency(runs, repeats=rounds).seconds
        own = self.found[0].name if self.found[0].name in runs else _REFERENCE
        for one in cell.contenders:
            taken = seconds[one.name]
            low, middle, high = np.quantile(taken, [0.25, 0.5, 0.75])
            ratios = np.quantile(taken / seconds[_REFERENCE], [0.25, 0.5, 0.75])
            where = {"form": cell.form, "threads": cell.threads}
            where |= {"batch": cell.batch, "mix": cell.mix}
            self.times.add(
                **self.key(one, **where),
                ms=f"{middle * 1e3:.4f}",
                ms_low=f"{low * 1e3:.4f}",
                ms_high=f"{high * 1e3:.4f}",
                ms_mean=f"{taken.mean() * 1e3:.4f}",
                ratio=f"{ratios[1]:.4f}",
                ratio_low=f"{ratios[0]:.4f}",
                ratio_high=f"{ratios[2]:.4f}",
                ratio_own=f"{np.median(taken / seconds[own]):.4f}",
                accuracy=f"{self.accuracy(one, cell.form):.4f}",
                device_ms=runs[one.name].device_ms(rounds),
                joules=_joules(runs[one.name], self.device),
                batches=n,
                rounds=rounds,
                run=begun,
            )

    def _rounds(self, batch: int) -> int:
        """Small batches are quick and noisy, large ones slow and steady."""
        rounds = self.options.rounds
        return 3 * rounds if batch <= SMALL else max(3, rounds // 3) if batch >= LARGE else rounds

    def _measure_parts(self, cell: Cell) -> None:
        """Part by part and layer by layer, once for all forms, on the first natural batch."""
        module: Any = self.found[0].module.to(self.device)
        rows = draw("natural", cell.batch, 1, self._routes(self.found[0]))[0]
        x = lay_out(batch_of(self.test.X_test, rows), "channels_last", self.device)
        for one in cell.contenders:
            own = self.key(one, threads=cell.threads, batch=cell.batch)
            if one.classifier is None or own in self.parts:
                continue
            network, rounds = one.classifier.network_.to(self.device), self._rounds(cell.batch)
            for layer in by_layer(network, module.module, x, rounds):
                numbers = {k: f"{layer[k]:.6g}" for k in LAYER}
                self.layers.add(**own, layer=layer["layer"], **numbers)
            fast, base = make_packed(one), make_packed(self.found[0])
            cost = split_cost(fast, base, x, rounds)
            self.parts.add(**own, **{k: f"{cost[k]:.6g}" for k in COST})

    def _run(self, one: Contender, form: str, cell: Cell, n: int) -> Run:
        """A contender in a form on the cell's batches, its own where they hang on its routes."""
        known = (cell.threads, one.name, form)
        if known not in self._forms:
            # Those of another form or number of threads are done with; the reference stays.
            self._forms = {
                (threads, name, other): made
                for (threads, name, other), made in self._forms.items()
                if threads == cell.threads and other in (cell.form, "folded")
            }
            images = self.held.X
            self._forms[known] = make(one, form, cell.threads, images, self.device, self.scratch)
        made = self._forms[known]
        mix = "natural" if one.classifier is None else cell.mix
        chosen = draw(mix, cell.batch, n, self._routes(one, mix))
        X = self.test.X_test
        batches = [lay_out(batch_of(X, rows), made.layout, self.device) for rows in chosen]
        if form == "compiled":
            with torch.inference_mode():
                for batch in batches:  # parts of another size may have to be compiled
                    made.run(batch)
        return Run(made.run, batches, self.device)

    def _routes(self, one: Contender, mix: str = "natural") -> np.ndarray:
        """Routed clusters of the test images; for the natural mix it matters only how many."""
        if mix == "natural":
            return np.zeros(len(self.test.X_test), dtype=np.int64)
        if one.name not in self._clusters:
            assert one.classifier is not None
            network, X = one.classifier.network_.to(self.device), self.test.X_test
            self._clusters[one.name] = routed_clusters(network, X, self.device)
        return self._clusters[one.name]

    def accuracy(self, one: Contender, form: str) -> float:
        """Accuracy of a contender in a form on the test images, measured once."""
        known = one.name, form
        if known not in self._accuracy:
            made = self._forms[torch.get_num_threads(), one.name, form]
            right = answers(made, self.test.X_test, self.device) == self.test.y_test
            self._accuracy[known] = float(right.mean())
            own = {"images": len(right), "right": int(right.sum()), "answers": to_hex(right)}
            self.right.add(**self.key(one, form=form), **own)
        return self._accuracy[known]


class Run:
    """A callable that takes the next batch each time; all of a cell stay in step.

    Parameters
    ----------
    function : callable
    batches : sequence
    device : torch.device
        On CUDA, events say what the device by itself took.
    """

    def __init__(
        self, function: Callable[[Any], Any], batches: Sequence[Any], device: torch.device
    ) -> None:
        self._function, self._batches = function, itertools.cycle(batches)
        self._cuda = device.type == "cuda"
        self._events: list[tuple[Any, Any]] = []

    def __call__(self) -> Any:
        """Run the next batch."""
        batch = next(self._batches)
        if not self._cuda:
            return self._function(batch)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        answer = self._function(batch)
        end.record()
        self._events.append((start, end))
        return answer

    def device_ms(self, rounds: int) -> str:
        """Median over the last rounds between two events on the device; empty without CUDA."""
        if not self._cuda:
            return ""
        torch.cuda.synchronize()
        return f"{np.median([a.elapsed_time(b) for a, b in self._events[-rounds:]]):.4f}"


def _joules(run: Run, device: torch.device, seconds: float = 1.0) -> str:
    """Energy for a batch by the card's own counter; empty where it cannot be read."""
    if device.type != "cuda":
        return ""
    with contextlib.suppress(ImportError):
        import pynvml

        pynvml.nvmlInit()
        with contextlib.suppress(pynvml.NVMLError):
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            card = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            n, begun = 0, time.perf_counter()
            before = pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
            with torch.inference_mode():
                while time.perf_counter() - begun < seconds:
                    run()
                    torch.cuda.synchronize()
                    n += 1
            used = pynvml.nvmlDeviceGetTotalEnergyConsumption(card) - before
            return f"{used / 1e3 / n:.6f}"
    return ""


def _policy(device: torch.device) -> Mapping[str, str]:
    """What a reader must know of libraries and number formats, the same in every row."""
    found = {}
    for name in ("onnx", "onnxruntime"):
        with contextlib.suppress(ImportError):
            found[name] = __import__(name).__version__
    cuda = device.type == "cuda"
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    tf32 = f"matmul {matmul}, cudnn {convolution}" if cuda else ""
    libraries = " ".join(f"{name} {version}" for name, version in found.items())
    return {"device": device.type, "libraries": libraries, "tf32": tf32}


if __name__ == "__main__":
    main()
