"""What a network costs: parameters, multiplications, measured time; and batch-norms folded away."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .tracing import copy_sharing_weights, new_graph, on_meta, trace

__all__ = ["Latency", "count_macs", "count_parameters", "fold_batch_norm", "paired_latency"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a network, shared ones once.

    Parameters
    ----------
    module : torch.nn.Module
        Any network, or a part of one.

    Returns
    -------
    int
        Numbers held in parameters. Buffers, such as running means, do not count.

    Examples
    --------
    >>> from torch import nn
    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, example: Tensor) -> tuple[int, dict[str, int]]:
    """Count the multiply-accumulate operations of a network, where they are dispatched.

    Parameters
    ----------
    module : torch.nn.Module
        It is run once, as a copy in eval mode that shares its weights.
    example : Tensor of shape (n, ...)
        One batch of its input, of any size n >= 1, on the module's device.

    Returns
    -------
    total : int
        Multiply-accumulates for ONE sample.
    by_module : dict of str to int
        The same for each module in whose own code they are done, by qualified name in order of
        execution: mostly layers, and whatever calls attention or a convolution as a function (the
        empty name is the network itself). A module that runs several times counts each time.

    Raises
    ------
    ValueError
        If `example` is empty.

    Notes
    -----
    Counted are matrix products, convolutions and attention, by the formulas of
    ``torch.utils.flop_counter``. Biases, norms, activations and pooling are small beside them.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(1, 3, 32, 32))
    (221184, {'': 221184})
    """
    if example.ndim == 0 or len(example) == 0:
        raise ValueError("example needs at least one sample.")
    # Outside of inference mode, in which composite kernels would not be taken apart.
    with torch.inference_mode(False), torch.no_grad():
        try:  # Without data, in a moment whatever the size of the network.
            found = _dispatched(on_meta(module).eval(), example.to("meta"))
        except Exception:  # It looks at values, or makes tensors of its own.
            found = _dispatched(copy_sharing_weights(module).eval(), example)
    by_module = {name: macs // len(example) for name, macs in found.items()}
    return sum(by_module.values()), by_module


def _dispatched(module: nn.Module, example: Tensor) -> dict[str, int]:
    """Multiply-accumulates of one batch, by the innermost module that runs."""
    stack = [""]
    counter = _Counter(stack)
    for name, part in module.named_modules():
        part.register_forward_pre_hook(_entering(stack, name))
        part.register_forward_hook(_leaving(stack), always_call=True)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one kernel, of which nothing is known
    try:
        with sdpa_kernel(SDPBackend.MATH), counter:
            module(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.found


class _Counter(TorchDispatchMode):
    """Adds up what the kernels called within cost."""

    def __init__(self, stack: list[str]) -> None:
        # Here, as it loads triton where that is installed.
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        self._stack, self._registry = stack, flop_registry
        self.found: dict[str, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would load its compiler, seconds, for a mode that nobody compiles."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        output = func(*args, **kwargs)
        if packet in self._registry:
            macs = self._registry[packet](*args, **kwargs, out_val=output) // 2
            self.found[self._stack[-1]] = self.found.get(self._stack[-1], 0) + macs
        return output


def _entering(stack: list[str], name: str) -> Callable[..., None]:
    """Make a hook that notes which module runs."""
    return lambda module, args: stack.append(name)


def _leaving(stack: list[str]) -> Callable[..., None]:
    """Make a hook that notes that it has run."""

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    return leave


def fold_batch_norm(module: nn.Module) -> fx.GraphModule:
    """Fold each batch-norm into the convolution or linear layer before it.

    Parameters
    ----------
    module : torch.nn.Module
        Traced first unless it is a ``GraphModule``. Left as it is.

    Returns
    -------
    torch.fx.GraphModule
        Computes the same in eval mode, to float tolerance, with fewer operations. The layers keep
        their names and those into which nothing was folded share their parameters with `module`.

    Notes
    -----
    Folded are batch-norms with running statistics whose only input is a ``Conv1d/2d/3d`` or
    ``Linear`` (taken to give rows of features) that nothing else reads. Layers whose weights are
    computed by a parametrisation are left alone.

    Examples
    --------
    >>> from torch import nn
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> [type(layer).__name__ for layer in fold_batch_norm(network).children()]
    ['Conv2d', 'ReLU']
    """
    gm = module if isinstance(module, fx.GraphModule) else trace(module)
    calls = Counter(node.target for node in gm.graph.nodes if node.op == "call_module")
    graph = new_graph()
    env: dict[fx.Node, fx.Node] = {}
    fused: dict[str, nn.Module] = {}
    for node in gm.graph.nodes:
        source = _foldable_into(gm, node, calls)
        if source is None:
            env[node] = graph.node_copy(node, env.__getitem__)
            continue
        name = str(source.target)
        fused[name] = _fused(gm.get_submodule(name), gm.get_submodule(str(node.target)))
        env[node] = env[source]
    # The new module tree has only what the new graph calls; replacing leaves in it spares the old.
    folded = fx.GraphModule(copy_sharing_weights(gm), graph, class_name=type(gm).__name__)
    for name, layer in fused.items():
        folded.set_submodule(name, layer)
    return folded.eval()


def _foldable_into(gm: fx.GraphModule, node: fx.Node, calls: Counter[Any]) -> fx.Node | None:
    """The node of the layer into which a batch-norm node can be folded; None if there is none."""
    if node.op != "call_module" or type(gm.get_submodule(str(node.target))) not in _BATCH_NORMS:
        return None
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
        return None
    # Exact types: a subclass, parametrised layers among them, may compute something else.
    if type(gm.get_submodule(str(source.target))) not in (*_CONVOLUTIONS, nn.Linear):
        return None
    has_statistics = gm.get_submodule(str(node.target)).running_mean is not None
    return source if has_statistics and calls[source.target] == calls[node.target] == 1 else None


def _fused(layer: Any, norm: Any) -> nn.Module:
    """One layer that does what a layer and the batch-norm behind it do."""
    # In float64 and, since not every accelerator knows that, on the CPU.
    weight, mean, variance = (
        tensor.detach().to("cpu", torch.float64)
        for tensor in (layer.weight, norm.running_mean, norm.running_var)
    )
    scale = (variance + norm.eps).rsqrt()
    shift = -mean * scale
    if layer.bias is not None:
        shift = shift + layer.bias.detach().to("cpu", torch.float64) * scale
    if norm.weight is not None:
        gamma, beta = (t.detach().to("cpu", torch.float64) for t in (norm.weight, norm.bias))
        scale, shift = scale * gamma, shift * gamma + beta
    weight = weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))
    twin = copy_sharing_weights(layer)
    twin.weight = nn.Parameter(weight.to(layer.weight), layer.weight.requires_grad)
    twin.bias = nn.Parameter(shift.to(layer.weight), layer.weight.requires_grad)
    return twin


@dataclass(frozen=True, eq=False)
class Latency:
    """Times of several callables, measured in turns.

    Parameters
    ----------
    seconds : mapping of str to ndarray of shape (n_rounds,)
        Wall-clock time of each callable in each round.

    Examples
    --------
    >>> import numpy as np
    >>> latency = Latency({"old": np.array([2.0, 4.0, 6.0]), "new": np.array([1.0, 3.0, 3.0])})
    >>> latency.median, latency.ratio("new", "old")
    ({'old': 4.0, 'new': 3.0}, 0.5)
    """

    seconds: Mapping[str, np.ndarray]

    @property
    def median(self) -> dict[str, float]:
        """Median time of each callable, in seconds."""
        return {name: float(np.median(times)) for name, times in self.seconds.items()}

    @property
    def quartiles(self) -> dict[str, tuple[float, float]]:
        """First and third quartile of each callable's time, in seconds."""
        return {name: _quartiles(times) for name, times in self.seconds.items()}

    def ratio(self, name: str, other: str) -> float:
        """Median over the rounds of the time of `name` over that of `other`.

        Parameters
        ----------
        name, other : str
            Two of the callables.

        Returns
        -------
        float
            Below 1 where `name` is the faster. The two runs of a round share the machine's state,
            so that this is steadier than the ratio of the medians.
        """
        return float(np.median(self.seconds[name] / self.seconds[other]))

    def ratio_quartiles(self, name: str, other: str) -> tuple[float, float]:
        """First and third quartile over the rounds of the ratio that `ratio` is the median of.

        Parameters
        ----------
        name, other : str
            Two of the callables.

        Returns
        -------
        tuple of float
        """
        return _quartiles(self.seconds[name] / self.seconds[other])


