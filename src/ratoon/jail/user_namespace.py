"""The user namespace in which an ordinary user does what root does elsewhere.

In it he has all capabilities over what is his, and nothing else of the host: for namespaces, mounts
and the user ids of cells. His files are root's there. It lasts as long as a process is in it.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ratoon import paths, syscalls
from ratoon.errors import HostError
from ratoon.syscalls import CLONE_NEWNS, CLONE_NEWUSER

#: What programs in cells are, as root of the host: nothing assigns these (systemd's list of user
#: ids); and in a user namespace, beyond those that images have.
_OF_ROOT, _OF_USERS = range(0x70000000, 0x7FFF0000), range(10_000, 65_000)
#: As many ids as images and users in guests commonly take, root's not counted.
_WANTED = 65535
_SELF = Path("/proc/self")
#: Who bars them: sysctl(8) of Debian's kernels, of all kernels, and of Ubuntu's AppArmor.
_WAYS_OUT = (
    "have root set kernel.unprivileged_userns_clone to 1, user.max_user_namespaces to more than 0, "
    "or kernel.apparmor_restrict_unprivileged_userns to 0, whichever it is here; or be root"
)
#: How an ordinary user comes by more ids than his own; for root to run.
HOW_TO_LEND = (
    "apt install uidmap && usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
)


@dataclass(frozen=True)
class IdRange:
    """`count` ids from `first` on, which here are those from `within` on."""

    within: int
    first: int
    count: int


def is_root_of_all() -> bool:
    """Whether this process is root, and not in a user namespace only."""
    return os.geteuid() == 0 and _ranges("uid_map") == [IdRange(0, 0, (1 << 32) - 1)]


def free_ids() -> range:
    """Ids of users and groups that programs in cells may have; none, if there is root's alone."""
    if is_root_of_all():
        return _OF_ROOT
    last = _ranges("uid_map")[-1]
    return range(_OF_USERS.start, min(last.within + last.count, _OF_USERS.stop))


def enter(residents: Iterable[int] = ()) -> None:
    """Have this process be root in the user namespace of one of `residents`, or in a new one.

    Those are processes in it that run already: only there can they be taken over. Nothing is done
    for root. The directories of `paths` stay those of the user. It must have one thread alone.
    HostError: the host does not let users have namespaces.
    """
    if os.geteuid() == 0:
        return
    if len([*(_SELF / "task").iterdir()]) > 1:
        raise HostError(
            "a process with several threads cannot enter a user namespace, which it takes without "
            "root: run `ratoon serve`, and use its daemon"
        )
    home = paths.home()
    chosen = {"HOME": home, "CACHE": paths.cache(), "RUNTIME": paths.runtime(home)}
    os.environ.update({f"RATOON_{name}": str(path) for name, path in chosen.items()})
    if not any(_join(pid) for pid in residents):
        _make()
    syscalls.unshare(CLONE_NEWNS)


def _join(pid: int) -> bool:
    """Whether process `pid` is there, in a user namespace of this user's that is entered now."""
    with suppress(OSError):
        fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.setns(fd, CLONE_NEWUSER)
        finally:
            os.close(fd)
        return True
    return False


def _make() -> None:
    uid, gid = os.getuid(), os.getgid()
    programs = _lent_ids(uid, gid)
    # Who makes one may give it his own ids alone; for more it takes a program that stays outside.
    script = f"read -r go; {' && '.join(programs)}"
    outside = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE) if programs else None
    try:
        syscalls.unshare(CLONE_NEWUSER)
        if outside is None:
            (_SELF / "setgroups").write_text("deny")
            (_SELF / "uid_map").write_text(f"0 {uid} 1")
            (_SELF / "gid_map").write_text(f"0 {gid} 1")
        else:
            outside.communicate(b"go\n")
    except OSError as error:
        raise HostError(
            f"this host gives users no namespaces of their own ({error.strerror}): {_WAYS_OUT}"
        ) from None
    finally:
        if outside is not None:
            outside.communicate()  # without a word it ends
    if outside is not None and outside.returncode:
        raise HostError("newuidmap or newgidmap failed: see /etc/subuid and /etc/subgid")


def _lent_ids(uid: int, gid: int) -> list[str]:
    """How to map the user's own ids and his subordinate ones; nothing if he has not both kinds."""
    words = []
    for program, own, file in (("newuidmap", uid, "subuid"), ("newgidmap", gid, "subgid")):
        lent = _subordinate(Path("/etc") / file, uid)
        if lent is None or shutil.which(program) is None:
            return []
        words.append(f"{program} {os.getpid()} 0 {own} 1 {lent.within} {lent.first} {lent.count}")
    return words


def _subordinate(path: Path, uid: int) -> IdRange | None:
    """subuid(5); the first line of the user's."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    names = {str(uid)}
    with suppress(KeyError):
        names.add(pwd.getpwuid(uid).pw_name)
    for line in lines:
        name, _, rest = line.partition(":")
        first, _, count = rest.partition(":")
        if name in names and first.isdecimal() and count.isdecimal() and int(count):
            return IdRange(1, int(first), min(int(count), _WANTED))
    return None


def _ranges(name: str) -> list[IdRange]:
    lines = (_SELF / name).read_text().splitlines()
    return [IdRange(*map(int, line.split())) for line in lines]
