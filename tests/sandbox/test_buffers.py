"""Page buffers: lent one at a time, kept within bounds."""

from __future__ import annotations

from ratoon.engine.sandbox.capture import Buffers


def test_one_that_has_grown_is_lent_again() -> None:
    buffers = Buffers()
    with buffers.borrow() as first:
        first.reserve(10)
        with buffers.borrow() as second:
            assert second is not first
    with buffers.borrow() as again:
        assert again in (first, second)


def test_after_many_large_ones_little_is_kept() -> None:
    with Buffers().borrow() as buffer:
        buffer.reserve(1)
    grown = len(buffer)
    buffers = Buffers(kept_pages=2 * grown)
    for pages in (1, grown + 1, 1, 3 * grown, 1):
        with buffers.borrow() as buffer:
            buffer.reserve(pages)
            with buffers.borrow() as other:
                other.reserve(pages)
        assert sum(map(len, buffers._free)) <= 2 * grown
    assert buffers._free
