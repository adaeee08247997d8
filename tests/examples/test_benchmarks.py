"""The benchmarks: what they write, find again and draw; their parts add up to the whole."""

from __future__ import annotations

import csv
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_cnn

from sinfkit.graph import fold_batch_norm

pytestmark = pytest.mark.filterwarnings("ignore")

QUICK = ["--quick", "--device", "cpu", "--no-search"]
CELLS = ["--threads", "1", "--batches", "1", "32", "--forms", "eager", "folded"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def timed(paper, tmp_path_factory):
    """What a quick run leaves behind."""
    out = tmp_path_factory.mktemp("latency")
    paper("latency").main([*QUICK, *CELLS, "--out", str(out)])
    return out / "latency_vgg16-0.125_choose.csv"


@pytest.fixture(scope="module")
def found(paper, timed):
    """The networks of that run, and the study that they were tuned on."""
    script, who = paper("latency"), paper("contenders")
    options = script.parse([*QUICK, "--out", str(timed.parent)])
    held = paper("study").open_study(script._of_table(options, threads=1))
    return held, list(who.contenders(script._of_table(options), held))


def test_all_take_turns_in_each_cell(timed, paper):
    rows = rows_of(timed)
    able = {"eager": {"base", "SINF", "torch-pruning"}}
    able["folded"] = {"base", "one network", "torch-pruning"}
    for form, batch in itertools.product(able, ("1", "32")):
        own = [r for r in rows if (r["form"], r["batch"], r["mix"]) == (form, batch, "natural")]
        assert {row["contestant"] for row in own} >= able[form]
        assert len({row["run"] for row in own}) == 1
    for row in rows:
        assert float(row["ms_low"]) <= float(row["ms"]) <= float(row["ms_high"])
        assert row["threads"] == "1" and row["rounds"] == ("9" if row["batch"] == "1" else "3")
        assert row["mix"] == "natural" or row["contestant"] == "SINF"
    assert {row["mix"] for row in rows} == set(paper("mixes").MIXES)
    (base,) = (
        r for r in rows if (r["contestant"], r["form"], r["batch"]) == ("base", "eager", "32")
    )
    assert float(base["ratio_own"]) == 1


def test_the_accuracy_beside_a_time_is_that_of_the_form(timed, paper):
    answers = rows_of(timed.with_name(f"{timed.stem}_answers.csv"))
    share = {
        (*(row[k] for k in paper("contenders").KEYS), row["form"]): int(row["right"]) / 96
        for row in answers
    }
    assert len(share) == len(answers)
    for row in rows_of(timed):
        key = (*(row[k] for k in paper("contenders").KEYS), row["form"])
        assert float(row["accuracy"]) == pytest.approx(share[key], abs=1e-4)
    shipped = [v for key, v in share.items() if key[4] == "shipped"]
    assert max(shipped) < min(v for key, v in share.items() if key[4] == "repaired")


def test_a_finished_cell_is_not_run_again_and_a_lost_row_is(timed, paper, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(timed.parent, folder)
    path = folder / timed.name
    before = path.read_bytes()
    paper("latency").main([*QUICK, *CELLS, "--out", str(folder)])
    assert path.read_bytes() == before
    lines = before.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote
    paper("latency").main([*QUICK, *CELLS, "--out", str(folder)])
    after = path.read_bytes().splitlines(keepends=True)
    assert after[:-1] == lines[:-1]
    n_keys = len(paper("latency").KEYS)
    assert after[-1].split(b",")[:n_keys] == lines[-1].split(b",")[:n_keys]


def test_layers_are_those_of_the_base_and_their_multiplications_add_up(timed, found):
    held, _ = found
    layers = rows_of(timed.with_name(f"{timed.stem}_layers.csv"))
    first = {k: layers[0][k] for k in ("kind", "size")} | {"batch": "32"}
    own = [r for r in layers if all(r[k] == v for k, v in first.items())]
    low = [r for r in layers if r["kind"].endswith("low rank") and r["batch"] == "32"]
    assert {r["layer"] for r in low} == {r["layer"] for r in own}  # two for one count as one
    names = [n for n, m in held.base.model.module().named_modules() if _multiplies(m)]
    assert [row["layer"] for row in own] == names
    for row in own[1:-1]:
        assert 0 < float(row["macs"]) < float(row["base_macs"])
    assert all(float(row["base_seconds"]) > 0 for row in own)


def _multiplies(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Conv2d | torch.nn.Linear)


def test_parts_add_up_to_the_whole(found, paper):
    _, contenders = found
    network = next(c for c in contenders if c.classifier is not None).classifier.network_
    x = torch.rand(96, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    parts = paper("parts")
    cost = parts.split_cost(network, contenders[0].module, x, 9)
    total = sum(cost[part] for part in parts.PARTS)
    # Generous: the machine may be busy. A part that is left out or counted twice shows.
    assert 0.6 < total / cost["whole"] < 1.6
    assert cost["prefix"] > cost["router"] > 0


def test_batches_have_the_mix_that_they_are_named_for(paper):
    mixes = paper("mixes")
    clusters = np.array([0] * 50 + [2] * 5 + [3] * 20 + [-1] * 30)
    for size in (1, 7, 64):
        uniform = mixes.draw("uniform", size, 4, clusters)
        single = mixes.draw("single", size, 4, clusters)
        for batch in uniform:
            counts = np.bincount(clusters[batch], minlength=4)[[0, 2, 3]]
            assert counts.sum() == size and np.ptp(counts) <= 1
        assert [set(clusters[batch]) for batch in single] == [{0}, {2}, {3}, {0}]
        natural = np.concatenate(mixes.draw("natural", size, 400 // size, clusters))
        assert size == 1 or -1 in clusters[natural]
    with pytest.raises(ValueError, match="no image"):
        mixes.draw("single", 4, 1, np.full(9, -1))
    assert mixes.n_batches(1, 63) == 63 and mixes.n_batches(1024, 21) == 5


def test_routed_clusters_are_those_that_answer_alone(found, paper):
    held, contenders = found
    classifier = next(c for c in contenders if c.classifier is not None).classifier
    own = paper("mixes").routed_clusters(classifier.network_, held.X_test, held.device)
    alone = own >= 0
    np.testing.assert_array_equal(own[alone], classifier.predict_cluster(held.X_test)[alone])
    route = classifier.network_.route(torch.as_tensor(held.X_test).float() / 255)
    sure = route.log_posterior.exp().amax(1).numpy() >= classifier.network_.exit_threshold
    assert 0 < sure.sum() < len(sure)
    unsure = route.confidence.numpy() < classifier.network_.threshold
    np.testing.assert_array_equal(alone, ~sure & ~unsure)


def test_every_form_computes_what_the_network_does(found, paper, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    held, contenders = found
    forms, cpu = paper("forms"), torch.device("cpu")
    one = next(c for c in contenders if c.variant == "repaired")
    x = forms.batch_of(held.X_test, np.arange(40))
    with torch.inference_mode():
        expected = one.eager(x).numpy()
        spread = expected.std()
        for form, worst in (
            ("folded", 1e-3),
            ("bfloat16", 0.1),
            ("onnx", 1e-3),
            ("onnx-int8", 0.3),
        ):
            assert forms.why_not(one, form, cpu) == ""
            made = forms.make(one, form, 1, held.X, cpu, tmp_path)
            scores = torch.as_tensor(made.run(forms.lay_out(x, made.layout, cpu)))
            assert np.abs(scores.float().numpy() - expected).max() < worst * spread, form
            right = forms.answers(made, held.X_test, cpu) == held.y_test
            assert right.mean() > 0.8, form


@pytest.mark.slow
def test_a_compiled_form_computes_what_the_network_does(found, paper, tmp_path):
    held, contenders = found
    forms, cpu = paper("forms"), torch.device("cpu")
    made = forms.make(contenders[0], "compiled", 1, held.X, cpu, tmp_path)
    x = forms.batch_of(held.X_test, np.arange(40))
    with torch.inference_mode():
        torch.testing.assert_close(
            made.run(forms.lay_out(x, made.layout, cpu)),
            contenders[0].module(x),
            rtol=1e-3,
            atol=1e-3,
        )


def test_what_a_contender_lacks_is_named(found, paper):
    _, contenders = found
    forms = paper("forms")
    pruned = next(c for c in contenders if c.contestant == "one network")
    assert "folded only" in forms.why_not(pruned, "eager", torch.device("cpu"))
    assert forms.why_not(pruned, "folded", torch.device("cpu")) == ""
    assert "--device cpu" in forms.why_not(pruned, "onnx", torch.device("cuda")) or (
        "pip install" in forms.why_not(pruned, "onnx", torch.device("cuda"))
    )


def test_bfloat16_leaves_the_network_itself_alone(paper):
    module = torch.nn.Module()
    module.normalise, module.module = torch.nn.Identity(), fold_batch_norm(small_cnn())
    half = paper("forms")._half(module)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_pages_and_figures(timed, paper):
    paper("pages").main(["--out", str(timed.parent)])
    text = (timed.parent / "latency.rst").read_text()
    for piece in ("torch-pruning, as shipped", "Speed-up", "features.0", "base's rest", "uniform"):
        assert piece in text
    assert "   latency\n" in (timed.parent / "index.rst").read_text()
    images = [line.split()[-1] for line in text.splitlines() if line.startswith(".. image::")]
    assert len(images) == 3  # two forms, and the parts
    for image in images:
        assert (timed.parent / image).stat().st_size > 10_000
    assert paper("latency_page").page(timed.parent / "nowhere") is None


def test_cost_of_a_fit(paper, tmp_path, capsys):
    script = paper("fit_cost")
    script.main(["--quick", "--estimators", "DCSPruner", "--out", str(tmp_path)])
    rows = rows_of(tmp_path / "fit_cost.csv")
    assert [row["images"] for row in rows] == ["120", "240"]
    for row in rows:
        assert float(row["seconds"]) > 0
        assert 0 < int(row["before_mb"]) <= int(row["peak_mb"]) < 20_000
    assert "DCSPruner, images: slope" in capsys.readouterr().out
    before = (tmp_path / "fit_cost.csv").read_bytes()
    script.main(["--quick", "--estimators", "DCSPruner", "--out", str(tmp_path)])
    assert (tmp_path / "fit_cost.csv").read_bytes() == before
    paper("pages").main(["--out", str(tmp_path)])
    assert "Slopes" in (tmp_path / "fit_cost.rst").read_text()
    assert (tmp_path / "fit_cost.png").stat().st_size > 10_000


def test_slopes_of_a_power_law(paper):
    rows = [
        {"images": str(n), "seconds": str(n**2), "before_mb": "5", "peak_mb": str(5 + n)}
        for n in (10, 20, 80)
    ]
    rows = [{"estimator": "E", "axis": "images", **row} for row in rows]
    (line,) = paper("fit_cost").slopes(rows)
    assert line["slope"] == pytest.approx(2) and line["last"] == pytest.approx(2)
    assert line["memory"] == pytest.approx(1) and line["memory_last"] == pytest.approx(1)


def test_a_page_without_the_natural_mix_has_no_figure_of_it(timed, paper, tmp_path):
    lines = timed.read_text().splitlines(keepends=True)
    some = [line for line in lines[1:] if ",single," in line]
    (tmp_path / timed.name).write_text("".join([lines[0], *some]))
    assert paper("latency_page").draw(tmp_path / timed.name) == []


def test_large_images_are_timed_by_shape(paper, tmp_path):
    large = paper("large")
    large.main(["--quick", "--threads", "1", "--out", str(tmp_path)])
    rows = rows_of(tmp_path / "large.csv")
    assert {r["form"] for r in rows} == {"folded", "bfloat16"}
    for form in ("folded", "bfloat16"):
        base, one, routed = (r for r in rows if r["form"] == form)
        assert (base["contestant"], base["macs"], float(base["ratio"])) == ("base", "1.0000", 1)
        assert 0.35 < float(one["macs"]) <= 0.4 and 0.35 < float(routed["macs"]) < 0.43
        assert 1 <= int(routed["clusters"]) <= 2
        modelled = [r["modelled"] for r in (base, one, routed)]
        if form == "folded":
            assert modelled[0] == "1.0000" and 0.2 < float(modelled[1]) < 1.2
            assert float(modelled[2]) > 0.2
        else:
            assert not any(modelled)
    text = large.page(tmp_path).text()
    assert "resnet50, 32 x 32" in text and "untrained" in text
    assert "Over the 2 cells of float32" in text


def test_the_table_of_the_readme_is_what_the_results_say(paper):
    root = Path(__file__).resolve().parents[2]
    if not (root / "README.md").exists():  # installed without the sources
        pytest.skip("there is no README")
    made = paper("main_table").table(root / "docs" / "results")
    assert made in (root / "README.md").read_text(encoding="utf-8")
    assert made.count("\n") > 15 and "SINF, 30 %" in made
