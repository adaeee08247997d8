"""Training of a classifier from arrays in memory: SGD with a one-cycle learning rate, resumable.

Every random choice of an epoch follows from (seed, epoch) alone. So a run that is resumed at an
epoch's boundary repeats the uninterrupted one, and a checkpoint needs no generator states.
"""

from __future__ import annotations

import copy
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..utils.checkpoint import Checkpoint
from ..utils.device import (
    channels_last,
    float_type,
    host_tensor,
    is_out_of_memory,
    on_host_by_default,
    resolve_device,
)
from ..utils.params import check_integer, check_number, check_path, check_verbose, naming

__all__ = ["train_network"]

_AUGMENTATIONS = (None, "crop_flip")
_MOMENTUM = 0.9
_WEIGHT_DECAY = 5e-4
_WARM_UP = 0.2  # Fraction of the steps in which the learning rate still rises.
# Below this size a network spends more on the casts than bfloat16 saves.
_BFLOAT16_MIN_PARAMETERS = 1_000_000


@on_host_by_default()
def train_network(
    model: nn.Module,
    X: np.ndarray | Tensor,
    y: np.ndarray | Tensor,
    *,
    epochs: int,
    batch_size: int = 128,
    max_lr: float = 0.1,
    augment: str | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    sample_weight: np.ndarray | Tensor | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    random_state: int | np.random.RandomState | None = None,
    verbose: int = 0,
) -> nn.Module:
    """Train a copy of a classifier with SGD, Nesterov momentum and a one-cycle learning rate.

    Parameters
    ----------
    model : torch.nn.Module
        Maps a batch of X to logits. It is left as it is: a copy is trained, all of its parameters.
    X : ndarray or Tensor of shape (n_samples, channels, height, width) or (n_samples, n_features)
        Samples, uint8 (divided by 255 on the way) or floating point. They stay where they are in
        memory; batches move to the device.
    y : ndarray or Tensor of shape (n_samples,)
        Integer labels: index of the network's output, from 0.
    epochs : int
        Passes over the data.
    batch_size : int, default=128
        Samples per step, at least 2. The batches of an epoch are as equal as they can be.
    max_lr : float, default=0.1
        Peak of the learning rate, reached after a fifth of the steps.
    augment : {None, "crop_flip"}, default=None
        ``"crop_flip"`` shifts each image by up to an eighth of its size, reflected at the border,
        and flips half of them from left to right.
    mean, std : float, sequence of float or None, default=None
        Normalisation per channel (or feature) of X on its floating-point scale: (x - mean) / std.
        The network that is returned expects inputs so normalised.
    sample_weight : ndarray or Tensor of shape (n_samples,), default=None
        How much each sample counts in the loss, relative to the others; not negative.
    checkpoint : path-like or None, default=None
        File written, atomically, after each epoch. If it exists the run resumes from it.
    device : str or torch.device, default="auto"
        Where to train; ``"auto"`` takes CUDA if it is there.
    random_state : int, numpy.random.RandomState or None, default=None
        Seed of order, augmentation and dropout. Global generators are left as they were. With
        None a resumed run takes the seed in its checkpoint.
    verbose : int, default=0
        Above 0, one progress bar and one line per epoch.

    Returns
    -------
    torch.nn.Module
        The trained copy, in eval mode, on the device of `model`, each parameter requiring its
        gradient or not as it did there.

    Raises
    ------
    ValueError
        If shapes, labels or settings do not fit each other, or the checkpoint belongs to another
        run.
    TypeError
        If `model` is not a module or X is neither uint8 nor floating point.
    RuntimeError
        If the loss is no longer finite.

    Notes
    -----
    Weights decay by an L2 penalty of 5e-4, biases and normalisation parameters do not. Float32
    image networks of a million parameters or more are trained in mixed precision where the device
    computes bfloat16 in hardware.

    A resumed run repeats the uninterrupted one bit for bit where the device's kernels are
    deterministic. A checkpoint is bound to the settings, the shape of X and the labels.

    References
    ----------
    Smith and Topin, "Super-convergence: very fast training of neural networks using large
    learning rates", 2019.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sinfkit import train_network
    >>> from sinfkit.zoo import default_network
    >>> X, y = load_digits(return_X_y=True)
    >>> X = (X / 16).astype("float32").reshape(-1, 1, 8, 8)
    >>> network = default_network((1, 8, 8), n_classes=10, random_state=0)
    >>> network = train_network(network, X[:300], y[:300], epochs=2, random_state=0)
    >>> network.training
    False
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        raise ValueError("model has no parameters that could be trained.")
    _check_settings(epochs, batch_size, max_lr, augment)
    epochs, batch_size = int(epochs), int(batch_size)
    max_lr = float(max_lr)  # torch takes no larger integers
    check_verbose(verbose)
    if checkpoint is not None:
        check_path("checkpoint", checkpoint)
    images, labels = _check_data(X, y)
    if augment is not None and images.ndim != 4:
        raise ValueError(f"augment={augment!r} needs images of shape (n, channels, height, width).")
    weights = _relative_weights(sample_weight, len(images))

    target = resolve_device(device)
    network = copy.deepcopy(model).requires_grad_(True).to(target)
    if images.ndim == 4:
        network = channels_last(network)
    engine = _Engine(
        network,
        _Preparation(images, mean, std, float_type(network), target),
        _use_bfloat16(network, images, target),
    )
    if images.is_floating_point():
        largest, dtype = float(images.abs().amax()), engine.prepare.dtype
        if largest > torch.finfo(dtype).max:
            raise ValueError(f"X holds values of up to {largest:.3g}, more than {dtype} has.")
    _check_outputs(engine, images[:2], labels)

    # Equal batches: a single sample left over would have no variance for a batch-norm.
    n_batches = max(1, min(-(-len(images) // batch_size), len(images) // 2))
    optimiser, scheduler = _one_cycle(network, max_lr, epochs * n_batches)
    run = Checkpoint(
        checkpoint,
        settings={
            "epochs": epochs,
            "batch_size": batch_size,
            "max_lr": max_lr,
            "augment": augment or "none",
            "shape of X": list(images.shape),
            "labels": zlib.crc32(labels.numpy().tobytes()),
            "weights": zlib.crc32(weights.numpy().tobytes()),
        },
        parts={"model": network, "optimiser": optimiser, "scheduler": scheduler},
    )
    seed = run.resume(_draw_seed(random_state), given=random_state is not None)

    for epoch in range(len(run.history), epochs):
        title = f"epoch {epoch + 1}/{epochs}"
        generator, module_seed = _epoch_generators(seed, epoch)
        batches = torch.randperm(len(images), generator=generator).tensor_split(n_batches)
        total, seen = torch.zeros((), dtype=engine.prepare.dtype, device=target), 0
        network.train()
        # Dropout and its like know only the global generators: lend them, then put them back.
        with _lent_generators(module_seed, target):
            bar = tqdm(batches, desc=title, disable=verbose < 1, mininterval=1.0, leave=False)
            for rows in bar:
                batch = images[rows]
                if augment == "crop_flip":
                    batch = crop_flip(batch, generator)
                loss = engine.loss(batch, labels[rows], weights[rows])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                scheduler.step()
                total += loss.detach() * len(rows)
                seen += len(rows)
                if verbose:  # Not otherwise: reading the loss makes the host wait for a GPU.
                    bar.set_postfix(loss=f"{float(total) / seen:.3f}", refresh=False)
        mean_loss = float(total) / seen
        if not np.isfinite(mean_loss):
            raise RuntimeError(
                f"The loss became {mean_loss} in {title}: lower max_lr (now {max_lr}) or "
                "look for huge values in X."
            )
        run.save(seed, {"loss": mean_loss})
        if verbose:
            tqdm.write(f"{title}: loss {mean_loss:.4f}")
    return _as_given(network, model)


class _Preparation:
    """Batches as the network wants them: on its device, scaled, normalised, in its type."""

    def __init__(
        self,
        images: Tensor,
        mean: float | Sequence[float] | None,
        std: float | Sequence[float] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.mean = self._per_channel(0.0 if mean is None else mean, images, "mean")
        self.std = self._per_channel(1.0 if std is None else std, images, "std")
        if not bool((self.std > 0).all()):
            raise ValueError("std must be positive for every channel.")

    def _per_channel(self, value: float | Sequence[float], images: Tensor, name: str) -> Tensor:
        """Shape a normalisation constant so that it broadcasts over a batch."""
        with naming(name):
            constant = torch.from_numpy(np.array(value, dtype=np.float64).reshape(-1))
        if not bool(torch.isfinite(constant).all()):
            raise ValueError(f"{name} must be finite.")
        if constant.numel() not in (1, images.shape[1]):
            raise ValueError(
                f"{name} has {constant.numel()} entries where X has {images.shape[1]} channels; "
                "give one number, or one per channel."
            )
        shape = (1, -1) + (1,) * (images.ndim - 2)
        return constant.reshape(shape).to(self.device, self.dtype)

    def __call__(self, batch: Tensor) -> Tensor:
        """Return the normalised batch on the device."""
        scale = 255.0 if batch.dtype == torch.uint8 else 1.0
        batch = (batch.to(self.device).to(self.dtype) / scale - self.mean) / self.std
        return batch.contiguous(memory_format=torch.channels_last) if batch.ndim == 4 else batch


class _Engine:
    """The network with all it takes to turn samples into a loss."""

    def __init__(self, network: nn.Module, prepare: _Preparation, bfloat16: bool) -> None:
        self.network, self.prepare, self._bfloat16 = network, prepare, bfloat16

    def logits(self, batch: Tensor) -> Tensor:
        """Logits of raw samples, in the network's own type."""
        with torch.autocast(self.prepare.device.type, torch.bfloat16, enabled=self._bfloat16):
            logits = self.network(self.prepare(batch))
        return logits.to(self.prepare.dtype)

    def loss(self, batch: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Mean loss of raw samples, of which some may count more than others."""
        logits = self.logits(batch)
        losses = nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="none")
        return (losses * weights.to(losses)).mean()


def _check_settings(epochs: int, batch_size: int, max_lr: float, augment: str | None) -> None:
    """Refuse settings with which no training is possible."""
    check_integer("epochs", epochs)
    check_integer("batch_size", batch_size, low=2)  # a batch-norm needs two
    check_number("max_lr", max_lr, "(0, 1e30]")  # in single precision, too
    if augment is not None and not (isinstance(augment, str) and augment in _AUGMENTATIONS):
        raise ValueError(f"augment={augment!r} is unknown; choose one of {_AUGMENTATIONS}.")


def _check_data(X: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Samples and labels as tensors on the CPU, or a clear error."""
    if y is None:
        raise ValueError("X was given without y.")
    images, labels = _to_tensor(X, "X"), _to_tensor(y, "y")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"X must be uint8 or floating point; got {images.dtype}.")
    if images.ndim not in (2, 4):
        raise ValueError(
            "X must have shape (n, channels, height, width) or (n, n_features); got "
            f"{tuple(images.shape)}."
        )
    if 0 in images.shape[1:]:
        raise ValueError(f"X has samples without values, shape {tuple(images.shape)}.")
    if len(images) < 2:
        raise ValueError(f"X needs at least two samples; got n_samples = {len(images)}.")
    if labels.is_floating_point() or labels.shape != images.shape[:1]:
        raise ValueError(
            f"y must hold one integer label per row of X ({len(images)} rows); got "
            f"{labels.dtype} of shape {tuple(labels.shape)}."
        )
    if images.is_floating_point() and not bool(torch.isfinite(images).all()):
        raise ValueError("X holds NaN or infinity; clean it first.")
    return images, labels.to(torch.int64)


