"""Layers that were made to do harm: each is refused, or harms its own disk alone."""

from __future__ import annotations

import gzip
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_looks import DISK, Look

from oci_images import Entry, Layout, device, directory, entry, file, hard_link, layer, symlink
from ratoon.engine.sources.resolve import resolve, root_disk
from ratoon.errors import Corrupt, HostError, InvalidInput, RatoonError
from ratoon.units import MIB

pytest_plugins = ["image_fixtures"]

#: Where a layer would like to write on the host.
MARK = "ratoon-hostile-mark"
PLACES = (Path("/"), Path("/tmp"), Path("/etc"), Path("/dev/shm"))


@pytest.fixture(autouse=True)
def _host(tmp_path: Path) -> Iterator[None]:
    """Nothing of the host is changed: no mark is found, and nothing in the directories above."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    before = secret.stat()
    yield
    assert [place / MARK for place in PLACES if os.path.lexists(place / MARK)] == []
    assert not list(tmp_path.glob(f"**/{MARK}"))
    assert secret.read_text() == "secret"
    assert (secret.stat().st_nlink, secret.stat().st_mode) == (1, before.st_mode)


def up(path: str | Path) -> str:
    """A path that leads up and out, from wherever it is, to `path` of the host."""
    return "../" * 40 + str(path).lstrip("/")


TRAVERSALS: dict[str, list[Entry]] = {
    "up": [file(up(f"/tmp/{MARK}"))],
    "absolute": [file(f"/tmp/{MARK}")],
    "up-in-the-middle": [directory("a"), file(f"a/{up('/tmp')}/{MARK}")],
    "link": [symlink("a", "/tmp"), file(f"a/{MARK}")],
    "link-up": [symlink("a", up("/tmp")), file(f"a/{MARK}")],
    "chain": [symlink("a", "b"), symlink("b", "c"), symlink("c", up("/")), file(f"a/tmp/{MARK}")],
    "directory-through-link": [symlink("a", "/tmp"), directory(f"a/{MARK}")],
    "link-through-link": [symlink("a", "/tmp"), symlink(f"a/{MARK}", "x")],
    "loop": [symlink("a", "b"), symlink("b", "a"), file(f"a/{MARK}")],
    "root-is-a-link": [symlink(".", "/tmp"), file(MARK)],
    "root-is-a-file": [file("."), file("x")],
    "whiteout": [file(f"{up('/tmp')}/.wh.{MARK}")],
    "opaque": [symlink("a", "/tmp"), file("a/.wh..wh..opq")],
    "link-over-itself": [symlink("a", "a"), file("a/x")],
}


@pytest.mark.parametrize("name", TRAVERSALS)
@pytest.mark.parametrize("kind", ["oci", "tar"])
def test_nothing_is_written_elsewhere(name: str, kind: str, look: Look, tmp_path: Path) -> None:
    """It is refused, or lands in the image: its links lead to places there, as in the guest."""
    bystander = Path("/tmp") / f"{MARK}-bystander-{os.getpid()}"
    bystander.touch()
    try:
        if kind == "oci":
            layout = Layout(tmp_path / "layout")
            # Each entry in a layer of its own is what an extractor may have checked one by one.
            layout.add([layer([each]) for each in TRAVERSALS[name]])
            reference = layout.reference()
        else:
            (tmp_path / "x.tar").write_bytes(layer(TRAVERSALS[name]))
            reference = f"tar:{tmp_path}/x.tar"
        try:
            root = look(reference)
        except RatoonError:
            return
        assert stat.S_ISDIR((root / "etc").stat().st_mode)
        assert (root / "etc/hosts").is_file()
    finally:
        assert bystander.exists()
        bystander.unlink()


@pytest.mark.parametrize("kind", ["oci", "tar"])
def test_a_hard_link_to_a_file_of_the_host_is_none(kind: str, look: Look, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    for number, target in enumerate((str(secret), up(secret))):
        for entries in (
            [hard_link("stolen", target), file("stolen", b"overwritten")],
            [symlink("a", "/"), hard_link("stolen", f"a{secret}")],
        ):
            place = tmp_path / f"{number}{len(entries[0][0].name)}{entries[0][0].type!r}"
            if kind == "oci":
                layout = Layout(place)
                layout.add([layer(entries)])
                reference = layout.reference()
            else:
                place.mkdir()
                (place / "x.tar").write_bytes(layer(entries))
                reference = f"tar:{place}/x.tar"
            try:
                root = look(reference)
            except (HostError, InvalidInput):
                continue
            stolen = root / "stolen"
            assert not stolen.exists() or stolen.read_bytes() != b"secret"


def test_devices_and_setuid_files_are_the_guests_alone(look: Look, tmp_path: Path) -> None:
    """They are on the disk, as they shall be in the guest; here they can do nothing."""
    layout = Layout(tmp_path / "layout")
    layout.add(
        [
            layer(
                [
                    device("memory", tarfile.CHRTYPE, 1, 1, 0o666),
                    device("disk", tarfile.BLKTYPE, 8, 0, 0o666),
                    device("pipe", tarfile.FIFOTYPE, 0, 0),
                    file("root-shell", Path("/bin/true").read_bytes(), 0o6755),
                    file("made-it", b"#!/bin/sh\n", 0o4777),
                ]
            )
        ]
    )
    root = look(layout.reference())
    assert (root / "memory").stat().st_rdev == os.makedev(1, 1)
    assert (root / "disk").stat().st_rdev == os.makedev(8, 0)
    assert stat.S_ISFIFO((root / "pipe").stat().st_mode)
    assert stat.S_IMODE((root / "root-shell").stat().st_mode) == 0o6755


# Sizes --------------------------------------------------------------------------------------------


def zeros(name: str, size: int) -> bytes:
    """A tar with one file of zeros, its header by itself: the content is not in memory."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT)


