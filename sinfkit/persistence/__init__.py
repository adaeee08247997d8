"""KEEP: estimators as files without code."""

from .container import KEY
from .estimators import SCHEMA, StorageError, load, save
from .parts import describe

__all__ = ["KEY", "SCHEMA", "StorageError", "describe", "load", "save"]
