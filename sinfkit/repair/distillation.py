"""Label-free distillation: a sliced and repaired network learns the dense network's answers.

Every random choice of an epoch follows from (seed, epoch) alone, so that a run that is resumed at
an epoch's boundary repeats the uninterrupted one.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from ..utils.checkpoint import Checkpoint
from ..utils.device import channels_last
from ..utils.params import (
    check_choice,
    check_integer,
    check_number,
    check_path,
    is_integer,
    nested,
    shown,
)
from ..utils.progress import Progress
from ..zoo.training import crop_flip
from .blockwise import Part, affordable, reconstruct

__all__ = ["Distillation", "Lesson", "as_distillation", "distill"]

Augment = Literal["mix", "crop", "crop_flip"]
_WARM_UP = 0.1  # share of the steps in which they still grow
_BLOCK_RATE = 5.0  # times larger than those of the network as a whole: a block takes larger steps
_LOOKED_AT = 16  # samples that tell one run from another


class Distillation(BaseEstimator):
    """How a smaller network is trained towards the answers of the whole one, without labels.

    Parameters
    ----------
    epochs : int, default=5
        Passes over the calibration samples; those that certify what is lost are not among them.  0:
        `block_steps` alone.
    learning_rate : float, default=2e-4
        Largest step of Adam; it grows over the first tenth of the steps, and falls as a cosine.
    temperature : float, default=2.0
        Both networks' logits are divided by it before their answers are compared.
    batch_size : int, default=64
        Samples in a step.
    augment : {"mix", "crop", "crop_flip"} or None, default="mix"
        What is done to the samples in each epoch anew.  ``"mix"``: each is averaged with another
        one, by random weights (arXiv 1710.09412, 2106.05237).  ``"crop"``: images are shifted by
        up to an eighth of their size.  ``"crop_flip"``: and half of them are turned left to right,
        which is wrong for text.  None: nothing, and the whole network answers each sample once and
        not in each epoch.
    block_steps : int, default=0
        Before that, so many steps for each block of the network alone, of `batch_size` samples and
        five times `learning_rate`, towards what the whole network's block gives: least squared
        error (block-wise reconstruction, arXiv 2102.05426).  `DCSPruner` only.
    checkpoint : path-like, optional
        Folder in which the state of each training is kept after every epoch: a fit that was
        interrupted goes on from there, and gives the same result.  Files are not deleted.

    Examples
    --------
    >>> from sinfkit import DCSPruner, Distillation
    >>> DCSPruner(budget=0.5, distill=Distillation(epochs=10, learning_rate=1e-4))
    DCSPruner(budget=0.5, distill=Distillation(epochs=10, learning_rate=0.0001))
    """

    def __init__(
        self,
        epochs: int = 5,
        *,
        learning_rate: float = 2e-4,
        temperature: float = 2.0,
        batch_size: int = 64,
        augment: Augment | None = "mix",
        block_steps: int = 0,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.temperature = temperature
        self.batch_size = batch_size
        self.augment = augment
        self.block_steps = block_steps
        self.checkpoint = checkpoint


def as_distillation(value: Any) -> Distillation | None:
    """The parameter `distill`, checked; a number is one of epochs."""
    if value is None:
        return None
    if is_integer(value):
        check_integer("distill", value)
        return Distillation(int(value))
    if not isinstance(value, Distillation):
        raise TypeError(
            f"distill must be a Distillation, a number of epochs or None, got {shown(value)}."
        )
    with nested("distill", value.get_params()):
        check_integer("block_steps", value.block_steps, low=0)
        check_integer("epochs", value.epochs, low=0 if value.block_steps else 1)
        check_number("learning_rate", value.learning_rate, "(0, inf)")
        check_number("temperature", value.temperature, "(0, inf)")
        check_integer("batch_size", value.batch_size)
        check_choice("augment", value.augment, get_args(Augment), optional=True)
        if value.checkpoint is not None:
            check_path("checkpoint", value.checkpoint)
    return value


def block_passes(how: Distillation, n_samples: int) -> int:
    """About how many passes of the base over the samples the training of single blocks takes."""
    if not how.block_steps:
        return 0
    # Forwards and backwards for those of the steps; all of them through both networks besides.
    return 4 + math.ceil(3 * how.block_steps * how.batch_size / n_samples)


@dataclass(frozen=True, eq=False)
class Lesson:
    """What is to be learnt: `student` is trained so that `answer` says what `teach` does.

    `read` gives the samples at some of the places ``0 .. len(weight) - 1``; `answer` and `teach`
    map samples and their places to logits.  `parts` are what lies between cuts, of both networks.
    """

    student: nn.Module
    answer: Callable[[Tensor, Tensor], Tensor]
    teach: Callable[[Tensor, Tensor], Tensor]
    read: Callable[[np.ndarray], Tensor]
    weight: np.ndarray
    parts: Sequence[Part] = ()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained; running statistics of norms stay as they are."""
        return [p for p in self.student.parameters() if p.is_floating_point()]


