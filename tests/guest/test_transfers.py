"""Files and trees through the agent: whole or not at all, and never in the way of others."""

from __future__ import annotations

import asyncio
import io
import os
import stat
import tarfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from channel_peer import Peer, connected, together
from files_on_host import FilesOnHost, files_on_host, until
from served_files import served

from ratoon.client.aio import trees
from ratoon.client.aio.files import AsyncFiles
from ratoon.errors import (
    AlreadyExists,
    Conflict,
    GuestError,
    GuestFileError,
    GuestFileExists,
    GuestFileNotFound,
    GuestIsADirectory,
    GuestNotADirectory,
    HostError,
    InvalidInput,
    NotFound,
    Unreachable,
    UnsafeArchive,
)
from ratoon.machine.guest.files import GuestFiles
from ratoon.machine.guest.shared import tar, wire
from ratoon.units import MIB


@pytest.fixture(scope="module")
async def files() -> AsyncIterator[FilesOnHost]:
    async with files_on_host() as files:
        yield files


@pytest.fixture(autouse=True)
async def _all_is_let_go(files: FilesOnHost) -> AsyncIterator[None]:
    before, ours = files.process.descriptors, len(list(Path("/proc/self/fd").iterdir()))
    yield
    await until(lambda: files.process.descriptors == before)
    assert len(list(Path("/proc/self/fd").iterdir())) == ours


@pytest.fixture
async def copies(_all_is_let_go: None, files: FilesOnHost) -> AsyncIterator[AsyncFiles]:
    """The same files, for whom uses the library."""
    async with served(files.channel) as copies:
        yield copies


def tree(root: Path, *, files: int = 50) -> dict[str, tuple[object, ...]]:
    (root / "d" / "e").mkdir(parents=True)
    for number in range(files):
        (root / "d" / f"{number}").write_bytes(os.urandom(number * 10))
    (root / "large").write_bytes(os.urandom(300_000))
    (root / "d" / "e" / "same").hardlink_to(root / "large")
    (root / "link").symlink_to("d/e/same")
    (root / "d" / "e").chmod(0o510)
    (root / "d" / "1").chmod(0o4755)
    (root / os.fsdecode(b"\xff\n")).touch()
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, ns=(0, 1_600_000_000_123_456_789), follow_symlinks=False)
    os.utime(root, ns=(0, 1_500_000_000_000_000_001))
    return listing(root)


