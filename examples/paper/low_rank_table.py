"""Closed-form low rank in a prefix that is sliced already: does it save time, and at what price?

Convolutions of a routed network's prefix become products of two, see
`sinfkit.repair.low_rank`. Router and subgraphs stay as they were: what
`SINFClassifier(prefix_low_rank=...)`, which fits them anew, would lose is no more than this. What
it costs and saves stands beside slicing to a smaller budget::

    python low_rank_table.py --weights vgg16.pt --data ~/images --fitted fits
    python low_rank_table.py --quick

Networks are those that ``sinf_table.py`` stored in the folder ``--fitted``. Images: the choosing
ones, since this is about which of two ways to choose. Let nothing else run beside it.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contestants as rivals
import rst
import sinf_table
import study as base
import torch
from record import LOW_RANK, Table, files, read
from torch import Tensor
from tqdm.auto import tqdm

from sinfkit.graph import count_macs, paired_latency
from sinfkit.inference import SINFNetwork
from sinfkit.repair import factorize

NAME = "low_rank"
KEYS = ("network", "width", "base_seed", "split", "budget", "share")
VALUES = ("images", "right", "prefix_macs", "error", "ms", "ratio", "ratio_low", "ratio_high")
SHARES = (1.0, 0.75, 0.5, 0.35)  # of the prefix's multiplications that stay; 1: as it is
_IMAGES = 1024  # for the fit, and as many for the error
_ROUNDS = 21


def main(arguments: Sequence[str] | None = None) -> None:
    """Factorise, measure, write down."""
    parser = base.parser(__doc__)
    parser.add_argument("--fitted", type=Path, default=Path("fitted"), help="folder of networks")
    options = parser.parse_args(arguments)
    if options.quick:
        options.fitted = options.out / "fitted"
    table_options = argparse.Namespace(
        **vars(sinf_table.parse([])) | vars(options) | {"kinds": [], "no_search": True}
    )
    held = base.open_study(options)
    path = options.out / f"{NAME}_{held.base.label}_{held.split}.csv"
    table = Table(path, KEYS, VALUES, held.constants())
    rows = held.draw(range(len(held.class_names)), -(-_IMAGES // len(held.class_names)), 0)
    networks: dict[tuple[str, float], SINFNetwork] = {}
    errors = {}
    x, fresh = (torch.cat(list(held.batches(X))) for X in (held.X[rows], held.X_test[:_IMAGES]))
    for entry in tqdm(list(sinf_table.entries_of(table_options, held)), unit=" networks"):
        if entry.contestant != "SINF" or LOW_RANK in entry.kind:
            continue
        network = sinf_table.fitted(table_options, entry, held)[0].network_
        for share in SHARES:
            made = factorized(network, share, x)
            networks[entry.size, share] = made
            errors[entry.size, share] = error(network, made, fresh)
    measure(table, networks, errors, held, 3 if options.quick else _ROUNDS)
    print(path)


def measure(
    table: Table,
    networks: dict[tuple[str, float], SINFNetwork],
    errors: dict[tuple[str, float], float],
    held: base.Study,
    rounds: int,
) -> None:
    """Time all in turns with the base, and count their right answers."""
    plain = rivals.Plain(rivals.normaliser(held), held.base.model.module())
    batch = next(rivals.raw(held.X_test[:256]))
    runs: dict[Any, Any] = {key: lambda n=network: n(batch) for key, network in networks.items()}
    latency = paired_latency({"base": lambda: plain(batch), **runs}, repeats=rounds)
    normalise = rivals.normaliser(held)
    example = normalise(batch[:1])
    for (budget, share), network in networks.items():
        key = {**held.key(), "budget": budget, "share": f"{share:g}"}
        if key in table:
            continue
        right = rivals.right_answers(network, held)
        low, high = latency.ratio_quartiles((budget, share), "base")
        whole = count_macs(plain.module, example)[0]
        table.add(
            **key,
            images=len(right),
            right=int(right.sum()),
            prefix_macs=f"{count_macs(network.prefix, example)[0] / whole:.4f}",
            error=f"{errors[budget, share]:.4f}",
            ms=f"{1e3 * latency.median[budget, share]:.2f}",
            ratio=f"{latency.ratio((budget, share), 'base'):.4f}",
            ratio_low=f"{low:.4f}",
            ratio_high=f"{high:.4f}",
        )


def factorized(network: SINFNetwork, share: float, x: Tensor) -> SINFNetwork:
    """A copy whose prefix has layers of low rank; the rest is shared, and as it was.

    Parameters
    ----------
    network : SINFNetwork
    share : float
        Of the prefix's multiplications that stay.
    x : Tensor of shape (n_samples, channels, height, width)
        Normalised images, on whose outputs the layers are fitted.
    """
    made = copy.copy(network)
    made._modules = dict(network._modules)
    made.prefix = factorize(network.prefix, share, x).to(memory_format=torch.channels_last)
    return made


def error(network: SINFNetwork, made: SINFNetwork, x: Tensor) -> float:
    """Squared error of the prefix's output over its variance."""
    with torch.inference_mode():
        expected, found = network.prefix(x), made.prefix(x)
    return float((found - expected).square().sum() / (expected - expected.mean(0)).square().sum())


def page(folder: Path) -> rst.Page | None:
    """The page, from all files in a folder."""
    body = []
    for path, network, split in files(folder, NAME):
        rows = read(path)
        if not rows:
            continue
        body += [rst.section(f"{network}, {split} images"), rst.provenance(rows)]
        cells = [
            [
                row["budget"],
                row["share"],
                rst.percent(float(row["prefix_macs"])),
                rst.percent(float(row["error"])),
                f"{100 * int(row['right']) / int(row['images']):.1f}",
                f"{1 / float(row['ratio']):.2f} [{1 / float(row['ratio_high']):.2f}, "
                f"{1 / float(row['ratio_low']):.2f}]",
            ]
            for row in rows
        ]
        header = ["budget", "multiplications that stay", "prefix (% of the base)"]
        header += ["error of its output (%)", "accuracy (%)", "speed-up [quartiles]"]
        body.append(rst.list_table(header, cells))
    return rst.Page(NAME, "Low rank in the prefix", "\n".join([_NOTE, *body])) if body else None


_NOTE = """\
Routed networks whose prefix was sliced under a budget, and the same with convolutions of the prefix
replaced by products of two (:func:`~sinfkit.repair.factorize`), so that a share of its
multiplications stays; 1 is the network as it is. Router and subgraphs are not fitted anew, as
``SINFClassifier(prefix_low_rank=...)`` does. Error: squared, of the prefix's output, over its
variance. Compare a smaller share with the next smaller budget. Batch 256.

``python examples/paper/low_rank_table.py --weights WEIGHTS --data FOLDER``
"""


if __name__ == "__main__":
    main()
