"""Compressing layers where they lie: every name, whoever else is at work, and nothing else."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from memory_helpers import last_data_byte
from ratoon import files
from ratoon.api.upkeep import CompressedLayer
from ratoon.errors import Corrupt, HostError, InFlight, NotFound
from ratoon.store.check.check import check_store
from ratoon.store.check.repair import plan_repairs, repair_store
from ratoon.store.check.scrub import EVERYTHING, Slice
from ratoon.store.memory.compressed import is_compressed
from ratoon.store.memory.image import ImageStore
from ratoon.store.pack.pack import pack
from ratoon.store.pack.unpack import unpack
from ratoon.store.snapshot.compact import compact
from ratoon.store.snapshot.compress import rewrite_layers
from ratoon.store.snapshot.diff import _changed_pages
from ratoon.store.snapshot.links import read_links
from ratoon.store.snapshot.snapshot import Snapshot, link_snapshot, load_snapshot
from ratoon.store.snapshot.staging import exchange
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.usage import usage
from small_snapshots import RAM, contents, make_image, poke, publish

#: Pages that compress well, in several frames.
WIDE = {number: number % 9 + 1 for number in range(200)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """base, and on it a and b; the chain a, a1; a sandbox that stands on a.

    b is random bytes, and the only one that was made long ago.
    """
    now = time.time()
    store = Store.open(tmp_path / "home")
    base = publish(store, "base", WIDE, created_at_unix=now)
    a = publish(store, "a", dict.fromkeys(range(0, 200, 2), 20), base, created_at_unix=now)
    publish(store, "a1", {1: 30}, a, created_at_unix=now)
    publish(store, "b", {number: number + 1 for number in range(20)}, base)
    sandbox = store.sandboxes / "sb-0-0"
    sandbox.mkdir(mode=0o700)
    link_snapshot(a, sandbox / "parent")
    return store


def layers(store: Store) -> dict[str, set[bool]]:
    """Of which forms the files of each layer are, by the snapshot that added it."""
    found: dict[str, set[bool]] = {}
    for directory in (*store.snapshots.iterdir(), *store.sandboxes.glob("*/parent")):
        snapshot = load_snapshot(directory)
        for number, layer in enumerate(snapshot.manifest.layers):
            form = is_compressed(snapshot.memory_path(number), label="L")
            found.setdefault(layer.tag, set()).add(form)
    return found


def all_contents(store: Store) -> dict[str, dict[str, bytes]]:
    return {path.name: contents(path) for path in store.snapshots.iterdir()}


def assert_sound(store: Store) -> None:
    sandboxes = set(store.sandboxes.iterdir())  # which nobody holds here
    report = check_store(store, read_data=EVERYTHING)
    findings = [each for each in report.findings if each.file not in sandboxes]
    assert not findings
    assert not list(store.staging.iterdir())


def test_every_name_of_a_layer_is_replaced_and_the_space_is_free(store: Store) -> None:
    before, content = usage(store).total, all_contents(store)
    done = rewrite_layers(store, "compressed")
    outcomes = {each.tag: each.outcome for each in done}
    assert outcomes == {"base": "compressed", "a": "compressed", "a1": "compressed", "b": "kept"}
    assert layers(store) == {"base": {True}, "a": {True}, "a1": {True}, "b": {False}}
    names = {each.tag: each.names for each in done}
    assert names == {"base": 5, "a": 3, "a1": 1, "b": 0}
    freed = sum(
        each.bytes_before - each.bytes_after for each in done if each.outcome == "compressed"
    )
    assert before - usage(store).total == freed > 0
    assert all_contents(store) == content
    assert_sound(store)
    twin = store.sandboxes / "sb-0-0" / "parent"
    assert twin.joinpath("memory.bin").stat().st_ino == store.get("a").memory_path(1).stat().st_ino
    assert all(each.outcome == "kept" for each in rewrite_layers(store, "compressed"))


def test_and_plain_again(store: Store) -> None:
    before = usage(store).total
    files_before = {path: path.read_bytes() for path in sorted(store.snapshots.rglob("memory.bin"))}
    rewrite_layers(store, "compressed")
    done = rewrite_layers(store, "plain")
    assert {each.tag for each in done} == {"base", "a", "a1"}
    assert usage(store).total == before
    assert {path: path.read_bytes() for path in files_before} == files_before
    assert rewrite_layers(store, "plain") == ()
    assert_sound(store)


def test_a_dry_run_tells_and_changes_nothing(store: Store) -> None:
    inodes = {path: path.stat().st_ino for path in store.snapshots.rglob("*")}
    would = rewrite_layers(store, "compressed", dry_run=True)
    assert {path: path.stat().st_ino for path in store.snapshots.rglob("*")} == inodes
    assert all(each.names == 0 for each in would)
    done = rewrite_layers(store, "compressed")
    assert [(each.tag, each.outcome, each.bytes_before, each.bytes_after) for each in would] == [
        (each.tag, each.outcome, each.bytes_before, each.bytes_after) for each in done
    ]


def test_the_chosen_snapshots_chains_alone(store: Store) -> None:
    with pytest.raises(NotFound):
        rewrite_layers(store, "compressed", ["base", "none"])
    assert rewrite_layers(store, "compressed", ["a"], older_than=3600) == ()
    done = rewrite_layers(store, "compressed", older_than=3600)  # b was made long ago
    assert [each.tag for each in done] == ["base", "b"]
    assert layers(store)["a"] == {False}
    assert layers(store)["base"] == {True}


def test_all_that_uses_layers_uses_compressed_ones(store: Store, tmp_path: Path) -> None:
    plain = make_image(store, store.get("a1")).read_bytes()
    shutil.rmtree(store.images)
    store.images.mkdir(mode=0o700)
    pack(store, "a1", tmp_path / "before.tar.zst")
    rewrite_layers(store, "compressed")
    assert make_image(store, store.get("a1")).read_bytes() == plain
    pack(store, "a1", tmp_path / "after.tar.zst")
    same = [(tmp_path / f"{name}.tar.zst").read_bytes() for name in ("before", "after")]
    assert same[0] == same[1], "a pack has the plain form"

    elsewhere = Store.open(tmp_path / "elsewhere")
    unpack(elsewhere, tmp_path / "after.tar.zst")
    assert contents(elsewhere.snapshots / "a1") == contents(store.snapshots / "a1")
    again = unpack(store, tmp_path / "after.tar.zst", "again")
    assert again.stored == 0, "the compressed layers have the content already"
    assert layers(store)["base"] == {True}

    flat = compact(store, "a1", "flat")
    assert flat.manifest.memory_root == store.get("a1").manifest.memory_root
    assert _changed_pages(store.get("base"), flat) == 101
    detail = store.info("a")
    assert detail.memory_physical_bytes < detail.memory_logical_bytes
    assert_sound(store)


def test_branches_link_compressed_layers(store: Store) -> None:
    rewrite_layers(store, "compressed")
    publish(store, "a2", {5: 50}, store.get("a"))
    assert store.get("a2").memory_path(0).stat().st_ino == (
        store.get("base").memory_path(0).stat().st_ino
    )
    assert_sound(store)


def test_a_run_that_was_cut_short_is_finished_by_the_next(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = all_contents(store)

    left = [2]

    def interrupted(first: Path, second: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "no more")
        exchange(first, second)

    monkeypatch.setattr("ratoon.store.snapshot.compress.exchange", interrupted)
    with pytest.raises(OSError, match="no more"):
        rewrite_layers(store, "compressed")
    monkeypatch.undo()
    assert layers(store)["base"] == {True, False}
    assert all_contents(store) == content
    assert_sound(store)
    (made,) = {
        path.stat().st_ino
        for path in store.snapshots.rglob("memory.bin")
        if is_compressed(path, label="L")
    }
    rewrite_layers(store, "compressed")
    assert layers(store)["base"] == {True}
    assert store.get("base").memory_path(0).stat().st_ino == made, "the one that was there already"
    assert_sound(store)


def test_links_that_are_made_meanwhile_are_replaced_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:

    late = store.sandboxes / "late"

    def while_another_links(first: Path, second: Path) -> None:
        if not late.exists():
            late.mkdir(mode=0o700)
            os.link(store.snapshots / "base" / "memory.bin", late / "memory.bin")
        exchange(first, second)

    monkeypatch.setattr("ratoon.store.snapshot.compress.exchange", while_another_links)
    (base, *_) = rewrite_layers(store, "compressed", ["base"])
    assert base.names == 6
    assert is_compressed(late / "memory.bin", label="L")


def test_nothing_comes_to_be_where_somebody_deletes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that goes between the look and the exchange stays away."""

    def while_another_deletes(first: Path, second: Path) -> None:
        if (store.snapshots / "b").exists():
            store.delete("b")
        exchange(first, second)

    monkeypatch.setattr("ratoon.store.snapshot.compress.exchange", while_another_deletes)
    rewrite_layers(store, "compressed")
    assert {path.name for path in store.snapshots.iterdir()} == {"base", "a", "a1"}
    assert_sound(store)


