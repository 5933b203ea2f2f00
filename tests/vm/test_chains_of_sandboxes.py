"""A chain whose sandbox was in standby, and was forked, in between: all that is done to a chain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from vm_helpers import CHECK, WRITE, sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.store.check.check import check_store
from ratoon.store.check.scrub import Slice
from ratoon.store.pack.pack import pack
from ratoon.store.pack.unpack import unpack
from ratoon.store.snapshot.diff import diff
from ratoon.store.snapshot.lineage import lineage

#: The names under which it left files, in the order in which it did.
NAMES = ("first", "stood-by", "forked", "head")


@pytest.fixture(scope="module")
async def of_others(engine: Engine) -> set[Path]:
    """The images that were in the shared store before."""
    await engine.settle()
    return set(engine.store.images.iterdir())


@pytest.fixture(scope="module")
async def chain(engine: Engine, of_others: set[Path]) -> AsyncIterator[str]:
    """Snapshots `first` and `head`, with two anonymous layers in between; the sandbox's id."""
    async with await engine.fork_one("base") as sandbox:
        await sh(sandbox, WRITE.format("first"))
        await engine.branch(sandbox, "first")
        await sh(sandbox, WRITE.format("stood-by"))
        await engine.standby(sandbox)
        await engine.resume(sandbox)
        await sh(sandbox, WRITE.format("forked"))
        (fork,) = await engine.fork_sandbox(sandbox)
        assert isinstance(fork, Sandbox)
        await fork.kill()
        await sh(sandbox, WRITE.format("head"))
        await engine.branch(sandbox, "head")
        anonymous = sandbox.id
    yield anonymous
    await engine.settle()
    await engine.delete("first", force=True)
    await engine.delete("head")


async def assert_whole(engine: Engine, tag: str, left: tuple[str, ...] = NAMES) -> None:
    async with await engine.fork_one(tag) as fork:
        found = await sh(fork, f"{CHECK}; cd /root; echo *; cd /dev/shm; echo *")
        assert found.split() == [*sorted(left), *sorted((*left, "sums"))]


async def test_forks(engine: Engine, chain: str) -> None:
    manifest = engine.store.get("head").manifest
    assert [layer.tag for layer in manifest.layers] == ["base", "first", chain, chain, "head"]
    await assert_whole(engine, "first", NAMES[:1])
    await assert_whole(engine, "head")
    await assert_whole(engine, "head")
    await engine.settle()
    assert engine.images.find(manifest.memory_root, manifest.machine.ram_bytes // 4096)
    await assert_whole(engine, "head")


async def test_relations(engine: Engine, chain: str) -> None:
    info = engine.store.info("head")
    assert (info.ancestors, info.parent_tag, info.chain_depth) == (["base", "first"], "first", 4)
    assert [(node.tag, node.level) for node in lineage(engine.store)] == [
        ("base", 0),
        ("first", 1),
        ("head", 2),
    ]


async def test_differences(engine: Engine, chain: str) -> None:
    found = await asyncio.to_thread(diff, engine.store, "first", "head")
    assert found.files is not None
    assert {path for path in found.files.added if path.startswith(b"root/")} == {
        f"root/{name}".encode() for name in NAMES[1:]
    }


async def test_compacted(engine: Engine, chain: str) -> None:
    await engine.compact("head", "flat")
    assert engine.store.info("flat").ancestors == []
    equal = await asyncio.to_thread(diff, engine.store, "head", "flat")
    assert (equal.changed_pages, equal.changed_disk_bytes) == (0, 0)
    await assert_whole(engine, "flat")


async def test_checked(engine: Engine, chain: str, of_others: set[Path]) -> None:
    report = await asyncio.to_thread(check_store, engine.store, read_data=Slice(1, 1))
    assert [found for found in report.findings if found.file not in of_others] == []


async def test_packed(engine: Engine, chain: str, tmp_path: Path) -> None:
    await asyncio.to_thread(pack, engine.store, "head", tmp_path / "pack")
    async with Engine.open(tmp_path / "elsewhere") as elsewhere:
        await asyncio.to_thread(unpack, elsewhere.store, tmp_path / "pack")
        assert elsewhere.store.get("head").manifest == engine.store.get("head").manifest
        await assert_whole(elsewhere, "head")


async def test_the_middle_is_deleted(engine: Engine, chain: str) -> None:
    async with await engine.fork_one("head") as sandbox:
        await engine.branch(sandbox, "above")
        await engine.standby(sandbox)
        await engine.delete("above")
        await engine.resume(sandbox)
        assert sandbox.snapshot_tag == "above"
        found = (await engine.branch(sandbox, "orphan")).snapshot.manifest
        assert found.parent is not None
        assert found.parent.tag == "above"
    await assert_whole(engine, "orphan")
