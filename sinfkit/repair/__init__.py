"""REPAIR: closed-form corrections of a sliced network, without labels or gradients."""

from ..errors import UnreachableShareError
from .blockwise import parts_of, reconstruct
from .distillation import Distillation
from .low_rank import NARROW, WIDE, factorize, factorized, insert_factors
from .moments import MAX_INPUTS, Moments, gather_moments
from .ridge import fit_ridge
from .sequential import REPAIRS, RepairSettings, affordable_images, repair
from .static import shrunk_layers, static_least_squares
from .walk import Lockstep

__all__ = [
    "Distillation",
    "Lockstep",
    "MAX_INPUTS",
    "Moments",
    "NARROW",
    "REPAIRS",
    "RepairSettings",
    "UnreachableShareError",
    "WIDE",
    "affordable_images",
    "factorize",
    "factorized",
    "fit_ridge",
    "gather_moments",
    "insert_factors",
    "parts_of",
    "reconstruct",
    "repair",
    "shrunk_layers",
    "static_least_squares",
]
