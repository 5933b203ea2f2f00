"""Who may do what on a volume: its server acts as whoever asks, and the kernel decides."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from nfs_client import ACCES, BADHANDLE, KEY, NOTHING, OK, PERM, ROFS, Guest, tree

from ratoon.machine.volumes import callers
from ratoon.machine.volumes.callers import Caller
from ratoon.machine.volumes.export import Export
from ratoon.machine.volumes.xdr import Writer

pytest_plugins = ["ways_of_finding"]
pytestmark = pytest.mark.usefixtures("finder")

TEAM = 5001
ROOT, OWNER = Caller(0, 0), Caller(1001, 1001, (TEAM,))
MEMBER, NOBODY = Caller(1002, 1002, (7, TEAM)), Caller(65534, 65534)
#: For whom may not write to a file: to link to it, also where one may not make it.
_PROTECTED = int(Path("/proc/sys/fs/protected_hardlinks").read_text())
LINKED, NOT_LINKED = (PERM, PERM) if _PROTECTED else (OK, ACCES)
EVERYBODY = (ROOT, OWNER, MEMBER, NOBODY)


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Export]:
    """A volume that all may search, with what is root's, the owner's and his team's."""
    (tmp_path / "volume").mkdir()
    export = Export(tmp_path / "volume", KEY, read_only=False)
    make(export.source)
    yield export
    export.close()


def make(volume: Path) -> None:
    for name, uid, mode in (
        ("closed", 0, 0o700),
        ("root", 0, 0o755),
        ("team", OWNER.uid, 0o775),
        ("sticky", 0, 0o1777),
        ("all", 0, 0o777),
    ):
        directory = volume / name
        directory.mkdir()
        for file, of in ("theirs", 0), ("owners", OWNER.uid):
            (directory / file).write_text("abc")
            os.chown(directory / file, of, TEAM)
            (directory / file).chmod(0o640)
        (directory / "empty").mkdir()
        os.chown(directory, uid, TEAM)
        directory.chmod(mode)


@pytest.fixture
def guest(export: Export) -> Guest:
    return Guest(export)


def handle(guest: Guest, path: str) -> bytes:
    """Of a file of the volume, as root finds it."""
    before, guest.caller = guest.caller, ROOT
    found = guest.exports[0].handles.root
    for name in path.split("/"):
        found = guest.lookup(found, name.encode())
    guest.caller = before
    return found


# What needs which right ---------------------------------------------------------------------------


def named(directory: str, name: str, rest: bytes = b"") -> Callable[[Guest], Writer]:
    return lambda guest: Writer().opaque(handle(guest, directory)).opaque(name.encode()).raw(rest)


def of(path: str, rest: bytes = b"") -> Callable[[Guest], Writer]:
    return lambda guest: Writer().opaque(handle(guest, path)).raw(rest)


def renamed(source: str, old: str, target: str, new: str) -> Callable[[Guest], Writer]:
    return lambda guest: named(source, old)(guest).raw(named(target, new)(guest).done())


def linked(path: str, target: str, new: str) -> Callable[[Guest], Writer]:
    return lambda guest: of(path)(guest).raw(named(target, new)(guest).done())


def attributes(
    mode: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    size: int | None = None,
    times: bytes = bytes(8),
) -> bytes:
    """What SETATTR sets (sattr3), with no guard."""
    writer = Writer()
    for each in mode, uid, gid:
        writer.u32(0) if each is None else writer.u32(1, each)
    writer.u32(0) if size is None else writer.u32(1).u64(size)
    return writer.raw(times).u32(0).done()


CREATE, LINK = Writer().u32(1).raw(NOTHING).done(), NOTHING + Writer().opaque(b"to").done()
READ, LIST = Writer().u64(0).u32(10).done(), Writer().u64(0).raw(bytes(8)).u32(4096).done()
LIST_ALL = Writer().u64(0).raw(bytes(8)).u32(4096, 4096).done()
WRITE = Writer().u64(0).u32(1, 0).opaque(b"x").done()
NOW, ONE, SET = (Writer().u32(*each).done() for each in ((1, 1), (0, 1), (2, 1, 0, 2, 1, 0)))

