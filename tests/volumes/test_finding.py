"""Files are found again by their handles, whatever has become of their names."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from nfs_client import KEY, NOTHING, OK, STALE, Guest

from ratoon.machine.volumes import finding
from ratoon.machine.volumes.export import Export
from ratoon.machine.volumes.finding import ByPlace, kernel_handle
from ratoon.machine.volumes.xdr import Writer

pytest_plugins = ["ways_of_finding"]
pytestmark = pytest.mark.usefixtures("finder")


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    volume = tmp_path / "volume"
    (volume / "a/b").mkdir(parents=True)
    (volume / "a/b/file").write_text("content")
    (volume / "c").mkdir()
    return volume


@pytest.fixture
def guest(volume: Path) -> Iterator[Guest]:
    with closing(Export(volume, KEY, read_only=False)) as export:
        yield Guest(export)


def find(guest: Guest, path: str) -> bytes:
    found = guest.exports[0].handles.root
    for name in os.fsencode(path).split(b"/"):
        found = guest.lookup(found, name)
    return found


def status(guest: Guest, handle: bytes) -> int:
    return guest.status("getattr", Writer().opaque(handle))


def rename(guest: Guest, directory: str, old: bytes, to: str, new: bytes) -> int:
    source, target = find(guest, directory), find(guest, to)
    arguments = Writer().opaque(source).opaque(old).opaque(target).opaque(new)
    return guest.status("rename", arguments)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What whole volumes were looked through for."""
    wanted: list[bytes] = []
    real = ByPlace._look_for

    def look_for(self: ByPlace, file: bytes) -> None:
        wanted.append(file)
        real(self, file)

    monkeypatch.setattr(ByPlace, "_look_for", look_for)
    return wanted


# What the guest does ------------------------------------------------------------------------------


def test_what_the_guest_renames_is_not_looked_for(guest: Guest, searches: list[bytes]) -> None:
    file = find(guest, "a/b/file")
    assert rename(guest, "a/b", b"file", "c", b"moved") == OK
    assert guest.read(file) == b"content"
    assert rename(guest, "a", b"b", "c", b"d") == OK
    assert rename(guest, "c", b"moved", "c/d", b"again") == OK
    assert rename(guest, "c", b"d", "a", b"e") == OK
    assert guest.read(file) == b"content"
    assert searches == []


def test_what_the_guest_writes_over_is_not_looked_for(
    guest: Guest, volume: Path, searches: list[bytes]
) -> None:
    """As editors do: a new file takes the name of the old one."""
    old, directory = find(guest, "a/b/file"), find(guest, "a/b")
    create = Writer().opaque(directory).opaque(b"new").u32(1).raw(NOTHING)
    assert guest.status("create", create) == OK
    new = find(guest, "a/b/new")
    assert guest.write(new, b"later") == OK
    assert rename(guest, "a/b", b"new", "a/b", b"file") == OK
    assert guest.read(new) == b"later"
    assert searches == []
    assert status(guest, old) == STALE


def test_of_two_names_the_last_one_may_be_left(guest: Guest, searches: list[bytes]) -> None:
    """As mail is delivered: written, linked to its name, and the first name removed."""
    file, new = find(guest, "a/b/file"), find(guest, "c")
    assert guest.status("link", Writer().opaque(file).opaque(new).opaque(b"second")) == OK
    first = Writer().opaque(find(guest, "a/b")).opaque(b"file")
    assert guest.status("remove", first) == OK
    assert guest.read(file) == b"content"
    assert searches == []
    assert guest.status("remove", Writer().opaque(new).opaque(b"second")) == OK
    assert status(guest, file) == STALE


# What the host does -------------------------------------------------------------------------------


def rewrite(volume: Path) -> None:
    (volume / "a/b/file").unlink()
    (volume / "a/b/file").write_text("another")


def link_and_rewrite(volume: Path) -> None:
    (volume / "c/second").hardlink_to(volume / "a/b/file")
    rewrite(volume)


