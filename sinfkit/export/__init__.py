"""Routed networks as files for other runtimes."""

from .onnx import to_exported, to_onnx

__all__ = ["to_exported", "to_onnx"]
