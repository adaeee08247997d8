"""What a network costs with fewer channels in its groups, and which widths keep to a budget.

A layer multiplies each of its inputs with each of its outputs, so its cost is its dense cost times
the fraction of inputs left times the fraction of outputs left.  That is exact for multiplications
and for parameters; for time it is a model, with the overhead of each call beside it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.isotonic import isotonic_regression
from torch import Tensor, fx, nn

from ..data.calibration import Calibration
from ..errors import OutOfReachError, SlicingWarning, UnsliceableError
from ..graph.cost import count_macs, count_parameters, paired_latency
from ..graph.nodes import LAYERS
from ..slicing.blocks import Block, leave_out
from ..slicing.channels import NARROWABLE, is_depthwise, multiplies, width
from ..slicing.groups import ChannelGroup, slice_channels
from ..utils.params import warn
from .layer_times import LayerTime, fit_layer_times
from .recipe import UNITS, Recipe, choose_channels, marginal_losses, widths_within
from .scoring import Scored


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
    macs: Mapping[str, int] | None = None,
    left_out: Collection[str] = (),
) -> CostModel:
    """Build the cost model of a network whose `chosen` groups may be narrowed.

    `groups` are all of its groups, `kept` the channels that stay in others, by name.  A latency
    needs the layers' `times` (see `fit_layer_times`) and as many samples in `example` as go through
    at once; `calls` says how often a layer is called for them, default once, and `macs` what each
    multiplies, where that is known; modules that are `left_out` cost nothing.  ``"macs"`` and
    ``"params"`` are exact: `CostModel.total` is what the sliced network has.
    """
    overhead, base = 0.0, None
    if unit == "macs":
        counted = count_macs(graph, example[:1])[1] if macs is None else macs
        found = [(name, float(n), True) for name, n in counted.items()]
    elif unit == "params":
        found = _parameter_tensors(graph)
    elif unit == "latency" and times is not None:
        found, n = [], len(example)
        for name, time in times.items():
            if name in left_out:
                continue
            n_calls = 1 if calls is None else calls.get(name, 1)
            found.append((name, time.seconds(n, n_calls=n_calls) - n_calls * time.call, True))
            overhead += n_calls * time.call
        base = sum(time.seconds(n) for time in times.values())
    else:
        raise ValueError(f"budget_unit must be one of {UNITS}, got {unit!r}.")
    everything = overhead + sum(amount for _, amount, _ in found)
    base = everything if base is None else base
    found = [(name, amount, joint) for name, amount, joint in found if name not in left_out]
    everything = overhead + sum(amount for _, amount, _ in found)
    modules = dict(graph.named_modules())
    sides = _Sides(modules, groups, chosen, kept or {})
    terms = [(name, amount, joint) for name, amount, joint in found if name in sides.names]
    coefficients, outputs, inputs = [], [], []
    for name, amount, joint in terms:
        module = modules[name]
        # A batch-norm, a bias and a depthwise convolution have outputs alone.
        alone = is_depthwise(module) or multiplies(module)
        joint = joint and isinstance(module, LAYERS) and not alone
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
        base,
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


_REPEATS = 15  # rounds of a measurement
_BISECTIONS = 5


@dataclass(frozen=True)
class Budgeted:
    """Channels left in each group, by name, and the network's cost over that of the base."""

    widths: dict[str, int]
    cost_ratio: float


def shared_widths(
    groups: Sequence[ChannelGroup],
    scored: Sequence[Scored],
    cost: CostModel,
    recipe: Recipe,
    budget: float | None = None,
) -> dict[str, int]:
    """One width for each group, for one or several clusters, that keeps to a budget.

    `scored` has one entry for each cluster; `groups` are those of `cost`.  Clusters keep different
    filters but equally many, so that one compiled graph serves all.  What the n-th removal costs is
    the mean over clusters of what each one's own costs; one that makes cheaper ones possible is
    taken together with them (the lower convex hull of `Scored.losses`).
    """
    budget = recipe.budget if budget is None else budget
    if budget is None:
        raise ValueError("schedule='global' needs a budget, the fraction of the cost that stays.")
    losses = [np.mean([_losses(group, one, recipe) for one in scored], axis=0) for group in groups]
    try:
        widths = widths_within(losses, cost, budget, recipe.max_ratio)
    except OutOfReachError:
        if recipe.round_to != "auto":
            raise
        return shared_widths(groups, scored, cost, replace(recipe, round_to=1), budget)
    return {group.name: int(n) for group, n in zip(groups, widths, strict=True)}


def _losses(group: ChannelGroup, scored: Scored, recipe: Recipe) -> NDArray[np.float64]:
    """Comparable losses of one group, one entry for all channels that have to go together."""
    losses = _each(group, scored, recipe)
    wanted = recipe.round_to
    if isinstance(wanted, str):
        wanted = _suits(group.n_channels)
    together = wanted // math.gcd(wanted, group.n_runs)
    # A layer whose own width is no multiple has no widths to round to.
    return losses if len(losses) % together else losses.reshape(-1, together).sum(1)


def _suits(n: int) -> int:
    """Widths in steps of which kernels are fast, and which leave enough of them to choose from."""
    return next((s for s in (16, 8, 4) if n % s == 0 and n >= s * (4 if s == 4 else 8)), 1)


def _each(group: ChannelGroup, scored: Scored, recipe: Recipe) -> NDArray[np.float64]:
    """Comparable losses of one group, from scores of one set of classes."""
    try:
        if group.name in scored.losses:
            return isotonic_regression(np.diff(scored.losses[group.name], prepend=0.0))
        if recipe.criterion.cumulative:
            scores = scored.layers[group.name]
            # A group whose readers are unknown was ranked by L1 norm, in shares that add up to 1.
            if abs(scores.sum() - 1) > 1e-9:
                return marginal_losses(scores, group.n_runs, cumulative=True)
        return marginal_losses(scored.groups[group.name], group.n_runs)
    except ValueError as error:
        raise ValueError(f"Layer {group.name!r}: {error}.") from error


