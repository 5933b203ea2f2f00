"""Who a program runs as: the sandbox's own users and groups, read as text.

The agent has a libc of its own, which knows nothing of the sandbox's.
"""

from __future__ import annotations

import os
import stat

from .stream import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PASSWD, GROUP = "/etc/passwd", "/etc/group"
#: Bytes of either file that are looked at.
LIMIT = 1024 * 1024
#: Ids are u32; the last one means "leave it".
MAX_ID = 2**32 - 2


class User:
    def __init__(self, uid: int, gid: int, groups: list[int], name: str, home: str, shell: str):
        self.uid = uid
        self.gid = gid
        #: Supplementary groups.
        self.groups = groups
        self.name = name
        self._home = home
        self._shell = shell

    @property
    def environment(self) -> dict[str, str]:
        name, shell = self.name, self._shell or "/bin/sh"
        return {"HOME": self._home or "/", "USER": name, "LOGNAME": name, "SHELL": shell}


def look_up(text: str) -> User:
    """The user of `NAME`, `UID`, or either with `:GROUP`; Refusal where there is none.

    A uid that is not in /etc/passwd is in group 0, as in containers. With `:GROUP` the user is in
    that group alone.
    """
    who, colon, group = text.partition(":")
    uid, gid, name, home, shell = _find_user(who)
    if colon:
        return User(uid, _find_group(group), [], name, home, shell)
    groups = [int(g[2]) for g in _lines(GROUP, 4) if name in g[3].split(",") and _is_id(g[2])]
    return User(uid, gid, groups, name, home, shell)


def _find_user(who: str) -> tuple[int, int, str, str, str]:
    for name, _, uid, gid, _, home, shell in _lines(PASSWD, 7):
        if _is_id(uid) and _is_id(gid) and (who == name or (_is_id(who) and int(who) == int(uid))):
            return int(uid), int(gid), name, home, shell
    if not _is_id(who):
        raise Refusal(f"the sandbox has no user {who!r}", "no-user")
    return int(who), 0, who, "/", "/bin/sh"


def _find_group(which: str) -> int:
    for name, _, gid, _ in _lines(GROUP, 4):
        if name == which and _is_id(gid):
            return int(gid)
    if not _is_id(which):
        raise Refusal(f"the sandbox has no group {which!r}", "no-user")
    return int(which)


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= MAX_ID


def _lines(path: str, fields: int) -> Iterator[list[str]]:
    """The lines of a file that have this many fields; none where it is missing or no file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        data = b""
        if stat.S_ISREG(os.fstat(fd).st_mode):
            while len(data) < LIMIT and (more := os.read(fd, LIMIT - len(data))):
                data += more
    finally:
        os.close(fd)
    for line in data.decode("utf-8", "surrogateescape").splitlines():
        found = line.split(":")
        if len(found) == fields:
            yield found
