"""The tables in their quick forms: what they write, find again, draw and say."""

from __future__ import annotations

import csv
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers import randomise_batch_norms

from sinfkit.graph import count_macs

pytestmark = pytest.mark.filterwarnings("ignore")
FEW = ("--contestants", "base", "one network", "SINF, given clusters", "--rounds", "2")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One folder for all tables: what one has fitted the others find."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def main_table(table, out):
    return table("main", out, *FEW)


def test_main_measures_everybody_against_the_base(main_table, capsys):
    rows, timed = rows_of(main_table), rows_of(main_table.with_name("main_tiny_choose_times.csv"))
    assert [row["contestant"] for row in rows] == [*FEW[1:4]]
    assert [row["contestant"] for row in timed] == [*FEW[1:4]]
    base, one, sinf = rows
    assert float(base["macs"]) == 1 == float(timed[0]["ratio"])
    assert float(one["macs"]) <= 0.6 and float(sinf["macs"]) < 0.7
    for row in rows:
        assert row["images"] == "96" and 60 < int(row["right"]) <= 96
    assert main_table.with_suffix(".png").stat().st_size > 10_000


def test_each_size_stands_with_its_loss_and_its_speed(main_table, examples_on_path):
    from benchmarks.main_table import by_size

    rows, timed = rows_of(main_table), rows_of(main_table.with_name("main_tiny_choose_times.csv"))
    told = by_size(main_table)
    assert len(told.cells) == len(rows) and {len(line) for line in told.cells} == {4}
    right = [int(row["right"]) for row in rows]
    for line, row, time, n in zip(told.cells, rows, timed, right, strict=True):
        assert line[0] == row["contestant"]
        assert line[2].startswith(f"{100 * (right[0] - n) / 96:+.2f}")
        assert line[3] == f"{1 / float(time['ratio']):.1f}x"


def test_a_finished_table_is_found_again_and_a_lost_row_is_measured(main_table, table, out):
    before = main_table.read_bytes()
    table("main", out, *FEW)
    assert main_table.read_bytes() == before
    lines = before.splitlines(keepends=True)
    main_table.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote
    table("main", out, *FEW)
    assert main_table.read_bytes().splitlines()[:-1] == before.splitlines()[:-1]
    assert len(rows_of(main_table)) == len(lines) - 1


def test_the_fastest_that_is_fast_enough_is_shown(examples_on_path, tmp_path):
    """Made-up answers and times, with a known least loss at each speed."""
    from benchmarks import main_table
    from benchmarks.record import Table, to_hex

    path = tmp_path / "main_vgg19_report.csv"
    answers = Table(path, main_table.ANSWERS, main_table.ANSWER_VALUES)
    timed = Table(
        tmp_path / "main_vgg19_report_times.csv", main_table.TIMES, main_table.TIME_VALUES
    )
    key = dict(network="vgg19", split="report", width=1, base_seed=0, base_epochs=1, draw=0)
    for name, size, form, right, ratio in (
        ("base", "1", "torch", [1, 1, 1, 1], 1.0),
        ("base", "1", "int8", [1, 1, 1, 0], 0.4),
        ("SINF, given clusters", "0.5", "torch", [1, 1, 0, 0], 0.6),
        ("SINF, given clusters", "0.3", "torch", [1, 1, 1, 1], 0.5),
        ("SINF, given clusters", "0.2", "torch", [0, 0, 0, 0], 0.3),
    ):
        own = {**key, "contestant": name, "size": size, "form": form}
        n = sum(right)
        answers.add(**own, images=4, right=n, answers=to_hex(np.array(right)), macs=1, params=1)
        timed.add(**own, batch=1, ms=ratio, ratio=ratio, run=0)
    found = main_table.Results(path)
    assert found.best("base", 1.5, "1") == ("base", "1", "int8")
    assert found.best("base", 3.0, "1") is None
    assert found.best("SINF, given clusters", 1.5, "1") == ("SINF, given clusters", "0.3", "torch")
    assert found.best("SINF, given clusters", 2.5, "1") == ("SINF, given clusters", "0.2", "torch")
    told = main_table.summary(path)
    assert "Paper: 0.17 points at 1.54x; ours: 0.00 points: met." in told.answer
    assert told.cells[0][1:3] == ["+25.00 [-54.56, +104.56] (int8)"] * 2


def test_criteria_lose_the_same_filters_by_number(table, out):
    few = ("--criteria", "dcs", "activation_std")
    rows = rows_of(table("criteria", out, *few, "--repairs", "none"))
    tested = [row for row in rows if row["removed"] == "0.3-0.7"]
    for scope in ("all", "a"):
        own = [row for row in tested if row["scope"] == scope]
        assert len({row["macs"] for row in own}) == 1  # whichever filters they are
        assert {row["criterion"] for row in own} == {"dcs", "activation_std"}
    rounds, matched = (
        next(row for row in rows if row["criterion"].startswith(name))
        for name in ("IterTVSPrune", "dcs at")
    )
    assert float(matched["macs"]) <= float(rounds["macs"]) <= 1


