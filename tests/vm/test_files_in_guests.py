"""Files in real guests: to and fro, whatever they are called, however large, whatever ends it."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from served_daemon import Served
from vm_helpers import FOR_EVER, sh

from ratoon.client.address import Known, local
from ratoon.client.aio.connection import AsyncConnection
from ratoon.client.aio.files import AsyncFiles
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import (
    GuestAccessDenied,
    GuestError,
    GuestFileError,
    GuestFileExists,
    GuestFileNotFound,
    GuestIsADirectory,
    GuestNoSpace,
    GuestNotADirectory,
)
from ratoon.machine.guest.shared.packing import Packer
from ratoon.units import MIB

pytest_plugins = ["daemon_plugin"]

NAMES = [b"plain", b"\xff\xfe", b"new\nline", "Grüße".encode(), b" ", b"-rf", b"*", b"x" * 255]
TIME_NS = 1_600_000_000_123_456_789


@pytest.fixture
async def here(sandbox: Sandbox) -> AsyncIterator[str]:
    """A directory in the guest; afterwards the agent holds what it held before."""
    before = await descriptors(sandbox)
    await sandbox.files.mkdir("/root/here")
    yield "/root/here"
    await sandbox.files.remove("/root/here", recursive=True)
    async with asyncio.timeout(FOR_EVER):
        while await descriptors(sandbox) != before:  # the daemon may not have hung up yet
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
async def copies(served: Served, sandbox: Sandbox) -> AsyncIterator[AsyncFiles]:
    """The sandbox's files, for whom uses the library."""
    connection = AsyncConnection(Known(local(str(served.socket), None)))
    yield AsyncFiles(connection, f"/v1/sandboxes/{sandbox.id}")
    await connection.close()


async def descriptors(sandbox: Sandbox) -> str:
    return await sh(sandbox, "ls /proc/1/fd | wc -l")


async def resident(sandbox: Sandbox) -> int:
    """The agent's memory, in bytes."""
    return int(await sh(sandbox, "awk '/VmRSS/ {print $2}' /proc/1/status")) * 1024


async def until_empty(sandbox: Sandbox, directory: str) -> None:
    await sh(sandbox, f"while [ -n \"$(ls -A '{directory}')\" ]; do sleep 0.05; done")


async def test_every_step_with_names_of_all_kinds(sandbox: Sandbox, here: str) -> None:
    files = sandbox.files
    for name in NAMES:
        path = os.fsencode(here) + b"/" + name
        await files.mkdir(path, mode=0o750)
        assert await files.write(path + b"/new", name) == len(name)
        await files.append(path + b"/new", b"!")
        await files.rename(path + b"/new", path + b"/" + name)
        await files.symlink(path + b"/link", name)
        await files.change(path + b"/link", mode=0o600, uid=12, gid=34, mtime_ns=TIME_NS)
        below = await files.list(path)
        assert {os.fsencode(each.path) for each in below} == {path + b"/link", path + b"/" + name}
        status = await files.stat(path + b"/link")
        assert (status.type, status.size_bytes, status.mode) == ("file", len(name) + 1, 0o600)
        assert (status.uid, status.gid, status.mtime_ns) == (12, 34, TIME_NS)
        link = await files.stat(path + b"/link", follow_symlinks=False)
        assert os.fsencode(link.target or "") == name
        assert await files.read(path + b"/link") == name + b"!"
    seen = await sandbox.exec(["find", here, "-type", "f", "-print0"])
    expected = {os.fsencode(here) + b"/" + name + b"/" + name for name in NAMES}
    assert set(seen.stdout.rstrip(b"\0").split(b"\0")) == expected
    assert len(await files.list(here, depth=2)) == 3 * len(NAMES)
    for name in NAMES:
        await files.remove(os.fsencode(here) + b"/" + name, recursive=True)
    assert await files.list(here) == []


async def test_the_files_are_those_of_the_sandbox(sandbox: Sandbox) -> None:
    assert b"Debian" in await sandbox.files.read("/etc/os-release")
    assert b"agent" in await sandbox.files.read("/proc/1/cgroup")
    with pytest.raises(GuestFileNotFound):
        await sandbox.files.stat("/ratoon/guest")


