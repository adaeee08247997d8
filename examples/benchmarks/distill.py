"""What minutes of label-free distillation win back: repaired only against trained after.

One network is sliced to a share of its multiplications and repaired in closed form; then it learns
the base's answers to the same calibration images. Time is the processor's, of the whole fit::

    python -m benchmarks distill --network resnet56 --weights resnet56.pt --threads 1 --split report
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from . import study as base
from .figures import COLOURS, panels, save
from .library import Distillation, pruner
from .record import Table, from_hex, read, to_hex
from .stats import estimate
from .summary import Summary, files, show

NAME = "distill"
KEYS = (*base.KEYS, "criterion", "budget", "calibration", "draw", "epochs", "settings")
VALUES = ("macs", "images", "right", "answers", "cpu_seconds", "losses")
QUESTION = "What do minutes of training without labels win back?"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit and measure what is missing, then draw and say what was found."""
    made = base.parser(__doc__)
    made.add_argument(
        "--budget", type=float, default=0.7, help="share of multiplications that stays"
    )
    made.add_argument("--criterion", default="obs")
    made.add_argument("--drop-blocks", action="store_true", help="whole residual blocks as well")
    made.add_argument("--epochs", type=int, nargs="+", default=[5])
    made.add_argument("--block-steps", type=int, default=0, help="for each block alone, before")
    made.add_argument("--learning-rate", type=float, default=2e-4)
    made.add_argument("--augment", choices=("mix", "crop", "crop_flip", "none"), default="mix")
    options = made.parse_args(arguments)
    if options.quick:
        options.draws, options.images, options.epochs = 1, 40, [2]
    if not options.show:
        measure(options)
    for path in files(options.out, NAME):
        draw(path)
        show(summary(path))


def measure(options: argparse.Namespace) -> None:
    """Fill the CSV file: the base, the repaired network, and one for each number of epochs."""
    study = base.open_study(options)
    table = Table(options.out / f"{NAME}_{study.label}.csv", KEYS, VALUES)
    blocks = "blocks dropped" if options.drop_blocks else ""
    settings = f"lr {options.learning_rate:g}, {options.augment}"
    if options.block_steps:
        settings = f"{options.block_steps} steps for each block, {settings}"
    settings = f"{blocks}, {settings}" if blocks else settings
    each = [(0, False), *((epochs, True) for epochs in options.epochs)]
    runs = [("base", 0, False)] + [(d, *one) for d in range(options.draws) for one in each]
    for number, epochs, trained in tqdm(runs, unit=" networks", mininterval=2):
        row = {
            **study.key(),
            "criterion": options.criterion,
            "budget": 1 if number == "base" else options.budget,
            "calibration": options.images * study.n_classes,
            "draw": number,
            "epochs": epochs,
            "settings": "" if number == "base" else settings if trained else blocks,
        }
        if row in table:
            continue
        if number == "base":
            logits = study.logits(study.model.module(), study.X_test)
            found = {"answers": logits.argmax(1), "macs": 1, "cpu_seconds": 0, "losses": ""}
        else:
            found = _fitted(study, options, int(number), epochs if trained else None)
        right = found["answers"] == study.y_test
        table.add(
            **row,
            **{**found, "answers": to_hex(right), "images": len(right), "right": int(right.sum())},
        )


def _fitted(
    study: base.Study, options: argparse.Namespace, number: int, epochs: int | None
) -> dict[str, Any]:
    """One fit, trained if epochs are given: its answers, its cost, and the time that it took."""
    X, y = study.draw(options.images, number)
    how = None
    if epochs is not None:
        how = Distillation(
            epochs,
            learning_rate=options.learning_rate,
            augment=None if options.augment == "none" else options.augment,
            block_steps=options.block_steps,
            checkpoint=options.fitted / "distillation",
        )
    estimator = pruner(
        study.model,
        criterion=options.criterion,
        budget=options.budget,
        distill=how,
        validation_fraction=0.0,
        repair_samples=len(X),
        drop_blocks=options.drop_blocks,
        random_state=number,
        verbose=0 if options.quick else 1,
    )
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator.fit(X, y)
    return {
        "cpu_seconds": f"{time.process_time() - start:.1f}",
        "answers": estimator.predict(study.X_test),
        "macs": f"{estimator.cost_ratio_:.5f}",
        "losses": " ".join(f"{v:.5f}" for v in getattr(estimator, "distillation_losses_", [])),
    }


def summary(path: Path) -> Summary | None:
    """Points lost against the base, with and without training."""
    rows, forms = read(path), dict[tuple[str, str], list[dict[str, str]]]()
    dense = next((from_hex(row) for row in rows if row["draw"] == "base"), None)
    pruned = [row for row in rows if row["draw"] != "base"]
    if dense is None or not pruned:
        return None
    for row in pruned:
        forms.setdefault((row["epochs"], row["settings"]), []).append(row)
    cells, lost = [], []
    for (epochs, settings), own in forms.items():
        drops = dense.astype(float) - np.stack([from_hex(row) for row in own])
        lost.append(100 * float(drops.mean()))
        seconds = np.mean([float(row["cpu_seconds"]) for row in own])
        what = f"{epochs} epochs" if "lr" in settings else "repaired only"
        what = f"{what}, {settings}" if settings else what
        accuracy = f"{100 * dense.mean() - lost[-1]:.2f}"
        cells.append([what, accuracy, str(estimate(drops)), f"{seconds:.0f}"])
    first = pruned[0]
    answer = (
        f"At {100 * float(first['macs']):.0f} % of the multiplications {lost[0]:.2f} points are "
        f"lost after the closed-form repair, and {min(lost):.2f} after training."
    )
    note = (
        f"Base: {100 * dense.mean():.2f} % of {len(dense)} images; {first['calibration']} "
        f"calibration images, criterion {first['criterion']}; CPU seconds are those of the fit."
    )
    header = ["", "accuracy", "points lost", "CPU seconds"]
    return Summary(
        f"{NAME}_{first['network']}_{first['split']}", QUESTION, answer, note, header, cells, rows,
        path.with_suffix(".png"),
    )  # fmt: skip


def draw(path: Path) -> Path | None:
    """Divergence from the base's answers against epochs."""
    figure, axes = panels(1, width=4.4)
    trained = [row for row in read(path) if row["losses"]]
    one = len({row["draw"] for row in trained}) == 1
    for row, colour in zip(trained, COLOURS, strict=False):
        losses = [float(v) for v in row["losses"].split()]
        label = row["settings"] if one else f"{row['settings']}, draw {row['draw']}"
        axes[0].plot(range(1, len(losses) + 1), losses, "o-", color=colour, label=label)
    axes[0].set(xlabel="epoch", ylabel="divergence from the base's answers")
    if trained:
        axes[0].legend(fontsize=8)
    return save(figure, path.with_suffix(".png"))
