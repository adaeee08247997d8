"""The network as a graph: traced, observed, cut in two, and what it costs."""

from .cost import Latency, count_macs, count_parameters, fold_batch_norm, paired_latency
from .cuts import (
    CutPoint,
    batch_norm_behind,
    channel_axis,
    cut_points,
    find_cut,
    find_layer,
    layer_names,
    observation_nodes,
    output_layer,
    penultimate,
    samples_first,
    sides,
    split,
    with_capture,
)
from .tracing import check_traced, copy_sharing_weights, opaque_modules, trace

__all__ = [
    "CutPoint",
    "Latency",
    "batch_norm_behind",
    "channel_axis",
    "check_traced",
    "copy_sharing_weights",
    "count_macs",
    "count_parameters",
    "cut_points",
    "find_cut",
    "find_layer",
    "fold_batch_norm",
    "layer_names",
    "observation_nodes",
    "opaque_modules",
    "output_layer",
    "paired_latency",
    "penultimate",
    "samples_first",
    "sides",
    "split",
    "trace",
    "with_capture",
]
