"""The process of a machine: its death is noticed at once, whether it was started here or found."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

#: How much sooner than its owner a machine is chosen when the host has no memory left (proc(5)).
OOM_SCORE = 500


class MachineProcess:
    """A process that is watched until it is gone, or let go."""

    def __init__(self, pid: int, child: subprocess.Popen[bytes] | None = None) -> None:
        """`child`: it was started by this process, which reaps it. ProcessLookupError: it is gone.

        Its number could be another's by then: who has found it makes sure afterwards.
        """
        self.pid = pid
        #: Done once it is gone: the exit status, as Popen gives it, None where it was no child.
        self.died: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        #: Called just before that.
        self.on_death: Callable[[int | None], None] = lambda status: None
        self._child = child
        self._pidfd: int | None = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._end)

    async def wait(self) -> None:
        """Return once it is gone."""
        await asyncio.shield(self.died)

    def kill(self) -> None:
        """Send SIGKILL; safe to repeat."""
        if self._pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def let_go(self) -> None:
        """Watch it no more; it goes on."""
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        if self._child:
            self._child.returncode = 0  # or Popen would warn that it runs

    def _end(self) -> None:
        child = self._child
        self.let_go()
        if child:
            child.returncode = None
            status: int | None = child.wait()
        else:
            status = None
        self.on_death(status)
        self.died.set_result(status)


def started_at(pid: int) -> int:
    """When process `pid` was started, in clock ticks since the boot: with it, a name for ever.

    proc(5), field 22 of /proc/PID/stat. ProcessLookupError: it is gone, or a zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    if fields[0] in "ZX":
        raise ProcessLookupError(f"process {pid} has ended")
    return int(fields[19])


def prefer_to_kill(pid: int) -> None:
    """Have the kernel choose this process before its owner when the host's memory is used up."""
    with suppress(ProcessLookupError, FileNotFoundError):
        score = int(Path("/proc/self/oom_score_adj").read_text()) + OOM_SCORE
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(min(score, 1000)))
