"""Control groups: how much memory, processor time and threads a sandbox's process may have.

A sandbox's groups are made below the engine's own, as `ratoon/STORE/ID`, so that what limits the
engine limits all of its sandboxes. They are made for a sandbox with a limit alone: moving a process
takes the kernel some ten milliseconds.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ratoon.errors import HostError
from ratoon.jail.user_namespace import lends_ids
from ratoon.machine.host.hierarchies import Hierarchy, make_room, pass_on, with_controller
from ratoon.units import format_mib

if TYPE_CHECKING:
    from ratoon.machine.host.limits import Limits

log = logging.getLogger(__name__)

#: In the sandbox's directory: version, controllers and directory of each of its groups.
RECORD = "cgroups"
#: Microseconds over which processor time is dealt out.
PERIOD_US = 100_000
#: Bytes by which the kernel may miss the limit: what is asked for at once.
LAST_CHARGE = 4 * 1024 * 1024
_SWAP = ("memory.memsw.limit_in_bytes", "memory.swap.max")
#: Seconds within which a group that was emptied can be removed.
EMPTY_TIMEOUT = 5.0


@dataclass(frozen=True)
class Group:
    """One directory of one hierarchy, and the controllers that are used there."""

    directory: Path
    version: int
    controllers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.version} {','.join(self.controllers)} {self.directory}"

    @classmethod
    def parse(cls, text: str) -> Self:
        version, controllers, directory = text.split(" ", 2)
        return cls(Path(directory), int(version), tuple(controllers.split(",")))

    def count(self, name: str, key: str) -> int:
        """A figure of one of its files with lines `key value`."""
        lines = (self.directory / name).read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)


@dataclass(frozen=True)
class Cgroup:
    """The groups of one sandbox, one a hierarchy. Implements `driver.Cgroup`.

    `tasks`: how many its process may have as a user of its own; None: a group bounds that.
    """

    groups: tuple[Group, ...]
    limits: Limits
    tasks: int | None = None

    def add(self, pid: int) -> None:
        """Move a process in, with what it will start; blocks for some milliseconds. HostError.

        What it has allocated before stays with the group that it came from.
        """
        if self.tasks is not None:
            with suppress(ProcessLookupError):
                _limit_tasks(pid, self.tasks)
        for group in self.groups:
            try:
                (group.directory / "cgroup.procs").write_text(str(pid))
            except ProcessLookupError:  # it died; whoever waits for it will hear
                return
            except OSError as error:
                raise HostError(
                    f"process {pid} was not let into {group.directory} ({error.strerror}); "
                    "its sandbox cannot be limited"
                ) from error

    def cause_of_death(self) -> str | None:
        """Which of the limits ended the process, if one did."""
        with suppress(FileNotFoundError):  # the groups have been removed
            for group in self.groups:
                if "memory" in group.controllers and (cause := self._out_of_memory(group)):
                    return cause
                if "pids" in group.controllers and group.count("pids.events", "max"):
                    return f"it could not start a thread: {self.limits.pids} are its limit"
        return None

    def _out_of_memory(self, group: Group) -> str | None:
        """What the kernel has counted says: killed or not, and for whose limit."""
        assert self.limits.memory_bytes is not None
        if group.version == 1:
            killed = group.count("memory.oom_control", "oom_kill")
            # Not failcnt: some kernels leave it at 0.
            most = int((group.directory / "memory.max_usage_in_bytes").read_text())
            reached = most > self.limits.memory_bytes - LAST_CHARGE
        else:
            killed = group.count("memory.events", "oom_kill")
            reached = group.count("memory.events", "oom") > 0
        if not killed:
            return None
        if not reached:
            return "the kernel killed it for want of memory: the host, or what the engine may use"
        size = format_mib(self.limits.memory_bytes)
        return f"the kernel killed it at its memory limit of {size}; give it a higher one"


class Cgroups:
    """Makes the groups of one store's sandboxes; `store` is a name that no other store has."""

    def __init__(self, store: str, hierarchies: Sequence[Hierarchy]) -> None:
        self._store = store
        self._hierarchies = hierarchies

    def create(self, sandbox: Path, limits: Limits) -> Cgroup | None:
        """The groups for the sandbox with this directory, or None if no limit needs any.

        They are noted in the directory, and `remove` goes by that. HostError: this host cannot
        limit what shall be limited.
        """
        remove(sandbox)
        tasks = _tasks(limits)
        places: dict[Hierarchy, list[str]] = {}
        for controller in _settings(limits, version=1):
            if controller != "pids" or tasks is None:
                places.setdefault(self._hierarchy(controller), []).append(controller)
        if not places:
            return None if tasks is None else Cgroup((), limits, tasks)
        groups = []
        for hierarchy, controllers in places.items():
            try:
                place = hierarchy.own
                if hierarchy.version == 2:
                    place = make_room(hierarchy, controllers)
            except OSError as error:
                raise _refusal(controllers, hierarchy.own, error) from error
            directory = place / "ratoon" / self._store / sandbox.name
            groups.append(Group(directory, hierarchy.version, tuple(controllers)))
        (sandbox / RECORD).write_text("".join(f"{group}\n" for group in groups))
        for group in groups:
            try:
                _make(group, limits)
            except OSError as error:
                remove(sandbox)
                raise _refusal(group.controllers, group.directory, error) from error
        return Cgroup(tuple(groups), limits, tasks)

    def _hierarchy(self, controller: str) -> Hierarchy:
        found = with_controller(self._hierarchies, controller)
        if found is None:
            raise HostError(
                f"no {controller} limit can be set: no control groups with that controller are "
                "mounted here; leave the limit out, or mount /sys/fs/cgroup"
            )
        return found


