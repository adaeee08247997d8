"""What every folder uses: arguments, devices, jobs, pickles."""

from .device import full_float32, host_tensor, in_pieces, loaded_device, resolve_device
from .jobs import Rows, Shared, elsewhere, run, run_with, with_shared
from .pickling import pack

__all__ = [
    "Rows",
    "Shared",
    "elsewhere",
    "full_float32",
    "host_tensor",
    "in_pieces",
    "loaded_device",
    "pack",
    "resolve_device",
    "run",
    "run_with",
    "with_shared",
]
