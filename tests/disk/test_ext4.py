"""The ext4 reader against the directories that mke2fs was given, and against damage."""

from __future__ import annotations

import os
import random
import stat
import subprocess
from pathlib import Path

import pytest
from ext4_helpers import debugfs, make_file_system, tree_of

from disk_tools import looked_for_again, scripts
from ratoon.errors import HostError, UnreadableDisk
from ratoon.store.disk.ext4 import Ext4
from ratoon.store.disk.tree import compare_trees, read_tree, replay_journal
from ratoon.units import MIB


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree with everything that is stored in a way of its own."""
    root = tmp_path / "root"
    (root / "etc" / "deep" / "er").mkdir(parents=True)
    (root / "etc" / "deep" / "er" / "file").write_bytes(b"x" * 5000)
    (root / "empty").touch()
    (root / "large").write_bytes(random.Random(1).randbytes(3 * MIB))
    (root / "names" / "many").mkdir(parents=True)
    for number in range(500):
        (root / "names" / "many" / f"a file with a rather long name, number {number}").touch()
    (root / "names" / "new\nline").touch()
    (root / "names" / os.fsdecode(b"no \xff utf-8")).touch()
    (root / "short").symlink_to("etc/deep")
    (root / "long").symlink_to("etc/" * 50 + "deep")
    os.mkfifo(root / "pipe")
    (root / "holes").touch()
    with (root / "holes").open("r+b") as file:  # too many extents for an inode
        for number in range(500):
            file.seek(number * 16384)
            file.write(bytes([1 + number % 255]) * 4096)
    (root / "secret").touch(mode=0o4711)
    os.utime(root / "large", ns=(0, 4_294_967_296_123_456_789))  # beyond 2038
    os.utime(root / "empty", ns=(0, -5_000_000_000))  # before 1970
    return root


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-O", "^64bit"),
        ("-b", "1024"),
        ("-I", "128"),
        ("-O", "^metadata_csum,uninit_bg"),
        ("-t", "ext2", "-b", "1024"),  # no extents: blocks of blocks of block numbers
        ("-t", "ext3"),
        ("-O", "bigalloc"),
        ("-g", "1024", "-b", "4096"),
    ],
    ids=" ".join,
)
def test_it_reads_what_mke2fs_wrote(tmp_path: Path, root: Path, options: tuple[str, ...]) -> None:
    disk = make_file_system(tmp_path / "disk", root, *options, size=64 * MIB)
    with Ext4(disk, "the disk") as system:
        tree = read_tree(system)
        assert tree.keys() - {b"lost+found"} == {
            os.fsencode(path.relative_to(root)) for path in root.rglob("*")
        }
        for name, inode in tree.items():
            if name == b"lost+found":
                continue
            found = os.lstat(os.path.join(os.fsencode(root), name))  # noqa: PTH118
            assert (inode.mode, inode.uid, inode.gid) == (found.st_mode, found.st_uid, found.st_gid)
            if stat.S_ISREG(inode.mode):
                assert inode.size == found.st_size
            if stat.S_ISLNK(inode.mode):
                link = os.readlink(os.path.join(os.fsencode(root), name))  # noqa: PTH115, PTH118
                assert system.link_target(inode) == link


def test_times_beyond_2038_and_before_1970(tmp_path: Path, root: Path) -> None:
    disk = make_file_system(tmp_path / "disk", root, size=64 * MIB)
    debugfs(disk, "set_inode_field large mtime @4294967296", "set_inode_field empty mtime @-5")
    tree = tree_of(disk)
    assert tree[b"large"].mtime_ns // 10**9 == 4_294_967_296
    assert tree[b"holes"].mtime_ns // 10**9 == int((root / "holes").stat().st_mtime)


def test_content_is_equal_however_it_is_stored(tmp_path: Path, root: Path) -> None:
    one = make_file_system(tmp_path / "one", root, size=64 * MIB)
    other = make_file_system(tmp_path / "other", root, "-t", "ext2", "-b", "4096", size=64 * MIB)
    with Ext4(one, "one") as left, Ext4(other, "other") as right:
        before, after = read_tree(left), read_tree(right)
        for name, inode in before.items():
            if stat.S_ISREG(inode.mode):
                assert left.content_digest(inode) == right.content_digest(after[name])
    (root / "holes").write_bytes((root / "holes").read_bytes())  # its holes written as zeros
    third = make_file_system(tmp_path / "third", root, size=64 * MIB)
    with Ext4(one, "one") as left, Ext4(third, "third") as right:
        pair = [system.content_digest(read_tree(system)[b"holes"]) for system in (left, right)]
    assert pair[0] == pair[1]


def test_what_was_allocated_but_never_written_is_zeros(tmp_path: Path, root: Path) -> None:
    (root / "zeros").write_bytes(b"")
    disk = make_file_system(tmp_path / "disk", root, size=64 * MIB)
    debugfs(disk, "fallocate zeros 0 9", "set_inode_field zeros size 40960")
    with Ext4(disk, "the disk") as system:
        tree = read_tree(system)
        assert tree[b"zeros"].size == 40960
        assert system.content_digest(tree[b"zeros"]) == system.content_digest(tree[b"empty"])


def test_a_hashed_directory(tmp_path: Path, root: Path) -> None:
    disk = make_file_system(tmp_path / "disk", root, size=64 * MIB)
    before = tree_of(disk)
    subprocess.run(["e2fsck", "-fyD", disk], capture_output=True, check=False)
    assert "Root node dump" in debugfs(disk, "htree_dump names/many")
    after = tree_of(disk)
    assert after.keys() == before.keys()


def test_a_journal_must_be_replayed(tmp_path: Path, root: Path) -> None:
    disk = make_file_system(tmp_path / "disk", root, size=64 * MIB)
    (tmp_path / "block").write_bytes(b"y" * 4096)
    blocks = debugfs(disk, "blocks etc/deep/er/file").split()
    with Ext4(disk, "the disk") as system:
        before = system.content_digest(read_tree(system)[b"etc/deep/er/file"])
    first = next(word for word in blocks if word.isdigit())
    debugfs(disk, "journal_open", f"journal_write -b {first} {tmp_path}/block", "journal_close")
    with Ext4(disk, "the disk") as system:
        assert system.needs_recovery
    replay_journal(disk, "the disk")
    with Ext4(disk, "the disk") as system:
        assert not system.needs_recovery
        assert system.content_digest(read_tree(system)[b"etc/deep/er/file"]) != before
    untouched = disk.read_bytes()
    replay_journal(disk, "the disk")
    assert disk.read_bytes() == untouched


def test_a_journal_that_cannot_be_replayed(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = make_file_system(tmp_path / "disk", root, size=64 * MIB)
    debugfs(disk, "feature needs_recovery")
    with monkeypatch.context() as patch, looked_for_again():
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(HostError, match="is not installed; `ratoon setup`"):
            replay_journal(disk, "the disk")
    why = "the disk: e2fsck cannot replay its journal:\nreason"
    failing = scripts(tmp_path, {"e2fsck": "echo reason; exit 8"})
    with failing, pytest.raises(UnreadableDisk, match=why):
        replay_journal(disk, "the disk")


def test_other_content_is_unreadable(tmp_path: Path) -> None:
    for content in (b"", b"x" * 1000, bytes(MIB)):
        (tmp_path / "disk").write_bytes(content)
        with pytest.raises(UnreadableDisk, match="the disk holds no ext4"):
            Ext4(tmp_path / "disk", "the disk")
        with pytest.raises(UnreadableDisk, match="the disk holds no ext4"):
            replay_journal(tmp_path / "disk", "the disk")


def test_unknown_features_are_named(tmp_path: Path, root: Path) -> None:
    disk = make_file_system(tmp_path / "disk", root, "-O", "inline_data", size=64 * MIB)
    with pytest.raises(UnreadableDisk, match="not known: 0x8000"):
        Ext4(disk, "the disk")


def test_directories_in_a_circle_end(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    disk = make_file_system(tmp_path / "disk", root)
    debugfs(disk, "link a a/b/again")
    with pytest.raises(UnreadableDisk, match="two parents"):
        tree_of(disk)


def test_nothing_but_our_own_errors_come_of_damage(tmp_path: Path, root: Path) -> None:
    for path in (root / "names" / "many").iterdir():
        if not path.name.endswith("0"):
            path.unlink()
    disk = make_file_system(tmp_path / "disk", root, "-N", "512", size=16 * MIB)
    sound = disk.read_bytes()
    used = [at for at in range(0, len(sound), 4096) if any(sound[at : at + 4096])]
    damaged = tmp_path / "damaged"
    damaged.write_bytes(sound)
    randomly = random.Random(2)
    refused = 0
    with damaged.open("r+b", buffering=0) as file, Ext4(disk, "the disk") as left:
        for _ in range(60):
            spots = []
            for _ in range(40):  # in the superblock, or anywhere that is in use
                start, length = (
                    (1024, 512) if randomly.random() < 0.1 else (randomly.choice(used), 4096)
                )
                spots.append(start + randomly.randrange(length))
            for at in spots:
                os.pwrite(file.fileno(), randomly.randbytes(1), at)
            try:
                with Ext4(damaged, "damaged") as right:
                    compare_trees(left, right)
            except UnreadableDisk:
                refused += 1
            for at in spots:
                os.pwrite(file.fileno(), sound[at : at + 1], at)
    assert refused
