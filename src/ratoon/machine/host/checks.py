"""What `ratoon doctor` tells of a host: each check is one line, judged from figures it is given.

A host with a `bad` check runs no sandboxes. With a `warn` it does, but lacks something, and the
check says what to do about that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ratoon.errors import RatoonError
from ratoon.machine.host import programs
from ratoon.machine.host.admission import Cost, Reserve
from ratoon.machine.host.cgroups import Cgroup, remove
from ratoon.machine.host.figures import Figures, file_system
from ratoon.machine.host.limits import LEAST_MEMORY, LEAST_PIDS, Limits
from ratoon.units import GIB, format_size

State = Literal["ok", "warn", "bad"]

#: A base takes some hundred MiB, its image and downloads as much again.
COMFORTABLE_DISK = 5 * GIB
#: File systems of other hosts: their locks and owners are not to be relied on.
NETWORKED = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "fuse.sshfs", "fuse.glusterfs"}
#: Fewer than this is too few to be what anybody wants.
COMFORTABLE_FORKS = 16


@dataclass(frozen=True)
class Check:
    """What was looked at, how that is, what was found, and, unless it is ok, what to do.

    `details`: what programs said of it, word for word.
    """

    name: str
    state: State
    found: str
    todo: str = ""
    details: str = ""


def check_user(
    name: str | None, lent: int, lacking: Sequence[str] = (), barred: str | None = None
) -> Check:
    """`name`: of who is not root; `lent`: how many ids he has besides his own, in the namespace.

    `lacking`: what root is to run for him to have such. `barred`: why he has no namespace.
    """
    if name is None:
        return Check("user", "ok", "root")
    if barred is not None:
        return Check(
            "user", "bad", f"{name}, and {barred}", "nothing runs here without root so far"
        )
    if lent:
        return Check("user", "ok", f"{name}, in a user namespace with {lent} more ids")
    return Check(
        "user",
        "warn",
        f"{name}, in a user namespace with no other id: QEMU is {name} himself there, `debian` "
        "images cannot be built, and only root of a guest can use its volumes",
        f"as root: {' && '.join(lacking) or 'lend more ids, see subuid(5)'}; then end the daemon, "
        "and all sandboxes",
    )


def lacking_for_ids(
    lend: str | None, which: Callable[[str], str | None] = programs.find
) -> list[str]:
    """What root runs for an ordinary user to have more ids; `lend` has him be lent some."""
    packages = programs.missing(which, ["newuidmap"])
    install = programs.command_for(packages, programs.release()) or "install newuidmap"
    return [*([install] if packages else []), *([lend] if lend else [])]


def check_programs(which: Callable[[str], str | None] = programs.find) -> Check:
    if missing := programs.missing(which):
        todo = programs.command_for(missing, programs.release())
        found = f"missing: {', '.join(missing)}"
        return Check("programs", "bad", found, f"as root: {todo}" if todo else "install these")
    if missing := programs.missing(which, programs.PACKAGES_OF_IMAGES):
        todo = programs.command_for(missing, programs.release())
        found = f"missing, for images `debian` and those of registries: {', '.join(missing)}"
        return Check("programs", "warn", found, f"as root: {todo}" if todo else "")
    return Check("programs", "ok", f"all {len(programs.PACKAGES)} are there")


def check_qemu(ask: Callable[[str], str], version: Callable[[], str]) -> Check:
    """`ask` gives QEMU's answer to an option with `help`; `version` its version."""
    try:
        number = version()
        machines, networks = ask("-machine").split(), ask("-netdev").split()
    except RatoonError as error:
        return Check("QEMU", "bad", str(error), "run `ratoon setup`")
    for what, there in (("microvm", machines), ("user", networks)):
        if what not in there:
            return Check(
                "QEMU", "bad", f"{number}, built without `{what}`", "use Debian's qemu-system-x86"
            )
    return Check("QEMU", "ok", number)


