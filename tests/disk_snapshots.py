"""Snapshots without a VM whose memory and disks have real content."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from fake_snapshots import DISK_BYTES, size
from ratoon.disk.qcow2 import OverlayTemplates, disk_root, file_digest
from ratoon.snapshot.manifest import FileRef, Manifest
from ratoon.snapshot.snapshot import Snapshot
from ratoon.snapshot.store import Store
from sound_snapshots import write_sound

KIB = 1024


def empty_overlay(path: Path, disk_bytes: int = DISK_BYTES) -> None:
    """Make `path` an empty layer; its template is made beside it."""
    templates = path.parent / ".templates"
    templates.mkdir(exist_ok=True)
    OverlayTemplates(templates).create(path, disk_bytes)


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


def publish_with_disk(
    store: Store,
    tag: str,
    pages: Mapping[int, int],
    write_disk: Callable[[Path], object],
    parent: Snapshot | None = None,
    *,
    disk_bytes: int = DISK_BYTES,
) -> Snapshot:
    """As `publish_sound`, with the layer that `write_disk` makes at the path it is given."""
    with store.stage(tag) as staging:
        fields = dict(write_sound(store, staging, pages, parent))
        disk = staging.path / "disk.qcow2"
        disk.unlink()
        write_disk(disk)
        file = FileRef(digest=file_digest(disk), size=size(disk))
        *below, own = fields["layers"]
        fields["layers"] = (*below, own.model_copy(update={"disk": file}))
        fields["disk_root"] = disk_root([layer.disk.digest for layer in fields["layers"]])
        fields["machine"] = fields["machine"].model_copy(update={"disk_bytes": disk_bytes})
        for leftover in (staging.path / ".templates").glob("*"):
            leftover.unlink()
        if (staging.path / ".templates").exists():
            (staging.path / ".templates").rmdir()
        return staging.publish(Manifest(**fields))
