"""What files have is on the disk that is made of them, to the last nanosecond and attribute."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
from pathlib import Path

import pytest
from disk_looks import Look, disk_of
from raw_tar import END, header, large, member, pax

from oci_images import Layout, file, hard_link, layer
from ratoon.store.disk.ext4 import Ext4, Inode
from ratoon.store.disk.tree import read_tree

pytest_plugins = ["image_fixtures"]

#: `user:1000:r--`, and what an access control list has besides.
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in (
        *((1, 6, 2**32 - 1), (2, 4, 1000), (4, 4, 2**32 - 1)),
        *((0x10, 4, 2**32 - 1), (0x20, 4, 2**32 - 1)),
    )
)
NS = 10**9


def tarball(place: Path, *members: bytes) -> str:
    path = place / "made.tar"
    path.write_bytes(b"".join(members) + END)
    return f"tar:{path}"


def inodes(reference: str, place: Path) -> dict[bytes, Inode]:
    """What our own reader of ext4 finds on the disk of an image."""
    with disk_of(reference, place) as raw, Ext4(raw, "disk") as system:
        return read_tree(system)


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        (b"1000000000", 1_000_000_000 * NS),
        (b"1.000000001", NS + 1),
        (b"-5.25", -5_250_000_000),
        (b"5000000000.5", 5_000_000_000 * NS + NS // 2),
        (b"15032385535", 15_032_385_535 * NS),
        (b"99999999999", 15_032_385_535 * NS),
        (b"-99999999999", -(2**31) * NS),
        (b"2.9999999999", 2_999_999_999),
    ],
)
def test_times(told: bytes, kept: int, cache: Path, tmp_path: Path) -> None:
    """To the nanosecond, before 1970 and after 2038, as far as ext4 goes."""
    names = {b"f": b"0", b"d": b"5", b"l": b"2"}
    made = [pax({b"mtime": told}) + header(name, kind, target=b"t") for name, kind in names.items()]
    found = inodes(tarball(tmp_path, *made), tmp_path)
    assert {name: found[name].mtime_ns for name in names} == dict.fromkeys(names, kept)


def test_numbers_that_have_no_room_in_a_header(cache: Path, tmp_path: Path) -> None:
    reference = tarball(
        tmp_path,
        member(b"gnu", uid=large(3_000_000, 8), mtime=large(-7), magic=b"ustar  \0"),
        pax({b"uid": b"4294967294", b"gid": b"65536"}) + member(b"pax"),
        member(b"spaces", uid=b"    17 \0"),
    )
    found = inodes(reference, tmp_path)
    assert (found[b"gnu"].uid, found[b"gnu"].gid, found[b"gnu"].mtime_ns) == (3000000,) * 2 + (
        -7 * NS,
    )
    assert (found[b"pax"].uid, found[b"pax"].gid) == (4294967294, 65536)
    assert found[b"spaces"].uid == 0o17


def test_names_are_bytes(cache: Path, tmp_path: Path) -> None:
    """Of any length that Linux has, in any encoding; and links as long."""
    long = b"/".join([b"n" * 255] * 15)
    odd = [
        b"\xff\xfe",
        "grün".encode(),
        b'new\nline "and" \\ more',
        b" ",
        b"-",
        b"<12>",
        b"x" * 101,
    ]
    parts = long.split(b"/")
    names = [*odd, *(b"/".join(parts[:count]) for count in range(1, 16))]
    made = [pax({b"path": name}) + member(b"") for name in odd]
    made.append(pax({b"path": long, b"linkpath": b"\xff" * 1000}) + header(b"", b"2", target=b"-"))
    made += [member(b"././@LongLink", b"g" * 200 + b"\0", b"L"), member(b"g", magic=b"ustar  \0")]
    with disk_of(tarball(tmp_path, *made), tmp_path) as raw, Ext4(raw, "disk") as system:
        found = read_tree(system)
        assert {*names, b"g" * 200} <= {*found}
        assert system.link_target(found[long]) == b"\xff" * 1000


def test_a_name_in_two_parts(cache: Path, tmp_path: Path) -> None:
    """Of ustar; what GNU's format has at that place is something else."""
    rest = bytes(80) + b"some/where"
    reference = tarball(
        tmp_path, header(b"there", rest=rest), header(b"here", rest=rest, magic=b"ustar  \0")
    )
    found = inodes(reference, tmp_path)
    assert {b"some/where/there", b"here"} <= {*found}


