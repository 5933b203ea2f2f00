"""The compressed page set: the same content as the plain one, whatever is asked of it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from memory_helpers import RAM, Layer, chains, layers, page, ram_of, write_chain, write_layer
from ratoon.compression import LEVEL
from ratoon.errors import Corrupt, Incompatible, RatoonError
from ratoon.store.memory.compressed import FRAME, is_compressed, plain_size
from ratoon.store.memory.digests import hash_pages
from ratoon.store.memory.image import ImageStore
from ratoon.store.memory.merge import write_merged
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import (
    DATA_OFFSET,
    PageIndex,
    plain_content,
    read_index,
    read_pages,
)
from ratoon.store.memory.recode import compress_page_set, expand_page_set
from ratoon.store.memory.writing import write_page_set

shared_directory = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def fresh(directory: Path, *names: str) -> list[Path]:
    paths = [directory / name for name in names]
    for path in paths:
        path.unlink(missing_ok=True)
    return paths


def compress(path: Path, index: PageIndex) -> None:
    """Compress a layer in its place."""
    small = path.with_name("small")
    compress_page_set(path, small, index.index_digest, LEVEL, "L")
    small.rename(path)


def pages_of(path: Path, index: PageIndex, entries: NDArray[np.int64] | None) -> bytes:
    return b"".join(pages.tobytes() for _, pages in read_pages(path, index, entries, label="L"))


def many(path: Path, count: int = 300) -> PageIndex:
    """A layer of several frames: every third page of zeros, the others of words that repeat."""
    numbers = np.arange(1, 2 * count, 2).astype(np.uint64)
    pages = np.zeros((count, PAGE_SIZE), np.uint8)
    for row in range(count):
        if row % 3:
            pages[row] = np.resize(np.frombuffer(f"page {row} ".encode(), np.uint8), PAGE_SIZE)
    digests = hash_pages(pages)
    return write_page_set(path, 4096, numbers, digests, pages, np.arange(count))


@shared_directory
@given(layers, st.data())
def test_what_is_read_is_the_same(tmp_path: Path, layer: Layer, data: st.DataObject) -> None:
    plain, small, again = fresh(tmp_path, "plain", "small", "again")
    index = write_layer(plain, layer)
    compress_page_set(plain, small, index.index_digest, LEVEL, "L")

    found = read_index(small, label="L", expected_digest=index.index_digest)
    assert found.numbers.tolist() == index.numbers.tolist()
    assert found.index_digest == index.index_digest
    entries = np.array(
        data.draw(st.lists(st.integers(0, len(layer) - 1)) if layer else st.just([])), np.int64
    )
    assert pages_of(small, found, entries) == pages_of(plain, index, entries)
    assert pages_of(small, found, None) == pages_of(plain, index, None)
    piece = data.draw(st.integers(1, 3 * PAGE_SIZE))
    assert b"".join(plain_content(small, label="L", piece=piece)) == plain.read_bytes()
    assert plain_size(small, label="L") == plain_size(plain, label="L") == plain.stat().st_size
    assert is_compressed(small, label="L")
    assert not is_compressed(plain, label="L")

    expand_page_set(small, again, index.index_digest, "L")
    assert again.read_bytes() == plain.read_bytes()


def test_many_frames_in_any_order(tmp_path: Path) -> None:
    plain, small = tmp_path / "plain", tmp_path / "small"
    index = many(plain)
    compress_page_set(plain, small, index.index_digest, LEVEL, "L")
    assert index.stored > 3 * FRAME
    assert small.stat().st_size < plain.stat().st_size / 5
    assert small.stat().st_mode & 0o777 == 0o444
    for entries in (
        np.arange(300)[::-1].copy(),
        np.random.default_rng(1).permutation(300)[:50],
        np.array([299, 0, 299, 150]),
    ):
        assert pages_of(small, index, entries) == pages_of(plain, index, entries)
    pieces = [len(piece) for piece in plain_content(small, label="L", piece=100_000)]
    assert pieces[:-1] == [100_000] * (plain.stat().st_size // 100_000)


def test_few_pages_are_few_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layer"
    index = many(path)
    compress(path, index)
    read: list[int] = []
    preadv = os.preadv

    def counted(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(fd, buffers, offset)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counted)
    pages_of(path, index, np.array([100]))
    assert sum(read) < path.stat().st_size / 2
    assert len(read) == 3, "the header, the lengths, one frame"


def test_a_layer_of_zeros_or_of_nothing(tmp_path: Path) -> None:
    for name, layer in (("nothing", {}), ("zeros", {3: 0, 9: 0})):
        path = tmp_path / name
        index = write_layer(path, layer)
        compress(path, index)
        assert pages_of(path, read_index(path, label="L"), None) == bytes(len(layer) * PAGE_SIZE)


@shared_directory
@given(chains, st.data())
def test_images_and_merges_of_either_form_are_equal(
    tmp_path: Path, chain: list[Layer], data: st.DataObject
) -> None:
    fresh(tmp_path, "merged", *(f"L{number}" for number in range(4)))
    links = write_chain(tmp_path, chain)
    for link in links:
        if data.draw(st.booleans()):
            compress(link.path, link.index)
    images = ImageStore(tmp_path / "images")
    image = images.make(links, RAM)
    flat = {number: fill for layer in chain for number, fill in layer.items()}
    assert image.read_bytes() == ram_of(flat).tobytes()
    images.remove(links[-1].root)
    merged = write_merged(tmp_path / "merged", links, RAM)
    assert merged.stored == sum(fill != 0 for fill in flat.values())


def test_a_file_may_change_its_form_between_index_and_pages(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    index = many(path)
    content = pages_of(path, index, None)
    compress(path, index)
    assert pages_of(path, index, None) == content


def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    index = many(path, 100)
    content = pages_of(path, index, None)
    compress(path, index)
    raw = bytearray(path.read_bytes())
    unnoticed = 0
    places = [*range(100), *range(100, len(raw), 7)]
    for at in places:
        raw[at] ^= 1 << at % 8
        path.unlink()
        path.write_bytes(raw)
        with suppress(Corrupt, Incompatible):
            found = read_index(path, label="snapshot L", expected_digest=index.index_digest)
            assert pages_of(path, found, None) == content
            unnoticed += 1
        raw[at] ^= 1 << at % 8
    assert unnoticed < len(places) / 50, "what zstd does not look at"


def test_damage_names_the_layer_and_the_pages_of_the_frame(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    index = many(path)
    compress(path, index)
    raw = bytearray(path.read_bytes())
    lengths = struct.unpack_from("<4I", raw, 64)
    raw[len(raw) - sum(lengths[1:])] ^= 1  # the magic of the second frame
    path.unlink()
    path.write_bytes(raw)
    first, last = index.stored_numbers[[FRAME, 2 * FRAME - 1]]
    with pytest.raises(Corrupt, match=f"snapshot L: pages {first} to {last} cannot be"):
        list(read_pages(path, index, None, label="snapshot L"))
    sound = np.flatnonzero(index.numbers < first)
    assert list(read_pages(path, index, sound, label="snapshot L"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw[:8] + struct.pack("<I", 2) + raw[12:], "version 2"),
        (lambda raw: raw[:12] + struct.pack("<I", 32) + raw[16:], "header of the compressed"),
        (lambda raw: raw[:63] + b"\1" + raw[64:], "header of the compressed"),
        (lambda raw: raw[:32] + struct.pack("<Q", 2**62) + raw[40:], "header of the compressed"),
        (lambda raw: raw[:24] + struct.pack("<Q", 2**62) + raw[32:], "header of the compressed"),
        (lambda raw: raw[:16] + struct.pack("<Q", 2**62) + raw[24:], "header says"),
        (lambda raw: raw[:16] + struct.pack("<Q", 10) + raw[24:], "compressed index"),
        (lambda raw: raw[:16] + struct.pack("<Q", 0) + raw[24:], "compressed index|bytes"),
        (lambda raw: raw[:-1], "frames end at"),
        (lambda raw: raw + b"\0", "frames end at"),
        (lambda raw: raw[:40], "cut short"),
        (lambda raw: raw[:80], "header of the compressed"),
    ],
)
def test_each_structural_error_of_it_is_named(
    tmp_path: Path, change: Callable[[bytes], bytes], says: str
) -> None:
    path = tmp_path / "layer"
    index = many(path)
    compress(path, index)
    raw = change(path.read_bytes())
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises((Corrupt, Incompatible), match=says):
        read_index(path, label="snapshot L", expected_digest=index.index_digest)


@shared_directory
@given(st.binary(max_size=300), st.integers(0, 3))
def test_arbitrary_bytes_behind_its_magic_raise_nothing_else(
    tmp_path: Path, rest: bytes, frames: int
) -> None:
    (path,) = fresh(tmp_path, "layer")
    header = struct.pack("<IIQQQ24x", 1, FRAME, len(rest), len(rest) // 2, frames)
    path.write_bytes(b"RATOONPZ" + header + rest)
    try:
        index = read_index(path, label="L")
        list(read_pages(path, index, None, label="L"))
    except RatoonError:
        pass


def test_a_damaged_layer_is_not_compressed(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    index = write_layer(path, {3: 1, 5: 2})
    raw = bytearray(path.read_bytes())
    raw[DATA_OFFSET] ^= 1
    path.unlink()
    path.write_bytes(raw)
    with pytest.raises(Corrupt, match="page 3"):
        compress_page_set(path, tmp_path / "small", index.index_digest, LEVEL, "L")
    assert not (tmp_path / "small").exists()


def test_what_was_written_wrongly_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "layer"
    index = write_layer(path, {3: 1, 5: 2})
    monkeypatch.setattr(
        "ratoon.store.memory.recode._frames", lambda *_: iter([memoryview(page(7).tobytes())])
    )
    with pytest.raises(Corrupt, match="rewritten layer"):
        compress_page_set(path, tmp_path / "small", index.index_digest, LEVEL, "L")
    assert not (tmp_path / "small").exists()
