"""How much of any network can be removed: ours beside torch-pruning, network by network.

Each network of torchvision and timm gets random weights and loses half of every group of channels
that can be sliced. Counted are the multiplications that go; compared are the sliced network and the
masked one. torch-pruning's MagnitudePruner removes half of its groups beside it, at its defaults,
and counts as working if its network runs on two batch sizes. Every network has a process of its
own, so that none takes others along; finished rows are kept, and a second run goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

FIELDS = "network pixels ours theirs equal whole seconds ours_says theirs_says".split()
RESULTS = Path(__file__).parent / "results" / "any_network.csv"
SIZES = {"inception_v3": 128, "vit": 224, "swin": 224, "deit": 224, "mixer": 224, "maxvit": 224}
DEFAULT_SIZE = 64

TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 "
    "maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 "
    "resnet50 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0 swin_t swin_v2_t vgg11_bn vit_b_16"
).split()
TIMM = (
    "beit_base_patch16_224 cait_xxs24_224 coatnet_0_rw_224 convmixer_768_32 convnext_atto "
    "convnextv2_atto crossvit_tiny_240 cspdarknet53 cspresnet50 darknet53 deit_tiny_patch16_224 "
    "densenet121 dla34 dpn68 edgenext_xx_small efficientformer_l1 efficientnet_b0 "
    "efficientnet_lite0 eva02_tiny_patch14_224 fastvit_t8 gcresnet33ts gernet_s ghostnet_100 "
    "hardcorenas_a hgnet_tiny hrnet_w18_small inception_v4 lcnet_050 legacy_senet154 levit_128s "
    "mixer_b16_224 mixnet_s mnasnet_100 mobilenetv2_100 mobilenetv3_small_100 "
    "mobilenetv4_conv_small mobileone_s0 nf_resnet50 nfnet_l0 pit_ti_224 poolformer_s12 "
    "pvt_v2_b0 regnetx_002 regnety_002 repghostnet_050 repvgg_a0 res2net50_26w_4s resnest14d "
    "resnet18 resnet26d resnetv2_50 resnext50_32x4d rexnet_100 selecsls42 seresnet50 "
    "skresnet18 swin_tiny_patch4_window7_224 tf_efficientnetv2_b0 tinynet_e tresnet_m "
    "twins_pcpvt_small vgg11_bn visformer_tiny vit_tiny_patch16_224 vovnet39a wide_resnet50_2 "
    "xception41 xcit_nano_12_p16_224"
).split()
NAMES = [f"torchvision.{n}" for n in TORCHVISION] + [f"timm.{n}" for n in TIMM]


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network with random weights, and one image."""
    library, _, kind = name.partition(".")
    size = next((s for part, s in SIZES.items() if part in kind), DEFAULT_SIZE)
    size = next((s for s in (224, 240) if kind.endswith(f"_{s}")), size)
    torch.manual_seed(0)
    if library == "torchvision":
        import torchvision

        options = {"init_weights": True} if kind in ("googlenet", "inception_v3") else {}
        network = getattr(torchvision.models, kind)(**options)
    else:
        import timm

        network = timm.create_model(kind, num_classes=1000)
    for module in network.modules():  # fresh statistics would make the norms the identity
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval(), torch.randn(2, 3, size, size)


def ours(network: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Share of multiplications removed, and whether sliced equals masked."""
    from sinfkit.graph import check_traced, count_macs, output_layer, trace
    from sinfkit.slicing import check_sliced, find_groups, slice_channels

    start = time.perf_counter()
    graph = trace(network, x[:1])
    check_traced(graph, network, x)
    groups = find_groups(graph, x[:1], output_layer(graph, network(x[:1]).shape[1]))
    keep = {}
    for group in groups:
        run = group.n_channels // group.n_runs
        if not group.is_output and not group.reason_unsliceable and run > 1:
            half = range((run + 1) // 2)
            keep[group.name] = [r * run + i for r in range(group.n_runs) for i in half]
    sliced = slice_channels(graph, x[:1], keep, groups=groups)
    seconds = time.perf_counter() - start
    macs, by_module = count_macs(graph, x[:1])
    difference = check_sliced(graph, sliced, x)
    whole: dict[str, float] = {}
    for group in groups:
        if group.reason_unsliceable:
            share = sum(by_module.get(layer, 0) for layer in group.layers) / macs
            whole[group.reason_unsliceable] = whole.get(group.reason_unsliceable, 0) + share
    largest = sorted(whole.items(), key=lambda item: -item[1])[:3]
    return {
        "ours": f"{1 - count_macs(sliced.model, x[:1])[0] / macs:.4f}",
        "equal": f"{difference:.1e}",
        "whole": "; ".join(f"{share:.0%} {why}" for why, share in largest),
        "seconds": f"{seconds:.1f}",
    }


def theirs(network: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """The same share by torch-pruning, if its network works."""
    import torch_pruning as tp

    from sinfkit.graph import count_macs

    before = count_macs(network, x[:1])[0]
    last = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    classes = [m for m in last if getattr(m, "out_features", getattr(m, "out_channels", 0)) == 1000]
    pruner = tp.pruner.MagnitudePruner(
        network,
        x[:1],
        tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=classes[-1:],
    )
    pruner.step()
    with torch.no_grad():
        if network(x).shape != (2, 1000) or network(x[:1]).shape != (1, 1000):
            raise ValueError("another shape")
    return {"theirs": f"{1 - count_macs(network, x[:1])[0] / before:.4f}"}


def one(name: str) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = dict.fromkeys(FIELDS, "")
    warnings.simplefilter("ignore")
    for side, measure in (("ours", ours), ("theirs", theirs)):
        try:
            network, x = build(name)
            row |= {"network": name, "pixels": x.shape[-1], **measure(network, x)}
        except Exception as error:
            row[f"{side}_says"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return row | {"network": name}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing in the file of results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NAMES, help="library.name")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="four small networks only")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one network")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(one(options.one)))
        return
    names = options.networks
    if options.quick:
        names = ["torchvision.resnet18", "torchvision.mobilenet_v2", "torchvision.squeezenet1_0"]
    rows = list(csv.DictReader(options.out.open())) if options.out.exists() else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        if any(row["network"] == name for row in rows):
            continue
        command = [sys.executable, __file__, "--one", name]
        try:
            told = subprocess.run(
                command, capture_output=True, text=True, timeout=options.timeout, check=True
            )
            rows.append(json.loads(told.stdout.splitlines()[-1]))
        except (subprocess.SubprocessError, ValueError, IndexError) as error:
            rows.append(
                dict.fromkeys(FIELDS, "") | {"network": name, "ours_says": type(error).__name__}
            )
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        print(*(f"{rows[-1][field]}" for field in FIELDS), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