def test_a_directory_that_takes_the_name_of_another_is_not_touched(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox's twin is replaced by renames, which wait for nobody."""
    parent = store.sandboxes / "sb-0-0" / "parent"
    other = publish(store, "other", dict.fromkeys(range(100), 60))
    link_or_copy = files.link_or_copy

    def while_another_renames(source: Path, target: Path) -> None:
        if target.name == "new" and not parent.with_name("old").exists():
            parent.rename(parent.with_name("old"))
            link_snapshot(other, parent)
        link_or_copy(source, target)

    monkeypatch.setattr("ratoon.files.link_or_copy", while_another_renames)
    rewrite_layers(store, "compressed", ["a"])
    monkeypatch.undo()
    assert contents(parent)["memory.bin"] == contents(store.snapshots / "other")["memory.bin"]
    assert is_compressed(parent.with_name("old") / "memory.bin", label="L")


def test_readers_go_on_while_layers_change_their_form(store: Store) -> None:
    stop = threading.Event()
    wrong: list[object] = []
    expected = np.frombuffer(make_image(store, store.get("a1")).read_bytes(), np.uint8)

    def read() -> None:
        while not stop.is_set():
            report = check_store(store, read_data=Slice(1, 1))
            wrong.extend(each for each in report.findings if each.kind.value == "damaged layer")
            twin = store.home / "twin"
            try:
                link_snapshot(store.get("a1"), twin)
                images = ImageStore(store.home / "own")
                image = images.make(read_links(Snapshot(twin, store.get("a1").manifest)), RAM)
                if not np.array_equal(np.fromfile(image, np.uint8), expected):
                    wrong.append("another content")
            except Exception as error:
                wrong.append(error)
            finally:
                shutil.rmtree(twin, ignore_errors=True)
                shutil.rmtree(store.home / "own", ignore_errors=True)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(10):
            rewrite_layers(store, "compressed")
            rewrite_layers(store, "plain")
    finally:
        stop.set()
        reader.join()
    assert not wrong
    shutil.rmtree(store.home / "own", ignore_errors=True)


def test_one_at_a_time(store: Store) -> None:
    lock = files.try_lock_directory(store.snapshots)
    assert lock is not None
    with pytest.raises(InFlight, match="another process"):
        rewrite_layers(store, "compressed")
    os.close(lock)
    assert rewrite_layers(store, "compressed")


def test_a_damaged_layer_stays_and_is_named(store: Store) -> None:
    path = store.get("base").memory_path(0)
    poke(path, last_data_byte(path))
    found = {each.tag: each for each in rewrite_layers(store, "compressed")}
    assert found["base"].outcome == "failed"
    assert "page 199" in (found["base"].error or "")
    assert found["a"].outcome == "compressed"
    assert layers(store)["base"] == {False}


def test_a_file_system_without_exchanges_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(first: Path, second: Path) -> None:
        raise HostError("no such thing")

    monkeypatch.setattr("ratoon.store.snapshot.compress.exchange", refuse)
    with pytest.raises(HostError, match="exchange names"):
        rewrite_layers(store, "compressed")
    assert layers(store)["base"] == {False}
    assert_sound(store)


# Damage to what was compressed -------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Store:
    """base and a on it, compressed; the middle of base is damaged, and there is no image."""
    store = Store.open(tmp_path / "home")
    base = publish(store, "base", WIDE)
    publish(store, "a", {5: 90}, base)
    rewrite_layers(store, "compressed")
    path = base.memory_path(0)
    poke(path, path.stat().st_size - 40, 3)
    return store


def test_a_flipped_bit_names_the_layer_and_the_pages(damaged: Store) -> None:
    assert not [each for each in check_store(damaged).findings if each.page is not None]
    report = check_store(damaged, read_data=EVERYTHING)
    assert report.exit_code == 5
    pages = {finding.page for finding in report.findings}
    assert pages <= set(range(192, 200)), "those of the last frame, or some of them"
    assert pages
    assert {finding.snapshot for finding in report.findings} == {"base"}
    with pytest.raises(Corrupt, match=r"snapshot base, .*page"):
        make_image(damaged, damaged.get("a"))


def test_a_truncated_one_is_found_without_reading_data(damaged: Store) -> None:
    path = damaged.get("base").memory_path(0)
    path.chmod(0o600)
    os.truncate(path, path.stat().st_size - 1)
    path.chmod(0o444)
    (finding,) = check_store(damaged).findings
    assert finding.snapshot == "base"
    assert "frames end at" in finding.what


def test_it_is_repaired_from_an_image_and_its_own_sound_frames(damaged: Store) -> None:
    path = damaged.get("base").memory_path(0)
    poke(path, path.stat().st_size - 40, 3)  # sound again
    make_image(damaged, damaged.get("a"))
    content = contents(damaged.snapshots / "base")
    poke(path, path.stat().st_size - 40, 3)
    report = check_store(damaged, read_data=EVERYTHING)
    (outcome,) = repair_store(damaged, plan_repairs(report), sweep_sandboxes=lambda: None)
    assert outcome.done, outcome.why
    assert contents(damaged.snapshots / "base") == content
    assert check_store(damaged, read_data=EVERYTHING).sound
    (again,) = rewrite_layers(damaged, "compressed")
    assert (again.tag, again.outcome) == ("base", "compressed"), "what was re-made is plain"


def test_a_plain_copy_elsewhere_repairs_it(damaged: Store, tmp_path: Path) -> None:
    base = damaged.get("base")
    poke(base.memory_path(0), base.memory_path(0).stat().st_size - 40, 3)
    copy = damaged.get("a").memory_path(0)
    shutil.copy(base.memory_path(0), tmp_path / "copy")
    copy.unlink()
    shutil.copy(tmp_path / "copy", copy)
    poke(base.memory_path(0), base.memory_path(0).stat().st_size - 40, 3)
    report = check_store(damaged, read_data=EVERYTHING)
    outcomes = repair_store(damaged, plan_repairs(report), sweep_sandboxes=lambda: None)
    assert all(outcome.done for outcome in outcomes)
    assert check_store(damaged, read_data=EVERYTHING).sound


def test_rewriting_merges_copies_of_one_content(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "home")
    base = publish(store, "base", {})
    one = publish(store, "one", WIDE)
    two = publish(store, "two", WIDE)
    assert one.memory_path(0).stat().st_ino != two.memory_path(0).stat().st_ino
    assert base.manifest.layers[0].memory.entries == 0
    found = [each for each in rewrite_layers(store, "compressed") if each.outcome == "compressed"]
    (done,) = found
    assert isinstance(done, CompressedLayer)
    assert one.memory_path(0).stat().st_ino == two.memory_path(0).stat().st_ino
    assert_sound(store)
