"""Semantic Inference: run only the part of a trained network that an input needs."""

from ._version import __version__
from .classifier import SINFClassifier
from .clusterer import SemanticClusterer
from .datasets import load_cifar10, load_cifar100, load_image_folder
from .display import (
    ClusterTreeDisplay,
    FilterOverlapDisplay,
    FilterScoreDisplay,
    RouteConfusionDisplay,
    SpeedAccuracyDisplay,
)
from .frozen import FrozenModel
from .models import resnet50, vgg16, vgg19
from .pruner import DCSPruner
from .report import SINFReport
from .scores import discriminative_capability
from .storage import StorageError, load
from .surgery import SlicingError
from .training import train_network

__all__ = [
    "ClusterTreeDisplay",
    "DCSPruner",
    "FilterOverlapDisplay",
    "FilterScoreDisplay",
    "FrozenModel",
    "RouteConfusionDisplay",
    "SINFClassifier",
    "SINFReport",
    "SemanticClusterer",
    "SlicingError",
    "SpeedAccuracyDisplay",
    "StorageError",
    "__version__",
    "discriminative_capability",
    "load",
    "load_cifar10",
    "load_cifar100",
    "load_image_folder",
    "resnet50",
    "train_network",
    "vgg16",
    "vgg19",
]
