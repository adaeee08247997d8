"""Low rank in closed form: one layer becomes two with fewer multiplications, without training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import UnreachableShareError
from ..graph.cost import count_macs, fold_batch_norm
from ..graph.tracing import copy_sharing_weights, trace
from .ridge import double, fit_ridge

__all__ = ["NARROW", "WIDE", "factorize", "factorized", "insert_factors"]

NARROW, WIDE = "narrow", "wide"
"""Names of the two layers, behind that of the layer whose place they take."""

# Our choice, after a measurement: two layers with three quarters of a layer's multiplications
# take as long as the layer.
_WORTH = 2 / 3
_ROWS = 2**16  # outputs of a layer, at most, from which its components are computed
_HALVINGS = 60
_HELD = 0.2  # share of the samples on which the penalty of the least squares is chosen
_ALPHAS = tuple(10.0**k for k in range(-6, 0))


def factorize(
    network: nn.Module,
    share: float,
    samples: Tensor,
    *,
    weight: np.ndarray | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> fx.GraphModule:
    """Replace layers by products of two, so that little of their outputs is lost.

    Parameters
    ----------
    network : nn.Module
        In eval mode; it is not changed.
    share : float
        Fraction of the multiplications of all convolutions and linear layers that may stay, in
        (0, 1].
    samples : Tensor of shape (n, ...)
        Inputs of the network.
    weight : ndarray of shape (n,), optional
        How many times each sample counts.  Default: once.
    batch_size : int, default=256
        Samples that go through the network at once.
    seed : int, default=0
        Decides which positions of the outputs are looked at.

    Returns
    -------
    GraphModule
        With batch-norms folded.  Layer ``name`` has become ``name.narrow``, with the same kernel
        and fewer outputs, and ``name.wide``, which is pointwise.

    Raises
    ------
    ValueError
        If `share` is out of range, or (`UnreachableShareError`) more than that is left with ranks
        of 1.

    Notes
    -----
    With ``U`` the leading eigenvectors of the covariance of a layer's outputs ``y = Wx + b``, the
    narrow layer computes ``U'Wx`` (Zhang, Zou, He and Sun, "Accelerating very deep convolutional
    networks for classification and detection", TPAMI 2016, section 3.1, without the nonlinearity).
    The wide layer is then fitted to the outputs of the network as it was, by least squares, with
    what really arrives there (theirs: "asymmetric reconstruction").  Ranks are ours: they minimise
    the sum of the layers' relative squared errors under the given number of multiplications; a
    layer of which the two would not save a third stays whole.  So do convolutions in groups.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from sinfkit.repair import factorize
    >>> from sinfkit.graph import count_macs
    >>> network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    >>> x = torch.randn(500, 4) @ torch.randn(4, 32)
    >>> small = factorize(network, 0.5, x)
    >>> count_macs(small, x[:1])[0] <= 0.5 * count_macs(network, x[:1])[0]
    True
    >>> error = (small(x) - network(x)).square().mean() / network(x).var()
    >>> bool(error < 0.05)
    True
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}.")
    whole = network if isinstance(network, fx.GraphModule) else trace(network)
    whole = copy_sharing_weights(fold_batch_norm(whole)).eval()
    batches = list(samples.split(batch_size))
    rows = _Rows(len(samples), weight, seed)
    macs = count_macs(whole, samples[:1])[1]
    names = _candidates(whole)
    components = {n: _principal(*sums) for n, sums in rows.sums(whole, names, batches).items()}
    options = [_options(whole, n, macs[n], components[n].error) for n in names]
    ranks = _ranks(options, share * sum(macs.values()) - sum(macs.values()))
    small = insert_factors(whole, ranks)
    for name in ranks:
        _fill(whole, small, name, components[name], rows, batches)
    return small


def insert_factors(network: fx.GraphModule, ranks: Mapping[str, int]) -> fx.GraphModule:
    """Replace layers by pairs of layers, with so many outputs in between, whose weights are zero.

    The network is not changed; the new one shares the weights of the other layers.  A ValueError
    for what is no such layer, or where the two would have more weights than the one.
    """
    made = copy_sharing_weights(network)
    able = set(_candidates(made))
    for name, rank in ranks.items():
        if name not in able or not 1 <= rank <= _most(made.get_submodule(name)):
            raise ValueError(f"{name!r:.80} cannot be replaced by two layers of rank {rank}.")
        pair = _pair(made.get_submodule(name), rank)
        node = next(n for n in made.graph.nodes if n.op == "call_module" and n.target == name)
        made.delete_submodule(name)
        for part, layer in zip((NARROW, WIDE), pair, strict=True):
            made.add_submodule(f"{name}.{part}", layer)
        with made.graph.inserting_before(node):
            h = made.graph.call_module(f"{name}.{NARROW}", node.args, node.kwargs)
            out = made.graph.call_module(f"{name}.{WIDE}", (h,))
        node.replace_all_uses_with(out)
        made.graph.erase_node(node)
    made.recompile()
    return made