def _relative_weights(sample_weight: Any, n_samples: int) -> Tensor:
    """Weights with a mean of 1, or a clear error."""
    if sample_weight is None:
        return torch.ones(n_samples, dtype=torch.float64)
    weights = _to_tensor(sample_weight, "sample_weight").to(torch.float64)
    if weights.shape != (n_samples,) or not bool(torch.isfinite(weights).all()):
        raise ValueError(
            f"sample_weight must hold one finite number for each of the {n_samples} samples; got "
            f"shape {tuple(weights.shape)}."
        )
    if bool((weights < 0).any()) or not bool(weights.any()):
        raise ValueError("sample_weight must not be negative, nor zero throughout.")
    return weights / weights.mean()


def _to_tensor(array: Any, name: str) -> Tensor:
    """A tensor on the CPU, sharing memory with the array where torch can."""
    if isinstance(array, Tensor):
        if array.layout != torch.strided or array.device.type == "meta" or array.is_complex():
            raise TypeError(f"{name} must be a dense tensor that holds real values.")
        return array.detach().cpu()
    with naming(name):
        array = np.asarray(array)
    if array.dtype.kind not in "buif":
        raise TypeError(f"{name} must hold numbers; got an array of {array.dtype}.")
    with naming(name):
        return host_tensor(array)


