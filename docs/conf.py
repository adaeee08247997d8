"""Sphinx configuration.

Build with ``sphinx-build -W docs docs/_build/html``; the package must be installed, since the
API pages come from its docstrings.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx_gallery.sorting import ExplicitOrder

from sinfkit.version import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "sinfkit"
author = "the sinfkit developers"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "mathml",
    "numpydoc",
    "sphinx_gallery.gen_gallery",
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

# The gallery. These run when the pages are built, each in about a minute on two cores; the others
# take longer or need more than the package, and are only shown.
examples = Path(__file__).resolve().parents[1] / "examples"
executed = ["what_clusters_share", "store_and_load"]
# A page needs a title: a script whose docstring has none is left out.
untitled = [
    path.name
    for path in examples.glob("*.py")
    if not re.match(r'"""\n?.+\n=+\n', path.read_text(encoding="utf-8"))
]
sphinx_gallery_conf = {
    "examples_dirs": [str(examples)],
    "gallery_dirs": ["auto_examples"],
    "filename_pattern": rf"/({'|'.join(executed)})\.py$",
    "ignore_pattern": rf"/({'|'.join(map(re.escape, untitled)) or 'none'})$",
    "within_subsection_order": ExplicitOrder([*(f"{name}.py" for name in executed), "*"]),
    "default_thumb_file": str(Path(__file__).parent / "_static" / "thumbnail.png"),
    "doc_module": ("sinfkit",),
    "backreferences_dir": "auto_examples/backreferences",
    "reference_url": {"sinfkit": None},
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    # That page loads a script from elsewhere.
    "write_computation_times": False,
}
exclude_patterns += ["auto_examples/GALLERY_HEADER.rst"]

html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"sinfkit {release}"
html_static_path = ["_static"]
html_css_files = ["boxes.css"]
html_show_sourcelink = False
pygments_style = "friendly"
