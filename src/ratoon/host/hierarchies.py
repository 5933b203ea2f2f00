"""Where the kernel's control groups are on this host, and where this process is among them.

Version 1 has a hierarchy for each controller, or for a few together; version 2 has one for all that
version 1 does not have. Some hosts have both (cgroups(7)).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hierarchy:
    """One hierarchy: its top as it is mounted here, and this process's group in it.

    `controllers` are those of version 1; which ones version 2 has is said by files in it.
    """

    version: int
    controllers: frozenset[str]
    top: Path
    own: Path


def hierarchies() -> list[Hierarchy]:
    """Those that this process can see and is in."""
    mounts = Path("/proc/self/mountinfo").read_text()
    return parse(mounts, Path("/proc/self/cgroup").read_text())


def parse(mounts: str, membership: str) -> list[Hierarchy]:
    """The hierarchies in the text of /proc/self/mountinfo, with the groups in /proc/self/cgroup.

    One whose mount does not show this process's group is left out: nothing can be made below it.
    """
    groups = {}
    for line in membership.splitlines():
        number, listed, path = line.split(":", 2)
        groups[frozenset(listed.split(",")) if number != "0" else frozenset[str]()] = path
    found: dict[frozenset[str], Hierarchy] = {}
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind not in ("cgroup", "cgroup2"):
            continue
        *_, root, top = (_unescape(word) for word in before.split(" ")[:5])
        names = frozenset(options.split(",")) if kind == "cgroup" else frozenset[str]()
        key = next((key for key in groups if key <= names and bool(key) == bool(names)), None)
        if key is None or key in found:
            continue
        below = _below(groups[key], root)
        if below is not None:
            found[key] = Hierarchy(2 if kind == "cgroup2" else 1, key, Path(top), Path(top, below))
    return list(found.values())


def with_controller(found: Sequence[Hierarchy], controller: str) -> Hierarchy | None:
    """The hierarchy that has `controller`: version 1 where it is there, else version 2."""
    for hierarchy in found:
        if controller in hierarchy.controllers:
            return hierarchy
    for hierarchy in found:
        if hierarchy.version == 2 and controller in words(hierarchy.top / "cgroup.controllers"):
            return hierarchy
    return None


def words(path: Path) -> list[str]:
    """What a file lists; nothing if there is no such file."""
    try:
        return path.read_text().split()
    except FileNotFoundError:
        return []


def _below(path: str, root: str) -> str | None:
    """`path` relative to a mount that shows `root` at its top; None if it is not below that."""
    inside = root.rstrip("/") + "/"
    if ".." in path.split("/") or not f"{path}/".startswith(inside):
        return None
    return path[len(inside) :]


def _unescape(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)
