"""Tables 4 and 5: routed networks beside their controls."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sinfkit import DCSPruner, SemanticClusterer, SINFClassifier


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore")
def test_the_quick_table_its_resume_and_its_pages(paper, tmp_path):
    script, pages = paper("sinf_table"), paper("sinf_page")
    arguments = ["--quick", "--threads", "1", "--kinds", "given", "--out", str(tmp_path)]
    script.main(arguments)
    path = tmp_path / "sinf_vgg16-0.125_choose.csv"
    rows = rows_of(path)
    variants = {row["variant"] for row in rows if row["contestant"] == "SINF"}
    assert variants == {"base", "restricted", *pages.SWITCHES}
    own = {row["variant"] for row in rows if row["kind"].startswith("confusion")}
    assert variants - own == {"no router", "no threshold"}  # which only a fallback has
    assert {row["contestant"] for row in rows} == {"base", "SINF", "one network"}
    by = {tuple(row[k] for k in pages.IDENTITY): row for row in rows}
    assert len(by) == len(rows)
    for key, row in by.items():
        assert 0 < float(row["macs"]) < 1.2 and int(row["images"]) == 96
        if row["variant"] == "SINF":
            own = {v: by[(*key[:4], v)] for v in variants if (*key[:4], v) in by}
            assert own["base"]["right"] == by["base", "", "", "0", "one"]["right"]
            assert int(own["oracle"]["right"]) >= int(own["no exit"]["right"])
            assert int(own["restricted"]["right"]) >= int(own["base"]["right"])
            assert float(row["macs"]) <= float(own["no exit"]["macs"]) + 1e-9
            assert float(row["macs"]) <= float(own["two clusters"]["macs"]) + 1e-9
    found = pages.Results(path)
    assert {name for name in found.times} <= {pages._identity(row) for row in rows}
    assert found.time(found.base) == 1.0
    before = path.read_bytes()
    script.main(arguments)
    assert path.read_bytes() == before  # everything was found again
    text = pages.page(tmp_path).text()
    assert (
        "left early at the probe (e)" in text
        and "restricted" in pages.cluster_page(tmp_path).text()
    )
    assert (tmp_path / "sinf_vgg16-0.125_choose.png").stat().st_size > 10_000


def test_the_control_is_interpolated_to_the_time_of_the_contestant(paper, tmp_path):
    record, pages = paper("record"), paper("sinf_page")
    columns = ("contestant", "kind", "size", "seed", "variant")
    path = tmp_path / "sinf_x_report.csv"
    table = record.Table(path, columns, ("images", "answers", "macs"))
    times = record.Table(tmp_path / "sinf_x_report_time.csv", columns, ("ratio",))
    for contestant, size, ratio, right in (
        ("base", "", 1.0, [1, 1, 1, 1]),
        ("one network", "a", 0.6, [1, 1, 0, 0]),
        ("one network", "b", 0.2, [0, 1, 0, 0]),
        ("SINF", "c", 0.5, [1, 0, 0, 0]),
        ("SINF", "d", 0.1, [0, 0, 0, 0]),
        ("SINF", "e", 0.5, [1, 0, 0, 0]),  # of another draw, which has no controls of its own
    ):
        variant = "SINF" if contestant == "SINF" else "one"
        key = {"contestant": contestant, "kind": "", "size": size, "variant": variant}
        key["seed"] = int(size == "e")
        answers = record.to_hex(np.array(right))
        table.add(**key, images=4, answers=answers, macs=ratio)
        times.add(**key, ratio=ratio)
    found = pages.Results(path)
    between, alone, outside = found.of("SINF", "SINF")
    np.testing.assert_allclose(found.at_equal_cost(between, "one"), [0.75, 1, 0, 0])
    assert found.at_equal_cost(outside, "one") is None
    assert found.at_equal_cost(alone, "one") is None  # slower than the base alone is no control
    ahead = found.gain(between, found.at_equal_cost(between, "one"))
    assert ahead.mean[0] == pytest.approx(-0.1875)


@pytest.mark.filterwarnings("ignore")
def test_a_probed_network_leaves_early_where_it_is_sure(paper):
    rivals, study = paper("contestants"), paper("study")
    quick = study.open_study(study.parser("").parse_args(["--quick", "--threads", "1"]))
    module, normalise = quick.base.model.module(), rivals.normaliser(quick)
    fused = rivals.tuned(normalise, module, "features.24", quick)
    x = next(rivals.raw(quick.X_test))
    with torch.inference_mode():
        h, early = fused.parts(x)
        expected = fused.rest(h) + fused.weight * early
        torch.testing.assert_close(fused(x), expected)
        plain = rivals.Plain(normalise, module)(x)
        torch.testing.assert_close(fused.rest(h), plain, rtol=1e-3, atol=1e-3)
        exiting = rivals.early_exit(fused, quick, target=0.0)
        assert exiting.threshold == 0.0  # all may leave
        exiting.threshold = float(early.exp().amax(1).median())
        stays = early.exp().amax(1) < exiting.threshold
        mixed = torch.where(stays[:, None], expected, early)
        torch.testing.assert_close(exiting(x), mixed, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_each_variant_switches_off_its_own_part(paper):
    """On images so noisy that the variants differ."""
    script, study = paper("sinf_table"), paper("study")
    quick = study.open_study(study.parser("").parse_args(["--quick", "--threads", "1"]))
    noise = np.random.default_rng(0).normal(0, 90, quick.X_test.shape)
    noisy = replace(quick, X_test=(quick.X_test + noise).clip(0, 255).astype(np.uint8))
    clf = SINFClassifier(
        quick.base.model,
        clusterer=SemanticClusterer(n_clusters=3),
        pruner=DCSPruner(min_ratio=0.5, max_ratio=0.8, repair_samples=64),
        route_layer="features.7",
        answers="cluster",
        fallback="base",
        exit_threshold=0.65,
        confidence_threshold=0.9,
        router_weight=20.0,
        random_state=0,
    ).fit(quick.X, quick.y)
    network, X, clusters = clf.network_, noisy.X_test, clf.class_clusters_
    truth = torch.as_tensor(clusters[noisy.y_test])
    found = script._variants(network, quick.base.model.module(), noisy, truth)
    names = ("SINF", "no exit", "no fusion", "no threshold")
    assert len({tuple(found[name]) for name in names}) == 4, "all four differ on these images"
    np.testing.assert_array_equal(found["SINF"], clf.predict(X))
    np.testing.assert_array_equal(found["cluster"], clf.predict_cluster(X))
    unsure = network.route(torch.as_tensor(X).float() / 255).confidence < 0.9
    np.testing.assert_array_equal(found["fallback"], unsure.numpy())
    stays = unsure.numpy() & ~found["leaves"]
    assert 0 < found["leaves"].sum() < len(found["leaves"])
    np.testing.assert_array_equal(found["no router"][stays], found["SINF"][stays])
    for variant in ("oracle", "restricted"):
        np.testing.assert_array_equal(clusters[found[variant]], truth.numpy())
    for change, variant in (
        ({"threshold": 0.0}, "no threshold"),
        ({"router_weight": 0.0}, "no fusion"),
        ({"exit_threshold": 2.0}, "no exit"),
        ({"fallback": "topk", "top_k": 2, "threshold": 2.0}, "two clusters"),
    ):
        before = {name: getattr(network, name) for name in change}
        network.__dict__.update(change)
        np.testing.assert_array_equal(found[variant], clf.predict(X), err_msg=variant)
        network.__dict__.update(before)
