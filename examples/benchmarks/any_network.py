"""How much of any network can be removed: ours beside torch-pruning, network by network.

Networks of torchvision, timm and transformers get random weights and lose half of every group of
channels that can be sliced. Counted are the multiplications that go; compared are the sliced and
the masked network. torch-pruning's MetaPruner removes half of its groups beside it, at its
defaults, and counts as working if its network runs on two batch sizes. Each network has a process
of its own, so that none takes others along; finished rows are kept, and a second run goes on.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import halves
from .library import (
    check_sliced,
    check_traced,
    count_macs,
    find_groups,
    output_layer,
    slice_channels,
    trace,
)
from .record import RESULTS, Table, read

NAME = "any_network"
OURS, THEIRS = "sinfkit", "torch-pruning"
KEYS = ("network", "contestant")
VALUES = ("family", "pixels", "removed", "equal", "cpu_seconds", "whole", "error")
QUICK = ("torchvision.resnet18", "torchvision.squeezenet1_0")
N_OUTPUTS = 100

# Library, networks and the size of their images; small ones, where the network lets us choose.
FAMILIES: dict[str, str] = {
    "plain convolutions": """
        torchvision.alexnet/64 torchvision.vgg11_bn torchvision.squeezenet1_0 timm.vgg11_bn
        timm.darknet53 timm.repvgg_a0 timm.mobileone_s0 timm.cspdarknet53 timm.selecsls42
        timm.vovnet39a timm.hgnetv2_b0""",
    "residual": """
        torchvision.resnet18 torchvision.resnet50 torchvision.resnext50_32x4d
        torchvision.regnet_x_400mf torchvision.regnet_y_400mf torchvision.wide_resnet50_2
        timm.resnet26d timm.resnetv2_50 timm.seresnet50 timm.skresnet18 timm.resnest14d
        timm.res2net50_26w_4s timm.cspresnet50 timm.nf_resnet50 timm.gernet_s timm.regnetx_002
        timm.regnety_002 timm.tresnet_m timm.gcresnet33ts timm.legacy_senet154/32
        timm.ecaresnet26t timm.nfnet_l0 transformers.ResNet transformers.RegNet transformers.Bit""",
    "concatenation": """
        torchvision.densenet121 torchvision.googlenet torchvision.inception_v3/96 timm.dla34
        timm.dpn68 timm.hrnet_w18_small timm.inception_v4/96 timm.densenet121""",
    "mobile": """
        torchvision.mobilenet_v2 torchvision.mobilenet_v3_small torchvision.mnasnet0_5
        torchvision.shufflenet_v2_x0_5 torchvision.efficientnet_b0 torchvision.efficientnet_v2_s
        timm.efficientnet_b0 timm.efficientnet_lite0 timm.ghostnet_100 timm.hardcorenas_a
        timm.lcnet_050 timm.mixnet_s timm.mobilenetv3_small_100 timm.mobilenetv4_conv_small
        timm.repghostnet_050 timm.rexnet_100 timm.tf_efficientnetv2_b0 timm.tinynet_e
        timm.xception41 timm.fbnetv3_b timm.spnasnet_100
        transformers.MobileNetV1 transformers.MobileNetV2 transformers.EfficientNet""",
    "ConvNeXt and the like": """
        torchvision.convnext_tiny timm.convnext_atto timm.convnextv2_atto timm.convmixer_768_32/56
        timm.poolformer_s12 timm.inception_next_atto timm.rdnet_tiny timm.starnet_s1
        transformers.ConvNext transformers.ConvNextV2 transformers.PoolFormer
        transformers.FocalNet""",
    "vision transformers": """
        torchvision.vit_b_16/32 timm.vit_tiny_patch16_224/64 timm.deit_tiny_patch16_224/64
        timm.deit_tiny_distilled_patch16_224/64 timm.beit_base_patch16_224/32 timm.cait_xxs24_224/64
        timm.eva02_tiny_patch14_224/56 timm.mixer_s32_224/224 timm.gmlp_s16_224/224
        timm.resmlp_12_224/224 timm.xcit_nano_12_p16_224/64 timm.vit_relpos_small_patch16_224/64
        timm.vit_small_patch14_dinov2/56 transformers.ViT transformers.DeiT transformers.Beit
        transformers.Dinov2 transformers.ViTMSN transformers.Siglip""",
    "transformers in stages": """
        torchvision.swin_t torchvision.swin_v2_t torchvision.maxvit_t/224
        timm.swin_tiny_patch4_window7_224/224 timm.swinv2_cr_tiny_224/224 timm.pvt_v2_b0
        timm.twins_pcpvt_small timm.pit_ti_224/64 timm.crossvit_tiny_240/240 timm.davit_tiny
        timm.focalnet_tiny_srf timm.hiera_tiny_224/224 transformers.Swin/224 transformers.Swinv2
        transformers.Segformer transformers.Pvt transformers.PvtV2""",
    "convolutions and attention": """
        timm.coatnet_0_rw_224/224 timm.edgenext_xx_small timm.efficientformer_l1/224 timm.fastvit_t8
        timm.levit_128s/224 timm.visformer_tiny/224 timm.mobilevit_xxs timm.mobilevitv2_050
        timm.efficientvit_b0 timm.repvit_m0_9 timm.tiny_vit_5m_224/224
        timm.mobilenetv4_hybrid_medium timm.botnet26t_256/64 transformers.Levit
        transformers.MobileViT transformers.Cvt""",
}
INTRODUCTION = """\
Every network has random weights and loses half of every group of channels that can be sliced, but
for its outputs. The sliced network is compared with the masked one ("off the mask by", of the
largest output). A network counts as working if it runs. torch-pruning 1.6.1 (MetaPruner,
magnitude, ratio one half) is used at its defaults, the output layer left out; with hints by hand
(numbers of heads, say) it follows more. Images are small, to keep this short; that hardly changes
the shares. Random weights say nothing about
accuracy: that is what a budget with ``max_accuracy_drop`` is for.

