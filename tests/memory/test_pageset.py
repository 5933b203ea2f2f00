"""Page-set files: what was written comes back, and nothing else does."""

from __future__ import annotations

import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memory_helpers import RAM, layers, page, u64, write_layer
from ratoon.errors import Corrupt, Incompatible, RatoonError
from ratoon.store.memory.digests import ZERO_DIGEST, hash_pages
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import DATA_OFFSET, PageIndex, read_index, read_pages
from ratoon.store.memory.writing import write_page_set

shared_directory = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL = {3: 1, 4: 0, 5: 2, 40: 3}
#: Where the data of that one ends.
END = DATA_OFFSET + 3 * PAGE_SIZE


def read_all(path: Path, index: PageIndex) -> dict[int, bytes]:
    return {
        int(number): content.tobytes()
        for numbers, pages in read_pages(path, index, None, label="L")
        for number, content in zip(numbers, pages, strict=True)
    }


def reread(path: Path, raw: bytes | bytearray, expected_digest: str | None = None) -> PageIndex:
    path.unlink(missing_ok=True)
    path.write_bytes(raw)
    return read_index(path, label="snapshot L", expected_digest=expected_digest)


@shared_directory
@given(layers)
def test_round_trip(tmp_path: Path, layer: dict[int, int]) -> None:
    path = tmp_path / "layer"
    path.unlink(missing_ok=True)
    written = write_layer(path, layer)
    index = read_index(path, label="L", expected_digest=written.index_digest)

    assert index.ram_pages == RAM
    assert index.numbers.tolist() == sorted(layer)
    assert index.stored == sum(fill != 0 for fill in layer.values())
    assert path.stat().st_size == DATA_OFFSET + index.stored * PAGE_SIZE + 40 * len(layer)
    assert read_all(path, index) == {n: page(fill).tobytes() for n, fill in layer.items()}


def test_layout_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    index = write_layer(path, SMALL)
    raw = path.read_bytes()

    assert raw[:40] == b"RATOONPS" + struct.pack("<IIQQQ", 2, 4096, RAM, 4, 3)
    assert raw[END : END + 32] == struct.pack("<4Q", 3, 4, 5, 40)
    assert raw[END + 64 : END + 96] == ZERO_DIGEST
    assert len(raw) == END + 4 * (8 + 32)
    assert index.data_positions.tolist() == [4096, -1, 8192, 12288]
    assert raw[8192:12288] == page(2).tobytes()
    assert path.stat().st_mode & 0o777 == 0o444


def test_pages_in_the_order_asked_for(tmp_path: Path) -> None:
    index = write_layer(tmp_path / "layer", SMALL)
    entries = np.array([3, 0, 1])
    [(numbers, pages)] = read_pages(tmp_path / "layer", index, entries, label="L")
    assert numbers.tolist() == [40, 3, 4]
    assert pages[:, 0].tolist() == [3, 1, 0]


def test_many_pages_come_in_bounded_chunks(tmp_path: Path) -> None:
    layer = {number: number % 7 for number in range(2500)}
    index = write_layer(tmp_path / "layer", layer, 4096)
    chunks = list(read_pages(tmp_path / "layer", index, None, label="L"))
    assert max(pages.nbytes for _, pages in chunks) <= 4 << 20
    assert np.concatenate([pages[:, 0] for _, pages in chunks]).tolist() == list(layer.values())


