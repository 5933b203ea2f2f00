"""Page sets that are written piece by piece, while what is to come is made."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_helpers import RAM, Layer, layers, page, u64, write_layer
from ratoon.store.memory import digests, writing
from ratoon.store.memory.digests import Piece, changed_pieces, hash_pages, zero_array
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import read_index
from ratoon.store.memory.writing import writing_page_set

shared_directory = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def pieces_of(layer: Layer, sizes: list[int]) -> Iterator[Piece]:
    numbers = sorted(layer)
    for size in [*sizes, len(layer)]:
        some, numbers = numbers[:size], numbers[size:]
        pages = np.array([page(layer[n]) for n in some], np.uint8).reshape(-1, PAGE_SIZE)
        yield u64(some), hash_pages(pages), np.arange(len(some)), pages


@shared_directory
@given(layers, st.lists(st.integers(0, 5), max_size=5))
def test_in_pieces_or_as_a_whole_the_file_is_the_same(
    tmp_path: Path, layer: Layer, sizes: list[int]
) -> None:
    for name in ("whole", "pieces"):
        (tmp_path / name).unlink(missing_ok=True)
    write_layer(tmp_path / "whole", layer)
    with writing_page_set(tmp_path / "pieces", RAM, pieces_of(layer, sizes)) as index:
        assert index.numbers.tolist() == sorted(layer)
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (tmp_path / "pieces").stat().st_mode & 0o777 == 0o444


def test_what_changed_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_PIECE", 3)
    layer = {number: number % 4 for number in range(0, 40, 2)}
    numbers = u64(sorted(layer))
    pages = np.array([page(fill) for fill in layer.values()], np.uint8)
    pieces = [*changed_pieces(numbers, pages, zero_array(RAM))]
    assert [len(piece) for *_, piece in pieces] == [3] * 6 + [2]
    with writing_page_set(tmp_path / "layer", RAM, pieces):
        pass
    found = read_index(tmp_path / "layer", label="L")
    assert found.numbers.tolist() == [n for n, fill in layer.items() if fill]


@pytest.mark.parametrize("place", ["_write_data", "_finish"])
def test_a_full_disk_is_told_with_the_files_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, place, no_space)
    with (
        pytest.raises(OSError, match="No space left") as caught,
        writing_page_set(tmp_path / "layer", RAM, pieces_of({1: 1, 2: 2}, [1])),
    ):
        pass
    assert caught.value.filename == str(tmp_path / "layer")
    assert not (tmp_path / "layer").exists()


def test_pieces_or_a_block_that_fail_leave_no_file(tmp_path: Path) -> None:
    def broken() -> Iterator[Piece]:
        yield from pieces_of({1: 1, 2: 2}, [1])
        raise RuntimeError("broken")

    with (
        pytest.raises(RuntimeError, match="broken"),
        writing_page_set(tmp_path / "layer", RAM, broken()),
    ):
        pytest.fail("the block was entered")
    with (
        pytest.raises(ValueError, match="in the block"),
        writing_page_set(tmp_path / "layer", RAM, pieces_of({1: 1}, [])),
    ):
        raise ValueError("in the block")
    assert list(tmp_path.iterdir()) == []
