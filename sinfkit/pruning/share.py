"""What share of a network can be sliced, and what stays whole, said in one line."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from ..data.calibration import Calibration
from ..errors import SlicingWarning, UnsliceableError
from ..graph.cost import count_macs
from ..slicing.groups import ChannelGroup
from ..utils.params import caller_level
from .costs import network_cost

__all__ = ["check_sliceable", "sliceable_share", "what_stays_whole"]

LEAST_SHARE = 0.05
_REASONS = 4  # that are named


def check_sliceable(
    calibration: Calibration,
    chosen: Sequence[ChannelGroup],
    within: Collection[str],
    allow: bool,
    verbose: int,
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
        warnings.warn(text, SlicingWarning, stacklevel=caller_level())
    elif verbose:
        print(f"DCSPruner: {text}")
    return share


def sliceable_share(calibration: Calibration, chosen: Sequence[ChannelGroup]) -> float:
    """Share of the base's multiplications that go with the channels of `chosen`."""
    cost = network_cost(calibration.graph, calibration.groups, chosen, calibration.example)
    return float(1 - cost.total(np.zeros(len(chosen))) / cost.base) if cost.base else 0.0


def what_stays_whole(calibration: Calibration, within: Iterable[str], share: float) -> str:
    """One line: what share can be sliced, and why the rest cannot, largest reasons first."""
    total, by_layer = count_macs(calibration.graph, calibration.example)
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
    if reasons:
        largest = sorted(reasons.items(), key=lambda item: -item[1])[:_REASONS]
        text += "; what stays whole: " + ", ".join(f"{part:.0%} ({why})" for why, part in largest)
    return text + "."
