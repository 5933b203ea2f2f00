"""Chains of real machines: compacted, compared, and deleted as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from vm_helpers import link, ram_pages, sh, tags

from ratoon.engine.sandbox.engine import Engine
from ratoon.errors import HasDependents
from ratoon.store.snapshot.diff import diff
from ratoon.store.snapshot.links import read_links
from ratoon.store.snapshot.usage import usage

CHAIN = ("c1", "c2", "c3")

#: Leaves a file in memory and one on the disk, and takes away what the one before left.
LEAVE = (
    "head -c 2000000 /dev/urandom | tee /dev/shm/{0} >/root/{0}; "
    "rm -f /root/doomed; echo {0} | tee /root/doomed-{0} >>/root/all; sync"
)
CHECKSUMS = "sync; echo 3 >/proc/sys/vm/drop_caches; cd /; sha256sum dev/shm/c* root/*"


@pytest.fixture
async def chain(engine: Engine) -> AsyncIterator[str]:
    """base, c1, c2, c3, the head's checksums."""
    parent = "base"
    for tag in CHAIN:
        await link(engine, parent, tag, LEAVE.format(tag))
        parent = tag
    async with await engine.fork_one("c3") as fork:
        yield await sh(fork, CHECKSUMS)


async def test_forks_of_a_compacted_chain_are_the_same(engine: Engine, chain: str) -> None:
    said: list[str] = []
    made = await engine.compact("c3", "flat", progress=said.append)
    source = engine.store.get("c3")
    assert (made.depth, source.depth) == (0, 3)
    assert made.manifest.memory_root == source.manifest.memory_root
    assert any(line.startswith("merging memory") for line in said)
    # The image that both have in common, then none at all.
    async with await engine.fork_one("flat") as fork:
        assert await sh(fork, CHECKSUMS) == chain
    engine.evict_image("flat")
    async with await engine.fork_one("flat") as fork:
        assert await sh(fork, CHECKSUMS) == chain

    with pytest.raises(HasDependents, match="c2"):
        await engine.delete("c1")
    assert await engine.delete("c1", cascade=True) == ("c3", "c2", "c1")
    await engine.settle()
    engine.evict_image("flat")
    for sandbox in await engine.fork("flat", 2):
        assert not isinstance(sandbox, Exception)
        async with sandbox:
            assert await sh(sandbox, CHECKSUMS) == chain
            await sh(sandbox, "echo more >/root/more; sync")
            await engine.branch(sandbox, f"of-{sandbox.id}")
            assert engine.store.info(f"of-{sandbox.id}").ancestors == ["flat"]


async def test_a_sandbox_outlives_a_cascade(engine: Engine, chain: str) -> None:
    async with await engine.fork_one("c3") as fork:
        await engine.delete("c1", cascade=True)
        assert tags(engine).isdisjoint(CHAIN)
        assert await sh(fork, CHECKSUMS) == chain
        await engine.branch(fork, "survivor")
    async with await engine.fork_one("survivor") as fork:
        assert await sh(fork, CHECKSUMS) == chain


async def test_images_that_nobody_needs_go_with_a_cascade(engine: Engine, chain: str) -> None:
    snapshots = [engine.store.get(tag) for tag in ("base", *CHAIN)]
    await engine.compact("c2", "flat")
    for sandbox in [*await engine.fork("c2", 2), *await engine.fork("c3", 2)]:
        assert not isinstance(sandbox, Exception)
        await sandbox.kill()
    await engine.settle()
    await engine.delete("c1", cascade=True)
    left = {path.stem for path in engine.images.directory.glob("*.ram")}
    roots = [snapshot.manifest.memory_root for snapshot in snapshots]
    assert roots[2] in left, "flat has the same memory as c2"
    assert roots[3] not in left
    assert usage(engine.store).snapshots.keys() >= {"base", "flat"}


async def test_the_files_that_a_branch_changed_are_found(engine: Engine) -> None:
    async with await engine.fork_one("base") as fork:
        await sh(
            fork,
            "mkdir /srv/new; echo added >/srv/new/file; ln -s nowhere /srv/link; "
            "rm /etc/debian_version; echo tail >>/etc/issue; chmod 600 /etc/motd; sync",
        )
        await engine.branch(fork, "edited")
        await sh(fork, "head -c 8000000 /dev/zero | tr '\\0' x >/srv/large; sync")
        await engine.branch(fork, "grown")
    found = await asyncio.to_thread(diff, engine.store, "base", "edited")
    assert found.files is not None
    assert {b"srv/new", b"srv/new/file", b"srv/link"} <= {*found.files.added}
    assert found.files.removed == (b"etc/debian_version",)
    changed = {each.path: each.what for each in found.files.changed}
    assert changed[b"etc/issue"] == ("size", "mtime")
    assert "mode" in changed[b"etc/motd"]
    assert len(changed) + len(found.files.added) < 20, found.files
    assert 0 < found.changed_disk_bytes < 8_000_000
    own = read_links(engine.store.get("edited"))[-1]
    assert found.changed_pages == len(own.index.numbers)
    assert found.ram_pages == ram_pages(engine.store.get("base"))

    grown = await asyncio.to_thread(diff, engine.store, "edited", "grown")
    assert grown.files is not None
    assert b"srv/large" in grown.files.added
    assert grown.files.removed == ()
    assert grown.changed_disk_bytes >= 8_000_000

    await engine.compact("grown", "flat")
    equal = await asyncio.to_thread(diff, engine.store, "grown", "flat")
    assert (equal.changed_pages, equal.changed_disk_bytes) == (0, 0)
    assert equal.files is not None
    assert (equal.files.added, equal.files.removed, equal.files.changed) == ((), (), ())
