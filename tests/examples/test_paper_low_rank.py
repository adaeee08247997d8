"""The table of low rank in the prefix, and its page."""

from __future__ import annotations

import csv

import pytest


@pytest.mark.filterwarnings("ignore")
def test_the_quick_table_and_its_page(paper, tmp_path):
    script = paper("low_rank_table")
    script.main(["--quick", "--threads", "1", "--out", str(tmp_path)])
    with (tmp_path / "low_rank_vgg16-0.125_choose.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["share"] for row in rows} == {"1", "0.75", "0.5", "0.35"}
    for budget in {row["budget"] for row in rows}:
        own = {row["share"]: row for row in rows if row["budget"] == budget}
        macs = [float(own[share]["prefix_macs"]) for share in ("1", "0.75", "0.5", "0.35")]
        assert macs == sorted(macs, reverse=True) and len(set(macs)) == 4
        assert float(own["1"]["error"]) < 1e-6 < float(own["0.5"]["error"]) < 1
    assert "vgg16-0.125, choose images" in script.page(tmp_path).text()