def _quartiles(values: np.ndarray) -> tuple[float, float]:
    """First and third quartile."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


def paired_latency(
    functions: Mapping[str, Callable[[], Any]], repeats: int = 30, warmup: int = 3
) -> Latency:
    """Measure callables against each other: each round runs every one of them once.

    Parameters
    ----------
    functions : mapping of str to callable
        Called without arguments, in inference mode.
    repeats : int, default=30
        Number of rounds that are measured.
    warmup : int, default=3
        Number of rounds before them.

    Returns
    -------
    Latency
        Times in seconds, with medians, quartiles and ratios.

    Raises
    ------
    ValueError
        If there is nothing to measure, `repeats` is below 1 or `warmup` below 0.

    Notes
    -----
    A machine's speed drifts with its temperature and with whatever else runs on it. Runs in turns
    meet the same drift, and their ratio cancels it. From round to round another callable goes
    first, so that none always finds the caches as a certain other left them. Accelerators are
    waited for before and after each call; the garbage collector rests meanwhile.

    Examples
    --------
    >>> import time
    >>> latency = paired_latency(
    ...     {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.002)}, repeats=5
    ... )
    >>> latency.ratio("fast", "slow") < 0.5
    True
    """
    if not functions or repeats < 1 or warmup < 0:
        raise ValueError(
            "paired_latency needs a callable, repeats >= 1 and warmup >= 0; got "
            f"{len(functions)} callables, repeats={repeats}, warmup={warmup}."
        )
    names = list(functions)
    times = {name: np.empty(repeats) for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            for turn in range(-warmup, repeats):
                first = turn % len(names)
                for name in names[first:] + names[:first]:
                    _synchronise()
                    start = time.perf_counter()
                    functions[name]()
                    _synchronise()
                    if turn >= 0:
                        times[name][turn] = time.perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    return Latency(times)


def _synchronise() -> None:
    """Wait for every accelerator that has been given work."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
    if torch.backends.mps.is_available():
        torch.mps.synchronize()
