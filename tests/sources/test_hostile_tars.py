"""Archives that contradict themselves, have no end, or ask for what cannot be: refused, or right.

Each ends within the time and memory that its size is worth, and with an error for its author.
"""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
from pathlib import Path

import pytest
from disk_looks import DISK, Look
from raw_tar import BLOCK, END, header, large, member, pax

from oci_images import Entry, Layout, directory, file, hard_link, layer, symlink
from ratoon.engine.sources.resolve import resolve, root_disk
from ratoon.errors import InvalidInput, RatoonError
from ratoon.units import GIB, MIB

pytest_plugins = ["image_fixtures"]


def old_sparse(*fields: bytes, more: bytes = b"\0", size: bytes) -> bytes:
    """What a header of GNU's old sparse files has after the magic: a map, and the real size."""
    return bytes(386 - 265) + b"".join(fields).ljust(96, b"\0") + more + size


def digits(number: int) -> bytes:
    return b"%011o\0" % number


SPARSE = {b"GNU.sparse.major": b"1", b"GNU.sparse.minor": b"0"}

#: By what is wrong: an archive without its end, and what the error says.
WRONG: dict[str, tuple[bytes, str]] = {
    "checksum": (member(b"x")[:148] + b"0000000\0" + member(b"x")[156:], "none of tar's"),
    "size-of-words": (header(b"x", size=b"no-number-12"), "no number"),
    "size-below-zero": (header(b"x", size=large(-512)), "Linux has not"),
    "size-of-all": (header(b"x", size=large(1 << 80)), "does not fit"),
    "owner-below-zero": (header(b"x", uid=large(-1, 8)), "Linux has not"),
    "owner-beyond-all": (pax({b"uid": b"4294967295"}) + member(b"x"), "Linux has not"),
    "owner-with-a-name": (pax({b"uid": b"root"}) + member(b"x"), "no number"),
    "pax-size-lies": (pax({b"size": b"1000000"}) + member(b"x", b"x" * 600), "ends too early"),
    "pax-size-is-huge": (pax({b"size": b"9" * 18}) + member(b"x"), "does not fit"),
    "pax-size-has-no-end": (pax({b"size": b"9" * 5000}) + member(b"x"), "no number"),
    "pax-time-is-none": (pax({b"mtime": b"nan"}) + member(b"x"), "no number"),
    "pax-length-lies": (pax(b"99 path=x\n") + member(b"x"), "pax record"),
    "pax-length-of-zero": (pax(b"0 path=x\n") + member(b"x"), "pax record"),
    "pax-length-of-two": (pax(b"2 path=x\n") + member(b"x"), "pax record"),
    "pax-without-a-length": (pax(b"path=x\n") + member(b"x"), "no number"),
    "pax-without-a-line": (pax(b"9 path=xy") + member(b"x"), "pax record"),
    "pax-without-a-value": (pax(b"7 path\n") + member(b"x"), "pax record"),
    "pax-name-with-zeros": (pax({b"path": b"a\0b"}) + member(b"x"), "not what Linux can have"),
    "pax-about-nothing": (pax({b"path": b"x"}), "ends too early"),
    "pax-too-long": (header(b"pax", b"x", 2 * MIB) + bytes(2 * MIB), "too long"),
    "global-pax-too-long": (header(b"pax", b"g", 2 * MIB) + bytes(2 * MIB), "too long"),
    "pax-that-promises": (header(b"pax", b"x", large(1 << 50)), "too long"),
    "pax-below-zero": (header(b"pax", b"x", large(-1)), "too long"),
    "pax-without-end": (pax({b"path": b"x"}) * 1000, "too long"),
    "name-too-long": (header(b"@", b"L", 2 * MIB) + bytes(2 * MIB), "too long"),
    "name-of-256": (pax({b"path": b"n" * 256}) + member(b"x"), "longer than a name"),
    "path-of-4096": (pax({b"path": b"n/" * 2048}) + member(b"x"), "longer than a name"),
    "name-up": (member(b"a/../b"), "leads up"),
    "name-up-only": (header(b"..", b"5"), "leads up"),
    "name-up-absolute": (member(b"/../b"), "leads up"),
    "link-up": (member(b"x") + header(b"y", b"1", target=b"../x"), "leads up"),
    "link-to-nothing": (header(b"y", b"1", target=b"x"), "no file"),
    "link-to-itself": (header(b"y", b"1", target=b"y"), "no file"),
    "link-to-what-comes": (header(b"y", b"1", target=b"x") + member(b"x"), "no file"),
    "link-to-a-directory": (header(b"x", b"5") + header(b"y", b"1", target=b"x"), "no file"),
    "link-to-the-root": (header(b"y", b"1", target=b"."), "no file"),
    "link-as-the-root": (member(b"x") + header(b".", b"1", target=b"x"), "no directory"),
    "root-is-a-file": (member(b"./"[:1], b"x"), "no directory"),
    "link-without-target": (header(b"x", b"2"), "not what Linux can have"),
    "link-of-links": (
        header(b"a", b"2", target=b"b") + header(b"b", b"2", target=b"a") + member(b"a/x"),
        "too many links",
    ),
    "file-as-directory": (member(b"a") + member(b"a/b/c"), "no directory"),
    "file-through-link": (
        member(b"a") + header(b"b", b"2", target=b"a") + member(b"b/c"),
        "no directory",
    ),
    "device-beyond-all": (header(b"x", b"3", rest=bytes(64) + b"7777777\0" * 2), "device"),
    "unknown-type": (member(b"x", kind=b"Z"), "of the type"),
    "multi-volume": (member(b"x", kind=b"M"), "of the type"),
    "acl-of-nobody": (pax({b"SCHILY.acl.access": b"user:joe:rwx"}) + member(b"x"), "number"),
    "acl-of-nonsense": (pax({b"SCHILY.acl.access": b"?" * 50}) + member(b"x"), "access control"),
    "attribute-of-bytes": (pax({b"SCHILY.xattr.user.\n": b""}) + member(b"x"), "no name"),
    "attribute-with-quotes": (pax({b'SCHILY.xattr.user."': b""}) + member(b"x"), "no name"),
    "attribute-too-long": (pax({b"SCHILY.xattr.user.x": b"x" * 65536}) + member(b"x"), "attribute"),
    "sparse-out-of-order": (
        header(
            b"x",
            b"S",
            1024,
            magic=b"ustar  \0",
            rest=old_sparse(*map(digits, (512, 512, 0, 512)), size=digits(2048)),
        )
        + bytes(1024),
        "contradicts",
    ),
    "sparse-beyond-its-size": (
        header(
            b"x",
            b"S",
            512,
            magic=b"ustar  \0",
            rest=old_sparse(*map(digits, (512, 512)), size=digits(600)),
        )
        + bytes(512),
        "contradicts",
    ),
    "sparse-with-less": (
        header(
            b"x",
            b"S",
            512,
            magic=b"ustar  \0",
            rest=old_sparse(*map(digits, (0, 1024)), size=digits(2048)),
        )
        + bytes(512),
        "contradicts",
    ),
    "sparse-below-zero": (
        header(b"x", b"S", magic=b"ustar  \0", rest=old_sparse(size=large(-5))),
        "contradicts",
    ),
    "sparse-without-end": (
        header(b"x", b"S", magic=b"ustar  \0", rest=old_sparse(more=b"\1", size=digits(2048)))
        + (b"".join(map(digits, (0, 0))) * 21 + b"\1").ljust(BLOCK, b"\0") * 10_000,
        "no end",
    ),
    "sparse-map-of-noise": (
        pax({**SPARSE, b"GNU.sparse.realsize": b"5"}) + member(b"x", b"?" * 5000),
        "no end",
    ),
    "sparse-map-that-promises": (
        pax({**SPARSE, b"GNU.sparse.realsize": b"5"}) + member(b"x", b"999999999\n".ljust(512)),
        "no end",
    ),
    "sparse-map-without-size": (pax(SPARSE) + member(b"x", b"0\n".ljust(512, b"\0")), "no number"),
    "sparse-map-in-halves": (
        pax({b"GNU.sparse.size": b"9", b"GNU.sparse.map": b"0,1,2"}) + member(b"x", b"x"),
        "map is none",
    ),
    "half-a-header": (member(b"x")[:300], "ends too early"),
    "half-an-end": (member(b"x") + bytes(100), "ends too early"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(what: str, cache: Path, tmp_path: Path) -> None:
    data, says = WRONG[what]
    path = tmp_path / "wrong.tar"
    path.write_bytes(data + (b"" if what.startswith("half") else END))
    with pytest.raises(InvalidInput, match=f"(?s){path}.*{says}"):
        root_disk(resolve(f"tar:{path}"), DISK)


@pytest.mark.parametrize("name", [b".wh.", b".wh..", b".wh...", b"a/.wh..", b"a/.wh..."])
def test_whiteouts_of_what_is_above(name: bytes, cache: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add([layer([directory("a"), file("a/x")]), member(name) + END])
    with pytest.raises(InvalidInput, match="whiteout of nothing"):
        root_disk(resolve(layout.reference()), DISK)


#: By name: layers, and what is in the image besides what all have; a directory ends in a slash.
RIGHT: dict[str, tuple[list[list[Entry]], set[str]]] = {
    "a file again": ([[file("a", b"1"), file("a", b"2")]], {"a"}),
    "a directory after a file": ([[file("a"), directory("a"), file("a/b")]], {"a/", "a/b"}),
    "a file after a directory": ([[directory("a"), file("a/b"), file("a")]], {"a"}),
    "a directory after a link": (
        [[directory("b"), symlink("a", "b")], [directory("a"), file("a/x")]],
        {"a/", "a/x", "b/"},
    ),
    "through a link": (
        [[directory("b"), symlink("a", "/b")], [file("a/x"), file("a/.wh.y")]],
        {"a", "b/", "b/x"},
    ),
    "through a link to nothing": (
        [[symlink("a", "new/place"), file("a/x")]],
        {"a", "new/", "new/place/", "new/place/x"},
    ),
    "through a link up": (
        [[directory("d"), symlink("d/up", "../../../e"), file("d/up/x")]],
        {"d/", "d/up", "e/", "e/x"},
    ),
    "a parent that is missing": ([[file("a/b/c")]], {"a/", "a/b/", "a/b/c"}),
    "a parent after its child": ([[file("a/b"), directory("a", 0o700)]], {"a/", "a/b"}),
    "absolute names": ([[file("/a"), file("//b//c")], [file("/.wh.a")]], {"b/", "b/c"}),
    "a whiteout of the same layer": ([[file("a")], [file("a"), file(".wh.a")]], {"a"}),
    "a whiteout before": ([[file("a")], [file(".wh.a"), file("a")]], {"a"}),
    "a whiteout of nothing": ([[file("a")], [file(".wh.b"), file("c/.wh.d")]], {"a"}),
    "a whiteout of a parent": (
        [[file("a/b/c")], [file("a/b/new"), file(".wh.a")]],
        {"a/", "a/b/", "a/b/new"},
    ),
    "a whiteout of a link": (
        [[directory("b"), file("b/x"), symlink("a", "b")], [file(".wh.a")]],
        {"b/", "b/x"},
    ),
    "an opaque directory at the end": (
        [
            [file("a/old"), file("a/b/old")],
            [file("a/b/new"), file("a/new"), file("a/.wh..wh..opq")],
        ],
        {"a/", "a/new", "a/b/", "a/b/new"},
    ),
    "an opaque root": ([[file("a"), file("b/c")], [file(".wh..wh..opq"), file("d")]], {"d"}),
    "opaque twice": (
        [[file("a/x")], [file("a/.wh..wh..opq"), file("a/y"), file("a/.wh..wh..opq")], [file("z")]],
        {"a/", "a/y", "z"},
    ),
    "hidden again": ([[file("a/x")], [file(".wh.a")], [file("a/y")], [file("a/.wh.y")]], {"a/"}),
    "a hard link over its file": ([[file("a"), hard_link("a", "a")]], {"a"}),
    "a hard link through a link": (
        [[directory("b"), file("b/x"), symlink("a", "b"), hard_link("c", "a/x")]],
        {"a", "b/", "b/x", "c"},
    ),
    "lost+found is a file": ([[file("lost+found")]], set()),
    "lost+found is full": ([[file("lost+found/x")]], {"lost+found/x"}),
}


@pytest.mark.parametrize("what", RIGHT)
def test_what_is_odd_is_right(what: str, look: Look, tmp_path: Path) -> None:
    layers, expected = RIGHT[what]
    layout = Layout(tmp_path / "layout")
    layout.add([layer(entries) for entries in layers])
    root = look(layout.reference())
    own = {"proc/", "sys/", "dev/", "run/", "tmp/", "etc/", "lost+found/"}
    found = {
        str(path.relative_to(root)) + "/" * (path.is_dir() and not path.is_symlink())
        for path in root.rglob("*")
    }
    assert {name for name in found if not name.startswith("etc/")} - own == expected


def test_the_last_of_two_files_is_the_one(look: Look, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add([layer([file("a", b"one", 0o600), file("a", b"two!", 0o755)])])
    path = look(layout.reference()) / "a"
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"two!", 0o755)


def test_names_of_whiteouts_are_names_in_a_tarball(look: Look, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(layer([file("a/b"), file("a/.wh.b"), file("a/.wh..wh..opq")]))
    root = look(f"tar:{tmp_path}/x.tar")
    assert {path.name for path in (root / "a").iterdir()} == {"b", ".wh.b", ".wh..wh..opq"}


# Without end --------------------------------------------------------------------------------------


def sparse_bomb(count: int) -> bytes:
    size = b"\x80" + (1 << 40).to_bytes(11)
    return b"".join(
        header(b"%d" % number, b"S", magic=b"ustar  \0", rest=old_sparse(size=size))
        for number in range(count)
    )


BOMBS = {
    "sparse": sparse_bomb(1),
    "many-sparse": b"".join(
        pax({b"GNU.sparse.size": b"%d" % (DISK - 1), b"GNU.sparse.map": b""}) + member(b"%d" % n)
        for n in range(5000)
    ),
    "the-same-name": member(b"x", bytes(MIB)) * 300,
    "what-is-hidden": member(b"x", bytes(32 * MIB)) * 9,
    "zeros-after-the-end": member(b"x") + bytes(300 * MIB),
}


@pytest.mark.parametrize("kind", ["oci", "tar"])
@pytest.mark.parametrize("what", BOMBS)
def test_bombs(what: str, kind: str, cache: Path, tmp_path: Path) -> None:
    if kind == "oci":
        layout = Layout(tmp_path / "layout")
        layout.add([BOMBS[what] + END])
        reference = layout.reference()
    else:
        (tmp_path / "bomb.tar").write_bytes(gzip.compress(BOMBS[what] + END, 1))
        reference = f"tar:{tmp_path}/bomb.tar"
    with pytest.raises(InvalidInput, match="does not fit on a disk of 64 MiB"):
        root_disk(resolve(reference), DISK)


def test_a_hidden_sparse_bomb_among_lower_layers(cache: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add([sparse_bomb(1) + END, layer([file(".wh.0")])])
    with pytest.raises(InvalidInput, match="does not fit"):
        root_disk(resolve(layout.reference()), DISK)


def many(count: int) -> bytes:
    """A gzip of so many empty files, a hundred in a directory."""
    names = (b"%d/%d/%d" % (n // 10_000, n // 100 % 100, n) for n in range(count))
    return gzip.compress(b"".join(header(name) for name in names) + END, 1)


def test_a_hundred_thousand_files(cache: Path, tmp_path: Path) -> None:
    """They are there on a disk that has room for them, and are refused on a smaller one."""
    (tmp_path / "many.tar").write_bytes(many(100_000))
    image = resolve(f"tar:{tmp_path}/many.tar")
    with pytest.raises(InvalidInput, match="does not fit"):
        root_disk(image, DISK)
    raw = tmp_path / "disk.raw"
    disk = root_disk(image, 2 * GIB)
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, raw], check=True)
    done = subprocess.run(["e2fsck", "-fn", raw], check=True, capture_output=True, text=True)
    files = int(done.stdout.rpartition(": ")[2].partition("/")[0])
    assert files > 101_000


@pytest.mark.parametrize("what", ["names", "links"])
def test_more_names_than_ext4_counts(what: str, cache: Path, tmp_path: Path) -> None:
    kind = {"names": b"0", "links": b"1"}[what]
    names = b"".join(header(b"d/%d" % number, kind, target=b"x") for number in range(65_001))
    (tmp_path / "wide.tar").write_bytes(gzip.compress(member(b"x") + names + END, 1))
    with pytest.raises(InvalidInput, match="more than 65,000 names"):
        root_disk(resolve(f"tar:{tmp_path}/wide.tar"), GIB)


SCRIPT = """
import resource, sys
from pathlib import Path
from ratoon.engine.sources.layers import Layers
from ratoon.engine.sources.disk import make_disk
from ratoon.errors import InvalidInput
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
layers = Layers("x", int(sys.argv[2]))
try:
    layers.add(Path(sys.argv[1]), "x", whiteouts=False)
    make_disk(Path(sys.argv[3]), int(sys.argv[2]), "x", layers.tree, layers.contents)
except InvalidInput as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def memory_for(data: bytes, disk_bytes: int, place: Path) -> tuple[str, int]:
    """What was said of an archive, and the memory that reading it took."""
    path, room = place / "x.tar", place / "room"
    path.write_bytes(data)
    room.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, path, str(disk_bytes), room],
        check=True,
        capture_output=True,
        text=True,
    )
    *said, grown = done.stdout.splitlines()
    return " ".join(said), int(grown)


def test_memory_does_not_grow_with_what_is_in_files(tmp_path: Path) -> None:
    large_file = gzip.compress(member(b"x", bytes(200 * MIB)) + END, 1)
    said, grown = memory_for(large_file, 256 * MIB, tmp_path)
    assert not said
    assert grown < 64 * MIB


def test_names_and_attributes_are_held_up_to_a_bound(tmp_path: Path) -> None:
    """A thousand of them are a mebibyte; they compress to nothing."""
    attributes = {b"SCHILY.xattr.user.%d" % number: bytes(60_000) for number in range(17)}
    one = pax(attributes)
    data = b"".join(one + member(b"%d" % number) for number in range(600))
    said, grown = memory_for(gzip.compress(data + END, 1), GIB, tmp_path)
    assert "more names than" in said
    assert grown < 700 * MIB


def test_paths_are_held_up_to_a_bound(tmp_path: Path) -> None:
    """Names are short, and paths are long: a link leads deeper each time."""
    deep = b"/".join([b"d" * 200] * 15)
    entries = [pax({b"path": deep}) + header(b"", b"5")]
    entries.append(pax({b"linkpath": deep}) + header(b"l", b"2", target=b"-"))
    entries += (header(b"l/%d" % number, b"0") for number in range(200_000))
    said, grown = memory_for(gzip.compress(b"".join(entries) + END, 1), 8 * GIB, tmp_path)
    assert "more names than" in said or "65,000" in said
    assert grown < 700 * MIB


def test_links_that_lead_ever_deeper(cache: Path, tmp_path: Path) -> None:
    """Each is short, but all together they make a path that nobody could name."""
    down = b"/".join([b"d"] * 100)
    entries, here = [], b"."
    for number in range(30):
        name = b"l%d" % number
        entries.append(pax({b"linkpath": here}) + header(name, b"2", target=b"-"))
        here = name + b"/" + down
        entries.append(pax({b"path": here}) + header(b"", b"5"))
    (tmp_path / "deep.tar").write_bytes(b"".join(entries) + END)
    with pytest.raises(InvalidInput, match="longer than a path can be"):
        root_disk(resolve(f"tar:{tmp_path}/deep.tar"), DISK)


# At random ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_damage_of_any_kind(seed: int, cache: Path, tmp_path: Path) -> None:
    """Bytes changed at random in an archive of all kinds: a disk that is sound, or an error."""
    chance = random.Random(seed)
    whole = bytearray(
        pax({b"mtime": b"1.5", b"SCHILY.xattr.user.x": b"y"})
        + member(b"a/b", b"content" * 100)
        + header(b"c", b"1", target=b"a/b")
        + header(b"d", b"2", target=b"a")
        + header(b"e", b"5")
        + member(b"e/.wh.f", b"")
        + member(b"e/g", b"z" * 1000)
        + pax({b"GNU.sparse.size": b"900", b"GNU.sparse.map": b"0,1,899,1"})
        + member(b"h", b"xy")
        + END
    )
    said = []
    for number in range(12):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data))
            data[at] = chance.randrange(256)
            start = at - at % BLOCK  # so that it is not the checksum that tells
            block = data[start : start + BLOCK]
            if block[257:262] == b"ustar":
                total = sum(block[:148]) + sum(block[156:]) + 256
                data[start + 148 : start + 156] = b"%06o\0 " % total
        layout = Layout(tmp_path / f"layout{number}")
        layout.add([layer([file("a/x")]), bytes(data)])
        try:
            disk = root_disk(resolve(layout.reference()), DISK)
        except RatoonError as error:
            said.append(str(error))
            continue
        raw = tmp_path / "disk.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", disk, raw], check=True)
        subprocess.run(["e2fsck", "-fn", raw], check=True, capture_output=True)
    assert all(str(tmp_path) in each for each in said)
