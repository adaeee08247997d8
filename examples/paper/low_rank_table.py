"""Closed-form low rank in a prefix that is sliced already: does it save time, and for what?.

Each convolution of a routed network's prefix, but the first, becomes two: the same kernel with
fewer outputs, then 1 x 1 back to all of them, on the leading principal components of its outputs
(Zhang et al., "Accelerating very deep convolutional networks", TPAMI 2016, without the
nonlinearity). What it costs and saves stands beside slicing to a smaller budget::

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
from record import Table, files, read
from torch import Tensor, fx, nn
from tqdm.auto import tqdm

from sinfkit.network import SINFNetwork
from sinfkit.profiling import count_macs, fold_batch_norm, paired_latency

NAME = "low_rank"
KEYS = ("network", "width", "base_seed", "split", "budget", "share")
VALUES = ("images", "right", "prefix_macs", "error", "ms", "ratio", "ratio_low", "ratio_high")
SHARES = (1.0, 0.75, 0.5)  # of a layer's multiplications that its two factors have; 1: as it is
_IMAGES = 1024  # for the components
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
    for entry in tqdm(list(sinf_table.entries_of(table_options, held)), unit=" networks"):
        if entry.contestant != "SINF":
            continue
        network = sinf_table.fitted(table_options, entry, held)[0].network_
        for share in SHARES:
            made, error = factorised(network, share, held.X[rows])
            networks[entry.size, share], errors[entry.size, share] = made, error
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


def factorised(network: SINFNetwork, share: float, X: Any) -> tuple[SINFNetwork, float]:
    """A copy whose prefix has two factors for each convolution.

    Parameters
    ----------
    network : SINFNetwork
    share : float
        Multiplications of both factors over those of the layer; 1 leaves all layers whole.
    X : uint8 ndarray of shape (n_samples, channels, height, width)
        Images whose outputs have the components.

    Returns
    -------
    network : SINFNetwork
        The rest is shared.
    error : float
        Largest relative squared error of a layer's output.
    """
    made = copy.copy(network)
    made._modules = dict(network._modules)
    prefix = fold_batch_norm(copy.deepcopy(network.prefix)).eval()
    largest = 0.0
    with torch.inference_mode():
        x = torch.cat([network.normalise(batch) for batch in rivals.raw(X)])
    names = [n for n, m in prefix.named_modules() if isinstance(m, nn.Conv2d)][1:]
    for name in names if share < 1 else []:
        layer = prefix.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        pair, error = factors(layer, outputs(prefix, name, x), share)
        prefix.set_submodule(name, pair)
        largest = max(largest, error)
    made.prefix = prefix.to(memory_format=torch.channels_last)
    return made, largest


def outputs(prefix: fx.GraphModule, name: str, x: Tensor) -> Tensor:
    """A layer's outputs at all positions, of shape (n_positions, n_channels)."""
    seen: list[Tensor] = []
    layer = prefix.get_submodule(name)
    hook = layer.register_forward_hook(
        lambda _m, _i, out: seen.append(out[:, :, ::2, ::2].movedim(1, 3).flatten(0, 2))
    )
    with torch.inference_mode():
        for batch in x.split(128):
            prefix(batch)
    hook.remove()
    return torch.cat(seen)


def factors(layer: nn.Conv2d, y: Tensor, share: float) -> tuple[nn.Sequential, float]:
    """Two convolutions for one, and the relative squared error of their outputs on `y`."""
    inputs = layer.weight[0].numel()
    rank = max(1, int(share * layer.out_channels * inputs / (inputs + layer.out_channels)))
    mean = y.double().mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(y.double().T))
    u = vectors[:, -rank:]
    error = float(values[:-rank].sum() / values.sum())
    options = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    narrow = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **options)
    back = nn.Conv2d(rank, layer.out_channels, 1)
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.double()
    with torch.no_grad():
        narrow.weight.copy_(torch.einsum("or,oihw->rihw", u, layer.weight.double()))
        back.weight.copy_(u[:, :, None, None])
        back.bias.copy_(u @ (u.T @ (bias - mean)) + mean)
    return nn.Sequential(narrow, back).eval().requires_grad_(False), error


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
        header = ["budget", "multiplications of the factors", "prefix (% of the base)"]
        header += ["largest error of a layer (%)", "accuracy (%)", "speed-up [quartiles]"]
        body.append(rst.list_table(header, cells))
    return rst.Page(NAME, "Low rank in the prefix", "\n".join([_NOTE, *body])) if body else None


_NOTE = """\
Routed networks whose prefix was sliced under a budget, and the same with each convolution of the
prefix replaced by two, on the leading principal components of its outputs. Factors with a share of
1 are the network as it is. Compare a smaller share with the next smaller budget. Batch 256.

``python examples/paper/low_rank_table.py --weights WEIGHTS --data FOLDER``
"""


if __name__ == "__main__":
    main()
