"""Which processes are in cells, by the name that each was given.

That is the host name of its namespace. A program that was broken into can close its files, and
write another command line; its host name it cannot change, as it has no capability.
"""

from __future__ import annotations

import os
from pathlib import Path

from blake3 import blake3

from ratoon import syscalls
from ratoon.jail.cell import in_own_thread
from ratoon.jail.user_namespace import free_ids
from ratoon.syscalls import CLONE_NEWUTS


def name_for(directory: Path) -> str:
    """That of programs which are started for what lies in a directory; host names are short."""
    return f"ratoon-{blake3(os.fsencode(directory)).hexdigest()[:32]}"


def inmates(name: str) -> list[int]:
    """The processes in cells that have this name."""
    return in_own_thread(lambda: [pid for pid in _drawn() if _host_name(pid) == name])


def _drawn() -> list[int]:
    """Those of users that are drawn for cells; where there are none, this process's own."""
    found, users = [], free_ids() or (os.geteuid(),)
    for place in Path("/proc").glob("[0-9]*"):
        try:
            uid = (place / "status").read_text().partition("\nUid:\t")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(uid) in users:
            found.append(int(place.name))
    return found


def _host_name(pid: int) -> str | None:
    """None: it has ended, or is none of ours. This thread has that name from now on."""
    try:
        namespace = os.open(f"/proc/{pid}/ns/uts", os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.setns(namespace, CLONE_NEWUTS)
        finally:
            os.close(namespace)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return os.uname().nodename
