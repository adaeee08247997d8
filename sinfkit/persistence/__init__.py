"""KEEP: estimators as files without code."""

from .container import KEY
from .estimators import SCHEMA, load, save
from .parts import describe

__all__ = ["KEY", "SCHEMA", "describe", "load", "save"]
