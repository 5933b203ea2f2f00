"""Programs in cells: what they are, what they have, and how they end."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from processes import descriptors, until
from ratoon import syscalls
from ratoon.errors import HostError
from ratoon.jail import user_namespace
from ratoon.jail.cell import Cell, Inmate, limit_process
from ratoon.jail.inmates import inmates
from ratoon.jail.layers import layers_of
from ratoon.jail.steps import LostName
from ratoon.jail.tree import tree
from ratoon.jail.user_namespace import free_ids

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make cells")

BUSYBOX = Path("/usr/bin/busybox")
SH = str(BUSYBOX)
FOR_EVER = 60


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    with Cell(tree([BUSYBOX], {}, ["given", "etc/other"])) as cell:
        yield cell


@pytest.fixture
def output(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "output", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture(autouse=True)
def nothing_is_left(cell: Cell) -> Iterator[None]:
    before, threads = descriptors(), threading.active_count()
    yield
    until(lambda: threading.active_count() <= threads)
    assert gc.isenabled()
    assert descriptors() == before


def said(cell: Cell, output: int, script: str, **more: object) -> str:
    """What a shell in the cell writes, to either stream, until it ends."""
    process = cell.start(Inmate([SH, "sh", "-c", script], output, **more))  # type: ignore[arg-type]
    process.wait(FOR_EVER)
    return os.pread(output, 1 << 20, 0).decode()


def test_what_is_there(cell: Cell, output: int) -> None:
    assert said(
        cell, output, "cd /; busybox find . | busybox sort; pwd; echo $PPID $$ $PATH"
    ).splitlines() == [
        ".",
        *("./dev", "./dev/null", "./etc", "./etc/other", "./given"),
        *(line for line in os.pread(output, 1 << 20, 0).decode().splitlines() if "lib" in line),
        *("./usr", "./usr/bin", "./usr/bin/busybox", "./usr/bin/setpriv"),
        *("/", "0 1 /usr/bin"),
    ]


def test_nothing_can_be_made_or_changed(cell: Cell, output: int) -> None:
    writes = "for f in /new /lib/new /etc/other; do echo >$f; done"
    script = f"{writes}; busybox chmod 777 /; busybox rm /given"
    lines = said(cell, output, script).splitlines()
    assert len(lines) == 5
    assert all("Read-only file system" in line for line in lines)


def test_what_it_is(cell: Cell, output: int) -> None:
    process = cell.start(Inmate([SH, "sleep", "1000"], output))
    try:
        layers = layers_of(process.pid)
        assert not layers.pop("filters"), "QEMU has one of its own"
        assert set(layers.values()) == {True}
        assert not any(layers_of(os.getpid()).values())
        held = {fd.readlink() for fd in Path(f"/proc/{process.pid}/fd").iterdir()}
        assert held == {Path("/dev/null"), Path(f"/proc/self/fd/{output}").readlink()}
    finally:
        process.kill()
        process.wait()
    with pytest.raises(ProcessLookupError):
        layers_of(process.pid)


def test_its_name_stays(cell: Cell, output: int) -> None:
    """That of the host is not seen, and it is found by its own."""
    script = "busybox hostname; busybox hostname other; busybox hostname"
    first, refused, then = said(cell, output, script, name="somebody").splitlines()
    assert (first, then) == ("somebody", "somebody")
    assert "Operation not permitted" in refused
    assert os.uname().nodename != "somebody"
    processes = [
        cell.start(Inmate([SH, "sleep", "1000"], output, name=name)) for name in ("one", "two")
    ]
    try:
        assert inmates("one") == [processes[0].pid]
        assert inmates("other") == []
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert inmates("one") == inmates("two") == []


def test_each_is_somebody_else(cell: Cell, output: int) -> None:
    before = random.getstate()
    processes = [cell.start(Inmate([SH, "sleep", "1000"], output)) for _ in range(5)]
    try:
        uids = {Path(f"/proc/{process.pid}").stat().st_uid for process in processes}
        assert len(uids) == 5
        assert random.getstate() == before, "Python's generator is not ours"
        assert all(uid in free_ids() for uid in uids)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_files_are_given(cell: Cell, output: int, tmp_path: Path) -> None:
    """By a mount, to be read; or open, as they were opened, whoever else has the file."""
    given, log = tmp_path / "given", tmp_path / "log"
    given.write_text("for it\n")
    fd = os.open(given, os.O_RDONLY)
    inherited = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        script = (
            f"busybox cat /given; echo >/given; echo logged >&{inherited}; busybox chmod 777 /given"
        )
        answer = said(cell, output, script, mounts={"given": fd}, descriptors=[inherited])
        assert answer.startswith("for it\n")
        assert answer.count("Read-only file system") == 2
        assert log.read_text() == "logged\n"
        given.unlink()
        with pytest.raises(LostName, match="/given in a cell is gone"):
            said(cell, output, "true", mounts={"given": fd})
    finally:
        os.close(fd)
        os.close(inherited)


def test_limits(cell: Cell, output: int) -> None:
    limits = {resource.RLIMIT_NOFILE: 17, resource.RLIMIT_FSIZE: 512 * 9}
    assert said(cell, output, "busybox sleep 0.5; ulimit -n; ulimit -f", limits=limits) == "17\n9\n"
    process = cell.start(Inmate([SH, "sleep", "1000"], output))
    try:
        limit_process(process.pid, resource.RLIMIT_FSIZE, 1000)
        table = Path(f"/proc/{process.pid}/limits").read_text()
        assert table.partition("Max file size")[2].split()[:2] == ["1000", "1000"]
    finally:
        process.kill()
        process.wait()
    with pytest.raises(ProcessLookupError):
        limit_process(process.pid, resource.RLIMIT_FSIZE, 1000)


def test_a_limit_that_cannot_be_set_ends_it(
    cell: Cell, output: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is less already stays."""
    started = []

    def fail(pid: int, *_: object) -> None:
        started.append(pid)
        raise PermissionError(1, "not on this host")

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert (
        said(cell, output, "ulimit -Hn", limits={resource.RLIMIT_NOFILE: most + 1}) == f"{most}\n"
    )
    monkeypatch.setattr(resource, "prlimit", fail)
    with pytest.raises(PermissionError, match="not on this host"):
        cell.start(Inmate([SH, "sleep", "1000"], output, limits={resource.RLIMIT_NOFILE: 9}))
    (pid,) = started
    assert not Path(f"/proc/{pid}").exists()


