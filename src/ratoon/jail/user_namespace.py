"""The user namespace in which an ordinary user does what root does elsewhere.

In it he has all capabilities over what is his, and nothing else of the host: for namespaces, mounts
and the user ids of cells. His files are root's there. It lasts as long as a process is in it.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
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
_ETC = Path("/etc")
#: The first id that is lent to anybody (SUB_UID_MIN of login.defs(5)).
_FIRST_LENT = 100_000
#: Who may bar namespaces, by which setting, and what lets them: Debian's kernels, and all.
_BARS = {"kernel.unprivileged_userns_clone": 1, "user.max_user_namespaces": 15_000}
#: Ubuntu's way: programs that have a profile which says so may have them.
_APPARMOR = "kernel.apparmor_restrict_unprivileged_userns"
_PROFILE = """\
abi <abi/4.0>,
include <tunables/global>
profile ratoon "{program}" flags=(unconfined) {{
  userns,
}}
"""


@dataclass(frozen=True)
class IdRange:
    """`count` ids from `first` on, which here are those from `within` on."""

    within: int
    first: int
    count: int


def is_root_of_all() -> bool:
    """Whether this process is root, and not in a user namespace only."""
    return os.geteuid() == 0 and _ranges("uid_map") == [IdRange(0, 0, (1 << 32) - 1)]


def lends_ids() -> bool:
    """Whether programs in cells have users of their own, and this is a user namespace."""
    return not is_root_of_all() and bool(free_ids())


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
    try:
        if not any(_join(pid) for pid in residents):
            _make()
        syscalls.unshare(CLONE_NEWNS)
    except OSError as error:
        raise HostError(
            f"this host gives users no namespaces of their own ({error.strerror}): {way_out()}"
        ) from None


def way_out(settings: Path = Path("/proc/sys")) -> str:
    """What lets users have namespaces here, if anything is known that bars them."""

    def value(name: str) -> str:
        with suppress(OSError):
            return (settings / name.replace(".", "/")).read_text().strip()
        return ""

    for name, wanted in _BARS.items():
        if value(name) == "0":
            line = shlex.quote(f"{name} = {wanted}")
            return f"as root: echo {line} >/etc/sysctl.d/60-ratoon.conf && sysctl --system"
    if value(_APPARMOR) == "1":
        file, text = "/etc/apparmor.d/ratoon", _PROFILE.format(program=_own_program())
        lines = shlex.join(text.splitlines())
        return f"as root: printf '%s\\n' {lines} >{file} && apparmor_parser -r {file}"
    return "in a container it takes one that may make them; or be root"


def _own_program() -> Path:
    """The program that users start, as the kernel names it."""
    called = Path(sys.argv[0])
    return (
        called if called.name == "ratoon" else Path(sys.executable).with_name("ratoon")
    ).resolve()


def way_to_lend(uid: int) -> str | None:
    """The command by which root lends this user ids that nobody has; None: he has such."""
    files = {kind: _ETC / kind for kind in ("subuid", "subgid")}
    lacking = [kind for kind, file in files.items() if _subordinate(file, uid) is None]
    if not lacking:
        return None
    lent = [each for file in files.values() for _, each in _lines(file)]
    first = max([_FIRST_LENT, *(each.first + each.count for each in lent)])
    ids = f"{first}-{first + _WANTED}"
    changes = (f"--add-{kind}s={ids}" for kind in lacking)
    return shlex.join(["usermod", *changes, _names(uid)[0]])


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
    finally:
        if outside is not None:
            outside.communicate()  # without a word it ends
    if outside is not None and outside.returncode:
        raise HostError("newuidmap or newgidmap failed: see /etc/subuid and /etc/subgid")


def _lent_ids(uid: int, gid: int) -> list[str]:
    """How to map the user's own ids and his subordinate ones; nothing if he has not both kinds."""
    words = []
    for program, own, file in (("newuidmap", uid, "subuid"), ("newgidmap", gid, "subgid")):
        lent = _subordinate(_ETC / file, uid)
        if lent is None or shutil.which(program) is None:
            return []
        words.append(f"{program} {os.getpid()} 0 {own} 1 {lent.within} {lent.first} {lent.count}")
    return words


def _subordinate(path: Path, uid: int) -> IdRange | None:
    """The first range of the user's, and of that as many as are wanted."""
    for name, lent in _lines(path):
        if name in _names(uid):
            return replace(lent, count=min(lent.count, _WANTED))
    return None


def _names(uid: int) -> list[str]:
    """What the user is called in files, the best first."""
    with suppress(KeyError):
        return [pwd.getpwuid(uid).pw_name, str(uid)]
    return [str(uid)]


def _lines(path: Path) -> Iterator[tuple[str, IdRange]]:
    """Who is lent which ids: subuid(5)."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name, _, rest = line.partition(":")
        first, _, count = rest.partition(":")
        if first.isdecimal() and count.isdecimal() and int(count):
            yield name, IdRange(1, int(first), int(count))


def _ranges(name: str) -> list[IdRange]:
    lines = (_SELF / name).read_text().splitlines()
    return [IdRange(*map(int, line.split())) for line in lines]
