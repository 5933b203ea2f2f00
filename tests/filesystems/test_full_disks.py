"""A disk that is really full: what fails leaves nothing, and goes well once there is room."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from loop_volumes import Mount, Volume

from memory_helpers import RAM, ram_of, write_chain, write_layer
from ratoon.bench.loop_mounts import used_bytes
from ratoon.files import copy_sparse, write_durable
from ratoon.store.memory.image import ImageStore
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import check_sizes, verify_disks
from ratoon.units import MIB
from small_snapshots import publish

pytest_plugins = ["filesystem_fixtures"]
pytestmark = pytest.mark.filesystems

KIB = 1 << 10
FULL = "No space left"

#: As many pages as the small layers here may have.
LAYER = {number: 1 + number % 250 for number in range(RAM)}


@pytest.fixture(scope="module")
def small(mount: Mount) -> Volume:
    return mount("ext4", 32 * MIB)


@pytest.fixture
def root(small: Volume) -> Path:
    """The root of an empty file system of 32 MiB."""
    subprocess.run(["find", small.root, "-mindepth", "1", "-delete"], check=True)
    return small.root


class Filler:
    """A file that takes all the room but some."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / "filler"

    def leave(self, size: int) -> None:
        """Fill the disk to the last block, then free as many as hold `size` bytes."""
        spare = self._root / "spare"
        spare.write_bytes(os.urandom(size))
        used_bytes(self._root)  # what was deleted is free only now
        with self._path.open("ab", buffering=0) as file:
            piece = MIB
            while piece >= 4 * KIB:
                try:
                    file.write(bytes(piece))
                    os.fsync(file.fileno())
                except OSError:
                    piece //= 2
        spare.unlink()
        used_bytes(self._root)

    def go(self) -> None:
        self._path.unlink()
        used_bytes(self._root)


@pytest.fixture
def filler(root: Path) -> Filler:
    return Filler(root)


def everything_in(directory: Path) -> dict[str, tuple[int, int]]:
    """Every name below `directory` but locks, with the inode's number and its links."""
    return {
        str(path.relative_to(directory)): (path.stat().st_ino, path.stat().st_nlink)
        for path in directory.rglob("*")
        if path.suffix != ".lock" and path.name != ".lock"
    }


@pytest.mark.parametrize("room", [KIB * n for n in (0, 4, 8, 12, 20, 28, 36, 44, 60, 90)])
def test_publishing(root: Path, filler: Filler, room: int) -> None:
    store = Store.open(root / "home")
    base = publish(store, "base")
    publish(store, "L1", parent=base)
    before = everything_in(store.home)
    filler.leave(room)
    failure = None
    published = ["L1", "base"]
    while failure is None and len(published) < 9:
        try:
            published.append(publish(store, f"more{len(published)}", parent=base).manifest.tag)
            before = everything_in(store.home)
        except OSError as error:
            failure = error
    assert FULL in str(failure)
    assert everything_in(store.home) == before
    filler.go()
    again = Store.open(store.home)
    assert [entry.manifest.tag for entry in whole(again)] == published
    publish(again, "L2", parent=again.get("L1"))
    for snapshot in whole(again):
        check_sizes(snapshot)
        verify_disks(snapshot)


def whole(store: Store) -> list[Snapshot]:
    found = [entry for entry in store.list() if isinstance(entry, Snapshot)]
    assert len(found) == len(store.list())
    return found


def test_deleting_needs_no_room(root: Path, filler: Filler) -> None:
    store = Store.open(root / "home")
    publish(store, "L1", parent=publish(store, "base"))
    filler.leave(0)
    store.delete("L1")
    store.delete("base")
    assert store.list() == ()
    assert list(store.staging.iterdir()) == []


@pytest.mark.parametrize("room", [0, 16 * KIB, 100 * KIB, 200 * KIB])
@pytest.mark.parametrize("reflinks", [False, True], ids=["writes", "reflinks"])
def test_making_an_image(root: Path, filler: Filler, room: int, reflinks: bool) -> None:
    """Where extents are to be shared and the kernel refuses, too."""
    links = write_chain(root, [LAYER])
    store = ImageStore(root / "images")
    store.reflinks = reflinks
    filler.leave(room)
    with pytest.raises(OSError, match=f"{FULL}.*/images/"):
        store.make(links, RAM)
    assert everything_in(store.directory) == {}
    filler.go()
    assert store.make(links, RAM).read_bytes() == ram_of(LAYER).tobytes()


def test_an_image_that_is_there_is_found_on_a_full_disk(root: Path, filler: Filler) -> None:
    links = write_chain(root, [LAYER])
    store = ImageStore(root / "images")
    path = store.make(links, RAM)
    filler.leave(0)
    assert store.make(links, RAM) == path
    with store.nearest(links, RAM)[0] as image:
        assert image.path == path


@pytest.mark.parametrize("room", [0, 16 * KIB, 100 * KIB, 200 * KIB])
def test_writing_a_layer(root: Path, filler: Filler, room: int) -> None:
    filler.leave(room)
    with pytest.raises(OSError, match=f"{FULL}.*/layer"):
        write_layer(root / "layer", LAYER)
    assert not (root / "layer").exists()
    filler.go()
    write_layer(root / "layer", LAYER)


def test_copying_a_file(root: Path, filler: Filler) -> None:
    source = root / "source"
    source.write_bytes(os.urandom(MIB))
    filler.leave(300 * KIB)
    with pytest.raises(OSError, match=f"{FULL}.*/target"):
        copy_sparse(source, root / "target")
    assert not (root / "target").exists()


def test_a_durable_write_keeps_the_old_content(root: Path, filler: Filler) -> None:
    (root / "state").write_bytes(b"old")
    filler.leave(0)
    with pytest.raises(OSError, match=f"{FULL}.*/state"):
        write_durable(root / "state", bytes(range(256)) * 64)
    assert (root / "state").read_bytes() == b"old"
    assert sorted(path.name for path in root.iterdir()) == ["filler", "state"]


def test_the_command_line_says_so_in_one_line(root: Path, filler: Filler) -> None:
    filler.leave(0)
    program = Path(sys.executable).with_name("ratoon")
    home, runtime = root / "home", root / "run"
    environment = {**os.environ, "RATOON_HOME": str(home), "RATOON_RUNTIME": str(runtime)}
    done = subprocess.run(
        [program, "images"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    told = " ".join(done.stderr.split())
    assert re.match(rf"ratoon: {home}\S*: {FULL} on device; free some space there", told)
    assert "Traceback" not in told
