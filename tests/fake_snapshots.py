"""Snapshots without a VM: small files in the right shape, for the tests of the store."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from blake3 import blake3

from ratoon.disk.qcow2 import OverlayTemplates, disk_root, file_digest
from ratoon.snapshot.manifest import (
    FileRef,
    GuestInfo,
    LayerRef,
    MachineConfig,
    Manifest,
    MemoryFile,
    ParentRef,
)
from ratoon.snapshot.snapshot import Snapshot, packed_vmstate
from ratoon.snapshot.staging import Staging
from ratoon.snapshot.store import Store

DISK_BYTES = 1 << 20

MACHINE = MachineConfig(
    ram_bytes=1 << 20,
    vcpus=1,
    cpu="max,+arat",
    accelerator="tcg",
    qemu_version="7.2.22",
    tsc_khz=2_100_000,
    kernel_digest="0a" * 32,
    initramfs_digest="0b" * 32,
    disk_bytes=DISK_BYTES,
    devices=("virtio-blk-device", "virtio-serial-device"),
)


def digest(raw: bytes) -> str:
    return blake3(raw).hexdigest()


def fill(store: Store, staging: Staging, parent: Snapshot | None = None) -> Manifest:
    """Write all files of a snapshot into `staging`; the manifest that describes them."""
    tag, path = staging.tag, staging.path
    identity = secrets.token_hex(16)
    (path / "memory.bin").write_bytes(f"memory of {identity}".encode() * 100)
    (path / "vmstate").write_bytes(packed_vmstate(f"device state of {identity}".encode() * 20))
    OverlayTemplates(store.templates).create(path / "disk.qcow2", DISK_BYTES)
    with (path / "disk.qcow2").open("ab") as disk:
        disk.write(identity.encode())
    below: tuple[LayerRef, ...] = ()
    if parent:
        staging.adopt_ancestry(parent)
        below = parent.manifest.layers
    own = LayerRef(
        tag=tag,
        id=identity,
        memory_root=digest(identity.encode()),
        memory=MemoryFile(
            index_digest=digest(b"index"), entries=3, stored=2, size=size(path / "memory.bin")
        ),
        disk=FileRef(digest=file_digest(path / "disk.qcow2"), size=size(path / "disk.qcow2")),
    )
    layers = (*below, own)
    return Manifest(
        tag=tag,
        id=identity,
        created_at_unix=1_700_000_000.5,
        parent=ParentRef(tag=below[-1].tag, id=below[-1].id, memory_root=below[-1].memory_root)
        if parent
        else None,
        memory_root=own.memory_root,
        disk_root=disk_root([layer.disk.digest for layer in layers]),
        machine=MACHINE,
        vmstate=FileRef(
            digest=digest((path / "vmstate").read_bytes()), size=size(path / "vmstate")
        ),
        layers=layers,
        guest=GuestInfo(image="debian:12", agent_version=1),
        stages={"pause": 4.25, "publish": 12.0},
    )


def publish(store: Store, tag: str, parent: Snapshot | None = None) -> Snapshot:
    with store.stage(tag) as staging:
        return staging.publish(fill(store, staging, parent))


def size(path: Path) -> int:
    return path.stat().st_size


def flip(path: Path, offset: int) -> None:
    """Change one bit and, as a write does, the modification time."""
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    modified = path.stat().st_mtime_ns
    path.write_bytes(raw)
    _set_mtime(path, modified + 1)


def touch(path: Path) -> None:
    _set_mtime(path, path.stat().st_mtime_ns + 1)


def _set_mtime(path: Path, ns: int) -> None:
    """The kernel's clock for files ticks every 4 ms, so two writes can look like one."""
    os.utime(path, ns=(ns, ns))
