"""Merging a chain of layers into one, and page sets that are written piece by piece."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_helpers import (
    RAM,
    Layer,
    chains,
    flatten,
    last_data_byte,
    page,
    ram_of,
    u64,
    write_chain,
)
from ratoon.errors import ChainMismatch, Corrupt
from ratoon.store.memory import pageset as pageset_module
from ratoon.store.memory.digests import hash_pages, memory_root
from ratoon.store.memory.merge import write_merged
from ratoon.store.memory.pageset import read_index, read_pages
from ratoon.store.memory.positioned import write_at
from ratoon.store.memory.writing import write_page_set, write_page_stream

CHAIN: Sequence[Layer] = ({1: 1, 2: 2, 5: 5}, {2: 3, 9: 9}, {5: 0, 0: 4})


@given(chains)
def test_the_merged_layer_is_the_base_of_the_same_memory(chain: list[dict[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        links = write_chain(Path(name), chain)
        path = Path(name, "merged")
        index = write_merged(path, links, RAM)
        ram = ram_of(flatten(chain))
        expected = np.flatnonzero(ram.any(axis=1))
        assert index.numbers.tolist() == expected.tolist()
        assert index.stored == len(expected)
        assert np.array_equal(index.digests, hash_pages(ram[expected]))
        again = read_index(path, label="merged", expected_digest=index.index_digest)
        for numbers, pages in read_pages(path, again, None, label="merged"):
            assert np.array_equal(pages, ram[numbers.astype(np.int64)])
        # The same bytes as a base of that memory has.
        write_page_set(
            Path(name, "base"), RAM, expected.astype(np.uint64), index.digests, ram, expected
        )
        assert path.read_bytes() == Path(name, "base").read_bytes()


@given(chains, st.data())
def test_the_upper_part_becomes_one_layer_on_the_rest(
    chain: list[dict[int, int]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        links = write_chain(Path(name), chain)
        kept = data.draw(st.integers(0, len(links) - 1))
        path = Path(name, "merged")
        index = write_merged(path, links, RAM, kept=kept)
        before, ram = ram_of(flatten(chain[:kept])), ram_of(flatten(chain))
        expected = np.flatnonzero((before != ram).any(axis=1))
        assert index.numbers.tolist() == expected.tolist()
        assert index.stored == np.count_nonzero(ram[expected].any(axis=1))
        again = read_index(path, label="merged", expected_digest=index.index_digest)
        for numbers, pages in read_pages(path, again, None, label="merged"):
            before[numbers.astype(np.int64)] = pages
        assert np.array_equal(before, ram)


def test_it_is_written_in_small_pieces_and_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pageset_module, "_CHUNK", 1)
    links = write_chain(tmp_path, CHAIN)
    said: list[str] = []
    index = write_merged(tmp_path / "merged", links, RAM, said.append)
    assert index.numbers.tolist() == [0, 1, 2, 9]
    assert [line.partition(":")[0] for line in said] == [
        "merging memory",
        "checking what was written",
    ]
    assert (tmp_path / "merged").stat().st_mode & 0o777 == 0o444


def test_a_damaged_page_is_named_and_no_file_left(tmp_path: Path) -> None:
    links = write_chain(tmp_path, CHAIN)
    links[1].path.chmod(0o644)
    raw = bytearray(links[1].path.read_bytes())
    raw[last_data_byte(links[1].path)] ^= 1  # of page 9
    links[1].path.write_bytes(raw)
    with pytest.raises(Corrupt, match=r"snapshot L1.*page 9"):
        write_merged(tmp_path / "merged", links, RAM)
    assert not (tmp_path / "merged").exists()


def test_a_chain_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    links = write_chain(tmp_path, CHAIN)
    with pytest.raises(ChainMismatch):
        write_merged(tmp_path / "merged", [links[0], links[2]], RAM)
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_read_back_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = write_chain(tmp_path, CHAIN)

    def misplace(fd: int, data: memoryview, offset: int) -> None:
        write_at(fd, data, offset)
        if offset:
            write_at(fd, memoryview(b"x"), offset)

    monkeypatch.setattr("ratoon.store.memory.writing.write_at", misplace)
    with pytest.raises(Corrupt, match="merged"):
        write_merged(tmp_path / "merged", links, RAM)
    assert not (tmp_path / "merged").exists()


def test_nothing_is_replaced(tmp_path: Path) -> None:
    links = write_chain(tmp_path, CHAIN)
    (tmp_path / "merged").touch()
    with pytest.raises(FileExistsError):
        write_merged(tmp_path / "merged", links, RAM)
    assert (tmp_path / "merged").read_bytes() == b""


@pytest.mark.parametrize(
    "pieces",
    [
        [[1]],  # 3 is missing
        [[1, 3], [3]],
        [[1, 3], [2]],
        [[1, 3], [4]],
        [[], [1, 3], [60]],
    ],
)
def test_a_stream_must_bring_what_the_index_says(tmp_path: Path, pieces: list[list[int]]) -> None:
    both = np.stack([page(1), page(3)])
    content = ((u64(piece), np.stack([page(1)] * len(piece) or [])) for piece in pieces if piece)
    with pytest.raises(ValueError, match="content"):
        write_page_stream(tmp_path / "x", RAM, u64([1, 3]), hash_pages(both), content)
    assert not (tmp_path / "x").exists()


def test_the_root_of_merged_memory(tmp_path: Path) -> None:
    links = write_chain(tmp_path, CHAIN)
    write_merged(tmp_path / "merged", links, RAM)
    assert links[-1].root == memory_root(hash_pages(ram_of(flatten(CHAIN))))
