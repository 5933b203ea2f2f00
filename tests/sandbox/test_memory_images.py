"""What a fork maps: its head's image, or the nearest one and the pages that are newer."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import shutil
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memory_helpers import last_data_byte
from ratoon.engine.sandbox import memory_images as memory_images_module
from ratoon.engine.sandbox.memory_images import MappedMemory, MemoryImages, Patch, write_patch
from ratoon.errors import ChainMismatch, Corrupt, NotFound
from ratoon.store.memory.digests import memory_root, zero_array
from ratoon.store.memory.image import ImageStore
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.snapshot.snapshot import Snapshot
from small_snapshots import RAM, make_chain, ram_of, with_root

CHAIN = [{1: 1, 2: 2, 9: 3}, {2: 0, 5: 4}, {60: 5}]


@pytest.fixture
def images(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


@pytest.fixture
async def memory_images(images: ImageStore) -> AsyncIterator[MemoryImages]:
    memory_images = MemoryImages(images)
    yield memory_images
    await memory_images.settle()


@pytest.fixture
def chain(tmp_path: Path) -> list[Snapshot]:
    return make_chain(tmp_path / "snapshots", CHAIN)


async def choose(
    memory_images: MemoryImages, snapshot: Snapshot, twin: Snapshot | None = None
) -> tuple[MappedMemory, Patch | None]:
    image, patch = await memory_images.choose(twin or snapshot, snapshot)
    with image:
        return MappedMemory.of_image(image), patch


def patched(memory: MappedMemory, memory_images: MemoryImages, patch: Patch | None) -> bytes:
    """What the guest's RAM holds in the end."""
    ram = np.frombuffer(memory.path.read_bytes(), np.uint8).reshape(RAM, PAGE_SIZE).copy()
    for numbers, pages in memory_images.read_patch(patch) if patch else []:
        ram[numbers] = pages
    return ram.tobytes()


async def test_a_head_with_an_image_needs_no_patch(
    memory_images: MemoryImages, chain: list[Snapshot]
) -> None:
    image = await memory_images.make_image(chain[2])
    memory, patch = await choose(memory_images, chain[2])
    assert patch is None
    assert memory == MappedMemory.of(image)
    assert memory.length == RAM * PAGE_SIZE


async def test_without_any_image_zeros_are_patched(
    memory_images: MemoryImages, chain: list[Snapshot]
) -> None:
    memory, patch = await choose(memory_images, chain[2])
    assert patch is not None
    assert patch.covered == 0
    assert memory.path.stem == memory_root(zero_array(RAM))
    assert patched(memory, memory_images, patch) == ram_of(CHAIN).tobytes()


@pytest.mark.parametrize("covered", [1, 2])
async def test_the_nearest_image_is_patched(
    memory_images: MemoryImages, chain: list[Snapshot], covered: int
) -> None:
    image = await memory_images.make_image(chain[covered - 1])
    memory, patch = await choose(memory_images, chain[2])
    assert memory.path == image
    assert patch is not None
    assert patch.covered == covered
    assert sum(len(numbers) for numbers, _ in memory_images.read_patch(patch)) == (
        3 if covered == 1 else 1
    )
    assert patched(memory, memory_images, patch) == ram_of(CHAIN).tobytes()


async def test_the_second_fork_starts_the_image_and_the_third_maps_it(
    memory_images: MemoryImages, images: ImageStore, chain: list[Snapshot]
) -> None:
    root = chain[1].manifest.memory_root
    assert (await choose(memory_images, chain[1]))[1] is not None
    await memory_images.settle()
    assert images.find(root, RAM) is None
    assert (await choose(memory_images, chain[1]))[1] is not None
    await memory_images.settle()
    assert images.find(root, RAM)
    assert (await choose(memory_images, chain[1]))[1] is None


async def test_each_head_is_counted_by_itself(
    memory_images: MemoryImages, images: ImageStore, chain: list[Snapshot]
) -> None:
    for snapshot in chain:
        await choose(memory_images, snapshot)
    await memory_images.settle()
    assert [images.find(s.manifest.memory_root, RAM) for s in chain] == [None] * 3


