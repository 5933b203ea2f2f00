"""Branches and chains of them: each snapshot holds what was there when it was taken, no more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import count

import pytest
from vm_helpers import forget, link, ram_pages, sh

from ratoon.engine.sandbox import memory_images
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import AlreadyExists, HasDependents, InvalidInput, NotFound
from ratoon.store.memory.image import ImageStore

CHAIN = ("L1", "L2", "L3")

#: Leaves a file in memory and one on the disk.
LEAVE = "head -c 3000000 /dev/urandom | tee /dev/shm/{0} >/root/{0}"
CHECKSUMS = "sync; echo 3 >/proc/sys/vm/drop_caches; cd /; sha256sum dev/shm/L* root/L*"


@pytest.fixture(scope="module")
async def checksums(engine: Engine) -> AsyncIterator[dict[str, str]]:
    """The chain base, L1, L2, L3, each made by a sandbox that left files; their checksums."""
    checksums = {}
    parent = "base"
    for tag in CHAIN:
        command = f"{LEAVE.format(tag)}; ({CHECKSUMS}) >/dev/shm/sums"
        await link(engine, parent, tag, command)
        async with await engine.fork_one(tag) as fork:
            checksums[tag] = await sh(fork, "cat /dev/shm/sums")
        parent = tag
    yield checksums
    await engine.settle()
    for tag in reversed(CHAIN):
        await engine.delete(tag)


@pytest.mark.parametrize("tag", CHAIN)
async def test_each_of_a_chain_has_its_own_and_what_is_below(
    engine: Engine, checksums: dict[str, str], tag: str
) -> None:
    expected = CHAIN[: CHAIN.index(tag) + 1]
    async with await engine.fork_one(tag) as fork:
        assert (await sh(fork, "cd /dev/shm; echo L*")).split() == [*expected]
        assert (await sh(fork, "cd /root; echo L*")).split() == [*expected]
        assert await sh(fork, CHECKSUMS) == checksums[tag]


async def test_parents_are_recorded(engine: Engine, checksums: dict[str, str]) -> None:
    lineage = ["base", *CHAIN]
    for depth, tag in enumerate(lineage):
        info = engine.store.info(tag)
        assert (info.chain_depth, info.ancestors) == (depth, lineage[:depth])
        assert info.dependents == lineage[depth + 1 : depth + 2]
        parent = engine.store.get(tag).manifest.parent
        assert (parent.tag if parent else None) == (lineage[depth - 1] if depth else None)


@pytest.fixture
async def head(engine: Engine, checksums: dict[str, str]) -> str:
    """The chain's head as this process has not seen it before: without an image."""
    await engine.settle()
    engine.evict_image("L3")
    return "L3"


async def test_a_fork_without_an_image_is_the_same_as_one_with_it(
    engine: Engine, checksums: dict[str, str], head: str
) -> None:
    snapshot = engine.store.get(head)
    root = snapshot.manifest.memory_root
    async with await engine.fork_one(head) as first:
        assert engine.images.find(root, ram_pages(snapshot)) is None
        assert first.memory.path.stem != root
        assert await sh(first, CHECKSUMS) == checksums[head]
    async with await engine.fork_one(head) as second:
        assert await sh(second, CHECKSUMS) == checksums[head]
    await engine.settle()
    image = engine.images.find(root, ram_pages(snapshot))
    assert image is not None, "the second fork has an image made"
    async with await engine.fork_one(head) as third:
        assert third.memory.inode == image.stat().st_ino
        assert await sh(third, CHECKSUMS) == checksums[head]


