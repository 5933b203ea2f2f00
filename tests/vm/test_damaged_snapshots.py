"""A flipped bit anywhere in a snapshot is found, and named, before a guest runs from it."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vm_helpers import leaves_nothing, link, ram_pages, sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.errors import Corrupt, Incompatible
from ratoon.machine.vmm.qemu import QemuMachine
from ratoon.store.memory.chain import owners
from ratoon.store.snapshot.links import read_links
from ratoon.store.snapshot.snapshot import Snapshot

LAYER_NAMES = {"": "L2", "ancestry/0/": "base", "ancestry/1/": "L1"}
CHECK = "cd /; sha256sum --quiet -c /root/sums"


@pytest.fixture(scope="module")
async def chain(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """A store of its own with the chain base, L1, L2 in it, no file of which has a second name."""
    script = "head -c 300000 /dev/urandom | tee /root/{0} >/dev/shm/{0}; cd /;"
    script += "sha256sum root/{0} dev/shm/{0} >>/root/sums; sync"
    await link(engine, "base", "L1", script.format("one"))
    await link(engine, "L1", "L2", script.format("two"))
    home = tmp_path_factory.mktemp("damaged")
    async with Engine.open(home) as other:
        for tag in ("base", "L1", "L2"):
            shutil.copytree(engine.store.snapshots / tag, home / "snapshots" / tag)
        for tag in ("L2", "L1"):
            await engine.delete(tag)
        yield other
    shutil.rmtree(home)


@contextmanager
def overwritten(path: Path, offset: int, change: bytes) -> Iterator[None]:
    """The file with other bytes at `offset`; as it was after the block, but for its mtime."""
    path.chmod(0o600)
    fd = os.open(path, os.O_RDWR)
    try:
        before = os.pread(fd, len(change), offset)
        assert len(before) == len(change)
        assert before != change
        os.pwrite(fd, change, offset)
        yield
    finally:
        os.pwrite(fd, before, offset)
        os.close(fd)


def flipped(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return bytes([file.read(1)[0] ^ 1])


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The machines whose guests were let run."""
    pids: list[int] = []
    resume = QemuMachine.resume

    async def note(machine: QemuMachine) -> None:
        pids.append(machine.pid)
        await resume(machine)

    monkeypatch.setattr(QemuMachine, "resume", note)
    return pids


def without_images(chain: Engine, *tags: str) -> None:
    for tag in tags:
        chain.evict_image(tag)


async def refused(chain: Engine, resumed: list[int], *expected: str) -> str:
    """What a fork of L2 says, which must say `expected` and leave nothing, with no guest run."""
    with leaves_nothing(chain), pytest.raises((Corrupt, Incompatible)) as refusal:
        await chain.fork_one("L2")
    assert resumed == []
    for part in expected:
        assert part in str(refusal.value)
    return str(refusal.value)


def middle(path: Path) -> int:
    return path.stat().st_size // 2


def end(path: Path) -> int:
    return path.stat().st_size - 1


def numbers(path: Path) -> int:
    return 4096 * (1 + int.from_bytes(path.read_bytes()[32:40], "little"))


def digests(path: Path) -> int:
    return numbers(path) + 8 * int.from_bytes(path.read_bytes()[24:32], "little")


def data(snapshot: Snapshot, layer: int) -> list[int]:
    """Offsets of the pages in a memory layer that no layer above has anew: L2's forks read them."""
    links = read_links(snapshot)
    _, position, entry = owners(links)
    positions = links[layer].index.data_positions[entry[position == layer]]
    return [int(offset) for offset in positions[positions >= 0]]


FLIPS: list[tuple[str, str, Callable[[Path], int] | int]] = [
    ("", "manifest.json", middle),
    ("", "manifest.json", end),
    ("", "manifest.b3", 0),
    ("", "manifest.b3", end),
    ("", "vmstate", 0),
    ("", "vmstate", middle),
    ("", "vmstate", end),
    *((at, "disk.qcow2", where) for at in LAYER_NAMES for where in (0, middle, end)),
    *(
        (at, "memory.bin", where)
        for at in LAYER_NAMES
        for where in (0, 8, 16, 24, 32, 40, 63, 4095, numbers, digests)
    ),
]


