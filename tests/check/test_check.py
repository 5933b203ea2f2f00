"""The structural check: a sound store has no findings, each kind of damage is found and named."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ratoon import files
from ratoon.errors import Incompatible
from ratoon.store.check import check as check_module
from ratoon.store.check import structure
from ratoon.store.check.check import check_store
from ratoon.store.check.findings import Finding, Kind, Report
from ratoon.store.check.repair import plan_repairs
from ratoon.store.check.scrub import EVERYTHING
from ratoon.store.memory.image import ImageStore
from ratoon.store.snapshot import manifest
from ratoon.store.snapshot.manifest import encode
from ratoon.store.snapshot.snapshot import Snapshot, link_snapshot
from ratoon.store.snapshot.store import Store
from small_snapshots import RAM, digest, flip, make_image, poke, publish


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
def head(store: Store) -> Snapshot:
    """base ← middle ← head, and an image of base."""
    base = publish(store, "base", {0: 1, 5: 2, 9: 3, 200: 4})
    make_image(store, base)
    middle = publish(store, "middle", {5: 5, 9: 0}, base)
    return publish(store, "head", {0: 6, 77: 7}, middle)


def only(report: Report) -> Finding:
    assert len(report.findings) == 1, report.findings
    return report.findings[0]


def kinds(report: Report) -> list[Kind]:
    return [finding.kind for finding in report.findings]


def test_no_store_and_an_empty_one_are_sound(tmp_path: Path) -> None:
    absent = Store(tmp_path / "absent")
    assert check_store(absent, read_data=EVERYTHING) == Report()
    absent.home.mkdir()
    assert check_store(absent, read_data=EVERYTHING) == Report()
    assert list(absent.home.iterdir()) == []
    Store.open(tmp_path / "absent")
    assert check_store(absent, read_data=EVERYTHING) == Report()


def test_a_sound_store_has_no_findings(store: Store, head: Snapshot) -> None:
    ImageStore(store.images).make((), RAM)  # what bases are booted from
    report = check_store(store)
    assert report == Report(snapshots=3, images=2)
    assert report.sound
    assert report.exit_code == 0
    report = check_store(store, read_data=EVERYTHING)
    assert report.findings == ()
    assert report.bytes_read > 2 * RAM * 4096


def test_a_check_changes_nothing(store: Store, head: Snapshot) -> None:
    (store.staging / "left").mkdir()
    before = {path: path.lstat() for path in store.home.rglob("*")}
    check_store(store, read_data=EVERYTHING)
    after = {path: path.lstat() for path in store.home.rglob("*")}
    fields = ("st_ino", "st_mode", "st_size", "st_mtime_ns", "st_ctime_ns", "st_nlink")
    assert [(p, [getattr(s, f) for f in fields]) for p, s in before.items()] == [
        (p, [getattr(s, f) for f in fields]) for p, s in after.items()
    ]


def test_a_parent_that_is_gone_is_a_note(store: Store, head: Snapshot) -> None:
    store.delete("base", force=True)
    report = check_store(store, read_data=EVERYTHING)
    finding = only(report)
    assert (finding.kind, finding.snapshot) == (Kind.PARENT_GONE, "middle")
    assert "base" in finding.what
    assert report.sound
    publish(store, "base", {1: 1})  # another one of that name
    assert kinds(check_store(store)) == [Kind.PARENT_GONE]


def test_what_no_qemu_of_today_loads_is_a_note(
    store: Store, head: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "OLDEST_QEMU", (999, 0))
    report = check_store(store, read_data=EVERYTHING)
    assert [(found.kind, found.snapshot) for found in report.findings] == [
        (Kind.OUTDATED, tag) for tag in ("base", "head", "middle")
    ]
    assert head.manifest.machine.qemu_version in report.findings[0].what
    assert report.sound


@pytest.mark.parametrize("name", ["manifest.json", "manifest.b3"])
def test_a_damaged_manifest_is_named_and_hides_no_other(
    store: Store, head: Snapshot, name: str
) -> None:
    flip(store.snapshots / "base" / name, 30)
    report = check_store(store, read_data=EVERYTHING)
    finding = only(report)
    assert (finding.kind, finding.snapshot) == (Kind.MANIFEST, "base")
    assert finding.file == store.snapshots / "base" / name
    assert report.exit_code == 5
    assert report.snapshots == 3


@pytest.mark.parametrize(
    ("name", "kind", "tag"),
    [
        ("memory.bin", Kind.MEMORY, "head"),
        ("disk.qcow2", Kind.DISK, "head"),
        ("vmstate", Kind.VMSTATE, "head"),
        ("ancestry/0/memory.bin", Kind.MEMORY, "base"),
        ("ancestry/1/disk.qcow2", Kind.DISK, "middle"),
    ],
)
@pytest.mark.parametrize("harm", ["missing", "short", "long", "directory", "link"])
def test_a_file_that_is_not_there_or_misshapen(
    store: Store, head: Snapshot, name: str, kind: Kind, tag: str, harm: str
) -> None:
    path = head.path / name
    raw = path.read_bytes()
    path.unlink()  # this name alone
    if harm == "directory":
        path.mkdir()
    elif harm == "link":
        path.symlink_to(store.home / "store.json")
    elif harm != "missing":
        path.write_bytes(raw[:-1] if harm == "short" else raw + b"\0")
        path.chmod(0o444)
    report = check_store(store)
    finding = only(report)
    assert (finding.kind, finding.snapshot, finding.file) == (kind, tag, path)
    said = {"missing": "missing", "short": "the manifest says", "long": "the manifest says"}
    assert said.get(harm, "not a regular file") in finding.what
    assert report.exit_code == 5


@pytest.mark.parametrize("name", ["memory.bin", "disk.qcow2", "vmstate"])
def test_damage_is_named_once_by_the_snapshot_that_added_the_layer(
    store: Store, head: Snapshot, name: str
) -> None:
    flip(store.snapshots / "base" / name, 70)
    finding = only(check_store(store))
    assert finding.snapshot == "base"
    assert finding.file == store.snapshots / "base" / name


def test_a_layer_of_a_deleted_snapshot_is_still_called_by_it(store: Store, head: Snapshot) -> None:
    flip(store.snapshots / "base/memory.bin", 70)
    store.delete("base", force=True)
    found = [f for f in check_store(store).findings if f.kind is Kind.MEMORY]
    assert [f.snapshot for f in found] == ["base"]
    assert found[0].file == store.snapshots / "head/ancestry/0/memory.bin"


def reseal(snapshot: Snapshot, **changes: Any) -> None:
    """Write another manifest, with its right digest, as a forger would."""
    manifest = snapshot.manifest.model_copy(update=changes)
    raw = encode(manifest)
    (snapshot.path / "manifest.json").write_bytes(raw)
    (snapshot.path / "manifest.b3").write_text(digest(raw) + "\n")


def test_a_link_with_another_root_is_named_with_both(store: Store, head: Snapshot) -> None:
    base, middle, own = head.manifest.layers
    forged = base.model_copy(update={"memory_root": "ab" * 32})
    reseal(head, layers=(forged, middle, own))
    report = check_store(store)
    assert kinds(report) == [Kind.SNAPSHOT, Kind.SNAPSHOT]
    relation, chain = report.findings
    assert {relation.snapshot, chain.snapshot} == {"head"}
    assert "base" in relation.what
    assert base.memory_root in chain.what
    assert "ab" * 32 in chain.what


def test_an_ancestor_that_says_something_else_is_found(store: Store, head: Snapshot) -> None:
    base, middle, own = head.manifest.layers
    other = publish(store, "other", {3: 3})
    shutil.copy(other.path / "memory.bin", head.path / "ancestry/1/new")
    (head.path / "ancestry/1/new").rename(head.path / "ancestry/1/memory.bin")
    (head.path / "ancestry/1/memory.bin").chmod(0o444)
    forged = middle.model_copy(update={"memory": other.manifest.layers[0].memory})
    reseal(head, layers=(base, forged, own))
    report = check_store(store)
    assert kinds(report) == [Kind.SNAPSHOT, Kind.SNAPSHOT]
    assert "its layer middle is not that of snapshot middle" in report.findings[0].what
    assert "chain link middle must have memory root" in report.findings[1].what


@pytest.mark.parametrize(("field", "value"), [("entries", 9), ("stored", 0)])
def test_counts_that_are_not_the_layers(
    store: Store, head: Snapshot, field: str, value: int
) -> None:
    *below, own = head.manifest.layers
    memory = own.memory.model_copy(update={field: value})
    reseal(head, layers=(*below, own.model_copy(update={"memory": memory})))
    finding = only(check_store(store))
    assert (finding.kind, finding.snapshot) == (Kind.SNAPSHOT, "head")
    assert "entries" in finding.what


def test_a_layer_for_another_machine(store: Store, head: Snapshot) -> None:
    reseal(head, machine=head.manifest.machine.model_copy(update={"ram_bytes": 2 << 20}))
    finding = only(check_store(store))
    assert (finding.kind, finding.snapshot) == (Kind.SNAPSHOT, "head")
    assert "256 pages of RAM, its machine has 512" in finding.what


def test_a_snapshot_under_another_name_is_damaged(store: Store, head: Snapshot) -> None:
    head.path.rename(store.snapshots / "tail")
    finding = only(check_store(store))
    assert (finding.kind, finding.snapshot) == (Kind.SNAPSHOT, "tail")
    assert "says that it is snapshot head" in finding.what
    assert str(head.path) in finding.way_out


def test_a_snapshot_of_another_format_is_not_to_be_repaired(store: Store, head: Snapshot) -> None:
    raw = (head.path / "manifest.json").read_bytes().replace(b'"format": 2', b'"format": 9')
    (head.path / "manifest.json").write_bytes(raw)
    (head.path / "manifest.b3").write_text(digest(raw) + "\n")
    report = check_store(store)
    assert only(report).kind is Kind.SNAPSHOT
    assert "format 9" in only(report).what
    assert report.exit_code == 5
    assert plan_repairs(report) == ()


def test_a_copy_of_an_ancestors_disk_is_compared_by_digest(store: Store, head: Snapshot) -> None:
    path = head.path / "ancestry/0/disk.qcow2"
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").rename(path)
    assert check_store(store).findings == ()
    poke(path, 5000)
    finding = only(check_store(store))
    assert (finding.kind, finding.snapshot, finding.file) == (Kind.DISK, "base", path)


def test_a_disk_that_its_stamp_vouches_for_is_read_with_the_data_alone(
    store: Store, head: Snapshot
) -> None:
    poke(head.disk_path(1), 100_000)
    assert check_store(store).findings == ()
    finding = only(check_store(store, read_data=EVERYTHING))
    assert (finding.kind, finding.snapshot) == (Kind.DISK, "middle")
    for tag in ("middle", "head"):
        (store.snapshots / tag / "verified.json").unlink()
    assert only(check_store(store)) == finding


def test_a_disk_that_names_another_file_is_damage(store: Store, head: Snapshot) -> None:
    flip(head.disk_path(2), 15)
    finding = only(check_store(store, read_data=EVERYTHING))
    assert (finding.kind, finding.snapshot) == (Kind.DISK, "head")
    assert "backing file" in finding.what


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


@pytest.mark.parametrize(
    ("name", "kind", "tag"),
    [
        ("snapshots/head/notes.txt", Kind.ORPHAN, "head"),
        ("snapshots/head/ancestry/2/memory.bin", Kind.ORPHAN, "head"),
        ("snapshots/head/ancestry/0/vmstate", Kind.ORPHAN, "head"),
        ("snapshots/base/ancestry/0/memory.bin", Kind.ORPHAN, "base"),
        ("snapshots/not a tag/manifest.json", Kind.ORPHAN, None),
        ("snapshots/file", Kind.ORPHAN, None),
        ("snapshots/head/.verified.json.4194305.tmp", Kind.LITTER, "head"),
        ("images/file", Kind.ORPHAN, None),
        ("images/" + "ab" * 32 + ".ram", Kind.LITTER, None),
        ("images/" + "ab" * 32 + ".json", Kind.LITTER, None),
        ("images/." + "ab" * 32 + ".ram.tmp", Kind.LITTER, None),
        ("images/." + "ab" * 32 + ".json.4194305.tmp", Kind.LITTER, None),
        ("staging/file", Kind.ORPHAN, None),
        ("staging/t/memory.bin", Kind.LITTER, None),
        ("staging/.deleted-t-0011/memory.bin", Kind.LITTER, None),
        ("sandboxes/file", Kind.ORPHAN, None),
        ("sandboxes/sb-1-2/state.json", Kind.LITTER, None),
        ("templates/file", Kind.ORPHAN, None),
        ("templates/overlay-512.qcow2", Kind.TEMPLATE, None),
        ("templates/.overlay-512.qcow2.4194305.tmp", Kind.LITTER, None),
        (".store.json.4194305.tmp", Kind.LITTER, None),
    ],
)
def test_what_lies_about_is_classified(
    store: Store, head: Snapshot, name: str, kind: Kind, tag: str | None
) -> None:
    path = store.home / name
    missing = [p for p in (path, *path.parents) if not p.exists()]
    write(path)
    for directory in missing[1:]:
        directory.chmod(0o700)
    report = check_store(store, read_data=EVERYTHING)
    finding = only(report)
    assert finding.kind is kind
    assert finding.snapshot in (tag, None)
    assert path.is_relative_to(finding.file)
    assert report.exit_code == 1


def test_what_others_hold_is_in_use(store: Store, head: Snapshot) -> None:
    sandbox = store.sandboxes / "sb-1-2"
    sandbox.mkdir(mode=0o700)
    lock = files.try_lock_directory(sandbox)
    assert lock is not None
    thread = threading.get_native_id()
    temporary = head.path / f".verified.json.{thread}.tmp"
    write(temporary)
    half = store.images / f".{'ab' * 32}.ram.tmp"
    write(half)
    with store.stage("t"), files.locked(store.images / ".ab.lock"):
        report = check_store(store, read_data=EVERYTHING)
        assert report.findings == ()
        assert set(report.in_use) == {sandbox, store.staging / "t", temporary, half}
    os.close(lock)
    assert set(kinds(check_store(store))) == {Kind.LITTER}


@pytest.mark.parametrize(
    ("record", "waits"),
    [('{"id": "sb-1-2"}', True), ('{"id": "sb-other"}', False), ("[1]", False), ("{", False)],
)
def test_a_sandbox_with_a_record_waits_for_its_next_owner(
    store: Store, record: str, waits: bool
) -> None:
    sandbox = store.sandboxes / "sb-1-2"
    sandbox.mkdir(mode=0o700)
    (sandbox / "state.json").write_text(record)
    report = check_store(store)
    assert (report.in_use == (sandbox,)) is waits
    assert set(kinds(report)) == (set() if waits else {Kind.LITTER})


@pytest.mark.parametrize("harm", ["missing", "short", "empty", "garbage"])
@pytest.mark.parametrize("name", ["manifest.json", "manifest.b3"])
def test_a_manifest_that_is_no_manifest(store: Store, head: Snapshot, name: str, harm: str) -> None:
    path = head.path / name
    content = {"short": path.read_bytes()[:-2], "empty": b"", "garbage": b"\xff" * 65}
    path.unlink()
    if harm != "missing":
        path.write_bytes(content[harm])
    finding = only(check_store(store))
    assert (finding.kind, finding.snapshot, finding.file) == (Kind.MANIFEST, "head", path)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("snapshots", 0o755), ("snapshots/head", 0o750), ("snapshots/head/memory.bin", 0o644)],
)
def test_a_mode_that_lets_others_in(store: Store, head: Snapshot, name: str, mode: int) -> None:
    (store.home / name).chmod(mode)
    report = check_store(store)
    finding = only(report)
    assert (finding.kind, finding.file) == (Kind.MODE, store.home / name)
    assert report.exit_code == 1


def test_an_image_that_was_written_to_is_a_damaged_cache(store: Store, head: Snapshot) -> None:
    image = next(store.images.glob("*.ram"))
    poke(image, 4096)
    report = check_store(store)
    finding = only(report)
    assert (finding.kind, finding.snapshot, finding.file) == (Kind.IMAGE, "base", image)
    assert report.exit_code == 1


def test_an_image_that_no_snapshot_needs_is_a_note(store: Store, head: Snapshot) -> None:
    other = publish(store, "other", {3: 3})
    image = make_image(store, other)
    twin = link_snapshot(other, make_directory(store.sandboxes / "sb-1-2") / "parent")
    store.delete("other")
    lock = files.try_lock_directory(twin.path.parent)
    assert lock is not None
    assert check_store(store).findings == ()  # the sandbox may need it
    os.close(lock)
    shutil.rmtree(twin.path.parent)
    report = check_store(store, read_data=EVERYTHING)
    assert (only(report).kind, only(report).file) == (Kind.UNUSED_IMAGE, image)
    assert report.sound


def make_directory(path: Path) -> Path:
    path.mkdir(mode=0o700)
    return path


def test_store_json(store: Store, head: Snapshot) -> None:
    path = store.home / "store.json"
    path.write_text("garbage")
    report = check_store(store)
    assert (only(report).kind, only(report).file) == (Kind.STORE, path)
    assert report.exit_code == 5
    path.unlink()
    assert only(check_store(store)).kind is Kind.STORE
    path.write_text('{"format": 2}')
    with pytest.raises(Incompatible, match="format 2"):
        check_store(store)


def test_a_snapshot_deleted_meanwhile_is_no_finding(
    store: Store, head: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted just before each step of the check."""
    steps: list[tuple[Any, str]] = [
        (structure, "identity_of"),
        *((check_module, name) for name in ("take_inventory", "check_indexes", "scrub")),
    ]
    for module, name in steps:
        tag = f"gone-{name.replace('_', '-')}"
        publish(store, tag, {1: 1, 100: 2})
        original: Callable[..., Any] = getattr(module, name)
        done: list[bool] = []

        def deleting(
            *args: Any,
            tag: str = tag,
            original: Callable[..., Any] = original,
            done: list[bool] = done,
            **options: Any,
        ) -> Any:
            if not done:
                done.append(True)
                store.delete(tag)
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, deleting)
            report = check_store(store, read_data=EVERYTHING)
        assert done
        assert report.findings == ()


