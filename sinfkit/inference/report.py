"""The comparison of the base network and the routed one, as figures and as a printed table."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.calibration import Batcher
from ..data.validation import Images, check_answers
from ..graph.cost import Latency, count_macs, count_parameters, fold_batch_norm, paired_latency
from ..graph.cuts import trace
from ..utils.device import in_pieces
from .forms import fast_form
from .network import SINFNetwork

__all__ = ["base_for_timing", "branch_costs"]


@dataclass(frozen=True)
class ClusterRow:
    """One cluster's figures.

    Attributes
    ----------
    name : object
    n_classes, n_samples : int
    base : float
        Accuracy of the base network, all classes open, on the cluster's samples.
    restricted : float
        The control: the UNPRUNED base answering with the cluster's classes only.
    subgraph : float
        The cluster's subgraph, which answers with the same classes; nan without a subgraph.
    routed : float
        SINF as it predicts, wrong routes and fallback included.
    route : float
        Share of the cluster's samples that the route predictor sends to it.
    macs : float
        Multiplications of prefix, router and subgraph for one sample.
    """

    name: Any
    n_classes: int
    n_samples: int
    base: float
    restricted: float
    subgraph: float
    routed: float
    route: float
    macs: float


@dataclass(frozen=True)
class SINFReport:
    """Base network and routed network side by side.

    Attributes
    ----------
    base_accuracy, accuracy : float
        Of the base and of SINF.
    oracle_accuracy : float
        Of SINF if every sample were sent to its true cluster.
    route_accuracy : float
        Share of samples that the route predictor sends to the right cluster.
    base_route_accuracy : float
        Share of samples whose cluster the base's own answer implies.
    fallback_share, exit_share : float
        Shares of samples whose route confidence is below the threshold, and of those that leave at
        the route predictor.
    base_parameters, parameters : int
        SINF's count is of everything that it holds: prefix, router, all subgraphs, fallback.
    active_parameters : float
        Parameters that a sample passes, on average over the routed mix.
    base_macs, macs : float
        Multiplications for one sample; SINF's on average over the routed mix, fallback included.
    latency : Latency or None
        Paired measurements of ``"base"`` and ``"sinf"``; None where none were asked for.
    latency_batch : int
    clusters : list of ClusterRow
    n_samples : int

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import DCSPruner, SINFClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> clf = SINFClassifier(pruner=DCSPruner(), random_state=0).fit(X[:600], y[:600])
    >>> report = clf.report(X[600:800], y[600:800], repeats=0)
    >>> report.macs < report.base_macs
    True
    >>> report.to_dict()["n_samples"]
    200
    """

    base_accuracy: float
    accuracy: float
    oracle_accuracy: float
    route_accuracy: float
    base_route_accuracy: float
    fallback_share: float
    exit_share: float
    base_parameters: int
    parameters: int
    active_parameters: float
    base_macs: float
    macs: float
    latency: Latency | None
    latency_batch: int
    clusters: list[ClusterRow]
    n_samples: int

    @property
    def time_saved(self) -> float:
        """Share of the base's time that SINF saves: 1 - median of the pairwise ratios."""
        if self.latency is None:
            return float("nan")
        return 1.0 - self.latency.ratio("sinf", "base")

    def to_dict(self) -> dict[str, float]:
        """Return the overall figures, for a data frame or a CSV file."""
        return {
            "n_samples": self.n_samples,
            "base_accuracy": self.base_accuracy,
            "accuracy": self.accuracy,
            "oracle_accuracy": self.oracle_accuracy,
            "route_accuracy": self.route_accuracy,
            "base_route_accuracy": self.base_route_accuracy,
            "fallback_share": self.fallback_share,
            "exit_share": self.exit_share,
            "base_parameters": self.base_parameters,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "base_macs": self.base_macs,
            "macs": self.macs,
            "latency_batch": self.latency_batch,
            "time_saved": self.time_saved,
        }

    def __str__(self) -> str:
        return "\n".join([*_overall(self), "", *_per_cluster(self)])


