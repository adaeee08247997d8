"""The examples run, on data small enough for a test."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

import pytest

from sinfkit import DCSPruner, SemanticClusterer, SINFClassifier
from sinfkit.zoo import default_network

EXAMPLES = Path(__file__).parents[2] / "examples"


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
