"""The routed network and its route predictor: what runs when a fitted `SINFClassifier` predicts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..criteria.activations import pool
from ..criteria.discriminability import Probe, average, fit_probe

PENALTIES = (0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)


class RoutePredictor(nn.Module):
    """Pooled features of the prefix to log-probabilities of the fine classes.

    Shapes: `weight` (n_classes, n_features), `bias` (n_classes,).
    """

    def __init__(self, weight: Tensor, bias: Tensor, pool_size: int) -> None:
        super().__init__()
        self.pool_size = pool_size
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        """Map the prefix's output to log-posteriors of shape (n_samples, n_classes)."""
        # float32 or wider whatever the network computes in: a route must not hang on rounding.
        return self.of_pooled(pool(h, self.pool_size).to(self.weight.dtype))

    def of_pooled(self, features: Tensor) -> Tensor:
        """The same from pooled features, of shape (n_samples, n_features)."""
        return torch.log_softmax(features @ self.weight.T + self.bias, 1)


@dataclass(frozen=True)
class RouteFit:
    """A fitted route predictor and how well it does on held-out samples.

    Shapes: `log_posterior` (n_held_out, n_classes).
    """

    predictor: RoutePredictor
    penalty: float
    log_posterior: Tensor


def fit_route_predictor(
    features: Tensor,
    codes: np.ndarray,
    held_out: Tensor,
    held_out_codes: np.ndarray,
    *,
    pool_size: int,
    penalties: Sequence[float] = PENALTIES,
    weight: np.ndarray | None = None,
    held_out_weight: np.ndarray | None = None,
) -> RouteFit:
    """Fit the probe on the fine classes; the penalty is chosen on held-out samples.

    Shapes: `features` (n_samples, n_features), `codes` (n_samples,), `held_out` (n_held_out,
    n_features), `held_out_codes` (n_held_out,), `weight` (n_samples,), `held_out_weight`
    (n_held_out,).
    """
    dtype = features.dtype
    counts = None if weight is None else torch.as_tensor(weight).to(features)
    mean = average(features, counts)
    if counts is None:
        std = features.std(0, correction=0)
    else:
        std = average((features - mean).square(), counts).sqrt()
    std = torch.where(std > 1e-7 * std.max().clamp_min(1e-30), std, torch.ones_like(std))
    train, test = (features - mean) / std, (held_out - mean) / std
    y = torch.as_tensor(codes, device=features.device)
    y_test = torch.as_tensor(held_out_codes, device=features.device)
    best: tuple[float, float, Tensor, Tensor] | None = None
    probe: Probe | None = None
    for penalty in sorted(penalties, reverse=True):
        # Enough digits for a route; the last ones cost most of the time.
        probe = fit_probe(
            train, y, penalty=penalty, tol=1e-3, dtype=dtype, start=probe, sample_weight=counts
        )
        losses = -torch.log_softmax(probe.logits(test), 1).gather(1, y_test[:, None])
        if held_out_weight is None:
            loss = float(losses.mean())
        else:
            loss = float(average(losses, torch.as_tensor(held_out_weight).to(losses)))
        if best is not None and loss > best[0]:
            break
        coef = probe.coef / std
        bias = probe.intercept - (coef * mean).sum(1)
        best = (loss, penalty, coef, bias)
    assert best is not None
    _, penalty, coef, bias = best
    predictor = RoutePredictor(coef.to(dtype), bias.to(dtype), pool_size)
    return RouteFit(predictor, penalty, predictor.of_pooled(held_out))


def cluster_posterior(log_posterior: Tensor, class_clusters: Tensor, n_clusters: int) -> Tensor:
    """Sum class probabilities over each cluster.

    Shapes: `log_posterior` (n_samples, n_classes), `class_clusters` (n_classes,).
    """
    p = log_posterior.exp()
    out = p.new_zeros(len(p), n_clusters)
    return out.index_add_(1, class_clusters, p)


def fuse(
    log_router: Tensor, logits: Tensor, members: Tensor, router_weight: float | Tensor
) -> Tensor:
    """Join the router's posterior with a subgraph's answer.

    Shapes: `log_router` (n_samples, n_classes), `logits` (n_samples, n_classes), `members`
    (n_samples, n_classes), returns (n_samples, n_classes).
    """
    joint = logits.to(log_router.dtype) + router_weight * log_router
    within = torch.softmax(joint.masked_fill(~members, -torch.inf), 1)
    posterior = log_router.exp()
    mass = (posterior * members).sum(1, keepdim=True)
    return torch.where(members, mass * within, posterior)


