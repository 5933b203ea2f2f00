"""Removing the sandboxes whose owner died."""

from __future__ import annotations

import json
import logging
import os
import signal
from contextlib import suppress
from pathlib import Path

from ratoon import files
from ratoon.sandbox.directory import STATE, SandboxDirectory
from ratoon.snapshot.store import Store

log = logging.getLogger(__name__)


def sweep(store: Store, runtime: Path) -> None:
    """Remove sandboxes whose owner died; one that somebody holds is not touched.

    Their machines die with their owner; should one have survived, it is killed.
    """
    with files.locked(store.lock):
        for directory in store.sandboxes.iterdir():
            if not directory.is_dir():  # no sandbox; `ratoon check` tells of it
                continue
            lock = files.try_lock_directory(directory)
            if lock is None:
                continue
            _kill_leftover(directory)
            SandboxDirectory(directory, lock, runtime).remove()
            log.info("removed sandbox %s, whose owner died", directory.name)


def _kill_leftover(directory: Path) -> None:
    """Kill the recorded process, if it still is this sandbox's machine and not another's number."""
    with suppress(OSError, ValueError, KeyError):
        pid = int(json.loads((directory / STATE).read_text())["pid"])
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if directory.name.encode() in arguments:
            os.kill(pid, signal.SIGKILL)