def _check_outputs(engine: _Engine, sample: Tensor, labels: Tensor) -> None:
    """The network must take the samples and give a logit for every label there is."""
    engine.network.eval()
    try:
        with torch.no_grad():
            logits = engine.logits(sample)
    except Exception as error:  # a network may raise what it likes
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"model cannot take samples of shape {tuple(sample.shape[1:])}: {error}"
        ) from error
    if logits.ndim != 2:
        raise ValueError(
            f"model must return logits of shape (n, n_classes); got {tuple(logits.shape)}."
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            "model gives NaN or infinity for the first samples: look for huge values in X, mean or "
            "std."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"y must hold output indices from 0 to {logits.shape[1] - 1}; found {low} to {high}. "
            "Encode the labels first, or give the model more outputs."
        )


def _use_bfloat16(network: nn.Module, images: Tensor, device: torch.device) -> bool:
    """Whether to run under bfloat16 autocast."""
    n_parameters = sum(p.numel() for p in network.parameters())
    if images.ndim != 4 or n_parameters < _BFLOAT16_MIN_PARAMETERS:
        return False
    if float_type(network) != torch.float32:
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Private and not in every version; without it, take it that the processor would emulate.
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and supported is not None and bool(supported())


def _one_cycle(
    network: nn.Module, max_lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    """SGD whose learning rate rises and falls once; weights decay, but neither biases nor norms."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.SGD(groups, lr=max_lr, momentum=_MOMENTUM, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        max_lr,
        total_steps=steps,
        # It would divide by zero where the warm-up is one step exactly.
        pct_start=_WARM_UP if _WARM_UP * steps != 1.0 else 1.5 * _WARM_UP,
        cycle_momentum=False,
    )
    return optimiser, scheduler


def _as_given(network: nn.Module, model: nn.Module) -> nn.Module:
    """Put a trained copy where, and in the state in which, the original is."""
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    network = network.to(home).to(memory_format=torch.contiguous_format).eval()
    for trained, original in zip(network.parameters(), model.parameters(), strict=True):
        trained.requires_grad_(original.requires_grad)
        trained.grad = None
    return network


def _draw_seed(random_state: int | np.random.RandomState | None) -> int:
    """One integer; None draws it from the system, not from NumPy's global state."""
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1)[0])
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(2**31 - 1))
    check_integer("random_state", random_state, low=0, high=2**63 - 1)
    return int(random_state)


def _epoch_generators(seed: int, epoch: int) -> tuple[torch.Generator, int]:
    """Generator of an epoch's order and augmentation, and its seed for the modules' own draws."""
    first, second = np.random.SeedSequence([seed, epoch]).generate_state(2)
    return torch.Generator().manual_seed(int(first)), int(second)


@contextmanager
def _lent_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators that `device` uses inside a block, and restore them after it."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.random.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def crop_flip(images: Tensor, generator: torch.Generator, flip: bool = True) -> Tensor:
    """Shift each image by up to an eighth of its size, reflected, and turn half of them round."""
    n, channels, height, width = images.shape
    rows = _shifted(n, height, generator)
    columns = _shifted(n, width, generator)
    if flip:
        turned = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(turned, columns.flip(1), columns)
    index = (
        torch.arange(n)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    )
    return images[tuple(part.to(images.device) for part in index)]


def _shifted(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Source indices (n, size) of random shifts, reflected at both ends."""
    reach = size // 8
    shift = torch.randint(-reach, reach + 1, (n, 1), generator=generator)
    index = (torch.arange(size) + shift).abs()
    return (size - 1) - ((size - 1) - index).abs()
