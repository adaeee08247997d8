"""SLICE: which channels belong together, and the network without some of them."""

from .blocks import Block, find_blocks, leave_out, silenced
from .groups import ChannelGroup, Sliced, check_sliced, find_groups, slice_channels

__all__ = [
    "Block",
    "ChannelGroup",
    "Sliced",
    "check_sliced",
    "find_blocks",
    "find_groups",
    "leave_out",
    "silenced",
    "slice_channels",
]
