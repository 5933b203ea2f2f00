"""Unpacking that is killed: no mount, no loop device and no process is left of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from disk_looks import loop_devices_of

SCRIPT = """
import sys
from pathlib import Path
from ratoon.engine.sources.disk import fill_disk
room = Path(sys.argv[1])
fill_disk(room, 64 << 20, "x", ["sh", "-c", "touch root/x started; exec sleep 10000", str(room)])
"""


def traces(room: Path) -> list[str]:
    """Processes that were given the room, and loop devices of files in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(room).encode() in path.read_bytes() and path.parent.name != "self":
                found.append(path.read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found + loop_devices_of(room)


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
        assert any("backing_file" in trace for trace in traces(room))
        assert len(traces(room)) > 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: not traces(room), f"left: {traces(room)}")
    assert str(room) not in Path("/proc/self/mountinfo").read_text()