def check_directory(
    name: str,
    path: Path,
    reflinks: Callable[[Path], bool] | None = None,
    *,
    with_programs: bool = False,
    kind: Callable[[Path], str] = file_system,
) -> Check:
    """A place of ours, or where it would be made; `kind`: which file system it is on.

    `reflinks`: whether files there share data; that is asked of the store. `with_programs`: whether
    some are run there.
    """
    existing = next(each for each in (path, *path.parents) if each.exists())
    if reflinks is not None and existing == path and path.stat().st_uid != os.geteuid():
        return Check(
            name, "bad", f"{path} belongs to another user", "choose another: see the README"
        )
    if not os.access(existing, os.W_OK):
        return Check(name, "bad", f"{path} cannot be written", "choose another: see the README")
    status = os.statvfs(existing)
    if with_programs and status.f_flag & os.ST_NOEXEC:
        found = f"{path} is mounted with `noexec`, and programs are run there"
        return Check(name, "bad", found, f"set RATOON_{name.upper()} to a directory elsewhere")
    free = status.f_bavail * status.f_frsize
    found = f"{path}, {format_size(free)} free"
    if reflinks is not None:
        found += ", reflinks" if reflinks(existing) else ", no reflinks: images are copies"
    if (system := kind(existing)) in NETWORKED:
        todo = f"set RATOON_{name.upper()} to a local directory, and have one host use this one"
        return Check(name, "warn", f"{found}; on {system}, where forks are slow", todo)
    if free < COMFORTABLE_DISK:
        return Check(name, "warn", found, "make room: bases, images and forks grow here")
    return Check(name, "ok", found)


def check_memory(figures: Figures, cost: Cost, reserve: Reserve) -> Check:
    room = max(figures.memory_bytes - reserve.memory_bytes, 0) // cost.memory_bytes
    whose = "" if figures.memory_owner == "the host" else f" ({figures.memory_owner})"
    found = (
        f"{format_size(figures.memory_bytes)} of {format_size(figures.memory_total)} free{whose}: "
        f"room for about {room} forks"
    )
    if room < COMFORTABLE_FORKS:
        return Check("memory", "warn", found, "end other programs, or use a larger host")
    return Check("memory", "ok", found)


def check_swap(meminfo: Mapping[str, int]) -> Check:
    total = meminfo["SwapTotal"]
    used = total - meminfo["SwapFree"]
    if not total:
        return Check("swap", "ok", "none")
    found = f"{format_size(used)} of {format_size(total)} in use"
    if used > total // 10:
        todo = "branches wait for what is swapped out: end other programs, or `swapoff`"
        return Check("swap", "warn", found, todo)
    return Check("swap", "ok", found)


def check_counts(figures: Figures, cost: Cost) -> Check:
    files, threads = figures.files // cost.files, figures.threads // cost.threads
    found = (
        f"{figures.files} more open files, {figures.threads} more threads: "
        f"room for {min(files, threads)} forks"
    )
    if min(files, threads) >= COMFORTABLE_FORKS:
        return Check("file limits", "ok", found)
    which = "`ulimit -n`" if files < threads else "kernel.pid_max, or the pids.max of its group"
    return Check("file limits", "warn", found, f"raise {which}")


def check_dirty_pages(look: Callable[[], bool], ptrace_scope: int) -> Check:
    """`look` says whether PAGEMAP_SCAN is there; OSError if page tables cannot be read at all."""
    if ptrace_scope == 3:
        found = "no process may look into another (kernel.yama.ptrace_scope is 3)"
        return Check("dirty pages", "bad", found, "set it to 2 or less; that takes a reboot")
    try:
        scan = look()
    except OSError as error:
        found = f"page tables cannot be read ({error.strerror})"
        return Check("dirty pages", "bad", found, "use a kernel with CONFIG_PROC_PAGE_MONITOR")
    how = "listed by PAGEMAP_SCAN" if scan else "read from pagemap; Linux 6.7 and later list them"
    return Check("dirty pages", "ok", how)


_LIMITS = {
    "memory": Limits(memory_bytes=LEAST_MEMORY),
    "cpu": Limits(cpus=1),
    "pids": Limits(pids=LEAST_PIDS),
}


