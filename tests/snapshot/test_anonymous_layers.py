"""Layers that were never published, anywhere in a chain: they have content, and no children.

They come from sandboxes that were in standby, or were forked while they ran.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ratoon.errors import ChainMismatch, Corrupt, RatoonError
from ratoon.store.check.check import check_store
from ratoon.store.check.findings import Kind
from ratoon.store.check.scrub import Slice
from ratoon.store.disk.qcow2 import disk_root
from ratoon.store.memory.image import ImageStore
from ratoon.store.pack.pack import pack
from ratoon.store.pack.unpack import unpack
from ratoon.store.snapshot.compact import anonymous_layers, compact, publish_condensed
from ratoon.store.snapshot.diff import diff
from ratoon.store.snapshot.lineage import lineage
from ratoon.store.snapshot.links import read_links
from ratoon.store.snapshot.manifest import (
    FileRef,
    GuestInfo,
    LayerRef,
    Manifest,
    MemoryFile,
    ParentRef,
    decode,
    encode,
)
from ratoon.store.snapshot.snapshot import Snapshot, load_snapshot
from ratoon.store.snapshot.staging import Staging
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.usage import usage
from ratoon.store.snapshot.verify import verify_disks
from small_snapshots import MACHINE, RAM, Layer, contents, digest, page, write_snapshot

# Manifests ------------------------------------------------------------------------------------


def hexes(length: int) -> st.SearchStrategy[str]:
    return st.binary(min_size=length, max_size=length).map(bytes.hex)


layers_of_a_chain = st.lists(
    st.builds(
        LayerRef,
        tag=st.sampled_from(("base", "L1", "sb-6b015cc5-b01e")),
        id=hexes(16),
        memory_root=hexes(32),
        memory=st.builds(
            MemoryFile,
            index_digest=hexes(32),
            entries=st.integers(0, 9),
            stored=st.integers(0, 9),
            size=st.integers(0, 9),
        ),
        disk=st.builds(FileRef, digest=hexes(32), size=st.integers(0, 9)),
        anonymous=st.booleans(),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda layer: layer.id,
)


def reference(layer: LayerRef) -> ParentRef:
    return ParentRef(tag=layer.tag, id=layer.id, memory_root=layer.memory_root)


def make(layers: list[LayerRef], parent: ParentRef | None) -> Manifest:
    own = layers[-1]
    return Manifest(
        tag=own.tag,
        id=own.id,
        created_at_unix=1.5,
        parent=parent,
        memory_root=own.memory_root,
        disk_root=disk_root([layer.disk.digest for layer in layers]),
        machine=MACHINE,
        vmstate=FileRef(digest="0" * 64, size=1),
        layers=tuple(layers),
        guest=GuestInfo(image="debian", agent_version=1),
        stages={},
    )


@given(layers=layers_of_a_chain)
def test_the_parent_is_the_nearest_below_that_was_published(layers: list[LayerRef]) -> None:
    published = [layer for layer in layers[:-1] if not layer.anonymous]
    if not published and (len(layers) > 1 or layers[-1].anonymous):
        for parent in (None, *map(reference, layers)):
            with pytest.raises(ValidationError):
                make(layers, parent)
        return
    manifest = make(layers, reference(published[-1]) if published else None)
    assert manifest.ancestors == tuple(published)
    above = layers[-1] if not layers[-1].anonymous else published[-1]
    assert manifest.reference == reference(above)
    raw = encode(manifest)
    assert decode(raw, digest(raw), label="") == manifest


@given(layers=layers_of_a_chain, data=st.data())
def test_no_other_layer_can_be_the_parent(layers: list[LayerRef], data: st.DataObject) -> None:
    published = [layer for layer in layers[:-1] if not layer.anonymous]
    others: list[ParentRef | None] = [
        reference(layer) for layer in layers if layer not in published[-1:]
    ]
    parent = data.draw(st.sampled_from([*others, *([None] if len(layers) > 1 else [])]))
    with pytest.raises((ValidationError, ChainMismatch)):
        make(layers, parent)


@given(layers=layers_of_a_chain, data=st.data())
def test_a_flag_that_was_changed_is_found_or_makes_no_difference(
    layers: list[LayerRef], data: st.DataObject
) -> None:
    """Between the parent and the base it says no more than which layers have names."""
    published = [layer for layer in layers[:-1] if not layer.anonymous]
    parent = reference(published[-1]) if published else None
    try:
        manifest = make(layers, parent)
    except ValidationError:
        return
    document = json.loads(encode(manifest))
    number = data.draw(st.integers(0, len(layers) - 1))
    document["layers"][number]["anonymous"] ^= True
    raw = json.dumps(document).encode()
    try:
        changed = decode(raw, digest(raw), label="")
    except RatoonError:
        return
    assert changed.parent == manifest.parent
    assert changed.memory_root == manifest.memory_root
    assert {*changed.ancestors} ^ {*manifest.ancestors} <= {changed.layers[number], layers[number]}


def test_a_manifest_without_the_flag_has_no_anonymous_layers() -> None:
    """As those were written that are older than it."""
    layer = LayerRef(
        tag="base",
        id="0" * 32,
        memory_root="0" * 64,
        memory=MemoryFile(index_digest="0" * 64, entries=0, stored=0, size=0),
        disk=FileRef(digest="0" * 64, size=0),
    )
    document = json.loads(encode(make([layer], None)))
    del document["layers"][0]["anonymous"]
    raw = json.dumps(document).encode()
    assert decode(raw, digest(raw), label="").layers == (layer,)
    document["layers"][0]["anonymous"] = True
    raw = json.dumps(document).encode()
    with pytest.raises(Corrupt, match="anonymous"):
        decode(raw, digest(raw), label="")


# Chains ---------------------------------------------------------------------------------------


class Sandbox:
    """What becomes of a sandbox's directory, without a machine: it stands on this or that."""

    def __init__(self, store: Store, parent: Snapshot, room: Path) -> None:
        self.store, self.parent, self.room = store, parent, room
        room.mkdir()

    def stand_by(self, pages: Layer) -> None:
        """Change pages, and publish them to nobody else."""
        path = self.room / secrets.token_hex(4)
        unfinished = path.with_suffix(".new")
        unfinished.mkdir()
        staging = Staging(unfinished, "sb-6b015cc5-b01e", path)
        manifest = write_snapshot(self.store, staging, pages, self.parent, anonymous=True)
        self.parent = staging.publish(manifest)

    def branch(self, tag: str, pages: Layer) -> Snapshot:
        with self.store.stage(tag) as staging:
            self.parent = staging.publish(write_snapshot(self.store, staging, pages, self.parent))
        return self.parent


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
def chain(store: Store, tmp_path: Path) -> Snapshot:
    """base, first, twice anonymous, head: of these only base, first and head have names."""
    with store.stage("base") as staging:
        base = staging.publish(write_snapshot(store, staging, {0: 1, 1: 1, 2: 1, 9: 1}))
    sandbox = Sandbox(store, base, tmp_path / "room")
    sandbox.branch("first", {1: 2, 2: 2})
    sandbox.stand_by({2: 3, 3: 3})
    sandbox.stand_by({3: 4, 4: 4, 9: 0})
    return sandbox.branch("head", {4: 5, 5: 5})


