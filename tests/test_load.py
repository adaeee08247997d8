"""Prediction under load, in short; `python tests/load_check.py` makes 10,000 predictions each."""

from __future__ import annotations

import sys

import pytest
from children import needs_fork
from load_check import GROWTH, TOLERANCE, classifier, in_processes, in_threads, mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")


@pytest.fixture(scope="module")
def clf():
    return classifier()


def test_threads_answer_like_one_and_need_no_more_memory(clf):
    figures = in_threads(clf, 8, 200)
    assert figures["difference"] <= TOLERANCE
    assert figures["growth"] <= GROWTH


@needs_fork
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_answer_like_their_parent(clf, method):
    figures = in_processes(clf, method, 1, 30)
    assert figures["difference"] <= TOLERANCE
    assert figures["growth"] <= GROWTH


def test_mapped_images_take_the_memory_of_a_batch():
    figures = mapped(20_000, side=16)
    assert figures["difference"] == 0
    bound = figures["bytes of answer"] + 16 * figures["bytes of a batch"]
    assert figures["growth"] <= bound < figures["bytes of file"]
