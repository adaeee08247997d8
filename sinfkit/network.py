"""The routed network: what runs when a fitted `SINFClassifier` predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .routing import RoutePredictor, cluster_posterior, fuse

FALLBACKS = ("base", "topk", "none")


@dataclass(frozen=True)
class Route:
    """Where each sample of a batch goes.

    Attributes
    ----------
    log_posterior : Tensor of shape (n_samples, n_classes)
        The route predictor's log-probabilities of the fine classes.
    posterior : Tensor of shape (n_samples, n_clusters)
        The same, summed over each cluster.
    cluster : int Tensor of shape (n_samples,)
        The most likely cluster.
    confidence : Tensor of shape (n_samples,)
        Its probability.
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

    Parameters
    ----------
    normalise : nn.Module
        Applied to the input first.
    prefix : nn.Module
        The layers that every sample passes.
    router : RoutePredictor
    subgraphs : sequence of nn.Module or None
        For each cluster, prefix output to the logits of the classes that it answers, in ascending
        order.  None where there is nothing to tell apart: the router's answer stands.
    rest : nn.Module or None
        The base network behind the prefix; needed for ``fallback="base"``.
    class_clusters : int Tensor of shape (n_classes,)
        Cluster of each class, which decides about routes.
    outputs : int Tensor of shape (n_classes,)
        Column of `rest`'s output for each class.
    temperatures : Tensor of shape (n_clusters,)
        Each subgraph's logits are divided by its temperature.
    router_weight : float
        Exponent of the router's posterior within the cluster, see `sinfkit.routing.fuse`.
    threshold : float
        Samples whose route confidence is below it take the fallback.
    fallback : {"base", "topk", "none"}
        What they take: the rest of the base network; the `top_k` most likely clusters' subgraphs
        together; or their cluster's subgraph all the same.
    top_k : int
    answered : bool Tensor of shape (n_clusters, n_classes), optional
        Which classes each subgraph answers.  Default: those of its cluster.
    exit_threshold : float, default=2.0
        Samples of which the route predictor gives one class at least this probability leave there,
        with its answer; above 1 none does.
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
        top_k: int,
        answered: Tensor | None = None,
        exit_threshold: float = 2.0,
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
        self.top_k = top_k

    def subgraph(self, cluster: int) -> nn.Module | None:
        """Return the subgraph of a cluster; None where the router's answer stands."""
        key = str(cluster)
        return self.subgraphs[key] if key in self.subgraphs else None

    def forward(self, x: Tensor) -> Tensor:
        """Return class probabilities.

        Parameters
        ----------
        x : Tensor of shape (n_samples, ...)
            Samples before normalisation.

        Returns
        -------
        Tensor of shape (n_samples, n_classes)
            Rows sum to 1.
        """
        h = self.prefix(self.normalise(x))
        return self.process(h, self.route_features(h))

    def route(self, x: Tensor) -> Route:
        """Run the prefix and the route predictor only."""
        return self.route_features(self.prefix(self.normalise(x)))

    def route_features(self, h: Tensor) -> Route:
        """Route samples by the prefix's output `h`."""
        log_posterior = self.router(h)
        posterior = cluster_posterior(log_posterior, self.class_clusters, self.n_clusters)
        confidence, cluster = posterior.max(1)
        return Route(log_posterior, posterior, cluster, confidence)

    def process(self, h: Tensor, route: Route) -> Tensor:
        """Run each sample's branch on the prefix's output, and put the answers back in order.

        Parameters
        ----------
        h : Tensor of shape (n_samples, ...)
        route : Route
            Routes of the same samples; `cluster` may be replaced by the true one to see what a
            perfect router would give.

        Returns
        -------
        Tensor of shape (n_samples, n_classes)
        """
        rows, branch = self.branches(route)
        probabilities = route.log_posterior.exp()  # what stands for samples that leave
        logits, fallback = self._run(h, rows, branch)
        if len(branch) == 0:
            return probabilities
        routed = branch < self.n_clusters
        if self.fallback == "base" or self.exit_threshold <= 1:
            rows, branch, logits = rows[routed], branch[routed], logits[routed]
        members = self.answered[branch]
        fused = fuse(
            route.log_posterior[rows],
            logits / self.temperatures[branch][:, None],
            members,
            self.router_weight,
        )
        if self.fallback == "topk":
            return self._mix(route, rows, branch, members, fused)
        probabilities[rows] = fused
        if fallback is not None:
            below, answers = fallback
            probabilities[below] = answers
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

        Parameters
        ----------
        h : Tensor of shape (n_samples, ...)
            The prefix's output.
        branch : int Tensor of shape (n_samples,)
            Cluster whose subgraph runs.

        Returns
        -------
        Tensor of shape (n_samples, n_classes)
            Without temperature; 0 in the columns of classes that the subgraph does not answer.
        """
        return self._run(h, torch.arange(len(branch), device=branch.device), branch)[0]

    def branches(self, route: Route) -> tuple[Tensor, Tensor]:
        """List which branch each sample runs.

        Returns
        -------
        rows, branch : int Tensors of shape (n_runs,)
            Sample and branch of each run, in the order of the samples.  Branch `n_clusters` is the
            base network, branch ``n_clusters + 1`` the way out behind the route predictor.
        """
        rows = torch.arange(len(route.cluster), device=route.cluster.device)
        unsure = route.confidence < self.threshold
        branch = route.cluster
        if self.fallback == "base":
            branch = torch.where(unsure, self.n_clusters, branch)
        leaves: Tensor | None = None
        if self.exit_threshold <= 1:
            leaves = route.log_posterior.amax(1) >= math.log(max(self.exit_threshold, 1e-30))
            branch = torch.where(leaves, self.n_clusters + 1, branch)
        k = min(self.top_k, self.n_clusters)
        if self.fallback != "topk" or k < 2:
            return rows, branch
        likely = route.posterior.topk(k, dim=1).indices
        likely[:, 0] = branch
        wanted = (unsure if leaves is None else unsure & ~leaves)[:, None].expand_as(likely).clone()
        wanted[:, 0] = True
        row, rank = wanted.nonzero(as_tuple=True)
        return row, likely[row, rank]

    def _run(
        self, h: Tensor, rows: Tensor, branch: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Run every branch on its rows.

        Returns
        -------
        logits : Tensor of shape (n_runs, n_classes)
            A subgraph's logits in the columns of its classes, 0 elsewhere.
        fallback : (rows, probabilities) or None
            The base network's answers, if any sample took that branch.
        """
        order = torch.argsort(branch, stable=True)
        # The one place where the host must know: how many rows each branch has.
        counts = torch.bincount(branch, minlength=self.n_clusters + 2).tolist()
        logits: Tensor | None = None
        fallback = None
        # Those that leave come last, and nothing of them is copied.
        counts, order = counts[:-1], order[: len(order) - counts[-1]]
        groups = h[rows[order]].split(counts)
        for c, (group, index) in enumerate(zip(groups, order.split(counts), strict=True)):
            if len(index) == 0:
                continue
            if c == self.n_clusters:
                assert self.rest is not None
                answers = self.rest(group)[:, self.outputs].to(self.router.weight.dtype)
                fallback = (rows[index], torch.softmax(answers, 1))
            elif (subgraph := self.subgraph(c)) is not None:
                out = subgraph(group)
                if logits is None:
                    logits = out.new_zeros(len(branch), len(self.class_clusters))
                if out.shape[1] == logits.shape[1]:
                    logits[index] = out
                else:
                    logits[index[:, None], self.answered[c].nonzero()[:, 0]] = out
        if logits is None:
            logits = h.new_zeros(len(branch), len(self.class_clusters))
        return logits, fallback
