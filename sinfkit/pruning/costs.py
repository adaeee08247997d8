"""What a network costs, as a function of how many channels are left in each group.

A layer multiplies each of its inputs with each of its outputs, so its cost is its dense cost times
the fraction of inputs left times the fraction of outputs left.  That is exact for multiplications
and for parameters; for time it is a model, with the overhead of each call beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, fx, nn

from ..graph.cost import count_macs
from ..slicing.channels import NARROWABLE, ChannelGroup, is_depthwise, width
from .layer_times import LayerTime

__all__ = ["UNITS", "CostModel", "network_cost"]

UNITS = ("macs", "params", "latency")
"""What a budget may be counted in."""


@dataclass(frozen=True, eq=False)
class CostModel:
    r"""Cost of a network whose groups of channels are narrowed.

    With the numbers of channels left, :math:`k`, the cost is
    :math:`f + \sum_t c_t (o_{t0} + o_t \cdot k)(i_{t0} + i_t \cdot k)`: a sum over tensors of
    weights, each with the outputs and the inputs that it has left.

    Attributes
    ----------
    widths : int ndarray of shape (n_groups,)
        Channels of each group in the base network.
    fixed : float
        What no group changes.
    coefficients : ndarray of shape (n_terms,)
        Cost of one output with one input.
    outputs, inputs : ndarray of shape (n_terms, 1 + n_groups)
        Constants, and outputs or inputs for each channel of each group.
    base : float
        Cost of the base network, with all of its outputs.  Budgets are fractions of it.

    Examples
    --------
    Two layers in a row: 3 -> a channels -> b channels, at 1 for each product.

    >>> import numpy as np
    >>> from sinfkit.pruning import CostModel
    >>> outputs, inputs = np.array([[0, 1, 0], [0, 0, 1]]), np.array([[3, 0, 0], [0, 1, 0]])
    >>> cost = CostModel(np.array([8, 4]), 0.0, np.ones(2), outputs, inputs, base=56.0)
    >>> cost.total([8, 4]), cost.total([7, 4])
    (56.0, 49.0)
    >>> cost.savings([8, 4], [1, 1])
    array([7., 8.])
    """

    widths: NDArray[np.int64]
    fixed: float
    coefficients: NDArray[np.float64]
    outputs: NDArray[np.float64]
    inputs: NDArray[np.float64]
    base: float

    def total(self, widths: ArrayLike) -> float:
        """Cost with so many channels left in each group.

        Parameters
        ----------
        widths : array-like of shape (n_groups,)

        Returns
        -------
        float
            In the unit of `base`.
        """
        outputs, inputs = self._sides(np.asarray(widths, dtype=np.float64))
        return float(self.fixed + self.coefficients @ (outputs * inputs))

    def savings(self, widths: ArrayLike, steps: ArrayLike) -> NDArray[np.float64]:
        """How much cheaper the network gets when one group is narrowed by one step.

        Parameters
        ----------
        widths : array-like of shape (n_groups,)
            Channels left now.
        steps : array-like of shape (n_groups,)
            Channels that would go, for each group by itself.

        Returns
        -------
        ndarray of shape (n_groups,)
        """
        outputs, inputs = self._sides(np.asarray(widths, dtype=np.float64))
        each = np.asarray(steps, dtype=np.float64)
        fewer_out, fewer_in = self.outputs[:, 1:] * each, self.inputs[:, 1:] * each
        # A group may be on both sides of a layer (a residual sum), hence the third product.
        return (
            (self.coefficients * outputs) @ fewer_in
            + (self.coefficients * inputs) @ fewer_out
            - self.coefficients @ (fewer_out * fewer_in)
        )

    def _sides(self, widths: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """Outputs and inputs left of each term."""
        return tuple(side[:, 0] + side[:, 1:] @ widths for side in (self.outputs, self.inputs))


def network_cost(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    chosen: Sequence[ChannelGroup],
    example: Tensor,
    unit: str = "macs",
    *,
    kept: Mapping[str, int] | None = None,
    times: Mapping[str, LayerTime] | None = None,
    calls: Mapping[str, int] | None = None,
) -> CostModel:
    """Build the cost model of a network.

    Parameters
    ----------
    graph : GraphModule
        The base network.
    groups : sequence of ChannelGroup
        All of its groups, as `find_groups` gives them.
    chosen : sequence of ChannelGroup
        Those that may be narrowed: the groups of the model, in this order.
    example : Tensor of shape (n, ...)
        Its input, normalised.  Of ``"latency"``: as many samples as go through it at once.
    unit : {"macs", "params", "latency"}, default="macs"
    kept : mapping of str to int, optional
        Channels that stay in other groups, by group name: outputs that are left out, say.
    times : mapping of str to LayerTime, optional
        With ``"latency"``: of each layer, see `sinfkit.pruning.fit_layer_times`.
    calls : mapping of str to int, optional
        With ``"latency"``: how often a layer is called for the batch, default once.  Behind the
        route predictor once for each cluster, with that cluster's samples.

    Returns
    -------
    CostModel
        For ``"macs"`` and ``"params"`` `CostModel.total` is what `count_macs` and
        `count_parameters` give for the sliced network.  `CostModel.base` of a latency has one call
        of each layer.

    Raises
    ------
    ValueError
        For an unknown unit.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from sinfkit.pruning import network_cost
    >>> from sinfkit.graph import trace
    >>> from sinfkit.slicing import find_groups
    >>> graph = trace(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)))
    >>> groups = find_groups(graph, torch.zeros(1, 3), "2")
    >>> cost = network_cost(graph, groups, groups[:1], torch.zeros(1, 3))
    >>> cost.base, cost.total([6])
    (56.0, 42.0)
    """
    overhead, base = 0.0, None
    if unit == "macs":
        found = [(name, float(n), True) for name, n in count_macs(graph, example[:1])[1].items()]
    elif unit == "params":
        found = _parameter_tensors(graph)
    elif unit == "latency" and times is not None:
        found, n = [], len(example)
        for name, time in times.items():
            n_calls = 1 if calls is None else calls.get(name, 1)
            found.append((name, time.seconds(n, n_calls=n_calls) - n_calls * time.call, True))
            overhead += n_calls * time.call
        base = sum(time.seconds(n) for time in times.values())
    else:
        raise ValueError(f"budget_unit must be one of {UNITS}, got {unit!r}.")
    everything = overhead + sum(amount for _, amount, _ in found)
    modules = dict(graph.named_modules())
    sides = _Sides(modules, groups, chosen, kept or {})
    terms = [(name, amount, joint) for name, amount, joint in found if name in sides.names]
    coefficients, outputs, inputs = [], [], []
    for name, amount, joint in terms:
        module = modules[name]
        # A batch-norm, a bias and a depthwise convolution have outputs alone.
        joint = joint and isinstance(module, (nn.Conv2d, nn.Linear)) and not is_depthwise(module)
        outputs.append(sides.row(name, "out"))
        inputs.append(sides.row(name, "in") if joint else sides.one)
        products = width(module, "out") * (width(module, "in") if joint else 1)
        coefficients.append(amount / products)
    n_columns = 1 + len(chosen)
    return CostModel(
        np.array([group.n_channels for group in chosen], dtype=np.int64),
        everything - sum(amount for _, amount, _ in terms),
        np.array(coefficients),
        np.array(outputs).reshape(-1, n_columns),
        np.array(inputs).reshape(-1, n_columns),
        everything if base is None else base,
    )


def _parameter_tensors(graph: fx.GraphModule) -> list[tuple[str, float, bool]]:
    """Module, numbers, and whether there is one for each output AND input; shared tensors once."""
    seen: set[int] = set()
    found = []
    for name, module in graph.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((name, float(parameter.numel()), own == "weight"))
    return found


class _Sides:
    """How many channels of each module's sides come from which group."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        groups: Sequence[ChannelGroup],
        chosen: Sequence[ChannelGroup],
        kept: Mapping[str, int],
    ) -> None:
        self.names = {name for name, m in modules.items() if _narrowable(m)}
        self.one = np.eye(1, 1 + len(chosen))[0]
        self._rows: dict[tuple[str, str], NDArray[np.float64]] = {}
        self._modules = modules
        columns = {group.name: 1 + i for i, group in enumerate(chosen)}
        for group in groups:
            for member in group._members:
                if member.module not in self.names:
                    continue
                row = self.row(member.module, member.side)
                # Behind a flattened feature map a channel has several inputs.
                each = len(member.index) / group.n_channels
                if group.name in columns:
                    row[columns[group.name]] += each
                    row[0] -= each * group.n_channels
                else:
                    row[0] -= each * (group.n_channels - kept.get(group.name, group.n_channels))

    def row(self, name: str, side: str) -> NDArray[np.float64]:
        """Constant and channels per group of one side of a module; the constant alone at first."""
        if (name, side) not in self._rows:
            self._rows[name, side] = self.one * width(self._modules[name], side)
        return self._rows[name, side]


def _narrowable(module: nn.Module) -> bool:
    """Whether slicing changes a module's size; a PReLU of one slope serves any width."""
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return False
    return isinstance(module, NARROWABLE)
