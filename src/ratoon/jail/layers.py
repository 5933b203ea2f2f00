"""Which layers hold around a process that runs, read off it: see proc(5), status, ns and root.

What the kernel does not tell of is left out: Landlock.
"""

from __future__ import annotations

import os
from pathlib import Path

from ratoon.jail.user_namespace import free_ids

_NAMESPACES = {"mnt": "mounts", "pid": "processes", "ipc": "ipc", "uts": "name", "net": "network"}
_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
#: QEMU's own filter, and the cell's.
_FILTERS = 2


def layers_of(pid: int) -> dict[str, bool]:
    """Whether each layer holds, by its name. ProcessLookupError: the process is gone.

    user: an id that nobody else has, and no group; capabilities: none, by whatever way; privileges:
    it gains none; filters: the cell's for system calls, and QEMU's; root: another directory than
    the host's; mounts, processes, ipc, name, network: a namespace other than this process's.
    """
    place = Path(f"/proc/{pid}")
    try:
        lines = (line.partition(":\t") for line in (place / "status").read_text().splitlines())
        status = {name: value.split() for name, _, value in lines}
        root, own = (place / "root").stat(), Path("/").stat()
        apart = {
            layer: (place / "ns" / kind).readlink() != Path("/proc/self/ns", kind).readlink()
            for kind, layer in _NAMESPACES.items()
        }
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    ids = {int(each) for kind in ("Uid", "Gid") for each in status[kind]}
    return {
        "user": len(ids) == 1 and min(ids) in free_ids() and not status["Groups"],
        "capabilities": not any(int(status[kind][0], 16) for kind in _CAPABILITIES),
        "privileges": status["NoNewPrivs"] == ["1"],
        "filters": int(status.get("Seccomp_filters", ["0"])[0]) >= _FILTERS,
        "root": not os.path.samestat(root, own),
        **apart,
    }