def distill(lesson: Lesson, how: Distillation, seed: int, progress: Progress) -> list[float]:
    """Train the student, in place; returns the mean loss of each epoch."""
    n, parameters = len(lesson.weight), lesson.parameters
    if not n or not parameters:
        return []
    first = lesson.read(np.linspace(0, n - 1, min(n, _LOOKED_AT)).astype(int))
    if first.ndim != 4 and how.augment in ("crop", "crop_flip"):
        raise ValueError(
            f"distill.augment={how.augment!r} needs images, but a sample has shape "
            f"{tuple(first.shape[1:])}."
        )
    path = _file(lesson, first, how, seed)
    with _trainable(lesson, first):
        adam = torch.optim.Adam(parameters)
        run = Checkpoint(path, {}, {"model": lesson.student, "optimiser": adam})
        run.resume(seed, given=True)
        if how.block_steps and not run.history:
            _blockwise(lesson, how, seed, progress)
        known = None
        if how.augment is None and len(run.history) < how.epochs:
            known = _answers(lesson, how)
        for epoch in range(len(run.history), how.epochs):
            loss = _epoch(lesson, how, seed, epoch, adam, known, progress)
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"The distillation's loss became {loss}: lower distill.learning_rate "
                    f"(now {how.learning_rate})."
                )
            run.save(seed, {"loss": loss})
            progress.done()
    return [record["loss"] for record in run.history]


def _blockwise(lesson: Lesson, how: Distillation, seed: int, progress: Progress) -> None:
    """Train each block alone, on as many samples as memory allows."""
    generator = torch.Generator().manual_seed(seed)
    n = len(lesson.weight)
    most = affordable(lesson.parts, lesson.read(np.zeros(1, dtype=int)))
    places = torch.randperm(n, generator=generator)[:most].numpy()
    x, weight = lesson.read(places), torch.as_tensor(lesson.weight[places])
    errors = reconstruct(
        lesson.parts,
        x,
        weight,
        how.block_steps,
        how.batch_size,
        lambda share: _BLOCK_RATE * how.learning_rate * pace(share),
        generator,
    )
    for i, error in enumerate(errors):
        progress.doing(f"block {i + 1} of {len(lesson.parts)}, error {error:.3f}")


