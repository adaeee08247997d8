"""Low rank in the prefix: factors that answer as the layer does, and the table."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn


def test_factors_keep_what_the_outputs_span(paper):
    script = paper("low_rank_table")
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, padding=1, stride=2)
    with torch.no_grad():
        # Eight outputs that are mixtures of three, about a mean of their own.
        few = torch.randn(3, 6, 3, 3, generator=generator)
        mix = torch.randn(8, 3, generator=generator)
        layer.weight.copy_(torch.einsum("or,rihw->oihw", mix, few))
        layer.bias.copy_(torch.randn(8, generator=generator))
    x = torch.randn(16, 6, 12, 12, generator=generator)
    with torch.inference_mode():
        expected = layer(x)
        y = expected.movedim(1, 3).flatten(0, 2)
        pair, error = script.factors(layer, y, 0.5)  # rank 3: 54 * 3 + 3 * 8 of 432
        torch.testing.assert_close(pair(x), expected, rtol=1e-4, atol=1e-4)
        assert error < 1e-9 and pair[0].out_channels == 3
        rough, error = script.factors(layer, y, 0.3)
        off = (rough(x) - expected).square().sum() / (
            expected - y.mean(0)[:, None, None]
        ).square().sum()
    assert rough[0].out_channels == 2 and error > 0.01
    assert float(off) == pytest.approx(error, rel=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_the_quick_table_and_its_page(paper, tmp_path):
    script = paper("low_rank_table")
    script.main(["--quick", "--threads", "1", "--out", str(tmp_path)])
    with (tmp_path / "low_rank_vgg16-0.125_choose.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["share"] for row in rows} == {"1", "0.75", "0.5"}
    for budget in {row["budget"] for row in rows}:
        own = {row["share"]: row for row in rows if row["budget"] == budget}
        macs = [float(own[share]["prefix_macs"]) for share in ("1", "0.75", "0.5")]
        assert macs[0] > macs[1] > macs[2]
        assert float(own["1"]["error"]) == 0 < float(own["0.5"]["error"]) < 1
    assert "vgg16-0.125, choose images" in script.page(tmp_path).text()
