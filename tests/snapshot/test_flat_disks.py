"""Flattened disks in the directory of images: what they hold, once made, trusted, and gone."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ratoon.errors import Corrupt, NotFound
from ratoon.files import locked
from ratoon.store.disk.flatten import flatten_raw, merge
from ratoon.store.memory.cache import OpenImage
from ratoon.store.snapshot import flat_disks as flat_disks_module
from ratoon.store.snapshot.flat_disks import FlatDisks
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store
from small_snapshots import make_image, make_layer, publish

#: The disk's layers, base first: what each writes, takes back, and hides.
LAYERS = [
    ("write -P 0x41 0 256k",),
    ("write -P 0x42 64k 4k", "write -P 0x43 512k 64k"),
    ("write -z 0 64k",),
    ("write -P 0x44 512k 4k", "discard 64k 64k"),
    ("write -P 0x45 128k 64k",),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
def chain(store: Store) -> list[Snapshot]:
    snapshots: list[Snapshot] = []
    for number, commands in enumerate(LAYERS):

        def write_disk(path: Path, commands: tuple[str, ...] = commands) -> None:
            make_layer(path, *commands)

        parent = snapshots[-1] if snapshots else None
        made = publish(store, f"L{number}", {number: 1}, parent=parent, write_disk=write_disk)
        snapshots.append(made)
    return snapshots


@pytest.fixture
def flats(store: Store) -> FlatDisks:
    return FlatDisks(store.images)


def make(store: Store, flats: FlatDisks, source: Snapshot) -> Path:
    with store.scratch() as room:
        return flats.make(source, room)


def layers_of(snapshot: Snapshot) -> list[Path]:
    return [snapshot.disk_path(number) for number in range(snapshot.depth + 1)]


def seen(layers: list[Path], directory: Path) -> bytes:
    """What a guest sees of such a disk."""
    target = directory / "raw"
    flatten_raw(layers, target)
    content = target.read_bytes()
    target.unlink()
    return content


def nearest(flats: FlatDisks, snapshot: Snapshot) -> tuple[str, int] | None:
    covering = flats.nearest(snapshot.manifest)
    if covering is None:
        return None
    with covering.image:
        return covering.root, covering.covered


def names(flats: FlatDisks) -> list[str]:
    return sorted(path.name for path in flats.directory.iterdir() if not path.name.endswith("lock"))


def test_on_the_base_it_is_the_disk(
    tmp_path: Path, store: Store, flats: FlatDisks, chain: list[Snapshot]
) -> None:
    head = chain[-1]
    path = make(store, flats, head)
    assert path == store.images / f"{head.manifest.disk_root}.qcow2"
    assert path.stat().st_mode & 0o777 == 0o444
    assert seen([head.disk_path(0), path], tmp_path) == seen(layers_of(head), tmp_path)
    assert flats.find(head.manifest.disk_root) == path
    assert nearest(flats, head) == (head.manifest.disk_root, len(LAYERS))
    assert list(store.staging.iterdir()) == []


def test_one_is_made_of_that_of_a_beginning_and_what_is_above(
    tmp_path: Path,
    store: Store,
    flats: FlatDisks,
    chain: list[Snapshot],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make(store, flats, chain[3])
    merged: list[int] = []

    def counting(below: list[Path], layers: list[Path], target: Path) -> object:
        merged.append(len(layers))
        return merge(below, layers, target)

    monkeypatch.setattr(flat_disks_module, "merge", counting)
    assert nearest(flats, chain[4]) == (chain[3].manifest.disk_root, 4)
    path = make(store, flats, chain[4])
    assert merged == [2]
    assert seen([chain[4].disk_path(0), path], tmp_path) == seen(layers_of(chain[4]), tmp_path)
    assert nearest(flats, chain[3]) == (chain[3].manifest.disk_root, 4)
    assert nearest(flats, chain[2]) is None


def test_fifty_who_ask_at_once_get_the_same(
    store: Store, flats: FlatDisks, chain: list[Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def counting(below: list[Path], layers: list[Path], target: Path) -> object:
        made.append(target)
        return merge(below, layers, target)

    monkeypatch.setattr(flat_disks_module, "merge", counting)
    with ThreadPoolExecutor(50) as pool:
        found = set(pool.map(lambda _: make(store, FlatDisks(store.images), chain[-1]), range(50)))
    assert len(found) == len(made) == 1


@pytest.mark.parametrize("where", [0, 300, -1])
def test_a_changed_byte_is_no_flattened_disk(
    store: Store, flats: FlatDisks, chain: list[Snapshot], where: int
) -> None:
    head = chain[-1]
    path = make(store, flats, head)
    user = path.open("rb")
    before = path.read_bytes()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(where, os.SEEK_END if where < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(0o444)
    assert flats.find(head.manifest.disk_root) is None
    assert nearest(flats, head) is None
    again = make(store, flats, head)
    assert again.read_bytes() == before
    assert os.fstat(user.fileno()).st_ino != again.stat().st_ino
    user.close()


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_of_damaged_layers_none_is_made(
    store: Store, flats: FlatDisks, chain: list[Snapshot], layer: int
) -> None:
    """Also if the layer's stamp is as it was: each is read."""
    path = chain[-1].disk_path(layer)
    found = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(found.st_size - 1)
        file.write(b"!")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    with pytest.raises(Corrupt, match=f"snapshot L{layer}, file .*disk.qcow2: its content"):
        make(store, flats, chain[-1])
    assert names(flats) == []
    assert list(store.staging.iterdir()) == []