def _epoch(
    lesson: Lesson,
    how: Distillation,
    seed: int,
    epoch: int,
    adam: torch.optim.Adam,
    known: Tensor | None,
    progress: Progress,
) -> float:
    """One pass over the samples; `known` are the teacher's answers to all of them, if known."""
    n, dtype = len(lesson.weight), lesson.parameters[0].dtype
    counts = torch.as_tensor(lesson.weight / lesson.weight.mean(), dtype=dtype)
    generator = torch.Generator().manual_seed(_epoch_seed(seed, epoch))
    n_batches, total = max(1, round(n / how.batch_size)), torch.zeros(())
    for i, places in enumerate(torch.randperm(n, generator=generator).tensor_split(n_batches)):
        if i % -(-n_batches // 100) == 0:
            progress.doing(f"distils, epoch {epoch + 1} of {how.epochs}, {i / n_batches:.0%}")
        for group in adam.param_groups:
            done = (epoch * n_batches + i + 0.5) / (how.epochs * n_batches)
            group["lr"] = how.learning_rate * pace(done)
        x = lesson.read(places.numpy())
        if how.augment is not None:
            x = _AUGMENT[how.augment](x, generator)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            wanted = lesson.teach(x, places) if known is None else known[places.to(known.device)]
        with _precision(x):
            logits = lesson.answer(x.to(dtype), places)
        losses = divergence(logits.to(dtype), wanted.to(dtype), how.temperature)
        loss = (losses * counts[places].to(losses.device)).mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        total = total.to(loss.device) + loss.detach() * (len(places) / n)
    return float(total)


@contextmanager
def _trainable(lesson: Lesson, first: Tensor) -> Iterator[None]:
    """Weights that may change inside the block, in a type that is fine enough for small steps."""
    dtype = lesson.parameters[0].dtype
    if dtype in (torch.float16, torch.bfloat16):
        lesson.student.float()
    if first.ndim == 4:
        channels_last(lesson.student)
    for parameter in lesson.parameters:
        parameter.requires_grad_(True)
    yield
    for parameter in lesson.parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    lesson.student.to(dtype)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of softened answers, times the temperature squared.

    The factor keeps gradients of one size (Hinton, Vinyals and Dean, arXiv 1503.02531).

    Shapes: `student`, `teacher` (n, n_classes), returns (n,).
    """
    wanted = torch.log_softmax(teacher / temperature, 1)
    found = torch.log_softmax(student / temperature, 1)
    return temperature**2 * (wanted.exp() * (wanted - found)).sum(1)


def pace(share: float) -> float:
    """How large a step is after a share of them, as a share of the largest."""
    if share < _WARM_UP:
        return share / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (share - _WARM_UP) / (1 - _WARM_UP)))


def _mixed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each sample averaged with another one, of which it keeps at least half."""
    own = 1 - torch.rand(len(x), generator=generator) / 2
    own = own.to(x).reshape(-1, *[1] * (x.ndim - 1))
    return own * x + (1 - own) * x[torch.randperm(len(x), generator=generator).to(x.device)]


_AUGMENT: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "mix": _mixed,
    "crop": functools.partial(crop_flip, flip=False),
    "crop_flip": crop_flip,
}


def _answers(lesson: Lesson, how: Distillation) -> Tensor:
    """What the teacher says to all samples, once."""
    with torch.no_grad():
        parts = torch.arange(len(lesson.weight)).split(how.batch_size)
        return torch.cat([lesson.teach(lesson.read(part.numpy()), part) for part in parts])


def _precision(x: Tensor) -> Any:
    """bfloat16 on GPUs that have it: on CPUs the casts often cost more than they save."""
    cuda = x.device.type == "cuda"
    enabled = cuda and x.dtype == torch.float32 and torch.cuda.is_bf16_supported()
    return torch.autocast(x.device.type, torch.bfloat16, enabled=enabled)


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _file(lesson: Lesson, first: Tensor, how: Distillation, seed: int) -> Path | None:
    """Where the state of this training is kept: no other has that name."""
    if how.checkpoint is None:
        return None
    settings = {k: v for k, v in how.get_params().items() if k != "checkpoint"}
    digest = hashlib.sha256(repr((sorted(settings.items()), seed)).encode())
    digest.update(np.ascontiguousarray(lesson.weight).data)
    for tensor in (first, *lesson.student.state_dict().values()):
        digest.update(tensor.detach().cpu().double().contiguous().numpy().data)
    return Path(how.checkpoint) / f"distillation-{digest.hexdigest()[:16]}.pt"
