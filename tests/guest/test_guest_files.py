"""Files through the agent, in one step each: every kind, every error, names of any bytes."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from channel_peer import connected, together
from files_on_host import FilesOnHost, files_on_host, until
from hypothesis import given, settings
from hypothesis import strategies as st

from ratoon.api.files import FileInfo
from ratoon.errors import (
    GuestAccessDenied,
    GuestError,
    GuestFileError,
    GuestFileExists,
    GuestFileNotFound,
    GuestIsADirectory,
    GuestNotADirectory,
    InvalidInput,
)
from ratoon.machine.guest.file_requests import guest_path
from ratoon.machine.guest.files import GuestFiles
from ratoon.machine.guest.shared import wire

TIME_NS = 1_600_000_000_123_456_789


@pytest.fixture(scope="module")
async def files() -> AsyncIterator[FilesOnHost]:
    async with files_on_host() as files:
        yield files


@pytest.fixture(autouse=True)
async def _the_agent_lets_go(files: FilesOnHost) -> AsyncIterator[None]:
    """Whatever is asked for, in the end it holds what it held before."""
    before = files.process.descriptors
    yield
    await until(lambda: files.process.descriptors == before)


# Paths ------------------------------------------------------------------------------------------


@given(st.binary(min_size=1).filter(lambda path: b"\0" not in path))
def test_any_bytes_are_a_path_and_come_back(path: bytes) -> None:
    assert guest_path(path).encode("utf-8", "surrogateescape") == path
    assert guest_path(guest_path(path)) == guest_path(path)


@pytest.mark.parametrize("path", ["", b"", "a\0b", b"\0", "\ud800"])
def test_what_cannot_be_a_path(path: str | bytes) -> None:
    with pytest.raises(InvalidInput):
        guest_path(path)


names = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..", b"x")
)


@given(names)
@settings(max_examples=40)
async def test_any_name_that_a_file_may_have(files: FilesOnHost, name: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="ratoon-") as here:
        path = os.fsencode(here) + b"/" + name
        await files.write(path, name)
        assert [os.fsencode(entry.name) for entry in Path(here).iterdir()] == [name]
        (found,) = await files.list(here)
        assert os.fsencode(found.path) == path
        assert await files.read(found.path) == name
        await files.rename(found.path, f"{here}/x")
        await files.symlink(path, name)
        assert (await files.stat(path, follow_symlinks=False)).target == os.fsdecode(name)
        await files.remove(path)
        with pytest.raises(GuestFileNotFound):
            await files.stat(path)


async def test_relative_paths_are_relative_to_the_root(files: FilesOnHost) -> None:
    assert (await files.stat("etc/passwd")).path == "/etc/passwd"
    assert (await files.stat(Path("etc"))).type == "directory"


# What is there ----------------------------------------------------------------------------------


async def test_what_a_file_is(files: FilesOnHost, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1234))
    os.chown(tmp_path / "file", 12, 34)
    (tmp_path / "file").chmod(0o4710)
    os.utime(tmp_path / "file", ns=(0, TIME_NS))
    path = str(tmp_path / "file")
    assert await files.stat(path) == FileInfo(
        path, "file", 1234, 0o4710, uid=12, gid=34, mtime_ns=TIME_NS, target=None
    )


async def test_each_type_of_file(files: FilesOnHost, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "symlink").symlink_to("fifo")
    (tmp_path / "directory").mkdir()
    os.mknod(tmp_path / "block device", stat.S_IFBLK | 0o600, os.makedev(7, 200))
    os.mknod(tmp_path / "character device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        found = await files.list(tmp_path)
    assert [Path(status.path).name for status in found] == [status.type for status in found]
    assert len(found) == 6
    assert (await files.stat(tmp_path / "symlink")).type == "fifo"
    link = await files.stat(tmp_path / "symlink", follow_symlinks=False)
    assert (link.type, link.target) == ("symlink", "fifo")


async def test_a_listing_goes_as_deep_as_asked(files: FilesOnHost, tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "b" / "f").touch()
    (tmp_path / "a" / "round").symlink_to(".")
    (tmp_path / "z").touch()

    async def listed(depth: int) -> list[str]:
        found = await files.list(tmp_path, depth=depth)
        return [str(Path(status.path).relative_to(tmp_path)) for status in found]

    assert await listed(1) == ["a", "z"]
    assert await listed(2) == ["a", "a/b", "a/round", "z"]
    assert await listed(9) == ["a", "a/b", "a/b/c", "a/b/f", "a/round", "z"]


async def test_a_listing_of_many(files: FilesOnHost, tmp_path: Path) -> None:
    """More than a window of them."""
    expected = [f"{number:05}{'x' * 100}" for number in range(5000)]
    for name in expected:
        (tmp_path / name).touch()
    assert [Path(status.path).name for status in await files.list(tmp_path)] == expected
    with pytest.raises(GuestError, match="more than 4999 things"):
        await files.list(tmp_path, limit=4999)


# Content ----------------------------------------------------------------------------------------


async def test_a_file_is_read_in_whole_and_in_part(files: FilesOnHost, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "file").write_bytes(content)
    path = tmp_path / "file"
    assert await files.read(path) == content
    assert await files.read(path, offset=299_990) == content[-10:]
    assert await files.read(path, offset=100_000, length=100_001) == content[100_000:200_001]
    assert await files.read(path, length=0) == b""
    assert await files.read(path, offset=299_999, length=10**9) == content[-1:]
    assert await files.read(path, offset=10**12) == b""
    for wrong in ({"offset": -1}, {"length": -1}):
        with pytest.raises(InvalidInput):
            await files.read(path, **wrong)


async def test_a_file_larger_than_it_says(files: FilesOnHost) -> None:
    """Those of /proc have no size."""
    assert (await files.stat("/proc/self/status")).size_bytes == 0
    assert "Name:" in (await files.read("/proc/self/status")).decode()


async def test_no_more_is_read_than_was_allowed(files: FilesOnHost, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(2 << 20))
    with pytest.raises(GuestError, match="more than 1000000 bytes"):
        await files.read(tmp_path / "file", limit=1_000_000)


async def test_reading_may_stop_anywhere(files: FilesOnHost, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(5 << 20))
    async with files.reading(tmp_path / "file") as pieces:
        assert await anext(pieces)
    async with files.reading(tmp_path / "file"):
        pass


async def test_a_new_file_and_one_that_is_replaced(files: FilesOnHost, tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert await files.write(path, b"one") == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    os.chown(path, 12, 34)
    path.chmod(0o6750)
    inode = path.stat().st_ino
    await files.write(path, b"two")
    status = path.stat()
    assert (path.read_bytes(), status.st_ino == inode) == (b"two", False)
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12, 34, 0o6750)
    await files.write(path, b"three", mode=0o600, uid=56)
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (56, 34, 0o600)
    assert list(tmp_path.iterdir()) == [path]


async def test_a_file_in_place_is_the_same_file(files: FilesOnHost, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    inode = path.stat().st_ino
    await files.write(path, b"short", in_place=True, mode=0o611)
    assert (path.read_bytes(), path.stat().st_ino) == (b"short", inode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o611
    await files.write("/dev/null", bytes(1000), in_place=True)
    await files.write(tmp_path / "new", b"", in_place=True)
    assert (tmp_path / "new").read_bytes() == b""


async def test_appending(files: FilesOnHost, tmp_path: Path) -> None:
    await files.append(tmp_path / "log", b"one\n")
    inode = (tmp_path / "log").stat().st_ino
    assert await files.append(tmp_path / "log", b"two\n") == 4
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"
    assert (tmp_path / "log").stat().st_ino == inode


async def test_content_that_comes_bit_by_bit(files: FilesOnHost, tmp_path: Path) -> None:
    async def content() -> AsyncIterator[bytes]:
        for number in range(100):
            assert not (tmp_path / "file").exists()
            yield bytes([number]) * number * 100

    await files.write(tmp_path / "file", content())
    expected = b"".join(bytes([number]) * number * 100 for number in range(100))
    assert (tmp_path / "file").read_bytes() == expected


async def test_writing_goes_through_a_link(files: FilesOnHost, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d/file")
    await files.write(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "d" / "file").read_bytes() == b"content"
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["file"]


async def test_parents_are_made_when_asked(files: FilesOnHost, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    with pytest.raises(GuestFileNotFound):
        await files.write(path, b"content")
    await files.write(path, b"content", parents=True)
    await files.write(path, b"more", parents=True)
    assert path.read_bytes() == b"more"


async def test_any_number_of_parents_is_made(files: FilesOnHost, tmp_path: Path) -> None:
    root = os.fsencode(tmp_path)
    deep = b"/".join([root, *[b"d"] * ((4095 - len(root) - 5) // 2)])
    try:
        await files.mkdir(deep, parents=True)
        assert (await files.stat(deep)).type == "directory"
        with pytest.raises(GuestFileError) as caught:
            await files.mkdir(deep + b"/d" * 100, parents=True)
        assert caught.value.kind == "ENAMETOOLONG"
        await files.remove(tmp_path / "d", recursive=True)
    finally:
        await asyncio.to_thread(os.system, f"rm -rf {tmp_path}/d")  # too deep for Python


async def test_content_that_fails_to_come_leaves_the_old(
    files: FilesOnHost, tmp_path: Path
) -> None:
    async def content() -> AsyncIterator[bytes]:
        yield bytes(100_000)
        await until(lambda: len(list(tmp_path.iterdir())) == 2)
        raise ValueError("the source has run dry")

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(ValueError, match="run dry"):
        await files.write(tmp_path / "file", content())
    await until(lambda: len(list(tmp_path.iterdir())) == 1)
    assert (tmp_path / "file").read_bytes() == b"old"


async def test_a_write_that_is_cancelled_leaves_nothing(files: FilesOnHost, tmp_path: Path) -> None:
    async def content() -> AsyncIterator[bytes]:
        yield bytes(100_000)
        await asyncio.Event().wait()

    writing = asyncio.create_task(files.write(tmp_path / "file", content()))
    await until(lambda: len(list(tmp_path.iterdir())) == 1)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    await until(lambda: list(tmp_path.iterdir()) == [])


async def test_a_write_whose_host_goes_away_leaves_nothing(tmp_path: Path) -> None:
    """Another host takes over: so it is in a fork, too."""
    async with files_on_host() as files:
        before = files.process.descriptors
        async with files.channel.open(
            "files.write",
            path=str(tmp_path / "file"),
            mode=None,
            uid=None,
            gid=None,
            parents=False,
            how="replace",
        ) as stream:
            await stream.write(bytes(100_000))
            await until(lambda: len(list(tmp_path.iterdir())) == 1)
            files.channel.begin()
            await files.channel.request("hello", timeout=20)
            assert list(tmp_path.iterdir()) == []
            await until(lambda: files.process.descriptors == before)


# Changes ----------------------------------------------------------------------------------------


async def test_directories(files: FilesOnHost, tmp_path: Path) -> None:
    await files.mkdir(tmp_path / "a", mode=0o1777)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o1777
    with pytest.raises(GuestFileExists):
        await files.mkdir(tmp_path / "a")
    await files.mkdir(tmp_path / "a", mode=0o700, exist_ok=True)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o1777
    with pytest.raises(GuestFileNotFound):
        await files.mkdir(tmp_path / "b" / "c")
    await files.mkdir(tmp_path / "b" / "c", parents=True)
    assert (tmp_path / "b" / "c").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(GuestFileExists):
        await files.mkdir(tmp_path / "file", exist_ok=True)
    await files.mkdir("/", parents=True, exist_ok=True)


async def test_removing(files: FilesOnHost, tmp_path: Path) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("keep")
    (tmp_path / "tree" / "a" / "b").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "link").symlink_to(tmp_path / "keep")
    for number in range(100):
        (tmp_path / "tree" / "a" / f"{number}").touch()
    with pytest.raises(GuestFileExists, match="not empty"):
        await files.remove(tmp_path / "tree")
    await files.remove(tmp_path / "empty")
    await files.remove(tmp_path / "link", recursive=True)
    await files.remove(f"{tmp_path}/tree/", recursive=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "keep"]
    with pytest.raises(GuestFileNotFound):
        await files.remove(tmp_path / "tree")
    await files.remove(tmp_path / "tree", missing_ok=True)
    with pytest.raises(GuestFileError, match="its own name is needed"):
        await files.remove(tmp_path / "keep" / "..")


async def test_renaming(files: FilesOnHost, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(GuestFileExists, match=f"{tmp_path}/a to {tmp_path}/b: File exists"):
        await files.rename(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "b"
    await files.rename(tmp_path / "a", tmp_path / "b", replace=True)
    await files.rename(tmp_path / "b", tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert (tmp_path / "c").read_text() == "a"
    for replace in (False, True):
        with pytest.raises(GuestFileNotFound, match=f"{tmp_path}/a to"):
            await files.rename(tmp_path / "a", tmp_path / "b", replace=replace)


async def test_changing(files: FilesOnHost, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.utime(path, ns=(1, 2))
    await files.change(path, mode=0o4755, uid=12, gid=34, mtime_ns=TIME_NS)
    status = path.stat()
    assert (status.st_atime_ns, status.st_mtime_ns) == (1, TIME_NS)
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12, 34, 0o4755)
    await files.change(path, gid=56)
    assert (path.stat().st_uid, path.stat().st_gid) == (12, 56)
    await files.change(path)
    assert path.stat().st_mtime_ns == TIME_NS


# What goes wrong --------------------------------------------------------------------------------


async def test_errors_are_told_apart_and_name_the_path(files: FilesOnHost, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "round").symlink_to("round")
    os.mkfifo(tmp_path / "fifo")
    inside, missing, fifo = tmp_path / "file" / "x", tmp_path / "missing", tmp_path / "fifo"
    directory, file = tmp_path / "directory", tmp_path / "file"
    cases: list[tuple[Callable[[], Awaitable[Any]], type[GuestFileError], Path]] = [
        (lambda: files.stat(missing), GuestFileNotFound, missing),
        (lambda: files.stat(inside), GuestNotADirectory, inside),
        (lambda: files.stat(tmp_path / "round"), GuestFileError, tmp_path / "round"),
        (lambda: files.list(missing), GuestFileNotFound, missing),
        (lambda: files.list(file), GuestNotADirectory, file),
        (lambda: files.read(missing), GuestFileNotFound, missing),
        (lambda: files.read(directory), GuestIsADirectory, directory),
        (lambda: files.read(fifo), GuestFileError, fifo),
        (lambda: files.write(missing / "x", b""), GuestFileNotFound, missing),
        (lambda: files.write(inside, b""), GuestNotADirectory, file),
        (lambda: files.write("/proc/x", b""), GuestFileNotFound, Path("/proc/x")),
        (lambda: files.write(directory, b"x"), GuestIsADirectory, directory),
        (lambda: files.write(directory, b"x", in_place=True), GuestIsADirectory, directory),
        (lambda: files.write(fifo, b"x"), GuestFileExists, fifo),
        (lambda: files.write(fifo, b"x", in_place=True), GuestFileError, fifo),
        (lambda: files.append(directory, b"x"), GuestIsADirectory, directory),
        (lambda: files.write(inside, b"", parents=True), GuestFileExists, file),
        (lambda: files.mkdir(inside), GuestNotADirectory, inside),
        (lambda: files.remove(inside), GuestNotADirectory, inside),
        (lambda: files.rename(directory, file, replace=True), GuestNotADirectory, directory),
        (lambda: files.rename(file, directory, replace=True), GuestIsADirectory, file),
        (lambda: files.change(missing, mode=0), GuestFileNotFound, missing),
        (lambda: files.symlink(file, "x"), GuestFileExists, file),
        (
            lambda: files.write("/proc/sys/kernel/ostype", b"x", in_place=True),
            GuestAccessDenied,
            Path("/"),
        ),
        (lambda: files.write(tmp_path / ("x" * 256), b""), GuestFileError, tmp_path / ("x" * 256)),
    ]
    for wrong, kind, path in cases:
        with pytest.raises(GuestFileError) as caught:
            await wrong()
        assert type(caught.value) is kind, caught.value
        assert str(path) in str(caught.value)
        assert caught.value.kind.startswith("E")


async def test_a_request_that_makes_no_sense_is_refused(files: FilesOnHost) -> None:
    operations = ("stat", "list", "read", "write", "mkdir", "remove", "rename", "change")
    for operation in (*operations, "symlink", "pack", "unpack", "watch"):
        for fields in ({}, {"path": 1}, {"path": "\0", "follow": True}, {"path": "\ud800"}):
            with pytest.raises(GuestError):
                await files.channel.request(f"files.{operation}", timeout=20, **fields)


@pytest.mark.parametrize(
    "said",
    [
        b"no JSON\n",
        b"[]\n",
        b"{}\n",
        b'{"path": 1}\n',
        b'{"path": "/x", "type": "wormhole", "size": 1}\n',
        b'{"path": "/x", "type": "file", "size": "1"}\n',
        b'{"path": "/x", "type": "file", "size": 1, "target": 2}\n',
        b"[" * 50_000 + b"\n",
        b'{"path": "without an end"}',
        b" " * 100_000,
    ],
)
async def test_a_guest_that_talks_nonsense_in_a_listing(said: bytes) -> None:
    async with connected() as (channel, peer):

        async def script() -> None:
            stream, request = await peer.request()
            assert request["op"] == "files.list"
            peer.send(stream, wire.STDOUT, said)
            peer.reply(stream)

        error, _ = await together(GuestFiles(channel).list("/"), script())
        assert isinstance(error, GuestError)


@pytest.mark.parametrize("kind", ["", "no errno", "cancelled", "EVERYTHING"])
async def test_a_guest_that_refuses_with_a_kind_of_its_own(kind: str) -> None:
    async with connected() as (channel, peer):

        async def script() -> None:
            stream, _ = await peer.request()
            peer.reply(stream, error="no \x1b[31mway", kind=kind)

        error, _ = await together(GuestFiles(channel).stat("/"), script())
        assert type(error) is GuestError
        assert "\x1b" not in str(error)
