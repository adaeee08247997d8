"""SCORE: how much each filter matters."""

from .activations import Statistics, collect, pool, taylor_scores
from .brain_surgeon import (
    Consumer,
    costs_in_order,
    gather_consumers,
    removal_costs,
    weigh_outputs,
)
from .discriminability import DCSResult, Probe, discriminative_capability, fit_probe
from .feature_maps import (
    MAX_IMAGES,
    STATISTICS,
    map_independence,
    map_rank,
    map_statistics,
    map_zeros,
)
from .registry import CRITERIA, Criterion, LayerData, get_criterion
from .separability import (
    abs_snr,
    discriminant_information,
    fisher_ratio,
    hellinger,
    j_divergence,
    max_mean_discrepancy,
    sym_div,
    t_statistic,
)

__all__ = [
    "CRITERIA",
    "Consumer",
    "Criterion",
    "DCSResult",
    "LayerData",
    "MAX_IMAGES",
    "Probe",
    "STATISTICS",
    "Statistics",
    "abs_snr",
    "collect",
    "costs_in_order",
    "discriminant_information",
    "discriminative_capability",
    "fisher_ratio",
    "fit_probe",
    "gather_consumers",
    "get_criterion",
    "hellinger",
    "j_divergence",
    "map_independence",
    "map_rank",
    "map_statistics",
    "map_zeros",
    "max_mean_discrepancy",
    "pool",
    "removal_costs",
    "sym_div",
    "t_statistic",
    "taylor_scores",
    "weigh_outputs",
]
