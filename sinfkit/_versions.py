"""Which versions wrote a stored estimator, and what to say where others read it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import sklearn
import torch

from ._calls import caller_level
from ._version import __version__

# As many leading numbers must agree: before 1.0, sinfkit's second one counts as the first.
_PLACES = {"sinfkit": 2 if __version__.startswith("0.") else 1, "torch": 1, "scikit-learn": 2}


def versions() -> dict[str, str]:
    """Versions of sinfkit and of what it builds on."""
    return {
        "sinfkit": __version__,
        "torch": str(torch.__version__),
        "scikit-learn": str(sklearn.__version__),
    }


def warn_of_versions(kind: str, stored: Mapping[str, str]) -> None:
    """Warn, once for all packages, where a pickle was written with other major versions.

    Parameters
    ----------
    kind : str
        The class that was pickled.
    stored : mapping of str to str
        From `versions`, when it was.
    """
    here = versions()
    differ = [
        f"{name} {stored[name]} (here {here[name]})"
        for name, places in _PLACES.items()
        if name in stored
        and str(stored[name]).split(".")[:places] != here[name].split(".")[:places]
    ]
    if differ:
        warnings.warn(
            f"This {kind} was pickled with {', '.join(differ)}. A pickle is made for the versions "
            "that wrote it: check the answers, or fit it again. Files of save and sinfkit.load do "
            "not depend on versions.",
            UserWarning,
            stacklevel=caller_level(),
        )
