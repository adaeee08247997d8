"""How much memory a fit on many large images takes.

The images are made when they are asked for, as a folder's are read, so that what is measured is the
fit. A process of its own loads torch and sinfkit, notes what it holds, fits, and notes its peak.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .library import pruner
from .record import RESULTS, Table

NAME = "memory"
KEYS = ("network", "images", "pixels", "repair_samples")
VALUES = ("before_mb", "peak_mb", "seconds")


class Noise(Dataset[Any]):
    """Images of shape (3, pixels, pixels), uint8, the same each time."""

    def __init__(self, n: int, pixels: int) -> None:
        self.n, self.pixels = n, pixels

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        rng = np.random.default_rng(index)
        coarse = rng.integers(0, 256, (3, 14, 14), dtype=np.uint8)
        times = -(-self.pixels // 14)
        image = coarse.repeat(times, 1).repeat(times, 2)[:, : self.pixels, : self.pixels]
        return torch.from_numpy(image), index % 10


def held() -> float:
    """Largest size of this process so far, in MB."""
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 1e6


def measure(network: str, n: int, pixels: int, samples: int, threads: int, answer: Any) -> None:
    """Fit, and send what it took."""
    import torchvision

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = getattr(torchvision.models, network)(num_classes=10)
    fitted = pruner(
        model, criterion="obs", budget=0.5, repair_samples=samples, batch_size=32, random_state=0
    )
    before, start = held(), time.perf_counter()
    fitted.fit(Noise(n, pixels), np.arange(n) % 10)
    answer.send((before, held(), time.perf_counter() - start))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="squeezenet1_1", help="of torchvision")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--repair-samples", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--quick", action="store_true", help="few small images")
    options = parser.parse_args(arguments)
    n, pixels = (60, 64) if options.quick else (options.images, options.pixels)
    context = multiprocessing.get_context("spawn")
    listening, answer = context.Pipe(duplex=False)
    given = options.network, n, pixels, options.repair_samples, options.threads, answer
    process = context.Process(target=measure, args=given)
    process.start()
    answer.close()
    before, peak, seconds = listening.recv()
    process.join()
    row = {"network": options.network, "images": n, "pixels": pixels}
    row["repair_samples"] = options.repair_samples
    table = Table(options.out / f"{NAME}.csv", KEYS, VALUES)
    table.add(**row, before_mb=f"{before:.0f}", peak_mb=f"{peak:.0f}", seconds=f"{seconds:.0f}")
    print(f"{row}: {before:.0f} MB with torch loaded, at most {peak:.0f} MB in {seconds:.0f} s")


if __name__ == "__main__":
    main()
