"""The store against a plain model of it: any order of operations, crashes among them.

Whatever happens, the tags and their dependents are the model's; at the end the whole memory of
every surviving snapshot is compared with the model's, byte for byte, and the store is checked.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from ratoon.errors import AlreadyExists, HasDependents, NotFound
from ratoon.store.check.check import check_store
from ratoon.store.check.scrub import Slice
from ratoon.store.memory.image import ImageStore
from ratoon.store.pack.pack import pack
from ratoon.store.pack.unpack import unpack
from ratoon.store.snapshot.compact import compact
from ratoon.store.snapshot.compress import Form, rewrite_layers
from ratoon.store.snapshot.links import read_links
from ratoon.store.snapshot.store import Store
from small_snapshots import RAM, Layer, publish, ram_of

TAGS = ("a", "b", "c", "d", "e")
tags = st.sampled_from(TAGS)
layers = st.dictionaries(st.integers(0, 40), st.integers(0, 5), max_size=6)


@dataclass(frozen=True)
class Entry:
    """What the model knows of a snapshot; `memory` has the seed of every page that is not zero."""

    tag: str
    id: str
    parent: str | None
    memory: dict[int, int]


@dataclass(frozen=True)
class Bundle:
    """A pack, and the snapshot that is in it."""

    file: Path
    entry: Entry


@dataclass
class Model:
    entries: dict[str, Entry] = field(default_factory=dict)

    def dependents(self, tag: str) -> list[Entry]:
        identity = self.entries[tag].id
        return [entry for entry in self.entries.values() if entry.parent == identity]

    def descendants(self, tag: str) -> set[str]:
        found = set()
        for child in self.dependents(tag):
            found |= {child.tag} | self.descendants(child.tag)
        return found


def apply(memory: dict[int, int], layer: Layer) -> dict[int, int]:
    return {number: seed for number, seed in {**memory, **layer}.items() if seed}


class StoreModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="ratoon-model-"))
        self.store = Store.open(self.directory / "home")
        self.images = ImageStore(self.store.images)
        self.model = Model()
        self.packs: list[Bundle] = []

    def teardown(self) -> None:
        try:
            self.reopen()
            report = check_store(self.store, read_data=Slice(1, 1))
            assert report.sound, report.findings
            fresh = ImageStore(self.directory / "fresh")
            for tag, entry in self.model.entries.items():
                image = fresh.make(read_links(self.store.get(tag)), RAM)
                assert np.array_equal(np.fromfile(image, np.uint8), whole(entry.memory)), tag
        finally:
            shutil.rmtree(self.directory)

    def expect(
        self, error: type[Exception] | None, operation: Callable[[], object], entry: Entry | None
    ) -> None:
        """Run an operation that must fail with `error`, or else leaves `entry` under its tag."""
        if error is not None:
            with pytest.raises(error):
                operation()
            return
        operation()
        if entry is not None:
            self.model.entries[entry.tag] = entry

    def taken(self, tag: str) -> type[Exception] | None:
        return AlreadyExists if tag in self.model.entries else None

    @initialize(base=layers, above=layers, beside=layers)
    def begin_with_a_tree(self, base: Layer, above: Layer, beside: Layer) -> None:
        self._grow("a", base, None)
        self._grow("b", above, self.model.entries["a"])
        self._grow("c", beside, self.model.entries["b"])

    @rule(tag=tags, layer=layers)
    def make_base(self, tag: str, layer: Layer) -> None:
        self._grow(tag, layer, None)

    @rule(tag=tags, parent=tags, layer=layers)
    def branch(self, tag: str, parent: str, layer: Layer) -> None:
        if parent in self.model.entries:
            self._grow(tag, layer, self.model.entries[parent])

    def _grow(self, tag: str, layer: Layer, parent: Entry | None) -> None:
        snapshot = self.store.get(parent.tag) if parent else None
        if error := self.taken(tag):
            with pytest.raises(error):
                publish(self.store, tag, layer, snapshot)
            return
        made = publish(self.store, tag, layer, snapshot)
        memory = apply(parent.memory if parent else {}, layer)
        above = parent.id if parent else None
        self.model.entries[tag] = Entry(tag, made.manifest.id, above, memory)

    @rule(tag=tags)
    def delete(self, tag: str) -> None:
        if tag not in self.model.entries:
            self.expect(NotFound, lambda: self.store.delete(tag), None)
        elif self.model.dependents(tag):
            self.expect(HasDependents, lambda: self.store.delete(tag), None)
        else:
            self.store.delete(tag)
            del self.model.entries[tag]

    @rule(tag=tags)
    def force(self, tag: str) -> None:
        if tag in self.model.entries:
            self.store.delete(tag, force=True)
            del self.model.entries[tag]

    @rule(tag=tags)
    def cascade(self, tag: str) -> None:
        if tag in self.model.entries:
            doomed = self.model.descendants(tag) | {tag}
            assert set(self.store.delete(tag, cascade=True)) == doomed
            for each in doomed:
                del self.model.entries[each]

    @rule(tag=tags, to=tags)
    def compact(self, tag: str, to: str) -> None:
        if tag in self.model.entries and tag != to:
            if error := self.taken(to):
                self.expect(error, lambda: compact(self.store, tag, to), None)
                return
            made = compact(self.store, tag, to)
            assert made.depth == 0
            assert made.manifest.memory_root == self.store.get(tag).manifest.memory_root
            memory = self.model.entries[tag].memory
            self.model.entries[to] = Entry(to, made.manifest.id, None, memory)

    @rule(tag=tags)
    def make_image(self, tag: str) -> None:
        if entry := self.model.entries.get(tag):
            image = self.images.make(read_links(self.store.get(tag)), RAM)
            assert np.array_equal(np.fromfile(image, np.uint8), whole(entry.memory))

    @rule(tag=tags)
    def evict(self, tag: str) -> None:
        if tag in self.model.entries:
            self.images.remove(self.store.get(tag).manifest.memory_root)

    @rule(chosen=st.lists(tags, max_size=2), form=st.sampled_from(("compressed", "plain")))
    def rewrite(self, chosen: list[str], form: Form) -> None:
        if all(tag in self.model.entries for tag in chosen):
            for found in rewrite_layers(self.store, form, chosen):
                assert found.outcome in (form, "kept"), found

    @rule(tag=tags)
    def pack(self, tag: str) -> None:
        if entry := self.model.entries.get(tag):
            file = self.directory / f"{len(self.packs)}.tar.zst"
            pack(self.store, tag, file)
            self.packs.append(Bundle(file, entry))

    @precondition(lambda self: self.packs)
    @rule(data=st.data(), tag=tags | st.none(), replacing=st.booleans())
    def unpack(self, data: st.DataObject, tag: str | None, replacing: bool) -> None:
        bundle = data.draw(st.sampled_from(self.packs))
        to = tag or bundle.entry.tag
        renamed = to != bundle.entry.tag
        elsewhere = not renamed and any(
            entry.id == bundle.entry.id for entry in self.model.entries.values() if entry.tag != to
        )
        if elsewhere or (to in self.model.entries and not replacing):
            with pytest.raises(AlreadyExists):
                unpack(self.store, bundle.file, tag, force=replacing)
            return
        made = unpack(self.store, bundle.file, tag, force=replacing).snapshot
        assert (made.manifest.id == bundle.entry.id) == (not renamed)
        self.model.entries[to] = replace(bundle.entry, tag=to, id=made.manifest.id)

    @rule(tag=tags)
    def crash_while_making(self, tag: str) -> None:
        """What a killed process leaves: work that nobody holds, half a snapshot, half an image."""
        litter = self.store.staging / tag / "ancestry"
        litter.mkdir(parents=True)
        (litter / "memory.bin").write_bytes(b"half")
        (self.store.staging / f".deleted-{tag}-{uuid.uuid4().hex[:8]}").mkdir()
        (self.store.images / f".{'0' * 64}.ram.tmp").write_bytes(b"half")
        (self.store.images / f"{'0' * 64}.ram").write_bytes(b"no stamp")
        self.reopen()
        assert list(self.store.staging.iterdir()) == []
        assert not (self.store.images / f"{'0' * 64}.ram").exists()

    @rule()
    def reopen(self) -> None:
        self.store = Store.open(self.store.home)
        self.images = ImageStore(self.store.images)
        self.images.sweep()

    @invariant()
    def has_what_the_model_has(self) -> None:
        assert {path.name for path in self.store.snapshots.iterdir()} == set(self.model.entries)
        for tag in self.model.entries:
            found = set(self.store.dependents(tag))
            assert found == {entry.tag for entry in self.model.dependents(tag)}


def whole(memory: dict[int, int]) -> NDArray[np.uint8]:
    return ram_of([memory]).reshape(-1)


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(
    max_examples=max(20, settings().max_examples // 10), stateful_step_count=30
)
