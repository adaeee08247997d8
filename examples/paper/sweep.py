"""Many sliced networks per cluster and calibration resample, one row of a table for each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from record import Table, to_hex
from study import Study, frozen
from suffix import Case, Suffix, answers, mend
from torch import fx
from tqdm.auto import tqdm

Row = dict[str, Any]
RATIOS = ("repair", "min_ratio", "max_ratio")
VALUES = ("images", "right", "answers")
UNPRUNED = "unpruned"


def sweep(
    study: Study,
    table: Table,
    recipes: Sequence[Row],
    score: Callable[[Case, Row], Mapping[str, np.ndarray]],
    *,
    ratios: Sequence[Sequence[float]],
    repairs: Sequence[str],
    resamples: int,
    first_layer: str | None = None,
) -> None:
    """Fill a table with accuracies among the classes of each cluster.

    Parameters
    ----------
    study : Study
    table : Table
        Its keys: those of the study, cluster, resample, those of a recipe, and `RATIOS`. Its
        values: `VALUES`. Rows that it has are not measured again.
    recipes : sequence of dict
        What scores depend on. The first one stands, under the name `UNPRUNED` in its first key,
        for the network that loses nothing.
    score : callable
        From a case and a recipe to filter scores by group.
    ratios : sequence of (first, last)
    repairs : sequence of str
        Keys of `suffix.REPAIRS`.
    resamples : int
        Draws of calibration images for each cluster.
    first_layer : str, optional
        See `Suffix`.
    """
    suffix = Suffix(study, first_layer)
    plan: dict[tuple[str, int], list[tuple[Row, Row]]] = {}
    for cluster in study.chosen:
        for resample in range(resamples):
            key = {**study.key(), "cluster": cluster, "resample": resample}
            rows = [
                ({**key, **recipe, **dict(zip(RATIOS, (repair, *pair), strict=True))}, recipe)
                for recipe in recipes
                for pair in ratios
                for repair in repairs
            ]
            if resample == 0:
                whole = {**recipes[0], next(iter(recipes[0])): UNPRUNED}
                rows.insert(0, ({**key, **whole, **dict.fromkeys(RATIOS, "")}, whole))
            plan[cluster, resample] = [row for row in rows if row[0] not in table]
    todo = sum(map(len, plan.values()))
    with tqdm(total=len(table) + todo, initial=len(table), unit=" rows", mininterval=2) as bar:
        for cluster in study.chosen:
            if not any(rows for (name, _), rows in plan.items() if name == cluster):
                continue
            classes = study.classes(cluster)
            test = study.test_rows(classes)
            h, truth = suffix.inputs(study.X_test[test]), study.y_test[test]
            for resample in range(resamples):
                rows = plan[cluster, resample]
                for key, network in _networks(suffix, cluster, resample, rows, score):
                    columns = classes if network is suffix.graph else None
                    right = classes[answers(network, h, columns)] == truth
                    values = (len(right), int(right.sum()), to_hex(right))
                    table.add(**key, **dict(zip(VALUES, values, strict=True)))
                    bar.update()


def _networks(
    suffix: Suffix,
    cluster: str,
    resample: int,
    rows: Sequence[tuple[Row, Row]],
    score: Callable[[Case, Row], Mapping[str, np.ndarray]],
) -> Iterator[tuple[Row, fx.GraphModule]]:
    """The network of each row; scores are computed once for all that share a recipe."""
    case: Case | None = None
    known: Row | None = None
    scores: Mapping[str, np.ndarray] = {}
    for key, recipe in rows:
        if UNPRUNED in recipe.values():
            yield key, suffix.graph
            continue
        if case is None:
            case = Case.of(suffix, cluster, resample, frozen()["images"]["scores"])
        if recipe != known:
            with warnings.catch_warnings():
                # Layers in which nothing discriminates score 0, which is what is wanted here.
                warnings.simplefilter("ignore", UserWarning)
                known, scores = recipe, score(case, recipe)
        keep = suffix.keep(scores, key["min_ratio"], key["max_ratio"])
        small, support = suffix.sliced(keep, case.classes, case.h)
        mend(key["repair"], case, small, support)
        yield key, small