def test_a_network_is_its_own_unless_it_is_given_one(cell: Cell, output: int) -> None:
    assert said(cell, output, "busybox nc 127.0.0.1 1").splitlines() == [
        "nc: can't connect to remote host (127.0.0.1): Network is unreachable",
    ]


def test_a_program_that_is_not_there(cell: Cell, output: int) -> None:
    with pytest.raises(FileNotFoundError, match="/usr/bin/other"):
        cell.start(Inmate(["/usr/bin/other"], output))


def test_a_step_that_fails_starts_nothing(
    cell: Cell, output: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(1, "not on this host")

    monkeypatch.setattr(syscalls, "become", fail)
    with pytest.raises(PermissionError, match="not on this host"):
        cell.start(Inmate([SH, "true"], output))


def test_many_at_once(cell: Cell, output: int) -> None:
    def start(_: int) -> int:
        return cell.start(Inmate([SH, "true"], output)).wait(FOR_EVER)

    with ThreadPoolExecutor(8) as pool:
        assert {*pool.map(start, range(40))} == {0}


def test_a_host_that_makes_no_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(syscalls, "unshare", fail)
    with pytest.raises(
        HostError, match=r"no cell can be made .* \(Operation not permitted\): without root, run"
    ):
        Cell(tmp_path)


OWNER = """
import os, sys, time
from pathlib import Path
from ratoon.jail import user_namespace
from ratoon.jail.cell import Cell, Inmate
from ratoon.jail.tree import tree
cell = Cell(tree([Path("/usr/bin/busybox")], {{}}, []))
process = cell.start(Inmate(["/usr/bin/busybox", "sleep", "1000"], 2, survives={survives}))
print(process.pid, flush=True)
time.sleep(1000)
"""


def test_a_closed_one_leaves_nothing(output: int) -> None:
    before = descriptors()
    with Cell(tree([BUSYBOX], {})) as cell:
        process = cell.start(Inmate([SH, "sleep", "1000"], output))
    assert descriptors() == before
    assert process.poll() is None
    process.kill()
    process.wait()


@pytest.mark.parametrize("survives", [True, False])
def test_it_outlives_its_owner_or_not(survives: bool) -> None:
    script = OWNER.format(survives=survives)
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert owner.stdout
    pid = int(owner.stdout.readline())
    pidfd = os.pidfd_open(pid)
    until(lambda: Path(f"/proc/{pid}/comm").read_text() == "busybox\n")  # no more setpriv
    owner.kill()
    owner.wait()
    owner.stdout.close()
    if survives:
        time.sleep(0.5)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in state_of(pid))


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_tree_is_made_once_and_anew_for_another_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATOON_CACHE", str(tmp_path / "cache"))
    program = tmp_path / "busybox"
    program.write_bytes(BUSYBOX.read_bytes())
    first = tree([program], {}, ["place"])
    assert tree([program], {}, ["place"]) == first
    assert (first / str(program)[1:]).stat().st_mode & 0o777 == 0o555
    assert (first / "place").read_bytes() == b""
    os.utime(program, (1, 1))
    assert tree([program], {}, ["place"]) != first
    with pytest.raises(HostError, match="nowhere: No such file"):
        tree([tmp_path / "nowhere"], {}, [])


def test_users_that_are_all_in_use(
    cell: Cell, output: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error, and no search that never ends; as soon as one is free, it is taken."""
    own, nobody = os.getuid(), free_ids()[0]
    monkeypatch.setattr(user_namespace, "free_ids", lambda: range(own, own + 1))
    with pytest.raises(HostError, match=r"all 1 user ids .* in use: end some sandboxes"):
        said(cell, output, "true")
    monkeypatch.setattr(user_namespace, "free_ids", lambda: [*[own] * 1000, nobody])
    assert said(cell, output, "busybox id -u").split() == [str(nobody)]


def test_files_that_cannot_be_lent(
    cell: Cell, output: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a file system whose server does not know such a user."""

    def refuse(fd: int, uid: int, gid: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(HostError, match=r"given cannot be lent .*not permitted.* local file"):
        said(cell, output, "true", lent={"given": output})


def test_what_is_left_in_the_owner(cell: Cell, output: int) -> None:
    """Its credentials, its namespaces and what it may look into are as they were."""
    before = owner()
    said(cell, output, "true")
    assert owner() == before


def owner() -> str:
    status = json.dumps(Path("/proc/self/status").read_text().splitlines()[8:12])
    spaces = sorted(f"{each.readlink()}" for each in Path("/proc/self/ns").iterdir())
    return f"{status} {spaces} {Path('/proc/self/mem').stat().st_uid} {Path.cwd()}"
