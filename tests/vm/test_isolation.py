"""Forks see neither each other's writes nor the source's, and no published file ever changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blake3 import blake3
from vm_helpers import forget, ram_pages, sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox

READ = "cat /root/note /dev/shm/note"
#: Many megabytes of new memory, disk blocks and metadata, all the way down.
CHURN = """
head -c 8000000 /dev/urandom >/dev/shm/churn
cp /dev/shm/churn /root/churn
rm -rf /usr/share/doc
for i in $(seq 50); do echo $i >/root/file$i; done
sync
"""


def published(engine: Engine) -> dict[Path, tuple[int, int, int, str]]:
    """Inode, mode, size and digest of every published file: layers, states, manifests, images."""
    found = {}
    for directory in (engine.store.snapshots, engine.store.images):
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                info = path.stat()
                digest = blake3(max_threads=2).update_mmap(path).hexdigest()
                found[path] = (info.st_ino, info.st_mode, info.st_size, digest)
    return found


@pytest.fixture(scope="module")
async def source(engine: Engine, sandbox: Sandbox) -> AsyncIterator[Sandbox]:
    """The shared sandbox, after it was branched as `origin`."""
    await sh(sandbox, "echo source | tee /root/note >/dev/shm/note")
    await engine.branch(sandbox, "origin")
    yield sandbox
    forget(engine, "origin")


async def test_everyone_sees_their_own_writes_alone(engine: Engine, source: Sandbox) -> None:
    forks = [fork for fork in await engine.fork("origin", 3) if isinstance(fork, Sandbox)]
    assert len(forks) == 3
    everyone = {"changed source": source, **{fork.id: fork for fork in forks}}

    async def write(name: str, sandbox: Sandbox) -> None:
        assert await sh(sandbox, READ) == "source\nsource\n"
        await sh(sandbox, f"echo {name} | tee /root/note >/dev/shm/note; {CHURN}")

    await asyncio.gather(*(write(*item) for item in everyone.items()))
    for name, sandbox in everyone.items():
        await sh(sandbox, "echo 3 >/proc/sys/vm/drop_caches")
        assert await sh(sandbox, READ) == f"{name}\n{name}\n"
    async with await engine.fork_one("origin") as late:
        assert await sh(late, READ) == "source\nsource\n"
        assert await sh(late, "cd /root; echo *; test -d /usr/share/doc") == "note\n"
    for fork in forks:
        await fork.kill()


async def test_nothing_published_changes(engine: Engine, source: Sandbox) -> None:
    await engine.settle()
    origin = engine.store.get("origin")
    image = engine.images.find(origin.manifest.memory_root, ram_pages(origin))
    before = published(engine)
    assert image in before
    async with await engine.fork_one("origin") as one, await engine.fork_one("base") as two:
        for sandbox in (one, two, source):
            await sh(sandbox, CHURN)
        await engine.branch(one, "later")
        await sh(one, "head -c 2000000 /dev/urandom >/root/more; sync")
        after = published(engine)
    assert {path: after[path] for path in before} == before
