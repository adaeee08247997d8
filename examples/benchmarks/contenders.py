"""Who is timed: the networks of table 4, and torch-pruning's at the same budgets."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import _paper  # noqa: F401
import contestants as rivals
import joblib
import sinf_table
import study as base
import torch
from shipped import Shipped
from torch import nn
from tqdm.auto import tqdm
from whole import Draw, Whole

from sinfkit import SINFClassifier, __version__
from sinfkit.repair import affordable_images

KEYS = ("contestant", "kind", "size", "seed", "variant")
VARIANTS = ("one", "fused", "exit")  # of table 4's networks without routes


@dataclass(frozen=True, eq=False)
class Contender:
    """One network that is timed in several forms.

    Attributes
    ----------
    contestant, kind, size, seed, variant
        As in table 4; torch-pruning's have its ranking and scope as `kind`, the budget as `size`,
        and ``"shipped"`` or ``"repaired"`` as `variant`.
    module : nn.Module or None
        Raw batch to logits, folded and channels_last; None of a routed network.
    eager : nn.Module or None
        The same as it came, before folding; None where only the folded one is kept.
    classifier : SINFClassifier or None
        The routed one.
    """

    contestant: str
    kind: str
    size: str
    seed: int
    variant: str
    module: nn.Module | None = None
    eager: nn.Module | None = None
    classifier: SINFClassifier | None = None

    def key(self) -> dict[str, Any]:
        """What tells its rows apart."""
        return {k: getattr(self, k) for k in KEYS}

    @property
    def name(self) -> str:
        """Its key in one line."""
        return " | ".join(map(str, self.key().values()))


def contenders(options: argparse.Namespace, held: base.Study) -> Iterator[Contender]:
    """All contenders, the base first; what is not stored in ``options.fitted`` yet is fitted.

    Parameters
    ----------
    options : Namespace
        Those of ``sinf_table.py``, and `importance`, `scope` of torch-pruning's ranking.
    held : Study
        The choosing split, on which networks are tuned.
    """
    plain = held.base.model.module()
    for entry in tqdm(list(sinf_table.entries_of(options, held)), unit=" networks", leave=False):
        if options.stored and not sinf_table.stored(options, entry, held):
            continue
        made, _ = sinf_table.fitted(options, entry, held)
        if isinstance(made, dict):
            for variant in VARIANTS:
                unpruned = entry.estimator is None and variant == "one"
                eager = _with_norm(held, plain) if unpruned else None
                module = made[variant].eval()
                yield Contender(**entry.key(), variant=variant, module=module, eager=eager)
        else:
            yield Contender(**entry.key(), variant="SINF", classifier=made)
    if options.scope != "none":
        yield from _torch_pruning(options, held)


def _torch_pruning(options: argparse.Namespace, held: base.Study) -> Iterator[Contender]:
    """What torch-pruning makes of the base at table 4's budgets, without and with our repair."""
    sizes = {**base.frozen()["sinf"], **(base.frozen()["sinf_quick"] if options.quick else {})}
    n_repair = base.frozen()["sinf_quick" if options.quick else "sinf"]["control_repair_samples"]
    whole: Whole | None = None
    for budget in sizes["budgets"][held.base.network]:
        made_of = (__version__, held.base.model, options.importance, options.scope, budget)
        key = joblib.hash((*made_of, n_repair, held.X))
        path = options.fitted / f"{held.base.label}_tp_{key[:16]}.joblib"
        if not path.exists():
            if whole is None:
                whole = Whole(held)
                images = _images(whole, n_repair)
                pruner = Shipped(whole, options.importance, options.scope, images)
            try:
                ratio = pruner.ratio(budget)
            except ValueError as error:
                tqdm.write(f"torch-pruning, {options.importance}, {options.scope}: {error}")
                continue
            keep = pruner.keep(ratio)
            made = pruner.pruned(ratio), images.pruned(keep, "least_squares")
            path.parent.mkdir(parents=True, exist_ok=True)
            joblib.dump(made, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)  # whole or not at all
        for variant, module in zip(("shipped", "repaired"), joblib.load(path), strict=True):
            kind = f"{options.importance} {options.scope}"
            yield Contender(
                "torch-pruning",
                kind,
                f"{budget:g}",
                0,
                variant,
                module=rivals.Plain(rivals.normaliser(held), module).eval(),
                eager=_with_norm(held, module),
            )


def _images(whole: Whole, n: int) -> Draw:
    """Images for the repair, as many as `DCSPruner` has for the control without routes."""
    images = Draw(whole, 0)
    n = affordable_images(whole.graph, whole.example, n)
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(0))
    images.repair_images = images.x[order[:n].to(images.x.device)]
    return images


def _with_norm(study: base.Study, module: nn.Module) -> nn.Module:
    """Normalisation in front of a network that is otherwise left as it is."""
    return nn.Sequential(rivals.normaliser(study), copy.deepcopy(module).cpu()).eval()