def make_report(
    network: SINFNetwork,
    base: nn.Module,
    batcher: Batcher,
    X: Images,
    codes: np.ndarray,
    class_clusters: np.ndarray,
    cluster_names: np.ndarray,
    *,
    latency_batch: int,
    repeats: int,
) -> SINFReport:
    """Measure the base and the routed network on the same samples.

    Parameters
    ----------
    network : SINFNetwork
    base : nn.Module
        The unpruned network, on the same device.
    batcher : Batcher
    X : ndarray or Tensor of shape (n_samples, ...)
    codes : int ndarray of shape (n_samples,)
        True classes.
    class_clusters : int ndarray of shape (n_classes,)
    cluster_names : ndarray of shape (n_clusters,)
    latency_batch : int
    repeats : int
        Timed pairs; 0 for none.

    Returns
    -------
    SINFReport
    """
    clusters = torch.as_tensor(class_clusters)
    truth = clusters[torch.as_tensor(codes)]
    seen = _observe(network, base, batcher, X, truth)
    members = clusters == truth[:, None]
    y = torch.as_tensor(codes)
    base_right = seen.base.argmax(1) == y
    restricted_right = seen.base.masked_fill(~members, -torch.inf).argmax(1) == y
    subgraph_right = seen.true_logits.masked_fill(~members, -torch.inf).argmax(1) == y
    routed_right = seen.answers.argmax(1) == y
    route_right = seen.cluster == truth

    example = batcher.load(X[:1])
    costs = branch_costs(network, example)
    branch_macs, branch_parameters = costs["macs"], costs["parameters"]
    rows = []
    for c, name in enumerate(cluster_names.tolist()):
        own = truth == c
        has_subgraph = network.subgraph(c) is not None
        rows.append(
            ClusterRow(
                name,
                int((clusters == c).sum()),
                int(own.sum()),
                _mean(base_right[own]),
                _mean(restricted_right[own]),
                _mean(subgraph_right[own]) if has_subgraph else float("nan"),
                _mean(routed_right[own]),
                _mean(route_right[own]),
                costs["shared_macs"] + branch_macs[c],
            )
        )
    share = seen.runs / len(codes)
    latency = None
    if repeats:
        sample = batcher.load(X[:latency_batch])
        if sample.ndim == 4:
            sample = sample.contiguous(memory_format=torch.channels_last)
        fast = fast_form(network, lambda: sample)
        fast_base = base_for_timing(network, base, sample)
        latency = paired_latency(
            {"base": lambda: fast_base(sample), "sinf": lambda: fast(sample)}, repeats=repeats
        )
    return SINFReport(
        base_accuracy=_mean(base_right),
        accuracy=_mean(routed_right),
        # The true route also rules out the other clusters' classes.
        oracle_accuracy=_mean(seen.oracle.masked_fill(~members, 0).argmax(1) == y),
        route_accuracy=_mean(route_right),
        base_route_accuracy=_mean(clusters[seen.base.argmax(1)] == truth),
        fallback_share=_mean((seen.confidence < network.threshold) & ~seen.leaves),
        exit_share=_mean(seen.leaves),
        base_parameters=count_parameters(base),
        parameters=count_parameters(network),
        active_parameters=costs["shared_parameters"] + float(share @ branch_parameters),
        base_macs=count_macs(base, network.normalise(example))[0],
        macs=costs["shared_macs"] + float(share @ branch_macs),
        latency=latency,
        latency_batch=latency_batch,
        clusters=rows,
        n_samples=len(codes),
    )


def base_for_timing(network: SINFNetwork, base: nn.Module, sample: Tensor) -> nn.Module:
    """Bring the base into SINF's fastest form; `sample` is a batch before normalisation."""
    # A copy: folding shares what it need not fold, and the layout is about to change.
    folded = copy.deepcopy(fold_batch_norm(trace(base)))
    if sample.ndim == 4:
        folded = folded.to(memory_format=torch.channels_last)
    fast = fast_form(folded.eval(), lambda: network.normalise(sample))
    return nn.Sequential(network.normalise, fast).eval()


def branch_costs(network: SINFNetwork, example: Tensor) -> dict[str, Any]:
    """Multiplications and parameters of the shared part and of each branch, for one sample.

    Parameters
    ----------
    network : SINFNetwork
    example : Tensor of shape (1, ...)
        Not normalised.

    Returns
    -------
    dict
        ``shared_macs``, ``shared_parameters``: prefix and router; ``macs``, ``parameters``: arrays
        of shape (n_clusters + 2,), one entry for each branch of `SINFNetwork.branches`: behind
        the clusters' the base network's rest, and nothing for what leaves at the route predictor.
    """
    x = network.normalise(example)
    with torch.inference_mode():
        h = network.prefix(x)
    n = network.n_clusters
    macs, parameters = np.zeros(n + 2), np.zeros(n + 2)
    for c in range(n + 1):
        branch = network.rest if c == n else network.subgraph(c)
        if branch is not None:
            macs[c], parameters[c] = count_macs(branch, h)[0], count_parameters(branch)
    return {
        "shared_macs": count_macs(network.prefix, x)[0] + network.router.weight.numel(),
        "shared_parameters": count_parameters(network.prefix) + count_parameters(network.router),
        "macs": macs,
        "parameters": parameters,
    }