def test_cluster_by_cluster_with_the_restricted_base(table, out):
    rows = rows_of(table("per_cluster", out))
    assert [row["cluster"] for row in rows] == list("abcd")
    for row in rows:
        assert (row["classes"], row["images"]) == ("2", "24")
        assert float(row["restricted"]) >= float(row["base"])  # fewer answers to choose from
        assert 0 < float(row["macs"]) < 0.7


def test_where_routing_pays(table, out):
    rows = rows_of(table("routing", out))
    totals = [row for row in rows if row["cluster"] == "all"]
    assert [row["n_clusters"] for row in totals] == ["4"]
    for total in totals:
        own = [r for r in rows if r["n_clusters"] == total["n_clusters"] and r is not total]
        assert sum(int(r["images"]) for r in own) == int(total["images"]) == 96
        for row in own:
            assert float(row["one_restricted"]) >= float(row["one"])
        assert 0 < float(total["one_macs"]) <= float(total["known_macs"]) + 1e-3
        assert 0.2 < float(total["behind"]) < 0.8


def test_distillation_beside_repair_alone(table, out, examples_on_path):
    from benchmarks.distill import summary

    path = table("distill", out, "--augment", "mix", "--budget", "0.4")
    rows = rows_of(path)
    assert [(row["draw"], row["epochs"]) for row in rows] == [("base", "0"), ("0", "0"), ("0", "2")]
    assert rows[1]["macs"] == rows[2]["macs"] and rows[1]["losses"] == ""
    first, last = map(float, rows[2]["losses"].split())
    assert 0 < last < 2 * first
    assert len(summary(path).cells) == 2 and path.with_suffix(".png").stat().st_size > 5_000


def test_several_exits_beside_one(table, out, examples_on_path):
    from benchmarks.exits import best, summary

    path = table("exits", out)
    rows = rows_of(path)
    none = [row for row in rows if row["exits"] == "none"]
    assert {row["cost"] for row in none} == {"1.00000"}
    every = [row for row in rows if row["exits"] == "all"]
    costs = [float(row["cost"]) for row in every]
    assert costs == sorted(costs) and costs[0] < 0.9 and costs[-1] == 1.0  # surer, later
    assert best(every, 1.0) >= float(none[0]["accuracy"]) - 0.05
    assert summary(path).cells and path.with_suffix(".png").stat().st_size > 5_000


def test_filters_that_clusters_share(table, out, examples_on_path):
    from benchmarks.sharing import by_depth, overlap

    rows = rows_of(table("sharing", out))
    same, other = (by_depth(rows, "activation", ("given", k)) for k in ("same", "other"))
    itself = by_depth(rows, "activation", ("given", "itself"))
    assert list(same) == [1, 2, 3, 4, 5]
    for depth in (4, 5):  # the made-up classes of a cluster share half of their pattern
        assert np.mean(itself[depth]) > np.mean(same[depth]) > np.mean(other[depth])
    sets = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], dtype=bool)
    np.testing.assert_allclose(overlap(sets), [[1, 1 / 3], [1 / 3, 1]])


def test_pages_of_what_was_measured(table, main_table, out, tmp_path, examples_on_path):
    from benchmarks.pages import main

    main(["--out", str(out), "--to", str(tmp_path), "--split", "choose"])
    text = (tmp_path / "main.rst").read_text()
    assert "How much accuracy does a measured speed cost?" in text
    assert (tmp_path / "main_tiny_choose.png").exists()
    assert not (tmp_path / "networks.rst").exists()  # nothing was measured


def test_training_is_stored_as_the_tables_read_it(table, tmp_path, examples_on_path):
    from benchmarks.study import load_base

    path = tmp_path / "tiny.pt"
    table("train", tmp_path, "--file", str(path), "--epochs", "1")
    name, model, facts, held_out = load_base(path, "vgg16", 8)
    assert (name, held_out, facts["base_epochs"]) == ("tiny", True, 1)
    assert len(model.mean) == len(model.std) == 3
    assert all(p.isfinite().all() for p in model.module().parameters())


def test_a_public_resnet56_loads_and_costs_what_is_published(tmp_path, examples_on_path):
    from benchmarks.resnet56 import MEAN, resnet56
    from benchmarks.study import load_base

    network = randomise_batch_norms(resnet56(100)).eval()
    names = network.state_dict().keys()
    assert {"conv1.weight", "layer2.0.downsample.0.weight", "layer3.8.bn2.bias", "fc.bias"} <= names
    torch.save(network.state_dict(), tmp_path / "public.pt")
    name, model, _, held_out = load_base(tmp_path / "public.pt", "resnet56", 100)
    assert name == "resnet56" and not held_out and model.mean == pytest.approx(MEAN)
    macs = count_macs(network, torch.zeros(1, 3, 32, 32))[0]
    # 125.49 million, as published; shortcuts of 1 x 1 included.
    assert macs == pytest.approx(125.5e6, rel=5e-3)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(0.86e6, rel=0.01)