def factorized(name: str) -> str:
    """Name of the layer whose place a layer has taken with another; its own where it has not."""
    head, _, tail = name.rpartition(".")
    return head if tail in (NARROW, WIDE) else name


def _candidates(network: fx.GraphModule) -> list[str]:
    """Layers that can be replaced, in forward order: those called once."""
    called = [str(n.target) for n in network.graph.nodes if n.op == "call_module"]
    times = Counter(called)
    return [name for name in times if times[name] == 1 and _able(network.get_submodule(name))]


def _able(layer: nn.Module) -> bool:
    # Weights that something computes anew for each call are left alone, and layers with parts.
    plain = "weight" in layer._parameters and not (layer._forward_pre_hooks or layer._modules)
    return plain and (type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1))


def _most(layer: nn.Module, share: float = 1.0) -> int:
    """Largest rank with which two layers have no more than a share of the layer's weights."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    out, inputs = weight.shape[0], weight[0].numel()
    return int(share * out * inputs / (out + inputs))


def _pair(layer: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    """Two layers in the place of one, without weights that mean anything."""
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    narrow: nn.Module
    wide: nn.Module
    if isinstance(layer, nn.Linear):
        narrow = nn.Linear(layer.in_features, rank, bias=False)
        wide = nn.Linear(rank, layer.out_features)
    else:
        narrow = nn.Conv2d(
            layer.in_channels,
            rank,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            bias=False,
            padding_mode=layer.padding_mode,
        )
        wide = nn.Conv2d(rank, layer.out_channels, 1)
    for part in (narrow, wide):
        part.to(layer.weight).eval().requires_grad_(False)
        for parameter in part.parameters():
            parameter.zero_()
    return narrow, wide


class _Rows:
    """Outputs of layers at some positions, the same ones whenever the samples are run."""

    def __init__(self, n_samples: int, weight: np.ndarray | None, seed: int) -> None:
        self._n, self._weight, self._seed = n_samples, weight, seed

    def of(self, network: fx.GraphModule, name: str, batches: Iterable[Tensor]) -> Tensor:
        """Outputs of one layer, of shape (n_samples x n_positions, n_channels)."""
        found: list[Tensor] = []
        self._watch(network, [name], batches, lambda _, y: found.append(y.clone()))
        return torch.cat(found).flatten(0, 1)

    def sums(
        self, network: fx.GraphModule, names: Sequence[str], batches: Iterable[Tensor]
    ) -> dict[str, tuple[float, Tensor, Tensor]]:
        """Of each layer: the number of rows, their sum, and the sum of their outer products."""
        found: dict[str, tuple[float, Tensor, Tensor]] = {}
        done: Counter[str] = Counter()

        def add(name: str, y: Tensor) -> None:
            start, n_positions = done[name], y.shape[1]
            done[name] += len(y)
            rows = double(y).flatten(0, 1)
            counts = rows.new_ones(len(rows))
            if self._weight is not None:
                each = torch.as_tensor(self._weight[start : start + len(y)])
                counts = each.repeat_interleave(n_positions).to(rows)
            one = (float(counts.sum()), counts @ rows, (rows * counts[:, None]).T @ rows)
            old = found.get(name)
            found[name] = (
                one if old is None else (old[0] + one[0], old[1] + one[1], old[2] + one[2])
            )

        self._watch(network, names, batches, add)
        return found

    def _watch(
        self,
        network: fx.GraphModule,
        names: Sequence[str],
        batches: Iterable[Tensor],
        see: Callable[[str, Tensor], None],
    ) -> None:
        """Run all samples; each batch's outputs have shape (n, n_positions, n_channels)."""

        def watch(name: str) -> Callable[..., None]:
            def hook(layer: nn.Module, inputs: object, output: Tensor) -> None:
                y = output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output
                y = y.flatten(1, -2) if y.ndim > 2 else y[:, None]
                see(name, y[:, self._positions(y.shape[1])])

            return hook

        hooks = [network.get_submodule(n).register_forward_hook(watch(n)) for n in names]
        try:
            with torch.inference_mode():
                for x in batches:
                    network(x)
        finally:
            for hook in hooks:
                hook.remove()

    def _positions(self, n: int) -> Tensor:
        """As many of `n` positions as there is room for."""
        few = max(1, min(n, _ROWS // self._n))
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self._seed))
        return order[:few].sort().values

    def counts(self, n_rows: int, device: torch.device) -> Tensor | None:
        """How many times each row counts, if not once."""
        if self._weight is None:
            return None
        return torch.as_tensor(self._weight, device=device).repeat_interleave(n_rows // self._n)

    def n_train(self, n_rows: int) -> int:
        """The first so many rows are of other samples than those behind them."""
        per_sample = n_rows // self._n
        return per_sample * max(1, round((1 - _HELD) * self._n))


@dataclass(frozen=True)
class _Components:
    """Principal components of a layer's outputs.

    Shapes: `vectors` (n_channels, n_channels), `error` (n_channels + 1,).
    """

    vectors: Tensor
    error: Tensor


def _principal(n: float, first: Tensor, second: Tensor) -> _Components:
    """Components from the number of rows, their sum and that of their products."""
    mean = first / n
    values, vectors = torch.linalg.eigh(second / n - mean[:, None] * mean)
    values = values.clamp_min(0).flip(0)
    left = values.sum() - torch.cat((values.new_zeros(1), values.cumsum(0)))
    return _Components(vectors.flip(1), left.clamp_min(0) / values.sum().clamp_min(1e-300))


def _options(
    network: fx.GraphModule, name: str, macs: int, error: Tensor
) -> tuple[str, np.ndarray, np.ndarray]:
    """A layer's ranks: multiplications saved and error of each; rank 0 leaves it whole."""
    layer = network.get_submodule(name)
    weight, most = layer.weight, _most(layer, _WORTH)
    assert isinstance(weight, Tensor)
    out, inputs = weight.shape[0], weight[0].numel()
    ranks = np.arange(most + 1)
    saved = macs - macs // (out * inputs) * ranks * (out + inputs)
    saved[0] = 0
    lost = error[: most + 1].cpu().numpy().copy()
    lost[0] = 0.0
    return name, saved, lost


def _ranks(options: Sequence[tuple[str, np.ndarray, np.ndarray]], surplus: float) -> dict[str, int]:
    """Ranks with the least sum of errors that save enough; `surplus` is what is allowed, less all.

    By a price of multiplications, bisected: errors fall more and more slowly with the rank.
    """
    wanted = -surplus
    if wanted <= 0:
        return {}

    def at(price: float) -> dict[str, int]:
        found = {}
        for name, saved, lost in options:
            rank = int((lost - price * saved).argmin())
            if rank:
                found[name] = rank
        return found

    sizes = {name: saved for name, saved, _ in options}

    def enough(price: float) -> bool:
        return sum(sizes[n][rank] for n, rank in at(price).items()) >= wanted

    low, high = -40.0, 40.0  # powers of ten
    if not enough(10.0**high):
        raise UnreachableShareError(
            "too few layers can have a low rank: with ranks of 1, more multiplications are left "
            "than wanted."
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(10.0**middle) else (middle, high)
    return at(10.0**high)


def _fill(
    whole: fx.GraphModule,
    small: fx.GraphModule,
    name: str,
    components: _Components,
    rows: _Rows,
    batches: Sequence[Tensor],
) -> None:
    """Give a pair of layers its weights; those before it have theirs."""
    layer: Any = whole.get_submodule(name)
    narrow, wide = (small.get_parameter(f"{name}.{part}.weight") for part in (NARROW, WIDE))
    bias = small.get_parameter(f"{name}.{WIDE}.bias")
    u = components.vectors[:, : len(narrow)].to(double(layer.weight))
    with torch.no_grad():
        narrow.copy_(torch.einsum("or,o...->r...", u, double(layer.weight)))
    y, z = rows.of(whole, name, batches), rows.of(small, f"{name}.{NARROW}", batches)
    equal = torch.ones(1, y.shape[1], dtype=u.dtype, device=u.device)
    counts = rows.counts(len(y), y.device)
    fit = fit_ridge(z[None], y[None], rows.n_train(len(y)), _ALPHAS, equal, counts)
    with torch.no_grad():
        wide.copy_(fit.coef[0].T.reshape(wide.shape))
        bias.copy_(fit.intercept[0])