async def test_what_goes_wrong_is_told_apart(sandbox: Sandbox, here: str) -> None:
    files = sandbox.files
    await sh(sandbox, f"cd {here}; mkdir small fixed d d/e; touch f")
    await sh(sandbox, f"mount -t tmpfs -o size=256k none {here}/small")
    await sh(sandbox, f"mount -t tmpfs -o ro none {here}/fixed")
    try:
        cases: list[tuple[Callable[[], Awaitable[Any]], type[GuestError], str]] = [
            (lambda: files.read(f"{here}/missing"), GuestFileNotFound, "here/missing"),
            (lambda: files.read(f"{here}/f/x"), GuestNotADirectory, "here/f/x"),
            (lambda: files.read(f"{here}/d"), GuestIsADirectory, "here/d"),
            (lambda: files.mkdir(f"{here}/d"), GuestFileExists, "here/d"),
            (lambda: files.remove(f"{here}/d"), GuestFileExists, "here/d"),
            (lambda: files.write(f"{here}/fixed/x", b""), GuestAccessDenied, "here/fixed"),
            (lambda: files.write(f"{here}/small/x", bytes(MIB)), GuestNoSpace, "here/small/x"),
            (lambda: files.remove(f"{here}/small", recursive=True), GuestFileError, "here/small"),
            (lambda: files.remove("/", recursive=True), GuestFileError, "its own name is needed"),
            (
                lambda: files.remove(f"{here}/d/../../..", recursive=True),
                GuestFileError,
                "its own name",
            ),
        ]
        for wrong, kind, message in cases:
            with pytest.raises(kind, match=message) as caught:
                await wrong()
            assert type(caught.value) is kind
        assert await files.list(f"{here}/small") == []
    finally:
        await sh(sandbox, f"umount {here}/small {here}/fixed")


async def test_a_large_file_there_and_back(
    sandbox: Sandbox, copies: AsyncFiles, here: str, tmp_path: Path
) -> None:
    """The agent holds little of it, and has time for others."""
    source, digest = tmp_path / "source", sha256()
    with source.open("wb") as file:
        for _ in range(64):
            piece = os.urandom(MIB)
            digest.update(piece)
            file.write(piece)
    before = await resident(sandbox)
    up = asyncio.create_task(copies.upload(source, f"{here}/large"))
    for number in range(3):
        assert await sh(sandbox, f"echo {number}") == f"{number}\n"
    assert not up.done()
    assert (await up).size_bytes == 64 * MIB
    assert (await sh(sandbox, f"sha256sum {here}/large")).split()[0] == digest.hexdigest()
    down = asyncio.create_task(copies.download(f"{here}/large", tmp_path / "back"))
    for number in range(3):
        assert await sh(sandbox, f"echo {number}") == f"{number}\n"
    assert not down.done()
    await down
    assert await resident(sandbox) - before < 8 * MIB
    with (tmp_path / "back").open("rb") as file:
        back = sha256()
        while piece := file.read(MIB):
            back.update(piece)
    assert back.digest() == digest.digest()
    assert (tmp_path / "back").stat().st_mtime_ns == source.stat().st_mtime_ns
    part = await sandbox.files.read(f"{here}/large", offset=40 * MIB + 7, length=1000)
    with source.open("rb") as file:
        file.seek(40 * MIB + 7)
        assert part == file.read(1000)


def tree(root: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "run").write_text("#!/bin/sh\necho it runs\n")
    (root / "a" / "b" / "run").chmod(0o4755)
    (root / "same").hardlink_to(root / "a" / "b" / "run")
    (root / "up").symlink_to("a/b/../../same")
    (root / "a" / "nowhere").symlink_to("missing")
    (root / "large").write_bytes(os.urandom(3 * MIB))
    for name in NAMES:
        (root / "a" / os.fsdecode(name)).write_bytes(name)
    (root / "closed").mkdir(mode=0o500)
    (root / "closed" / "f").touch(mode=0o400)
    for number, path in enumerate([root, *root.rglob("*")]):
        os.chown(path, 1000 + number, 2000 + number, follow_symlinks=False)
        if path.name == "run":
            path.chmod(0o4755)  # chown has cleared it
    for number, path in enumerate(sorted([root, *root.rglob("*")], reverse=True)):
        os.utime(path, ns=(0, TIME_NS + number), follow_symlinks=False)