@pytest.mark.parametrize(
    "change",
    [
        lambda volume: (volume / "a/b/file").rename(volume / "c/file"),
        lambda volume: (volume / "a/b").rename(volume / "c/b"),
        lambda volume: (volume / "a").rename(volume / "c/a"),
        lambda volume: (volume / "a/b/file").rename(volume / os.fsdecode(b"\xff\n")),
        link_and_rewrite,
    ],
    ids=["a file", "its directory", "the one above", "no text", "all but another name"],
)
def test_what_the_host_moves_is_found(
    guest: Guest, volume: Path, change: Callable[[Path], object]
) -> None:
    file, directory = find(guest, "a/b/file"), find(guest, "a/b")
    change(volume)
    assert guest.read(file) == b"content"
    assert status(guest, directory) == OK


def test_directories_that_change_places(guest: Guest, volume: Path) -> None:
    """By what is known of them, each is in the other then."""
    inner, outer = find(guest, "a/b"), find(guest, "a")
    (volume / "a/b").rename(volume / "x")
    (volume / "a").rename(volume / "x/a")
    assert find(guest, "x/a")
    assert status(guest, inner) == status(guest, outer) == OK
    assert guest.read(find(guest, "x/file")) == b"content"


def test_what_the_host_removes_is_gone(guest: Guest, volume: Path) -> None:
    file = find(guest, "a/b/file")
    rewrite(volume)
    assert status(guest, file) == STALE
    assert guest.read(find(guest, "a/b/file")) == b"another"


def test_a_link_is_itself(guest: Guest, volume: Path) -> None:
    (volume / "link").symlink_to("a")
    link = find(guest, "link")
    (volume / "link").rename(volume / "c/link")
    code, results = guest.call("readlink", Writer().opaque(link))
    assert code == OK
    assert results.fixed(4 + 84)
    assert bytes(results.opaque(100)) == b"a"


# Another process ----------------------------------------------------------------------------------


@contextmanager
def another(volume: Path) -> Iterator[Guest]:
    """The same guest's, with a server that knows nothing yet."""
    with closing(Export(volume, KEY, read_only=False)) as export:
        yield Guest(export)


def test_the_next_server_looks_through_the_volume_once(
    guest: Guest, volume: Path, searches: list[bytes]
) -> None:
    for number in range(20):
        (volume / f"a/{number}").mkdir()
        (volume / f"a/{number}/file").write_text(str(number))
    files = [find(guest, f"a/{number}/file") for number in range(20)]
    (volume / "a").rename(volume / "moved")
    with another(volume) as later:
        assert [later.read(file) for file in files] == [b"%d" % each for each in range(20)]
    assert len(searches) <= 1


def test_a_volume_with_more_files_than_are_remembered(
    guest: Guest, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finding, "MOST_PLACES", 8)
    for number in range(50):
        (volume / f"c/{number}").write_text(str(number))
    files = [find(guest, f"c/{number}") for number in range(50)]
    with another(volume) as later:
        for reader in guest, later:
            assert [reader.read(file) for file in files] == [b"%d" % each for each in range(50)]


# What only one of the ways has --------------------------------------------------------------------


def test_out_of_the_volume(guest: Guest, volume: Path, finder: str) -> None:
    """What the guest knows stays within its reach where the kernel finds it."""
    file = find(guest, "a/b/file")
    (volume / "a/b").rename(volume.parent / "out")
    assert status(guest, file) == (OK if finder == "by handle" else STALE)


def test_what_is_mounted_in_it_is_not_of_it() -> None:
    outer = os.open("/dev", os.O_RDONLY | os.O_DIRECTORY)
    inner = os.open("/dev/shm", os.O_RDONLY | os.O_DIRECTORY)
    assert os.fstat(inner).st_dev != os.fstat(outer).st_dev
    places = ByPlace(outer)
    places.seen(outer, b"shm")
    with pytest.raises(OSError, match="not in the volume any more") as raised:
        places.open(kernel_handle(inner))
    assert raised.value.errno == errno.ESTALE
    os.close(inner)
    os.close(outer)


def test_no_descriptor_stays_open(guest: Guest, volume: Path) -> None:
    file, gone = find(guest, "a/b/file"), find(guest, "c")
    before = [*Path("/proc/self/fd").iterdir()]
    (volume / "c").rmdir()
    (volume / "a/b").rename(volume / "b")
    assert (status(guest, file), status(guest, gone)) == (OK, STALE)
    assert [*Path("/proc/self/fd").iterdir()] == before
