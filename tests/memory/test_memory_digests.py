"""Digests, digest arrays and what is kept of a capture."""

from __future__ import annotations

import numpy as np
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from memory_helpers import RAM, page, ram_of, u64
from ratoon.store.memory.digests import (
    ZERO_DIGEST,
    hash_pages,
    memory_root,
    select_changed,
    zero_array,
)
from ratoon.store.memory.page import PAGE_SIZE

fills = st.dictionaries(st.integers(0, RAM - 1), st.integers(0, 3), max_size=10)


@given(st.lists(st.integers(0, 3), max_size=8))
def test_hash_pages_is_blake3_of_each(values: list[int]) -> None:
    pages = np.array([page(v) for v in values], np.uint8).reshape(-1, PAGE_SIZE)
    digests = hash_pages(pages)
    assert digests.shape == (len(values), 32)
    assert [d.tobytes() for d in digests] == [blake3(p.tobytes()).digest() for p in pages]


def test_zero_memory() -> None:
    array = zero_array(RAM)
    assert array.tobytes() == ZERO_DIGEST * RAM
    assert not array.flags.writeable
    assert memory_root(array) == blake3(ZERO_DIGEST * RAM).hexdigest()


@given(fills, fills)
def test_select_changed_keeps_what_differs(parent: dict[int, int], child: dict[int, int]) -> None:
    was = ram_of(parent)
    numbers = sorted(child)
    pages = ram_of(child)[numbers]
    kept, digests, rows = select_changed(u64(numbers), pages, hash_pages(was))

    assert kept.tolist() == [n for n in numbers if child[n] != parent.get(n, 0)]
    assert [numbers[row] for row in rows] == kept.tolist()
    assert np.array_equal(digests, hash_pages(pages[rows]))
