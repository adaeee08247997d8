"""The gallery keeps its rules, and what the documentation does not run is run here."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

import sinfkit
from sinfkit import DCSPruner, SemanticClusterer, SINFClassifier
from sinfkit.zoo import default_network

EXAMPLES = Path(__file__).parents[2] / "examples"


SCRIPTS = sorted(EXAMPLES.glob("*.py"))
ALL = [*SCRIPTS, *sorted((EXAMPLES / "benchmarks").glob("*.py"))]
FOLDERS = {path.parent.name for path in Path(sinfkit.__file__).parent.glob("*/__init__.py")}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_only_public_names_are_imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sinfkit"):
            folder = node.module.partition(".")[2]
            assert folder in ("", "promise", *FOLDERS), f"{node.module} is a file, not a folder"
            public = set(importlib.import_module(node.module).__all__)
            names = [alias.name for alias in node.names]
            assert public.issuperset(names), set(names) - public
            alone = ("library", "any_network", "fit_profile", "promise_simulation", "promise_fits")
            assert path.parent == EXAMPLES or path.stem in alone, "only through the facade"
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            own = own or node.attr == "_BatchNorm"  # torch's name for all of its kinds
            assert own or not node.attr.startswith("_") or node.attr.startswith("__"), node.attr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_of_the_gallery_are_short_and_have_a_picture(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") < 110
    elsewhere = ("dask_predict", "ray_workers")  # on other machines, where nobody looks
    assert "plt.show()" in source or path.stem in elsewhere


def load(name: str, monkeypatch: pytest.MonkeyPatch):
    """Import an example, which may import its neighbours."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def run(script, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["example", *map(str, arguments)])
    script.main()


@pytest.mark.filterwarnings("ignore")
def test_predictions_on_a_dask_array(monkeypatch, capsys):
    script = load("dask_predict", monkeypatch)
    quick = functools.partial(
        SINFClassifier,
        default_network((1, 8, 8), 10, random_state=0),  # not trained: answers are compared only
        clusterer=SemanticClusterer(n_clusters=2),
        pruner=DCSPruner(criterion="dcs", schedule="linear"),
    )
    monkeypatch.setattr(script, "SINFClassifier", quick)
    run(script, monkeypatch, "--workers", 0)
    printed = capsys.readouterr().out
    assert "6 blocks, 597 images" in printed and "labels as predicted here: 100.0%" in printed
    assert float(printed.split()[-1]) < 1e-5


def test_without_ray_its_example_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match="pip install ray"):
        load("ray_workers", monkeypatch)