#: What is in the memory of `head`: page number -> seed.
CONTENT = {0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 5}


def ram_of(content: Mapping[int, int]) -> bytes:
    ram = np.zeros((RAM, 4096), np.uint8)
    for number, seed in content.items():
        ram[number] = page(seed)
    return ram.tobytes()


def assert_has_all(store: Store, tag: str, directory: Path) -> None:
    image = ImageStore(directory).make(read_links(store.get(tag)), RAM)
    assert image.read_bytes() == ram_of(CONTENT)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_condensed(store: Store, chain: Snapshot, tmp_path: Path, layers: int) -> None:
    """The anonymous layers on top become one, of the same content; what lies below stays."""
    sandbox = Sandbox(store, chain, tmp_path / "another")
    content = dict(CONTENT)
    for number in range(layers):
        pages = {0: 0, 1: number + 7, 5: 5, 6 + number % 2: number + 8}
        sandbox.stand_by(pages)
        content |= pages
    before, below = contents(sandbox.parent.path), contents(chain.path)
    assert anonymous_layers(sandbox.parent.manifest) == layers
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    staging = Staging(unfinished, "sb-6b015cc5-b01e", tmp_path / "condensed")
    condensed = publish_condensed(sandbox.parent, staging).manifest
    old = sandbox.parent.manifest
    assert condensed.layers[:-1] == chain.manifest.layers
    assert anonymous_layers(condensed) == 1
    assert (condensed.parent, condensed.reference) == (old.parent, chain.manifest.reference)
    assert (condensed.memory_root, condensed.vmstate) == (old.memory_root, old.vmstate)
    # What equals the layers below is not stored again.
    differing = {number for number, seed in content.items() if CONTENT.get(number, 0) != seed}
    assert condensed.layers[-1].memory.entries == len(differing)
    assert contents(sandbox.parent.path) == before
    assert contents(chain.path) == below

    found = load_snapshot(tmp_path / "condensed")
    verify_disks(found)
    image = ImageStore(tmp_path / "images").make(read_links(found), RAM)
    assert image.read_bytes() == ram_of(content)
    sandbox.parent = found
    sandbox.stand_by({0: 9})
    assert sandbox.branch("after", {0: 10}).depth == chain.depth + 3
    assert check_store(store, read_data=Slice(1, 1)).findings == ()


