"""Would several exits do better than one? Probes behind several cuts, all fused, on the dense base.

A probe behind a cut says what it has seen; exits are fused in order, with weights that half of the
measured images set, and an image leaves where its largest fused probability reaches a threshold,
the same at all exits. The other half measures, and then they change places. Cost is the share of
the multiplications in front of the exit; what a probe or a cut takes by itself is not in it::

    python -m benchmarks exits --network vgg16 --weights vgg16.pt
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import study as base
from .figures import COLOURS, panels, save
from .library import collect, count_macs, cut_points, fit_route_predictor, sides, trace
from .record import Table, read
from .summary import Summary, files, show

NAME = "exits"
KEYS = (*base.KEYS, "exits", "threshold")
VALUES = ("images", "accuracy", "cost")
COSTS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
THRESHOLDS = (*np.linspace(0.3, 0.975, 28), 1.01)
MOST = 10  # cuts, evenly spread
POOL_SIZE = 2
QUESTION = "Would several exits do better than one?"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then draw and say what was found."""
    options = base.parser(__doc__).parse_args(arguments)
    if not options.show:
        study = base.open_study(options)
        table = Table(options.out / f"{NAME}_{study.label}.csv", KEYS, VALUES)
        done = {**study.key(), "exits": "all", "threshold": f"{THRESHOLDS[-1]:.3f}"}
        if done not in table:
            measure(study, table, min(options.images, 100))
    for path in files(options.out, NAME):
        draw(path)
        show(summary(path))


def measure(study: base.Study, table: Table, images: int) -> None:
    """Fit the probes, then leave through one, or through any."""
    graph = trace(study.model.module())
    cuts = cut_points(graph)
    cuts = [cuts[i] for i in np.unique(np.linspace(0, len(cuts) - 1, MOST).astype(int))]
    total, by_layer = count_macs(graph, next(study.batches(study.X[:1])))
    cost = [sum(by_layer.get(name, 0) for name in sides(graph, cut)[0]) / total for cut in cuts]
    X, y = study.draw(images, 0)
    nodes = {cut.name: cut.node for cut in cuts}
    seen = collect(graph, study.batches(X), nodes, POOL_SIZE).pooled
    found = collect(graph, study.batches(study.X_test), nodes, POOL_SIZE)
    half = np.random.default_rng(0).permutation(len(study.y_test)) % 2 == 0
    told = []
    for cut in cuts:
        held = found.pooled[cut.name][half], study.y_test[half]
        probe = fit_route_predictor(seen[cut.name], y, *held, pool_size=POOL_SIZE)
        with torch.inference_mode():
            told.append(probe.predictor.of_pooled(found.pooled[cut.name]))
    told.append(found.logits.log_softmax(1))
    ways = {f"at {cost[i]:.2f}": (i, len(cuts)) for i in range(len(cuts))}
    ways["none"], ways["all"] = (len(cuts),), tuple(range(len(cuts) + 1))
    y_test = torch.as_tensor(study.y_test)
    for name, way in ways.items():
        parts = torch.stack([told[i] for i in way])
        answers = fused(parts, y_test, half)
        for threshold in THRESHOLDS:
            right, paid = leave(answers, y_test, [*cost, 1.0], way, float(threshold))
            table.add(
                **study.key(),
                exits=name,
                threshold=f"{threshold:.3f}",
                images=len(y_test),
                accuracy=f"{right:.5f}",
                cost=f"{paid:.5f}",
            )


def fused(parts: Tensor, y: Tensor, half: np.ndarray) -> list[Tensor]:
    """Probabilities at each exit, from it and all before, with weights from the OTHER half.

    `parts` are log-probabilities of shape (n_exits, n_images, n_classes).
    """
    answers = [torch.empty_like(parts[0]) for _ in parts]
    for side in (torch.as_tensor(half), torch.as_tensor(~half)):
        for i in range(len(parts)):
            weight = weights(parts[: i + 1, side], y[side])
            other = torch.einsum("j,jnk->nk", weight, parts[: i + 1, ~side])
            answers[i][~side] = other.softmax(1)
    return answers


