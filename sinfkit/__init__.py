"""Semantic Inference: run only the part of a trained network that an input needs."""

from .classifier import SINFClassifier
from .clusterer import SemanticClusterer
from .criteria.discriminability import discriminative_capability
from .display import (
    ClusterTreeDisplay,
    FilterOverlapDisplay,
    FilterScoreDisplay,
    RouteConfusionDisplay,
    SpeedAccuracyDisplay,
)
from .errors import (
    CalibrationWarning,
    OutOfReachError,
    PromiseWarning,
    SinfkitError,
    SinfkitWarning,
    SlicingError,
    SlicingWarning,
    StorageError,
)
from .frozen import FrozenModel
from .inference.report import PruningReport, SINFReport
from .persistence.estimators import load, save
from .pruner import DCSPruner
from .pruning.recipe import PruningOptions
from .repair.distillation import Distillation
from .routing.study import RoutingOptions
from .version import __version__
from .zoo.datasets import load_cifar10, load_cifar100, load_image_folder
from .zoo.networks import resnet50, vgg16, vgg19
from .zoo.training import train_network

__all__ = [
    "CalibrationWarning",
    "ClusterTreeDisplay",
    "DCSPruner",
    "Distillation",
    "FilterOverlapDisplay",
    "FilterScoreDisplay",
    "FrozenModel",
    "OutOfReachError",
    "PromiseWarning",
    "PruningReport",
    "RouteConfusionDisplay",
    "RoutingOptions",
    "PruningOptions",
    "SINFClassifier",
    "SINFReport",
    "SemanticClusterer",
    "SinfkitError",
    "SinfkitWarning",
    "SlicingError",
    "SlicingWarning",
    "SpeedAccuracyDisplay",
    "StorageError",
    "__version__",
    "discriminative_capability",
    "load",
    "load_cifar10",
    "load_cifar100",
    "load_image_folder",
    "resnet50",
    "save",
    "train_network",
    "vgg16",
    "vgg19",
]
