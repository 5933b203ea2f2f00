"""Programs that are run in a cell to their end, and the files that they are lent for it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import children, descriptors, until
from ratoon.errors import HostError, ProgramFailed
from ratoon.jail import errand as errand_module
from ratoon.jail.cell import Cell
from ratoon.jail.errand import Errand
from ratoon.jail.tree import tree
from ratoon.jail.user_namespace import free_ids

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make cells")

BUSYBOX = Path("/usr/bin/busybox")
MIB = 1 << 20


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    with Cell(tree([BUSYBOX], {}, ["files/"])) as cell:
        yield cell


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = descriptors(), children()
    yield
    until(lambda: (descriptors(), children()) == before)


def a_shell(cell: Cell, longest: int = MIB) -> Errand:
    return Errand(cell, str(BUSYBOX), longest)


def said(cell: Cell, script: str) -> str:
    with a_shell(cell) as shell:
        return shell.run("sh", "-c", script).decode()


def test_what_it_says(cell: Cell) -> None:
    assert said(cell, "echo to one; echo to the other >&2") == "to one\n"
    with pytest.raises(
        ProgramFailed, match=r"^busybox failed with exit code 3:\nto one\nto the other$"
    ):
        said(cell, "echo to one; echo to the other >&2; exit 3")
    with a_shell(cell) as shell:
        assert shell.run("sh", "-c", "echo more; exit 3", good=(0, 3)) == b"more\n"


def test_what_it_says_is_bounded(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errand_module, "MOST_SAID", 5000)
    with pytest.raises(HostError) as failure:
        said(cell, "busybox yes; exit 1")
    assert "not permitted" in str(failure.value)
    assert len(str(failure.value)) < 2100


def test_what_it_is_given(cell: Cell, tmp_path: Path) -> None:
    """Those files, and no others; it can change what it was lent alone."""
    paths = [tmp_path / name for name in ("read", "private", "written")]
    for path in paths:
        path.write_text(f"{path.name}\n")
        path.chmod(0o444 if path.name == "read" else 0o600)
    script = """
busybox cat /files/0 /files/1 /files/2
busybox find / -type f | busybox grep -v -e /lib -e /usr | busybox sort
for f in /files/0 /files/1 /files/3 /new
do echo x >$f; busybox chmod 777 $f; busybox rm -f $f
done
echo changed >/files/2
busybox chmod 6777 /files/2
busybox rm -f /files/2
busybox id -u; busybox id -G; busybox stat -c %u /files/2
"""
    with a_shell(cell) as shell:
        read, private, written = paths
        names = [shell.reads(read), shell.reads(private), shell.writes(written)]
        assert names == ["/files/0", "/files/1", "/files/2"]
        *lines, uid, groups, owner = shell.run("sh", "-c", script).decode().splitlines()
        assert int(owner) == int(uid) == int(groups)
        assert int(uid) in free_ids()
        assert lines == ["read", "private", "written", *(f"/files/{n}" for n in range(3))]
        assert written.stat().st_uid == int(uid)
    assert [path.read_text() for path in paths] == ["read\n", "private\n", "changed\n"]
    for path, mode in zip(paths, (0o444, 0o644, 0o600), strict=True):
        info = path.stat()
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (0, 0, mode)


def test_many_files(cell: Cell, tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / str(number)).write_text(f"{number}\n")
    with a_shell(cell) as shell:
        names = [shell.reads(tmp_path / str(number)) for number in range(300)]
        assert shell.run("cat", *names).split() == [b"%d" % number for number in range(300)]


def test_no_file_gets_longer_than_it_may(cell: Cell, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with a_shell(cell, longest=8192) as shell:
        name = shell.writes(tmp_path / "file")
        with pytest.raises(ProgramFailed, match="File too large"):
            shell.run("sh", "-c", f"busybox sleep 1; busybox yes >{name}")
    assert (tmp_path / "file").stat().st_size == 8192


def test_it_is_fed(cell: Cell) -> None:
    def feed(fd: int) -> None:
        for _ in range(64):
            os.write(fd, b"x" * 65536)

    with a_shell(cell) as shell:
        assert shell.run("wc", "-c", feed=feed) == b"%d\n" % (64 * 65536)
    with a_shell(cell) as shell:
        assert shell.run("wc", "-c") == b"0\n"


def test_it_ends_before_it_has_read_all(cell: Cell) -> None:
    def feed(fd: int) -> None:
        while True:
            os.write(fd, b"x" * 65536)

    with a_shell(cell) as shell, pytest.raises(ProgramFailed, match="exit code 7"):
        shell.run("sh", "-c", "exit 7", feed=feed)


@pytest.mark.parametrize("error", [ValueError("it cannot be fed"), KeyboardInterrupt()])
def test_what_fails_meanwhile_ends_it(cell: Cell, tmp_path: Path, error: BaseException) -> None:
    """And what it was lent is as it was."""
    (tmp_path / "file").touch(0o600)

    def feed(fd: int) -> None:
        until(lambda: (tmp_path / "file").stat().st_size > 0)
        assert (tmp_path / "file").stat().st_uid in free_ids()
        raise error

    before = children()
    with a_shell(cell) as shell:
        name = shell.writes(tmp_path / "file")
        with pytest.raises(type(error)):
            shell.run("sh", "-c", f"echo x >{name}; exec busybox sleep 1000", feed=feed)
        assert children() == before
    assert (tmp_path / "file").stat().st_uid == 0


def test_nothing_of_it_goes_on(cell: Cell, tmp_path: Path) -> None:
    """What it leaves behind in its namespace ends with it."""
    (tmp_path / "file").touch()
    with a_shell(cell) as shell:
        name = shell.writes(tmp_path / "file")
        shell.run("sh", "-c", f"(while :; do echo x >{name}; done) & busybox sleep 0.1")
    written = (tmp_path / "file").stat().st_mtime_ns
    time.sleep(0.2)
    assert (tmp_path / "file").stat().st_mtime_ns == written


def test_a_file_that_is_not_there(cell: Cell, tmp_path: Path) -> None:
    with a_shell(cell) as shell, pytest.raises(FileNotFoundError, match="nowhere"):
        shell.reads(tmp_path / "nowhere")


def test_from_a_thread(cell: Cell) -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(said(cell, "echo there")))
    thread.start()
    thread.join()
    assert found == ["there\n"]


OWNER = """
from pathlib import Path
from ratoon.jail.cell import Cell
from ratoon.jail.errand import Errand
from ratoon.jail.tree import tree
from ratoon.jail.user_namespace import free_ids
cell = Cell(tree([Path("/usr/bin/busybox")], {}, ["files/"]))
with Errand(cell, "/usr/bin/busybox", 1 << 20) as shell:
    name = shell.writes(Path("file"))
    shell.run("sh", "-c", f"echo x >{name}; exec busybox sleep 1000")
"""


def test_it_dies_with_its_owner(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    owner = subprocess.Popen([sys.executable, "-c", OWNER], cwd=tmp_path)
    until(lambda: file.stat().st_size > 0)
    (pid,) = children(owner.pid)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    until(lambda: not Path(f"/proc/{pid}").exists())
