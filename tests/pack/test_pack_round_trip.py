"""A snapshot that was packed and unpacked is the same snapshot, and costs what is new of it."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from pack_helpers import content_of, members_of, publish_chain, state_of, zstd
from ratoon.errors import (
    AlreadyExists,
    Corrupt,
    HostError,
    Incompatible,
    InFlight,
    InvalidInput,
    NotFound,
)
from ratoon.files import Stamp
from ratoon.store.disk.qcow2 import disk_root, file_digest
from ratoon.store.pack.pack import pack
from ratoon.store.pack.packfile import Contents, PackedFile, PackWriter, file_names, tar_header
from ratoon.store.pack.unpack import unpack
from ratoon.store.snapshot.manifest import FileRef
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import read_stamps, verify_disks
from small_snapshots import flip, publish


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "other")


@pytest.fixture
def chain(store: Store) -> list[Snapshot]:
    return publish_chain(store)


@pytest.fixture
def packed(store: Store, chain: list[Snapshot], tmp_path: Path) -> Path:
    """A pack of L2, the head of base, L1, L2."""
    return pack(store, "L2", tmp_path / "L2.tar.zst").path


def inode(path: Path) -> int:
    return path.stat().st_ino


@pytest.mark.parametrize("tag", ["base", "L1", "L2"])
def test_every_file_comes_back_as_it_was(
    store: Store, other: Store, chain: list[Snapshot], tmp_path: Path, tag: str
) -> None:
    pack(store, tag, tmp_path / "pack")
    unpacked = unpack(other, tmp_path / "pack")
    source = store.get(tag)
    assert content_of(unpacked.snapshot) == content_of(source)
    assert other.get(tag).manifest == source.manifest
    assert unpacked.snapshot == other.get(tag)
    assert unpacked.shared == 0
    layers = source.manifest.layers
    assert unpacked.stored == sum(layer.memory.size + layer.disk.size for layer in layers)
    assert list(other.staging.iterdir()) == []


def test_only_the_head_becomes_a_snapshot(other: Store, packed: Path) -> None:
    unpack(other, packed)
    assert other.info("L2").ancestors == ["base", "L1"]
    with pytest.raises(NotFound):
        other.get("L1")


def test_what_was_unpacked_is_private_read_only_and_known_to_be_verified(
    other: Store, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = unpack(other, packed).snapshot
    for path in snapshot.path.rglob("*"):
        if path.is_dir():
            assert path.stat().st_mode & 0o777 == 0o700
        elif path.suffix in (".bin", ".qcow2"):
            assert path.stat().st_mode & 0o777 == 0o444
    assert read_stamps(snapshot.path) == {
        str(path.relative_to(snapshot.path)): Stamp.of(path, with_ctime=False)
        for path in map(snapshot.disk_path, range(3))
    }
    monkeypatch.setattr("ratoon.store.disk.qcow2.file_digest", None)  # nothing is read again
    verify_disks(snapshot)


def test_a_pack_can_be_packed_again_to_the_same_bytes(
    store: Store, other: Store, packed: Path, tmp_path: Path
) -> None:
    publish(store, "unrelated", {1: 1})
    pack(store, "L2", tmp_path / "again")
    unpack(other, packed)
    pack(other, "L2", tmp_path / "from-other")
    assert (tmp_path / "again").read_bytes() == packed.read_bytes()
    assert (tmp_path / "from-other").read_bytes() == packed.read_bytes()


def test_any_tar_program_can_read_it(chain: list[Snapshot], packed: Path) -> None:
    members = members_of(packed)
    assert list(members)[:2] == ["pack.json", "manifest.json"]
    assert {**members, "pack.json": b""} == {**content_of(chain[2]), "pack.json": b""}


@pytest.mark.parametrize("size", [0, 1, 8**11 - 1, 8**11, 2**63 - 1])
def test_headers_are_those_of_a_tar_archive(size: int) -> None:
    raw = tar_header("ancestry/17/disk.qcow2", size)
    found = tarfile.TarInfo.frombuf(raw, "ascii", "strict")
    assert (found.name, found.size, found.isreg()) == ("ancestry/17/disk.qcow2", size, True)
    assert (found.mode, found.uid, found.gid, found.mtime) == (0o400, 0, 0, 0)
    with tarfile.open(fileobj=io.BytesIO(tar_header("x", 0) + bytes(1024))) as archive:
        assert archive.getnames() == ["x"]


def test_progress_ends_at_its_total(
    store: Store, other: Store, chain: list[Snapshot], tmp_path: Path
) -> None:
    for work in (
        lambda tell: pack(store, "L2", tmp_path / "pack", progress=tell),
        lambda tell: unpack(other, tmp_path / "pack", progress=tell),
    ):
        told: list[tuple[int, int]] = []
        work(lambda done, total, told=told: told.append((done, total)))
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        assert {total for _, total in told} == {told[-1][0]}


# Layers that are there already -----------------------------------------------------------------


def test_layers_that_are_there_are_not_stored_twice(
    store: Store, other: Store, chain: list[Snapshot], packed: Path, tmp_path: Path
) -> None:
    pack(store, "L1", tmp_path / "L1")
    below = unpack(other, tmp_path / "L1").snapshot
    unpacked = unpack(other, packed)
    head = unpacked.snapshot
    for layer in (0, 1):
        assert inode(head.memory_path(layer)) == inode(below.memory_path(layer))
        assert inode(head.disk_path(layer)) == inode(below.disk_path(layer))
    own = head.manifest.layers[2]
    assert unpacked.stored == own.memory.size + own.disk.size
    assert content_of(head) == content_of(chain[2])
    other.delete("L1", force=True)
    verify_disks(head)


def test_a_layer_that_is_there_but_damaged_is_not_used(
    store: Store, other: Store, chain: list[Snapshot], packed: Path, tmp_path: Path
) -> None:
    pack(store, "L1", tmp_path / "L1")
    below = unpack(other, tmp_path / "L1").snapshot
    flip(below.memory_path(0), -1)
    flip(below.disk_path(1), 70_000)
    head = unpack(other, packed).snapshot
    assert content_of(head) == content_of(chain[2])
    shared = [
        inode(path(layer)) == inode(other_path(layer))
        for path, other_path in (
            (head.memory_path, below.memory_path),
            (head.disk_path, below.disk_path),
        )
        for layer in (0, 1)
    ]
    assert shared == [False, True, True, False]


def test_a_damaged_snapshot_in_the_store_is_in_nobodys_way(
    store: Store, other: Store, packed: Path
) -> None:
    broken = publish(other, "broken", {1: 1})
    (broken.path / "manifest.json").write_text("{}")
    unpack(other, packed)
    assert other.get("L2")


# Tags and identities ---------------------------------------------------------------------------


def test_under_another_tag_it_is_another_snapshot(store: Store, packed: Path) -> None:
    original = store.get("L2")
    child = publish(store, "child", {7: 7}, original)
    unpacked = unpack(store, packed, "copy")
    copy = unpacked.snapshot
    assert unpacked.stored == 0
    assert store.get("copy") == copy
    assert copy.manifest.id != original.manifest.id
    assert copy.manifest.memory_root == original.manifest.memory_root
    assert copy.manifest.layers[:2] == original.manifest.layers[:2]
    assert store.dependents("copy") == ()
    assert store.dependents("L2") == ("child",)
    store.delete("copy")
    store.delete("L2", force=True)
    verify_disks(child)


def test_a_snapshot_that_was_deleted_comes_back_as_itself(
    store: Store, chain: list[Snapshot], packed: Path
) -> None:
    child = publish(store, "child", {7: 7}, chain[2])
    store.delete("L2", force=True)
    unpacked = unpack(store, packed, "L2")
    assert unpacked.stored == 0
    assert unpacked.snapshot.manifest == chain[2].manifest
    assert store.dependents("L2") == (child.manifest.tag,)


def test_an_id_that_is_there_under_another_tag_is_refused(
    store: Store, other: Store, packed: Path
) -> None:
    """As from a pack whose maker took the id of one of our snapshots."""
    unpack(other, packed)
    victim = other.snapshots / "L2"
    manifest = other.get("L2").manifest
    with other.stage("victim") as staging:
        for path in ("memory.bin", "disk.qcow2", "vmstate"):
            (staging.path / path).hardlink_to(victim / path)
        (staging.path / "ancestry").mkdir()
        for layer in ("0", "1"):
            (staging.path / "ancestry" / layer).mkdir()
            for path in ("memory.bin", "disk.qcow2"):
                name = f"ancestry/{layer}/{path}"
                (staging.path / name).hardlink_to(victim / name)
        own = manifest.layers[-1].model_copy(update={"tag": "victim"})
        layers = (*manifest.layers[:-1], own)
        staging.publish(manifest.model_copy(update={"tag": "victim", "layers": layers}))
    other.delete("L2")
    before = state_of(other)
    with pytest.raises(AlreadyExists, match=r"L2 is here already, as victim.*--tag"):
        unpack(other, packed)
    assert state_of(other) == before
    unpack(other, packed, "L2-again")


def test_a_taken_tag_is_refused(store: Store, packed: Path) -> None:
    before = state_of(store)
    with pytest.raises(AlreadyExists, match="snapshot L2"):
        unpack(store, packed)
    with pytest.raises(AlreadyExists, match="snapshot base"):
        unpack(store, packed, "base")
    with pytest.raises(InvalidInput, match="bad tag"):
        unpack(store, packed, "../base", force=True)
    assert state_of(store) == before


def test_a_tag_that_somebody_is_making_is_in_flight(other: Store, packed: Path) -> None:
    for force in (False, True):
        with other.stage("L2"), pytest.raises(InFlight, match="snapshot L2"):
            unpack(other, packed, force=force)
    unpack(other, packed)


def test_force_replaces_a_snapshot_and_leaves_what_was_made_from_it(
    other: Store, packed: Path
) -> None:
    old = publish(other, "L2", {9: 9})
    child = publish(other, "child", {8: 8}, old)
    before = content_of(child)
    new = unpack(other, packed, force=True).snapshot
    assert other.get("L2") == new
    assert new.manifest.id != old.manifest.id
    assert content_of(child) == before
    assert list(other.staging.iterdir()) == []
    assert unpack(other, packed, force=True).stored == 0  # linked to those it replaces
    assert other.get("L2") == new
    verify_disks(new)


def test_force_takes_a_free_tag_as_well(other: Store, packed: Path) -> None:
    unpack(other, packed, force=True)
    assert list(other.staging.iterdir()) == []
    assert other.get("L2").depth == 2


def test_force_replaces_nothing_by_a_pack_that_is_not_sound(other: Store, packed: Path) -> None:
    old = publish(other, "L2", {9: 9})
    packed.write_bytes(packed.read_bytes()[:-1])
    before = state_of(other)
    with pytest.raises(Corrupt):
        unpack(other, packed, force=True)
    assert other.get("L2") == old
    assert state_of(other) == before


def test_force_where_directories_cannot_change_places_changes_nothing(
    other: Store, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = publish(other, "L2", {9: 9})
    before = state_of(other)

    def refuse(*_: object) -> None:
        raise HostError("the file system cannot")

    monkeypatch.setattr("ratoon.store.snapshot.staging.exchange", refuse)
    with pytest.raises(HostError):
        unpack(other, packed, force=True)
    assert other.get("L2") == old
    assert state_of(other) == before


# Room, and what is no pack ---------------------------------------------------------------------


def test_what_does_not_fit_is_not_begun(
    other: Store, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nearly:
        free = 700_000

    before = state_of(other)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Nearly)
    with pytest.raises(HostError, match=r"needs \d+ bytes, .* 700000 free"):
        unpack(other, packed)
    assert state_of(other) == before


def test_zeros_take_no_room(store: Store, other: Store, tmp_path: Path) -> None:
    snapshot = publish(store, "t", {})
    with store.stage("sparse") as staging:
        manifest = store.get("t").manifest
        disk = staging.path / "disk.qcow2"
        for name in ("memory.bin", "vmstate"):
            (staging.path / name).hardlink_to(snapshot.path / name)
        disk.write_bytes((snapshot.path / "disk.qcow2").read_bytes())
        os.truncate(disk, 64 << 20)
        reference = FileRef(digest=file_digest(disk), size=64 << 20)
        names = {"tag": "sparse", "id": "5a" * 16}
        own = manifest.layers[0].model_copy(update={**names, "disk": reference})
        update = {**names, "disk_root": disk_root([reference.digest]), "layers": (own,)}
        staging.publish(manifest.model_copy(update=update))
    packed = pack(store, "sparse", tmp_path / "pack")
    assert packed.size < 64 << 10
    st = unpack(other, packed.path).snapshot.disk_path(0).stat()
    assert st.st_size == 64 << 20
    assert st.st_blocks * 512 < 1 << 20


def test_a_file_that_is_not_there_or_not_a_file(other: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="absent"):
        unpack(other, tmp_path / "absent")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(InvalidInput, match="not a regular file"):
            unpack(other, path)


# Packing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *(("L2", name) for name in ("memory.bin", "disk.qcow2", "vmstate", "manifest.json")),
        *(("L1", f"ancestry/1/{name}") for name in ("memory.bin", "disk.qcow2")),
        *(("base", f"ancestry/0/{name}") for name in ("memory.bin", "disk.qcow2")),
    ],
)
def test_a_damaged_chain_is_not_packed(
    store: Store, chain: list[Snapshot], tmp_path: Path, owner: str, name: str
) -> None:
    flip(chain[2].path / name, -1)
    with pytest.raises(Corrupt, match=f"snapshot {owner}, file .*{name}"):
        pack(store, "L2", tmp_path / "pack")
    assert not [*tmp_path.glob("*pack*"), *tmp_path.glob(".*pack*")]


@pytest.mark.parametrize("name", ["memory.bin", "disk.qcow2", "vmstate"])
def test_a_file_that_is_missing_or_cut_short_is_not_packed(
    store: Store, chain: list[Snapshot], tmp_path: Path, name: str
) -> None:
    path = chain[2].path / name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(Corrupt, match=f"snapshot L2, file .*{name}"):
        pack(store, "L2", tmp_path / "pack")
    path.unlink()
    with pytest.raises(Corrupt, match=f"snapshot L2, file .*{name}: missing"):
        pack(store, "L2", tmp_path / "pack")


def test_a_snapshot_deleted_meanwhile_is_not_damaged(
    store: Store, chain: list[Snapshot], tmp_path: Path
) -> None:
    def delete(done: int, total: int) -> None:
        if (store.snapshots / "L2").exists():
            store.delete("L2")

    with pytest.raises(NotFound, match="snapshot L2 was deleted meanwhile"):
        pack(store, "L2", tmp_path / "pack", progress=delete)
    assert not [*tmp_path.glob("*pack*"), *tmp_path.glob(".*pack*")]


def test_a_file_is_replaced_by_force_alone(
    store: Store, chain: list[Snapshot], tmp_path: Path
) -> None:
    out = tmp_path / "pack"
    out.write_text("mine")
    with pytest.raises(AlreadyExists, match=r"pack exists already.*--force"):
        pack(store, "L2", out)
    assert out.read_text() == "mine"
    pack(store, "L2", out, force=True)
    assert members_of(out)
    assert out.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "pack"]


def test_a_file_made_meanwhile_is_not_replaced(
    store: Store, chain: list[Snapshot], tmp_path: Path
) -> None:
    out = tmp_path / "pack"

    def make_it(done: int, total: int) -> None:
        out.write_text("theirs")

    with pytest.raises(AlreadyExists):
        pack(store, "L2", out, progress=make_it)
    assert out.read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "pack"]


def test_places_where_no_pack_can_be(store: Store, chain: list[Snapshot], tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no directory"):
        pack(store, "L2", tmp_path / "absent" / "pack")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(InvalidInput, match="something else than a file"):
            pack(store, "L2", path, force=True)
    with pytest.raises(NotFound, match="absent"):
        pack(store, "absent", tmp_path / "pack")


def test_one_frame_with_a_checksum_and_a_small_window(packed: Path) -> None:
    raw = packed.read_bytes()
    decompressor = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 23})
    decompressor.decompress(raw)
    assert decompressor.eof
    assert not decompressor.unused_data
    assert raw[4] & 0b100, "the frame header's checksum flag (RFC 8878, 3.1.1.1.1)"


def test_a_chain_too_long_for_any_reader_is_not_packed() -> None:
    def contents(depth: int) -> Contents:
        names = file_names(depth)
        packed = (PackedFile(name=name, size=1 << 19, digest="0a" * 32) for name in names)
        return Contents(tag="t", files=tuple(packed))

    PackWriter(io.BytesIO()).contents(contents(1000))
    with pytest.raises(Incompatible, match=r"snapshot t has too many layers.*compact"):
        PackWriter(io.BytesIO()).contents(contents(2000))
