"""Fixtures that several files share."""

from __future__ import annotations
