"""Whom the kernel has killed for want of memory, by its own log."""

from __future__ import annotations

import os
import re
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .process import Process

LOG = "/dev/kmsg"
#: More than a record has; one read gives one (Documentation/ABI/testing/dev-kmsg).
RECORD = 8192
#: Microseconds since the start, and what mm/oom_kill.c says then.
KILLED = re.compile(
    rb"\d+,\d+,(?P<at>\d+),[^;]*;Out of memory: Killed process (?P<pid>\d+) \((?P<name>.*)\) "
    rb"total-vm:\d+kB, anon-rss:(?P<kib>\d+)kB"
)
#: Those that are remembered.
REMEMBERED = 100
#: Seconds that the log's clock may differ from ours.
TOLERANCE = 1.0


class Victims:
    """Made before the agent enters the sandbox's root, where the log is out of reach.

    The log is read only when somebody was killed: no fork has work with it.
    """

    def __init__(self) -> None:
        self._log = os.open(LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._log, 0, os.SEEK_END)
        self._found: list[re.Match[bytes]] = []

    def reason(self, process: Process, status: int) -> str | None:
        """Why a process has ended so, where that was the want of memory.

        Of a shell's child too: it is what the shell exits with 137 for.
        """
        code = os.waitstatus_to_exitcode(status)
        if code not in (-signal.SIGKILL, 128 + signal.SIGKILL):
            return None
        self._read()
        since = time.monotonic() - (time.time() - process.started_at) - TOLERANCE
        for killed in reversed(self._found):
            itself = int(killed["pid"]) == process.pid
            if itself if code < 0 else int(killed["at"]) / 1e6 >= since:
                self._found.remove(killed)
                return _told(killed)
        return None

    def _read(self) -> None:
        while True:
            try:
                killed = KILLED.match(os.read(self._log, RECORD))
            except BrokenPipeError:  # older ones were overwritten: it goes on with the next
                continue
            except OSError:  # there is no more
                break
            if killed is not None:
                self._found.append(killed)
        del self._found[:-REMEMBERED]


def _told(killed: re.Match[bytes]) -> str:
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    name, used = killed["name"].decode(errors="replace"), int(killed["kib"]) >> 10
    return (
        f"out of memory: of the sandbox's {size} MiB, {name} (process {int(killed['pid'])}) "
        f"had {used} MiB, and the kernel killed it"
    )