def test_images_that_choose_are_not_those_that_report(tmp_path, examples_on_path):
    """Both ways of holding out, on a folder of images."""
    from benchmarks import study
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, n in (("train", 10), ("test", 4)):
        for name in ("ant", "bee"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(
                    folder / f"{i}.png"
                )
    (tmp_path / "classes.csv").write_text("wnid,name,cluster\nant,ant,x\nbee,bee,y\n")
    weights = tmp_path / "weights.pt"
    for held_out, sizes in ((True, (18, 2, 8)), (False, (20, 4, 4))):
        torch.save({"state_dict": study.tiny(2).state_dict(), "held_out": held_out}, weights)
        common = ["--network", "tiny", "--data", str(tmp_path), "--weights", str(weights)]
        made = study.open_study(
            study.parser("").parse_args([*common, "--split", "report", "--threads", "1"])
        )
        assert (len(made.X), len(made.X_choose), len(made.X_test)) == sizes
        assert made.names == ["x", "y"]
        seen = {x.tobytes() for x in made.X_choose}
        assert not seen & {x.tobytes() for x in made.X_test}
        assert not seen & {x.tobytes() for x in made.X}


def test_every_form_computes_what_the_network_does(table, main_table, out, examples_on_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from benchmarks import study
    from benchmarks.contestants import BASE, GIVEN, Contestant, make
    from benchmarks.forms import FORMS, answers, forms_of

    quick = study.made_up_study("choose")
    # Files of routed networks have tests of their own.
    for name, size, wanted in ((BASE, 1.0, FORMS), (GIVEN, 0.6, FORMS[:2])):
        made = make(quick, Contestant(name, size, 0), 40, out / "fitted")
        forms = forms_of(made, wanted, quick.X)
        assert list(forms) == list(wanted)
        expected = made.answers(quick.X_test)
        for form, run in forms.items():
            same = (answers(run, quick.X_test) == expected).mean()
            assert same >= (0.99 if form in ("torch", "onnx") else 0.85), (name, form)


def test_distilled_contestants_are_trained_for_equally_many_epochs(examples_on_path, tmp_path):
    from benchmarks.contestants import DISTILLED, EPOCHS, Contestant, estimator_of, make
    from benchmarks.study import made_up_study

    study = made_up_study("choose")
    epochs = {estimator_of(study, Contestant(name, 0.6, 0)).distill for name in DISTILLED}
    assert epochs == {EPOCHS}
    made = make(study, Contestant(DISTILLED[-1], 0.6, 0), 20, tmp_path)
    assert len(made.classifier.distillation_losses_) == EPOCHS


def test_what_torch_pruning_keeps_is_what_it_ships(examples_on_path):
    """Its choice, replayed by our slicing without a repair, is its own network."""
    from benchmarks import study
    from benchmarks.contestants import torch_pruning

    quick = study.made_up_study("choose")
    module, kept, _ = torch_pruning(quick, 0.5)
    example = next(quick.batches(quick.X[:1]))
    whole = count_macs(quick.model.module(), example)[0]
    assert 0.3 * whole < count_macs(module, example)[0] <= 0.5 * whole
    convolutions = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [int(v.sum()) for v in kept.values()][:5] == [m.out_channels for m in convolutions]


def test_rows_intervals_and_the_command(tmp_path, capsys, examples_on_path):
    from benchmarks.__main__ import TABLES, main
    from benchmarks.record import Table, from_hex, read, to_hex
    from benchmarks.stats import estimate

    right = np.random.default_rng(0).random(37) < 0.5
    row = {"images": "37", "answers": to_hex(right)}
    np.testing.assert_array_equal(from_hex(row), right)
    table = Table(tmp_path / "x.csv", ["k"], ["v"])
    table.add(k=1, v="a, b")
    table.add(k=1, v="again")
    assert [r["v"] for r in read(table.path)] == ["a, b"] and {"k": 1} in table
    with pytest.raises(ValueError, match="columns"):
        Table(tmp_path / "x.csv", ["k"], ["w"])
    with pytest.raises(ValueError, match="line break"):
        table.add(k=2, v="a\nb")
    # Student's interval of 1, 2, 3: 2 plus and minus 4.303 / sqrt(3)
    found = estimate(np.array([1.0, 2.0, 3.0]))
    assert (found.mean, found.low, found.high) == pytest.approx((2, -0.484, 4.484), abs=1e-3)
    assert np.isnan(estimate(np.array([1.0])).low)
    assert all(find_spec(f"benchmarks.{module}") for module, _ in TABLES.values())
    with pytest.raises(SystemExit):
        main(["nothing"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in TABLES)
