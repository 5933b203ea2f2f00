"""A fork's whole life beside its source, in ten steps, on each kind of file system.

After every step the source's files are the same inodes with the same bytes; in the end the source
forks with what was written into it, and without anything that its forks wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from vm_helpers import sh

from ratoon.bench.loop_mounts import KINDS, mounted, used_bytes, what_is_missing
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.store.pack.pack import pack
from ratoon.store.pack.unpack import unpack
from ratoon.store.snapshot.diff import diff
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.units import GIB

READ = "cat /root/sentinel /dev/shm/sentinel"

Fingerprint = dict[str, tuple[int, str]]


@pytest.fixture(scope="module")
def base_pack(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pack") / "base.tar.zst"
    pack(engine.store, "base", file)
    return file


@pytest.fixture(params=KINDS)
def volume(request: pytest.FixtureRequest) -> Iterator[Path]:
    if missing := what_is_missing(request.param):
        pytest.skip(f"no {request.param} can be mounted: {missing}")
    with mounted(request.param, 4 * GIB) as root:
        yield root


def fingerprint(snapshot: Snapshot, image: Path) -> Fingerprint:
    """Inode and digest of all files of a snapshot and its image, the cache of stamps aside."""
    files = [path for path in snapshot.path.rglob("*") if path.is_file()]
    return {
        path.name if path == image else str(path.relative_to(snapshot.path)): (
            path.stat().st_ino,
            blake3(max_threads=2).update_mmap(path).hexdigest(),
        )
        for path in (*files, image)
        if path.name != "verified.json"
    }


async def write(sandbox: Sandbox, text: str) -> None:
    await sh(sandbox, f"echo {text} | tee /root/sentinel >/dev/shm/sentinel; sync")


@pytest.mark.filesystems
async def test_a_forks_life_never_touches_its_source(volume: Path, base_pack: Path) -> None:
    async with Engine.open(volume / "home") as engine:
        base = unpack(engine.store, base_pack).snapshot
        # 1: the source has a sentinel in memory and on disk.
        async with await engine.fork_one("base") as sandbox:
            await write(sandbox, "source")
            source = (await engine.branch(sandbox, "source")).snapshot
        before = used_bytes(volume)
        # 2: two forks at once; the image is made, and is one inode for both.
        one, two = await engine.fork("source", 2)
        assert isinstance(one, Sandbox)
        assert isinstance(two, Sandbox)
        assert one.memory.inode == two.memory.inode
        image = one.memory.path
        used = used_bytes(volume) - before
        if engine.images.reflinks:
            assert used < image.stat().st_blocks * 512 / 2, "an image shares its layers' extents"
        original = fingerprint(source, image)
        base_original = fingerprint(base, image)

        def unchanged() -> bool:
            return fingerprint(source, image) == original

        # 3: a fork writes to memory and disk.
        await write(one, "fork")
        await sh(one, "head -c 20000000 /dev/urandom | tee /dev/shm/much >/root/much; sync")
        assert unchanged()
        assert await sh(two, READ) == "source\nsource\n"
        # 4: its state becomes a snapshot, and it goes on.
        await engine.branch(one, "lived")
        assert unchanged()
        # 5: it goes on writing, and a second branch descends from the first.
        await write(one, "later")
        second = (await engine.branch(one, "lived-on")).snapshot
        assert second.manifest.parent is not None
        assert second.manifest.parent.tag == "lived"
        assert unchanged()
        # 6: it stands by, its process is gone, and it goes on where it was.
        await engine.standby(one)
        assert unchanged()
        await engine.resume(one)
        assert await sh(one, READ) == "later\nlater\n"
        await one.kill()
        assert unchanged()
        # 7: source and fork are compared.
        found = diff(engine.store, "source", "lived")
        assert found.changed_pages > 0
        assert unchanged()
        # 8: what the fork became is flattened.
        await engine.compact("lived-on", "flat")
        assert unchanged()
        # 9: all of the fork is deleted, while its sibling still runs.
        await engine.delete("lived", cascade=True)
        assert unchanged()
        async with await engine.fork_one("flat") as flat:
            assert await sh(flat, READ) == "later\nlater\n"
        # 10: the source has its own sentinel alone, in a sibling and in a fork of now.
        assert await sh(two, READ) == "source\nsource\n"
        await two.kill()
        async with await engine.fork_one("source") as late:
            assert await sh(late, f"{READ}; ls /root /dev/shm") == (
                "source\nsource\n/dev/shm:\nsentinel\n\n/root:\nsentinel\n"
            )
        assert unchanged()
        assert fingerprint(base, image) == base_original
