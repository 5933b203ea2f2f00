"""Flattened disks under the check: sound, damaged, half made, and of no use to anybody."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from ratoon.files import Stamp, locked
from ratoon.store.check.check import check_store
from ratoon.store.check.findings import Finding, Kind
from ratoon.store.check.repair import plan_repairs, repair_store
from ratoon.store.check.scrub import EVERYTHING
from ratoon.store.snapshot.flat_disks import FlatDisks
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.usage import usage
from small_snapshots import poke, publish


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
def head(store: Store) -> Snapshot:
    snapshots: list[Snapshot] = []
    for number in range(4):
        parent = snapshots[-1] if snapshots else None
        snapshots.append(publish(store, f"s{number}", {number: 1}, parent))
    return snapshots[-1]


@pytest.fixture
def disk(store: Store, head: Snapshot) -> Path:
    with store.scratch() as room:
        return FlatDisks(store.images).make(head, room)


def findings(store: Store) -> list[tuple[Kind, Path]]:
    report = check_store(store, read_data=EVERYTHING)
    return [(finding.kind, finding.file) for finding in report.findings]


def repaired(store: Store) -> list[Finding]:
    """What is left after all that could be repaired was."""
    repairs = plan_repairs(check_store(store, read_data=EVERYTHING))
    assert all(each.done for each in repair_store(store, repairs, sweep_sandboxes=lambda: None))
    return [*check_store(store, read_data=EVERYTHING).findings]


def test_a_sound_one(store: Store, head: Snapshot, disk: Path) -> None:
    report = check_store(store, read_data=EVERYTHING)
    assert (report.findings, report.images) == ((), 1)
    assert report.bytes_read >= disk.stat().st_size
    assert usage(store).images[disk.stem].total >= disk.stat().st_blocks * 512
    assert usage(store).snapshots["s3"].own >= disk.stat().st_blocks * 512


def test_a_changed_one_is_removed(store: Store, disk: Path) -> None:
    poke(disk, 300)
    assert findings(store) == [(Kind.IMAGE, disk)]
    assert repaired(store) == []
    assert not disk.exists()


def test_a_bit_that_rots_is_found_by_reading(store: Store, disk: Path) -> None:
    digest = FlatDisks(store.images).digest(disk.stem)
    poke(disk, disk.stat().st_size - 1)
    stamp = {"root": disk.stem, **asdict(Stamp.of(disk, with_ctime=True))}
    disk.with_suffix(".json").write_text(f"{json.dumps(stamp, sort_keys=True)}\n{digest}")
    assert FlatDisks(store.images).find(disk.stem) == disk
    assert check_store(store).findings == ()
    assert findings(store) == [(Kind.IMAGE, disk)]
    assert repaired(store) == []
    assert not disk.exists()


def test_half_made_ones_are_litter_unless_somebody_makes_them(store: Store, disk: Path) -> None:
    half_made = [store.images / f".{disk.stem}.qcow2{name}.tmp" for name in ("", ".upper")]
    for path in half_made:
        path.touch()
    disk.with_suffix(".json").unlink()
    with locked(store.images / f".{disk.stem[:2]}.lock"):
        report = check_store(store)
        assert report.findings == ()
        assert set(report.in_use) == {disk, *half_made}
    assert {*findings(store)} == {(Kind.LITTER, path) for path in (disk, *half_made)}
    assert repaired(store) == []
    assert not [path for path in store.images.iterdir() if not path.name.endswith(".lock")]


def test_one_that_no_chain_begins_with(store: Store, disk: Path) -> None:
    """A chain above it still has use for it; without that it is told of."""
    publish(store, "above", {9: 1}, store.get("s3"))
    store.delete("s3", force=True)
    assert [kind for kind, _ in findings(store)] == [Kind.PARENT_GONE]
    store.delete("above")
    assert findings(store) == [(Kind.UNUSED_IMAGE, disk)]
    disk.unlink()
    assert findings(store) == [(Kind.LITTER, disk.with_suffix(".json"))]
