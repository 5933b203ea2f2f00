"""Kernels and disks that are given by name: from where they may lie, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ratoon.engine.sources.host_files import take
from ratoon.errors import InvalidInput


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`allowed` has a kernel and a disk, `secret` lies beside it, `room` is for what is taken."""
    for name in ("allowed", "room"):
        (tmp_path / name).mkdir()
    (tmp_path / "allowed" / "vmlinuz").write_bytes(b"kernel")
    (tmp_path / "allowed" / "disk").write_bytes(b"disk".ljust(4096, b"\0") * 4)
    (tmp_path / "secret").write_bytes(bytes(4096))
    return tmp_path


def attempt(place: Path, kernel: str | Path, rootfs: str | Path) -> None:
    take(place / kernel, place / rootfs, [place / "allowed"], place / "room")


def test_both_are_copied(place: Path) -> None:
    (place / "allowed" / "link").symlink_to("vmlinuz")
    given = take(place / "allowed/link", place / "allowed/disk", [place], place / "room")
    assert given.kernel.read_bytes() == b"kernel"
    assert given.disk.read_bytes().startswith(b"QFI\xfb")
    assert given.disk_bytes == 4 * 4096
    assert {path.name for path in (place / "room").iterdir()} == {"vmlinuz", "disk.qcow2"}


@pytest.mark.parametrize(
    "name",
    [
        *("secret", "allowed/../secret", "allowed/out", "allowed/chain", "/etc/passwd"),
        *("allowed/fifo", "allowed", "allowed/absent", "allowed/dangling", "allowed/loop", "x\0y"),
    ],
)
def test_what_is_elsewhere_or_no_file_is_refused(place: Path, name: str) -> None:
    allowed = place / "allowed"
    (allowed / "out").symlink_to(place / "secret")
    (allowed / "chain").symlink_to("out")
    (allowed / "dangling").symlink_to("nothing")
    (allowed / "loop").symlink_to("loop")
    os.mkfifo(allowed / "fifo")
    with pytest.raises(InvalidInput, match=Path(name).name.replace("\0", ".")):
        attempt(place, name, "allowed/disk")
    with pytest.raises(InvalidInput):
        attempt(place, "allowed/vmlinuz", name)


def test_nothing_is_taken_unless_a_place_was_chosen(place: Path) -> None:
    with pytest.raises(InvalidInput, match="--image-root"):
        take(place / "allowed/vmlinuz", place / "allowed/disk", [], place / "room")


@pytest.mark.parametrize("size", [0, 1, 4095, 4097])
def test_a_disk_has_whole_blocks(place: Path, size: int) -> None:
    (place / "allowed" / "disk").write_bytes(bytes(size))
    with pytest.raises(InvalidInput, match="4096"):
        attempt(place, "allowed/vmlinuz", "allowed/disk")


def test_a_disk_is_raw_whatever_it_says(place: Path) -> None:
    """Its first bytes may be a header that names a file of the host: they are its content."""
    header = (b"QFI\xfb" + (3).to_bytes(4) + bytes(504)).ljust(4096, b"\0")
    (place / "allowed" / "disk").write_bytes(header)
    given = take(place / "allowed/vmlinuz", place / "allowed/disk", [place], place / "room")
    assert given.disk_bytes == 4096
