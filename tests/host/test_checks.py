"""Each check in each of its states, from made-up figures; and what it says to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ratoon.errors import HostError
from ratoon.machine.host import checks
from ratoon.machine.host.admission import Cost, Reserve
from ratoon.machine.host.cgroups import Cgroup, Group
from ratoon.machine.host.checks import Check
from ratoon.machine.host.figures import Figures
from ratoon.machine.host.limits import Limits
from ratoon.units import GIB, MIB

FIGURES = Figures(
    memory_bytes=21 * GIB,
    memory_total=32 * GIB,
    memory_owner="the host",
    disk_bytes=100 * GIB,
    disk_total=200 * GIB,
    files=10_000,
    threads=30_000,
)
COST = Cost(memory_bytes=50 * MIB, disk_bytes=MIB, files=5, threads=8)
RESERVE = Reserve(memory_bytes=GIB, disk_bytes=GIB)


def ask_qemu(option: str) -> str:
    answers = {
        "-machine": "microvm              microvm (i386)\n",
        "-netdev": "Available netdev backend types:\nsocket\nuser\n",
    }
    return answers[option]


def test_the_user() -> None:
    assert checks.check_user(None, 0).state == "ok"
    assert checks.check_user("me", 55_000).state == "ok"
    check = checks.check_user("me", 0, ["install it", "lend some"])
    assert check.state == "warn"
    assert check.todo.startswith("as root: install it && lend some; then end the daemon")
    check = checks.check_user("me", 0, barred="this host gives users none: as root: do that")
    assert check.state == "bad"
    assert check.found == "me, and this host gives users none: as root: do that"


def test_what_lends_more_ids() -> None:
    assert checks.lacking_for_ids(None, lambda name: name) == []
    assert checks.lacking_for_ids("lend some", lambda name: name) == ["lend some"]
    install, lend = checks.lacking_for_ids("lend some", lambda name: None)
    assert install.endswith(" install -y --no-install-recommends uidmap")
    assert lend == "lend some"


def test_programs() -> None:
    assert checks.check_programs(lambda name: f"/usr/bin/{name}").state == "ok"
    lacking = ("mke2fs", "setpriv", "skopeo")
    check = checks.check_programs(lambda name: None if name in lacking else name)
    assert (check.state, check.found) == ("bad", "missing: mke2fs, setpriv")
    assert check.todo.endswith("install -y --no-install-recommends e2fsprogs util-linux")
    check = checks.check_programs(lambda name: None if name == "skopeo" else name)
    assert (check.state, check.todo[-6:]) == ("warn", "skopeo")


def test_qemu() -> None:
    assert checks.check_qemu(ask_qemu, lambda: "10.0.2") == Check("QEMU", "ok", "10.0.2")


@pytest.mark.parametrize(("option", "lacking"), [("-machine", "microvm"), ("-netdev", "user")])
def test_a_qemu_built_without_what_is_needed(option: str, lacking: str) -> None:
    def ask(asked: str) -> str:
        return "pc q35 socket" if asked == option else ask_qemu(asked)

    check = checks.check_qemu(ask, lambda: "9.0.0")
    assert (check.state, check.found) == ("bad", f"9.0.0, built without `{lacking}`")


def test_no_qemu() -> None:
    def version() -> str:
        raise HostError("qemu does not run")

    check = checks.check_qemu(ask_qemu, version)
    assert check == Check("QEMU", "bad", "qemu does not run", "run `ratoon setup`")


# Directories ----------------------------------------------------------------------------------


def test_a_directory_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "COMFORTABLE_DISK", 0)
    check = checks.check_directory("home", tmp_path, lambda path: True)
    assert check.state == "ok"
    assert check.found.startswith(f"{tmp_path}, ")
    assert check.found.endswith("iB free, reflinks")
    check = checks.check_directory("home", tmp_path, lambda path: False)
    assert check.state == "ok"
    assert check.found.endswith("no reflinks: images are copies")
    assert "reflinks" not in checks.check_directory("cache", tmp_path).found


def test_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    asked: list[Path] = []

    def reflinks(path: Path) -> bool:
        asked.append(path)
        return True

    check = checks.check_directory("home", tmp_path / "not/there", reflinks)
    assert str(tmp_path / "not/there") in check.found
    assert asked == [tmp_path]


def test_a_directory_with_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "COMFORTABLE_DISK", 1 << 60)
    check = checks.check_directory("cache", tmp_path)
    assert (check.state, check.todo[:9]) == ("warn", "make room")


def test_a_directory_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    check = checks.check_directory("home", tmp_path)
    assert (check.state, check.found) == ("bad", f"{tmp_path} cannot be written")


def test_a_store_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: tmp_path.stat().st_uid + 1)
    check = checks.check_directory("home", tmp_path, lambda path: True)
    assert (check.state, check.found) == ("bad", f"{tmp_path} belongs to another user")


@pytest.mark.parametrize("system", ["nfs4", "cifs"])
def test_a_directory_of_another_host(tmp_path: Path, system: str) -> None:
    check = checks.check_directory("home", tmp_path, lambda path: True, kind=lambda path: system)
    assert check.state == "warn"
    assert check.found.endswith(f"on {system}, where forks are slow")
    assert "RATOON_HOME" in check.todo


def test_a_directory_without_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store has none, so nothing is wrong with it there."""
    real = os.statvfs(tmp_path)
    flags = os.statvfs_result((*real[:8], real.f_flag | os.ST_NOEXEC, real.f_namemax))
    monkeypatch.setattr("os.statvfs", lambda path: flags)
    check = checks.check_directory("cache", tmp_path, with_programs=True)
    assert (check.state, "`noexec`" in check.found, check.todo) == (
        *("bad", True),
        "set RATOON_CACHE to a directory elsewhere",
    )
    assert checks.check_directory("home", tmp_path, lambda path: True).state != "bad"