def test_relations_leave_them_out(store: Store, chain: Snapshot) -> None:
    info = store.info("head")
    assert (info.parent_tag, info.ancestors, info.chain_depth) == ("first", ["base", "first"], 4)
    assert store.info("first").dependents == ["head"]
    nodes = [(node.tag, node.level, node.parent, node.depth) for node in lineage(store)]
    assert nodes == [("base", 0, None, 0), ("first", 1, "base", 1), ("head", 2, "first", 4)]
    assert set(usage(store).snapshots) == {"base", "first", "head"}
    # Their files have no other name: they go with `head` alone.
    anonymous = sum(chain.memory_path(layer).stat().st_blocks * 512 for layer in (2, 3))
    assert usage(store).snapshots["head"].own >= anonymous > 0


def test_the_whole_content_is_theirs_too(store: Store, chain: Snapshot, tmp_path: Path) -> None:
    assert_has_all(store, "head", tmp_path / "images")
    found = diff(store, "first", "head")
    assert found.changed_pages == len({2, 3, 4, 5, 9})
    assert check_store(store, read_data=Slice(1, 1)).findings == ()


def test_compact(store: Store, chain: Snapshot, tmp_path: Path) -> None:
    flat = compact(store, "head", "flat").manifest
    assert (flat.parent, flat.ancestors, len(flat.layers)) == (None, (), 1)
    assert not flat.layers[0].anonymous
    assert flat.memory_root == chain.manifest.memory_root
    assert_has_all(store, "flat", tmp_path / "images")


@pytest.mark.parametrize("tag", [None, "renamed"])
def test_pack(store: Store, chain: Snapshot, tmp_path: Path, tag: str | None) -> None:
    pack(store, "head", tmp_path / "pack")
    other = Store.open(tmp_path / "other")
    unpacked = unpack(other, tmp_path / "pack", tag).snapshot.manifest
    assert unpacked.ancestors == chain.manifest.ancestors
    assert [layer.anonymous for layer in unpacked.layers] == [False, False, True, True, False]
    assert_has_all(other, tag or "head", tmp_path / "images")
    report = check_store(other, read_data=Slice(1, 1))
    assert {finding.kind for finding in report.findings} == {Kind.PARENT_GONE}
    # And home again, where only the renamed one is new, and all of its content is there already.
    pack(other, tag or "head", tmp_path / "back")
    back = unpack(store, tmp_path / "back", force=True)
    own = chain.manifest.layers[-1]
    assert back.stored in (0, own.memory.size + own.disk.size)
    assert check_store(store, read_data=Slice(1, 1)).findings == ()


def test_deleting(store: Store, chain: Snapshot, tmp_path: Path) -> None:
    store.delete("first", force=True)
    assert_has_all(store, "head", tmp_path / "images")
    assert [(node.tag, node.note) for node in lineage(store)] == [
        ("base", None),
        ("head", "its parent first is gone"),
    ]
    assert store.delete("head") == ("head",)
    assert store.delete("base") == ("base",)


def test_a_cascade_takes_what_is_above_them(store: Store, chain: Snapshot) -> None:
    assert store.delete("first", cascade=True) == ("head", "first")