@dataclass(frozen=True)
class _Seen:
    """All answers on the report samples."""

    base: Tensor
    answers: Tensor
    oracle: Tensor
    true_logits: Tensor
    cluster: Tensor
    confidence: Tensor
    leaves: Tensor
    runs: np.ndarray  # runs of each branch


def _observe(
    network: SINFNetwork, base: nn.Module, batcher: Batcher, X: Images, truth: Tensor
) -> _Seen:
    """One pass: base, SINF, SINF with the true route, the true cluster's subgraph."""

    def look(raw: Tensor, own: Tensor) -> tuple[Tensor, ...]:
        x = network.normalise(raw)
        h = network.prefix(x)
        route = network.route_features(h)
        own = own.to(x.device)
        certain = torch.full_like(route.confidence, 2.0)
        oracle = replace(route, cluster=own, confidence=certain)
        rows, branch = network.branches(route)
        leaves = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        leaves[rows[branch == network.n_clusters + 1]] = True
        seen = (
            base(x)[:, network.outputs],
            network.process(h, route),
            network.process(h, oracle),
            network.branch_logits(h, own),
            route.cluster,
            route.confidence,
            leaves,
            branch,
        )
        return tuple(value.cpu() for value in seen)

    with torch.inference_mode():
        pieces = list(in_pieces(look, batcher.raw(X), truth))
    *columns, branches = zip(*pieces, strict=True)
    runs = np.bincount(torch.cat(branches).numpy(), minlength=network.n_clusters + 2)
    base_logits, answers, forced, own_logits, cluster, confidence, left = map(torch.cat, columns)
    check_answers(answers)
    return _Seen(base_logits, answers, forced, own_logits, cluster, confidence, left, runs)


def _mean(right: Tensor) -> float:
    return float(right.double().mean()) if len(right) else float("nan")


def _overall(r: SINFReport) -> list[str]:
    """Lines of the first table."""
    lines = [
        f"{'':34}{'base':>12}{'SINF':>12}",
        f"{'accuracy':34}{r.base_accuracy:>12.1%}{r.accuracy:>12.1%}"
        f"   ({(r.accuracy - r.base_accuracy) * 100:+.1f} points)",
        f"{'  if every route were right':34}{'':12}{r.oracle_accuracy:>12.1%}",
        f"{'cluster predicted':34}{r.base_route_accuracy:>12.1%}{r.route_accuracy:>12.1%}",
        f"{'samples on the fallback':34}{'':12}{r.fallback_share:>12.1%}",
        f"{'samples that leave at the router':34}{'':12}{r.exit_share:>12.1%}",
        f"{'parameters held':34}{_short(r.base_parameters):>12}{_short(r.parameters):>12}",
        f"{'parameters used per sample':34}{_short(r.base_parameters):>12}"
        f"{_short(r.active_parameters):>12}",
        f"{'MACs per sample':34}{_short(r.base_macs):>12}{_short(r.macs):>12}"
        f"   ({r.base_macs / r.macs:.2f}x fewer)",
    ]
    if r.latency is not None:
        base, sinf = r.latency.median["base"], r.latency.median["sinf"]
        batch = f"ms per batch of {r.latency_batch} (median)"
        lines.append(
            f"{batch:34}{base * 1e3:>12.1f}{sinf * 1e3:>12.1f}"
            f"   ({r.time_saved:.0%} saved, {1 / (1 - r.time_saved):.2f}x)"
        )
    return [*lines, f"{r.n_samples} samples"]


def _per_cluster(r: SINFReport) -> list[str]:
    """Lines of the table of clusters."""
    width = max([7, *(len(str(row.name)) for row in r.clusters)]) + 2
    head = ("classes", "samples", "base", "restricted", "subgraph", "SINF", "routed", "MACs")
    lines = [f"{'cluster':{width}}" + "".join(f"{h:>11}" for h in head)]
    for row in r.clusters:
        figures = (row.base, row.restricted, row.subgraph, row.routed, row.route)
        lines.append(
            f"{row.name!s:{width}}{row.n_classes:>11}{row.n_samples:>11}"
            + "".join(f"{'-' if np.isnan(f) else f'{f:.1%}':>11}" for f in figures)
            + f"{_short(row.macs):>11}"
        )
    lines += [
        "base: all classes open; restricted: the unpruned base answering with the cluster's own",
        "classes only (the control of 'subgraph'); SINF: as it predicts; routed: sent to the right",
        "cluster",
    ]
    return lines


def _short(n: float) -> str:
    """1.5M for 1,500,000."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.2f}{suffix}"
    return f"{n:.0f}"