def listing(root: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        link = path.readlink() if path.is_symlink() else None
        about = status.st_mode & ~0o6000, status.st_uid, status.st_gid, status.st_mtime_ns
        found[str(path.relative_to(root))] = (*about, status.st_nlink, content, link)
    return found


async def test_a_tree_there_and_back(
    sandbox: Sandbox, copies: AsyncFiles, here: str, tmp_path: Path
) -> None:
    tree(tmp_path / "from")
    up = await copies.upload(tmp_path / "from", f"{here}/x/there", owners=True, parents=True)
    assert await sh(sandbox, f"{here}/x/there/same; stat -c %a {here}/x/there/same") == (
        "it runs\n4755\n"
    )
    down = await copies.download(f"{here}/x/there", tmp_path / "back", owners=True)
    expected = listing(tmp_path / "from")
    del expected["up"]  # on the host, not a link that might lead out
    found = listing(tmp_path / "back")
    assert found == expected
    assert up.entries == down.entries == len(expected) + 1
    assert down.left_out == ["up: a link out of the tree, to a/b/../../same"]


async def test_a_cancelled_transfer_leaves_nothing(
    sandbox: Sandbox, copies: AsyncFiles, here: str, tmp_path: Path
) -> None:
    (tmp_path / "from").mkdir()
    for number in range(200):
        (tmp_path / "from" / f"{number:03}").write_bytes(bytes(100))
    (tmp_path / "from" / "z").write_bytes(bytes(16 * MIB))
    (tmp_path / "to").mkdir()

    async def cancelled(transfer: Any, halfway: asyncio.Event) -> None:
        task = asyncio.create_task(transfer)
        async with asyncio.timeout(FOR_EVER):
            await halfway.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def after(count: int, event: asyncio.Event) -> Any:
        return lambda done: event.set() if done > count else None

    for source, target in (
        (tmp_path / "from", f"{here}/x"),
        (tmp_path / "from" / "z", here + "/y"),
    ):
        event = asyncio.Event()
        progress = after(2 * MIB, event)
        await cancelled(copies.upload(source, target, on_bytes=progress), event)
        await until_empty(sandbox, here)
    await copies.upload(tmp_path / "from", f"{here}/x")
    for name in ("x", "x/z"):
        event = asyncio.Event()
        progress = after(2 * MIB, event)
        to = tmp_path / "to" / "x"
        await cancelled(copies.download(f"{here}/{name}", to, on_bytes=progress), event)
        assert list((tmp_path / "to").iterdir()) == []


async def test_a_branch_in_the_middle(
    engine: Engine, sandbox: Sandbox, here: str, tmp_path: Path
) -> None:
    """What the source is being sent arrives, byte for byte; in the fork nothing is left of it."""
    tree(tmp_path / "from")
    archive = b"".join(Packer(os.fsencode(tmp_path / "from"), owners=False).chunks())
    await sandbox.files.mkdir(f"{here}/to")
    branched = asyncio.Event()

    async def content() -> AsyncIterator[bytes]:
        yield archive[: 2 * MIB]
        await branched.wait()
        yield archive[2 * MIB :]

    file = asyncio.create_task(sandbox.files.write(f"{here}/to/file", content()))
    directory = asyncio.create_task(sandbox.files.extract(f"{here}/to/tree", content()))
    await sh(sandbox, f"until [ $(ls -A {here}/to | wc -l) = 2 ]; do sleep 0.05; done")
    await engine.branch(sandbox, "midway")
    branched.set()
    await asyncio.gather(file, directory)
    digest = sha256((tmp_path / "from" / "large").read_bytes()).hexdigest()
    assert (await sh(sandbox, f"sha256sum {here}/to/tree/large")).split()[0] == digest
    digest = sha256(archive).hexdigest()
    assert (await sh(sandbox, f"sha256sum {here}/to/file")).split()[0] == digest
    async with await engine.fork_one("midway") as fork:
        await until_empty(fork, f"{here}/to")
        await fork.files.write(f"{here}/to/new", b"it works")
        assert await sh(fork, f"ls {here}/to") == "new\n"


async def test_what_happens_is_told(sandbox: Sandbox, here: str) -> None:
    await sandbox.files.mkdir(f"{here}/d")
    steps = [
        ("mkdir d/e", ("created", "", "d/e")),
        ("echo x >d/e/f", ("modified", "", "d/e/f")),
        ("mv d/e g", ("renamed", "d/e", "g")),
        ("touch g/new", ("created", "", "g/new")),
        ("rm -r g", ("removed", "", "g")),
        ("mv d ../gone", ("removed", "", "d")),
    ]
    async with sandbox.files.watch(here, recursive=True) as events, asyncio.timeout(FOR_EVER):
        for command, expected in steps:
            await sh(sandbox, f"cd {here}; {command}")
            async for event in events:
                old = (event.old_path or "").removeprefix(f"{here}/")
                if (event.kind, old, event.path.removeprefix(f"{here}/")) == expected:
                    break
    await sandbox.files.remove("/root/gone", recursive=True)


async def test_more_directories_than_can_be_watched(sandbox: Sandbox, here: str) -> None:
    limit = "/proc/sys/fs/inotify/max_user_watches"
    before = await sandbox.files.read(limit)
    await sandbox.files.write(limit, b"3\n", in_place=True)
    try:
        await sh(sandbox, f"cd {here}; mkdir a b c d")
        with pytest.raises(GuestError, match="no more directories can be watched"):
            async with sandbox.files.watch(here, recursive=True):
                pass
        async with sandbox.files.watch(here):
            pass
    finally:
        await sandbox.files.write(limit, before, in_place=True)
