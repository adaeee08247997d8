"""Sphinx configuration.

Build with ``sphinx-build -W docs docs/_build/html``; the package must be installed, since the
API pages come from its docstrings.
"""

from __future__ import annotations

from sinfkit._version import __version__

project = "sinfkit"
author = "the sinfkit developers"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
default_role = "code"  # numpydoc writes parameters in single backticks.

autosummary_generate = True
autodoc_typehints = "none"  # The docstrings say the types, with shapes.
autodoc_member_order = "bysource"
autodoc_default_options = {
    # scikit-learn makes these for metadata routing; their docstrings link into its own guide.
    "exclude-members": ", ".join(
        f"set_{method}_request"
        for method in ("fit", "partial_fit", "predict", "predict_proba", "score", "transform")
    ),
}
numpydoc_show_class_members = False  # The class template lists the methods.

html_theme = "furo"
html_title = f"sinfkit {release}"
html_static_path = ["_static"]
html_css_files = ["boxes.css"]
html_show_sourcelink = False
pygments_style = "friendly"
