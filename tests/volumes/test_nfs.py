"""The server of volumes: what it answers, and what a hostile guest cannot have."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nfs_client import (
    ACCES,
    BADHANDLE,
    EXIST,
    KEY,
    NOENT,
    NOTHING,
    OK,
    PERM,
    PROCEDURES,
    ROFS,
    STALE,
    Guest,
    answered,
    tree,
)

from ratoon.errors import Conflict, InvalidInput, NotFound
from ratoon.machine.volumes.callers import Caller
from ratoon.machine.volumes.export import Export
from ratoon.machine.volumes.handles import MAC_BYTES, key_of
from ratoon.machine.volumes.holds import hold
from ratoon.machine.volumes.rpc import MAX_RECORD, Records
from ratoon.machine.volumes.xdr import Garbage, Writer

pytest_plugins = ["ways_of_finding"]
pytestmark = pytest.mark.usefixtures("finder")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory with a volume, and with what is not in it."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "secret").write_text("secret")
    return tmp_path


@pytest.fixture
def export(outside: Path) -> Iterator[Export]:
    export = Export(outside / "volume", KEY, read_only=False)
    yield export
    export.close()


@pytest.fixture
def root(export: Export) -> bytes:
    return export.handles.root


@pytest.fixture
def guest(export: Export) -> Guest:
    return Guest(export)


def test_a_file_is_made_written_read_and_removed(guest: Guest, root: bytes, export: Export) -> None:
    assert guest.status("create", Writer().opaque(root).opaque(b"file").u32(1).raw(NOTHING)) == OK
    handle = guest.lookup(root, b"file")
    assert guest.write(handle, b"content", offset=2) == OK
    assert guest.read(handle) == b"\0\0content"
    assert (export.source / "file").read_bytes() == b"\0\0content"
    assert guest.status("remove", Writer().opaque(root).opaque(b"file")) == OK
    assert guest.status("getattr", Writer().opaque(handle)) == STALE


def test_a_handle_outlives_the_server(guest: Guest, root: bytes, export: Export) -> None:
    (export.source / "file").write_text("here")
    handle = guest.lookup(root, b"file")
    (export.source / "file").rename(export.source / "moved")
    again = Export(export.source, KEY, read_only=True)
    assert Guest(again).read(handle) == b"here"
    again.close()


def test_names_in_many_calls(guest: Guest, root: bytes, export: Export) -> None:
    wanted = {b"file-%d" % number for number in range(200)}
    for name in wanted:
        (export.source / name.decode()).touch()
    found = guest.names(root, room=1024)
    assert sorted(found) == sorted([*wanted, b".", b".."])


def test_a_guest_without_the_volume_has_a_definite_answer(root: bytes) -> None:
    stranger = Guest()
    for procedure in PROCEDURES[1:]:
        arguments = Writer().opaque(root).raw(_padding(procedure, root))
        assert stranger.status(procedure, arguments) == STALE, procedure


def _padding(procedure: str, root: bytes) -> bytes:
    """What follows the first handle, so that the call can be read."""
    if procedure in ("rename", "link"):
        return (
            Writer().opaque(b"x").opaque(root).opaque(b"y").done()
            if procedure == "rename"
            else (Writer().opaque(root).opaque(b"y").done())
        )
    if procedure in ("lookup", "remove", "rmdir"):
        return Writer().opaque(b"x").done()
    if procedure in ("create", "mkdir", "symlink"):
        how = Writer().opaque(b"x")
        return (how.u32(0) if procedure == "create" else how).raw(NOTHING).opaque(b"t").done()
    return bytes(64)


@pytest.mark.parametrize("name", [b"..", b".", b"", b"a/b", b"/etc/passwd", b"a\0b", b"../secret"])
def test_no_name_leads_out(guest: Guest, root: bytes, outside: Path, name: bytes) -> None:
    before = tree(outside)
    two = Writer().opaque(root).opaque(name)
    calls = {
        "lookup": two,
        "remove": two,
        "rmdir": two,
        "create": Writer().opaque(root).opaque(name).u32(0).raw(NOTHING),
        "mkdir": Writer().opaque(root).opaque(name).raw(NOTHING),
        "symlink": Writer().opaque(root).opaque(name).raw(NOTHING).opaque(b"x"),
        "rename": Writer().opaque(root).opaque(name).opaque(root).opaque(b"x"),
        "link": Writer().opaque(root).opaque(root).opaque(name),
    }
    for procedure, arguments in calls.items():
        if (procedure, name) != ("lookup", b"."):
            assert guest.status(procedure, arguments) == ACCES, procedure
    assert tree(outside) == before


def test_links_are_text(guest: Guest, root: bytes, outside: Path) -> None:
    (outside / "volume/link").symlink_to("../secret")
    link = guest.lookup(root, b"link")
    status, results = guest.call("readlink", Writer().opaque(link))
    results.fixed(4 + 84)
    assert (status, bytes(results.opaque(100))) == (OK, b"../secret")
    assert guest.status("read", Writer().opaque(link).u64(0).u32(10)) != OK
    assert guest.write(link, b"overwritten") != OK
    owned = Writer().opaque(link).u32(1, 0o777, 1, 7, 1, 8, 0, 0, 0, 0)
    assert guest.status("setattr", owned) == OK
    assert (outside / "secret").read_text() == "secret"
    assert (outside / "secret").stat().st_uid == 0
    made = Writer().opaque(root).opaque(b"new").raw(NOTHING).opaque(b"/etc/shadow")
    assert guest.status("symlink", made) == OK
    # To make a file where a link is does not make one where it leads.
    (outside / "volume/dangling").symlink_to("../made-outside")
    for how in 0, 1:
        arguments = Writer().opaque(root).opaque(b"dangling").u32(how).raw(NOTHING)
        assert guest.status("create", arguments) == EXIST
    assert not (outside / "made-outside").exists()


def test_handles_cannot_be_forged(guest: Guest, root: bytes, export: Export, outside: Path) -> None:
    (export.source / "file").touch()
    handle = guest.lookup(root, b"file")
    other = Export(outside, KEY, read_only=False)
    secret = Guest(other).lookup(other.handles.root, b"secret")
    other.close()
    assert guest.status("getattr", Writer().opaque(secret)) == STALE
    spliced = handle[:8] + secret[8:]
    assert guest.status("getattr", Writer().opaque(spliced)) == BADHANDLE
    for place in range(8, len(handle)):
        forged = bytearray(handle)
        forged[place] ^= 1
        assert guest.status("getattr", Writer().opaque(bytes(forged))) == BADHANDLE
    guessed = handle[:-MAC_BYTES] + secrets.token_bytes(MAC_BYTES)
    assert guest.status("getattr", Writer().opaque(guessed)) == BADHANDLE
    assert guest.status("getattr", Writer().opaque(b"short")) == STALE


def test_a_read_only_volume(guest: Guest, root: bytes, export: Export) -> None:
    (export.source / "file").write_text("as it was")
    (export.source / "directory").mkdir()
    before = tree(export.source)
    handle = guest.lookup(root, b"file")
    reader = Export(export.source, KEY, read_only=True)
    guest = Guest(reader)
    assert guest.read(handle) == b"as it was"
    two = Writer().opaque(root).opaque(b"file")
    for procedure, arguments in {
        "setattr": Writer().opaque(handle).u32(1, 0o777, 0, 0, 0, 0, 0, 0),
        "create": Writer().opaque(root).opaque(b"new").u32(0).raw(NOTHING),
        "mkdir": Writer().opaque(root).opaque(b"new").raw(NOTHING),
        "symlink": Writer().opaque(root).opaque(b"new").raw(NOTHING).opaque(b"x"),
        "remove": two,
        "rmdir": Writer().opaque(root).opaque(b"directory"),
        "rename": Writer().opaque(root).opaque(b"file").opaque(root).opaque(b"new"),
        "link": Writer().opaque(handle).opaque(root).opaque(b"new"),
    }.items():
        assert guest.status(procedure, arguments) == ROFS, procedure
    assert guest.write(handle, b"x") == ROFS
    assert tree(export.source) == before
    reader.close()


def test_no_special_files_and_no_other_identity(guest: Guest, root: bytes, export: Export) -> None:
    for kind in range(1, 8):
        arguments = Writer().opaque(root).opaque(b"node").u32(kind).raw(NOTHING).u32(1, 3)
        assert guest.status("mknod", arguments) == PERM
    mode = Writer().u32(1, 0o6755, 0, 0, 0, 0, 0).done()
    arguments = Writer().opaque(root).opaque(b"program").u32(0).raw(mode)
    assert guest.status("create", arguments) == OK
    assert (export.source / "program").stat().st_mode & 0o7777 == 0o755
    os.mkfifo(export.source / "pipe")
    pipe = guest.lookup(root, b"pipe")
    assert guest.status("read", Writer().opaque(pipe).u64(0).u32(1)) != OK  # and does not wait


def test_new_files_are_the_callers(guest: Guest, root: bytes, export: Export) -> None:
    guest.caller = Caller(1000, 100)
    export.source.chmod(0o777)
    for name, procedure, rest in (
        (b"f", "create", Writer().u32(0).raw(NOTHING)),
        (b"d", "mkdir", Writer().raw(NOTHING)),
        (b"l", "symlink", Writer().raw(NOTHING).opaque(b"to")),
    ):
        arguments = Writer().opaque(root).opaque(name).raw(rest.done())
        assert guest.status(procedure, arguments) == OK
        found = (export.source / name.decode()).lstat()
        assert (found.st_uid, found.st_gid) == (1000, 100)


@pytest.mark.parametrize(
    ("uid", "gid", "granted"), [(0, 0, 0x1F), (7, 0, 0x1F), (9, 8, 0x03), (9, 9, 0x02)]
)
def test_access_is_by_owner_group_and_mode(
    guest: Guest, root: bytes, export: Export, uid: int, gid: int, granted: int
) -> None:
    directory = export.source / "directory"
    directory.mkdir()
    directory.chmod(0o751)
    os.chown(directory, 7, 8)
    guest.caller = Caller(uid, gid)
    handle = guest.lookup(root, b"directory")
    _, results = guest.call("access", Writer().opaque(handle).u32(0x3F))
    results.fixed(4 + 84)
    assert results.u32() == granted


def test_a_call_that_comes_again_is_not_done_again(guest: Guest, root: bytes) -> None:
    """Its answer was lost, so the kernel asks once more; to do it twice would be another answer."""
    record = guest.record("mkdir", Writer().opaque(root).opaque(b"d").raw(NOTHING).done())
    first = guest.answer(record)
    assert guest.answer(record) == first
    assert answered(first)[0] == OK
    assert guest.status("mkdir", Writer().opaque(root).opaque(b"d").raw(NOTHING)) == EXIST


def test_an_exclusive_creation_knows_its_own_file(guest: Guest, root: bytes) -> None:
    arguments = Writer().opaque(root).opaque(b"f").u32(2).raw(b"verifier")
    assert guest.status("create", arguments) == OK
    assert guest.status("create", arguments) == OK
    others = Writer().opaque(root).opaque(b"f").u32(2).raw(b"somebody")
    assert guest.status("create", others) == EXIST


def test_absurd_sizes_and_places(guest: Guest, root: bytes, export: Export) -> None:
    (export.source / "file").touch()
    handle = guest.lookup(root, b"file")
    for offset in 1 << 63, (1 << 64) - 1, (1 << 63) - 1:
        assert guest.write(handle, b"xy", offset=offset) != OK
    size = Writer().opaque(handle).u32(0, 0, 0, 1).u64((1 << 64) - 1).u32(0, 0, 0)
    assert guest.status("setattr", size) != OK
    assert guest.read(handle, count=(1 << 32) - 1) == b""
    for cookie in 1 << 63, (1 << 64) - 1:
        arguments = Writer().opaque(root).u64(cookie).raw(bytes(8)).u32(4096)
        guest.status("readdir", arguments)  # whatever it is, it is an answer
    assert guest.status("readdir", Writer().opaque(root).u64(0).raw(bytes(8)).u32(0)) != OK
    long = Writer().opaque(root).opaque(b"n" * 300)
    assert guest.status("lookup", long) not in (OK, NOENT)


def test_what_goes_wrong_in_a_call_is_an_answer(guest: Guest, root: bytes, export: Export) -> None:
    def broken() -> None:
        raise ValueError("a mistake of ours")

    export.space = broken  # type: ignore[method-assign, assignment]
    reply = guest.answer(guest.record("fsstat", Writer().opaque(root).done()))
    assert reply[-4:] == (5).to_bytes(4, "big")  # SYSTEM_ERR
    none = guest.record("null", b"")[:20] + (22).to_bytes(4, "big") + guest.record("null", b"")[24:]
    assert guest.answer(none)[-4:] == (3).to_bytes(4, "big")  # PROC_UNAVAIL


# Hostile bytes ------------------------------------------------------------------------------------


@given(procedure=st.sampled_from(PROCEDURES), arguments=st.binary(max_size=200))
def test_any_arguments_are_answered(procedure: str, arguments: bytes) -> None:
    guest = Guest()
    assert guest.answer(guest.record(procedure, arguments))


@given(record=st.binary(max_size=300))
def test_any_record_is_answered_or_refused(record: bytes) -> None:
    with suppress(Garbage):
        assert Guest().answer(record)


_WORDS = st.one_of(
    st.integers(0, 3).map(lambda number: number.to_bytes(4, "big")),
    st.integers(0, (1 << 32) - 1).map(lambda number: number.to_bytes(4, "big")),
    st.sampled_from([b"file", b"directory", b"link", b"..", b"../secret", b"new"]).map(
        lambda name: Writer().opaque(name).done()
    ),
)


@given(data=st.data())
def test_calls_on_real_files_stay_in_the_volume(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Right handles, and after them whatever comes."""
    outside = tmp_path_factory.mktemp("hostile")
    volume = outside / "volume"
    (volume / "directory").mkdir(parents=True)
    (volume / "file").write_text("content")
    (volume / "link").symlink_to("../secret")
    (outside / "secret").write_text("secret")
    with closing(Export(volume, KEY, read_only=False)) as export:  # an example may break off
        guest = Guest(export)
        root = export.handles.root
        handles = [root, *(guest.lookup(root, name) for name in (b"file", b"directory", b"link"))]
        known = [Writer().opaque(handle).done() for handle in handles]
        words = st.lists(st.one_of(_WORDS, st.sampled_from(known)), max_size=14)
        for _ in range(5):
            procedure = data.draw(st.sampled_from(PROCEDURES))
            body = data.draw(st.sampled_from(known)) + b"".join(data.draw(words))
            assert guest.answer(guest.record(procedure, body))
    assert {path.name for path in outside.iterdir()} == {"volume", "secret"}
    assert (outside / "secret").read_text() == "secret"
    assert (outside / "secret").stat().st_uid == 0


