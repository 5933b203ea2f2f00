"""Frames from elsewhere: the whole content of one, within its bound, or a named error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon.compression import decompressed, zstd
from ratoon.errors import Corrupt


@given(st.binary(max_size=5000), st.integers(1, 19))
def test_what_was_compressed_comes_back(content: bytes, level: int) -> None:
    frame = zstd.compress(content, level)
    assert decompressed(frame, len(content), "it") == content


@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_part_of_a_frame_is_refused(content: bytes, data: st.DataObject) -> None:
    frame = zstd.compress(content)
    part = frame[: data.draw(st.integers(0, len(frame) - 1))]
    with pytest.raises(Corrupt, match=r"^the disk cannot be decompressed"):
        decompressed(part, len(content), "the disk")


def test_a_frame_is_not_unfolded_past_its_bound() -> None:
    bomb = zstd.compress(bytes(1 << 30))
    with pytest.raises(Corrupt, match="does not end where it should"):
        decompressed(bomb, 1000, "it")


def test_what_follows_a_frame_is_refused() -> None:
    with pytest.raises(Corrupt, match="does not end where it should"):
        decompressed(zstd.compress(b"one") + b"more", 3, "it")
