"""The files in a disk's root file system, and what differs between two such trees."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ratoon.errors import ProgramFailed, UnreadableDisk
from ratoon.store.disk.ext4 import ROOT, Ext4, Inode
from ratoon.store.disk.tools import tool

#: Every file of a tree by its path from the root, as bytes, without a slash in front.
Tree = dict[bytes, Inode]


@dataclass(frozen=True)
class ChangedFile:
    """A path that both trees have; `what` differs: type, mode, owner, size, mtime, target, device
    or content.
    """

    path: bytes
    what: tuple[str, ...]


@dataclass(frozen=True)
class FileChanges:
    """Paths from the root of the file system, sorted. A file that was renamed is in two of them."""

    added: tuple[bytes, ...]
    removed: tuple[bytes, ...]
    changed: tuple[ChangedFile, ...]


def replay_journal(disk: Path, label: str) -> None:
    """Bring the ext4 file system in the raw file `disk` up to date, as mounting it would.

    A damaged journal is dropped, as `e2fsck` does.

    UnreadableDisk: it holds none, or one that e2fsck gives up on. HostError: there is no e2fsck.
    """
    with Ext4(disk, label) as system:
        if not system.needs_recovery:
            return
    try:
        with tool("e2fsck", disk.stat().st_size) as e2fsck:
            words = "-p", "-E", "journal_only", e2fsck.writes(disk)
            e2fsck.run(*words, good=(0, 1))  # 1: something was replayed
    except ProgramFailed as error:
        raise UnreadableDisk(f"{label}: e2fsck cannot replay its journal:\n{error.said}") from None


def read_tree(system: Ext4) -> Tree:
    """All files but the root itself. UnreadableDisk: the directories make no tree, for example."""
    tree: Tree = {}
    pending = [(b"", system.inode(ROOT))]
    directories = {ROOT}
    unread = system.blocks
    while pending:
        path, directory = pending.pop()
        if not stat.S_ISDIR(directory.mode):
            raise system.corrupt(f"inode {directory.number} is no directory")
        unread -= -(-directory.size // system.block_size)
        if unread < 0:
            raise system.corrupt("more directories than it has room for")
        for name, number in system.entries(directory):
            inode = system.inode(number)
            below = path + b"/" + name if path else name
            tree[below] = inode
            if stat.S_ISDIR(inode.mode):
                if number in directories:
                    raise system.corrupt(f"directory {number} has two parents")
                directories.add(number)
                pending.append((below, inode))
    return tree


def compare_trees(left: Ext4, right: Ext4) -> FileChanges:
    """What was added, removed and changed from `left` to `right`.

    Content is read where the size is equal, but not the time of the last change (mtime or ctime).
    Size and mtime of a directory are not compared: they follow from what is in it.
    """
    before, after = read_tree(left), read_tree(right)
    changed = []
    for path in sorted(before.keys() & after.keys()):
        if what := tuple(_differences(left, before[path], right, after[path])):
            changed.append(ChangedFile(path, what))
    return FileChanges(
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        changed=tuple(changed),
    )


def _differences(left: Ext4, old: Inode, right: Ext4, new: Inode) -> Iterator[str]:
    if stat.S_IFMT(old.mode) != stat.S_IFMT(new.mode):
        yield "type"
        return
    if old.mode != new.mode:
        yield "mode"
    if (old.uid, old.gid) != (new.uid, new.gid):
        yield "owner"
    if stat.S_ISDIR(old.mode):
        return
    if old.size != new.size:
        yield "size"
    if old.mtime_ns != new.mtime_ns:
        yield "mtime"
    if stat.S_ISLNK(old.mode) and left.link_target(old) != right.link_target(new):
        yield "target"
    if old.device != new.device:
        yield "device"
    if (
        stat.S_ISREG(old.mode)
        and old.size == new.size
        and (old.mtime_ns, old.ctime_ns) != (new.mtime_ns, new.ctime_ns)
        and left.content_digest(old) != right.content_digest(new)
    ):
        yield "content"
