"""Arguments: an error knows which one it is about."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinfkit.errors import ArgumentError, ArgumentTypeError, OutOfReachError
from sinfkit.utils.params import check_integer, naming

NAMES = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)


@given(name=NAMES, text=st.text(max_size=40), kind=st.sampled_from([ValueError, TypeError]))
def test_errors_of_others_get_the_name_whatever_their_text(name, text, kind):
    with pytest.raises(kind) as caught, naming(name):
        raise kind(text)
    assert caught.value.argument == name and str(caught.value) == f"{name}: {text}"
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is type(caught.value)
    assert (again.argument, str(again)) == (name, str(caught.value))


@given(name=NAMES, outer=NAMES)
def test_a_name_is_given_once_and_a_part_names_its_whole(name, outer):
    with pytest.raises(ArgumentError) as caught, naming(name):
        check_integer(name, "three")
    assert str(caught.value).startswith(f"{name} must be")
    with pytest.raises(ArgumentError) as caught, naming(outer):
        check_integer(name, "three")
    if outer != name:
        assert str(caught.value).startswith(f"{outer}: {name} must be")
    assert caught.value.argument == outer


def test_integers_that_are_too_large_are_values():
    with pytest.raises(ArgumentError, match="x: "), naming("x"):
        raise OverflowError("too large")
    with pytest.raises(ArgumentTypeError), naming("x"):
        raise ArgumentTypeError("y is no number", "y")


def test_an_error_of_another_type_keeps_it():
    with pytest.raises(OutOfReachError, match="^too small$"), naming("pruner"):
        raise OutOfReachError("too small")
