"""Whole snapshots without a VM: real memory layers, a real (empty) disk, a made-up device state."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fake_snapshots import DISK_BYTES, MACHINE, digest
from ratoon.disk.qcow2 import OverlayTemplates, disk_root, file_digest
from ratoon.memory.chain import overlay
from ratoon.memory.digests import hash_pages, memory_root, zero_array
from ratoon.memory.page import PAGE_SIZE
from ratoon.memory.pageset import plain_content
from ratoon.memory.writing import write_page_set
from ratoon.snapshot.links import read_links
from ratoon.snapshot.manifest import (
    FileRef,
    GuestInfo,
    LayerRef,
    Manifest,
    MemoryFile,
    ParentRef,
)
from ratoon.snapshot.snapshot import DISK, MEMORY, VMSTATE, Snapshot, packed_vmstate
from ratoon.snapshot.store import Store

#: RAM of the guests here, in pages.
RAM = MACHINE.ram_bytes // PAGE_SIZE

#: Page number -> the byte that fills the page.
Layer = Mapping[int, int]


def grow(store: Store, tag: str, layer: Layer, parent: Snapshot | None = None) -> Snapshot:
    """Publish a snapshot that changes the pages of `layer`, on `parent` or as a base."""
    with store.stage(tag) as staging:
        path = staging.path
        numbers = np.array(sorted(layer), np.uint64)
        pages = np.array([[layer[int(n)]] * PAGE_SIZE for n in numbers], np.uint8)
        pages = pages.reshape(-1, PAGE_SIZE)
        rows = np.arange(len(numbers))
        index = write_page_set(path / MEMORY, RAM, numbers, hash_pages(pages), pages, rows)
        root = memory_root(overlay(digests_of(parent), index))
        state = packed_vmstate(f"device state of {tag}".encode() * 20)
        (path / VMSTATE).write_bytes(state)
        OverlayTemplates(store.templates).create(path / DISK, DISK_BYTES)
        if parent:
            staging.adopt_ancestry(parent)
        own = LayerRef(
            tag=tag,
            id=uuid.uuid4().hex,
            memory_root=root,
            memory=MemoryFile(
                index_digest=index.index_digest,
                entries=len(numbers),
                stored=index.stored,
                size=(path / MEMORY).stat().st_size,
            ),
            disk=FileRef(digest=file_digest(path / DISK), size=(path / DISK).stat().st_size),
        )
        layers = (*(parent.manifest.layers if parent else ()), own)
        manifest = Manifest(
            tag=tag,
            id=own.id,
            created_at_unix=time.time(),
            parent=_reference(parent.manifest) if parent else None,
            memory_root=root,
            disk_root=disk_root([each.disk.digest for each in layers]),
            machine=MACHINE,
            vmstate=FileRef(digest=digest(state), size=len(state)),
            layers=layers,
            guest=GuestInfo(image="debian", agent_version=1),
            stages={},
        )
        return staging.publish(manifest)


def digests_of(snapshot: Snapshot | None) -> NDArray[np.uint8]:
    """The digest array of a snapshot's memory; that of all-zero RAM for none."""
    array = zero_array(RAM)
    for link in read_links(snapshot) if snapshot else ():
        array = overlay(array, link.index)
    return array


def contents(snapshot: Path) -> dict[str, bytes]:
    """Every file of a snapshot directory but the cache of stamps, by its relative name.

    A memory layer is the same in either form.
    """
    return {
        str(path.relative_to(snapshot)): b"".join(
            plain_content(path, label=str(path), piece=1 << 20)
        )
        for path in sorted(snapshot.rglob("*"))
        if path.is_file() and path.name != "verified.json"
    }


def _reference(manifest: Manifest) -> ParentRef:
    return ParentRef(tag=manifest.tag, id=manifest.id, memory_root=manifest.memory_root)
