"""KEEP: estimators as files without code."""

from .container import KEY, checksum
from .estimators import SCHEMA, load, save
from .parts import describe

__all__ = ["KEY", "SCHEMA", "checksum", "describe", "load", "save"]