#: Of a call: who has which status, in the order of EVERYBODY.
RIGHTS: dict[str, tuple[str, Callable[[Guest], Writer], tuple[int, int, int, int]]] = {
    "to find": ("lookup", named("closed", "owners"), (OK, ACCES, ACCES, ACCES)),
    "to read": ("read", of("all/owners", READ), (OK, OK, OK, ACCES)),
    "to read what is root's": ("read", of("closed/theirs", READ), (OK, OK, OK, ACCES)),
    "to write": ("write", of("all/owners", WRITE), (OK, OK, ACCES, ACCES)),
    "to list": ("readdir", of("closed", LIST), (OK, ACCES, ACCES, ACCES)),
    "to list all": ("readdirplus", of("closed", LIST_ALL), (OK, ACCES, ACCES, ACCES)),
    "to create": ("create", named("root", "new", CREATE), (OK, ACCES, ACCES, ACCES)),
    "to create in the team's": ("create", named("team", "new", CREATE), (OK, OK, OK, ACCES)),
    "to make a directory": ("mkdir", named("team", "new", NOTHING), (OK, OK, OK, ACCES)),
    "to make a link": ("symlink", named("team", "new", LINK), (OK, OK, OK, ACCES)),
    "to remove": ("remove", named("root", "owners"), (OK, ACCES, ACCES, ACCES)),
    "to remove from the team's": ("remove", named("team", "theirs"), (OK, OK, OK, ACCES)),
    "to remove one's own": ("remove", named("sticky", "owners"), (OK, OK, PERM, PERM)),
    "to remove a directory": ("rmdir", named("team", "empty"), (OK, OK, OK, ACCES)),
    "to remove another's": ("rmdir", named("sticky", "empty"), (OK, PERM, PERM, PERM)),
    "to rename": ("rename", renamed("root", "owners", "all", "new"), (OK, ACCES, ACCES, ACCES)),
    "to rename to": ("rename", renamed("all", "owners", "root", "new"), (OK, ACCES, ACCES, ACCES)),
    "to rename one's own": (
        "rename",
        renamed("sticky", "owners", "all", "new"),
        (OK, OK, PERM, PERM),
    ),
    "to replace another's": (
        "rename",
        renamed("all", "owners", "sticky", "theirs"),
        (OK, PERM, PERM, PERM),
    ),
    "to change '..'": ("rename", renamed("all", "empty", "team", "e"), (OK, ACCES, ACCES, ACCES)),
    "to link": ("link", linked("all/owners", "team", "new"), (OK, OK, LINKED, NOT_LINKED)),
    "to link to root's": (
        "link",
        linked("all/owners", "root", "new"),
        (OK, ACCES, NOT_LINKED, NOT_LINKED),
    ),
    "to set a mode": ("setattr", of("all/owners", attributes(mode=0o777)), (OK, OK, PERM, PERM)),
    "to set root's": ("setattr", of("all", attributes(mode=0o777)), (OK, PERM, PERM, PERM)),
    "to give away": ("setattr", of("all/owners", attributes(uid=7)), (OK, PERM, PERM, PERM)),
    "to give a group": ("setattr", of("all/owners", attributes(gid=TEAM)), (OK, OK, PERM, PERM)),
    "to give another": ("setattr", of("all/owners", attributes(gid=7)), (OK, PERM, PERM, PERM)),
    "to cut off": ("setattr", of("all/owners", attributes(size=1)), (OK, OK, ACCES, ACCES)),
    "to touch": ("setattr", of("all/owners", attributes(times=NOW)), (OK, OK, ACCES, ACCES)),
    "to touch once": ("setattr", of("all/owners", attributes(times=ONE)), (OK, OK, PERM, PERM)),
    "to set times": ("setattr", of("all/owners", attributes(times=SET)), (OK, OK, PERM, PERM)),
    "to flush": ("commit", of("closed/theirs", bytes(12)), (OK, OK, OK, OK)),
    "to look": ("getattr", of("closed/theirs"), (OK, OK, OK, OK)),
}


@pytest.mark.parametrize("right", RIGHTS)
def test_rights(guest: Guest, export: Export, right: str) -> None:
    procedure, arguments, statuses = RIGHTS[right]
    for caller, wanted in zip(EVERYBODY, statuses, strict=True):
        anew(export.source)
        ready, before = arguments(guest), tree(export.source)
        guest.caller = caller
        assert guest.status(procedure, ready) == wanted, caller
        if wanted != OK:
            assert tree(export.source) == before


def anew(volume: Path) -> None:
    """The volume as it was before."""
    for directory in volume.iterdir():
        shutil.rmtree(directory)
    make(volume)


