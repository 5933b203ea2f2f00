"""Snapshots without a VM in which everything fits: page sets, roots, digests, headers."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fake_snapshots import DISK_BYTES, MACHINE, digest, size
from ratoon.disk.qcow2 import OverlayTemplates, disk_root, file_digest
from ratoon.files import Stamp
from ratoon.memory.chain import overlay, resolve
from ratoon.memory.digests import hash_pages, memory_root, zero_array
from ratoon.memory.image import ImageStore
from ratoon.memory.page import PAGE_SIZE
from ratoon.memory.writing import write_page_set
from ratoon.snapshot.links import read_links
from ratoon.snapshot.manifest import FileRef, GuestInfo, LayerRef, Manifest, MemoryFile
from ratoon.snapshot.snapshot import Snapshot, packed_vmstate
from ratoon.snapshot.staging import Staging
from ratoon.snapshot.store import Store

#: RAM of the machines here, in pages.
RAM = MACHINE.ram_bytes // PAGE_SIZE


def page(seed: int) -> NDArray[np.uint8]:
    """A page of bytes that only this seed gives; the zero page for 0."""
    if not seed:
        return np.zeros(PAGE_SIZE, np.uint8)
    return np.random.default_rng(seed).integers(0, 256, PAGE_SIZE, np.uint8)


def write_sound(
    store: Store,
    staging: Staging,
    pages: Mapping[int, int],
    parent: Snapshot | None = None,
    *,
    anonymous: bool = False,
) -> Manifest:
    """Write a snapshot whose memory layer has `pages`: page number -> seed of its content."""
    path = staging.path
    identity = secrets.token_hex(16)
    numbers = np.array(sorted(pages), np.uint64)
    content = np.array([page(pages[n]) for n in sorted(pages)], np.uint8).reshape(-1, PAGE_SIZE)
    digests = hash_pages(content)
    index = write_page_set(
        path / "memory.bin", RAM, numbers, digests, content, np.arange(len(numbers))
    )
    (path / "vmstate").write_bytes(packed_vmstate(secrets.token_bytes(900)))
    OverlayTemplates(store.templates).create(path / "disk.qcow2", DISK_BYTES)
    with (path / "disk.qcow2").open("ab") as disk:
        disk.write(identity.encode() * 100)
    below: tuple[LayerRef, ...] = ()
    array = zero_array(RAM)
    if parent:
        staging.adopt_ancestry(parent)
        below = parent.manifest.layers
        array = resolve(read_links(parent), RAM)
    memory_file = MemoryFile(
        index_digest=index.index_digest,
        entries=len(numbers),
        stored=index.stored,
        size=size(path / "memory.bin"),
    )
    own = LayerRef(
        tag=staging.tag,
        id=identity,
        memory_root=memory_root(overlay(array, index)),
        memory=memory_file,
        disk=FileRef(digest=file_digest(path / "disk.qcow2"), size=size(path / "disk.qcow2")),
        anonymous=anonymous,
    )
    layers = (*below, own)
    return Manifest(
        tag=staging.tag,
        id=identity,
        created_at_unix=1_700_000_000.5,
        parent=parent.manifest.reference if parent else None,
        memory_root=own.memory_root,
        disk_root=disk_root([layer.disk.digest for layer in layers]),
        machine=MACHINE,
        vmstate=FileRef(
            digest=digest((path / "vmstate").read_bytes()), size=size(path / "vmstate")
        ),
        layers=layers,
        guest=GuestInfo(image="debian:12", agent_version=1),
        stages={"pause": 4.25},
    )


def publish_sound(
    store: Store, tag: str, pages: Mapping[int, int], parent: Snapshot | None = None
) -> Snapshot:
    with store.stage(tag) as staging:
        return staging.publish(write_sound(store, staging, pages, parent))


def make_image(store: Store, snapshot: Snapshot) -> Path:
    """The image of a snapshot's memory."""
    return ImageStore(store.images).make(read_links(snapshot), RAM)


def stamp_image(image: Path) -> None:
    """Have the stamp say that the image is as it was made, as after a bit that rots on the disk."""
    stamp = asdict(Stamp.of(image, with_ctime=True))
    image.with_suffix(".json").write_text(json.dumps({"root": image.stem, **stamp}, sort_keys=True))


def poke(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit where it lies, under all names of the file; the times stay as they were."""
    times = path.stat()
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ (1 << bit)]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