def test_a_busy_store_is_as_sound_as_a_quiet_one(store: Store, head: Snapshot) -> None:
    """Snapshots and images come and go under the same names all the time."""
    stop = threading.Event()
    rounds: list[int] = []

    def work(tag: str) -> None:
        seed = 0
        while not stop.is_set():
            seed += 1
            child = publish(store, tag, {1: seed, 100: seed + 1}, head)
            make_image(store, child)
            if seed % 2:
                ImageStore(store.images).remove(child.manifest.memory_root)
            store.delete(tag)
            if not seed % 2:
                ImageStore(store.images).remove(child.manifest.memory_root)
            rounds.append(seed)

    workers = [threading.Thread(target=work, args=(tag,)) for tag in ("a", "b")]
    for worker in workers:
        worker.start()
    reports: list[Report] = []
    try:
        while len(reports) < 50 or (
            len(rounds) < 10 and all(worker.is_alive() for worker in workers)
        ):
            reports.append(check_store(store, read_data=EVERYTHING))
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert len(rounds) >= 10
    found = {f for report in reports for f in report.findings if f.kind is not Kind.UNUSED_IMAGE}
    assert found == set()
    assert check_store(store, read_data=EVERYTHING).findings == ()


def test_what_cannot_be_read_is_a_finding(
    store: Store, head: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails: EIO from each way to read, for one inode at a time."""
    for name, kind in (
        ("manifest.json", Kind.MANIFEST),
        ("memory.bin", Kind.MEMORY),
        ("disk.qcow2", Kind.DISK),
        ("vmstate", Kind.VMSTATE),
    ):
        path = store.snapshots / "middle" / name
        with monkeypatch.context() as patch:
            fail_reads_of(patch, path)
            report = check_store(store, read_data=EVERYTHING)
        finding = only(report)
        assert (finding.kind, finding.snapshot) == (kind, "middle")
        assert "Input/output error" in finding.what
    image = next(store.images.glob("*.ram"))
    with monkeypatch.context() as patch:
        fail_reads_of(patch, image)
        found = check_store(store, read_data=EVERYTHING).findings
    assert {f.kind for f in found} == {Kind.IMAGE}


def fail_reads_of(patch: pytest.MonkeyPatch, path: Path) -> None:
    bad = path.stat().st_ino
    preadv, opening = os.preadv, Path.open

    def failing_preadv(fd: int, *arguments: Any) -> int:
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_ino == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, *arguments)

    def failing_open(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.exists() and self.stat().st_ino == bad and path.suffix != ".ram":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opening(self, *arguments, **options)

    def failing_read(self: Path) -> bytes:
        with failing_open(self, "rb") as file:
            content: bytes = file.read()
            return content

    patch.setattr(os, "preadv", failing_preadv)
    patch.setattr(Path, "open", failing_open)
    patch.setattr(Path, "read_bytes", failing_read)
