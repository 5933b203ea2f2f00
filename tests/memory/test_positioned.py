"""Writes at a place, however little of them the kernel takes at once."""

from __future__ import annotations

import os
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon.store.memory import positioned
from ratoon.store.memory.positioned import write_all_at


@given(
    st.lists(st.binary(max_size=20), max_size=12),
    st.integers(0, 50),
    st.integers(1, 4),
    st.integers(1, 30),
)
def test_pieces_lie_one_after_the_other(
    pieces: list[bytes], offset: int, at_once: int, taken: int
) -> None:
    whole = os.pwritev

    def short(fd: int, views: list[memoryview], at: int) -> int:
        """At most `taken` bytes go at once."""
        return whole(fd, [memoryview(b"".join(views))[:taken]], at)

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as file:
        patch.setattr(positioned, "_AT_ONCE", at_once)
        patch.setattr("os.pwritev", short)
        write_all_at(file.fileno(), [memoryview(piece) for piece in pieces], offset)
        content = b"".join(pieces)
        assert file.read() == (bytes(offset) + content if content else b"")


def test_more_pieces_than_one_call_takes() -> None:
    pieces = [number.to_bytes(2, "big") for number in range(3000)]
    with tempfile.TemporaryFile() as file:
        write_all_at(file.fileno(), [memoryview(piece) for piece in pieces], 0)
        assert file.read() == b"".join(pieces)
