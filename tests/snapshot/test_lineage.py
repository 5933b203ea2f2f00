"""The store as a forest."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratoon.api.snapshots import LineageNode
from ratoon.cli.chains import draw
from ratoon.cli.showing import printable
from ratoon.store.snapshot.lineage import lineage
from ratoon.store.snapshot.store import Store
from small_snapshots import flip, publish


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store.open(tmp_path / "home")
    base = publish(store, "base")
    a = publish(store, "a", parent=base)
    publish(store, "a11", parent=publish(store, "a1", parent=a))
    publish(store, "a2", parent=a)
    publish(store, "b", parent=base)
    publish(store, "other")
    return store


def drawn(store: Store) -> str:
    return "\n".join(line.rstrip() for line in draw(lineage(store)))


def test_an_empty_store(tmp_path: Path) -> None:
    assert lineage(Store.open(tmp_path / "home")) == ()


def test_each_is_followed_by_what_was_made_from_it(store: Store) -> None:
    nodes = {node.tag: node for node in lineage(store)}
    assert [*nodes] == ["base", "a", "a1", "a11", "a2", "b", "other"]
    assert nodes["a"] == LineageNode("a", 1, "base", ["a1", "a2"], 1, 1_700_000_000, None)
    assert nodes["a11"] == LineageNode("a11", 3, "a1", [], 3, 1_700_000_000, None)
    assert nodes["other"] == LineageNode("other", 0, None, [], 0, 1_700_000_000, None)
    assert drawn(store) == ("base\n├─ a\n│  ├─ a1\n│  │  └─ a11\n│  └─ a2\n└─ b\nother")


def test_a_snapshot_whose_parent_is_gone_is_a_root_with_a_note(store: Store) -> None:
    store.delete("a", force=True)
    nodes = {node.tag: node for node in lineage(store)}
    assert nodes["base"].children == ["b"]
    assert nodes["a1"].note == nodes["a2"].note == "its parent a is gone"
    assert (nodes["a1"].level, nodes["a1"].depth, nodes["a1"].parent) == (0, 2, None)
    assert drawn(store) == (
        "a1  (its parent a is gone)\n└─ a11\na2  (its parent a is gone)\nbase\n└─ b\nother"
    )


def test_another_snapshot_of_the_parents_tag_is_not_the_parent(store: Store) -> None:
    store.delete("a", force=True)
    publish(store, "a")
    nodes = {node.tag: node for node in lineage(store)}
    assert nodes["a"].children == []
    assert nodes["a1"].note == "its parent a is gone"


def test_a_damaged_snapshot_hides_none(store: Store) -> None:
    flip(store.snapshots / "a" / "manifest.json", 50)
    nodes = {node.tag: node for node in lineage(store)}
    assert len(nodes) == 7
    assert nodes["a"].note
    assert nodes["a"].note.startswith("damaged: snapshot a")
    assert nodes["a1"].note == "its parent a is damaged"
    assert [*nodes] == ["a", "a1", "a11", "a2", "base", "b", "other"]


def test_a_deep_chain(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "home")
    snapshot = None
    for number in range(40):
        snapshot = publish(store, f"s{number}", parent=snapshot)
    assert [node.level for node in lineage(store)] == [*range(40)]


def test_text_for_a_terminal() -> None:
    assert printable("ü a\n\x1b[31m\udcff") == "ü a\\n\\x1b[31m\\udcff"
