"""Errors over the wire: each comes back as what it was."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon import errors
from ratoon.client.problems import error_from
from ratoon.daemon.problems import error_fields
from ratoon.errors import (
    ChainMismatch,
    CommandFailed,
    Conflict,
    GuestFileNotFound,
    HasDependents,
    InvalidInput,
    MachineDied,
    NotFound,
    Overloaded,
    RatoonError,
    Unauthorized,
)

SPECIAL: list[RatoonError] = [
    HasDependents("base", ["one", "two"]),
    ChainMismatch("link", "a", "b"),
    MachineDied("sandbox sb-1 died", "the end of its log", "it was killed"),
    GuestFileNotFound("/a: No such file or directory", kind="ENOENT"),
    CommandFailed("it failed", status=3, stdout="out", stderr="err"),
]


def plain() -> Iterator[RatoonError]:
    """One of each other class."""
    special = {type(error) for error in SPECIAL}
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, RatoonError) and value not in special:
            yield value("what happened, and the way out")


@pytest.mark.parametrize("error", [*SPECIAL, *plain()], ids=lambda error: type(error).__name__)
def test_each_error_comes_back_as_it_was(error: RatoonError) -> None:
    over_the_wire = json.dumps(error_fields(error)).encode()
    back = error_from(error.http_status, over_the_wire)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert {**vars(back), "answered": None} == {**vars(error), "answered": None}
    assert back.answered == error.http_status
    assert error.answered is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((400, InvalidInput), (401, Unauthorized), (404, NotFound), (409, Conflict)),
        *((422, InvalidInput), (503, Overloaded), (500, RatoonError), (418, RatoonError)),
    ],
)
def test_a_kind_that_is_not_known_goes_by_its_status(status: int, kind: type[RatoonError]) -> None:
    for named in ({}, {"kind": "OfTheFuture"}, {"kind": "annotations"}, {"kind": 7}):
        error = error_from(status, {"error": "text", **named})
        assert type(error) is kind
        assert str(error) == "text"


@given(st.integers(400, 599), st.binary(max_size=50) | st.sampled_from([b"[]", b'{"error":3}']))
def test_an_answer_that_makes_no_sense_is_an_error_all_the_same(status: int, body: bytes) -> None:
    error = error_from(status, body)
    assert isinstance(error, RatoonError)
    assert str(status) in str(error)
