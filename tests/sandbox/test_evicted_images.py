"""Images that others evict while forks are about to map them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ratoon.engine.sandbox import memory_images as memory_images_module
from ratoon.engine.sandbox.memory_images import ATTEMPTS, MappedMemory, MemoryImages
from ratoon.errors import HostError
from ratoon.store.memory.image import ImageStore
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.snapshot.snapshot import Snapshot
from small_snapshots import RAM, make_chain, ram_of

CHAIN = [{1: 1, 2: 2, 9: 3}, {2: 0, 5: 4}]


class Evicted(ImageStore):
    """Another process evicts an image as soon as it is made, `times` times."""

    def __init__(self, directory: Path, times: int) -> None:
        super().__init__(directory, budget=3 * PAGE_SIZE)
        self.times = times

    def make(self, *arguments: object) -> Path:
        path = super().make(*arguments)  # type: ignore[arg-type]
        if self.times and path.stat().st_blocks:
            self.times -= 1
            self.remove(path.stem)
        return path


@pytest.fixture
def head(tmp_path: Path) -> Snapshot:
    return make_chain(tmp_path / "snapshots", CHAIN)[-1]


@pytest.fixture
async def memory_images(
    tmp_path: Path, times: int, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[MemoryImages]:
    monkeypatch.setattr(memory_images_module, "PATCH_LIMIT", 0)  # so that none does without
    memory_images = MemoryImages(Evicted(tmp_path / "images", times))
    yield memory_images
    await memory_images.settle()


@pytest.mark.parametrize("times", [0, 1, ATTEMPTS - 1])
async def test_an_evicted_image_is_made_again(memory_images: MemoryImages, head: Snapshot) -> None:
    image, patch = await memory_images.choose(head, head)
    with image:
        assert patch is None
        assert os.pread(image.fd, RAM * PAGE_SIZE, 0) == ram_of(CHAIN).tobytes()


@pytest.mark.parametrize("times", [10**6])
async def test_a_store_that_keeps_no_image_is_an_error(
    tmp_path: Path, memory_images: MemoryImages, head: Snapshot
) -> None:
    ImageStore(tmp_path / "images").make((), RAM)  # free, so nobody evicts it
    before = open_files()
    with pytest.raises(HostError, match="s1 is evicted as soon as it is made: raise RATOON_IMAGE_"):
        await memory_images.choose(head, head)
    assert open_files() == before


@pytest.mark.parametrize("times", [0])
async def test_what_is_mapped_is_the_file_that_was_opened(
    memory_images: MemoryImages, head: Snapshot
) -> None:
    path = await memory_images.make_image(head)
    expected = MappedMemory.of(path)
    image, _ = await memory_images.choose(head, head)
    with image:
        memory_images._images.remove(path.stem)
        await memory_images.make_image(head)
        assert MappedMemory.of_image(image) == expected
        assert MappedMemory.of(path) != expected


def open_files() -> list[Path]:
    return sorted(Path("/proc/self/fd").iterdir())
