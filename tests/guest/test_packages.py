"""What guests are built of: as the lock file says, fetched or found, unpacked once, and whole."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import small_images
from debian_mirror import Mirror, deb, lock_of, mirror
from oci_images import Entry, directory, entry, file, symlink
from ratoon.errors import Corrupt, HostError
from ratoon.machine.guest import cpio, debs, mirrors, packages
from ratoon.machine.guest.build import PYTHON_PACKAGES
from ratoon.machine.guest.modules import DEPMOD_PACKAGES


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """The only mirror that is asked."""
    with mirror() as found:
        monkeypatch.setattr(packages, "mirrors", lambda archive, date: [found.address])
        monkeypatch.setattr(mirrors, "PAUSE", 0)
        monkeypatch.setenv("RATOON_CACHE", str(tmp_path / "cache"))
        yield found


def test_what_is_locked_is_what_the_guest_takes() -> None:
    kernel, *others = packages.locked().packages
    assert re.fullmatch(r"linux-image-6\.1\.\d+-\d+-cloud-amd64", kernel.name)
    assert [package.name for package in others] == [*PYTHON_PACKAGES, *DEPMOD_PACKAGES]
    for package in (kernel, *others):
        assert package.path.startswith("pool/")
        assert package.file.endswith(("_amd64.deb", "_all.deb"))


def test_they_are_fetched_once(there: Mirror) -> None:
    lock = lock_of(there.add("a", [file("./usr/a", b"A")]), there.add("b", [file("usr/b", b"B")]))
    said: list[str] = []
    tree = packages.unpacked(lock, said.append)
    assert [(tree / name).read_bytes() for name in ("usr/a", "usr/b")] == [b"A", b"B"]
    assert packages.unpacked(lock) == tree
    assert len(there.asked) == 2
    assert said[1:] == ["fetching a 1, 0.0 MiB (1 of 2)", "fetching b 1, 0.0 MiB (2 of 2)"]
    assert packages.unpacked(lock.named(["b"])) != tree


def test_a_mirror_that_has_it_no_more(there: Mirror, tmp_path: Path) -> None:
    lock = lock_of(there.add("a", [file("a")]), there.add("b", [file("b")]))
    del there.files[lock.packages[1].path]
    with pytest.raises(HostError) as raised:
        packages.unpacked(lock)
    for part in ("b_1_amd64.deb", there.address, "404", "update_guest.py", "newer", "--from DIR"):
        assert part in str(raised.value)
    assert [path.suffix for path in (tmp_path / "cache/packages").iterdir()] == [".lock"]


def test_for_a_host_without_network(there: Mirror, tmp_path: Path) -> None:
    lock = lock_of(there.add("a", [file("a", b"A")]), there.add("b", [file("b", b"B")]))
    place = tmp_path / "some/place"
    packages.download(lock, place)
    assert sorted(path.name for path in place.iterdir()) == ["a_1_amd64.deb", "b_1_amd64.deb"]
    asked = len(there.asked)
    tree = packages.unpacked(lock, directory=place)
    assert (tree / "b").read_bytes() == b"B"
    assert len(there.asked) == asked


def test_a_download_goes_on_where_it_was(there: Mirror, tmp_path: Path) -> None:
    a, b = there.add("a", [file("a", b"A")]), there.add("b", [file("b", b"B")])
    there.failures[b.path] = ["missing"]
    with pytest.raises(HostError):
        packages.download(lock_of(a, b), tmp_path / "place")
    assert [path.name for path in (tmp_path / "place").iterdir()] == [a.file]
    packages.download(lock_of(a, b), tmp_path / "place")
    assert there.asked == [a.path, b.path, b.path]
    (tmp_path / "place" / a.file).write_bytes(b"damaged")
    packages.download(lock_of(a, b), tmp_path / "place")
    assert there.asked[3:] == [a.path]


def test_a_directory_that_lacks_some(there: Mirror, tmp_path: Path) -> None:
    a = there.add("a", [file("a")])
    with pytest.raises(HostError, match=rf"{a.file} is not there; .*--download-only"):
        packages.unpacked(lock_of(a), directory=tmp_path)
    (tmp_path / a.file).write_bytes(b"something else")
    with pytest.raises(HostError, match=rf"{a.file} is not what it was"):
        packages.unpacked(lock_of(a), directory=tmp_path)
    assert there.asked == []


# What is in a package -----------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["xz", "zst", "gz"])
def test_files_links_and_modes(tmp_path: Path, packing: str) -> None:
    entries = [
        directory("./"),
        directory("./bin"),
        file("./bin/program", b"#!", 0o4755),
        symlink("./bin/away", "/etc/passwd"),
        entry("./bin/same", b"1", target="./bin/program"),
        file("./data", b"x", 0o640),
    ]
    debs.unpack(deb(entries, packing), tmp_path)
    assert (tmp_path / "bin/program").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "bin/same").samefile(tmp_path / "bin/program")
    assert (tmp_path / "bin/away").readlink() == Path("/etc/passwd")
    assert (tmp_path / "data").read_bytes() == b"x"


@pytest.mark.parametrize(
    "hostile",
    [
        file("../out", b"x"),
        file("/out", b"x"),
        file("a/../../out", b"x"),
        entry("in", b"1", target="../out"),
    ],
)
def test_nothing_gets_outside(tmp_path: Path, hostile: Entry) -> None:
    with pytest.raises(Corrupt, match="outside"):
        debs.unpack(deb([hostile]), tmp_path / "root")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"no package", b"!<arch>\n", deb([file("a")])[:-80]])
def test_what_is_no_package(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(Corrupt):
        debs.unpack(content, tmp_path)


# The archive --------------------------------------------------------------------------------------


def test_a_tree_in_a_fixed_order_directories_first(tmp_path: Path) -> None:
    for name in ("b/c/file", "b/a", "a-b/file", "a/file", "z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "y").symlink_to("b")
    (tmp_path / "empty").mkdir()
    walked = [str(path.relative_to(tmp_path)) for path in cpio.walk(tmp_path)]
    assert walked == [
        *("a", "a/file", "a-b", "a-b/file", "b", "b/a", "b/c", "b/c/file"),
        *("empty", "y", "z"),
    ]


def test_an_archive_as_others_read_it(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "some/where").mkdir(parents=True)
    (tree / "some/program").write_bytes(b"#!/bin/sh\n")
    (tree / "some/program").chmod(0o700)
    (tree / "some/same").hardlink_to(tree / "some/program")
    (tree / "some/data").write_bytes(bytes(range(256)) * 33)
    (tree / "some/data").chmod(0o600)
    (tree / "link").symlink_to("some/where")
    (tmp_path / "read").mkdir()
    subprocess.run(
        [small_images.BUSYBOX, "cpio", "-id"],
        input=cpio.archive(tree),
        cwd=tmp_path / "read",
        check=True,
        capture_output=True,
    )
    read = tmp_path / "read"
    assert (read / "link").readlink() == Path("some/where")
    assert (read / "some/program").read_bytes() == b"#!/bin/sh\n"
    assert (read / "some/same").samefile(read / "some/program")
    assert (read / "some/data").read_bytes() == bytes(range(256)) * 33
    modes = {path.name: path.stat().st_mode & 0o777 for path in read.rglob("*")}
    assert modes == {
        **{"some": 0o755, "where": 0o755, "link": 0o755},
        **{"program": 0o755, "same": 0o755, "data": 0o644},
    }