@pytest.mark.parametrize(("at", "name", "where"), FLIPS)
async def test_a_flipped_bit(
    chain: Engine, resumed: list[int], at: str, name: str, where: Callable[[Path], int] | int
) -> None:
    path = chain.store.snapshots / "L2" / at / name
    offset = where if isinstance(where, int) else where(path)
    without_images(chain, "base", "L1", "L2")
    with overwritten(path, offset, flipped(path, offset)):
        message = await refused(chain, resumed, f"snapshot {LAYER_NAMES[at]}")
        # Of a manifest and its digest nobody knows which is damaged.
        assert at + name.replace(".b3", ".") in message
    # The damage is not remembered: the snapshot is sound again.
    if where == 0:
        async with await chain.fork_one("L2") as fork:
            await sh(fork, CHECK)


@pytest.mark.parametrize("at", LAYER_NAMES)
@pytest.mark.parametrize("name", ["memory.bin", "disk.qcow2"])
@pytest.mark.parametrize("how", ["missing", "cut short", "longer"])
async def test_a_file_of_another_length(
    chain: Engine, resumed: list[int], at: str, name: str, how: str
) -> None:
    path = chain.store.snapshots / "L2" / at / name
    aside = chain.store.home / "aside"
    without_images(chain, "base", "L1", "L2")
    path.rename(aside)
    try:
        if how != "missing":
            shutil.copyfile(aside, path)
            os.truncate(path, aside.stat().st_size + (4096 if how == "longer" else -4096))
        message = await refused(chain, resumed, "snapshot ", at + name)
        if how != "missing":
            assert f"snapshot {LAYER_NAMES[at]}" in message
    finally:
        aside.replace(path)


async def test_layers_of_two_snapshots_swapped(chain: Engine, resumed: list[int]) -> None:
    """Each is whole by itself, and even its digest is right, but not in its place."""
    one, two = (chain.store.snapshots / "L2" / at / "memory.bin" for at in ("", "ancestry/1"))
    aside = chain.store.home / "aside"
    without_images(chain, "base", "L1", "L2")

    def swap() -> None:
        one.rename(aside)
        two.rename(one)
        aside.rename(two)

    swap()
    await refused(chain, resumed, "snapshot ")
    swap()
    async with await chain.fork_one("L2") as fork:
        await sh(fork, CHECK)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("layer", range(3))
async def test_a_flipped_bit_in_a_page(
    chain: Engine, resumed: list[int], layer: int, patched: bool
) -> None:
    """Found where the image is made, and where pages are written into a machine that waits."""
    without_images(chain, "base", "L1", "L2")
    if patched and layer:
        await chain.fork("base", 2)
        await chain.kill_all()
        resumed.clear()
    snapshot = chain.store.get("L2")
    path = snapshot.memory_path(layer)
    offsets = data(snapshot, layer)
    for offset in (offsets[0], offsets[len(offsets) // 2] + 2000, offsets[-1] + 4095):
        with overwritten(path, offset, flipped(path, offset)):
            tag = snapshot.manifest.layers[layer].tag
            await refused(chain, resumed, f"snapshot {tag}", "page ", "does not match its digest")


def image_of(chain: Engine, snapshot: Snapshot) -> Path | None:
    return chain.images.find(snapshot.manifest.memory_root, ram_pages(snapshot))


@pytest.mark.parametrize("how", ["bit", "bit, mtime put back", "mtime alone"])
async def test_an_image_that_was_touched_is_made_again(chain: Engine, how: str) -> None:
    snapshot = chain.store.get("L2")
    await chain.fork("L2", 2)
    await chain.kill_all()
    image = image_of(chain, snapshot)
    assert image is not None
    info = image.stat()
    if "bit" in how:
        pages = range(0, info.st_size, 4096)
        image.chmod(0o600)
        with image.open("r+b") as file:
            for at in pages:  # every page: whichever the guest looks at first
                file.seek(at)
                file.write(b"\xee")
    if how != "bit":
        os.utime(image, ns=(info.st_atime_ns, info.st_mtime_ns + (how == "mtime alone")))
    assert image_of(chain, snapshot) is None
    for fork in await chain.fork("L2", 2):
        assert not isinstance(fork, Exception)
        await sh(fork, CHECK)
        assert fork.memory.inode != info.st_ino
        await fork.kill()
    assert image_of(chain, snapshot) == image
