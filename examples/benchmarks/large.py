"""How much time torchvision's networks save at 224 x 224, by shape alone.

Untrained VGG16, VGG19 and ResNet50 of full width, ten classes, made-up images: what is timed hangs
on shapes, so there is no accuracy in this table. One network pruned for all classes and a routed
one, both under the same budget of multiplications, take turns with the folded base::

    python large.py
    python large.py --quick

Nobody leaves early and nobody takes the base's way; the router spreads images as it likes, and the
column ``clusters`` says over how many subgraphs. Let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import _paper  # noqa: F401
import numpy as np
import rst
import torch
import torchvision
from contestants import fast
from mixes import routed_clusters
from record import Table, read
from study import RESULTS
from torch import Tensor, fx, nn
from tqdm.auto import tqdm

from sinfkit import DCSPruner, FrozenModel, SemanticClusterer, SINFClassifier
from sinfkit.graph import count_macs, output_layer, paired_latency
from sinfkit.inference import branch_costs
from sinfkit.pruning import expected_seconds, fit_layer_times, sliceable
from sinfkit.slicing import find_groups

NAME = "large"
KEYS = ("network", "side", "contestant", "budget", "form", "threads", "batch")
VALUES = ("macs", "ms", "ratio", "ratio_low", "ratio_high", "modelled", "clusters", "rounds")
NETWORKS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "vgg16": (torchvision.models.vgg16_bn, "features.24"),
    "vgg19": (torchvision.models.vgg19_bn, "features.27"),
    "resnet50": (torchvision.models.resnet50, "layer3.1"),
}
_CLASSES, _CLUSTERS, _PER_CLASS = 10, 5, 4


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.4, 0.3])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--side", type=int, default=224, help="pixels")
    parser.add_argument("--quick", action="store_true", help="ResNet50 at 32 x 32, one cell")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of CSV files")
    options = parser.parse_args(arguments)
    if options.quick:
        options.networks, options.side, options.rounds = ["resnet50"], 32, 3
        options.budgets, options.batches = [0.4], [2]
    torch.set_num_threads(options.threads)
    table = Table(options.out / f"{NAME}.csv", KEYS, VALUES)
    for network in tqdm(options.networks, unit=" networks"):
        measure(table, options, network)
    print(table.path)


def measure(table: Table, options: argparse.Namespace, network: str) -> None:
    """Build the contestants of one network and time them, float32 and bfloat16 apart."""
    where = {"network": network, "side": options.side, "threads": options.threads}
    cells = [(batch, form) for batch in options.batches for form in ("folded", "bfloat16")]
    last = {"contestant": "SINF", "budget": f"{options.budgets[-1]:g}"}
    cells = [c for c in cells if {**where, **last, "batch": c[0], "form": c[1]} not in table]
    if not cells:
        return
    X, y = made_up(options.side)
    found, macs = contestants(network, options.budgets, X, y)
    model = TimeModel(found["base", ""], X[: max(options.batches)])
    for batch, form in cells:
        x = torch.as_tensor(X[np.arange(batch) % len(X)]).float().div(255)
        x = x.contiguous(memory_format=torch.channels_last)
        runs = {name: _run(made, form, x) for name, made in found.items()}
        latency = paired_latency(runs, repeats=options.rounds, warmup=1)
        modelled = {name: model.seconds(made, X, batch) for name, made in found.items()}
        for (contestant, budget), made in found.items():
            name = (contestant, budget)
            low, high = latency.ratio_quartiles(name, ("base", ""))
            routed = isinstance(made, SINFClassifier)
            expected = modelled[name] / modelled["base", ""]
            table.add(
                **where,
                contestant=contestant,
                budget=budget,
                form=form,
                batch=batch,
                macs=f"{macs[name]:.4f}",
                ms=f"{1e3 * latency.median[name]:.1f}",
                ratio=f"{latency.ratio(name, ('base', '')):.4f}",
                ratio_low=f"{low:.4f}",
                ratio_high=f"{high:.4f}",
                modelled=f"{expected:.4f}" if form == "folded" else "",
                clusters=len(_groups(made, X, batch)) if routed else "",
                rounds=options.rounds,
            )


def made_up(side: int) -> tuple[np.ndarray, np.ndarray]:
    """A few images of each class: a pattern and noise."""
    rng = np.random.default_rng(0)
    y = np.arange(_CLASSES * _PER_CLASS) % _CLASSES
    patterns = rng.integers(0, 196, (_CLASSES, 3, 4, 4), dtype=np.uint8)
    X = patterns[y].repeat(side // 4, axis=2).repeat(side // 4, axis=3)
    return X + rng.integers(0, 60, X.shape, dtype=np.uint8), y


def contestants(
    network: str, budgets: Sequence[float], X: np.ndarray, y: np.ndarray
) -> tuple[dict[tuple[str, str], Any], dict[tuple[str, str], float]]:
    """What is timed, and its multiplications as a fraction of the base's.

    Filters go by their weights' norm and nothing is repaired: it is their number that costs time.
    """
    build, layer = NETWORKS[network]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build(num_classes=_CLASSES).eval()
    frozen = FrozenModel(module)
    example = torch.as_tensor(X[:1]).float().div(255)
    whole = count_macs(module, example)[0]
    found: dict[tuple[str, str], Any] = {("base", ""): fast(module)}
    macs = {("base", ""): 1.0}
    for budget in budgets:
        pruner = DCSPruner(
            criterion="l1", schedule="global", budget=budget, max_ratio=0.95, repair="none"
        )
        one = DCSPruner(frozen, **_own(pruner), device="cpu", random_state=0)
        routed = SINFClassifier(
            frozen,
            # Two classes each: a cluster of one class has no subgraph.
            clusterer=SemanticClusterer(
                method="given", mapping={k: k % _CLUSTERS for k in range(_CLASSES)}
            ),
            pruner=pruner,
            prefix_criterion="l1",
            route_layer=layer,
            exit_threshold=None,
            batch_size=8,
            device="cpu",
            random_state=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nobody trained the network
            one.fit(X, y)
            routed.fit(X, y)
        size = f"{budget:g}"
        found["one network", size] = fast(one.model_)
        macs["one network", size] = count_macs(one.model_, example)[0] / whole
        found["SINF", size] = routed
        costs = branch_costs(routed.network_, example)
        branch = float(np.mean(costs["macs"][:_CLUSTERS]))
        macs["SINF", size] = (costs["shared_macs"] + branch) / whole
    return found, macs


def _own(pruner: DCSPruner) -> dict[str, Any]:
    names = ("criterion", "schedule", "budget", "max_ratio", "repair")
    return {name: getattr(pruner, name) for name in names} | {"batch_size": 8}


def _run(made: Any, form: str, x: Tensor) -> Callable[[], Any]:
    """A contestant in a form, on a batch."""
    if isinstance(made, SINFClassifier):
        runtime = made.runtime(dtype="bfloat16" if form == "bfloat16" else "float32")
        return lambda: runtime(x)
    if form == "bfloat16":
        made, x = copy.deepcopy(made).to(torch.bfloat16), x.to(torch.bfloat16)
    return lambda: made(x)


def _groups(made: SINFClassifier, X: np.ndarray, batch: int) -> dict[int, int]:
    """The subgraphs that run for the batch, and on how many images each."""
    rows = np.arange(batch) % len(X)
    routed = routed_clusters(made.network_, X[rows], torch.device("cpu"))
    return Counter(int(c) for c in routed[routed >= 0])


class TimeModel:
    """What the contestants should take, by the times of the base's layers, in float32.

    Parameters
    ----------
    base : GraphModule
        In the form in which it is timed.
    X : ndarray of shape (n_images, channels, height, width)
        The largest batch.
    """

    def __init__(self, base: fx.GraphModule, X: np.ndarray) -> None:
        x = torch.as_tensor(X).float().div(255).contiguous(memory_format=torch.channels_last)
        groups = find_groups(base, x[:1], output_layer(base, _CLASSES))
        self._base = base
        self._times = fit_layer_times(base, groups, sliceable(groups), x)

    def seconds(self, made: Any, X: np.ndarray, batch: int) -> float:
        """Time of a batch through all parts of a contestant that run."""
        if not isinstance(made, SINFClassifier):
            return self._of(made, batch)
        network = made.network_
        routed = _groups(made, X, batch).items()
        branches = sum(self._of(network.subgraph(c), n) for c, n in routed)
        return self._of(network.prefix, batch) + branches

    def _of(self, part: nn.Module | None, n: int) -> float:
        assert part is not None, "each cluster has two classes, and so a subgraph"
        return expected_seconds([(part, 1.0)], self._times, self._base, n)


def page(folder: Path) -> rst.Page | None:
    """The page, from the CSV file."""
    path = folder / f"{NAME}.csv"
    if not path.exists():
        return None
    rows = read(path)
    header = ["", "budget", "multiplications (%)", "form", "batch", "ms", "speed-up [quartiles]"]
    header += ["by the model of times", "subgraphs run"]
    body = [_INTRODUCTION, _distances(rows), rst.provenance(rows)]
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        body.append(rst.section(f"{network}, {own[0]['side']} x {own[0]['side']}"))
        cells = [
            [
                row["contestant"],
                row["budget"],
                rst.percent(float(row["macs"])),
                row["form"],
                row["batch"],
                row["ms"],
                f"{1 / float(row['ratio']):.2f} [{1 / float(row['ratio_high']):.2f}, "
                f"{1 / float(row['ratio_low']):.2f}]",
                f"{1 / float(row['modelled']):.2f}" if row["modelled"] else "",
                row["clusters"],
            ]
            for row in own
        ]
        body.append(rst.list_table(header, cells))
    return rst.Page(NAME, "Latency at 224 x 224", "\n".join(body))


def _distances(rows: Sequence[Mapping[str, str]]) -> str:
    """How far measured shares of time are from the model's, and from those of multiplications."""
    cells = [row for row in rows if row["modelled"] and row["contestant"] != "base"]
    took = np.array([float(row["ratio"]) for row in cells])
    by_model, by_macs = (
        float(np.abs(took - [float(row[key]) for row in cells]).mean())
        for key in ("modelled", "macs")
    )
    return (
        f"Over the {len(cells)} cells of float32, the time relative to the base is {by_model:.3f} "
        f"away from what the model expects, on average, and {by_macs:.3f} from the share of "
        "multiplications.\n"
    )


_INTRODUCTION = """\
torchvision's networks at full width and 224 x 224 pixels, *untrained* and with ten classes: this
table is about shapes and time, and says nothing of accuracy. One network pruned for all classes
and a routed one (five clusters, no exits, no fallback) have the same budget of multiplications.
All take turns with the base, in the same form: batch-norms folded, channels_last, float32 or
bfloat16. A small batch runs several subgraphs on a few images each, hence the last column. The one
before has the speed-up that ``budget_unit="latency"`` would expect, from the base's layers alone
(:func:`sinfkit.pruning.fit_layer_times`), for float32.

``python examples/benchmarks/large.py``
"""


if __name__ == "__main__":
    main()