async def test_forks_while_the_image_is_made(
    engine: Engine, checksums: dict[str, str], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way = []
    make = engine.images.make

    def counted(*arguments: object) -> object:
        under_way.append(arguments)
        return make(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.images, "make", counted)
    async with (
        await engine.fork_one(head),
        await engine.fork_one(head) as during,
        await engine.fork_one(head) as later,
    ):
        assert await sh(during, CHECKSUMS) == checksums[head]
        assert await sh(later, CHECKSUMS) == checksums[head]
    await engine.settle()
    assert len(under_way) == 1


async def test_a_head_far_above_its_nearest_image_gets_its_own_at_once(
    engine: Engine, checksums: dict[str, str], head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_images, "PATCH_LIMIT", 0)
    async with await engine.fork_one(head) as fork:
        assert fork.memory.path.stem == engine.store.get(head).manifest.memory_root
        assert await sh(fork, CHECKSUMS) == checksums[head]


async def test_a_lost_base_image_is_no_loss(
    engine: Engine, checksums: dict[str, str], head: str
) -> None:
    for tag in ("base", "L1", "L2"):
        engine.evict_image(tag)
    fresh = ImageStore(engine.images.directory)
    roots = [engine.store.get(tag).manifest.memory_root for tag in ("base", *CHAIN)]
    assert [fresh.find(root, ram_pages(engine.store.get("base"))) for root in roots] == [None] * 4
    async with await engine.fork_one(head) as fork:
        assert await sh(fork, CHECKSUMS) == checksums[head]


async def test_a_second_branch_stands_on_the_first_and_stores_only_what_is_new(
    engine: Engine, sandbox: Sandbox
) -> None:
    await sh(sandbox, "head -c 20000000 /dev/urandom >/dev/shm/large")
    first = (await engine.branch(sandbox, "first")).snapshot.manifest
    second = (await engine.branch(sandbox, "second")).snapshot.manifest
    assert second.parent is not None
    assert (second.parent.tag, second.parent.id) == ("first", first.id)
    assert [layer.tag for layer in second.layers] == ["base", "first", "second"]
    stored = [manifest.layers[-1].memory.size for manifest in (first, second)]
    assert stored[0] > 20_000_000
    assert stored[1] < stored[0] / 10


async def test_a_branch_of_a_fork_of_a_branch(engine: Engine, sandbox: Sandbox) -> None:
    await engine.branch(sandbox, "trunk")
    async with await engine.fork_one("trunk") as fork:
        for number in range(3):
            await sh(fork, f"echo {number} >>/root/twigs; echo {number} >>/dev/shm/twigs")
            await engine.branch(fork, f"twig{number}")
    for number in range(3):
        async with await engine.fork_one(f"twig{number}") as twig:
            expected = "".join(f"{n}\n" for n in range(number + 1))
            assert await sh(twig, "cat /root/twigs") == expected
            assert await sh(twig, "cat /dev/shm/twigs") == expected


async def test_a_deep_chain_of_one_sandbox(engine: Engine) -> None:
    async with await engine.fork_one("base") as source:
        for number in count(1):
            await sh(source, f"echo {number} | tee -a /root/log >>/dev/shm/log")
            await engine.branch(source, f"deep{number}")
            if number == 10:
                break
    async with await engine.fork_one("deep10") as fork:
        expected = "".join(f"{n}\n" for n in range(1, 11))
        assert await sh(fork, "cat /root/log") == await sh(fork, "cat /dev/shm/log") == expected
        assert engine.store.info("deep10").chain_depth == 10


@pytest.mark.parametrize("tag", ["", ".", "..", "a/b", "a b", "a\n", "ü", "x" * 65])
async def test_bad_tags(engine: Engine, sandbox: Sandbox, tag: str) -> None:
    with pytest.raises(InvalidInput):
        await engine.branch(sandbox, tag)
    with pytest.raises(InvalidInput):
        await engine.fork_one(tag)
    with pytest.raises(InvalidInput):
        await engine.bases.from_image("debian", tag)
    assert await sh(sandbox, "echo alive") == "alive\n"


async def test_a_tag_that_is_taken(engine: Engine, sandbox: Sandbox) -> None:
    with pytest.raises(AlreadyExists, match="base"):
        await engine.branch(sandbox, "base")
    with pytest.raises(NotFound, match="unheard-of"):
        await engine.fork_one("unheard-of")


async def test_deleting_a_parent(engine: Engine, sandbox: Sandbox) -> None:
    await sh(sandbox, "echo parent >/root/p; echo parent >/dev/shm/p")
    await engine.branch(sandbox, "parent")
    async with await engine.fork_one("parent") as fork:
        await engine.branch(fork, "child")
        with pytest.raises(HasDependents) as refusal:
            await engine.delete("parent")
        assert refusal.value.dependents == ["child"]
        forget(engine, "parent")
        assert await sh(fork, "cat /root/p /dev/shm/p") == "parent\nparent\n"
        await engine.branch(fork, "orphan")
    async with await engine.fork_one("child") as one, await engine.fork_one("orphan") as two:
        for each in (one, two):
            assert await sh(each, "cat /root/p /dev/shm/p") == "parent\nparent\n"
            await engine.branch(each, f"of-{each.snapshot_tag}")
    with pytest.raises(NotFound):
        await engine.fork_one("parent")
