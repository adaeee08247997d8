"""Networks, data sets and training to try the package with."""

from .datasets import (
    CIFAR100_SUPERCLASSES,
    ImageDataset,
    load_cifar10,
    load_cifar100,
    load_image_folder,
)
from .networks import default_network, resnet50, vgg16, vgg19
from .training import train_network

__all__ = [
    "CIFAR100_SUPERCLASSES",
    "ImageDataset",
    "default_network",
    "load_cifar10",
    "load_cifar100",
    "load_image_folder",
    "resnet50",
    "train_network",
    "vgg16",
    "vgg19",
]
