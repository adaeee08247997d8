"""Train a base network for the tables, on all images but every tenth of each class.

For example::

    python train.py --network vgg16 --width 0.5 --epochs 14 --data ~/images --out vgg16_half.pt

A checkpoint after every epoch lets a stopped training go on. The file has half-precision weights,
with what the tables need to know about them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import study as base
import torch

MAX_LR = {"vgg19": 0.05}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure on the images that were held out, store."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    if options.quick:
        images = base.made_up_images(40, seed=0)
        held = (torch.arange(len(images)) % 10 == 9).numpy()
    else:
        if options.data is None:
            raise SystemExit("give --data (or SINFKIT_DATA), or --quick")
        images = base.load_part(Path(options.data), "train")
        held = base.places(images) % 10 == 9
    network = base.train_base(
        options.network,
        options.width,
        base.take(images, ~held),
        epochs=options.epochs,
        seed=options.seed,
        stem=options.stem if options.network == "resnet50" else None,
        max_lr=MAX_LR.get(options.network, 0.1),
        checkpoint=options.out.with_suffix(".ckpt"),
        device=options.device,
        verbose=1,
    )
    unseen = base.take(images, held)
    right = base.accuracy(network, unseen.X, unseen.y)
    save(network, options.out, right, options.stem)
    print(f"{options.out}: {right:.1%} on the images held out")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--network", choices=sorted(base.NETWORKS), default="vgg16")
    parser.add_argument("--width", type=float, default=1.0, help="factor on all channels")
    parser.add_argument(
        "--stem", choices=("cifar", "half"), default="half", help="of ResNet50: stride 1 or 2"
    )
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=os.environ.get("SINFKIT_DATA"))
    parser.add_argument("--quick", action="store_true", help="made-up images, a tiny network")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="file of the weights")
    options = parser.parse_args(arguments)
    if options.quick:
        options.width, options.epochs = min(options.width, 0.125), min(options.epochs, 2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    return options


def save(network: base.Base, path: Path, held_out_accuracy: float, stem: str) -> None:
    """Write what `study.load_base` reads."""
    weights = network.model.module().state_dict()
    stored: dict[str, Any] = {
        "state_dict": {k: v.half() if v.is_floating_point() else v for k, v in weights.items()},
        "mean": list(network.model.mean or ()),
        "std": list(network.model.std or ()),
        "network": network.network,
        "width": network.width,
        "epochs": network.epochs,
        "seed": network.seed,
        "held_out": True,
        "held_out_accuracy": held_out_accuracy,
    }
    if network.network == "resnet50":
        stored["stem"] = stem
    part = path.with_suffix(".part")
    torch.save(stored, part)
    part.replace(path)  # whole or not at all


if __name__ == "__main__":
    main()