def weights(parts: Tensor, y: Tensor) -> Tensor:
    """One weight for each exit, of least cross-entropy."""
    start = torch.zeros(len(parts))
    start[-1] = 1.0
    weight = start.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(torch.einsum("j,jnk->nk", weight, parts), y)
        value = value + 1e-3 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach()


def leave(
    answers: Sequence[Tensor], y: Tensor, cost: Sequence[float], way: Sequence[int], limit: float
) -> tuple[float, float]:
    """Accuracy and mean cost if images leave where they are so sure; the last takes the rest."""
    left = torch.ones(len(y), dtype=torch.bool)
    right, paid = torch.zeros(len(y)), torch.zeros(len(y))
    for i, answer in zip(way, answers, strict=True):
        sure, label = answer.max(1)
        go = left if i == way[-1] else left & (sure >= limit)
        right[go], paid[go] = (label == y)[go].float(), cost[i]
        left = left & ~go
    return float(right.mean()), float(paid.mean())


def best(rows: Sequence[Mapping[str, str]], cost: float) -> float | None:
    """The best accuracy of some rows within a cost."""
    able = [float(row["accuracy"]) for row in rows if float(row["cost"]) <= cost]
    return max(able, default=None)


def summary(path: Path) -> Summary:
    """Accuracy at each cost: no exit, the best single one, all of them."""
    rows = read(path)
    whole = float(next(row["accuracy"] for row in rows if row["exits"] == "none"))
    cells, ahead = [], []
    every = [row for row in rows if row["exits"] == "all"]
    names = dict.fromkeys(row["exits"] for row in rows if row["exits"].startswith("at "))
    for cost in COSTS:
        ones = {n: best([r for r in rows if r["exits"] == n], cost) for n in names}
        able = {name: value for name, value in ones.items() if value is not None}
        several = best(every, cost)
        if able and several is not None:
            first = max(able, key=able.__getitem__)
            ahead.append(100 * (several - able[first]))
            one = f"{100 * able[first]:.1f} ({first})"
            cells.append([f"{cost:g}", one, f"{100 * several:.1f}", f"{ahead[-1]:+.1f}"])
    answer = (
        f"On the dense base all exits, fused, are ahead of the best single one by "
        f"{min(ahead):.1f} to {max(ahead):.1f} points at the same multiplications."
        if ahead
        else "No exit saves anything."
    )
    note = f"Base: {100 * whole:.1f} % of {rows[0]['images']} images."
    header = ["multiplications, at most", "the best single exit, %", "all, %", "ahead, points"]
    return Summary(
        path.stem, f"{QUESTION} {rows[0]['network']}", answer, note, header, cells, rows,
        path.with_suffix(".png"),
    )  # fmt: skip


def draw(path: Path) -> Path | None:
    """Accuracy against cost, a line for each set of exits."""
    rows = read(path)
    figure, axes = panels(1, width=4.4)
    names = list(dict.fromkeys(row["exits"] for row in rows))
    labels = {"all": "all exits together"}
    labels |= {
        name: "one exit alone" for name in [n for n in names if n not in ("all", "none")][:1]
    }
    for name in names:
        mine = [row for row in rows if row["exits"] == name]
        own = sorted((float(row["cost"]), 100 * float(row["accuracy"])) for row in mine)
        style = {"color": COLOURS[1], "linewidth": 2} if name == "all" else {"color": "0.7"}
        axes[0].plot(*np.transpose(own), ".-", label=labels.get(name), **style)
        if name == "none":
            axes[0].plot(*np.transpose(own), "o", color=COLOURS[0], label="no exit")
    axes[0].set(xlabel="multiplications, share of the base's", ylabel="accuracy, %")
    axes[0].legend(fontsize=8)
    return save(figure, path.with_suffix(".png"))
