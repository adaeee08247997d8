"""A fitted network at its leanest: half precision, compiled, or larger than the device."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..utils.device import is_out_of_memory, resolve_device, settle_after_fork
from ..utils.params import check_choice, check_flag, check_integer, check_kind, is_integer, naming
from .compiled import CompiledCalls, Weights, bucket, skeleton, weights_of
from .network import Route, SINFNetwork
from .prepacked import can_prepack, group_size, prepacked
from .residency import Residency
from .router import RoutePredictor
from .stacked import StackedSubgraphs, gather_slots

__all__ = ["Runtime"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

M = TypeVar("M", bound=nn.Module)


class Runtime(SINFNetwork):
    """A routed network that gives the same answers with less time or memory.

    Parameters
    ----------
    network : SINFNetwork
        A fitted classifier's ``network_``.  Left as it is; what need not be converted is shared
        with it, not copied.
    dtype : {"float32", "bfloat16"}, default="float32"
        What prefix, subgraphs and the base's rest compute in.  Routes, fusion and probabilities
        keep the route predictor's type, which is float32 unless the base is in float64.
    compile : bool, default=False
        Compile prefix and route predictor as one graph, and one graph for all subgraphs of equal
        structure and widths, whose weights are its inputs.  Batches and their parts are padded to
        1, 8, 16, 32, ... samples; each size is compiled at its first use, or by `warm_up`.
    offload : int, default=0
        At most so many subgraphs lie on the device, the others wait in the host's memory; the one
        that has not run for longest makes room.  0: all lie on the device.
    device : str or torch.device, optional
        Where it runs.  Default: where `network` is.
    prepack : bool, default=True
        On the CPU, unless `compile` or `offload` is set: keep a copy of the convolutions' weights
        as oneDNN wants them, instead of bringing them there in every pass, and round the number of
        samples that a subgraph runs up to one of few sizes.
    padded : bool, default=False
        Run all subgraphs in one pass, as grouped convolutions over stacked copies of their weights:
        each takes ``2 / n_clusters`` of the batch, padded.  Samples beyond that run in a second
        pass.  The host waits for the routes when the first pass has been queued.  Meant for GPUs,
        which many small passes leave idle; elsewhere it is the slower way.  Subgraphs must be
        chains of equal structure and widths.

    Raises
    ------
    ValueError
        For a parameter out of range, for `padded` together with `compile` or `offload`, or where
        the subgraphs do not allow `padded`.
    RuntimeError
        If `compile` is asked for on the CPU, and there is no C++ compiler.

    Notes
    -----
    It is for prediction only: results are inference tensors, without gradients.  It takes over the
    settings (threshold, temperatures and so on) that `network` has now, and stays on its device.
    To move `network` moves what the two share.

    With `offload` the subgraphs are no submodules; leave `network` in the host's memory then and
    give `device`.  Weights that wait for a GPU are pinned.

    Examples
    --------
    >>> import torch
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import SINFClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> clf = SINFClassifier(random_state=0).fit(X[:1000], y[:1000])
    >>> runtime = clf.runtime(dtype="bfloat16")
    >>> p = runtime(torch.as_tensor(X[1000:]))
    >>> p.shape, p.dtype
    (torch.Size([797, 10]), torch.float64)
    """

    def __init__(
        self,
        network: SINFNetwork,
        *,
        dtype: str = "float32",
        compile: bool = False,
        offload: int = 0,
        device: str | torch.device | None = None,
        prepack: bool = True,
        padded: bool = False,
    ) -> None:
        check_kind("network", network, SINFNetwork, "a SINFNetwork")
        check_choice("dtype", dtype, _DTYPES)
        check_integer("offload", offload, low=0)
        check_flag("compile", compile)
        check_flag("prepack", prepack)
        check_flag("padded", padded)
        if padded and (compile or offload):
            raise ValueError("padded=True goes with neither compile nor offload; leave one out.")
        if padded and len(network.subgraphs) < network.n_clusters:
            raise ValueError(
                "padded=True needs a subgraph for every cluster, and clusters of one class have "
                "none. Leave padded=False."
            )
        place = network.router.weight.device if device is None else resolve_device(device)
        if compile and place.type == "cpu":
            _check_compiler()
        to = _DTYPES[dtype]
        home = torch.device("cpu") if offload else place
        subgraphs = {
            c: _placed(subgraph, home, to)
            for c in range(network.n_clusters)
            if (subgraph := network.subgraph(c)) is not None
        }
        prefix = _placed(network.prefix, place, to)
        layout = _layout(prefix)
        # Under another fallback it never runs.
        rest = network.rest if network.fallback == "base" else None
        rest = None if rest is None else _placed(rest, place, to)
        packs = prepack and place.type == "cpu" and can_prepack()
        packs = packs and not (compile or offload or padded)
        if packs:
            prefix = prepacked(prefix)
            subgraphs = {c: prepacked(subgraph) for c, subgraph in subgraphs.items()}
            rest = None if rest is None else prepacked(rest)
        super().__init__(
            _placed(network.normalise, place),
            prefix,
            _placed(network.router, place),
            [subgraphs.get(c) for c in range(network.n_clusters)],
            rest,
            network.class_clusters.to(place),
            network.outputs.to(place),
            network.temperatures.to(place),
            router_weight=network.router_weight,
            threshold=network.threshold,
            fallback=network.fallback,
            top_k=network.top_k,
            answered=network.answered.to(place),
            exit_threshold=network.exit_threshold,
        )
        self.training = False
        self.dtype = to
        self.prepacked = packs
        self._layout = layout
        # Not a submodule: its parts are, and would count twice.
        self._front = (_Front(self.normalise, self.prefix, self.router, to).eval(),)
        self._calls = CompiledCalls() if compile else None
        self._kinds: dict[int, int] = {}  # of code, by branch
        self._held: dict[int, Weights] = {}
        self._skeletons: dict[int, nn.Module] = {}
        self.residency: Residency | None = None
        if self._calls is not None:
            self._front_kind = self._calls.kind(self._front[0])
            self._front_weights = weights_of(self._front[0])
            self._kinds = {c: self._calls.kind(module) for c, module in subgraphs.items()}
            if self.rest is not None:
                self._kinds[self.n_clusters] = self._calls.kind(self.rest)
        if offload:
            self._skeletons = {c: skeleton(module) for c, module in subgraphs.items()}
            weights = {c: weights_of(module) for c, module in subgraphs.items()}
            self.residency = Residency(weights, place, int(offload))
            self.subgraphs = nn.ModuleDict()
        self.stacked = StackedSubgraphs(list(subgraphs.values())) if padded else None

    @property
    def n_compiled(self) -> int:
        """Pieces of code that were compiled so far."""
        return 0 if self._calls is None else self._calls.n_compiled

    def subgraph(self, cluster: int) -> nn.Module | None:
        """Return the subgraph of a cluster, without its weights where they are offloaded."""
        return self._skeletons.get(cluster) or super().subgraph(cluster)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        """Return class probabilities.

        Parameters
        ----------
        x : Tensor of shape (n_samples, ...)
            Samples before normalisation, in floating point, on the network's device.

        Returns
        -------
        Tensor of shape (n_samples, n_classes)
            Rows sum to 1. As with any network, values are not looked at: a sample with NaN or
            infinity, or too large for `dtype`, gets an answer without meaning, NaN perhaps; the
            others' answers do not change. `SINFClassifier.predict_proba` refuses such samples.
        """
        return super().forward(x)

    @torch.inference_mode()
    def route(self, x: Tensor) -> Route:
        """Run the prefix and the route predictor only."""
        return super().route(x)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run what every sample passes: the prefix's output, and the fine log-posterior."""
        settle_after_fork()
        _check_batch("x", x)
        if x.device != self.router.weight.device:
            raise ValueError(f"x must be on {self.router.weight.device}, is on {x.device}.")
        if x.ndim == 4:
            x = x.contiguous(memory_format=self._layout)
        try:
            h, log_posterior = self._features(x)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"x has samples of shape {tuple(x.shape[1:])}, which the network cannot take: "
                f"{error}"
            ) from error
        if len(h) != len(x):  # a convolution takes one image without an axis of samples, too
            raise ValueError(
                f"x must have one axis of samples before those of the network's input, got shape "
                f"{tuple(x.shape)}."
            )
        return h, log_posterior

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `features`, for a batch of the right kind."""
        n = len(x)
        if self._calls is None or n == 0:
            return self._front[0](x)
        if bucket(n) > n:
            x = x[_padded(torch.arange(n, device=x.device), bucket(n))]
        elif torch.is_inference_mode_enabled() and not x.is_inference():
            # The same memory as an inference tensor, for which alone code is compiled.
            memory = x.untyped_storage()
            x = x.new_empty(0).set_(memory, x.storage_offset(), x.shape, x.stride())
        h, log_posterior = self._calls(self._front_kind, self._front_weights, x)
        return h[:n], log_posterior[:n]

    def run_branch(self, branch: int, h: Tensor, index: Tensor) -> Tensor:
        """Run one branch on its samples.

        Parameters
        ----------
        branch : int
            A cluster with a subgraph, or `n_clusters` for the base's rest.
        h : Tensor of shape (n_samples, ...)
            The prefix's output.
        index : int Tensor of shape (n_rows,)
            Its rows to run, in ascending order, none twice.

        Returns
        -------
        Tensor of shape (n_rows, n_outputs)
            Logits of the classes that the subgraph answers, or of the base's outputs.
        """
        if self.prepacked:
            n, module = len(index), self._branch(branch)
            # One copy gathers and pads.
            return module(h if n == len(h) else h[_padded(index, group_size(n))])[:n]
        offloaded = self.residency is not None and branch < self.n_clusters
        if self._calls is None and not offloaded:
            return super().run_branch(branch, h, index)
        n = len(index)
        if self.residency is not None and offloaded:
            weights = self.residency.fetch(branch)
        else:
            weights = self._weights(branch)
        if self._calls is None:
            group = h if n == len(h) else h[index]
            return torch.func.functional_call(self._skeletons[branch], dict(weights), (group,))
        # One copy gathers and pads.
        group = h if n == len(h) == bucket(n) else h[_padded(index, bucket(n))]
        return self._calls(self._kinds[branch], weights, group)[:n]

    def _run(
        self, h: Tensor, rows: Tensor, branch: Tensor, finite: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Run every branch on its rows; where stacked, the first of each cluster in one pass."""
        if self.stacked is None or len(branch) == 0 or finite is not None:
            return super()._run(h, rows, branch, finite)
        capacity = -(-2 * len(branch) // self.n_clusters)
        order = torch.argsort(branch, stable=True)
        slots = gather_slots(branch, order, self.n_clusters, capacity)
        out = self.stacked(h[rows[slots]])
        ordered = branch[order]
        rank = torch.arange(len(order), device=h.device) - torch.searchsorted(ordered, ordered)
        inside = (rank < capacity) & (ordered < self.n_clusters)
        # Only now must the host know: who found a place, who is left, and who takes the base.
        first, left = order[inside], order[~inside]
        own = branch[first]
        columns = self.answered.byte().argsort(dim=1, descending=True, stable=True)
        logits = out.new_zeros(len(first), len(self.class_clusters))
        logits.scatter_(1, columns[own, : out.shape[2]], out[rank[inside], own])
        if len(left) == 0:
            return first, logits, None
        second, others, fallback = super()._run(h, rows[left], branch[left])
        return torch.cat((first, left[second])), torch.cat((logits, others)), fallback

    @torch.inference_mode()
    def warm_up(self, example: Tensor, max_batch: int) -> Runtime:
        """Run every branch on every batch size once, so that no later batch waits for a compiler.

        Parameters
        ----------
        example : Tensor of shape (n, ...)
            At least one sample as `forward` takes them, on the network's device.
        max_batch : int
            Largest batch to come.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If `example` is empty or `max_batch` not positive.
        """
        _check_batch("example", example)
        if len(example) == 0 or not is_integer(max_batch) or max_batch < 1:
            raise ValueError(
                "warm_up needs at least one sample in example, and max_batch >= 1; got example of "
                f"shape {tuple(example.shape)} and max_batch={max_batch}."
            )
        branches = [c for c in range(self.n_clusters) if self.subgraph(c) is not None]
        branches += [] if self.rest is None else [self.n_clusters]
        sizes = [bucket(1)]
        while sizes[-1] < max_batch:
            sizes.append(bucket(sizes[-1] + 1))
        for n in sizes:
            rows = torch.arange(n, device=example.device)
            with naming("example"):
                h, _ = self.features(example[:1].expand(n, *example.shape[1:]))
            more = torch.cat((h, h[:1]))
            for branch in branches:
                self.run_branch(branch, h, rows)
                self.run_branch(branch, more, rows)
        return self

    def _weights(self, branch: int) -> Weights:
        """Weights of a branch that lies on the device."""
        if branch not in self._held:
            self._held[branch] = weights_of(self._branch(branch))
        return self._held[branch]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Refuse to move: half of it belongs to the network, and code is compiled for a device."""
        raise RuntimeError(
            "A Runtime stays on the device and in the type that it was made for. Make a new one, "
            'for instance clf.runtime(device="cuda").'
        )


class _Front(nn.Module):
    """What every sample passes, in one module: normalisation, prefix and route predictor."""

    def __init__(
        self, normalise: nn.Module, prefix: nn.Module, router: RoutePredictor, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.normalise, self.prefix, self.router = normalise, prefix, router
        self.dtype = dtype

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prefix's output and the fine log-posterior of a raw batch."""
        h = self.prefix(self.normalise(x).to(self.dtype))
        return h, self.router(h)


def _placed(module: M, device: torch.device, dtype: torch.dtype | None = None) -> M:
    """The module itself where it is on a device and in a type already, else a copy that is."""
    for tensor in weights_of(module).values():
        fits = dtype in (None, tensor.dtype) or not tensor.is_floating_point()
        if tensor.device != device or not fits:
            return copy.deepcopy(module).to(device, dtype)
    return module


def _check_batch(name: str, x: Any) -> None:
    """Raise unless it is a batch of samples whose values can be computed with."""
    check_kind(name, x, Tensor, "a Tensor")
    if x.ndim < 2 or not x.is_floating_point() or x.layout != torch.strided:
        raise ValueError(
            f"{name} must be a dense batch of samples in floating point, got a Tensor of shape "
            f"{tuple(x.shape)}, {x.dtype} and {x.layout}."
        )


def _layout(module: nn.Module) -> torch.memory_format:
    """The memory format of a module's convolutions."""
    weights = [p for p in module.parameters() if p.ndim == 4]
    last = [p.is_contiguous(memory_format=torch.channels_last) for p in weights]
    return torch.channels_last if last and all(last) else torch.contiguous_format


def _padded(index: Tensor, size: int) -> Tensor:
    """Repeat an index's first entry until there are `size` of them."""
    return torch.cat((index, index[:1].expand(size - len(index))))


def _check_compiler() -> None:
    """Raise where Inductor would not find a C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise RuntimeError(
            "compile=True needs a C++ compiler on the CPU, and none was found. Install g++ or "
            "clang++, name one in the environment variable CXX, or leave compile=False."
        ) from error