def choose_threshold(
    confidence: np.ndarray,
    routed_correct: np.ndarray,
    fallback_correct: np.ndarray,
    *,
    target: float,
    weight: np.ndarray | None = None,
) -> float:
    """Smallest confidence threshold whose accuracy reaches `target` on held-out samples.

    A sample below the threshold takes the fallback's answer. A smaller threshold sends fewer
    samples there, and so is faster.

    Shapes: `confidence` (n_samples,), `routed_correct, fallback_correct` (n_samples,), `weight`
    (n_samples,).
    """
    order = np.argsort(confidence, kind="stable")
    ranked = confidence[order]
    gain = fallback_correct[order].astype(float) - routed_correct[order].astype(float)
    n_samples: int | float = len(order)
    if weight is not None:
        gain, n_samples = gain * weight[order], float(weight.sum())
    # accuracy[i]: the i least confident samples take the fallback.
    gained = np.concatenate(([0.0], np.cumsum(gain)))
    accuracy = _mean(routed_correct, weight) + gained / n_samples
    # A threshold of at most 1 cannot part equal confidences, nor doubt a certain route.
    possible = np.concatenate(([True], ranked[1:] > ranked[:-1], [ranked[-1] < 1]))
    reached = np.flatnonzero(possible & (accuracy >= target - 1e-12))
    if len(reached):
        index = int(reached[0])
    else:
        best = int(np.argmax(np.where(possible, accuracy, -np.inf)))
        changed = np.concatenate(([0.0], np.cumsum(np.abs(gain))))  # answers right in one alone
        short = gained[best] - gained
        error = np.sqrt(np.maximum(np.abs(changed[best] - changed) - short**2 / n_samples, 0.0))
        index = int(np.flatnonzero(possible & (short <= error))[0])
    if index == 0:
        return 0.0
    if index == len(ranked):
        return 1.0
    # Half way between neighbours, so that rounding does not move a sample across.
    return float((ranked[index - 1] + ranked[index]) / 2)


def choose_exit(
    confidence: np.ndarray,
    early_correct: np.ndarray,
    later_correct: np.ndarray,
    *,
    target: float,
    weight: np.ndarray | None = None,
) -> float | None:
    """Smallest probability at which samples may leave at the route predictor; None for never.

    The smaller the threshold, the more samples leave, and the faster the network is.

    Shapes: `confidence` (n_samples,), `early_correct, later_correct` (n_samples,), `weight`
    (n_samples,).
    """
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order]
    gain = early_correct[order].astype(float) - later_correct[order].astype(float)
    n_samples: int | float = len(order)
    if weight is not None:
        gain, n_samples = gain * weight[order], float(weight.sum())
    # accuracy[i]: the i most confident samples leave.
    accuracy = _mean(later_correct, weight) + np.concatenate(([0.0], np.cumsum(gain))) / n_samples
    possible = np.concatenate(([True], ranked[1:] < ranked[:-1], [True]))
    reached = possible & (accuracy >= min(target, float(accuracy[0])) - 1e-12)
    index = int(np.flatnonzero(reached)[-1])
    if index == 0:
        return None
    if index == len(ranked):
        return 0.0
    # Half way between neighbours, so that rounding does not move a sample across.
    return float((ranked[index - 1] + ranked[index]) / 2)


def _mean(values: np.ndarray, weight: np.ndarray | None) -> Any:
    """Mean over samples, of which some may count more than others."""
    return np.mean(values) if weight is None else np.average(values, weights=weight)


FALLBACKS = ("none", "base", "top2")

N = TypeVar("N", bound="SINFNetwork")


@dataclass(frozen=True)
class Route:
    """Where each sample of a batch goes.

    Shapes: `log_posterior` (n_samples, n_classes), `posterior` (n_samples, n_clusters),
    `cluster` (n_samples,), `confidence` (n_samples,).
    """

    log_posterior: Tensor
    posterior: Tensor
    cluster: Tensor
    confidence: Tensor


