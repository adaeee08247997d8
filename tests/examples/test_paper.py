"""The scripts of the paper's tables: what is counted, what is resumed, and that each one runs."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sinfkit import DCSPruner, FrozenModel
from sinfkit.zoo import ImageDataset

PAPER = Path(__file__).parents[2] / "examples" / "paper"


@pytest.fixture(scope="module")
def quick(paper):
    """A made-up study, its network trained in seconds and shared by all tests."""
    study = paper("study")
    return study.open_study(study.parser("").parse_args(["--quick", "--threads", "1"]))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Statistics


def test_a_bootstrap_of_two_images_has_three_means(paper):
    # One cluster: a mean of 0, a half or 1, with probabilities 1/4, 1/2 and 1/4.
    found = paper("stats").bootstrap([np.array([0.0, 1.0])], repeats=20_000)[:, 0]
    assert set(found) == {0.0, 0.5, 1.0}
    assert np.mean(found == 0.5) == pytest.approx(0.5, abs=0.02)
    assert np.mean(found == 1.0) == pytest.approx(0.25, abs=0.02)


def test_clusters_are_drawn_too_and_count_alike(paper):
    stats = paper("stats")
    values = [np.zeros(3), np.ones(30)]  # nothing varies within a cluster
    found = stats.bootstrap(values, repeats=20_000)[:, 0]
    assert sorted(set(found.round(9))) == [0.0, 0.5, 1.0]
    assert np.mean(found == 0.0) == pytest.approx(0.25, abs=0.02)
    estimate = stats.estimate(values)
    assert estimate.mean[0] == 0.5  # not 30 / 33: of clusters, not of images
    assert (estimate.low[0], estimate.high[0]) == (0.0, 1.0)


def test_the_bootstrap_has_the_variance_of_both_levels(paper):
    rng = np.random.default_rng(0)
    values = [rng.normal(k, 1.0, 20) for k in (0.0, 0.5, 2.0)]
    found = paper("stats").bootstrap(values, repeats=40_000)[:, 0]
    means = np.array([v.mean() for v in values])
    within = np.mean([v.var() / len(v) for v in values])
    assert found.mean() == pytest.approx(means.mean(), abs=0.02)
    assert found.var() == pytest.approx((means.var() + within) / 3, rel=0.03)


def test_columns_see_the_same_draws(paper):
    a = np.random.default_rng(0).normal(size=(9, 1))
    found = paper("stats").bootstrap([np.hstack([a, a + 1]), np.hstack([a, a + 1])])
    np.testing.assert_allclose(found[:, 1] - found[:, 0], 1.0)


def test_one_sided_bounds_lie_inside_the_interval(paper):
    values = [np.random.default_rng(k).normal(size=50) for k in range(5)]
    found = paper("stats").estimate(values)
    assert found.low < found.at_least < found.mean < found.at_most < found.high


def test_a_bootstrap_of_nothing_is_refused(paper):
    for values in ([], [np.zeros(0)]):
        with pytest.raises(ValueError, match="there must be a cluster"):
            paper("stats").bootstrap(values)


# Records


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_answers_survive_as_text(right):
    sys.path.insert(0, str(PAPER))
    try:
        record = importlib.import_module("record")
    finally:
        sys.path.remove(str(PAPER))
    assert record.from_hex(record.to_hex(np.array(right)), len(right)).tolist() == right


def test_a_table_drops_what_a_kill_left_unfinished(paper, tmp_path):
    record = paper("record")
    path = tmp_path / "folder" / "figures.csv"
    table = record.Table(path, ["cluster", "ratio"], ["right"], {"epochs": 3})
    for cluster in ("a", "b"):
        table.add(cluster=cluster, ratio=0.5, right=7)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert [row["cluster"] for row in record.read(path)] == ["a"]
    again = record.Table(path, ["cluster", "ratio"], ["right"], {"epochs": 3})
    assert len(again) == 1
    assert {"cluster": "a", "ratio": 0.5} in again and {"cluster": "b", "ratio": 0.5} not in again
    again.add(cluster="a", ratio=0.5, right=9)  # known: stays as it is
    again.add(cluster="b", ratio=0.5, right=7)
    assert path.read_bytes() == whole
    row = rows_of(path)[0]
    assert {"date", "sinfkit", "torch", "python", "processor", "threads"} <= set(row)
    assert (row["right"], row["epochs"]) == ("7", "3")


def test_a_table_of_other_columns_is_refused(paper, tmp_path):
    record = paper("record")
    record.Table(tmp_path / "t.csv", ["a"], ["b"])
    with pytest.raises(ValueError, match="move it away"):
        record.Table(tmp_path / "t.csv", ["a"], ["c"])


# Studies


def folder_data(n: int) -> ImageDataset:
    """Images of two classes whose file names are not in the order of the rows."""
    order = np.random.default_rng(0).permutation(n)
    paths = tuple(Path(f"c{k}/{i:03d}.png") for k in range(2) for i in order)
    X = np.concatenate([np.full((n, 3, 1, 1), k, dtype=np.uint8) for k in range(2)])
    X[:, 1, 0, 0] = np.tile(order, 2)  # the place of each image, to recognise it by
    return ImageDataset(X, np.repeat([0, 1], n), ("p", "q"), {0: "a", 1: "b"}, paths)


def test_splits_are_by_place_and_do_not_meet(paper):
    study = paper("study")
    train, val = folder_data(30), folder_data(10)

    def seen(held_out: bool, split: str) -> tuple[set, set]:
        parts = study.parts(train, val, split, held_out)
        return tuple({int(x[1, 0, 0]) for x in part.X} for part in parts)

    assert seen(True, "choose") == (set(range(30)) - {9, 19, 29}, {9, 19, 29})
    assert seen(True, "report") == (set(range(30)) - {9, 19, 29}, set(range(10)))
    assert seen(False, "choose") == (set(range(30)), {0, 2, 4, 6, 8})
    assert seen(False, "report") == (set(range(30)), {1, 3, 5, 7, 9})


def test_half_of_the_clusters_chooses(paper):
    select = paper("study").select_clusters
    names = ["a", "b", "c", "d", "e"]
    assert select(names, None, "choose") == ("a", "c", "e")
    assert select(names, None, "report") == ("b", "d")
    assert select(names, ["all"], "report") == tuple(names)
    assert select(names, ["e", "a"], "report") == ("e", "a")
    with pytest.raises(SystemExit, match="no cluster x"):
        select(names, ["x"], "choose")


def test_draws_are_repeatable_and_nested(quick):
    classes = quick.classes("b")
    few, many = quick.draw(classes, 5, 0), quick.draw(classes, 20, 0)
    assert set(few) <= set(many) and len(few) == 5 * len(classes)
    assert set(quick.y[few]) == set(classes)
    assert set(many) == set(quick.draw(classes, 20, 0)) != set(quick.draw(classes, 20, 1))


@pytest.mark.filterwarnings("ignore")
def test_training_writes_what_a_study_reads(paper, tmp_path, capsys):
    study = paper("study")
    data = study.made_up_images(20, seed=0)
    for part, rows in (("train", range(20)), ("val", range(4))):
        for k in range(8):
            place = tmp_path / part / f"n{k}"
            place.mkdir(parents=True)
            for i in rows:
                pixels = data.X[20 * k + i].transpose(1, 2, 0)
                Image.fromarray(pixels).save(place / f"{i:02d}.png")
    with (tmp_path / "classes.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["wnid", "name", "cluster"],
                *([f"n{k}", f"class {k}", "abcd"[k // 2]] for k in range(8)),
            ]
        )
    weights = tmp_path / "weights.pt"
    common = ["--data", str(tmp_path), "--threads", "1"]
    paper("train").main([*common, "--width", "0.125", "--epochs", "1", "--out", str(weights)])
    assert "on the images held out" in capsys.readouterr().out
    stored = torch.load(weights, weights_only=True)
    assert stored["state_dict"]["features.0.weight"].dtype == torch.float16
    assert 0 <= stored["held_out_accuracy"] <= 1

    options = study.parser("").parse_args([*common, "--weights", str(weights)])
    found = study.open_study(options)
    assert found.base.held_out and found.base.label == "vgg16-0.125"
    assert (len(found.X), len(found.X_test), found.chosen) == (8 * 18, 8 * 2, ("a", "c"))
    options.split = "report"
    assert len(study.open_study(options).X_test) == 8 * 4


# The part of a network that is sliced


@pytest.mark.parametrize("criterion", ["dcs", "l1"])
def test_a_suffix_keeps_what_the_pruner_keeps(paper, quick, criterion):
    suffix = paper("suffix")
    part = suffix.Suffix(quick)
    case = suffix.Case.of(part, "c", 0, 30)
    keep = part.keep(case.scores(criterion), 0.2, 0.6)
    small, support = part.sliced(keep, case.classes, case.h)
    rows = quick.draw(case.classes, 30, 0)
    pruner = DCSPruner(
        quick.base.model,
        criterion=criterion,
        classes=case.classes,
        first_layer="features.20",
        min_ratio=0.2,
        max_ratio=0.6,
        repair="none",
    ).fit(quick.X[rows], quick.y[rows])
    for layer in keep:
        np.testing.assert_array_equal(support[layer], pruner.support_[layer])
    test = quick.test_rows(case.classes)
    answers = case.classes[suffix.answers(small, part.inputs(quick.X_test[test]))]
    np.testing.assert_array_equal(answers, pruner.predict(quick.X_test[test]))


@pytest.mark.filterwarnings("ignore:Layers without moments")
def test_a_suffix_of_a_residual_network(paper, quick):
    suffix, study = paper("suffix"), paper("study")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = study.build("resnet50", 8, 0.125, "half")
    base = study.Base(FrozenModel(module, [0.5] * 3, [0.2] * 3), "resnet50", 0.125)
    own = study.Study(**(vars(quick) | {"base": base}))
    part = suffix.Suffix(own)
    assert part.prefix is not None and part.groups[0].name == "layer3.1.conv1"
    case = suffix.Case.of(part, "a", 0, 10)
    keep = part.keep(case.scores("fdr"), 0.1, 0.5)
    for repaired in suffix.REPAIRS:
        small, support = part.sliced(keep, case.classes, case.h)
        suffix.mend(repaired, case, small, support)
        assert small(case.h[:2]).shape == (2, 2)


# Tables


FEW = ("--quick", "--threads", "1", "--resamples", "1")


@pytest.fixture(scope="module")
def results(paper, tmp_path_factory):
    """A folder with the quick results of tables 1, 2 and 6."""
    folder = tmp_path_factory.mktemp("results")
    out = ("--out", str(folder))
    paper("criteria_table").main(
        [*FEW, *out, "--criteria", "dcs", "l1", "random", "--seeds", "2"]
        + ["--ratios", "0.1,0.5", "0.3,0.7"]
    )
    paper("definition_table").main([*FEW, *out, "--clusters", "a"])
    paper("sharing_table").main(["--quick", "--threads", "1", "--random", "1", *out])
    return folder


def test_criteria_are_compared_under_each_repair(results):
    rows = rows_of(results / "criteria_vgg16-0.125_choose.csv")
    # two clusters: unpruned, and (dcs, l1, random twice) at two ratios under three repairs
    assert len(rows) == 2 * (1 + 4 * 2 * 3)
    assert {row["cluster"] for row in rows} == {"a", "c"}
    assert {row["repair"] for row in rows} == {"", "none", "match", "static"}
    for row in rows:
        assert bin(int(row["answers"], 16)).count("1") == int(row["right"]) <= int(row["images"])


@pytest.mark.parametrize("name", ["criteria_table", "sharing_table"])
def test_a_stopped_run_goes_on(paper, results, tmp_path, name):
    source = next(results.glob(f"{name.removesuffix('_table')}_*.csv"))
    whole = source.read_bytes()
    path = tmp_path / source.name
    path.write_bytes(whole[: len(whole) // 2])
    arguments = {
        "criteria_table": [*FEW, "--criteria", "dcs", "l1", "random", "--seeds", "2"]
        + ["--ratios", "0.1,0.5", "0.3,0.7"],
        "sharing_table": ["--quick", "--threads", "1", "--random", "1"],
    }[name]
    paper(name).main([*arguments, "--out", str(tmp_path)])
    assert path.read_bytes() == whole
    paper(name).main([*arguments, "--out", str(tmp_path)])
    assert path.read_bytes() == whole


def test_ahead_is_paired_by_image(paper):
    table = paper("criteria_table")
    to_hex = paper("record").to_hex

    def row(cluster: str, criterion: str, ratio: str, right: list[int]) -> dict[str, str]:
        kept = {"criterion": criterion, "max_ratio": ratio, "min_ratio": "0.1", "pool": "1"}
        answers = {"answers": to_hex(np.array(right)), "images": str(len(right))}
        return {**kept, **answers, "repair": "none", "cluster": cluster}

    rows = [
        row("a", "dcs", "0.5", [1, 1, 1, 0]),
        row("a", "dcs", "0.7", [1, 1, 0, 0]),
        row("a", "l1", "0.5", [1, 0, 1, 0]),
        row("a", "l1", "0.7", [1, 0, 0, 0]),
        row("b", "dcs", "0.5", [1, 1]),
        row("b", "dcs", "0.7", [0, 1]),
        row("b", "l1", "0.5", [0, 0]),
        row("b", "l1", "0.7", [1, 1]),
        row("c", "dcs", "0.5", [1]),  # not complete: not compared
    ]
    found = table.Accuracies(rows, "none")
    assert found.clusters == ["a", "b"]
    assert found.means("dcs").tolist() == [(3 / 4 + 1) / 2, (1 / 2 + 1 / 2) / 2]
    # a: 1/4 at both ratios; b: (1 - 1/2) / 2, and then the mean of both clusters
    assert found.ahead("dcs", "l1").mean[0] == pytest.approx((0.25 + 0.25) / 2)
    assert found.best_other() == "l1"


def test_definitions_are_each_measured_once(paper, results):
    table = paper("definition_table")
    recipes = table.recipes()
    assert len({tuple(r.values()) for r in recipes}) == len(recipes)
    grid = {(r["penalty"], r["scaling"]) for r in recipes}
    assert grid >= {(p, s) for p in table.PENALTIES for s in table.SCALINGS}
    for width in ("0.125", "0.1875"):
        rows = rows_of(results / f"definition_vgg16-{width}_choose.csv")
        assert len(rows) == 1 + 2 * len(recipes)  # one cluster, one draw, two ratios


def test_sharing_by_hand(paper):
    table = paper("sharing_table")
    # Two classes of cluster p prefer filters 0 and 1; those of q prefer 2 and 3.
    y = np.arange(4).repeat(2)
    means = np.array([[5, 4, 1, 1], [4, 5, 1, 1], [1, 1, 5, 4], [1, 1, 4, 5]], dtype=float)
    features = means[y] * np.array([1.0, 1.0, 100.0, 1.0])  # a filter that is always on
    partition = {"p": np.array([0, 1]), "q": np.array([2, 3])}
    wanted = ("same", "other", "itself")
    found = list(table.activation_overlaps(features, y, partition, wanted))
    assert {(name, pair): value for name, pair, value in found} == {
        ("p", "same"): 1.0,
        ("p", "other"): 0.0,
        ("p", "itself"): 1.0,
        ("q", "same"): 1.0,
        ("q", "other"): 0.0,
        ("q", "itself"): 1.0,
    }
    # Two of four: both common in 1 of 6 cases, one in 4 of 6, none in 1.
    assert table.expected_overlap(4, 2) == pytest.approx(1 / 6 + 4 / 6 / 3)


def test_random_clusters_have_the_sizes_of_the_given(paper):
    partition = {"p": np.array([0, 1, 2]), "q": np.array([3, 4])}
    found = paper("sharing_table").shuffled(partition, 0)
    assert [len(v) for v in found.values()] == [3, 2]
    assert sorted(np.concatenate(list(found.values()))) == [0, 1, 2, 3, 4]


def test_pages_are_rebuilt_from_the_rows(paper, results, capsys):
    (results / "vgg16.rst").write_text("By hand\n=======\n")
    paper("pages").main(["--out", str(results)])
    index = (results / "index.rst").read_text()
    for name in ("criteria", "definition", "sharing", "vgg16"):
        assert f"   {name}\n" in index
    assert "sinf\n" not in index and "pruning\n" not in index  # no rows, no page
    assert (results / "vgg16.rst").read_text() == "By hand\n=======\n"
    for path in results.glob("*.rst"):
        for line in path.read_text().splitlines():
            if line.startswith(".. image:: "):
                assert (results / line.removeprefix(".. image:: ")).stat().st_size > 10_000
    text = (results / "criteria.rst").read_text()
    assert "Paper, CIFAR-100" in text and "unpruned (control)" in text
    before = {path.name: path.read_text() for path in results.glob("*.rst")}
    paper("pages").main(["--out", str(results)])
    assert before == {path.name: path.read_text() for path in results.glob("*.rst")}
