"""Images that share their layers' extents: what is asked of the kernel, and what if it refuses.

The kernel is stood in for here; on real file systems that can, see the tests of file systems.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings

from memory_helpers import RAM, chains, flatten, ram_of, write_chain
from ratoon import files
from ratoon.errors import Corrupt
from ratoon.store.memory import reflink as reflink_module
from ratoon.store.memory.chain import Link
from ratoon.store.memory.image import ImageStore
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import DATA_OFFSET
from ratoon.store.memory.reflink import can_reflink

CHAIN = [{1: 1, 2: 2, 3: 3, 9: 4, 10: 5}, {2: 0, 3: 6, 5: 7, 6: 0, 7: 8}]
#: Bytes in a page, for short.
P = PAGE_SIZE
IMAGE_FILES = {".ram", ".json", ".lock"}


class Kernel:
    """Shares ranges by copying them; refuses from the call number `refuses` on."""

    def __init__(self, refuses: int = 10**6) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self._refuses = refuses

    def clone_range(
        self, source: int, source_offset: int, length: int, target: int, target_offset: int
    ) -> bool:
        if len(self.calls) >= self._refuses:
            return False
        self.calls.append((source_offset, length, target_offset))
        assert os.pwrite(target, os.pread(source, length, source_offset), target_offset) == length
        return True


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel], Kernel]:
    def install(kernel: Kernel) -> Kernel:
        monkeypatch.setattr(reflink_module, "clone_range", kernel.clone_range)
        return kernel

    return install


def sharing_store(directory: Path) -> ImageStore:
    store = ImageStore(directory / "images")
    store.reflinks = True
    return store


def offset_of(link: Link, data_page: int) -> int:
    return DATA_OFFSET + data_page * P


def test_one_call_for_each_run_in_layer_and_image(
    tmp_path: Path, on: Callable[[Kernel], Kernel]
) -> None:
    kernel = on(Kernel())
    links = write_chain(tmp_path, CHAIN)
    image = sharing_store(tmp_path).make(links, RAM)
    base, head = links
    assert kernel.calls == [
        # Of the base, pages 2 and 3 are hidden by the head's.
        (offset_of(base, 0), P, 1 * P),
        (offset_of(base, 3), 2 * P, 9 * P),
        # Pages 3, 5 and 7 lie together in the layer, not in the image.
        (offset_of(head, 0), P, 3 * P),
        (offset_of(head, 1), P, 5 * P),
        (offset_of(head, 2), P, 7 * P),
    ]
    assert image.read_bytes() == ram_of(flatten(CHAIN)).tobytes()


@settings(max_examples=25, deadline=None)
@given(chains)
def test_the_same_image_comes_of_it(chain: list[dict[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        kernel = Kernel()
        patch.setattr(reflink_module, "clone_range", kernel.clone_range)
        links = write_chain(Path(directory), chain)
        path = sharing_store(Path(directory)).make(links, RAM)
        ram = ram_of(flatten(chain))
        assert path.read_bytes() == ram.tobytes()
        assert sum(length for _, length, _ in kernel.calls) == P * ram.any(axis=1).sum()


@pytest.mark.parametrize("refuses", range(6))
def test_what_is_refused_is_written(
    tmp_path: Path, on: Callable[[Kernel], Kernel], refuses: int
) -> None:
    kernel = on(Kernel(refuses))
    image = sharing_store(tmp_path).make(write_chain(tmp_path, CHAIN), RAM)
    assert len(kernel.calls) == min(refuses, 5)
    assert image.read_bytes() == ram_of(flatten(CHAIN)).tobytes()
    assert image.stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("refuses", [0, 1, 10])
@pytest.mark.parametrize(("data_page", "page"), [(0, 1), (3, 9), (4, 10)])
def test_shared_pages_are_checked(
    tmp_path: Path, on: Callable[[Kernel], Kernel], refuses: int, data_page: int, page: int
) -> None:
    on(Kernel(refuses))
    links = write_chain(tmp_path, CHAIN)
    links[0].path.chmod(0o600)
    with links[0].path.open("r+b") as file:
        file.seek(offset_of(links[0], data_page) + 100)
        file.write(b"!")
    store = sharing_store(tmp_path)
    with pytest.raises(Corrupt, match=f"snapshot L0, memory layer: page {page} does not match"):
        store.make(links, RAM)
    assert [path.suffix for path in store.directory.iterdir()] == [".lock"]


def test_a_layer_cut_short_is_named(tmp_path: Path, on: Callable[[Kernel], Kernel]) -> None:
    on(Kernel(0))  # the kernel refuses what is beyond the end
    links = write_chain(tmp_path, CHAIN)
    os.truncate(links[0].path, links[0].path.stat().st_size - P)
    with pytest.raises(Corrupt, match=r"snapshot L0, memory layer: page 9 .* cut short"):
        sharing_store(tmp_path).make(links, RAM)


def test_a_missing_layer_is_named(tmp_path: Path, on: Callable[[Kernel], Kernel]) -> None:
    on(Kernel())
    links = write_chain(tmp_path, CHAIN)
    links[0].path.unlink()
    with pytest.raises(Corrupt, match="snapshot L0, memory layer is missing"):
        sharing_store(tmp_path).make(links, RAM)


def test_the_probe_is_made_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed = []

    def refuse(*arguments: int) -> bool:
        probed.append(arguments)
        return False

    monkeypatch.setattr(reflink_module, "clone_range", refuse)
    store = ImageStore(tmp_path / "images")
    assert not probed, "nothing is asked before an image is made"
    for chain in (CHAIN, CHAIN[:1]):
        store.make(write_chain(Path(tempfile.mkdtemp(dir=tmp_path)), chain), RAM)
    assert len(probed) == 1
    assert not [path for path in store.directory.iterdir() if path.suffix not in IMAGE_FILES]


def test_the_probe_believes_what_it_sees(tmp_path: Path, on: Callable[[Kernel], Kernel]) -> None:
    on(Kernel())
    assert can_reflink(tmp_path)
    on(Kernel(0))
    assert not can_reflink(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "code", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ETXTBSY, errno.ENOSPC]
)
def test_a_refusal_of_the_kernel(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    assert files.clone_range(0, 0, P, 1, 0) is False


def test_a_failing_disk_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(fcntl, "ioctl", fail)
    with pytest.raises(OSError, match="I/O error"):
        files.clone_range(0, 0, P, 1, 0)
