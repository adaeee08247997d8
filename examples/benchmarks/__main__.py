"""The one command: ``python -m benchmarks TABLE [options]``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

TABLES = {
    "train": ("train", "train a base network, every tenth image held out"),
    "main": ("main_table", "accuracy lost at a measured speed, all contestants"),
    "criteria": ("criteria", "DCS against other filter scores, by repair; TVSPrune"),
    "per_cluster": ("per_cluster", "accuracy cluster by cluster, with the restricted base"),
    "routing": ("routing", "where routing pays: cut, clusters, known context"),
    "exits": ("exits", "whether several exits would do better than one"),
    "sharing": ("sharing", "how much similar inputs share filters, by depth"),
    "promise": ("promise_simulation", "the promise on synthetic losses: how often it is broken"),
    "promise_fits": ("promise_fits", "the promise on real fits: how often it is broken"),
    "any_network": ("any_network", "how much of any network can be removed, beside torch-pruning"),
    "halves": ("halves", "half of trained networks: what least squares brings back"),
    "efficientnet": (
        "efficientnet",
        "EfficientNet-Lite0 with its weights, 20 classes and 1,000",
    ),
    "memory": ("memory", "how much memory a fit on many large images takes"),
    "front": ("front", "loss against time: every form, batch size and number of threads"),
    "distill": ("distill", "what minutes of training without labels win back"),
    "fit_cost": ("fit_cost", "time of a fit by images, classes and clusters"),
    "fit_profile": ("fit_profile", "how many files and functions a call of fit touches"),
    "workers": ("workers", "what Dask's workers cost: bytes and seconds"),
    "pages": ("pages", "answers, tables and figures of all results, as documentation pages"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one table."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name not in TABLES:
        lines = [f"  {table:13} {what}" for table, (_, what) in TABLES.items()]
        print("\n".join(["python -m benchmarks TABLE [options]; TABLE --help says more", *lines]))
        raise SystemExit(0 if name in ("", "-h", "--help") else 2)
    importlib.import_module(f"{__package__}.{TABLES[name][0]}").main(rest)


if __name__ == "__main__":
    main()
