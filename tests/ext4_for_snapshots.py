"""Root file systems for snapshots without a VM."""

from __future__ import annotations

import subprocess
from pathlib import Path

from small_snapshots import empty_overlay, qemu_io

CLUSTER = 64 * 1024


def file_system(path: Path, root: Path, size: int) -> Path:
    """An ext4 file system of `size` bytes with the content of `root`, the same for the same."""
    with path.open("xb") as file:
        file.truncate(size)
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    subprocess.run(
        [
            "mke2fs",
            "-q",
            "-F",
            "-t",
            "ext4",
            "-U",
            uuid,
            "-E",
            f"hash_seed={uuid}",
            "-d",
            root,
            path,
        ],
        capture_output=True,
        check=True,
    )
    return path


def as_layer(raw: Path, path: Path, *, below: Path | None = None) -> None:
    """Make `path` a layer that has `raw`, as far as it differs from the raw disk `below`."""
    content = raw.read_bytes()
    under = below.read_bytes() if below else bytes(len(content))
    empty_overlay(path, len(content))
    commands, parts = [], []
    for at in range(0, len(content), CLUSTER):
        if content[at : at + CLUSTER] != under[at : at + CLUSTER]:
            parts.append(path.with_name(f"part-{at}"))
            parts[-1].write_bytes(content[at : at + CLUSTER])
            commands.append(f"write -s {parts[-1]} {at} {CLUSTER}")
    qemu_io(path, *commands)
    for part in parts:
        part.unlink()
