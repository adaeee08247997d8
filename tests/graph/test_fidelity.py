"""A graph is compared with its network, and samples alone with samples together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sinfkit.graph import check_traced, trace


class Shifted(nn.Module):
    """Adds a number that grows with the batch, and takes it away or not."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.layer, self.share = nn.Linear(4, 3), share

    def forward(self, x: Tensor) -> Tensor:
        much = 1e6 * x.shape[0]
        return self.layer(x) + much - self.share * much


def test_rounding_is_told_from_what_hangs_on_the_batch() -> None:
    x = torch.randn(4, 4)
    rounded, dependent = Shifted(1.0).eval(), Shifted(0.999).eval()
    check_traced(trace(rounded, x), rounded, x)  # off by some hundredths in float32
    with pytest.raises(ValueError, match="depends on the others"):
        check_traced(trace(dependent, x), dependent, x)