def test_old_kinds_of_files(look: Look, tmp_path: Path) -> None:
    """A type of zero, directories by their slash, contiguous files, and headers without magic."""
    reference = tarball(
        tmp_path,
        member(b"old", b"1", b"\0", magic=bytes(8)),
        header(b"directory/", b"\0", magic=bytes(8)),
        member(b"contiguous", b"2", b"7"),
        member(b"comment", b"17 comment=hello\n", b"g"),
        header(b"with-a-size", b"5", 1000),
    )
    root = look(reference)
    assert (root / "old").read_bytes() == b"1"
    assert (root / "contiguous").read_bytes() == b"2"
    assert (root / "directory").is_dir()
    assert (root / "with-a-size").is_dir()


def test_attributes_and_access_control_lists(look: Look, tmp_path: Path) -> None:
    """Of files, directories and links, of several names, and with any bytes."""
    names = {
        b"user.note": bytes(range(256)),
        b"user.a name": b'"\\\n',
        b"user.empty": b"",
        b"trusted.overlay.opaque": b"y",
        b"com.apple.quarantine": b"dropped",
    }
    xattrs = {b"SCHILY.xattr." + key: value for key, value in names.items()}
    acl = b"user::rw-,user:joe:r--:1000,group::r--,mask::r--,other::r--"
    default = b"user::rw-\nuser:1000:r--\t#effective:r--\ngroup::r--\nmask::r--\nother::r--\n"
    reference = tarball(
        tmp_path,
        pax(xattrs) + member(b"file"),
        pax({b"SCHILY.acl.access": acl}) + member(b"listed"),
        pax({b"SCHILY.acl.default": default}) + header(b"directory", b"5"),
        pax({b"SCHILY.xattr.trusted.x": b"y"}) + header(b"link", b"2", target=b"file"),
        header(b"again", b"1", target=b"file"),
    )
    root = look(reference)
    for name in ("file", "again"):
        for key in (*names,)[:-1]:
            assert os.getxattr(root / name, key) == names[key]
        assert "com.apple.quarantine" not in os.listxattr(root / name)
    assert os.getxattr(root / "listed", "system.posix_acl_access") == ACL
    assert os.getxattr(root / "directory", "system.posix_acl_default") == ACL
    assert os.getxattr(root / "link", "trusted.x", follow_symlinks=False) == b"y"


def test_hard_links_of_all_kinds(look: Look, tmp_path: Path) -> None:
    """Their own headers say nothing, and what they link to may be hidden by then."""
    below = [
        *(file("hidden", b"1", 0o4711, uid=7), hard_link("kept", "hidden")),
        *(file("replaced", b"2"), hard_link("a/b/c", "/./replaced"), file("replaced", b"3")),
    ]
    layout = Layout(tmp_path / "layout")
    layout.add([layer(below), layer([hard_link("late", "kept"), file(".wh.hidden")])])
    root = look(layout.reference())
    status = (root / "kept").stat()
    assert (status.st_nlink, status.st_uid, stat.S_IMODE(status.st_mode)) == (2, 7, 0o4711)
    assert (root / "late").stat().st_ino == status.st_ino
    assert not (root / "hidden").exists()
    assert ((root / "a/b/c").read_bytes(), (root / "replaced").read_bytes()) == (b"2", b"3")
    reference = tarball(
        tmp_path,
        header(b"null", b"3", rest=bytes(64) + b"0000001\0" + b"0000003\0"),
        header(b"big", b"4", rest=bytes(64) + b"0000403\0" + b"0210560\0"),
        header(b"link", b"2", target=b"null"),
        *(header(b"again-" + name, b"1", target=name) for name in (b"null", b"big", b"link")),
    )
    root = look(reference)
    for name in ("null", "big", "link"):
        assert (root / name).lstat().st_ino == (root / f"again-{name}").lstat().st_ino
    assert (root / "null").stat().st_rdev == os.makedev(1, 3)
    assert (root / "big").stat().st_rdev == os.makedev(259, 70000)


