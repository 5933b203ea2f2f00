"""What is added, removed and changed between two file systems."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from ext4_helpers import debugfs, make_file_system

from ratoon.store.disk.ext4 import Ext4
from ratoon.store.disk.tree import ChangedFile, FileChanges, compare_trees

LATER = (0, 2_000_000_000_000_000_000)


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal directories, to be made different."""
    left, right = tmp_path / "left", tmp_path / "right"
    (left / "etc").mkdir(parents=True)
    for name in ("same", "longer", "other", "touched", "mode", "owner", "gone", "kind"):
        (left / "etc" / name).write_text(f"the content of {name}")
    (left / "link").symlink_to("etc/same")
    shutil.copytree(left, right, symlinks=True)
    for root in (left, right):
        for path in (root, *root.rglob("*")):
            os.utime(path, ns=(0, 10**18), follow_symlinks=False)
    return left, right


def changes(tmp_path: Path, roots: tuple[Path, Path], *requests: str) -> FileChanges:
    """What is found; `requests` are for debugfs, on the right disk."""
    disks = [make_file_system(tmp_path / f"{root.name}.disk", root) for root in roots]
    if requests:
        debugfs(disks[1], *requests)
    with Ext4(disks[0], "left") as left, Ext4(disks[1], "right") as right:
        return compare_trees(left, right)


def test_equal_trees(tmp_path: Path, roots: tuple[Path, Path]) -> None:
    assert changes(tmp_path, roots) == FileChanges((), (), ())


def test_each_kind_of_change(tmp_path: Path, roots: tuple[Path, Path]) -> None:
    right = roots[1]
    (right / "etc" / "longer").write_text("the content of longer, and more")
    (right / "etc" / "other").write_text("the CONTENT of other")
    (right / "etc" / "touched").touch()
    (right / "etc" / "mode").chmod(0o600)
    (right / "etc" / "gone").unlink()
    (right / "etc" / "kind").unlink()
    (right / "etc" / "kind").symlink_to("same")
    (right / "link").unlink()
    (right / "link").symlink_to("etc/other")
    (right / "new" / "below").mkdir(parents=True)
    (right / "new" / "file").touch()
    for name in ("longer", "other", "touched"):
        os.utime(right / "etc" / name, ns=LATER)
    os.utime(right / "link", ns=(0, 10**18), follow_symlinks=False)
    assert changes(tmp_path, roots) == FileChanges(
        added=(b"new", b"new/below", b"new/file"),
        removed=(b"etc/gone",),
        changed=(
            ChangedFile(b"etc/kind", ("type",)),
            ChangedFile(b"etc/longer", ("size", "mtime")),
            ChangedFile(b"etc/mode", ("mode",)),
            ChangedFile(b"etc/other", ("mtime", "content")),
            ChangedFile(b"etc/touched", ("mtime",)),
            ChangedFile(b"link", ("size", "target")),
        ),
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away, or make devices")
def test_owners_and_devices(tmp_path: Path, roots: tuple[Path, Path]) -> None:
    os.chown(roots[1] / "etc" / "owner", 70_000, 5)
    for root, minor in zip(roots, (3, 5), strict=True):
        os.mknod(root / "null", 0o20666, os.makedev(1, minor))
        os.utime(root / "null", ns=(0, 10**18))
    assert changes(tmp_path, roots).changed == (
        ChangedFile(b"etc/owner", ("owner",)),
        ChangedFile(b"null", ("device",)),
    )


def test_a_file_whose_time_was_put_back_is_read(tmp_path: Path, roots: tuple[Path, Path]) -> None:
    (roots[1] / "etc" / "other").write_text("the CONTENT of other")
    os.utime(roots[1] / "etc" / "other", ns=(0, 10**18))
    later = "set_inode_field etc/other ctime @2000000000"  # which no guest can put back
    assert changes(tmp_path, roots, later).changed == (ChangedFile(b"etc/other", ("content",)),)
