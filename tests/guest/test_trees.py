"""Trees as archives: what goes in comes out, and what a stranger made does no harm."""

from __future__ import annotations

import os
import resource
import socket
import stat
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratoon.machine.guest.shared import packing, tar
from ratoon.machine.guest.shared.directories import remove_tree
from ratoon.machine.guest.shared.packing import Packer
from ratoon.machine.guest.shared.unpacking import Bounds, Unpacker, leads_out

ROOT = tar.Entry(b".", tar.DIRECTORY, mode=0o755)
BOUNDS = Bounds(1 << 20, 1000)


def pack(path: Path) -> bytes:
    return b"".join(Packer(os.fsencode(path), owners=True).chunks())


def unpack(
    archive: bytes,
    path: Path,
    *,
    merge: bool = False,
    owners: bool = False,
    into: bool = False,
    bounds: Bounds | None = BOUNDS,
    step: int = 1000,
) -> Unpacker:
    unpacker = Unpacker(os.fsencode(path), merge=merge, owners=owners, into=into, bounds=bounds)
    try:
        for start in range(0, len(archive), step):
            for _ in unpacker.feed(archive[start : start + step]):
                pass
        unpacker.finish()
        return unpacker
    finally:
        for _ in unpacker.close():
            pass


def archive(*entries: tar.Entry | bytes) -> bytes:
    """Entries, each FILE followed by its content."""
    packed = (
        e + tar.padding(len(e)) if isinstance(e, bytes) else tar.encode(e) for e in (ROOT, *entries)
    )
    return b"".join(packed) + tar.END


def file(name: bytes, content: bytes = b"", mode: int = 0o644) -> list[tar.Entry | bytes]:
    return [tar.Entry(name, tar.FILE, size=len(content), mode=mode), content]


def directory(name: bytes, mode: int = 0o755) -> tar.Entry:
    return tar.Entry(name, tar.DIRECTORY, mode=mode)


def symlink(name: bytes, target: bytes) -> tar.Entry:
    return tar.Entry(name, tar.SYMLINK, target=target)


def hard_link(name: bytes, target: bytes) -> tar.Entry:
    return tar.Entry(name, tar.HARD_LINK, target=target)


def listing(root: Path) -> dict[bytes, tuple[object, ...]]:
    """All that is below `root`, with whatever an archive keeps of it."""
    found: dict[bytes, tuple[object, ...]] = {}
    inodes: dict[int, bytes] = {}
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content: bytes | str = b""
        first = b""
        if kind == stat.S_IFREG:
            content = path.read_bytes()
            first = inodes.setdefault(status.st_ino, os.fsencode(path.relative_to(root)))
        elif kind == stat.S_IFLNK:
            content = str(path.readlink())
        owner = status.st_uid, status.st_gid
        about = status.st_mode, owner, status.st_mtime_ns, content, first
        found[os.fsencode(path.relative_to(root))] = about
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left_open() -> Iterator[None]:
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory beside the destination, which nothing may reach; so may the one above."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("as it was")
    before = listing(outside)
    yield outside
    assert listing(outside) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"outside", "to"}


# Round trips ----------------------------------------------------------------------------------


def make_tree(root: Path) -> None:
    root.mkdir()
    (root / "empty").touch()
    (root / "large").write_bytes(os.urandom(300_000))
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o4751)
    deep = root / "a" / "b" / ("c" * 200)
    deep.mkdir(parents=True)
    (deep / ("d" * 255)).write_text("deep down")
    os.link(deep / ("d" * 255), root / "z")
    os.link(root / "run.sh", root / "a" / "run again.sh")
    (root / "to b").symlink_to("a/b")
    (root / "a" / "up").symlink_to("../large")
    (root / "nowhere").symlink_to("not there")
    for name in (b"\xff\xfe", b"new\nline", "ü".encode(), b" ", b"-rf", b"\\", b'"', b"\x01"):
        (root / os.fsdecode(name)).write_bytes(name)
    (root / "closed").mkdir()
    (root / "closed" / "inside").write_text("x")
    (root / "closed").chmod(0o1000)
    os.chown(root / "empty", 1234, 5678)
    os.chown(root / "nowhere", 1234, 5678, follow_symlinks=False)
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        times = 0, 1_600_000_000_123_456_789 + number * 10**15
        os.utime(path, ns=times, follow_symlinks=False)
    os.utime(root, ns=(0, -1_500_000_001))


