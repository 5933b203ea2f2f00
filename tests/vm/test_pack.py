"""A chain that moves to another store in one file, and is forked there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from vm_helpers import link, processes_of, sh

from ratoon import paths
from ratoon.engine.sandbox.engine import Engine
from ratoon.store.pack.pack import pack
from ratoon.store.pack.unpack import unpack

LEAVE = "head -c 1000000 /dev/urandom | tee /dev/shm/{0} >/root/{0}"
CHECKSUMS = "sync; echo 3 >/proc/sys/vm/drop_caches; cd /; sha256sum dev/shm/P* root/P*"


@pytest.fixture
async def elsewhere(tmp_path: Path) -> AsyncIterator[Engine]:
    """An engine on another, empty store."""
    home = tmp_path / "elsewhere"
    async with Engine.open(home) as engine:
        yield engine
    assert processes_of(home, paths.runtime(home)) == []


async def test_a_chain_of_two_is_forked_in_another_store(
    engine: Engine, elsewhere: Engine, tmp_path: Path
) -> None:
    for parent, tag in (("base", "P1"), ("P1", "P2")):
        await link(engine, parent, tag, LEAVE.format(tag))
    async with await engine.fork_one("P2") as fork:
        expected = await sh(fork, CHECKSUMS)
    packed = await asyncio.to_thread(pack, engine.store, "P2", tmp_path / "P2.tar.zst")
    assert packed.size < packed.content

    await asyncio.to_thread(unpack, elsewhere.store, packed.path)
    async with await elsewhere.fork_one("P2") as fork:
        assert await sh(fork, CHECKSUMS) == expected
        assert len(expected.splitlines()) == 4
        await sh(fork, LEAVE.format("P3"))
        await elsewhere.branch(fork, "P3")

    # And back: what was added there comes home, and the rest is here already.
    await asyncio.to_thread(pack, elsewhere.store, "P3", tmp_path / "P3.tar.zst")
    unpacked = await asyncio.to_thread(unpack, engine.store, tmp_path / "P3.tar.zst")
    own = unpacked.snapshot.manifest.layers[-1]
    assert unpacked.stored == own.memory.size + own.disk.size
    async with await engine.fork_one("P3") as fork:
        assert expected.splitlines()[0] in await sh(fork, CHECKSUMS)
        assert (await sh(fork, "cd /root; echo P*")).split() == ["P1", "P2", "P3"]
    assert engine.store.info("P2").dependents == ["P3"]