# Figures --------------------------------------------------------------------------------------


def test_memory() -> None:
    check = checks.check_memory(FIGURES, COST, RESERVE)
    said = "21.0 GiB of 32.0 GiB free: room for about 409 forks"
    assert check == Check("memory", "ok", said)
    check = checks.check_memory(replace(FIGURES, memory_bytes=GIB // 2), COST, RESERVE)
    assert check.state == "warn"
    assert check.found.endswith(": room for about 0 forks")
    check = checks.check_memory(
        replace(FIGURES, memory_owner="the control group /x"), COST, RESERVE
    )
    assert "free (the control group /x): room" in check.found


@pytest.mark.parametrize(
    ("total", "used", "state", "found"),
    [
        (0, 0, "ok", "none"),
        (8 * GIB, 100 * MIB, "ok", "100 MiB of 8.0 GiB in use"),
        (8 * GIB, 3 * GIB, "warn", "3.0 GiB of 8.0 GiB in use"),
    ],
)
def test_swap(total: int, used: int, state: str, found: str) -> None:
    check = checks.check_swap({"SwapTotal": total, "SwapFree": total - used})
    assert (check.state, check.found) == (state, found)
    assert bool(check.todo) == (state == "warn")


@pytest.mark.parametrize(
    ("files", "threads", "state", "todo"),
    [
        (10_000, 30_000, "ok", ""),
        (50, 30_000, "warn", "raise `ulimit -n`"),
        (10_000, 100, "warn", "raise kernel.pid_max, or the pids.max of its group"),
    ],
)
def test_file_limits(files: int, threads: int, state: str, todo: str) -> None:
    check = checks.check_counts(replace(FIGURES, files=files, threads=threads), COST)
    assert (check.state, check.todo) == (state, todo)
    assert f"{files} more open files, {threads} more threads" in check.found


# The kernel -----------------------------------------------------------------------------------


def test_dirty_pages() -> None:
    def unreadable() -> bool:
        raise PermissionError(1, "Operation not permitted")

    look: list[tuple[Callable[[], bool], int, str, str]] = [
        (lambda: True, 0, "ok", "PAGEMAP_SCAN"),
        (lambda: False, 2, "ok", "Linux 6.7"),
        (lambda: True, 3, "bad", "ptrace_scope is 3"),
        (unreadable, 0, "bad", "Operation not permitted"),
    ]
    for scan, scope, state, said in look:
        check = checks.check_dirty_pages(scan, scope)
        assert check.state == state
        assert said in check.found
        assert bool(check.todo) == (state == "bad")


def test_limits(tmp_path: Path) -> None:
    def create(directory: Path, limits: Limits) -> Cgroup:
        assert directory == tmp_path
        return Cgroup((Group(tmp_path, 2 if limits.cpus is None else 1, ("any",)),), limits)

    check = checks.check_limits(create, tmp_path, "more")
    assert check.state == "ok"
    assert check.found == "memory, cpu, pids, by control groups of version 1 and 2"

    def refuse(directory: Path, limits: Limits) -> Cgroup:
        raise HostError("no memory limit can be set: somewhere: read-only")

    check = checks.check_limits(refuse, tmp_path, "do that")
    assert (check.state, check.found[:29]) == ("warn", "no memory limit can be set: s")
    assert check.todo == "do that"

    def partly(directory: Path, limits: Limits) -> Cgroup:
        if limits.cpus is not None:
            raise HostError("no cpu limit can be set: not given")
        groups = (Group(tmp_path, 2, ("memory",)),) if limits.memory_bytes else ()
        return Cgroup(groups, limits, limits.pids)

    check = checks.check_limits(partly, tmp_path, "do that")
    assert (check.state, check.todo) == ("warn", "do that")
    assert check.found == (
        "memory, by control groups of version 2; pids, by the users that machines are; no cpu "
        "limit can be set: not given"
    )


def test_what_gives_more_limits() -> None:
    assert checks.way_to_limits(None, unified=True, systemd=True) == (
        "or run sandboxes without limits"
    )
    way = checks.way_to_limits("me", unified=True, systemd=True)
    assert "systemd-run --user -p Delegate=yes ratoon serve;" in way
    assert "as root: mkdir -p /etc/systemd/system/user@.service.d && printf '[Service]\\nDel" in way
    assert "unified_cgroup_hierarchy" in checks.way_to_limits("me", unified=False, systemd=True)
    assert "have root start" in checks.way_to_limits("me", unified=True, systemd=False)


def test_network() -> None:
    check = checks.check_network(None, None, "192.0.2.53", None)
    assert (check.state, check.found[-10:]) == ("ok", "192.0.2.53")
    check = checks.check_network("nft is not there", "no nameserver", "None", "get nft")
    found = "nft is not there; until then sandboxes have no network but `none`"
    assert (check.state, check.found, check.todo) == ("warn", found, "as root: get nft")
    assert checks.check_network("no veth", None, "None", None).todo == ""
    check = checks.check_network(None, "no nameserver", "None", None)
    assert (check.state, check.found) == ("warn", "no nameserver")


@pytest.mark.parametrize(
    ("skew", "state", "said"),
    [
        (0.04, "ok", "guest and host agree within 0.0 s"),
        (-1.5, "ok", "within 1.5 s"),
        (-90, "warn", "the guest's is -90.0 s off"),
        (3, "warn", "the guest's is +3.0 s off"),
    ],
)
def test_the_clock(skew: float, state: str, said: str) -> None:
    check = checks.check_clock(skew)
    assert check.state == state
    assert said in check.found


def test_images() -> None:
    """Without libarchive, mke2fs says what it needs; older ones take a tar's name for a file's."""
    assert checks.check_images(lambda: None).state == "ok"

    def make() -> None:
        raise HostError("image empty was not unpacked: you need libarchive")

    check = checks.check_images(make)
    assert (check.state, check.details) == (
        "warn",
        "image empty was not unpacked: you need libarchive",
    )
    assert "1.47.1" in check.todo


def test_the_jail() -> None:
    held = {"user": True, "root": True}
    check = checks.check_jail(held, [], one_id=False)
    assert (check.state, check.found) == ("ok", "2 layers hold: user, root")
    check = checks.check_jail(
        held, ["this kernel has version 4 of Landlock, and it takes 6"], one_id=False
    )
    assert (check.state, check.todo) == ("warn", "use a later kernel")
    assert check.found.endswith("root; but this kernel has version 4 of Landlock, and it takes 6")
    check = checks.check_jail({**held, "filters": False}, [], one_id=False)
    assert (check.state, check.found.rpartition(" ")[2]) == ("bad", "filters")
    alone = {**held, "user": False}
    assert checks.check_jail(alone, [], one_id=False).state == "bad"
    check = checks.check_jail(alone, [], one_id=True)
    assert (check.state, check.found[:19]) == ("warn", "1 layers hold: root")
    assert checks.check_jail({**alone, "root": False}, [], one_id=True).state == "bad"
