"""Train a base network for the tables, on all images but every tenth of each class.

A checkpoint after every epoch lets a stopped training go on. The file has half-precision weights,
and what the tables need to know about them::

    python -m benchmarks train --network vgg16 --epochs 30 --file vgg16.pt
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .library import train_network
from .study import NETWORKS, load_parts, made_up_images, parser, places, raw_batches

MAX_LR = {"vgg19": 0.05}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure on the images that were held out, store."""
    made = parser(__doc__)
    made.add_argument("--file", type=Path, required=True, help="file of the weights")
    made.add_argument("--width", type=float, default=1.0, help="factor on all channels")
    made.add_argument("--stem", choices=("cifar", "half"), default="half", help="of ResNet50")
    made.add_argument("--epochs", type=int, default=30)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--device", default="auto")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.quick:
        options.network, options.epochs = "tiny", min(options.epochs, 2)
        (X, y), n_classes = made_up_images(40, 0), 8
    else:
        if options.data is None:
            raise SystemExit("give --data (or SINFKIT_DATA), or --quick")
        images = load_parts(options.data)[0]
        X, y, n_classes = images.X, images.y, len(images.class_names)
    held = places(y) % 10 == 9
    mean = (X[~held].mean((0, 2, 3), dtype=np.float64) / 255).tolist()
    std = (X[~held].std((0, 2, 3), dtype=np.float64) / 255).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        stem = {"stem": options.stem} if options.network == "resnet50" else {}
        module = NETWORKS[options.network][0](n_classes, width=options.width, **stem)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    trained = train_network(
        module,
        X[~held],
        y[~held],
        epochs=options.epochs,
        batch_size=32 if options.quick else 128,
        max_lr=MAX_LR.get(options.network, 0.1),
        augment="crop_flip",
        mean=mean,
        std=std,
        checkpoint=options.file.with_suffix(".ckpt"),
        device=options.device,
        random_state=options.seed,
        verbose=int(not options.quick),
    )
    trained = trained.cpu().eval()
    shape = (1, -1, 1, 1)
    with torch.inference_mode():
        answers = [
            trained((x - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape))
            for x in raw_batches(X[held])
        ]
    right = float((torch.cat(answers).argmax(1).numpy() == y[held]).mean())
    weights = trained.state_dict().items()
    stored = {
        "state_dict": {k: v.half() if v.is_floating_point() else v for k, v in weights},
        **{"mean": mean, "std": std, "network": options.network, "width": options.width, **stem},
        **{"epochs": options.epochs, "seed": options.seed, "held_out": True},
        "held_out_accuracy": right,
    }
    part = options.file.with_suffix(".part")
    torch.save(stored, part)
    part.replace(options.file)  # whole or not at all
    print(f"{options.file}: {right:.1%} on the images held out")