def test_a_tree_comes_out_as_it_went_in(tmp_path: Path) -> None:
    make_tree(tmp_path / "from")
    packer = Packer(os.fsencode(tmp_path / "from"), owners=True)
    data = b"".join(packer.chunks())
    unpacker = unpack(data, tmp_path / "to", owners=True, bounds=None)
    assert listing(tmp_path / "to") == listing(tmp_path / "from")
    assert unpacker.entries == packer.entries == len(listing(tmp_path / "to"))
    assert (unpacker.left_out.count, packer.left_out.count) == (0, 0)


def test_gnu_tar_reads_it_and_it_reads_gnu_tar(tmp_path: Path) -> None:
    make_tree(tmp_path / "from")
    (tmp_path / "to").mkdir()
    command = ["tar", "--extract", "--preserve-permissions", "--directory", str(tmp_path / "to")]
    subprocess.run(command, input=pack(tmp_path / "from"), check=True)
    assert listing(tmp_path / "to") == listing(tmp_path / "from")
    options = [
        "--format=pax",
        "--create",
        "--sort=name",
        "--directory",
        str(tmp_path / "from"),
        ".",
    ]
    packed = subprocess.run(["tar", *options], stdout=subprocess.PIPE, check=True).stdout
    unpack(packed, tmp_path / "again", owners=True, bounds=None)
    assert listing(tmp_path / "again") == listing(tmp_path / "from")


name = (
    st.binary(min_size=1, max_size=255)
    .filter(lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b".."))
    .map(os.fsdecode)
)
trees = st.recursive(
    st.binary(max_size=200_000) | st.tuples(name),
    lambda below: st.dictionaries(name, below, max_size=4),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, dict))


def grow(path: Path, tree: object) -> None:
    if isinstance(tree, dict):
        path.mkdir()
        for name, below in tree.items():
            grow(path / name, below)
    elif isinstance(tree, tuple):
        path.symlink_to(tree[0])
    else:
        assert isinstance(tree, bytes)
        path.write_bytes(tree)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(trees, st.integers(1, 100_000))
def test_any_tree_comes_out_as_it_went_in(
    tmp_path_factory: pytest.TempPathFactory, tree: object, step: int
) -> None:
    here = tmp_path_factory.mktemp("trees")
    grow(here / "from", tree)
    unpack(pack(here / "from"), here / "to", bounds=Bounds(1 << 30, 1000), step=step)
    assert listing(here / "to") == listing(here / "from")