def compressed_zeros(name: str, size: int) -> bytes:
    """The same with its content, which is small when it is compressed."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as packed:
        packed.write(zeros(name, size))
        for _ in range(size // MIB):
            packed.write(bytes(MIB))
        packed.write(bytes(1024))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["oci", "tar"])
def test_a_bomb_ends_where_the_disk_does(kind: str, cache: Path, tmp_path: Path) -> None:
    bomb = compressed_zeros("bomb", 512 * MIB)
    assert len(bomb) < 4 * MIB
    if kind == "oci":
        layout = Layout(tmp_path / "layout")
        layout.add([bomb], compress=bytes)  # whose diff_id is wrong: nobody gets that far
        reference = layout.reference()
    else:
        (tmp_path / "bomb.tar").write_bytes(bomb)
        reference = f"tar:{tmp_path}/bomb.tar"
    with pytest.raises(InvalidInput, match=r"does not fit on a disk of 64 MiB.*--disk-size"):
        root_disk(resolve(reference), DISK)
    left = sum(path.stat().st_blocks * 512 for path in cache.rglob("*") if path.is_file())
    assert left < 8 * MIB, "what was unpacked is gone"


def test_a_sparse_file_of_a_tebibyte(cache: Path, tmp_path: Path) -> None:
    """Old GNU format: a header says that it is all a hole."""
    info = tarfile.TarInfo("huge")
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = b"S"
    block[257:265] = b"ustar  \0"
    size = 1 << 40
    block[483:495] = b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    data = bytes(block) + bytes(1024)
    layout = Layout(tmp_path / "layout")
    layout.add([data])
    with pytest.raises((InvalidInput, HostError), match=str(layout.path)):
        root_disk(resolve(layout.reference()), DISK)
    (tmp_path / "huge.tar").write_bytes(data)
    try:
        disk = root_disk(resolve(f"tar:{tmp_path}/huge.tar"), DISK)
    except (InvalidInput, HostError):
        return
    assert disk.stat().st_size < 8 * MIB


def test_a_header_that_promises_too_much(cache: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add([zeros("huge", 1 << 40)])
    with pytest.raises((InvalidInput, HostError, Corrupt), match=str(layout.path)):
        root_disk(resolve(layout.reference()), DISK)


def test_too_many_files_do_not_fit_either(cache: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add([layer([entry(f"{n}", tarfile.REGTYPE) for n in range(20_000)])])
    with pytest.raises(InvalidInput, match="does not fit"):
        root_disk(resolve(layout.reference()), DISK)


def test_a_host_without_room_is_not_taken_for_a_small_disk(cache: Path, tmp_path: Path) -> None:
    """Not even where that is full before the disk is."""
    layout = Layout(tmp_path / "layout")
    layout.add([layer([file("x", os.urandom(8 * MIB))])])
    image = resolve(layout.reference())
    (cache / "root-images").mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "small", cache / "root-images"], check=True
    )
    try:
        with pytest.raises(HostError, match="No space left on device"):
            root_disk(image, DISK)
    finally:
        subprocess.run(["umount", "--lazy", cache / "root-images"], check=True)


# Nonsense -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        *(b"?" * 10_000, gzip.compress(b"?" * 10_000), gzip.compress(b"")[:7]),
        layer([file("x", b"x" * 5000)])[:3000],
    ],
    ids=["noise", "packed-noise", "cut-gzip", "cut-tar"],
)
def test_a_layer_that_is_none(data: bytes, cache: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.add([data], compress=bytes)
    with pytest.raises(RatoonError, match=str(layout.path)):
        root_disk(resolve(layout.reference()), DISK)


def test_a_layer_that_is_not_what_its_digests_say(cache: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    manifest = layout.add([layer([file("x")])])
    blob = layout.blob_path(manifest["layers"][0]["digest"])
    blob.write_bytes(gzip.compress(layer([file("y")]), 1, mtime=0))
    with pytest.raises((Corrupt, HostError), match=str(layout.path)):
        resolve(layout.reference())


def test_a_layer_whose_content_is_not_what_the_configuration_says(
    cache: Path, tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "layout")
    other = gzip.compress(layer([file("y")]), 1, mtime=0)
    layout.add([layer([file("x")])], compress=lambda data: other)
    with pytest.raises((Corrupt, HostError), match=str(layout.path)):
        root_disk(resolve(layout.reference()), DISK)


@pytest.mark.parametrize("text", ["{}", "[]", "no", '{"manifests": [{}]}', "{" * 100_000, ""])
def test_a_layout_that_is_none(text: str, cache: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    (layout.path / "index.json").write_text(text)
    with pytest.raises(RatoonError, match=str(layout.path)):
        resolve(f"oci:{layout.path}")


def test_a_directory_that_is_no_layout(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is no OCI layout: No such file"):
        resolve(f"oci:{tmp_path}")
