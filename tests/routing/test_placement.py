"""Where the route predictor goes."""

from __future__ import annotations

import warnings

import pytest

from sinfkit.graph import CutPoint
from sinfkit.routing import Candidate, rank_candidates


def candidate(name, route, accuracy, macs, n_clusters=2):
    return Candidate(CutPoint(name, name), n_clusters, route, accuracy, macs)


def names(candidates):
    return "".join(c.cut.name for c in candidates)


def test_where_a_route_accuracy_is_asked_for_the_earliest_that_has_it_comes_first():
    cuts = [candidate("a", 0.6, 0.9, 1), candidate("b", 0.8, 0.5, 3), candidate("c", 0.9, 0.9, 2)]
    assert names(rank_candidates(cuts, 0.75, 0.8)) == "bca"


def test_accurate_ones_by_their_cost_then_the_others_by_their_accuracy():
    cuts = [
        candidate("a", 0.3, 0.7, 1),
        candidate("b", 0.5, 0.81, 4),
        candidate("c", 0.6, 0.85, 3),
        candidate("d", 0.7, 0.75, 2),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(rank_candidates(cuts, None, 0.8)) == "cbda"
        assert names(rank_candidates(cuts, None, 0.99)) == "cbda"
    with pytest.warns(UserWarning, match="No layer predicts the cluster with 75%"):
        assert names(rank_candidates(cuts, 0.75, 0.8)) == "cbda"


def test_of_equal_costs_the_more_accurate_comes_first():
    cuts = [candidate("a", 0.9, 0.85, 3.0, 20), candidate("a", 0.9, 0.9, 3.0, 2)]
    assert [c.n_clusters for c in rank_candidates(cuts, None, 0.8)] == [2, 20]