def test_nobody_changes_a_read_only_volume_or_reads_what_he_may_not(export: Export) -> None:
    reader = Export(export.source, KEY, read_only=True)
    guest = Guest(reader)
    for right, (procedure, arguments, statuses) in RIGHTS.items():
        ready, before = arguments(guest), tree(export.source)
        reads = procedure in ("lookup", "read", "readdir", "readdirplus", "commit", "getattr")
        for caller, wanted in zip(EVERYBODY, statuses, strict=True):
            guest.caller = caller
            assert guest.status(procedure, ready) == (wanted if reads else ROFS), right
        assert tree(export.source) == before
    reader.close()


def test_two_handles_are_of_one_volume(guest: Guest, export: Export, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Export(tmp_path / "other", KEY, read_only=False)
    guest = Guest(export, other)
    theirs = Writer().opaque(other.handles.root).opaque(b"new")
    for caller in EVERYBODY:
        guest.caller = caller
        renaming = named("all", "owners")(guest).raw(theirs.done())
        assert guest.status("rename", renaming) == BADHANDLE
        assert guest.status("link", of("all/owners")(guest).raw(theirs.done())) == BADHANDLE
    assert list(other.source.iterdir()) == []
    other.close()


# What is made, and what becomes of it -------------------------------------------------------------


def test_what_is_new_is_the_callers_and_has_the_mode_it_should(
    guest: Guest, export: Export
) -> None:
    wide = Writer().u32(1, 0o666, 0, 0, 0, 0, 0).done()
    (export.source / "all").chmod(0o2777)
    guest.caller = MEMBER
    for directory, group in ("sticky", MEMBER.gid), ("all", TEAM):
        for procedure, name, rest in (
            ("create", "f", Writer().u32(1).raw(wide).done()),
            ("mkdir", "d", wide),
            ("symlink", "l", wide + Writer().opaque(b"to").done()),
        ):
            assert guest.status(procedure, named(directory, name, rest)(guest)) == OK
            found = (export.source / directory / name).lstat()
            assert (found.st_uid, found.st_gid) == (MEMBER.uid, group)
        mode = (export.source / directory / "f").stat().st_mode
        assert mode & 0o7777 == 0o666
        mode = (export.source / directory / "d").stat().st_mode
        assert mode & 0o7777 == (0o2666 if group == TEAM else 0o666)


def access(guest: Guest, path: str) -> int:
    _, results = guest.call("access", of(path, Writer().u32(0x3F).done())(guest))
    results.fixed(4 + 84)
    return results.u32()


def test_an_owner_uses_what_he_has_open(guest: Guest, export: Export) -> None:
    """He is told that he may not open it, but what he has open stays so."""
    (export.source / "all/owners").chmod(0)
    guest.caller = OWNER
    assert access(guest, "all/owners") == 0
    assert guest.write(handle(guest, "all/owners"), b"more") == OK
    assert guest.read(handle(guest, "all/owners")) == b"more"
    assert guest.status("setattr", of("all/owners", attributes(size=1))(guest)) == OK
    guest.caller = MEMBER
    assert guest.write(handle(guest, "all/owners"), b"no") == ACCES
    assert (export.source / "all/owners").read_text() == "m"


def test_a_program_is_read_by_who_may_run_it_and_a_directory_by_who_may_read_it(
    guest: Guest, export: Export
) -> None:
    (export.source / "all/owners").chmod(0o711)
    (export.source / "all").chmod(0o711)
    guest.caller = NOBODY
    assert access(guest, "all/owners") == 0x20  # EXECUTE
    assert guest.read(handle(guest, "all/owners")) == b"abc"
    assert guest.write(handle(guest, "all/owners"), b"no") == ACCES
    assert guest.status("readdir", of("all", LIST)(guest)) == ACCES


def test_access_control_lists_count(guest: Guest, export: Export) -> None:
    # acl_xattr.h: the owner, a user, the group, the mask and the others.
    entries = ((1, 6, -1), (2, 4, NOBODY.uid), (4, 0, -1), (16, 4, -1), (32, 0, -1))
    packed = b"".join(struct.pack("<HHi", *entry) for entry in entries)
    os.setxattr(
        export.source / "all/owners", "system.posix_acl_access", struct.pack("<I", 2) + packed
    )
    guest.caller = NOBODY
    assert access(guest, "all/owners") == 0x01  # READ
    assert guest.read(handle(guest, "all/owners")) == b"abc"
    guest.caller = Caller(1003, 1003)
    assert guest.status("read", of("all/owners", READ)(guest)) == ACCES


@pytest.mark.parametrize("caller", [ROOT, OWNER, NOBODY])
@pytest.mark.parametrize("mode", [0o4777, 0o2777, 0o2767])
@pytest.mark.parametrize("how", ["write", "setattr"])
def test_a_program_of_the_hosts_that_is_written_to_loses_its_identity(
    guest: Guest, export: Export, caller: Caller, mode: int, how: str
) -> None:
    (export.source / "all/theirs").chmod(mode)
    guest.caller = caller
    rest = WRITE if how == "write" else attributes(size=1)
    assert guest.status(how, of("all/theirs", rest)(guest)) == OK
    assert (export.source / "all/theirs").stat().st_mode & 0o7777 == mode & 0o777


def test_an_empty_file_is_cut_off_by_who_may_write(guest: Guest, export: Export) -> None:
    """The guest's kernel says so by the time of its change alone."""
    (export.source / "all/owners").chmod(0o660)
    os.utime(export.source / "all/owners", (1, 1))
    guest.caller = MEMBER
    assert guest.status("setattr", of("all/owners", attributes(times=ONE))(guest)) == OK
    found = (export.source / "all/owners").stat()
    assert found.st_mtime > 1e9
    assert found.st_atime == 1
    assert guest.status("setattr", of("all/owners", attributes(size=1, times=ONE))(guest)) == OK


# The thread ---------------------------------------------------------------------------------------


def in_thread(work: Callable[[], object]) -> object:
    """Do it in a thread that acts for others."""
    with ThreadPoolExecutor(1, initializer=callers.prepare_thread) as own:
        return own.submit(work).result()


def status_of_thread() -> dict[str, str]:
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def test_rights_are_the_threads_own_and_given_back() -> None:
    before = status_of_thread()

    def work() -> None:
        resting = status_of_thread()
        assert resting["Umask"] == "0000"
        # CAP_SYS_RESOURCE is gone, and nothing else.
        assert int(resting["CapEff"], 16) == int(before["CapEff"], 16) & ~(1 << 24)
        for error in None, OSError, KeyboardInterrupt:
            with suppress(OSError, KeyboardInterrupt), callers.acting_as(MEMBER):
                status = status_of_thread()
                assert status["Uid"].split() == ["0", "0", "0", "1002"]
                assert status["Gid"].split() == ["0", "0", "0", "1002"]
                assert status["Groups"].split() == ["7", str(TEAM)]
                files = {0, 1, 2, 3, 4, 9, 24, 27, 32}  # the capabilities over files
                assert not int(status["CapEff"], 16) & sum(1 << number for number in files)
                with callers.as_root():
                    assert callers.acting() == 0
                    assert status_of_thread()["CapEff"] == resting["CapEff"]
                assert callers.acting() == MEMBER.uid
                assert callers_of_main() == 0
                if error:
                    raise error
            assert callers.acting() == 0
            assert status_of_thread()["CapEff"] == resting["CapEff"]

    def callers_of_main() -> int:
        status = Path(f"/proc/{os.getpid()}/task/{threading.main_thread().native_id}/status")
        line = next(each for each in status.read_text().splitlines() if each.startswith("Uid"))
        return int(line.split()[4])

    in_thread(work)
    after = status_of_thread()
    for what in "Uid", "Gid", "Groups", "CapEff", "Umask":
        assert after[what] == before[what]


NONE = (1 << 32) - 1


@pytest.mark.parametrize(
    "caller", [Caller(NONE, 0), Caller(0, NONE), Caller(1, NONE), Caller(1, 1, (NONE,))]
)
def test_an_id_that_is_none_is_nobodys(guest: Guest, export: Export, caller: Caller) -> None:
    """The system sets no such id, and does not say so: what it was before is root's."""
    before = tree(export.source)
    guest.caller = caller
    assert guest.status("create", named("all", "new", CREATE)(guest)) == ACCES
    assert guest.status("remove", named("all", "theirs")(guest)) == ACCES
    assert tree(export.source) == before
    guest.caller = NOBODY
    assert guest.status("create", named("all", "new", CREATE)(guest)) == OK


def test_who_cannot_act_for_others_has_no_volumes(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from ratoon.machine.volumes.export import Export\n"
    )
    script += "Export(Path(sys.argv[1]), bytes(32), read_only=True)"
    for lost in "-setuid", "-setgid":
        command = ["setpriv", "--bounding-set", lost, sys.executable, "-c", script, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "InvalidInput" in done.stderr, done
        assert "the users of a guest cannot be acted for" in done.stderr
