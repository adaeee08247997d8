"""Who called the package: warnings point there."""

from __future__ import annotations

import os
import sys

_PACKAGE = os.path.dirname(__file__) + os.sep


def caller_level() -> int:
    """Find out which line outside this package called into it.

    Returns
    -------
    int
        The ``stacklevel`` for `warnings.warn`: that of the frame in front of the outermost one of
        this package.  Between the two may lie frames of others, such as those of a cache.
    """
    frame, level, found = sys._getframe(1), 1, 1
    while frame.f_back is not None:
        level += 1
        if frame.f_code.co_filename.startswith(_PACKAGE):
            found = level
        frame = frame.f_back
    return found