"No answer" means none within a minute or two, on a machine that was busy with other work; it
counts as not working.

What stays whole is told by every fit in one line.
"""
# Smaller than their defaults, in everything that does not change what kind of network it is.
_SMALLER = {
    "num_hidden_layers": 4,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_attention_heads": 3,
}


def networks() -> dict[str, tuple[str, int]]:
    """Family and image size of each network."""
    found = {}
    for family, names in FAMILIES.items():
        for entry in names.split():
            name, _, size = entry.partition("/")
            found[name] = family, int(size or 64)
    return found


def build(name: str, size: int) -> tuple[nn.Module, torch.Tensor]:
    """A network with random weights, and two images."""
    library, _, kind = name.partition(".")
    torch.manual_seed(0)
    network: nn.Module
    if library == "torchvision":
        import torchvision

        options: dict[str, Any] = {"num_classes": N_OUTPUTS}
        options |= {"init_weights": False} if kind in ("googlenet", "inception_v3") else {}
        options |= {"image_size": size} if kind.startswith("vit") else {}
        network = getattr(torchvision.models, kind)(**options)
    elif library == "timm":
        import timm

        try:
            network = timm.create_model(kind, num_classes=N_OUTPUTS, img_size=size)
        except TypeError:  # it takes images of any size
            network = timm.create_model(kind, num_classes=N_OUTPUTS)
    else:
        network = _of_transformers(kind, size)
    for module in network.modules():  # fresh statistics would make the norms the identity
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in network.parameters():  # layer scale starts near zero, and hides its block
        vector = parameter.numel() == max(parameter.shape, default=1)
        if vector or float(parameter.detach().abs().max()) == 0:
            parameter.data.add_(torch.rand_like(parameter), alpha=0.5)
    return network.eval(), torch.randn(2, 3, size, size)


def _of_transformers(kind: str, size: int) -> nn.Module:
    """A small network of transformers; where sizes go by stages, those of its defaults."""
    import transformers

    make = getattr(transformers, f"{kind}Config")
    default = make()
    if kind == "Siglip":
        default = default.vision_config
    staged = hasattr(default, "depths") or hasattr(default, "hidden_sizes")
    names = ("image_size",) if staged else ("image_size", *_SMALLER)
    smaller = {**_SMALLER, "image_size": size}
    sizes = {k: smaller[k] for k in names if type(getattr(default, k, None)) is int}
    if kind == "Siglip":
        config = make(vision_config=sizes, num_labels=N_OUTPUTS)
    else:
        config = make(**sizes, num_labels=N_OUTPUTS)
    network: nn.Module = getattr(transformers, f"{kind}ForImageClassification")(config)
    return network


class Logits(nn.Module):
    """A network that returns a tensor, as torch-pruning wants it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The class scores."""
        output = self.network(x)
        scores: torch.Tensor = getattr(output, "logits", output)
        return scores


def ours(network: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Share of multiplications removed, and whether sliced equals masked."""
    start = time.process_time()
    graph = trace(network, x[:1])
    groups = find_groups(graph, x[:1], output_layer(graph, N_OUTPUTS))
    keep = {}
    for group in groups:
        run = group.n_channels // group.n_runs
        if not group.is_output and not group.reason_unsliceable and run > 1:
            half = [r * run + i for r in range(group.n_runs) for i in range(0, run, 2)]
            keep[group.name] = group.with_every_part(np.array(half))
    sliced = slice_channels(graph, x[:1], keep, groups=groups)
    seconds = time.process_time() - start
    check_traced(graph, network, x)
    difference = check_sliced(graph, sliced, x)
    macs, by_module = count_macs(graph, x[:1])
    whole: dict[str, float] = {}
    for group in groups:
        if group.reason_unsliceable:
            share = sum(by_module.get(layer, 0) for layer in group.layers) / macs
            whole[group.reason_unsliceable] = whole.get(group.reason_unsliceable, 0) + share
    largest = sorted(whole.items(), key=lambda item: -item[1])[:3]
    return {
        "removed": f"{1 - count_macs(sliced.model, x[:1])[0] / macs:.4f}",
        "equal": f"{difference:.1e}",
        "whole": "; ".join(f"{share:.0%} {why}" for why, share in largest if share >= 0.005),
        "cpu_seconds": f"{seconds:.1f}",
    }


