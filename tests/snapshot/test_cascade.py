"""Deleting a snapshot that others were made from: with them, or alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratoon.errors import HasDependents, InFlight, InvalidInput, NotFound
from ratoon.store.snapshot.snapshot import Snapshot, load_snapshot, read_vmstate
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import check_sizes, verify_disks
from small_snapshots import flip, publish, write_snapshot


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """::

    base ── a ── a1 ── a11
         │    └─ a2
         └─ b
    other
    """
    store = Store.open(tmp_path / "home")
    base = publish(store, "base")
    a = publish(store, "a", parent=base)
    publish(store, "a11", parent=publish(store, "a1", parent=a))
    publish(store, "a2", parent=a)
    publish(store, "b", parent=base)
    publish(store, "other")
    return store


def tags(store: Store) -> set[str]:
    """The tags that there are, each whole."""
    for entry in store.list():
        assert isinstance(entry, Snapshot)
        check_sizes(entry)
        verify_disks(entry)
        read_vmstate(entry)
    assert list(store.staging.iterdir()) == []
    return {path.name for path in store.snapshots.iterdir()}


def test_the_refusal_names_the_direct_dependents_and_both_ways_out(store: Store) -> None:
    with pytest.raises(HasDependents, match=r"dependents: a, b; .*--cascade.*--force") as refusal:
        store.delete("base")
    assert refusal.value.dependents == ["a", "b"]


def test_a_cascade_deletes_the_subtree_leaves_first(store: Store) -> None:
    deleted = store.delete("base", cascade=True)
    assert set(deleted) == {"base", "a", "a1", "a11", "a2", "b"}
    order = {tag: position for position, tag in enumerate(deleted)}
    for child, parent in (("a11", "a1"), ("a1", "a"), ("a2", "a"), ("a", "base"), ("b", "base")):
        assert order[child] < order[parent]
    assert tags(store) == {"other"}


def test_a_cascade_leaves_siblings_and_parents(store: Store) -> None:
    assert store.delete("a1", cascade=True) == ("a11", "a1")
    assert tags(store) == {"base", "a", "a2", "b", "other"}
    assert store.delete("other", cascade=True) == ("other",)


def test_force_deletes_one_alone(store: Store) -> None:
    assert store.delete("a", force=True) == ("a",)
    assert tags(store) == {"base", "a1", "a11", "a2", "b", "other"}
    assert set(store.delete("base", cascade=True)) == {"base", "b"}, "a1 was not made from base"


def test_cascade_and_force_contradict_each_other(store: Store) -> None:
    with pytest.raises(InvalidInput, match="not both"):
        store.delete("other", cascade=True, force=True)
    assert "other" in tags(store)


def test_an_error_in_the_middle_leaves_a_valid_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, left = Path.rename, 0
    for deletions in range(6):
        remaining = tags(store)
        left = 1

        def failing(path: Path, target: Path) -> Path:
            nonlocal left
            if path.parent == store.snapshots:
                if not left:
                    raise OSError("injected")
                left -= 1
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", failing)
            if deletions < 5:
                with pytest.raises(OSError, match="injected"):
                    store.delete("base", cascade=True)
            else:
                store.delete("base", cascade=True)
        gone = remaining - tags(store)
        assert len(gone) == 1, "leaves go one by one, and nothing else"
        assert not (parents(store) & gone)
    assert tags(store) == {"other"}


def parents(store: Store) -> set[str]:
    found = set()
    for path in store.snapshots.iterdir():
        parent = load_snapshot(path).manifest.parent
        if parent:
            found.add(parent.tag)
    return found


def test_a_snapshot_being_published_stops_a_cascade_before_its_parents_go(store: Store) -> None:
    with store.stage("c") as staging:
        staging.publish(write_snapshot(store, staging, parent=store.get("b")))
        with pytest.raises(InFlight, match="snapshot c"):
            store.delete("b", cascade=True)
    assert {"b", "c"} <= tags(store)
    assert store.delete("b", cascade=True) == ("c", "b")


def test_what_another_process_deleted_meanwhile_does_not_stop_a_cascade(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = store._remove

    def racing(tag: str, identity: str | None) -> None:
        if tag == "a11":
            Store(store.home).delete("a11")
        remove(tag, identity)

    monkeypatch.setattr(store, "_remove", racing)
    assert store.delete("a", cascade=True) == ("a1", "a2", "a")


def test_a_tag_used_again_meanwhile_is_not_deleted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = store._remove

    def racing(tag: str, identity: str | None) -> None:
        if tag == "b":
            Store(store.home).delete("b")
            publish(Store(store.home), "b")
        remove(tag, identity)

    monkeypatch.setattr(store, "_remove", racing)
    with pytest.raises(NotFound, match="no snapshot b"):
        store.delete("b")
    assert "b" in tags(store)


def test_a_damaged_snapshot_is_deleted_with_what_names_its_tag_as_parent(store: Store) -> None:
    flip(store.snapshots / "a" / "manifest.json", 50)
    assert set(store.delete("a", cascade=True)) == {"a", "a1", "a11", "a2"}
    assert tags(store) == {"base", "b", "other"}