def test_a_directory_with_all_that_cp_keeps(look: Look, tmp_path: Path) -> None:
    """And of other file systems the place alone."""
    tree = tmp_path / "tree"
    (tree / "elsewhere").mkdir(parents=True)
    with (tree / "holes").open("wb") as holes:
        holes.seek(8 << 20)
        holes.write(b"end")
    os.setxattr(tree / "holes", "user.note", b"x")
    os.setxattr(tree / "holes", "system.posix_acl_access", ACL)
    os.utime(tree / "holes", ns=(0, 1_234_567_890_123_456_789))
    tree.chmod(0o2751)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tree / "socket"))
    listener.close()
    os.link(tree / "holes", tree / "zero")
    (tree / os.fsdecode(b"\xff")).symlink_to("holes")
    os.utime(tree, ns=(0, 5))
    subprocess.run(["mount", "-t", "tmpfs", "x", tree / "elsewhere"], check=True)
    try:
        (tree / "elsewhere/x").touch()
        root = look(f"dir:{tree}")
    finally:
        subprocess.run(["umount", tree / "elsewhere"], check=True)
    status = (root / "holes").stat()
    assert (status.st_mtime_ns, status.st_nlink) == (1_234_567_890_123_456_789, 2)
    assert status.st_blocks < 64, "holes are holes"
    assert (root / "zero").read_bytes() == bytes(8 << 20) + b"end"
    assert os.getxattr(root / "zero", "user.note") == b"x"
    assert os.getxattr(root / "zero", "system.posix_acl_access") == ACL
    assert (root / "elsewhere").is_dir()
    assert not any((root / "elsewhere").iterdir())
    assert not (root / "socket").exists()
    assert (root / os.fsdecode(b"\xff")).readlink() == Path("holes")
    top = root.stat()
    assert (top.st_mtime_ns, stat.S_IMODE(top.st_mode)) == (5, 0o2751)


def test_a_directory_that_is_very_deep(cache: Path, tmp_path: Path) -> None:
    """Deeper than Python calls itself."""
    tree, deep = tmp_path / "tree", "/".join(["d"] * 1500)
    tree.mkdir()
    subprocess.run(["mkdir", "-p", f"{tree}/{deep}"], check=True)
    try:
        assert deep.encode() in inodes(f"dir:{tree}", tmp_path)
    finally:
        subprocess.run(["rm", "-rf", tree], check=True)


def test_large_directories_are_indexed(look: Look, tmp_path: Path) -> None:
    """As the kernel's own are, so that a name is found at once."""
    names = [f"name-{number}" for number in range(3000)]
    made = [pax({b"mtime": b"5.5"}) + header(b"wide", b"5")]
    made += [header(f"wide/{name}".encode()) for name in names]
    reference = tarball(tmp_path, *made)
    wide = inodes(reference, tmp_path)[b"wide"]
    assert wide.flags & 0x1000, "EXT4_INDEX_FL"
    assert wide.mtime_ns == 5_500_000_000
    root = look(reference)
    assert {path.name for path in (root / "wide").iterdir()} == {*names}
    assert all((root / "wide" / name).is_file() for name in names)


@pytest.mark.parametrize("style", ["gnu", "posix0.0", "posix0.1", "posix1.0"])
def test_sparse_files(style: str, look: Look, tmp_path: Path) -> None:
    """GNU tar has four ways to write them; this one has more holes than a header has room for."""
    tree = tmp_path / "tree"
    tree.mkdir()
    with (tree / "sparse").open("wb") as sparse:
        for number in range(40):
            sparse.seek(number * 128 * 1024 + 4096)
            sparse.write(b"%d" % number)
        sparse.truncate(8 << 20)
    os.truncate(tree / "sparse", 8 << 20)
    with (tree / "empty").open("wb") as empty:
        empty.truncate(1 << 20)
    (tree / "after").write_bytes(b"after")
    how = "--format=gnu" if style == "gnu" else f"--format=posix --sparse-version={style[5:]}"
    command = ["tar", *how.split(), "--sparse", "-C", str(tree), "-cf", f"{tmp_path}/sparse.tar"]
    subprocess.run([*command, "sparse", "empty", "after"], check=True)
    assert (tmp_path / "sparse.tar").stat().st_size < 1 << 20
    root = look(f"tar:{tmp_path}/sparse.tar")
    for name in ("sparse", "empty", "after"):
        assert (root / name).read_bytes() == (tree / name).read_bytes()
    assert (root / "sparse").stat().st_blocks * 512 < 1 << 20