@given(
    records=st.lists(st.binary(max_size=60), max_size=6),
    data=st.data(),
)
def test_records_however_they_are_cut(records: list[bytes], data: st.DataObject) -> None:
    stream = b""
    for record in records:
        cut = data.draw(st.integers(0, len(record)))
        for piece, last in ((record[:cut], 0), (record[cut:], 1 << 31)):
            stream += (len(piece) | last).to_bytes(4, "big") + piece
    found, reader = [], Records()
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += reader.feed(stream[:size])
        stream = stream[size:]
    assert found == records


def test_records_are_bounded() -> None:
    with pytest.raises(Garbage):
        Records().feed(((1 << 31) | (MAX_RECORD + 1)).to_bytes(4, "big"))
    with pytest.raises(Garbage):
        Records().feed(bytes(4) * 100)  # fragments of nothing, for ever


# What can be a volume -----------------------------------------------------------------------------


def test_what_can_be_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(NotFound, match="missing"):
        Export(tmp_path / "missing", KEY, read_only=True)
    for place in tmp_path / "file", tmp_path / "link", Path("/proc/self"), Path("/sys"):
        with pytest.raises(InvalidInput):
            Export(place, KEY, read_only=True)


def test_one_writes_and_any_number_reads(export: Export) -> None:
    hold(export, "sandbox sb-1")
    other = Export(export.source, KEY, read_only=False)
    with pytest.raises(Conflict, match="held by sandbox sb-1"):
        hold(other, "sandbox sb-2")
    export.close()
    hold(other, "sandbox sb-2")
    other.close()


def test_another_mount_in_it_is_not_reached(guest: Guest, root: bytes, export: Export) -> None:
    # /proc is another file system; so is whatever is mounted below a volume.
    over = Export(Path("/dev").resolve(), KEY, read_only=True) if os.path.ismount("/dev") else None
    if over is None:
        pytest.fail("this host has no /dev of its own")
    status = Guest(over).status("lookup", Writer().opaque(over.handles.root).opaque(b"shm"))
    over.close()
    assert status == ACCES


def test_the_key_is_made_once(tmp_path: Path) -> None:
    directory = tmp_path / "volumes"
    key = key_of(directory)
    assert len(key) == 32
    assert key_of(directory) == key
    assert (directory / ".key").stat().st_mode & 0o777 == 0o600
