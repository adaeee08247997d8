"""Tables 4 and 5: what routed inference costs and saves, beside its controls; cluster by cluster.

Routed networks of several sizes and kinds of clusters, each part switched off in turn, and networks
without routes: one pruned for all classes with the same repair, the same fused with a probe like
the router's, the base fused with the probe, and the base left early at the probe::

    python sinf_table.py --weights vgg16.pt --data ~/images --fitted fits --split report
    python sinf_table.py --weights vgg16.pt --data ~/images --fitted fits --split report --time
    python sinf_table.py --quick

Fitted networks are stored in the folder ``--fitted``. ``--time`` times all of them in turns, in one
run; let nothing else run beside it. Unit: test image. What is chosen (threshold, weights) is chosen
on the choosing images.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import contestants as rivals
import joblib
import numpy as np
import study as base
import torch
from record import LOW_RANK, Table, to_hex
from sinf_page import TIMES, draw
from torch import Tensor
from tqdm.auto import tqdm

from sinfkit import DCSPruner, SemanticClusterer, SINFClassifier, __version__
from sinfkit.graph import count_macs, paired_latency
from sinfkit.inference import SINFNetwork, branch_costs
from sinfkit.repair import factorize

NAME = "sinf"
KEYS = ("network", "width", "base_seed", "split", "contestant", "kind", "size", "seed", "variant")
VALUES = ("images", "right", "answers", "macs", "fallback", "exits")
VALUES += ("routed_right", "route_layer")
VALUES += ("n_clusters", "fit_seconds", "clusters", "cluster_names", "labels")
KINDS = ("confusion", "activation", "given", "random")


@dataclass(frozen=True)
class Entry:
    """One network to be fitted.

    Attributes
    ----------
    contestant : str
        ``"base"``, ``"SINF"`` or ``"one network"``.
    kind : str
        Kind of clusters and their number, or the control's criterion.
    size : str
        Budget or limit.
    seed : int
    estimator : SINFClassifier, DCSPruner or None
    low_rank : float
        Of a network without routes: multiplications that stay when its layers get a low rank.
    """

    contestant: str
    kind: str
    size: str
    seed: int
    estimator: Any
    low_rank: float = 1.0

    def key(self) -> dict[str, Any]:
        """What tells its rows apart."""
        return {k: getattr(self, k) for k in ("contestant", "kind", "size", "seed")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit and measure what is missing, then draw."""
    options = parse(arguments)
    held = base.open_study(argparse.Namespace(**vars(options) | {"split": "choose"}))
    test = held if options.split == "choose" else base.open_study(options)
    path = options.out / f"{NAME}_{test.base.label}_{test.split}.csv"
    table = Table(path, KEYS, VALUES, test.constants())
    entries = [
        e for e in entries_of(options, held) if not options.stored or stored(options, e, held)
    ]
    for entry in tqdm(entries, unit=" networks"):
        if not _complete(table, test, entry):
            measure(table, options, entry, held, test)
    if options.time or options.quick:
        take_times(path.with_name(f"{path.stem}_time.csv"), options, entries, held, test)
    draw(path)
    print(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what is not given comes from ``frozen.toml``."""
    parser = base.parser(__doc__)
    parser.add_argument("--fitted", type=Path, default=Path("fitted"), help="folder of networks")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--no-search", action="store_true", help="only given sizes")
    parser.add_argument("--stored", action="store_true", help="only what was fitted before")
    parser.add_argument("--draws", type=int, default=1, help="draws of calibration images")
    parser.add_argument("--time", action="store_true", help="time all in one run")
    parser.add_argument("--batch", type=int, default=256, help="images in the batch that is timed")
    options = parser.parse_args(arguments)
    if options.quick:
        options.fitted, options.batch = options.out / "fitted", 64
    return options


def entries_of(options: argparse.Namespace, study: base.Study) -> Iterator[Entry]:
    """All networks of the table; the quick mode has a few of each."""
    own = base.frozen()["sinf"]
    if options.quick:
        own = {**own, **base.frozen()["sinf_quick"]}
    model, n, many = study.base.model, own["clusters"], len(study.names)
    layer, budgets = (own[part][study.base.network] for part in ("route_layer", "budgets"))
    low_rank = own["low_rank"].get(study.base.network)

    def pruner(budget: float, samples: int, criterion: str = "dcs") -> dict[str, Any]:
        return {
            "criterion": criterion,
            "schedule": "global",
            "budget": budget,
            "max_ratio": own["max_ratio"],
            "repair_samples": samples,
        }

    def sinf(
        kind: str, clusterer: SemanticClusterer, budget: float, seed: int, **more: Any
    ) -> Entry:
        settings = {"exit_threshold": own["exit_threshold"], **more}
        estimator = SINFClassifier(
            model,
            clusterer=clusterer,
            pruner=DCSPruner(**pruner(budget, own["repair_samples"])),
            route_layer=layer,
            max_accuracy_drop=own["max_accuracy_drop"],
            random_state=seed,
            **settings,
        )
        return Entry("SINF", kind, f"{budget:g}", seed, estimator)

    yield Entry("base", "", "", 0, None)
    for seed in range(options.draws):
        for budget in budgets:
            clusterer = SemanticClusterer(n_clusters=n)
            yield sinf(f"confusion {n}", clusterer, budget, seed)
            if low_rank:
                kind = f"confusion {n}, {LOW_RANK}"
                yield sinf(kind, clusterer, budget, seed, prefix_low_rank=low_rank[0])
        for budget in budgets:
            one = DCSPruner(
                model, **pruner(budget, own["control_repair_samples"], "obs"), random_state=seed
            )
            yield Entry("one network", "obs", f"{budget:g}", seed, one)
            if low_rank:
                yield Entry(
                    "one network", f"obs, {LOW_RANK}", f"{budget:g}", seed, one, low_rank[1]
                )
    budget = own["kinds_budget"]
    for kind in options.kinds:
        for seed in range(own["random_seeds"] if kind == "random" else 1):
            yield sinf(f"{kind} {many}", _clusterer(kind, study, seed), budget, seed)
    if options.kinds:
        # The paper's subgraphs, which know their own classes only, with the base as a fallback.
        clusterer = SemanticClusterer(n_clusters=n)
        strict = {"answers": "cluster", "fallback": "base", "exit_threshold": None}
        yield sinf(f"own classes {n}", clusterer, budget, 0, **strict)
    if not options.no_search:
        limit = own["max_accuracy_drop"]
        search = SINFClassifier(model, max_accuracy_drop=limit, random_state=0)
        yield Entry("SINF", "search", f"{limit:g}", 0, search)


def _clusterer(kind: str, study: base.Study, seed: int) -> SemanticClusterer:
    """As many clusters as are given, by another method or at random."""
    if kind == "given":
        return SemanticClusterer(method="given", mapping=dict(study.clusters))
    if kind != "random":
        return SemanticClusterer(method=kind, n_clusters=len(study.names))
    classes = np.random.default_rng(seed).permutation(len(study.class_names))
    names = list(study.clusters.values())  # of the same sizes
    mapping = {int(k): name for k, name in zip(classes, names, strict=True)}
    return SemanticClusterer(method="given", mapping=mapping)


def _complete(table: Table, study: base.Study, entry: Entry) -> bool:
    """Whether the last row of an entry is there; the others were written before it."""
    last = "restricted" if entry.contestant == "SINF" else "exit"
    return {**study.key(), **entry.key(), "variant": last} in table


@dataclass(frozen=True)
class Order:
    """What a network is fitted with, and where it is stored."""

    data: tuple[np.ndarray, np.ndarray]
    extra: dict[str, np.ndarray]
    path: Path


def order_of(options: argparse.Namespace, entry: Entry, held: base.Study) -> Order:
    """Images of one entry, and the file that belongs to it."""
    own = base.frozen()["sinf_quick" if options.quick else "sinf"]
    rows = held.draw(range(len(held.class_names)), own["images"], entry.seed)
    data = held.X[rows], held.y[rows]
    extra = {"X_val": held.X_test, "y_val": held.y_test} if entry.contestant == "SINF" else {}
    made_of = (__version__, held.base.model, entry.estimator, data, extra)
    key = joblib.hash(made_of if entry.low_rank == 1 else (*made_of, entry.low_rank))
    return Order(data, extra, options.fitted / f"{held.base.label}_{key[:16]}.joblib")


def stored(options: argparse.Namespace, entry: Entry, held: base.Study) -> bool:
    """Whether an entry was fitted before."""
    return order_of(options, entry, held).path.exists()


def fitted(options: argparse.Namespace, entry: Entry, held: base.Study) -> tuple[Any, float]:
    """A routed network or a network's controls, and the seconds that the fit took.

    Returns
    -------
    made : SINFClassifier or dict of str to Module
    seconds : float
    """
    routed, order = entry.contestant == "SINF", order_of(options, entry, held)
    data, path = order.data, order.path
    if path.exists():
        return joblib.load(path)
    options.fitted.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    made = entry.estimator
    if entry.low_rank < 1:
        plain = replace(entry, kind="obs", low_rank=1.0)  # table 4's, as it is
        module = fitted(options, plain, held)[0]["one"].module
        x = torch.cat(list(held.batches(data[0][_some(len(data[0]), options)])))
        made = _controls(factorize(module, entry.low_rank, x), replace(held, X=data[0], y=data[1]))
    elif made is not None:
        # Statistics and scores that several networks share are computed once.
        made.set_params(memory=str(options.fitted / "cache")).fit(*data, **order.extra)
        made.set_params(memory=None)
    seconds = time.perf_counter() - start
    if not routed and entry.low_rank == 1:
        module = held.base.model.module() if made is None else made.model_
        made = _controls(module, replace(held, X=data[0], y=data[1]))
    joblib.dump((made, seconds), path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)  # whole or not at all
    return made, seconds


def _some(n: int, options: argparse.Namespace) -> np.ndarray:
    """As many of the images as the control's repair had, drawn at random."""
    own = base.frozen()["sinf_quick" if options.quick else "sinf"]
    return np.random.default_rng(0).permutation(n)[: own["control_repair_samples"]]


def measure(
    table: Table, options: argparse.Namespace, entry: Entry, held: base.Study, test: base.Study
) -> None:
    """Fit one network and write down its answers, and those of its variants."""
    made, seconds = fitted(options, entry, held)
    key = {**test.key(), **entry.key()}
    if entry.contestant == "SINF":
        found = _routed(made, test)
    else:
        found = _unrouted(made, test)
        if entry.contestant == "base":
            # Once for all rows: with them, every row's answers can be told apart by class.
            found["one"][1]["labels"] = " ".join(map(str, test.y_test.tolist()))
    for variant, (right, numbers) in found.items():
        row = {**dict.fromkeys(VALUES, ""), **numbers, "fit_seconds": f"{seconds:.1f}"}
        row |= {"images": len(right), "right": int(right.sum()), "answers": to_hex(right)}
        table.add(**key, variant=variant, **row)


def _routed(made: SINFClassifier, test: base.Study) -> dict[str, tuple[np.ndarray, dict]]:
    """Answers of a routed network, whole and with each part switched off."""
    network, y = made.network_, test.y_test
    plain = test.base.model.module()
    example = next(rivals.raw(test.X_test[:1]))
    costs = branch_costs(network, example)
    whole = count_macs(plain, network.normalise(example))[0]
    truth = torch.as_tensor(made.class_clusters_[y])
    seen = _variants(network, plain, test, truth)
    chosen, fallback, leaves = (seen.pop(name) for name in ("cluster", "fallback", "leaves"))
    facts = {
        "route_layer": made.route_layer_,
        "n_clusters": network.n_clusters,
        "routed_right": float((chosen == truth.numpy()).mean()),
        "clusters": " ".join(map(str, made.class_clusters_.tolist())),
        "cluster_names": "|".join(map(str, made.cluster_names_)),
    }
    shared, branch, k = costs["shared_macs"], costs["macs"], network.n_clusters
    subgraph = branch[chosen]
    behind = np.where(leaves, 0.0, np.where(fallback, branch[k], subgraph))
    macs = {
        "base": whole,
        "restricted": whole,
        "SINF": shared + behind.mean(),
        "no fusion": shared + behind.mean(),
        "no exit": shared + np.where(fallback, branch[k], subgraph).mean(),
        "no threshold": shared + np.where(leaves, 0.0, subgraph).mean(),
        "two clusters": shared + np.where(leaves, 0.0, subgraph + branch[:k].mean()).mean(),
        "no router": shared + branch[k],
        "oracle": shared + branch[truth.numpy()].mean(),
    }
    return {
        variant: (
            answers == y,
            facts
            | {
                "macs": float(macs[variant]) / whole,
                "fallback": float((fallback & ~leaves).mean()),
                "exits": float(leaves.mean()),
            },
        )
        for variant, answers in seen.items()
    }


def _variants(network: SINFNetwork, plain: Any, test: base.Study, truth: Tensor) -> dict[str, Any]:
    """One pass over the test images: the answers of every variant."""
    fusionless, two, stay = copy.copy(network), copy.copy(network), copy.copy(network)
    fusionless.router_weight, two.fallback, two.top_k = 0.0, "topk", 2
    two.threshold = stay.exit_threshold = 2.0
    found: dict[str, list[Tensor]] = {}
    start = 0
    with torch.inference_mode():
        for raw in rivals.raw(test.X_test):
            x = network.normalise(raw)
            h = network.prefix(x)
            route = network.route_features(h)
            own = truth[start : start + len(x)]
            start += len(x)
            certain = replace(route, confidence=torch.full_like(route.confidence, 2.0))
            logits = plain(x)
            outside = network.class_clusters != own[:, None]
            oracle = stay.process(h, replace(certain, cluster=own))
            answers = {
                "base": logits,
                "SINF": network.process(h, route),
                "no exit": stay.process(h, route),
                "no fusion": fusionless.process(h, route),
                "two clusters": two.process(h, route),
                "oracle": oracle.masked_fill(outside, 0.0),
            }
            if network.rest is not None:
                # Everybody takes the base behind the sliced prefix; nobody does.
                answers["no router"] = network.rest(h)
                answers["no threshold"] = network.process(h, certain)
            # The last one: with it an entry is complete.
            answers["restricted"] = logits.masked_fill(outside, -torch.inf)
            for variant, scores in answers.items():
                found.setdefault(variant, []).append(scores.argmax(1))
            found.setdefault("cluster", []).append(route.cluster)
            found.setdefault("fallback", []).append(route.confidence < network.threshold)
            sure = route.log_posterior.exp().amax(1)
            found.setdefault("leaves", []).append(sure >= network.exit_threshold)
    return {variant: torch.cat(parts).numpy() for variant, parts in found.items()}


def _unrouted(
    controls: dict[str, Any], test: base.Study
) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """Answers of one network for all classes, alone, fused with a probe, and left at it."""
    example = next(test.batches(test.X_test[:1]))
    whole = count_macs(test.base.model.module(), example)[0]
    found = {}
    for variant, made in controls.items():
        if variant == "one":
            macs = count_macs(made.module, example)[0]
        else:
            with torch.inference_mode():
                h = made.prefix(example)
            stays = 1.0 if variant == "fused" else _stays(made, test)
            macs = count_macs(made.prefix, example)[0] + made.probe.weight.numel()
            macs += stays * count_macs(made.rest, h)[0]
        found[variant] = rivals.right_answers(made, test), {"macs": macs / whole}
    return found


def _controls(module: Any, held: base.Study) -> dict[str, Any]:
    """One network alone, fused with a probe where the router sits, and left early.

    The probe is fitted on the study's own images and tuned on its test images.
    """
    own = base.frozen()["sinf"]
    layer = own["route_layer"][held.base.network]
    normalise = rivals.normaliser(held)
    fused = rivals.tuned(normalise, module, layer, held)
    target = base.accuracy(held.base, held.X_test, held.y_test) - own["max_accuracy_drop"]
    return {
        "one": rivals.Plain(normalise, module),
        "fused": fused,
        "exit": rivals.early_exit(fused, held, target),
    }


def _stays(module: rivals.Probed, test: base.Study) -> float:
    """Share of the test images that do not leave at the probe."""
    with torch.inference_mode():
        sure = [module.parts(x)[1].exp().amax(1) for x in rivals.raw(test.X_test)]
    return float((torch.cat(sure) < module.threshold).double().mean())


def _forms(network: SINFNetwork) -> dict[str, Any]:
    """A routed network as it is, and one that nobody leaves early."""
    stay = copy.copy(network)
    stay.exit_threshold = 2.0
    return {"SINF": network, "no exit": stay}


def take_times(
    path: Path,
    options: argparse.Namespace,
    entries: Sequence[Entry],
    held: base.Study,
    test: base.Study,
) -> None:
    """Time everything in turns, in one run, in the same form."""
    modules: dict[str, Any] = {}
    keys = {}
    for entry in entries:
        made, _ = fitted(options, entry, held)
        variants = _forms(made.network_) if entry.contestant == "SINF" else made
        for variant, module in variants.items():
            key = {**entry.key(), "variant": variant}
            name = " | ".join(map(str, key.values()))
            modules[name], keys[name] = module, key
    batch = next(rivals.raw(test.X_test[: options.batch], options.batch))
    latency = paired_latency(
        {name: lambda module=module: module(batch) for name, module in modules.items()},
        repeats=3 if options.quick else 21,
    )
    path.unlink(missing_ok=True)  # times of different runs do not belong in one table
    table = Table(path, KEYS, TIMES, {**test.constants(), "batch": options.batch})
    reference = next(iter(modules))  # the base
    for name, key in keys.items():
        low, high = latency.ratio_quartiles(name, reference)
        table.add(
            **test.key(),
            **key,
            ms=f"{latency.median[name] * 1e3:.2f}",
            ratio=f"{latency.ratio(name, reference):.4f}",
            ratio_low=f"{low:.4f}",
            ratio_high=f"{high:.4f}",
        )


if __name__ == "__main__":
    main()
