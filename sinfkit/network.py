"""The routed network: what runs when a fitted `SINFClassifier` predicts."""

from __future__ import annotations

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
        For each cluster, prefix output to the logits of the cluster's classes in ascending order.
        None for a cluster of one class: the router's answer stands.
    rest : nn.Module or None
        The base network behind the prefix; needed for ``fallback="base"``.
    class_clusters : int Tensor of shape (n_classes,)
        Cluster of each class.
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
    """

    class_clusters: Tensor
    outputs: Tensor
    temperatures: Tensor

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
        self.router_weight = router_weight
        self.threshold = threshold
        self.fallback = fallback
        self.top_k = top_k

    def subgraph(self, cluster: int) -> nn.Module | None:
        """Return the subgraph of a cluster; None for a cluster of one class."""
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
        probabilities = route.log_posterior.exp()
        logits, fallback = self._run(h, rows, branch)
        routed = branch < self.n_clusters
        if fallback is not None:
            rows, branch, logits = rows[routed], branch[routed], logits[routed]
        members = self.class_clusters == branch[:, None]
        fused = fuse(
            route.log_posterior[rows],
            logits / self.temperatures[branch][:, None],
            members,
            self.router_weight,
        )
        if self.fallback == "topk":
            # A row may run several clusters: each writes its own classes.
            pair, column = members.nonzero(as_tuple=True)
            probabilities[rows[pair], column] = fused[pair, column]
        elif fallback is None:
            return fused
        else:
            probabilities[rows] = fused
            below, answers = fallback
            probabilities[below] = answers
        return probabilities

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
            Without temperature; 0 in the columns of other clusters' classes.
        """
        return self._run(h, torch.arange(len(branch), device=branch.device), branch)[0]

    def branches(self, route: Route) -> tuple[Tensor, Tensor]:
        """List which branch each sample runs.

        Returns
        -------
        rows, branch : int Tensors of shape (n_runs,)
            Sample and branch of each run, in the order of the samples.  Branch `n_clusters` is the
            base network.
        """
        rows = torch.arange(len(route.cluster), device=route.cluster.device)
        unsure = route.confidence < self.threshold
        if self.fallback == "base":
            return rows, torch.where(unsure, self.n_clusters, route.cluster)
        k = min(self.top_k, self.n_clusters)
        if self.fallback == "none" or k < 2:
            return rows, route.cluster
        likely = route.posterior.topk(k, dim=1).indices
        likely[:, 0] = route.cluster
        wanted = unsure[:, None].expand_as(likely).clone()
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
        counts = torch.bincount(branch, minlength=self.n_clusters + 1).tolist()
        logits: Tensor | None = None
        fallback = None
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
                columns = (self.class_clusters == c).nonzero()[:, 0]
                logits[index[:, None], columns] = out
        if logits is None:
            logits = h.new_zeros(len(branch), len(self.class_clusters))
        return logits, fallback
