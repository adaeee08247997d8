"""The examples run, on data small enough for a test."""

from __future__ import annotations

import csv
import functools
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sinfkit import DCSPruner, SemanticClusterer, SINFClassifier, vgg16
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four classes of noisy patterns in two clusters, as PNG files."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    patterns = rng.integers(40, 216, (4, 32, 32, 3))
    for part, n in (("train", 40), ("val", 12)):
        for c in range(4):
            place = root / part / f"n{c:02d}"
            place.mkdir(parents=True)
            for i in range(n):
                pixels = patterns[c] + rng.normal(0, 30, (32, 32, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(place / f"{i:03d}.png")
    with (root / "classes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["wnid", "name", "cluster"])
        writer.writerows([[f"n{c:02d}", f"class {c}", "ab"[c // 2]] for c in range(4)])
    return root


@pytest.fixture
def narrow(monkeypatch):
    """The folder script with a VGG16 of an eighth of the width: seconds instead of minutes."""
    script = load("image_folder", monkeypatch)

    def network(n_classes: int) -> nn.Module:
        return vgg16(n_classes, width=0.125)

    monkeypatch.setitem(script.NETWORKS, "vgg16", network)
    return script


def run(script, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["example", *map(str, arguments)])
    script.main()


@pytest.mark.filterwarnings("ignore")
def test_image_folder_from_training_to_curve(narrow, folder, tmp_path, monkeypatch, capsys):
    common = ("vgg16", folder, "--epochs", 3, "--n-clusters", 2, "--out", tmp_path, "--batch", 16)
    run(narrow, monkeypatch, *common, "--clusters", "given")
    printed = capsys.readouterr().out
    assert "144 calibration, 16 held-out and 48 report images" in printed
    assert "MACs per sample" in printed and "routed behind features.24" in printed
    assert list(tmp_path.glob("*.ckpt"))

    monkeypatch.setattr(narrow, "SIZES", ((0.3, 0.5, 0.5),))
    monkeypatch.setattr(narrow, "CONTROLS", (("dcs", 0.2, 0.5), ("obs", 0.2, 0.5)))
    run(narrow, monkeypatch, *common, "--curve")
    assert (tmp_path / "vgg16_curve.png").stat().st_size > 10_000
    with (tmp_path / "vgg16_curve.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert len(rows) == 5 and rows["base"]["time_saved"] == "0.0"
    with (tmp_path / "vgg16_table.csv").open() as file:
        printed = {row[""]: row for row in csv.DictReader(file)}
    assert list(printed) == list(rows)
    for name, row in rows.items():
        assert float(printed[name]["accuracy (%)"]) == round(float(row["accuracy"]) * 100, 1)
        assert 0 <= float(row["accuracy"]) <= 1 and float(row["ms"]) > 0
        assert name == "base" or float(row["macs"]) < float(rows["base"]["macs"])
    stored = sorted(tmp_path.glob("*.joblib"))
    before = [path.stat().st_mtime_ns for path in stored]
    run(narrow, monkeypatch, *common, "--curve")  # everything is found again
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.joblib"))] == before


@pytest.mark.filterwarnings("ignore")
def test_criteria_are_compared(narrow, folder, tmp_path, monkeypatch, capsys):
    script = load("criteria", monkeypatch)
    weights, out = tmp_path / "weights.pt", tmp_path / "criteria.csv"
    network = vgg16(4, width=0.125)
    torch.save({"state_dict": network.state_dict(), "mean": [0.5] * 3, "std": [0.2] * 3}, weights)
    options = ("--calibration", 20, "--seeds", 2, "--out", out)
    run(script, monkeypatch, "vgg16", folder, "--weights", weights, *options)
    with out.open() as file:
        rows = list(csv.DictReader(file))
    # for each of two clusters: unpruned; four criteria and two seeds of random, at two ratios
    assert len(rows) == 2 * (1 + 2 * (4 + 2))
    assert {row["criterion"] for row in rows} == {"unpruned", *script.CRITERIA}
    assert "DCS ahead by" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_predictions_on_a_dask_array(monkeypatch, capsys):
    script = load("dask_predict", monkeypatch)
    quick = functools.partial(
        SINFClassifier,
        default_network((1, 8, 8), 10, random_state=0),  # not trained: answers are compared only
        clusterer=SemanticClusterer(n_clusters=2),
        pruner=DCSPruner(),
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


@pytest.mark.filterwarnings("ignore")
def test_what_workers_cost(paper, capsys):
    paper("workers").main("--width 0.125 --images 160 --classes 8 --clusters 2".split())
    printed = capsys.readouterr().out
    assert printed.count("\nfit, FrozenModel") == 2
    assert "4 jobs" in printed  # scores and repair of each cluster
    assert "predict: " in printed and "chunks" in printed