def budgeted_widths(
    graph: fx.GraphModule,
    groups: Sequence[ChannelGroup],
    chosen: Sequence[ChannelGroup],
    scored: Scored,
    recipe: Recipe,
    batch: Tensor,
    others: Mapping[str, np.ndarray],
    budget: float,
    macs: Mapping[str, int] | None = None,
    blocks: Sequence[Block] = (),
) -> Budgeted:
    """Find the widths of one network under a budget; OutOfReachError where there are none.

    `groups` are all of the network's, `chosen` those that may be narrowed, `others` the channels
    kept of other groups, by name; `blocks` are left out.  A latency is measured on the whole of
    `batch` (n, ...) at once.
    """
    unit = recipe.budget_unit
    times = fit_layer_times(graph, groups, chosen, batch) if unit == "latency" else None
    kept = {name: len(channels) for name, channels in others.items()}
    gone = {name for block in blocks for name in block.modules}
    cost = network_cost(
        graph, groups, chosen, batch, unit, kept=kept, times=times, macs=macs, left_out=gone
    )
    # Of channels that go ways of their own, the model does not know which are taken.
    if unit != "latency" and not any(group.has_parts for group in chosen):
        widths = shared_widths(chosen, [scored], cost, recipe, budget)
        return Budgeted(widths, cost.total(list(widths.values())) / cost.base)

    def measure(modelled: float) -> float:
        widths = shared_widths(chosen, [scored], cost, recipe, modelled)
        keep = choose_channels(chosen, scored.groups, recipe, widths) | dict(others)
        small = leave_out(slice_channels(graph, batch[:1], keep, groups=groups), blocks).model
        if unit == "params":
            return count_parameters(small) / count_parameters(graph)
        if unit == "macs":
            return count_macs(small, batch[:1])[0] / max(cost.base, 1)
        functions: dict[str, Callable[[], Any]] = {
            "base": lambda: graph(batch),
            "small": lambda: small(batch),
        }
        return paired_latency(functions, repeats=_REPEATS).ratio("small", "base")

    modelled, measured = tighten(measure, budget)
    return Budgeted(shared_widths(chosen, [scored], cost, recipe, modelled), measured)


def tighten(
    measure: Callable[[float], float], budget: float, n_bisections: int = _BISECTIONS
) -> tuple[float, float]:
    """Find the largest budget in a model that keeps to a budget in truth.

    `measure` maps the first to the true cost ratio, or raises OutOfReachError.  `budget` is tried
    first; then the interval between too wide and narrow enough is halved, `n_bisections` times.
    Returns the budget in the model, and the true ratio.
    """
    measured = measure(budget)
    if measured <= budget:
        return budget, measured
    low, high = 0.0, budget
    best: tuple[float, float] | None = None
    fastest = measured
    for _ in range(n_bisections):
        modelled = (low + high) / 2
        try:
            measured = measure(modelled)
        except OutOfReachError:
            low = modelled  # no network is so small
            continue
        fastest = min(fastest, measured)
        if measured <= budget:
            low, best = modelled, (modelled, measured)
        else:
            high = modelled
    if best is None:
        raise OutOfReachError(
            f"budget={budget:g} cannot be met: the least that was reached is {fastest:.2f}. Choose "
            "a larger budget or max_ratio."
        )
    return best


LEAST_SHARE = 0.05
_REASONS = 4  # that are named


def check_sliceable(
    calibration: Calibration,
    chosen: Sequence[ChannelGroup],
    within: Collection[str],
    allow: bool,
) -> float:
    """Share of the multiplications that slicing can reach; an error where that is next to none."""
    share = sliceable_share(calibration, chosen)
    text = what_stays_whole(calibration, within, share)
    if share < LEAST_SHARE and not allow:
        raise UnsliceableError(
            f"{text} Hardly anything could be removed. options=PruningOptions("
            "allow_unsliceable=True) prunes all the same."
        )
    if "whole" in text:
        warn(text, SlicingWarning)
    return share


def sliceable_share(calibration: Calibration, chosen: Sequence[ChannelGroup]) -> float:
    """Share of the base's multiplications that go with the channels of `chosen`."""
    cost = network_cost(
        calibration.graph, calibration.groups, chosen, calibration.example, macs=calibration.macs[1]
    )
    return float(1 - cost.total(np.zeros(len(chosen))) / cost.base) if cost.base else 0.0


def what_stays_whole(calibration: Calibration, within: Iterable[str], share: float) -> str:
    """One line: what share can be sliced, and why outputs stay, largest reasons first."""
    total, by_layer = calibration.macs
    allowed = set(within)
    reasons: defaultdict[str, float] = defaultdict(float)
    for group in calibration.groups:
        if (
            group.is_output
            or not group.reason_unsliceable
            or not allowed.intersection(group.layers)
        ):
            continue
        for layer in group.layers:
            reasons[group.reason_unsliceable] += by_layer.get(layer, 0) / max(total, 1)
    text = f"{share:.0%} of the multiplications can be sliced"
    largest = sorted(reasons.items(), key=lambda item: -item[1])[:_REASONS]
    largest = [(why, part) for why, part in largest if part >= 0.005 or share < LEAST_SHARE]
    if largest:
        # Of their inputs some may go: the two shares overlap.
        parts = ", ".join(f"{part:.0%} ({why})" for why, part in largest)
        text += f"; outputs stay whole in layers that have {parts}"
    return text + "."
