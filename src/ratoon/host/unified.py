"""Version 2 of control groups: a place where groups with controllers can be made.

A group that hands controllers to groups below it may have no processes itself, the top excepted
(Documentation/admin-guide/cgroup-v2.rst, "No Internal Process Constraint"). So there are three such
places: below a group whose processes are the engine's own, which move down first; below one that
hands them on already; and below the top.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ratoon.errors import HostError
from ratoon.host.hierarchies import Hierarchy, words

#: What the engine moves down into, where it makes room.
ENGINE = "ratoon-engine"


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
        "own (systemd-run -p Delegate=yes …), or leave the limit out"
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