def check_limits(
    create: Callable[[Path, Limits], Cgroup | None], directory: Path, todo: str
) -> Check:
    """Which limits sandboxes can have, by doing it, for a sandbox in the empty `directory`.

    `todo`: what gives more. Disks can be limited everywhere.
    """
    by_groups, by_users, versions, refused = list[str](), list[str](), set[str](), list[str]()
    for name, limits in _LIMITS.items():
        try:
            cgroup = create(directory, limits)
        except RatoonError as error:
            refused.append(str(error))
            continue
        finally:
            remove(directory)
        assert cgroup is not None
        (by_groups if cgroup.groups else by_users).append(name)
        versions |= {str(group.version) for group in cgroup.groups}
    held = []
    if by_groups:
        how = f"by control groups of version {' and '.join(sorted(versions))}"
        held.append(f"{', '.join(by_groups)}, {how}")
    if by_users:
        held.append(f"{', '.join(by_users)}, by the users that machines are")
    if not refused:
        return Check("limits", "ok", "; ".join(held))
    return Check("limits", "warn", "; ".join([*held, *refused[:1]]), todo)


def way_to_limits(user: str | None, *, unified: bool, systemd: bool) -> str:
    """What gives sandboxes limits. `unified`: this host's control groups are of version 2."""
    if user is None:
        return "or run sandboxes without limits"
    if not unified:
        return (
            "users have no control groups of version 1: have root boot with "
            "systemd.unified_cgroup_hierarchy=1"
        )
    if not systemd:
        return "have root start your daemon in a control group that is yours"
    place = "/etc/systemd/system/user@.service.d"
    return (
        "have the daemon in a group of yours: systemd-run --user -p Delegate=yes ratoon serve; for "
        f"all limits, as root: mkdir -p {place} && printf '[Service]\\nDelegate=cpu memory pids\\n'"
        f" >{place}/ratoon.conf && systemctl daemon-reload, and log in anew"
    )


def check_network(
    firewall: str | None, resolver: str | None, nameserver: str, command: str | None
) -> Check:
    """`firewall`, `resolver`: what is wrong with either; see `network.fitness`.

    `command`: what root is to run for the former, if that is known.
    """
    if firewall is not None:
        found = f"{firewall}; until then sandboxes have no network but `none`"
        return Check("network", "warn", found, f"as root: {command}" if command else "")
    if resolver is not None:
        return Check("network", "warn", resolver)
    return Check("network", "ok", f"policies can be enforced; nameserver {nameserver}")


def check_jail(layers: Mapping[str, bool], missing: Sequence[str], *, one_id: bool) -> Check:
    """`layers`: which hold for a machine's process; `missing`: why steps were not taken here.

    `one_id`: there is no other user that it could be.
    """
    held = [name for name, holds in layers.items() if holds]
    open_ones = [name for name, holds in layers.items() if not holds]
    found = f"{len(held)} layers hold: {', '.join(held)}"
    if one_id and open_ones == ["user"]:
        found = f"{found}; but a machine is the user himself"
        return Check("jail", "warn", found, "have more ids, see `user`")
    if open_ones:
        found = f"of a machine's process these do not hold: {', '.join(open_ones)}"
        return Check("jail", "bad", found, "run nothing here that you do not trust")
    if missing:
        return Check("jail", "warn", f"{found}; but {'; '.join(missing)}", "use a later kernel")
    return Check("jail", "ok", found)


def check_images(make: Callable[[], None]) -> Check:
    """`make` makes a disk of an image that has nothing in it. An older mke2fs reads no tars."""
    try:
        make()
    except RatoonError as error:
        found = "no disks can be made of them, but of Debian's"
        todo = "install e2fsprogs 1.47.1 or later, and libarchive: `ratoon setup`"
        return Check("images", "warn", found, todo, str(error))
    return Check("images", "ok", "their disks can be made")


def check_clock(skew_seconds: float) -> Check:
    """`skew_seconds`: how much a fork's clock is ahead of the host's."""
    found = f"guest and host agree within {abs(skew_seconds):.1f} s"
    if abs(skew_seconds) <= 2:
        return Check("clock", "ok", found)
    found = f"the guest's is {skew_seconds:+.1f} s off the host's"
    return Check("clock", "warn", found, "is the host overloaded? try again")
