"""The table of real fits: what it writes, finds again and says."""

import csv

import pytest


@pytest.fixture(scope="module")
def quick(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits")
    table("promise_fits", folder)
    return folder / "promise_fits_quick.csv"


def test_certified_fits_keep_what_was_asked_and_the_others_speak(quick):
    with quick.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        lost, gained, images = (int(row[c]) for c in ("lost", "gained", "test_images"))
        assert float(row["drop"]) == pytest.approx((lost - gained) / images, abs=1e-5)
        assert int(row["exceeds"]) == (float(row["drop"]) > float(row["limit"]))
        assert 0.6 < float(row["base_accuracy"]) < 1
        assert float(row["speedup"]) >= 1
        if row["certified"] == "1":
            assert float(row["bound"]) <= float(row["limit"])
        else:
            assert "PromiseWarning" in row["warned"]
    assert any(row["certified"] == "1" for row in rows)


def test_a_finished_table_is_not_fitted_again(quick, table):
    before = quick.read_bytes()
    table("promise_fits", quick.parent)
    assert quick.read_bytes() == before


def test_the_base_itself_is_not_counted_as_kept(examples_on_path):
    from benchmarks.promise_fits import summary

    row = {"network": "plain", "images": "800", "limit": "0.01", "seed": "0", "warned": ""}
    row["way"] = "search"
    certified = {"certified": "1", "exceeds": "0", "drop": "0.0", "speedup": "2.0"}
    wrong = {"certified": "1", "exceeds": "1", "drop": "0.03", "speedup": "2.0"}
    silent = {"certified": "0", "exceeds": "0", "drop": "0.005", "speedup": "3.0"}
    base = {"certified": "1", "exceeds": "0", "drop": "0.0", "speedup": "1.0"}
    text = summary([row | kind for kind in (certified, certified, certified, wrong, silent, base)])
    assert "6 fits" in text and "1 of them kept the base" in text
    assert "certified: 4; 1 of them (25.0%" in text
    assert "median loss 0.50 of the limit, 0 lose more than asked, 1 without a warning" in text


def test_what_is_given_up_is_told_from_pairs_on_the_same_images(examples_on_path):
    from benchmarks.promise_fits import RAW, WAYS, summary

    assert all(way.removeprefix("raw ") in WAYS for way in RAW)
    row = {"network": "plain", "images": "800", "limit": "0.01", "seed": "0", "warned": ""}
    row |= {"exceeds": "0", "drop": "0.0"}
    pairs = [("search", "1", "1.6", "2.0"), ("sinf", "1", "2.7", "3.0"), ("sinf 2", "0", "2", "4")]
    rows = [row | {"way": way, "certified": shown, "speedup": s} for way, shown, s, _ in pairs]
    raw = {"certified": "1", "exceeds": "1"}
    rows += [row | raw | {"way": f"raw {way}", "speedup": s} for way, _, _, s in pairs]
    text = summary(rows)
    assert "3 fits" in text and "0 of them (0.0%" in text  # what shows nothing is not counted
    assert "2 pairs, median 15% of the speed-up given up" in text
