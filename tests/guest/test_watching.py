"""What happens in a directory, as events: nothing is missed, or it is said so."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from channel_peer import connected, together
from files_on_host import FilesOnHost, files_on_host, until

from ratoon.api.files import FileEvent
from ratoon.errors import GuestError, GuestFileNotFound, GuestNotADirectory
from ratoon.machine.guest.files import GuestFiles
from ratoon.machine.guest.shared import wire


@pytest.fixture(scope="module")
async def files() -> AsyncIterator[FilesOnHost]:
    async with files_on_host() as files:
        yield files


@pytest.fixture(autouse=True)
async def _all_is_let_go(files: FilesOnHost) -> AsyncIterator[None]:
    before = files.process.descriptors
    yield
    await until(lambda: files.process.descriptors == before)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "here"


class Seen:
    """Events in short: `+` created, `-` removed, `~` modified, `a>b` renamed, `!` overflow."""

    def __init__(self, here: Path, events: AsyncIterator[FileEvent]) -> None:
        self.here = here
        self.events = events

    async def next(self) -> str:
        async with asyncio.timeout(20):
            event = await anext(self.events)
        name = self._name(event.path, event.is_directory)
        if event.old_path is not None:
            return f"{self._name(event.old_path, event.is_directory)}>{name}"
        signs = {"created": "+", "removed": "-", "modified": "~", "overflow": "!"}
        return signs[event.kind] + name

    def _name(self, path: str, is_directory: bool) -> str:
        return str(Path(path).relative_to(self.here)) + ("/" if is_directory else "")

    async def until(self, last: str) -> list[str]:
        """All up to `last`."""
        found: list[str] = []
        while last not in found:
            found.append(await self.next())
        return found


async def test_each_kind_of_event(files: FilesOnHost, here: Path) -> None:
    (here / "old").touch()
    async with files.watch(here) as events:
        seen = Seen(here, events)
        (here / "new").touch()
        assert await seen.next() == "+new"
        (here / "new").write_text("x")
        (here / "new").rename(here / "newer")
        assert set(await seen.until("new>newer")) == {"~new", "new>newer"}
        (here / "old").unlink()
        assert await seen.next() == "-old"
        (here / "d").mkdir()
        assert await seen.next() == "+d/"
        (here / "link").symlink_to("d")
        assert await seen.next() == "+link"
        (here / "d").rename(here / "e")
        assert await seen.next() == "d/>e/"
        (here / "e").rmdir()
        assert await seen.next() == "-e/"
        (here / os.fsdecode(b"\xff\n")).touch()
        assert await seen.next() == "+" + os.fsdecode(b"\xff\n")


async def test_many_writes_are_told_at_least_once(files: FilesOnHost, here: Path) -> None:
    (here / "log").touch()
    async with files.watch(here) as events:
        # What is equal, and not read yet, the kernel makes one of: how much that is depends on who
        # is quicker, so the agent stands still meanwhile.
        os.kill(files.process.pid, signal.SIGSTOP)
        with (here / "log").open("wb", buffering=0) as log:
            for _ in range(5000):
                log.write(b"x")
        (here / "end").touch()
        os.kill(files.process.pid, signal.SIGCONT)
        found = await Seen(here, events).until("+end")
    assert set(found) == {"~log", "+end"}
    assert len(found) < 1000


async def test_what_comes_from_elsewhere_and_goes_there(files: FilesOnHost, here: Path) -> None:
    elsewhere = here.parent / "elsewhere"
    async with files.watch(here) as events:
        seen = Seen(here, events)
        (elsewhere / "f").touch()
        (elsewhere / "f").rename(here / "f")
        assert await seen.next() == "+f"
        (here / "f").rename(elsewhere / "f")
        assert await seen.next() == "-f"
        (elsewhere / "f").rename(here / "f")
        (here / "f").rename(elsewhere / "g")
        (here / "f").touch()
        assert [await seen.next() for _ in range(3)] == ["+f", "-f", "+f"]


async def test_what_is_below_only_when_asked(files: FilesOnHost, here: Path) -> None:
    (here / "a" / "b").mkdir(parents=True)
    async with files.watch(here) as flat, files.watch(here, recursive=True) as deep:
        (here / "a" / "b" / "f").touch()
        (here / "end").touch()
        assert await Seen(here, flat).until("+end") == ["+end"]
        assert await Seen(here, deep).until("+end") == ["+a/b/f", "+end"]


async def test_directories_that_come_are_watched_too(files: FilesOnHost, here: Path) -> None:
    """With what was in them before they were: each thing once."""
    async with files.watch(here, recursive=True) as events:
        seen = Seen(here, events)
        for round in range(20):
            (here / f"{round}" / "a" / "b").mkdir(parents=True)
            (here / f"{round}" / "a" / "b" / "f").touch()
            (here / f"{round}" / "a" / "g").touch()
        (here / "19" / "a" / "b" / "last").touch()
        found = await seen.until("+19/a/b/last")
        expected = {
            f"+{round}{rest}" for round in range(20) for rest in ("/", "/a/", "/a/b/", "/a/b/f")
        }
        assert sorted(found) == sorted(
            expected | {f"+{round}/a/g" for round in range(20)} | {"+19/a/b/last"}
        )


async def test_a_directory_that_is_renamed_is_watched_on(files: FilesOnHost, here: Path) -> None:
    (here / "a" / "b").mkdir(parents=True)
    (here / "c").mkdir()
    async with files.watch(here, recursive=True) as events:
        seen = Seen(here, events)
        (here / "a").rename(here / "c" / "d")
        (here / "c" / "d" / "b" / "f").touch()
        assert await seen.until("+c/d/b/f") == ["a/>c/d/", "+c/d/b/f"]
        (here / "c").rename(here / "a")
        (here / "a" / "d" / "b" / "g").touch()
        assert await seen.until("+a/d/b/g") == ["c/>a/", "+a/d/b/g"]


async def test_a_directory_that_has_left_is_watched_no_more(files: FilesOnHost, here: Path) -> None:
    elsewhere = here.parent / "elsewhere"
    (here / "a" / "b").mkdir(parents=True)
    async with files.watch(here, recursive=True) as events:
        seen = Seen(here, events)
        (here / "a").rename(elsewhere / "a")
        assert await seen.next() == "-a/"
        (elsewhere / "a" / "b" / "f").touch()
        (elsewhere / "a").rename(here / "back")
        assert await seen.until("+back/b/f") == ["+back/", "+back/b/", "+back/b/f"]
        (here / "back" / "b" / "g").touch()
        assert await seen.next() == "+back/b/g"
        shutil.rmtree(here / "back")
        gone = await seen.until("-back/")
        assert sorted(gone) == ["-back/", "-back/b/", "-back/b/f", "-back/b/g"]


async def test_it_ends_with_the_directory(files: FilesOnHost, here: Path) -> None:
    elsewhere = here.parent / "elsewhere"
    for recursive in (False, True):
        for rename in (False, True):
            here.mkdir(exist_ok=True)
            async with files.watch(here, recursive=recursive) as events:
                if rename:
                    here.rename(elsewhere / f"{recursive}")
                else:
                    here.rmdir()
                seen = [event async for event in events]
            assert [(event.kind, event.path) for event in seen] == [("removed", str(here))]
    with pytest.raises(GuestFileNotFound):
        async with files.watch(here):
            pass


async def test_only_directories_are_watched(files: FilesOnHost, here: Path) -> None:
    (here / "file").touch()
    with pytest.raises(GuestNotADirectory, match="here/file"):
        async with files.watch(here / "file"):
            pass


async def test_events_that_were_lost_are_told(files: FilesOnHost, here: Path) -> None:
    """And the directories that came meanwhile are watched all the same."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    (here / "a").mkdir()
    async with files.watch(here, recursive=True) as events:
        os.kill(files.process.pid, signal.SIGSTOP)
        try:
            (here / "0").touch()
            for number in range(limit // 2 + 100):  # each is two events
                (here / f"{number % 2}").rename(here / f"{(number + 1) % 2}")
            (here / "a").rename(here / "c")
            (here / "new").mkdir()
        finally:
            os.kill(files.process.pid, signal.SIGCONT)
        seen = Seen(here, events)
        found = await seen.until("!./")
        assert found.count("!./") == 1
        (here / "new" / "f").touch()
        assert await seen.until("+new/f") == ["+new/f"]
        (here / "c" / "g").touch()
        assert await seen.next() == "+c/g"


async def test_a_watcher_that_does_not_look_holds_up_nobody(files: FilesOnHost, here: Path) -> None:
    """The agent holds no more than a window for it; the kernel keeps the rest."""
    before = files.process.resident_bytes
    name = "x" * 250
    async with files.watch(here) as events:
        for _ in range(3000):
            (here / name).touch()
            (here / name).unlink()
        assert (await files.stat(here)).type == "directory"
        assert files.process.resident_bytes - before < 16 << 20
        seen = Seen(here, events)
        assert {await seen.next() for _ in range(6000)} == {f"+{name}", f"-{name}"}


async def test_watchers_are_let_go(files: FilesOnHost, here: Path) -> None:
    """In the middle of events, and of the second half of a rename."""
    for round in range(10):
        async with files.watch(here, recursive=True):
            (here / f"{round}" / "a").mkdir(parents=True)
            (here / f"{round}").rename(here.parent / "elsewhere" / f"{round}")
            (here / "f").touch()


@pytest.mark.parametrize(
    "line",
    [
        b"{}\n",
        b'{"event": "exploded", "path": "/x", "is_directory": false}\n',
        b'{"event": "created", "path": 1, "is_directory": false}\n',
        b'{"event": "created", "path": "/x"}\n',
        b'{"event": "renamed", "path": "/x", "is_directory": false}\n',
        b'{"event": "created", "path": "/x", "is_directory": false, "old_path": "/y"}\n',
    ],
)
async def test_a_guest_that_reports_nonsense(line: bytes) -> None:
    async with connected() as (channel, peer):

        async def watch() -> None:
            async with GuestFiles(channel).watch("/") as events:
                await anext(events)

        async def script() -> None:
            stream, _ = await peer.request()
            peer.send(stream, wire.STARTED, b"{}")
            peer.send(stream, wire.STDOUT, line)

        error, _ = await together(watch(), script())
        assert type(error) is GuestError