class Normalise(nn.Module):
    """``(x - mean) / std`` per channel; the identity where both are None."""

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, mean: Tensor | None, std: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a batch of shape (n_samples, channels, ...)."""
        if self.mean is None or self.std is None:
            return x
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x - self.mean.view(shape)) / self.std.view(shape)


def own_classes(class_clusters: Tensor, n_clusters: int) -> Tensor:
    """Which classes belong to each cluster: bool, of shape (n_clusters, n_classes)."""
    clusters = torch.arange(n_clusters, device=class_clusters.device)
    return class_clusters == clusters[:, None]


class SINFNetwork(nn.Module):
    """Prefix, route predictor, feature router and one subgraph per cluster in one module.

    The paper's four parts: common feature extractor (`prefix`), semantic route predictor
    (`router`), feature router (`forward`: who goes where) and feature processor (`subgraphs`).

    Shapes: `class_clusters` (n_classes,), `outputs` (n_classes,), `temperatures` (n_clusters,),
    `answered` (n_clusters, n_classes).
    """

    class_clusters: Tensor
    outputs: Tensor
    temperatures: Tensor
    answered: Tensor

    def __init__(
        self,
        normalise: nn.Module,
        prefix: nn.Module,
        router: RoutePredictor,
        subgraphs: Sequence[nn.Module | None],
        rest: nn.Module | None,
        class_clusters: Tensor,
        outputs: Tensor,
        temperatures: Tensor,
        *,
        router_weight: float,
        threshold: float,
        fallback: str,
        answered: Tensor | None = None,
        exit_threshold: float | None = None,
    ) -> None:
        super().__init__()
        if fallback not in FALLBACKS:
            raise ValueError(f"fallback must be one of {FALLBACKS}, got {fallback!r}.")
        if fallback == "base" and rest is None:
            raise ValueError('fallback="base" needs the rest of the base network.')
        self.normalise = normalise
        self.prefix = prefix
        self.router = router
        self.subgraphs = nn.ModuleDict(
            {str(c): s for c, s in enumerate(subgraphs) if s is not None}
        )
        self.rest = rest
        self.n_clusters = len(subgraphs)
        self.register_buffer("class_clusters", class_clusters)
        self.register_buffer("outputs", outputs)
        self.register_buffer("temperatures", temperatures)
        if answered is None:
            answered = own_classes(class_clusters, self.n_clusters)
        self.register_buffer("answered", answered)
        self.router_weight = router_weight
        self.threshold = threshold
        self.exit_threshold = exit_threshold
        self.fallback = fallback

    def settings(self) -> tuple[tuple[str, Any], ...]:
        """What decides about routes and answers, besides tensors."""
        names = ("router_weight", "threshold", "exit_threshold", "fallback")
        return tuple((name, getattr(self, name)) for name in names)

    def rebuilt(self, kind: type[N], convert: Callable[[nn.Module], nn.Module]) -> N:
        """Make a network of another class, with prefix, subgraphs and rest converted."""
        subgraphs = [self.subgraph(c) for c in range(self.n_clusters)]
        return kind(
            self.normalise,
            convert(self.prefix),
            self.router,
            [None if part is None else convert(part) for part in subgraphs],
            None if self.rest is None else convert(self.rest),
            self.class_clusters,
            self.outputs,
            self.temperatures,
            answered=self.answered,
            **dict(self.settings()),
        ).eval()

    def subgraph(self, cluster: int) -> nn.Module | None:
        """Return the subgraph of a cluster; None where the router's answer stands."""
        key = str(cluster)
        return self.subgraphs[key] if key in self.subgraphs else None

    def forward(self, x: Tensor) -> Tensor:
        """Return class probabilities.

        Shapes: `x` (n_samples, ...), returns (n_samples, n_classes).
        """
        h, log_posterior = self.features(x)
        return self.process(h, self._routes(log_posterior))

    def forward_finite(self, x: Tensor) -> Tensor:
        """Return class probabilities as `forward` does, but refuse samples with NaN or infinity.

        Whether there are any is told by the copy that tells the host how many samples each
        cluster has: to ask beforehand would be a second one.

        Shapes: `x` (n_samples, ...), returns (n_samples, n_classes).
        """
        h, log_posterior = self.features(x)
        return self.process(h, self._routes(log_posterior), torch.isfinite(x).all())

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run what every sample passes: the prefix's output, and the fine log-posterior."""
        h = self.prefix(self.normalise(x))
        return h, self.router(h)

    def route(self, x: Tensor) -> Route:
        """Run the prefix and the route predictor only."""
        return self._routes(self.features(x)[1])

    def route_features(self, h: Tensor) -> Route:
        """Route samples by the prefix's output `h`."""
        return self._routes(self.router(h))

    def _routes(self, log_posterior: Tensor) -> Route:
        """From the route predictor's answers to routes."""
        posterior = cluster_posterior(log_posterior, self.class_clusters, self.n_clusters)
        confidence, cluster = posterior.max(1)
        return Route(log_posterior, posterior, cluster, confidence)

    def process(self, h: Tensor, route: Route, finite: Tensor | None = None) -> Tensor:
        """Run each sample's branch on the prefix's output, and put the answers back in order.

        Shapes: `h` (n_samples, ...), `finite` ().
        """
        rows, branch = self.branches(route)
        probabilities = route.log_posterior.exp()  # what stands for samples that leave
        order, logits, fallback = self._run(h, rows, branch, finite)
        if fallback is not None:
            below, answers = fallback
            probabilities[below] = answers
        if len(order) == 0:
            return probabilities
        rows, branch = rows[order], branch[order]
        members = self.answered[branch]
        fused = fuse(
            route.log_posterior[rows],
            logits / self.temperatures[branch][:, None],
            members,
            self.router_weight,
        )
        if self.fallback == "top2":
            return self._mix(route, rows, branch, members, fused)
        probabilities[rows] = fused
        return probabilities

    def _mix(
        self, route: Route, rows: Tensor, branch: Tensor, members: Tensor, fused: Tensor
    ) -> Tensor:
        """Join the answers of all subgraphs that a sample ran, each weighed by its cluster."""
        router = route.log_posterior.exp()
        weight = route.posterior[rows, branch][:, None] * members
        total = torch.zeros_like(router).index_add_(0, rows, weight)
        answers = torch.zeros_like(router).index_add_(0, rows, weight * fused)
        mixed = torch.where(total > 0, answers / total.clamp_min(1e-30), router)
        # Subgraphs that share some of their classes need not agree on their total.
        return mixed / mixed.sum(1, keepdim=True)

    def branch_logits(self, h: Tensor, branch: Tensor) -> Tensor:
        """Logits of one given subgraph per sample.

        Shapes: `h` (n_samples, ...), `branch` (n_samples,), returns (n_samples, n_classes).
        """
        rows = torch.arange(len(branch), device=branch.device)
        order, logits, _ = self._run(h, rows, branch)
        return torch.empty_like(logits).index_copy_(0, order, logits)

    def branches(self, route: Route) -> tuple[Tensor, Tensor]:
        """List which branch each sample runs.

        Shapes: returns (n_runs,).
        """
        rows = torch.arange(len(route.cluster), device=route.cluster.device)
        unsure = route.confidence < self.threshold
        branch = route.cluster
        if self.fallback == "base":
            branch = torch.where(unsure, self.n_clusters, branch)
        leaves: Tensor | None = None
        if self.exit_threshold is not None:
            leaves = route.log_posterior.amax(1) >= math.log(max(self.exit_threshold, 1e-30))
            branch = torch.where(leaves, self.n_clusters + 1, branch)
        if self.fallback != "top2" or self.n_clusters < 2:
            return rows, branch
        likely = route.posterior.topk(2, dim=1).indices
        likely[:, 0] = branch
        wanted = (unsure if leaves is None else unsure & ~leaves)[:, None].expand_as(likely).clone()
        wanted[:, 0] = True
        row, rank = wanted.nonzero(as_tuple=True)
        return row, likely[row, rank]

    def run_branch(self, branch: int, h: Tensor, index: Tensor) -> Tensor:
        """Run one branch on its samples.

        Shapes: `h` (n_samples, ...), `index` (n_rows,), returns (n_rows, n_outputs).
        """
        # As many rows as there are, are all. And not index_select, which forgets channels_last.
        return self.branch(branch)(h if len(index) == len(h) else h[index])

    def branch(self, branch: int) -> nn.Module:
        """Return the module that runs a branch: a cluster's subgraph, or the base's rest."""
        module = self.rest if branch == self.n_clusters else self.subgraph(branch)
        assert module is not None
        return module

    def _run(
        self, h: Tensor, rows: Tensor, branch: Tensor, finite: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Run every branch on its rows.

        Shapes: returns (n_routed,), returns (n_routed, n_classes).
        """
        order = torch.argsort(branch, stable=True)
        # The one place where the host must know: how many rows each branch has.  Not by bincount,
        # which on a GPU asks for the smallest and the largest branch as well.
        told = branch.new_zeros(self.n_clusters + 2)
        told = told.scatter_add(0, branch, torch.ones_like(branch))
        if finite is not None:
            told = torch.cat((told, finite[None].to(told.dtype)))
        counts = told.tolist()
        if finite is not None and not counts.pop():
            raise ValueError("X contains NaN or infinity, which no network can use.")
        ends = list(itertools.accumulate(counts))
        fallback = None
        if counts[self.n_clusters]:
            index = rows[order[ends[-3] : ends[-2]]]
            out = self.run_branch(self.n_clusters, h, index)[:, self.outputs]
            fallback = (index, torch.softmax(out.to(self.router.weight.dtype), 1))
        order = order[: ends[-3]]
        logits: Tensor | None = None
        columns = None
        for c, (n, end) in enumerate(zip(counts[:-2], ends[:-2], strict=True)):
            if n == 0 or self.subgraph(c) is None:
                continue
            out = self.run_branch(c, h, rows[order[end - n : end]])
            if logits is None:
                logits = out.new_zeros(len(order), len(self.class_clusters))
            if out.shape[1] == logits.shape[1]:
                logits[end - n : end] = out
                continue
            if columns is None:
                # Each cluster's classes in front; to look for them one by one would stop the host.
                columns = self.answered.byte().argsort(dim=1, descending=True, stable=True)
            logits[end - n : end].index_copy_(1, columns[c, : out.shape[1]], out)
        if logits is None:
            logits = h.new_zeros(len(order), len(self.class_clusters))
        return order, logits, fallback