def test_a_file_alone(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(os.urandom(200_000))
    (tmp_path / "from").chmod(0o640)
    data = pack(tmp_path / "from")
    (tmp_path / "to").write_text("an older one, which is replaced")
    unpack(data, tmp_path / "to")
    unpack(data, tmp_path / "new")
    assert listing(tmp_path / "to") == listing(tmp_path / "new") == listing(tmp_path / "from")


def test_deeper_than_descriptors_and_paths_go(tmp_path: Path) -> None:
    """Names as long as a system call takes; what is deeper is left out, but can be removed."""
    top = tmp_path / "from"
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(2100):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    packer = Packer(os.fsencode(top), owners=False)
    unpacker = unpack(b"".join(packer.chunks()), tmp_path / "to", bounds=None)
    assert unpacker.entries == packer.entries == 2049
    assert packer.left_out.listed == ["d/" * 100 + "...: its name is too long"]
    for name in ("from", "to"):
        for _ in remove_tree(os.fsencode(tmp_path / name)):
            pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_left_out_and_named(tmp_path: Path) -> None:
    root = tmp_path / "from"
    root.mkdir()
    os.mkfifo(root / "pipe")
    os.mknod(root / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))
        packer = Packer(os.fsencode(root), owners=False)
        unpack(b"".join(packer.chunks()), tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []
    assert packer.left_out.listed == [
        f"{name}: neither a file, a directory nor a link" for name in ("device", "pipe", "socket")
    ]


def test_what_is_left_out_is_listed_up_to_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MAX_LISTED", 2)
    for number in range(4):
        os.mkfifo(tmp_path / f"pipe-{number}")
    packer = Packer(os.fsencode(tmp_path), owners=False)
    for _ in packer.chunks():
        pass
    assert (packer.left_out.count, len(packer.left_out.listed)) == (4, 2)


def test_another_file_system_is_not_entered() -> None:
    dev = Path("/dev")
    mounted = {p.name for p in dev.iterdir() if p.is_dir() and p.stat().st_dev != dev.stat().st_dev}
    assert "pts" in mounted
    packer = Packer(b"/dev", owners=False)
    reader = tar.Reader()
    found = [
        os.fsdecode(part.name)
        for chunk in packer.chunks()
        for part in reader.feed(chunk)
        if isinstance(part, tar.Entry)
    ]
    assert mounted <= set(found)
    assert not any(name.startswith(f"{place}/") for name in found for place in mounted)
    assert "pts: what is in it is on another file system" in packer.left_out.listed


def test_content_that_is_made_as_it_is_read(tmp_path: Path) -> None:
    """Whatever its size is said to be: 0 in /proc, a page in /sys."""
    for name in ("/proc/version", "/proc/self/environ", "/sys/class/net/lo/mtu"):
        unpack(pack(Path(name)), tmp_path / "to")
        assert (tmp_path / "to").read_bytes() == Path(name).read_bytes() != b""


def test_a_tree_of_such_content_without_what_cannot_be_read(tmp_path: Path) -> None:
    packer = Packer(b"/proc/sys/vm", owners=False)
    unpack(b"".join(packer.chunks()), tmp_path / "to")
    swappiness = Path("/proc/sys/vm/swappiness").read_text()
    assert (tmp_path / "to/swappiness").read_text() == swappiness
    assert not (tmp_path / "to/drop_caches").exists()
    assert "drop_caches: Permission denied" in packer.left_out.listed


def test_no_end_of_such_content(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_MADE", 10)
    with pytest.raises(OSError, match="too large") as raised:
        pack(Path("/proc/version"))
    assert raised.value.filename == b"/proc/version"


def test_a_file_that_grows_is_packed_as_it_was_met(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"a" * 100_000)
    chunks = Packer(os.fsencode(tmp_path), owners=False).chunks()
    first = next(chunks)
    with (tmp_path / "log").open("ab") as log:
        log.write(b"b" * 100_000)
    unpack(first + b"".join(chunks), tmp_path / "to")
    assert (tmp_path / "to" / "log").read_bytes() == b"a" * 100_000


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(bytes(200_000))
    chunks = Packer(os.fsencode(tmp_path), owners=False).chunks()
    next(chunks)
    os.truncate(tmp_path / "log", 0)
    with pytest.raises(OSError, match="became shorter"):
        list(chunks)


def test_what_vanishes_meanwhile_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100_000))
    (tmp_path / "b").mkdir()
    (tmp_path / "c").touch()
    chunks = Packer(os.fsencode(tmp_path), owners=False).chunks()
    first = next(chunks)
    (tmp_path / "b").rmdir()
    (tmp_path / "c").unlink()
    (tmp_path / "c").symlink_to("elsewhere")
    unpack(first + b"".join(chunks), tmp_path / "to")
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"a", "c"}


