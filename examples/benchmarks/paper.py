"""The paper's figures (arXiv 2310.01259, CIFAR-100), to stand beside ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """What the paper reports for one network; points are percentage points."""

    speedup: float  # base's time over SINF's
    lost: float  # points of accuracy, all classes
    dcs_ahead: float  # points by which DCS leads the other scores, at most
    cluster_gain: float  # points, subgraph of a cluster over the base on its classes


CLAIMS: Mapping[str, Claim] = {
    "vgg16": Claim(1.41, 3.75, 3.65, 5.73),
    "vgg19": Claim(1.54, 0.17, 4.25, 8.38),
    "resnet50": Claim(1.18, 6.75, 2.36, 6.36),
}
TVSPRUNE_AHEAD = 8.13  # points, VGG16, with 5.82 % fewer parameters than TVSPrune's network
