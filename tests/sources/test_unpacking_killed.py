"""A disk that is made while its maker is killed: no process is left, and there is no mount."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SCRIPT = """
import sys, time
from pathlib import Path
from ratoon.engine.sources.disk import make_disk
from ratoon.engine.sources.merge import Tree
from ratoon.engine.sources.tar_stream import FILE, Inode, Member

room, tree = Path(sys.argv[1]), Tree()
tree.add(Member(b"endless", Inode(FILE, size=32 << 20)), whiteouts=False)

def endless():
    yield bytes(16 << 20)
    (room / "started").touch()
    time.sleep(10000)

make_disk(room, 64 << 20, "x", tree, lambda wanted: ((inode, endless()) for inode in wanted))
"""


def children(process: int) -> dict[Path, str]:
    """Those of a process, by their places in /proc, and what they are called."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            _, _, rest = (path / "stat").read_text().rpartition(") ")
            if int(rest.split()[1]) == process:
                found[path] = (path / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_until(met: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not met():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    room = tmp_path / "killed-room"
    room.mkdir()
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, room])
    try:
        wait_until((room / "started").exists, "it does not begin")
        tools = children(process.pid)
        assert [*tools.values()] == ["mke2fs"]
        mounts = Path(f"/proc/{process.pid}/mountinfo").read_text()
        assert str(room) not in mounts, "nothing is mounted in the first place"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: not any(path.exists() for path in tools), f"left: {tools}")
    assert {path.name for path in room.iterdir()} == {"started", "disk.raw"}
    assert (room / "disk.raw").stat().st_mode & 0o777 == 0o600