def test_write_replaces_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    write_layer(path, SMALL)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        write_layer(path, {1: 1})
    assert path.read_bytes() == before

    pages = np.stack([page(1), page(2)])
    with pytest.raises(Corrupt, match="order"):
        write_page_set(tmp_path / "x", RAM, u64([2, 1]), hash_pages(pages), pages, np.arange(2))
    with pytest.raises(IndexError):
        write_page_set(tmp_path / "x", RAM, u64([1, 2]), hash_pages(pages), pages, np.arange(2) + 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["layer"]


def test_every_flipped_index_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    index = write_layer(path, SMALL)
    raw = bytearray(path.read_bytes())
    for at in (*range(DATA_OFFSET), *range(END, len(raw))):
        raw[at] ^= 0x10
        with pytest.raises((Corrupt, Incompatible), match="snapshot L"):
            reread(path, raw, index.index_digest)
        raw[at] ^= 0x10
    reread(path, raw, index.index_digest)


def test_every_flipped_structural_byte_is_found_without_a_manifest(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    write_layer(path, {RAM - 1: 1})
    raw = bytearray(path.read_bytes())
    # One more page of RAM, or another number for the page, only the manifest can tell; another
    # digest is found when the page is read.
    untold = {16, 17, 18, 19, 20, 21}
    end = DATA_OFFSET + PAGE_SIZE
    for at in {*range(DATA_OFFSET), *range(end + 1, end + 8)} - untold:
        raw[at] ^= 0x80
        with pytest.raises((Corrupt, Incompatible)):
            reread(path, raw)
        raw[at] ^= 0x80


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (0, b"NOTPAGES", "not a page set"),
        (12, struct.pack("<I", 8192), "header is damaged"),
        (63, b"\1", "header is damaged"),
        (16, struct.pack("<Q", 0), "impossible counts"),
        (16, struct.pack("<Q", 40), "beyond"),
        (16, struct.pack("<Q", 2**64 - 1), "impossible counts"),
        (24, struct.pack("<Q", 2**40), "impossible counts"),
        (32, struct.pack("<Q", 5), "impossible counts"),
        (32, struct.pack("<Q", 2), "bytes long"),
        (END, struct.pack("<Q", 4), "not in order"),
        (END, struct.pack("<Q", 5), "not in order"),
        (END + 64, bytes(32), "stored count"),
        (64, b"\1", "padding"),
        (4095, b"\1", "padding"),
    ],
)
def test_each_structural_error_is_named(tmp_path: Path, at: int, value: bytes, says: str) -> None:
    path = tmp_path / "layer"
    write_layer(path, SMALL)
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    with pytest.raises(Corrupt, match=says):
        reread(path, raw)


def test_another_version_is_incompatible_and_both_are_named(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    write_layer(path, SMALL)
    raw = bytearray(path.read_bytes())
    raw[8] = 1
    with pytest.raises(Incompatible, match="version 1, this Ratoon reads version 2"):
        reread(path, raw)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    write_layer(path, SMALL)
    path.chmod(0o600)
    for size in reversed(range(path.stat().st_size)):
        os.truncate(path, size)
        with pytest.raises(Corrupt, match="snapshot L"):
            read_index(path, label="snapshot L")


def test_a_file_that_is_too_long_missing_or_no_file(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    write_layer(path, SMALL)
    with pytest.raises(Corrupt, match="bytes long"):
        reread(path, path.read_bytes() + bytes(1))
    with pytest.raises(Corrupt, match="snapshot L is missing"):
        read_index(tmp_path / "none", label="snapshot L")
    with pytest.raises(Corrupt, match="not a regular file"):
        read_index(tmp_path, label="snapshot L")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(Corrupt, match="not a regular file"):
        read_index(tmp_path / "fifo", label="snapshot L")


def test_huge_counts_allocate_nothing(tmp_path: Path) -> None:
    header = b"RATOONPS" + struct.pack("<IIQQQ", 2, 4096, 2**50, 2**49, 2**48) + bytes(24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Corrupt, match="bytes long"):
        reread(tmp_path / "layer", header + bytes(8192))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024  # KiB


@shared_directory
@given(st.integers(0, 3 * PAGE_SIZE - 1), st.integers(1, 255))
def test_a_flipped_data_byte_names_its_page(tmp_path: Path, at: int, flip: int) -> None:
    path = tmp_path / "layer"
    path.unlink(missing_ok=True)
    index = write_layer(path, SMALL)
    raw = bytearray(path.read_bytes())
    raw[DATA_OFFSET + at] ^= flip
    assert reread(path, raw, index.index_digest).stored == 3
    number = [3, 5, 40][at // PAGE_SIZE]
    with pytest.raises(Corrupt, match=f"snapshot L: page {number} does not match"):
        list(read_pages(path, index, None, label="snapshot L"))


def test_data_cut_short_after_the_index_was_read(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    index = write_layer(path, SMALL)
    path.chmod(0o600)
    os.truncate(path, DATA_OFFSET + PAGE_SIZE + 100)
    with pytest.raises(Corrupt, match=r"snapshot L: page 3 .*cut short"):
        list(read_pages(path, index, None, label="snapshot L"))


@shared_directory
@given(
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda counts, rest: (
                (b"RATOONPS" + struct.pack("<IIQQQ", 2, 4096, *counts)).ljust(4096, b"\0")
                + (rest * 9000)[: 4096 * counts[2] + 40 * counts[1]]
            ),
            st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 9)),
            st.binary(min_size=1, max_size=200),
        ),
    )
)
def test_arbitrary_bytes_raise_nothing_else(tmp_path: Path, raw: bytes) -> None:
    try:
        index = reread(tmp_path / "layer", raw)
        list(read_pages(tmp_path / "layer", index, None, label="L"))
    except RatoonError:
        pass
