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
    weights, each with the outputs and the inputs that it has left.  `widths` (n_groups,) are those
    of the base; `outputs` and `inputs` (n_terms, 1 + n_groups) hold constants, then the number for
    each channel of each group; `base` is the whole base's cost, of which budgets are fractions.
    """

    widths: NDArray[np.int64]
    fixed: float
    coefficients: NDArray[np.float64]
    outputs: NDArray[np.float64]
    inputs: NDArray[np.float64]
    base: float

    def total(self, widths: ArrayLike) -> float:
        """Cost with so many channels left in each group, in the unit of `base`."""
        outputs, inputs = self._sides(np.asarray(widths, dtype=np.float64))
        return float(self.fixed + self.coefficients @ (outputs * inputs))

    def savings(self, widths: ArrayLike, steps: ArrayLike) -> NDArray[np.float64]:
        """How much cheaper the network gets when one group alone is narrowed by its step."""
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
    """Build the cost model of a network whose `chosen` groups may be narrowed.

    `groups` are all of its groups, `kept` the channels that stay in others, by name.  A latency
    needs the layers' `times` (see `fit_layer_times`) and as many samples in `example` as go through
    at once; `calls` says how often a layer is called for them, default once.  ``"macs"`` and
    ``"params"`` are exact: `CostModel.total` is what the sliced network has.
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