# Where it goes ----------------------------------------------------------------------------------


def test_nothing_is_there_before_it_is_whole(tmp_path: Path) -> None:
    data = archive(directory(b"d"), *file(b"d/f", b"content"))
    unpacker = Unpacker(os.fsencode(tmp_path / "to"), merge=False, owners=False)
    for _ in unpacker.feed(data):
        pass
    assert not (tmp_path / "to").exists()
    unpacker.finish()
    assert (tmp_path / "to" / "d" / "f").read_text() == "content"
    for _ in unpacker.close():
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "to"]


@given(st.integers(0, 10_000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_off_anywhere_it_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory, length: int
) -> None:
    here = tmp_path_factory.mktemp("cut")
    content = file(b"d/f", bytes(2000), 0o600)
    whole = archive(directory(b"d", 0), *content, symlink(b"l", b"d"), hard_link(b"h", b"d/f"))
    for data in (whole, archive(*file(b"alone", bytes(3000)))[len(tar.encode(ROOT)) :]):
        with pytest.raises(tar.TarError, match="too early"):
            unpack(data[: min(length, len(data) - 512)], here / "to")
        assert list(here.iterdir()) == []


def test_what_is_there_stays_unless_they_are_to_be_merged(tmp_path: Path) -> None:
    there = tmp_path / "to"
    (there / "d").mkdir(parents=True)
    (there / "d").chmod(0o711)
    (there / "d" / "old").write_text("old")
    (there / "d" / "both").write_text("old")
    (there / "l").symlink_to("elsewhere")
    data = archive(
        directory(b"d", 0o700),
        *file(b"d/both", b"new"),
        *file(b"d/new", b"new"),
        symlink(b"l", b"d"),
        hard_link(b"d/old", b"d/both"),
        hard_link(b"d/old", b"d/both"),
    )
    before = listing(there)
    with pytest.raises(FileExistsError) as caught:
        unpack(data, there)
    assert caught.value.filename == os.fsencode(there)
    assert listing(there) == before
    unpack(data, there, merge=True)
    assert {path.name for path in (there / "d").iterdir()} == {"both", "new", "old"}
    assert (there / "d" / "both").read_text() == (there / "d" / "old").read_text() == "new"
    assert stat.S_IMODE((there / "d").stat().st_mode) == 0o711
    assert (there / "l").readlink() == Path("d")


@pytest.mark.parametrize("merge", [False, True])
def test_a_tree_does_not_take_the_place_of_a_file(tmp_path: Path, merge: bool) -> None:
    (tmp_path / "to").write_text("a file")
    with pytest.raises(NotADirectoryError):
        unpack(archive(), tmp_path / "to", merge=merge)
    assert (tmp_path / "to").read_text() == "a file"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_file_does_not_take_the_place_of_something_else(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "to")
    (tmp_path / "from").touch()
    with pytest.raises((IsADirectoryError, FileExistsError)):
        unpack(pack(tmp_path / "from"), tmp_path / "to", merge=True)
    assert not (tmp_path / "to").is_file()


def test_a_failure_leaves_nothing_and_names_the_file(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            unpack(archive(directory(b"d"), *file(b"d/f", bytes(200_000))), tmp_path / "to")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == os.fsencode(tmp_path / "to" / "d" / "f")
    assert list(tmp_path.iterdir()) == []


# From strangers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [b"..", b"../x", b"d/../../x", b"/x", b"/etc/x", b"./../x", b"d/..", b"//x"]
)
@pytest.mark.parametrize("kind", sorted(tar.KINDS))
def test_names_that_lead_out_are_refused(
    tmp_path: Path, outside: Path, name: bytes, kind: bytes
) -> None:
    for entry in (tar.Entry(name, kind, target=b"f"), tar.Entry(b"l", tar.HARD_LINK, target=name)):
        data = archive(*file(b"f", b"x"), directory(b"d"), entry)
        with pytest.raises(tar.TarError, match="leads out of it"):
            unpack(data, tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("target", [b"../outside", b"/etc", b"d/../../outside", b"../../../etc/x"])
def test_links_that_lead_out_are_left_out(tmp_path: Path, outside: Path, target: bytes) -> None:
    unpacker = unpack(archive(directory(b"d"), symlink(b"d/l", b"../" + target)), tmp_path / "to")
    unpacker = unpack(archive(symlink(b"l", target)), tmp_path / "to", merge=True)
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["d"]
    assert unpacker.left_out.listed == [f"l: a link out of the tree, to {target.decode()}"]


@pytest.mark.parametrize("target", [b".", b"d", b"d/e", b"e/../../outside"])
def test_nothing_goes_through_a_link(tmp_path: Path, outside: Path, target: bytes) -> None:
    """Neither one that the archive made, nor one that was there."""
    for name in (b"l/x", b"l/e/x"):
        plain = tar.Entry(name, tar.FILE)
        for entry in (plain, directory(name), symlink(name, b"y"), hard_link(name, b"f")):
            data = archive(directory(b"d"), directory(b"d/e"), *file(b"f"), symlink(b"l", target))
            with pytest.raises(OSError, match=r"Not a directory|No such file"):
                unpack(data[: -len(tar.END)] + tar.encode(entry) + tar.END, tmp_path / "to")
            assert not (tmp_path / "to").exists()


def test_nothing_goes_through_a_link_that_was_there(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "l").symlink_to(outside)
    for entries in (file(b"l/secret", b"x"), [directory(b"l")], [directory(b"l", 0o777)]):
        with pytest.raises(NotADirectoryError):
            unpack(archive(*entries), tmp_path / "to", merge=True)
    with pytest.raises(NotADirectoryError):
        unpack(archive(hard_link(b"h", b"l/secret")), tmp_path / "to", merge=True)
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["l"]


def test_a_file_in_place_of_a_link_replaces_the_link(tmp_path: Path, outside: Path) -> None:
    unpack(archive(symlink(b"l", b"f"), *file(b"f", b"1"), *file(b"l", b"2")), tmp_path / "to")
    assert (tmp_path / "to" / "f").read_text() == "1"
    (tmp_path / "to" / "s").symlink_to(outside / "secret")
    unpack(archive(*file(b"s", b"3", 0o666)), tmp_path / "to", merge=True)
    assert (tmp_path / "to" / "s").read_text() == "3"


def test_a_hard_link_to_a_link_or_a_directory_is_refused(tmp_path: Path, outside: Path) -> None:
    for made in (directory(b"d"), symlink(b"d", b"f")):
        with pytest.raises(tar.TarError, match="no file"):
            unpack(archive(made, hard_link(b"h", b"d")), tmp_path / "to")
    with pytest.raises(tar.TarError, match="no file"):
        unpack(archive(hard_link(b"h", b".")), tmp_path / "to")
    with pytest.raises(FileNotFoundError):
        unpack(archive(hard_link(b"h", b"not there")), tmp_path / "to")


def test_what_is_linked_is_not_written_to(tmp_path: Path) -> None:
    """A name given to a file of the user's own, and content for that name."""
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "mine").write_text("mine")
    data = archive(hard_link(b"other", b"mine"), *file(b"other", b"theirs", 0o777))
    unpack(data, tmp_path / "to", merge=True)
    assert (tmp_path / "to" / "mine").read_text() == "mine"
    assert stat.S_IMODE((tmp_path / "to" / "mine").stat().st_mode) == 0o644


def test_no_setuid_and_no_owner(tmp_path: Path) -> None:
    entries = [directory(b"d", 0o7777), *file(b"f", b"", 0o6755)]
    for entry in entries:
        if isinstance(entry, tar.Entry):
            entry.uid = entry.gid = 1234
    unpack(archive(*entries), tmp_path / "to")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "to").iterdir()}
    assert modes == {"d": 0o777, "f": 0o755}
    assert {path.stat().st_uid for path in (tmp_path / "to").iterdir()} == {os.getuid()}


