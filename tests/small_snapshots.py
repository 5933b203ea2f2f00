"""Small snapshots without a VM, in which everything fits: page sets, disks, roots, digests.

All are made by `write_snapshot`; the device state alone means nothing to anybody.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ratoon.files import Stamp
from ratoon.store.disk.qcow2 import OverlayTemplates, disk_root, file_digest
from ratoon.store.memory.chain import overlay, resolve
from ratoon.store.memory.digests import hash_pages, memory_root, zero_array
from ratoon.store.memory.image import ImageStore
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import plain_content
from ratoon.store.memory.writing import write_page_set
from ratoon.store.snapshot.links import read_links
from ratoon.store.snapshot.manifest import (
    FileRef,
    GuestInfo,
    LayerRef,
    MachineConfig,
    Manifest,
    MemoryFile,
)
from ratoon.store.snapshot.snapshot import DISK, MEMORY, VMSTATE, Snapshot, packed_vmstate
from ratoon.store.snapshot.staging import Staging
from ratoon.store.snapshot.store import Store

KIB = 1024
DISK_BYTES = 1 << 20
#: RAM of the machines here, in pages.
RAM = (1 << 20) // PAGE_SIZE
MACHINE = MachineConfig(
    ram_bytes=RAM * PAGE_SIZE,
    vcpus=1,
    cpu="max,+arat",
    accelerator="tcg",
    qemu_version="10.0.2",
    tsc_khz=2_100_000,
    kernel_digest="0a" * 32,
    initramfs_digest="0b" * 32,
    disk_bytes=DISK_BYTES,
    devices=("virtio-blk-device", "virtio-serial-device"),
)

#: Page number -> the seed of what is in the page, see `page`.
Layer = Mapping[int, int]


def page(seed: int) -> NDArray[np.uint8]:
    """A page of bytes that only this seed gives; the zero page for 0."""
    if not seed:
        return np.zeros(PAGE_SIZE, np.uint8)
    return np.random.default_rng(seed).integers(0, 256, PAGE_SIZE, np.uint8)


def ram_of(chain: Sequence[Layer]) -> NDArray[np.uint8]:
    """The whole RAM of a chain's head, shape (RAM, 4096)."""
    ram = np.zeros((RAM, PAGE_SIZE), np.uint8)
    for layer in chain:
        for number, seed in layer.items():
            ram[number] = page(seed)
    return ram


def write_snapshot(
    store: Store,
    staging: Staging,
    layer: Layer | None = None,
    parent: Snapshot | None = None,
    *,
    anonymous: bool = False,
    created_at_unix: float = 1_700_000_000.5,
    write_disk: Callable[[Path], object] | None = None,
    disk_bytes: int = DISK_BYTES,
) -> Manifest:
    """Write all files of a snapshot into `staging`; the manifest that describes them.

    `layer` are the pages that it changes, three if None: two that nobody else has, and a zero page.
    `write_disk` makes the disk layer at the path it is given; else it is one that nobody else has.
    """
    path, identity = staging.path, secrets.token_hex(16)
    if layer is None:
        layer = {0: secrets.randbits(32) + 1, 1: secrets.randbits(32) + 1, 2: 0}
    (path / VMSTATE).write_bytes(packed_vmstate(secrets.token_bytes(900)))
    if write_disk:
        write_disk(path / DISK)
    else:
        OverlayTemplates(store.templates).create(path / DISK, disk_bytes)
        with (path / DISK).open("ab") as disk:
            disk.write(identity.encode() * 100)
    below: tuple[LayerRef, ...] = ()
    array = zero_array(RAM)
    if parent:
        staging.adopt_ancestry(parent)
        below = parent.manifest.layers
        array = resolve(read_links(parent), RAM)
    memory, root = _write_memory(path / MEMORY, layer, array)
    disk_file = FileRef(digest=file_digest(path / DISK), size=size(path / DISK))
    own = LayerRef(
        tag=staging.tag,
        id=identity,
        memory_root=root,
        memory=memory,
        disk=disk_file,
        anonymous=anonymous,
    )
    layers = (*below, own)
    return Manifest(
        tag=staging.tag,
        id=identity,
        created_at_unix=created_at_unix,
        parent=parent.manifest.reference if parent else None,
        memory_root=root,
        disk_root=disk_root([each.disk.digest for each in layers]),
        machine=MACHINE.model_copy(update={"disk_bytes": disk_bytes}),
        vmstate=FileRef(digest=digest((path / VMSTATE).read_bytes()), size=size(path / VMSTATE)),
        layers=layers,
        guest=GuestInfo(image="debian:12", agent_version=1),
        stages={"pause": 4.25, "publish": 12.0},
    )