def test_of_a_snapshot_that_is_deleted_none_is_made(
    store: Store, flats: FlatDisks, chain: list[Snapshot]
) -> None:
    store.delete("L4")
    with pytest.raises(NotFound, match="L4 was deleted meanwhile"):
        make(store, flats, chain[-1])
    assert names(flats) == []


def test_both_kinds_of_images_share_a_budget(
    store: Store, flats: FlatDisks, chain: list[Snapshot]
) -> None:
    """The one that was used last stays, and who has one open keeps it."""
    disk = make(store, flats, chain[-1])
    memory = make_image(store, chain[-1])
    covering = flats.nearest(chain[-1].manifest)
    assert covering is not None
    content = disk.read_bytes()
    os.utime(disk.with_suffix(".json"), (1000, 1000))
    flats.budget = memory.stat().st_blocks * 512
    other = make(store, flats, chain[3])
    assert names(flats) == sorted(path.name for path in (other, other.with_suffix(".json")))
    with covering.image as image:
        assert os.pread(image.fd, len(content), 0) == content
    assert nearest(flats, chain[-1]) == (chain[3].manifest.disk_root, 4)


def test_one_that_is_being_made_is_neither_evicted_nor_swept(
    store: Store, flats: FlatDisks, chain: list[Snapshot]
) -> None:
    root = chain[-1].manifest.disk_root
    path = make(store, flats, chain[-1])
    half_made = [store.images / f".{root}{name}.tmp" for name in (".qcow2", ".qcow2.upper")]
    for litter in half_made:
        litter.touch()
    path.with_suffix(".json").unlink()
    with locked(store.images / f".{root[:2]}.lock"):
        flats.sweep()
        assert all(each.exists() for each in (path, *half_made))
    flats.sweep()
    assert names(flats) == []


def test_its_use_is_noted(store: Store, flats: FlatDisks, chain: list[Snapshot]) -> None:
    stamp = make(store, flats, chain[-1]).with_suffix(".json")
    os.utime(stamp, (1000, 1000))
    assert flats.find(chain[-1].manifest.disk_root)
    assert stamp.stat().st_mtime == 1000
    assert nearest(flats, chain[-1])
    assert stamp.stat().st_mtime > 1000


def test_the_roots_of_a_store_are_those_of_all_beginnings(
    store: Store, chain: list[Snapshot]
) -> None:
    store.delete("L2", force=True)
    roots = chain[-1].manifest.disk_roots
    assert [each.manifest.disk_root for each in chain] == roots
    expected = {*roots, *(each.manifest.memory_root for each in chain if each is not chain[2])}
    assert store.image_roots() == expected


def test_an_image_held_open_is_closed(
    flats: FlatDisks, chain: list[Snapshot], store: Store
) -> None:
    make(store, flats, chain[-1])
    before = sorted(Path("/proc/self/fd").iterdir())
    covering = flats.nearest(chain[-1].manifest)
    assert covering is not None
    assert isinstance(covering.image, OpenImage)
    covering.image.close()
    assert sorted(Path("/proc/self/fd").iterdir()) == before
