"""SLICE: which channels belong together, and the network without some of them."""

from .groups import ChannelGroup, Sliced, check_sliced, find_groups, slice_channels

__all__ = [
    "ChannelGroup",
    "Sliced",
    "check_sliced",
    "find_groups",
    "slice_channels",
]
