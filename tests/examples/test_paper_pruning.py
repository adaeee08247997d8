"""Table 3 of the paper examples: whole networks pruned for all classes, beside torch-pruning."""

# ruff: noqa: E402  (the scripts import their neighbours)
from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_pruning as tp

PAPER = Path(__file__).parents[2] / "examples" / "paper"
sys.path.insert(0, str(PAPER))

import pruning_table
import study as base
from pruned import Found, label, needs
from record import Table, read, to_hex
from shipped import IMPORTANCES, SCOPES, Shipped
from whole import Draw, Whole, smallest

sys.path.remove(str(PAPER))

from sinfkit import DCSPruner

ARGUMENTS = ["--quick", "--criteria", "dcs_obs", "l1", "--importances", "magnitude_l2"]
ARGUMENTS += ["--budgets", "0.7", "0.5", "--schedules", "global", "--device", "cpu"]


@pytest.fixture(scope="module")
def whole():
    options = argparse.Namespace(
        quick=True, network="vgg16", threads=1, device="cpu", split="choose", clusters=None
    )
    return Whole(base.open_study(options))


@pytest.fixture(scope="module")
def images(whole):
    return Draw(whole, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a quick run leaves behind."""
    out = tmp_path_factory.mktemp("results")
    pruning_table.main([*ARGUMENTS, "--out", str(out), "--threads", "1"])
    return out


def table_of(folder: Path) -> Path:
    return folder / "pruning_vgg16-0.125_choose.csv"


def test_quick_run_measures_every_contestant(folder):
    rows = read(table_of(folder))
    # Two of our criteria, and one of torch-pruning's in both scopes; two repairs, two budgets. Then
    # the unpruned network, IterTVSPrune, and ours at its multiplications under each repair.
    assert len(rows) == (2 + 2) * 2 * 2 + 1 + 1 + 2
    whole = rows[0]
    for row in rows[1:]:
        assert row["images"] == "96"
        assert 0 < int(row["macs"]) <= int(whole["macs"])
        if row["budget"]:
            assert int(row["macs"]) <= float(row["budget"]) * int(whole["macs"])
        assert int(row["right"]) == sum(map(int, f"{int(row['answers'], 16):b}"))
    found = Found(rows)
    assert found.columns == ["0.7", "0.5"]
    ours = ("sinfkit", "dcs_obs", "global", "least_squares")
    assert (found.accuracy(ours) > found.accuracy((*ours[:3], "none")) + 0.2).all()
    assert found.macs[ours] == pytest.approx([0.7, 0.5], abs=0.03)
    assert [len(cluster) for cluster in found.right[ours]] == [24] * 4


def test_resume_measures_only_what_is_missing(folder, monkeypatch):
    path = table_of(folder)
    before = path.read_bytes()
    lines = before.splitlines(keepends=True)
    lost = lines[-1].split(b",")
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    drawn = []
    monkeypatch.setattr(pruning_table, "Draw", lambda *a: drawn.append(a) or Draw(*a))
    pruning_table.main([*ARGUMENTS, "--out", str(folder), "--threads", "1"])
    after = path.read_bytes()
    assert after.splitlines()[:-1] == before.splitlines()[:-1]
    assert after.splitlines()[-1].split(b",")[:12] == lost[:12]
    assert len(drawn) == 1
    pruning_table.main([*ARGUMENTS, "--out", str(folder), "--threads", "1"])
    assert path.read_bytes() == after
    assert len(drawn) == 1


def test_page_and_figure(folder):
    text = pruning_table.page(folder).text()
    assert (folder / "pruning_vgg16-0.125_choose.png").stat().st_size > 10_000
    for piece in ("IterTVSPrune", "images, labels", "torch-pruning magnitude_l2, local", "8.13"):
        assert piece in text
    assert "one-sided 95 % bound" in text
    assert pruning_table.page(folder / "nowhere") is None


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_its_selection_sliced_by_us_is_its_network(whole, images, importance, scope):
    pruner = Shipped(whole, importance, scope, images, seed=3)
    ratio = pruner.ratio(0.6)
    theirs = pruner.pruned(ratio)
    ours = images.pruned(pruner.keep(ratio), "none")
    assert whole.counts(ours) == whole.counts(theirs)
    assert whole.counts(ours)["macs"] <= 0.6 * whole.cost.base
    with torch.no_grad():
        torch.testing.assert_close(ours(images.x[:32]), theirs(images.x[:32]))


def test_its_network_is_that_of_its_plain_use(whole):
    pruner = Shipped(whole, "magnitude_l1", "local")
    module = copy.deepcopy(whole.study.base.model.module("cpu")).requires_grad_(True)
    tp.pruner.MagnitudePruner(
        module,
        whole.example,
        tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.3,
        ignored_layers=[module.classifier],
    ).step()
    theirs = pruner.pruned(0.3)
    with torch.no_grad():
        assert torch.equal(module(whole.example), theirs(whole.example))
    assert theirs.classifier.out_features == 8


def test_keep_is_that_of_the_pruner(whole, images):
    study = whole.study
    pruner = DCSPruner(
        study.base.model, schedule="global", budget=0.6, repair="none", device="cpu", random_state=0
    ).fit(study.X[images.rows], images.y)
    keep = images.keep("dcs", "global", 0.6)
    for name, kept in keep.items():
        assert np.array_equal(kept, pruner.support_[name])


def test_repairs_bring_the_answers_back(whole, images):
    keep = images.keep("dcs", "global", 0.6)
    x = next(whole.study.batches(whole.study.X_test))
    lost = {}
    with torch.no_grad():
        for method in ("none", "static_least_squares", "least_squares"):
            lost[method] = float((images.pruned(keep, method)(x) - whole.graph(x)).norm())
    assert lost["least_squares"] < lost["static_least_squares"] < 0.6 * lost["none"]


def test_linear_widths_use_the_budget(whole):
    widths = whole.linear_widths(0.5)
    sizes = [widths[group.name] / group.n_channels for group in whole.chosen]
    # Rounded down to whole filters, of eight in the first layers.
    assert sizes[0] > sizes[-1]
    assert np.diff(sizes).max() < 1 / 8
    cost = whole.cost.total([widths[group.name] for group in whole.chosen])
    assert 0.45 < cost / whole.cost.base <= 0.5
    with pytest.raises(ValueError):
        whole.linear_widths(1e-4)


def test_smallest():
    assert smallest(lambda x: x * x >= 2, 0, 2) == pytest.approx(2**0.5, abs=1e-5)
    with pytest.raises(ValueError):
        smallest(lambda x: False, 0, 1)


def test_needs():
    def ours(criterion, repair="none", schedule="linear"):
        return needs(("sinfkit", criterion, schedule, repair))

    assert ours("l1") == ours("dfpc") == "nothing"
    assert ours("l1", "least_squares") == "images (repair)"
    assert ours("l1", "least_squares", "global") == ours("l1", schedule="global")
    assert ours("l1", schedule="global") == "images (widths)"
    assert ours("dcs", "least_squares") == ours("dcs", schedule="global") == "images, labels"
    assert ours("taylor") == "images, labels, gradients"
    assert ours("obs") == "images"
    assert needs(("torch-pruning", "fpgm", "global", "none")) == "nothing"
    assert needs(("torch-pruning", "taylor", "global", "none")) == "images, labels, gradients"


def test_what_is_not_reached_is_said_so(tmp_path):
    path = tmp_path / "pruning_vgg19_choose.csv"
    table = Table(path, pruning_table.KEYS, pruning_table.VALUES, {"base_epochs": 1})
    key = dict(network="vgg19", width=1, base_seed=0, split="choose", max_drop="", resample=0)

    def add(library, criterion, schedule, repair, budget, right, seed=0):
        own = dict(library=library, criterion=criterion, schedule=schedule, repair=repair)
        macs = "" if right is None else int(1000 * budget)
        answers = "" if right is None else to_hex(np.array(right, dtype=bool))
        images = 0 if right is None else 4
        table.add(
            **key, **own, budget=budget, seed=seed, macs=macs, params=macs, images=images,
            right=sum(right or ()), cluster_images="2 2", answers=answers,
        )  # fmt: skip

    add("", "unpruned", "", "none", 1.0, [1, 1, 1, 0])
    for repair in ("none", "least_squares"):
        add("sinfkit", "dcs_obs", "global", repair, 0.6666, [1, 1, 1, 0])
        add("sinfkit", "dcs_obs", "global", repair, 0.4, [1, 1, 0, 0])
    add("torch-pruning", "random", "global", "none", 0.6666, [1, 0, 0, 0], seed=0)
    add("torch-pruning", "random", "global", "none", 0.6666, [1, 0, 1, 0], seed=1)
    add("torch-pruning", "random", "global", "none", 0.4, None)
    found = Found(read(path))
    rival, ours = (
        ("torch-pruning", "random", "global", "none"),
        ("sinfkit", "dcs_obs", "global", "none"),
    )
    assert found.accuracy(rival).tolist() == pytest.approx([0.375, np.nan], nan_ok=True)
    assert found.ahead(ours, rival).mean[0] == pytest.approx(0.375)  # at the first budget alone
    assert found.lost(ours, 1).mean[0] == pytest.approx(0.25)
    assert label(rival) == "torch-pruning random, global"
    text = pruning_table.page(tmp_path).text()
    assert "not reached" in text
    assert "Goal, at most 1.7 points: met." in text