def find(sandbox: Path, limits: Limits) -> Cgroup | None:
    """The groups that were made for a sandbox, by another process perhaps; None if it has none."""
    groups = _recorded(sandbox)
    return Cgroup(groups, limits, _tasks(limits)) if groups else None


def remove(sandbox: Path) -> None:
    """Remove the groups that were made for a sandbox, and kill what is left in them; blocks.

    Whoever calls this for a sandbox of another process holds its directory.
    """
    for group in _recorded(sandbox):
        _remove(group.directory)
    (sandbox / RECORD).unlink(missing_ok=True)


def _recorded(sandbox: Path) -> tuple[Group, ...]:
    try:
        lines = (sandbox / RECORD).read_text().splitlines()
    except FileNotFoundError:
        return ()
    groups = map(Group.parse, lines)
    return tuple(group for group in groups if group.directory.name == sandbox.name)


def _tasks(limits: Limits) -> int | None:
    """Where each machine is a user of its own, threads can be counted by that.

    Root of a user namespace may do so, whatever its host gives it.
    """
    return limits.pids if lends_ids() else None


def _settings(limits: Limits, version: int) -> dict[str, dict[str, str]]:
    """What to write into the files of each controller that is needed."""
    wanted = {}
    if limits.memory_bytes is not None:
        size = str(limits.memory_bytes)
        # No swap beyond it either: all others would wait for the disk.
        wanted["memory"] = (
            {"memory.limit_in_bytes": size, "memory.memsw.limit_in_bytes": size}
            if version == 1
            else {"memory.max": size, "memory.swap.max": "0"}
        )
    if limits.cpus is not None:
        quota = str(round(limits.cpus * PERIOD_US))
        wanted["cpu"] = (
            {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": quota}
            if version == 1
            else {"cpu.max": f"{quota} {PERIOD_US}"}
        )
    if limits.pids is not None:
        wanted["pids"] = {"pids.max": str(limits.pids)}
    return wanted


def _make(group: Group, limits: Limits) -> None:
    store = group.directory.parent
    # Another engine may take an empty directory above away at any moment.
    for attempt in range(10):
        try:
            for directory in (store.parent, store):
                directory.mkdir(exist_ok=True)
                if group.version == 2:
                    pass_on(directory, group.controllers)
            group.directory.mkdir()
            break
        except FileNotFoundError:
            if attempt == 9:
                raise
    settings = _settings(limits, group.version)
    for controller in group.controllers:
        for name, value in settings[controller].items():
            path = group.directory / name
            if name in _SWAP and not path.exists():  # the kernel does not account for it
                continue
            path.write_text(value)


def _limit_tasks(pid: int, most: int) -> None:
    """Those of the process's user in this user namespace: RLIMIT_NPROC of setrlimit(2)."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_NPROC)
    least = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.prlimit(pid, resource.RLIMIT_NPROC, (least, least))


def _remove(directory: Path) -> None:
    deadline = time.monotonic() + EMPTY_TIMEOUT
    while True:
        with suppress(OSError, ValueError):
            for pid in (directory / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            directory.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno == errno.EBUSY and time.monotonic() < deadline:
                time.sleep(0.005)
                continue
            log.warning("the control group %s stays: %s", directory, error.strerror)
            return
        break
    for parent in (directory.parent, directory.parent.parent):
        with suppress(OSError):  # others have groups in there
            parent.rmdir()


def _refusal(controllers: Sequence[str], place: Path, error: OSError) -> HostError:
    what = " or ".join(controllers)
    return HostError(
        f"no {what} limit can be set: {place}: {error.strerror}; leave the limit out, or run the "
        "engine in a control group that is its own (systemd-run -p Delegate=yes …, with --user if "
        "it is not root's)"
    )
