"""What tells whether a volume holds what it held."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ratoon.engine.startup.content import describe_content


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "below").mkdir(parents=True)
    (root / "a").write_text("one")
    (root / "below" / "b").write_text("two")
    os.mkfifo(root / "pipe")
    (root / "link").symlink_to("a")
    (root / os.fsdecode(b"\xff\n")).touch()
    return root


def lead_elsewhere(link: Path) -> None:
    link.unlink()
    link.symlink_to("b")


def rewrite_as_before(path: Path) -> None:
    """Other content of the same size, with the time set back."""
    status = path.stat()
    path.write_text("eno")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: list[Callable[[Path], object]] = [
    lambda root: rewrite_as_before(root / "a"),
    lambda root: (root / "below" / "b").write_text("three"),
    lambda root: (root / "below" / "new").touch(),
    lambda root: (root / "below" / "empty").mkdir(),
    lambda root: (root / "a").unlink(),
    lambda root: (root / "a").rename(root / "c"),
    lambda root: (root / "below").chmod(0o700),
    lambda root: os.chown(root / "below", 5, 5),
    lambda root: lead_elsewhere(root / "link"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_told(tree: Path, change: Callable[[Path], object]) -> None:
    before = describe_content(tree)
    assert before.startswith("6 names, ")
    change(tree)
    assert describe_content(tree) != before


def test_what_is_only_read_or_moved_as_a_whole_has_not_changed(tree: Path) -> None:
    before = describe_content(tree)
    (tree / "a").read_text()
    (tree / "below" / "gone").touch()
    (tree / "below" / "gone").unlink()
    moved = tree.rename(tree.with_name("moved"))
    assert describe_content(moved) == before


def test_another_file_system_within_it_is_left_out(tree: Path) -> None:
    before = describe_content(tree)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tree / "below")], check=True)
    try:
        (tree / "below" / "new").touch()
        assert describe_content(tree).startswith("4 names, ")
    finally:
        subprocess.run(["umount", str(tree / "below")], check=True)
    assert describe_content(tree) == before


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        describe_content(tmp_path / "absent")
