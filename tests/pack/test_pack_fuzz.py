"""Whatever bytes a pack has: it is refused with an error of Ratoon's own, or it is what it was."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pack_helpers import (
    Members,
    archive_of,
    content_of,
    members_of,
    publish_chain,
    sealed,
    state_of,
    write_pack,
    zstd,
)
from ratoon.errors import RatoonError
from ratoon.store.pack.pack import pack
from ratoon.store.pack.packfile import tar_header
from ratoon.store.pack.unpack import unpack
from ratoon.store.snapshot.store import Store


@dataclass(frozen=True)
class Field:
    """A store, a sound pack of L2, and what is in it."""

    store: Store
    sound: bytes
    members: Members
    content: dict[str, bytes]

    @property
    def path(self) -> Path:
        return self.store.home.with_name("pack")


@pytest.fixture(scope="module")
def field() -> Iterator[Field]:
    with tempfile.TemporaryDirectory() as name:
        source = Store.open(Path(name) / "source")
        head = publish_chain(source)[-1]
        path = pack(source, "L2", Path(name) / "pack").path
        store = Store.open(Path(name) / "home")
        yield Field(store, path.read_bytes(), members_of(path), content_of(head))


@contextmanager
def survives(field: Field) -> Iterator[None]:
    """The block unpacks something: that gives the snapshot as it was, or nothing at all."""
    before = state_of(field.store)
    try:
        yield
    except RatoonError:
        assert state_of(field.store) == before
    else:
        snapshot = field.store.get("L2")
        assert content_of(snapshot) == field.content
        field.store.delete("L2")


def check(field: Field, raw: bytes) -> None:
    field.path.write_bytes(raw)
    with survives(field):
        unpack(field.store, field.path)


def edits(length: int) -> st.SearchStrategy[list[tuple[int, int, bytes]]]:
    """Where (start, end) to put what instead: flips, cuts, insertions, overwritten stretches."""
    at, some = st.integers(0, length), st.binary(min_size=1, max_size=40)
    overwrite = st.tuples(at, some).map(lambda got: (got[0], got[0] + len(got[1]), got[1]))
    splice = st.tuples(at, st.integers(0, 40), st.binary(max_size=40)).map(
        lambda got: (got[0], got[0] + got[1], got[2])
    )
    return st.lists(overwrite | splice, min_size=1, max_size=4)


def edited(raw: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for start, end, instead in changes:
        raw = raw[:start] + instead + raw[end:]
    return raw


@given(raw=st.binary(max_size=5000))
def test_any_bytes(field: Field, raw: bytes) -> None:
    check(field, raw)


@given(raw=st.binary(max_size=5000))
def test_any_bytes_in_a_frame(field: Field, raw: bytes) -> None:
    check(field, zstd.compress(raw))


@settings(max_examples=150)
@given(data=st.data())
def test_a_pack_with_bytes_changed(field: Field, data: st.DataObject) -> None:
    check(field, edited(field.sound, data.draw(edits(len(field.sound)))))


@settings(max_examples=150)
@given(data=st.data())
def test_a_pack_with_one_bit_flipped(field: Field, data: st.DataObject) -> None:
    raw = bytearray(field.sound)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    check(field, bytes(raw))


@given(data=st.data())
def test_a_pack_cut_short(field: Field, data: st.DataObject) -> None:
    check(field, field.sound[: data.draw(st.integers(0, len(field.sound) - 1))])


@settings(max_examples=150)
@given(data=st.data())
def test_an_archive_with_bytes_changed(field: Field, data: st.DataObject) -> None:
    """In the archive itself, so that neither zstd nor its checksum sees it."""
    names = [*field.members]
    name = data.draw(st.sampled_from(names))
    start = archive_of(field.members).index(tar_header(name, len(field.members[name])))
    changes = data.draw(edits(1024 + len(field.members[name])))
    changes = [(start + first, start + last, instead) for first, last, instead in changes]
    check(field, zstd.compress(edited(archive_of(field.members), changes)))


@settings(max_examples=200)
@given(data=st.data())
def test_a_pack_whose_digests_fit_what_was_changed(field: Field, data: st.DataObject) -> None:
    """As by a forger who makes `pack.json` anew: what the manifest vouches for is found."""
    name = data.draw(st.sampled_from([*field.members][1:]))
    changes = data.draw(edits(len(field.members[name])))
    changed = {**field.members, name: edited(field.members[name], changes)}
    check(field, zstd.compress(archive_of(sealed(changed))))


names = st.sampled_from(
    ["pack.json", "pack.sig", "manifest.json", "manifest.b3", "vmstate", "x/.."]
)


@given(members=st.lists(st.tuples(names, st.binary(max_size=600)), max_size=8))
def test_any_members(field: Field, members: list[tuple[str, bytes]]) -> None:
    check(field, zstd.compress(archive_of(members)))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@given(changes=st.dictionaries(st.sampled_from(["format", "tag", "files", "x"]), json_like))
def test_any_contents(field: Field, changes: dict[str, Any]) -> None:
    path = write_pack(field.path, archive_of(sealed(field.members, **changes)))
    with survives(field):
        unpack(field.store, path)


def test_nothing_was_left(field: Field) -> None:
    assert list(field.store.staging.iterdir()) == []
    assert list(field.store.snapshots.iterdir()) == []
    check(field, field.sound)