async def test_a_head_that_is_forgotten_begins_anew(
    memory_images: MemoryImages, images: ImageStore, chain: list[Snapshot]
) -> None:
    root = chain[1].manifest.memory_root
    await choose(memory_images, chain[1])
    memory_images.forget(root)
    memory_images.forget(root)
    await choose(memory_images, chain[1])
    await memory_images.settle()
    assert images.find(root, RAM) is None


async def test_an_image_that_many_ask_for_is_made_once(
    memory_images: MemoryImages,
    images: ImageStore,
    chain: list[Snapshot],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    make = images.make

    def counting(*args: object) -> Path:
        made.append(args)
        return make(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(images, "make", counting)
    asked = await asyncio.gather(*(memory_images.make_image(chain[2]) for _ in range(20)))
    asked.append(await memory_images.make_image(chain[2]))
    assert set(asked) == {images.find(chain[2].manifest.memory_root, RAM)}
    assert len(made) == 1
    assert await choose(memory_images, chain[2]) == (MappedMemory.of(asked[0]), None)


@pytest.mark.parametrize(("limit", "patches"), [(4, True), (3, False)])
async def test_above_the_limit_the_image_is_made_first(
    memory_images: MemoryImages,
    chain: list[Snapshot],
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    patches: bool,
) -> None:
    """Of the head's five pages one is all zeros; zeros lie below anyway."""
    monkeypatch.setattr(memory_images_module, "PATCH_LIMIT", limit * PAGE_SIZE)
    memory, patch = await choose(memory_images, chain[2])
    assert (patch is not None) is patches
    assert patched(memory, memory_images, patch) == ram_of(CHAIN).tobytes()


async def test_who_is_cancelled_leaves_the_image_to_the_others(
    memory_images: MemoryImages, images: ImageStore, chain: list[Snapshot]
) -> None:
    asked = [asyncio.create_task(memory_images.make_image(chain[2])) for _ in range(5)]
    while not memory_images._making:
        await asyncio.sleep(0)
    asked[0].cancel()
    cancelled, *others = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert set(others) == {images.find(chain[2].manifest.memory_root, RAM)}


# What does not fit together -------------------------------------------------------------------


async def test_an_image_chosen_by_a_false_root_is_refused(
    memory_images: MemoryImages, images: ImageStore, chain: list[Snapshot]
) -> None:
    """The head is right, but a layer below names the root of an image that is not its own."""
    images.make((), RAM)
    false = with_root(chain[2], 0, memory_root(zero_array(RAM)))
    memory, patch = await choose(memory_images, false)
    assert memory.path.stem == memory_root(zero_array(RAM))
    assert patch is not None
    assert patch.covered == 1
    with pytest.raises(ChainMismatch, match="chain link s0 must have memory root"):
        memory_images.read_patch(patch)


async def test_a_head_of_a_false_root_is_refused(
    memory_images: MemoryImages, chain: list[Snapshot]
) -> None:
    false = with_root(chain[2], 2, "f" * 64)
    _, patch = await choose(memory_images, false)
    assert patch is not None
    with pytest.raises(ChainMismatch, match="chain link s2 must have memory root ffff"):
        memory_images.read_patch(patch)
    with pytest.raises(ChainMismatch):
        await memory_images.make_image(false)


def damage(snapshot: Snapshot, layer: int, offset: int | None = None) -> None:
    """At the offset, or at the end of the last page."""
    path = snapshot.memory_path(layer)
    at = last_data_byte(path) if offset is None else offset
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"!")


async def test_a_damaged_page_is_found_before_it_is_written(
    memory_images: MemoryImages, chain: list[Snapshot]
) -> None:
    damage(chain[2], 0)
    _, patch = await choose(memory_images, chain[2])
    assert patch is not None
    with pytest.raises(Corrupt, match="snapshot s0, memory layer: page 9 "):
        memory_images.read_patch(patch)


async def test_a_damaged_index_is_found(memory_images: MemoryImages, chain: list[Snapshot]) -> None:
    damage(chain[2], 1, 100)
    with pytest.raises(Corrupt, match=r"snapshot s1, file .*ancestry/1/memory\.bin"):
        await choose(memory_images, chain[2])
    with pytest.raises(Corrupt, match="snapshot s1"):
        memory_images.array(chain[2])


async def test_a_background_image_that_fails_is_told_to_the_log(
    memory_images: MemoryImages,
    chain: list[Snapshot],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The fork itself has what it needs: its twin of the snapshot."""
    twin = make_chain(tmp_path / "twin", CHAIN)[2]
    damage(chain[2], 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            memory, patch = await choose(memory_images, chain[2], twin)
            assert patched(memory, memory_images, patch) == ram_of(CHAIN).tobytes()
            await memory_images.settle()
    assert len(caplog.records) == 2
    assert "page 9" in caplog.text


async def test_a_snapshot_that_is_deleted_meanwhile(
    memory_images: MemoryImages, chain: list[Snapshot]
) -> None:
    shutil.rmtree(chain[2].path)
    with pytest.raises(NotFound, match="s2 was deleted meanwhile"):
        await memory_images.make_image(chain[2])


# Digest arrays --------------------------------------------------------------------------------


async def test_an_image_that_is_made_while_its_sandbox_leaves_it_goes_too(
    memory_images: MemoryImages,
    images: ImageStore,
    chain: list[Snapshot],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, may_end, make = threading.Event(), threading.Event(), images.make

    def slowly(*arguments: Any) -> Path:
        begun.set()
        assert may_end.wait(300)
        return make(*arguments)

    monkeypatch.setattr(images, "make", slowly)
    own = anonymous(chain[2])
    making = asyncio.create_task(memory_images.make_image(own))
    assert await asyncio.to_thread(begun.wait, 300)
    await memory_images.remove(own.manifest.memory_root)
    may_end.set()
    await making
    await memory_images.settle()
    assert images.find(own.manifest.memory_root, RAM) is None
    await memory_images.make_image(own)  # whoever comes back to it gets it
    assert images.find(own.manifest.memory_root, RAM)


def anonymous(snapshot: Snapshot) -> Snapshot:
    """The same, if it had been published to nobody."""
    *below, own = snapshot.manifest.layers
    layers = (*below, own.model_copy(update={"anonymous": True}))
    return replace(snapshot, manifest=snapshot.manifest.model_copy(update={"layers": layers}))


def test_the_array_of_a_head_is_read_once(
    memory_images: MemoryImages, chain: list[Snapshot]
) -> None:
    array = memory_images.array(chain[2])
    assert memory_root(array) == chain[2].manifest.memory_root
    shutil.rmtree(chain[2].path)
    assert memory_images.array(chain[2]) is array


def test_arrays_used_least_recently_are_dropped(
    memory_images: MemoryImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = zero_array(RAM)
    monkeypatch.setattr(memory_images_module, "ARRAY_CACHE", 3 * array.nbytes)
    for root in "abc":
        memory_images.remember(root, array.copy())
    memory_images.remember("a", array.copy())
    memory_images.remember("d", array.copy())
    assert list(memory_images._arrays) == ["c", "a", "d"]


def test_asking_for_an_array_is_using_it(
    memory_images: MemoryImages, chain: list[Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_images_module, "ARRAY_CACHE", 2 * zero_array(RAM).nbytes)
    first = memory_images.array(chain[0])
    memory_images.array(chain[1])
    assert memory_images.array(chain[0]) is first
    memory_images.array(chain[2])
    assert memory_images.array(chain[0]) is first
    assert len(memory_images._arrays) == 2


def test_one_array_is_kept_however_large(
    memory_images: MemoryImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_images_module, "ARRAY_CACHE", 1)
    for root in "ab":
        memory_images.remember(root, zero_array(RAM))
    assert list(memory_images._arrays) == ["b"]


# Into a process -------------------------------------------------------------------------------


async def test_a_patch_is_written_where_the_image_is_mapped(
    memory_images: MemoryImages, chain: list[Snapshot]
) -> None:
    await memory_images.make_image(chain[0])
    memory, patch = await choose(memory_images, chain[2])
    assert patch
    with memory.path.open("rb") as file:
        ram = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    with ram:
        assert memory.address_in(os.getpid())
        write_patch(os.getpid(), memory, memory_images.read_patch(patch))
        assert ram[:] == ram_of(CHAIN).tobytes()
    assert memory.path.read_bytes() == ram_of(CHAIN[:1]).tobytes()