@pytest.mark.parametrize("type", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_are_refused(tmp_path: Path, type: bytes) -> None:
    device = tarfile.TarInfo("device")
    device.type, device.devmajor, device.devminor = type, 1, 3
    with pytest.raises(tar.TarError, match="type"):
        unpack(tar.encode(ROOT) + device.tobuf(tarfile.USTAR_FORMAT), tmp_path / "to")
    assert list(tmp_path.iterdir()) == []


def test_no_more_bytes_than_the_bounds_allow(tmp_path: Path) -> None:
    """What it says counts, before a byte of it has come."""
    head = tar.encode(ROOT) + tar.encode(tar.Entry(b"f", tar.FILE, size=2**50))
    with pytest.raises(tar.TarError, match="more than 1048576 bytes"):
        unpack(head, tmp_path / "to")
    many: Iterable[tar.Entry | bytes] = [
        part for number in range(5) for part in file(b"%d" % number, bytes(250_000))
    ]
    with pytest.raises(tar.TarError, match="more than 1048576 bytes"):
        unpack(archive(*many), tmp_path / "to")
    assert list(tmp_path.iterdir()) == []


def test_no_more_entries_than_the_bounds_allow(tmp_path: Path) -> None:
    entries = [directory(b"%d" % number) for number in range(1000)]
    unpack(archive(*entries[:999]), tmp_path / "to")
    with pytest.raises(tar.TarError, match="more than 1000 entries"):
        unpack(archive(*entries), tmp_path / "other")
    assert list(tmp_path.iterdir()) == [tmp_path / "to"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        tar.END,
        tar.encode(symlink(b"l", b"x")) + tar.END,
        tar.encode(directory(b"d")) + tar.END,
        tar.encode(tar.Entry(b"f", tar.FILE)) + tar.encode(tar.Entry(b"g", tar.FILE)) + tar.END,
        archive(ROOT),
        archive(*file(b".")),
    ],
)
def test_one_root_there_must_be(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(tar.TarError):
        unpack(data, tmp_path / "to")


nasty = st.sampled_from([b".", b"..", b"d", b"e", b"l", b"f", b"", b"outside", b"secret"])
paths = st.lists(nasty, min_size=1, max_size=4).map(b"/".join)


@given(
    st.lists(st.builds(tar.Entry, paths, st.sampled_from(sorted(tar.KINDS)), target=paths)),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=300)
def test_no_archive_reaches_what_is_outside(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tar.Entry], merge: bool, into: bool
) -> None:
    here = tmp_path_factory.mktemp("strangers")
    (here / "outside").mkdir()
    (here / "outside" / "secret").write_text("as it was")
    if merge:
        (here / "to").mkdir()
    before = listing(here / "outside"), (here / "outside" / "secret").stat().st_nlink
    with suppress(tar.TarError, OSError):
        data = archive(*entries)
        unpack(data[len(tar.encode(ROOT)) if into else 0 :], here / "to", merge=merge, into=into)
    assert (listing(here / "outside"), (here / "outside" / "secret").stat().st_nlink) == before
    assert {path.name for path in here.iterdir()} <= {"outside", "to"}
    for link in (path for path in here.rglob("*") if path.is_symlink()):
        try:
            led = link.resolve(strict=True)
        except (OSError, RuntimeError):  # nowhere, or round and round
            continue
        assert led.is_relative_to(here / "to")


@given(paths, st.integers(0, 3))
def test_which_links_lead_out(target: bytes, depth: int) -> None:
    """Never one that a walk by names would find outside."""
    if not leads_out(target, depth):
        level = depth
        for part in target.split(b"/"):
            level += {b"..": -1, b".": 0, b"": 0}.get(part, 1)
            assert level >= 0