def theirs(network: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """The same share by torch-pruning, if its network works."""
    import torch_pruning as tp

    network = Logits(network).eval()
    before = count_macs(network, x[:1])[0]
    layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    classes = [m for m in layers if len(m.weight) == N_OUTPUTS]
    start = time.process_time()
    pruner = tp.pruner.MetaPruner(
        network,
        x[:1],
        tp.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=classes[-1:],
    )
    pruner.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        if network(x).shape != (2, N_OUTPUTS) or network(x[:1]).shape != (1, N_OUTPUTS):
            raise ValueError("another shape")
    removed = 1 - count_macs(network, x[:1])[0] / before
    return {"removed": f"{removed:.4f}", "cpu_seconds": f"{seconds:.1f}"}


def one(name: str, contestant: str, answer: Connection) -> None:
    """Measure one network in a process of its own."""
    family, size = networks()[name]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        network, x = build(name, size)
        found = (ours if contestant == OURS else theirs)(network, x)
    except Exception as error:  # whatever it is, it is what this network's row says
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    answer.send({"family": family, "pixels": size, **found})


def compared(rows: Sequence[dict[str, str]]) -> dict[str, dict[str, dict[str, str]]]:
    """Rows by family and network, then by contestant; in the order of the families."""
    found: dict[str, dict[str, dict[str, str]]] = {family: {} for family in FAMILIES}
    for name, (family, _) in networks().items():
        both = {row["contestant"]: row for row in rows if row["network"] == name}
        if OURS in both:
            found[family][name] = both
    return {family: members for family, members in found.items() if members}


def summary(rows: Sequence[dict[str, str]]) -> list[list[str]]:
    """For each family: networks, what works and how much it removes, what stays whole with us."""
    lines = []
    for family, members in compared(rows).items():
        cells = [family, str(len(members))]
        for contestant in (OURS, THEIRS):
            shares = [_removed(both.get(contestant)) for both in members.values()]
            found = sorted(share for share in shares if share is not None)
            middle = f"{statistics.median(found):.0%} ({found[0]:.0%})" if found else ""
            cells += [str(len(found)), middle]
        lines.append([*cells, _whole(members.values())])
    return lines


def _whole(members: Iterable[dict[str, dict[str, str]]]) -> str:
    """What stays whole in a family, in shares of its networks' multiplications, largest first."""
    total: dict[str, float] = {}
    n = 0
    for both in members:
        n += 1
        for part in filter(None, both.get(OURS, {}).get("whole", "").split("; ")):
            share, _, why = part.partition(" ")
            why = re.sub(r" (the )?\w+ '[^']*'|'[^']*'", " one layer", why)
            total[why] = total.get(why, 0) + float(share.rstrip("%"))
    largest = sorted(total.items(), key=lambda item: -item[1])[:2]
    return "; ".join(f"{share / n:.1f} %: {why}" for why, share in largest if share / n >= 0.05)


def page(rows: Sequence[dict[str, str]]) -> str:
    """The documentation page: answer, families, networks."""
    families = compared(rows)
    both = [one for members in families.values() for one in members.values()]
    ours = [(_removed(one.get(OURS)), _removed(one.get(THEIRS))) for one in both]
    works = [share for share, _ in ours if share is not None]
    theirs = [share for _, share in ours if share is not None]
    tried = sum(THEIRS in one for one in both)
    behind = [t - o for o, t in ours if o is not None and t is not None]
    *others, last = sorted({row["network"].partition(".")[0] for row in rows})
    sources = " and ".join(filter(None, (", ".join(others), last)))
    title = "How much of any network can be removed?"
    answer = (
        f"**Of {len(both)} networks of {sources}, {len(works)} come out smaller, "
        f"half of every group of channels removed, with {statistics.median(works):.0%} of "
        f"the multiplications gone in the median; torch-pruning's result works on {len(theirs)}"
        f"{f' of {tried} tried' if tried < len(both) else ''}.** "
        f"{sum(share >= 0.68 for share in works)} lose at least 68 %. Where both work, ours is "
        f"behind by more than 3 points on {sum(b > 0.03 for b in behind)}, and ahead by as much on "
        f"{sum(b < -0.03 for b in behind)}."
    )
    parts = [title, "=" * len(title), "", answer, "", INTRODUCTION]
    trained = read(RESULTS / f"{halves.NAME}.csv")
    if trained:
        parts += [f"{halves.answer(trained)} ``python -m benchmarks {halves.NAME}``", ""]
    parts += [".. list-table::"]
    parts += ["   :header-rows: 1", ""]
    header = ["family", "networks", "sinfkit works on", "removes, median (least)"]
    header += [
        "torch-pruning works on",
        "removes, median (least)",
        "stays whole with sinfkit, mean",
    ]
    for line in (header, *summary(rows)):
        parts += [f"   {'* -' if i == 0 else '  -'} {c}".rstrip() for i, c in enumerate(line)]
    for family, members in families.items():
        parts += ["", family, "-" * len(family), "", ".. list-table::", "   :header-rows: 1", ""]
        cells = [["network", "pixels", "sinfkit", "torch-pruning", "off the mask by", "CPU s"]]
        for name, one in members.items():
            row = one.get(OURS, {})
            cells.append([name, row.get("pixels", ""), _told(one.get(OURS))])
            cells[-1] += [_told(one.get(THEIRS)), row.get("equal", ""), row.get("cpu_seconds", "")]
        for line in cells:
            parts += [f"   {'* -' if i == 0 else '  -'} {c}".rstrip() for i, c in enumerate(line)]
    return "\n".join([*parts, "", "``python -m benchmarks any_network``", ""])


def _told(row: dict[str, str] | None) -> str:
    """A share, or that there is none."""
    share = _removed(row)
    if share is not None:
        return f"{share:.1%}"
    if row is None:
        return "not tried"
    return "no answer" if row and row["error"].startswith("no answer") else "fails"


def _removed(row: dict[str, str] | None) -> float | None:
    """Share of multiplications removed, where it worked."""
    return float(row["removed"]) if row and row["removed"] else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing in the file of results, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(networks()), help="library.name")
    parser.add_argument("--contestants", nargs="+", default=[OURS, THEIRS])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--quick", action="store_true", help="two small networks only")
    parser.add_argument("--show", action="store_true", help="only print what was found")
    parser.add_argument("--page", type=Path, help="write what was found as a page")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one network")
    options = parser.parse_args(arguments)
    table = Table(options.out / f"{NAME}.csv", KEYS, VALUES)
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    names = [] if options.show else list(QUICK) if options.quick else options.networks
    for name in names:
        for contestant in options.contestants:
            row = {"network": name, "contestant": contestant}
            if row in table:
                continue
            __import__(name.partition(".")[0])
            if contestant == THEIRS:
                __import__("torch_pruning")
            listening, answer = context.Pipe(duplex=False)
            process = context.Process(target=one, args=(name, contestant, answer))
            process.start()
            answer.close()
            try:
                found = listening.recv() if listening.poll(options.timeout) else None
            except EOFError:
                found = None
            process.kill()
            process.join()
            found = found or {"family": networks()[name][0], "error": "no answer in time"}
            table.add(**{**row, **found})
            print(*row.values(), *found.values(), sep=" | ", flush=True)
    rows = read(table.path)
    print("\n".join(" | ".join(line) for line in summary(rows)))
    if options.page:
        options.page.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