def _write_memory(path: Path, layer: Layer, below: NDArray[np.uint8]) -> tuple[MemoryFile, str]:
    """The page set of `layer`, and the root of the memory that it makes of what is below."""
    numbers = np.array(sorted(layer), np.uint64)
    pages = np.array([page(layer[n]) for n in sorted(layer)], np.uint8).reshape(-1, PAGE_SIZE)
    index = write_page_set(path, RAM, numbers, hash_pages(pages), pages, np.arange(len(numbers)))
    memory = MemoryFile(
        index_digest=index.index_digest,
        entries=len(numbers),
        stored=index.stored,
        size=size(path),
    )
    return memory, memory_root(overlay(below, index))


def publish(
    store: Store,
    tag: str,
    layer: Layer | None = None,
    parent: Snapshot | None = None,
    *,
    created_at_unix: float = 1_700_000_000.5,
    write_disk: Callable[[Path], object] | None = None,
    disk_bytes: int = DISK_BYTES,
) -> Snapshot:
    """A snapshot of the store, as `write_snapshot` makes it."""
    with store.stage(tag) as staging:
        manifest = write_snapshot(
            store,
            staging,
            layer,
            parent,
            created_at_unix=created_at_unix,
            write_disk=write_disk,
            disk_bytes=disk_bytes,
        )
        return staging.publish(manifest)


def make_chain(home: Path, chain: Sequence[Layer]) -> list[Snapshot]:
    """The snapshots `s0` (the base), `s1`, … of a new store: each on the one before."""
    store, snapshots = Store.open(home), list[Snapshot]()
    for depth, layer in enumerate(chain):
        snapshots.append(publish(store, f"s{depth}", layer, snapshots[-1] if depth else None))
    return snapshots


def with_root(snapshot: Snapshot, layer: int, root: str) -> Snapshot:
    """The same files, of which the manifest says that the chain up to `layer` gives `root`."""
    manifest = snapshot.manifest
    layers = list(manifest.layers)
    layers[layer] = layers[layer].model_copy(update={"memory_root": root})
    return replace(snapshot, manifest=manifest.model_copy(update={"layers": tuple(layers)}))


def make_image(store: Store, snapshot: Snapshot) -> Path:
    """The image of a snapshot's memory."""
    return ImageStore(store.images).make(read_links(snapshot), RAM)


def stamp_image(image: Path) -> None:
    """Have the stamp say that the image is as it was made, as after a bit that rots on the disk."""
    stamp = asdict(Stamp.of(image, with_ctime=True))
    image.with_suffix(".json").write_text(json.dumps({"root": image.stem, **stamp}, sort_keys=True))


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


# Files ----------------------------------------------------------------------------------------


def digest(raw: bytes) -> str:
    return blake3(raw).hexdigest()


def size(path: Path) -> int:
    return path.stat().st_size


def flip(path: Path, offset: int) -> None:
    """Change one bit and, as a write does, the modification time."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    modified = path.stat().st_mtime_ns
    path.write_bytes(raw)
    _set_mtime(path, modified + 1)


def poke(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit where it lies, under all names of the file; the times stay as they were."""
    times = path.stat()
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        old = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([old ^ (1 << bit)]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def touch(path: Path) -> None:
    _set_mtime(path, path.stat().st_mtime_ns + 1)


def _set_mtime(path: Path, ns: int) -> None:
    """The kernel's clock for files ticks every 4 ms, so two writes can look like one."""
    os.utime(path, ns=(ns, ns))


# Disk layers ------------------------------------------------------------------------------------


def empty_overlay(path: Path, disk_bytes: int = DISK_BYTES) -> None:
    """Make `path` an empty layer; nothing stays of its template."""
    with tempfile.TemporaryDirectory(dir=path.parent) as templates:
        OverlayTemplates(Path(templates)).create(path, disk_bytes)


def qemu_io(disk: Path, *commands: str) -> None:
    """Run commands of qemu-io, such as `write -P 0x41 64k 4k`, on one layer."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *words, disk], capture_output=True, text=True, check=True
    )
    assert "failed" not in done.stdout + done.stderr, done


def make_layer(path: Path, *commands: str, disk_bytes: int = DISK_BYTES) -> Path:
    empty_overlay(path, disk_bytes)
    qemu_io(path, *commands)
    return path
