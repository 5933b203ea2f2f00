"""Where the kernel's control groups are on this host, this process among them, and can be made.

Version 1 has a hierarchy for each controller, or for a few together; version 2 has one for all that
version 1 does not have. Some hosts have both (cgroups(7)).

In version 2 a group that hands controllers to groups below it may have no processes itself, the top
excepted (Documentation/admin-guide/cgroup-v2.rst, "No Internal Process Constraint"). So there are
three places below which groups with controllers can be made: a group whose processes are the
engine's own, which move down first; one that hands them on already; and the top.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ratoon.errors import HostError

#: What the engine moves down into, where it makes room.
ENGINE = "ratoon-engine"


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


def make_room(hierarchy: Hierarchy, controllers: Sequence[str]) -> Path:
    """A group below which groups with these controllers can be made.

    HostError: there is none, and why. OSError: it cannot be written.
    """
    own = hierarchy.own.parent if hierarchy.own.name == ENGINE else hierarchy.own
    for place in (own, hierarchy.top):
        if not set(controllers) <= set(words(place / "cgroup.controllers")):
            continue
        if _may_pass_on(place, controllers) or (place == own and _step_down(own)):
            pass_on(place, controllers)
            return place
    raise HostError(
        f"no {' or '.join(controllers)} limit can be set: the control group {own} is not given "
        "that controller, or has processes that are not the engine's; run the engine in one of its "
        "own (systemd-run -p Delegate=yes …, with --user if it is not root's), or leave it out"
    )


def pass_on(group: Path, controllers: Sequence[str]) -> None:
    """Let the groups below `group` have these controllers; OSError."""
    control = group / "cgroup.subtree_control"
    if missing := set(controllers) - set(words(control)):
        control.write_text(" ".join(f"+{name}" for name in sorted(missing)))


def _may_pass_on(group: Path, controllers: Sequence[str]) -> bool:
    """Whether it is the top of all (it alone has no type), or hands them on already."""
    passed = words(group / "cgroup.subtree_control")
    return not (group / "cgroup.type").exists() or set(controllers) <= set(passed)


def _step_down(group: Path) -> bool:
    """Move all processes of `group` down if they are this one and what it has started."""
    below = group / ENGINE
    for _ in range(100):  # one that is being moved may start another
        inside = words(group / "cgroup.procs")
        if not inside:
            return True
        if not all(_is_ours(pid) for pid in inside):
            return False
        below.mkdir(exist_ok=True)
        for pid in inside:
            with suppress(ProcessLookupError):
                (below / "cgroup.procs").write_text(pid)
    raise OSError(errno.EBUSY, "it does not come to rest")


def _is_ours(pid: str) -> bool:
    """Whether it is this process or descends from it; one that is gone does not matter."""
    while pid not in ("0", "1"):
        if int(pid) == os.getpid():
            return True
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        pid = stat.rpartition(")")[2].split()[1]
    return int(pid) == os.getpid()


def _below(path: str, root: str) -> str | None:
    """`path` relative to a mount that shows `root` at its top; None if it is not below that."""
    inside = root.rstrip("/") + "/"
    if ".." in path.split("/") or not f"{path}/".startswith(inside):
        return None
    return path[len(inside) :]


def _unescape(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)
