"""What the tests on real machines share: shell commands in guests, processes and leftovers."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.host.hierarchies import hierarchies
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.units import MIB

#: Seconds after which something has hung; nothing here takes nearly that long.
FOR_EVER = 120


#: Seconds that guest and host may differ by: a command's start, under emulation, on a busy host.
CLOCK_TOLERANCE = 1.5


async def sh(sandbox: Sandbox, script: str, *, stdin: bytes = b"") -> str:
    """What `script` prints in the guest; it must succeed."""
    result = await sandbox.exec(["sh", "-c", script], stdin=stdin, timeout=FOR_EVER)
    assert result.exit_code == 0, result
    return result.stdout.decode()


async def until_gone(sandbox: Sandbox, pid: str) -> None:
    """Wait until the guest has no process `pid`, a zombie neither."""
    await sh(sandbox, f"while [ -e /proc/{pid} ]; do sleep 0.05; done")


async def assert_in_the_present(sandbox: Sandbox) -> None:
    before = time.time()
    guest = float(await sh(sandbox, "date +%s.%N"))
    assert before - CLOCK_TOLERANCE < guest < time.time() + CLOCK_TOLERANCE


async def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(FOR_EVER * 20):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


def tags(engine: Engine) -> set[str]:
    return {found.manifest.tag for found in engine.store.list() if isinstance(found, Snapshot)}


def forget(engine: Engine, tag: str) -> None:
    """Delete a snapshot, whatever depends on it, and its images."""
    before = engine.store.image_roots()
    engine.store.delete(tag, force=True)
    engine.images.remove(*(before - engine.store.image_roots()))


@asynccontextmanager
async def base_of(
    engine: Engine, image: str, *, ram: int = 512, disk: int = 1024
) -> AsyncIterator[str]:
    """The tag of a base that is made of `image`, sizes in MiB, and goes again."""
    tag = "image"
    await engine.bases.from_image(image, tag, ram_bytes=ram * MIB, disk_bytes=disk * MIB)
    try:
        yield tag
    finally:
        await engine.settle()
        forget(engine, tag)


@asynccontextmanager
async def fork_of_image(engine: Engine, image: str, **sizes: int) -> AsyncIterator[Sandbox]:
    """A fork of such a base."""
    async with base_of(engine, image, **sizes) as tag, await engine.fork_one(tag) as sandbox:
        yield sandbox


async def link(engine: Engine, parent: str, tag: str, script: str) -> None:
    """Snapshot `tag`, `script` having run in a fork of `parent`."""
    async with await engine.fork_one(parent) as sandbox:
        await sh(sandbox, script)
        await engine.branch(sandbox, tag)


def ram_pages(snapshot: Snapshot) -> int:
    return snapshot.manifest.machine.ram_bytes // 4096


def processes_of(*marks: Path) -> list[int]:
    """The processes whose command line names one of these paths."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:  # gone meanwhile
            continue
        if int(process.name) != os.getpid() and any(os.fsencode(mark) in command for mark in marks):
            found.append(int(process.name))
    return found


def control_groups_of(store: str) -> list[Path]:
    """The control groups of a store's sandboxes, wherever they may be made."""
    places = {place for each in hierarchies() for place in (each.own, each.own.parent, each.top)}
    groups = (place / "ratoon" / store for place in places)
    return [group for group in groups if group.exists()]


def no_space(*arguments: object, **options: object) -> None:
    """In place of something that writes to a disk, which is full now."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def open_files() -> list[str]:
    """What this process's descriptors refer to; a socket or a pipe by its kind alone."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found.append(re.sub(r":\[\d+\]", "", str(fd.readlink())))
        except FileNotFoundError:  # the one that listed them
            continue
    return found


@contextmanager
def leaves_nothing(engine: Engine) -> Iterator[None]:
    """After the block there are the sandboxes, snapshots and machines that were before it."""

    def state() -> tuple[object, ...]:
        store = engine.store
        return (
            sorted(path.name for path in store.sandboxes.iterdir()),
            sorted(path.name for path in store.snapshots.iterdir()),
            sorted(path.name for path in store.staging.iterdir()),
            sorted(processes_of(store.sandboxes)),
        )

    before = state()
    yield
    assert state() == before


#: Writes half a megabyte to disk and memory, and notes the checksum.
WRITE = """
head -c 500000 /dev/urandom | tee /root/{0} >/dev/shm/{0}
cd /; sha256sum root/{0} dev/shm/{0} >>/dev/shm/sums; sync
"""
CHECK = "echo 3 >/proc/sys/vm/drop_caches; cd /; sha256sum --quiet -c dev/shm/sums"


async def assert_whole(engine: Engine, source: Sandbox) -> None:
    """All that was written is there, here and in a fork of the next branch, on a sound disk."""
    await sh(source, WRITE.format("after") + CHECK)
    await engine.branch(source, "next")
    await sh(source, "echo last >>/dev/shm/sums")
    async with await engine.fork_one("next") as fork:
        sums = await sh(fork, f"{CHECK}; cat /dev/shm/sums")
        assert "after" in sums
        assert "last" not in sums
        assert await sh(fork, "dmesg | grep -iE 'ext4.*(error|warning)|I/O error' || true") == ""
        await engine.branch(fork, "next-of-next")


#: Counts in the background, in a file that it holds open and in memory; prints who, since when.
COUNT = """
setsid sh -c 'exec 3>>/root/count; n=0
while :; do n=$((n+1)); echo $n >&3; echo $n >/dev/shm/count; sleep 0.02; done' \
</dev/null >/dev/null 2>&1 &
until [ -s /root/count ]; do sleep 0.05; done
echo $!; cut -d' ' -f22 /proc/$!/stat
"""
_STILL_COUNTS = """
test -e /proc/{0}
n=$(wc -l </root/count)
until [ $(wc -l </root/count) -gt $n ] && [ 0$(cat /dev/shm/count) -gt $n ]
do sleep 0.05; done
n=$(wc -l </root/count); seq $n >/tmp/expected; head -n $n /root/count | cmp - /tmp/expected
cut -d' ' -f22 /proc/{0}/stat
"""


class Counter:
    """A process in a guest that counts, and must be the same one for ever."""

    def __init__(self, pid: str, started: str) -> None:
        self._pid = pid
        self._started = started

    @classmethod
    async def begin(cls, sandbox: Sandbox) -> Counter:
        return cls(*(await sh(sandbox, COUNT)).split())

    async def assert_counts(self, sandbox: Sandbox) -> None:
        """It goes on, and has left out nothing and counted nothing twice."""
        assert await sh(sandbox, _STILL_COUNTS.format(self._pid)) == f"{self._started}\n"