def listing(root: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        link = path.readlink() if path.is_symlink() else None
        about = (status.st_mode & ~0o6000, status.st_mtime_ns, content, link)
        found[str(path.relative_to(root))] = about
    return found


# There and back ---------------------------------------------------------------------------------


async def test_a_tree_there_and_back(copies: AsyncFiles, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    expected = tree(tmp_path / "from")
    counts: list[int] = []
    up = await copies.upload(tmp_path / "from", there, on_bytes=counts.append)
    assert listing(there) == expected
    assert (there / "large").samefile(there / "d" / "e" / "same")
    assert stat.S_IMODE((there / "d" / "1").stat().st_mode) == 0o4755
    assert counts == sorted(counts)
    assert counts[-1] == up.size_bytes
    counts.clear()
    down = await copies.download(there, back, on_bytes=counts.append)
    assert listing(back) == expected
    assert (back / "large").samefile(back / "d" / "e" / "same")
    assert stat.S_IMODE((back / "d" / "1").stat().st_mode) == 0o755
    assert counts[-1] == down.size_bytes == up.size_bytes
    assert up.entries == down.entries == len(expected)
    assert up.left_out == down.left_out == []


async def test_a_large_file_there_and_back(
    files: FilesOnHost, copies: AsyncFiles, tmp_path: Path
) -> None:
    """Neither side holds much of it."""
    with (tmp_path / "from").open("wb") as file:
        digest = sha256()
        for _ in range(64):
            piece = os.urandom(MIB)
            digest.update(piece)
            file.write(piece)
    (tmp_path / "from").chmod(0o640)
    before = files.process.resident_bytes
    await copies.upload(tmp_path / "from", tmp_path / "there")
    await copies.download(tmp_path / "there", tmp_path / "back")
    assert files.process.resident_bytes - before < 16 * MIB
    for path in (tmp_path / "there", tmp_path / "back"):
        assert sha256(path.read_bytes()).digest() == digest.digest()
        assert path.stat().st_mtime_ns == (tmp_path / "from").stat().st_mtime_ns
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


async def test_an_archive_that_somebody_else_made(files: FilesOnHost, tmp_path: Path) -> None:
    """Without a root, without some of its directories, with GNU's headers, in odd pieces."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.GNU_FORMAT) as opened:
        for name in ("first", "a/b/second", "n" * 200):
            member = tarfile.TarInfo(name)
            member.size = 3
            opened.addfile(member, io.BytesIO(b"abc"))
    packed = buffer.getvalue()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(packed), 777):
            yield packed[start : start + 777]

    done = await files.extract(tmp_path / "to", pieces())
    assert (done.entries, done.size_bytes) == (3, len(packed))
    found = {str(path.relative_to(tmp_path / "to")) for path in (tmp_path / "to").rglob("*")}
    assert found == {"first", "a", "a/b", "a/b/second", "n" * 200}
    assert (tmp_path / "to" / "a" / "b" / "second").read_bytes() == b"abc"
    with pytest.raises(GuestFileExists):
        await files.extract(tmp_path / "to", pieces())
    await files.extract(tmp_path / "to", pieces(), merge=True)


async def test_an_archive_that_is_none(files: FilesOnHost, tmp_path: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"this is no tar" * 1000

    with pytest.raises(InvalidInput, match="no ustar header"):
        await files.extract(tmp_path / "to", pieces())
    assert list(tmp_path.iterdir()) == []


async def test_owners_are_kept_when_asked(copies: AsyncFiles, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "file").touch()
    (tmp_path / "from" / "link").symlink_to("file")
    for path in [tmp_path / "from", *(tmp_path / "from").iterdir()]:
        os.chown(path, 12, 34, follow_symlinks=False)

    def owners(root: Path) -> set[tuple[int, int]]:
        found = [path.lstat() for path in [root, *root.iterdir()]]
        return {(status.st_uid, status.st_gid) for status in found}

    for keep, expected in ((False, (0, 0)), (True, (12, 34))):
        there, back = tmp_path / f"there-{keep}", tmp_path / f"back-{keep}"
        await copies.upload(tmp_path / "from", there, owners=keep)
        assert owners(there) == {expected}
        await copies.download(tmp_path / "from", back, owners=keep)
        assert owners(back) == {expected if keep else (os.getuid(), os.getgid())}


async def test_what_leads_out_is_left_out_and_named(copies: AsyncFiles, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "passwd").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "from" / "fifo")
    down = await copies.download(tmp_path / "from", tmp_path / "back")
    assert list((tmp_path / "back").iterdir()) == []
    assert down.left_out == ["passwd: a link out of the tree, to /etc/passwd"]
    assert down.left_out_count == 1  # what the guest left out is not in an archive
    up = await copies.upload(tmp_path / "from", tmp_path / "there")
    assert (tmp_path / "there" / "passwd").readlink() == Path("/etc/passwd")
    assert up.left_out == ["fifo: neither a file, a directory nor a link"]


async def test_places_that_are_taken(copies: AsyncFiles, tmp_path: Path) -> None:
    tree(tmp_path / "from")
    for name in ("there", "back"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    with pytest.raises(GuestFileExists):
        await copies.upload(tmp_path / "from", tmp_path / "there")
    with pytest.raises(AlreadyExists, match="or ask to merge"):
        await copies.download(tmp_path / "from", tmp_path / "back")
    for name in ("there", "back"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["old"]
    await copies.upload(tmp_path / "from", tmp_path / "there", merge=True)
    await copies.download(tmp_path / "from", tmp_path / "back", merge=True)
    names = {path.name for path in (tmp_path / "from").iterdir()}
    for name in ("there", "back"):
        assert {path.name for path in (tmp_path / name).iterdir()} == {*names, "old"}


async def test_what_goes_wrong_is_told_and_leaves_nothing(
    copies: AsyncFiles, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    before = listing(tmp_path)
    file, directory, missing = (tmp_path / name for name in ("file", "directory", "missing"))
    cases: list[tuple[Callable[[], Awaitable[Any]], type[Exception], str]] = [
        (
            lambda: copies.download(missing, tmp_path / "x"),
            GuestFileNotFound,
            "missing: No such file",
        ),
        (
            lambda: copies.download(file / "x", tmp_path / "x"),
            GuestNotADirectory,
            "file/x: Not a dir",
        ),
        (
            lambda: copies.download(tmp_path / "fifo", tmp_path / "x"),
            GuestFileError,
            "neither a file",
        ),
        (lambda: copies.download(file, missing / "x"), NotFound, "on this host: .*missing"),
        (
            lambda: copies.download(file, directory, merge=True),
            Conflict,
            "directory: Is a directory",
        ),
        (lambda: copies.download(directory, file, merge=True), Conflict, "file: Not a directory"),
        (lambda: copies.upload(missing, tmp_path / "x"), NotFound, "on this host: .*missing"),
        (
            lambda: copies.upload(file, missing / "x", parents=False),
            GuestFileNotFound,
            "missing",
        ),
        (
            lambda: copies.upload(directory, missing / "x", parents=False),
            GuestFileNotFound,
            "missing",
        ),
        (lambda: copies.upload(file, directory), GuestIsADirectory, "directory: Is a dir"),
        (lambda: copies.upload(directory, file, merge=True), GuestNotADirectory, "file: Not a dir"),
        (
            lambda: copies.upload(file, file / "x"),
            GuestFileExists,
            "file: File exists",
        ),
    ]
    for wrong, kind, message in cases:
        with pytest.raises(kind, match=message):
            await wrong()
    assert listing(tmp_path) == before
    await copies.upload(file, missing / "x")
    assert (missing / "x").is_file()


async def test_a_pipe_of_the_host_is_not_waited_for(copies: AsyncFiles, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.open("wb").close())  # waits for a reader
    writer.start()
    try:
        with pytest.raises(HostError, match="pipe: neither a file nor a directory"):
            await copies.upload(pipe, tmp_path / "there")
    finally:
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        writer.join()  # whenever it gets to open it
        os.close(reader)
    assert not (tmp_path / "there").exists()


async def test_a_disk_that_has_no_more_room(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "small").touch()
    (tmp_path / "from" / "large").write_bytes(bytes(5 * MIB))
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    async with files_on_host(before=limit) as files, served(files.channel) as copies:
        with pytest.raises(GuestFileError, match="to/large: File too large") as caught:
            await copies.upload(tmp_path / "from", tmp_path / "to")
        assert caught.value.kind == "EFBIG"
        # The refusal comes once all is gone.
        assert [path.name for path in tmp_path.iterdir()] == ["from"]
        with pytest.raises(GuestFileError, match="to: File too large"):
            await files.write(tmp_path / "to", bytes(5 * MIB))
        assert [path.name for path in tmp_path.iterdir()] == ["from"]


# Ends -------------------------------------------------------------------------------------------


def temporary(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name.startswith(".ratoon-")]


class Halfway:
    """Cancels the task that reports progress to it, once that has gone some way."""

    def __init__(self, after: int, met: Callable[[], bool] = lambda: True) -> None:
        self.after = after
        self.met = met
        self.task: asyncio.Task[Any] | None = None

    def __call__(self, count: int) -> None:
        if count >= self.after and self.met():
            assert self.task is not None
            self.task.cancel()

    async def cancels(self, transfer: Any) -> None:
        self.task = asyncio.create_task(transfer)
        with pytest.raises(asyncio.CancelledError):
            await self.task


async def test_a_cancelled_upload_leaves_nothing(copies: AsyncFiles, tmp_path: Path) -> None:
    tree(tmp_path / "from", files=500)
    (tmp_path / "from" / "z").write_bytes(bytes(20 * MIB))
    (tmp_path / "to").mkdir()
    there = Halfway(5 * MIB, lambda: bool(temporary(tmp_path / "to")))
    await there.cancels(copies.upload(tmp_path / "from", tmp_path / "to" / "x", on_bytes=there))
    await until(lambda: list((tmp_path / "to").iterdir()) == [])
    alone = Halfway(5 * MIB, lambda: bool(temporary(tmp_path / "to")))
    transfer = copies.upload(tmp_path / "from" / "z", tmp_path / "to" / "x", on_bytes=alone)
    await alone.cancels(transfer)
    await until(lambda: list((tmp_path / "to").iterdir()) == [])


async def test_a_cancelled_download_leaves_nothing(copies: AsyncFiles, tmp_path: Path) -> None:
    tree(tmp_path / "from", files=500)
    (tmp_path / "from" / "z").write_bytes(bytes(20 * MIB))
    (tmp_path / "to").mkdir()
    for source in (tmp_path / "from", tmp_path / "from" / "z"):
        halfway = Halfway(5 * MIB)
        await halfway.cancels(copies.download(source, tmp_path / "to" / "x", on_bytes=halfway))
        assert list((tmp_path / "to").iterdir()) == []


async def test_an_upload_whose_host_goes_away_leaves_nothing(tmp_path: Path) -> None:
    """Another host takes over, as in a fork."""
    (tmp_path / "to").mkdir()
    async with files_on_host() as files:
        before = files.process.descriptors
        flags = dict.fromkeys(("merge", "owners", "parents", "into"), False)
        path = str(tmp_path / "to" / "x")
        async with files.channel.open("files.unpack", path=path, **flags) as stream:
            root = tar.encode(tar.Entry(b".", tar.DIRECTORY))
            entries = (tar.encode(tar.Entry(b"%d" % n, tar.DIRECTORY)) for n in range(2000))
            await stream.write(root + b"".join(entries))
            await until(
                lambda: any((path / "1999").exists() for path in temporary(tmp_path / "to"))
            )
            files.channel.begin()
            await files.channel.request("hello", timeout=20)
        await until(lambda: list((tmp_path / "to").iterdir()) == [])
        await until(lambda: files.process.descriptors == before)


async def test_a_source_that_becomes_shorter(copies: AsyncFiles, tmp_path: Path) -> None:
    log = tmp_path / "from" / "log"
    log.parent.mkdir()

    def truncate(count: int) -> None:
        os.truncate(log, 100)

    log.write_bytes(bytes(20 * MIB))
    with pytest.raises(HostError, match="log: it became shorter while it was read"):
        await copies.upload(tmp_path / "from", tmp_path / "to", on_bytes=truncate)
    log.write_bytes(bytes(20 * MIB))
    with pytest.raises(Unreachable, match="was cut short"):
        await copies.download(tmp_path / "from", tmp_path / "to", on_bytes=truncate)
    await until(lambda: list(tmp_path.iterdir()) == [log.parent])


# Side by side -----------------------------------------------------------------------------------


async def test_a_transfer_holds_up_nobody(
    files: FilesOnHost, copies: AsyncFiles, tmp_path: Path
) -> None:
    (tmp_path / "from").write_bytes(bytes(50 * MIB))
    up = asyncio.create_task(copies.upload(tmp_path / "from", tmp_path / "up"))
    down = asyncio.create_task(copies.download(tmp_path / "from", tmp_path / "down"))
    await until(lambda: len(temporary(tmp_path)) == 2)
    for _ in range(5):
        assert (await files.stat(tmp_path / "from")).size_bytes == 50 * MIB
    assert not up.done()
    assert not down.done()
    await asyncio.gather(up, down)


async def test_a_reader_that_does_not_read_holds_up_nobody(
    files: FilesOnHost, tmp_path: Path
) -> None:
    (tmp_path / "from").write_bytes(bytes(20 * MIB))
    before = files.process.resident_bytes
    async with files.reading(tmp_path / "from") as pieces:
        assert await anext(pieces)
        assert len(await files.read(tmp_path / "from")) == 20 * MIB
        assert files.process.resident_bytes - before < 8 * MIB
        assert sum([len(piece) async for piece in pieces]) > 19 * MIB


# Guests that are not what they seem -------------------------------------------------------------


async def downloaded(local: Path, *sent: bytes) -> Any:
    """What a download ends with if the guest sends this."""

    async def script(peer: Peer) -> None:
        stream, request = await peer.request()
        assert request["op"] == "files.pack"
        for data in sent:
            peer.send(stream, wire.STDOUT, data)
        peer.reply(stream, entries=1, left_out=[], left_out_count=0)

    async with connected() as (channel, peer), served(channel) as copies:
        result, _ = await together(copies.download("/x", local), script(peer))
        return result


async def extracted(**reply: Any) -> Any:
    """What unpacking in a guest ends with if that is how it replies."""

    async def script(peer: Peer) -> None:
        stream, request = await peer.request()
        assert request["op"] == "files.unpack"
        peer.reply(stream, **reply)

    async def nothing() -> AsyncIterator[bytes]:
        yield b""

    async with connected() as (channel, peer):
        result, _ = await together(GuestFiles(channel).extract("/x", nothing()), script(peer))
        return result


ROOT = tar.encode(tar.Entry(b".", tar.DIRECTORY))
FILE = tar.encode(tar.Entry(b"f", tar.FILE, size=3)) + b"abc" + tar.padding(3)


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (b"", "ends too early"),
        (ROOT + FILE, "ends too early"),
        (ROOT + FILE[:-512], "ends too early"),
        (bytes(range(256)) * 8, "no ustar header"),
        (ROOT + FILE + tar.END + FILE, "after its end"),
        (ROOT + tar.encode(tar.Entry(b"../f", tar.FILE)) + tar.END, "leads out"),
        (ROOT + tar.encode(tar.Entry(b"/f", tar.FILE)) + tar.END, "leads out"),
        (tar.encode(tar.Entry(b"f", tar.SYMLINK, target=b"x")) + tar.END, "not one root"),
        (ROOT + tar.encode(tar.Entry(b"f", tar.FILE, size=2**40)), "more than 17179869184 bytes"),
    ],
)
async def test_an_archive_that_would_do_harm(tmp_path: Path, archive: bytes, reason: str) -> None:
    error = await downloaded(tmp_path / "to", archive)
    assert type(error) is UnsafeArchive
    assert reason in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("limit", "enough"), [("MAX_BYTES", 3), ("MAX_ENTRIES", 2)])
async def test_more_than_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, enough: int
) -> None:
    archive = ROOT + FILE + tar.END
    monkeypatch.setattr(trees, limit, enough - 1)
    assert type(await downloaded(tmp_path / "to", archive)) is UnsafeArchive
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(trees, limit, enough)
    assert (await downloaded(tmp_path / "to", archive)).entries == 2


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"entries": 1},
        {"entries": "1", "left_out": [], "left_out_count": 0},
        {"entries": 1, "left_out": 1, "left_out_count": 1},
        {"entries": 1, "left_out": [], "left_out_count": "1"},
    ],
)
async def test_a_guest_that_does_not_say_how_it_ended(reply: dict[str, Any]) -> None:
    assert type(await extracted(**reply)) is GuestError


async def test_what_a_guest_says_is_fit_to_be_shown() -> None:
    left_out = ["\x1b[2J", 7, *["x"] * 5000]
    result = await extracted(entries=1, left_out=left_out, left_out_count=5002)
    assert result.left_out[:3] == ["\ufffd[2J", "7", "x"]
    assert (len(result.left_out), result.left_out_count) == (1000, 5002)


async def test_a_guest_that_falls_silent_for_good(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        stream, _ = await peer.request()
        peer.send(stream, wire.STDOUT, ROOT + FILE)
        await until(lambda: bool(temporary(tmp_path)))
        await peer.close()

    async with connected() as (channel, peer), served(channel) as copies:
        error, _ = await together(copies.download("/x", tmp_path / "to"), script(peer))
        assert isinstance(error, Unreachable)
        assert list(tmp_path.iterdir()) == []
