"""Removing the sandboxes whose owner died, and that nobody is to take over."""

from __future__ import annotations

import logging
import os
import select
import signal
from contextlib import ExitStack, suppress
from pathlib import Path

from ratoon import files
from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.record import processes_of, read_record
from ratoon.store.snapshot.store import Store

log = logging.getLogger(__name__)

#: Seconds for a killed machine to end.
PATIENCE = 10.0


def sweep(store: Store, runtime: Path, *, claim: bool = False) -> list[SandboxDirectory]:
    """Remove what nobody holds and nobody is to take over; to `claim` is to hold what somebody is.

    Machines die with their owner, unless they are written down; should one have survived all the
    same, it is killed.
    """
    found = []
    with files.locked(store.lock):
        for path in store.sandboxes.iterdir():
            if not path.is_dir():  # no sandbox; `ratoon check` tells of it
                continue
            lock = files.try_lock_directory(path)
            if lock is None:
                continue
            directory = SandboxDirectory(path, lock, runtime)
            if read_record(path):
                if claim:
                    found.append(directory)
                else:
                    directory.let_go()
                continue
            kill_strays(path)
            directory.remove()
            log.info("removed sandbox %s, whose owner died", path.name)
    return found


def kill_strays(directory: Path, *, keep: int | None = None) -> None:
    """Kill the machines that were started for a sandbox's directory, all but one; blocks.

    They are gone then: one that is ending holds the locks of its disk until its memory is freed.
    """
    with ExitStack() as held:
        killed = {}
        for pid in processes_of(directory):
            if pid != keep:
                with suppress(ProcessLookupError):
                    killed[pid] = fd = os.pidfd_open(pid)
                    held.callback(os.close, fd)
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
        for pid, fd in killed.items():
            end = select.poll()
            end.register(fd, select.POLLIN)
            if not end.poll(PATIENCE * 1e3):
                log.warning("process %d of %s was killed, and does not end", pid, directory)
