"""What users may do with files: cases that run on any directory, and what became of each.

    python3 file_rights.py make DIRECTORY
    python3 file_rights.py run DIRECTORY

The first makes what there is before, and the second runs all cases as all users and prints the
outcomes as JSON. It runs in guests, so it has nothing but the standard library; as root, for it
becomes the users.

A case is a line: its name, then what there is before, then what the user does.

    NAME: SETUP, SETUP > ACT; ACT

SETUP is `d NAME OWNER MODE`, a directory; `f`, a file of three bytes, the same; `p`, a program;
`s NAME TARGET OWNER`, a symbolic link; `h NAME OLD`, a hard link. OWNER is a user or USER:GROUP. An
ACT is a method of `Acts` with its arguments; `root: ACT` is done by root. The outcome of each act
is what it returns or the name of an error; after all of them, each file's mode, owner, links,
content, and which of its times have changed, count too.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Users and groups by name: a user's own group has his number. `many` is in more groups than NFS
#: carries, and the one that counts is the last of them.
IDS = {
    **{"root": 0, "owner": 1001, "member": 1002, "many": 1004, "nobody": 65534},
    **{"team": 5001, "club": 5002, "alien": 5003},
}
GROUPS = {
    "root": [0],
    "owner": [5001, 5002],
    "member": [5001],
    "nobody": [],
    "many": [*range(4001, 4021), 5001],
}
USERS = ("root", "owner", "member", "nobody")

CASES = {
    "read": """
all may: f f owner:team 644 > read f; access f
the group may: f f owner:team 640 > read f; access f
all but the group may: f f owner:team 604 > read f; access f
all but the owner may: f f owner:team 044 > read f; access f
the owner may: f f owner:team 600 > read f; access f
nobody may: f f owner:team 000 > read f; access f
of root: f f root 640 > read f; write f x; access f
of root's team: f f root:team 660 > read f; write f x; access f
a directory is no file: d d owner:team 755 > read d; write d x
""",
    "search": """
search alone: d d owner:team 711, f d/f root 644 > list d; stat d/f; read d/f; stat d/none; access d
list alone: d d owner:team 744, f d/f root 644 > list d; stat d/f; read d/f; access d
neither: d d owner:team 700, f d/f root 644 > list d; stat d/f; read d/f; stat d/none; access d
the group alone: d d owner:team 750, f d/f root 644 > list d; read d/f; access d
all but the group: d d owner:team 705, f d/f root 644 > list d; read d/f; access d
none for the owner: d d owner:team 055, f d/f owner 644 > list d; read d/f; access d
two deep: d d root 755, d d/e owner:team 700, f d/e/f root 666 > list d; list d/e; write d/e/f x
up and down: d d root 700, d e root 755, f f root 644 > stat d/../f; stat e/../f
by a link: d d owner:team 700, f d/f root 644, s l d/f owner > readlink l; read l
a link where it may not be read: d d owner:team 700, s d/l x owner > readlink d/l
a link in a directory to search: d d owner:team 711, s d/l x owner > readlink d/l; list d
""",
    "create": """
in root's directory: d d root 755 > create d/f 644
in everybody's: d d root 777 > create d/f 644; stat d/f
in the owner's: d d owner:team 755 > create d/f 640
in the group's: d d owner:team 775 > create d/f 660
in everybody's but the group's: d d owner:team 757 > create d/f 660
where one may write but not search: d d owner:team 766 > create d/f 644
where one may write but not list: d d owner:team 733 > create d/f 600; list d
nothing is masked: d d root 777 > create d/f 777; create d/g 666
for nobody to read, and written: d d root 777 > create-write d/f 000 text
for all to read alone, and written: d d root 777 > create-write d/f 444 text; write d/f again
what is there, exclusively: d d root 777, f d/f owner:team 644 > create d/f 644
what is there: d d root 777, f d/f owner:team 664 > creat d/f 600; trunc d/f
what is there in root's directory: d d root 755, f d/f root 666 > creat d/f 600; create d/f 600
what is there and not to be written: d d root 755, f d/f root 644 > creat d/f 600; trunc d/f
what is there in a sticky directory: d d root 1777, f d/f owner 666 > creat d/f 600
a sticky file: d d root 777 > create d/f 1644
set-user-id: d d root 777 > create d/f 4755
set-group-id: d d root 777 > create d/f 2755
in a setgid directory: d d owner:team 2777 > create d/f 644; mkdir d/e 755; symlink x d/l
two deep in a setgid directory: d d owner:team 2777 > mkdir d/e 777; create d/e/f 644
a set-group-id file in a setgid directory: d d owner:team 2777 > create d/f 2775
below a file: f f root 777 > create f/g 644; mkdir f/h 755
a name that is too long: d d root 777 > create-long d
a directory: d d owner:team 775 > mkdir d/e 755; mkdir d/e 755
a directory in root's: d d root 755, d d/e root 755 > mkdir d/f 755; mkdir d/e 755
a sticky directory: d d root 777 > mkdir d/e 1777
a setgid directory: d d root 777 > mkdir d/e 2755
a directory of no mode: d d root 777 > mkdir d/e 000; create d/e/f 644
a symbolic link: d d owner:team 775 > symlink there d/l; readlink d/l; symlink x d/l
a symbolic link in root's: d d root 755 > symlink there d/l
a pipe: d d root 777 > mkfifo d/p
a pipe in root's: d d root 755 > mkfifo d/p
a socket: d d root 777 > socket d/s
a device: d d root 777 > mknod d/n
""",
    "remove": """
of root's directory: d d root 755, f d/f owner 666 > unlink d/f
root's of everybody's: d d root 777, f d/f root 600 > unlink d/f
of the group's: d d owner:team 775, f d/f root 600 > unlink d/f
of all but the group's: d d owner:team 757, f d/f owner:team 666 > unlink d/f
where one may not search: d d owner:team 766, f d/f owner 666 > unlink d/f
of a sticky directory: d d root 1777, f d/f owner:team 666 > unlink d/f
root's of a sticky directory: d d root 1777, f d/f root 666 > unlink d/f
root's of the owner's sticky directory: d d owner:team 1777, f d/f root 600 > unlink d/f
of the group's sticky directory: d d root:team 1775, f d/f owner:team 664 > unlink d/f
one of two links: d d root 777, f d/f owner 644, h h d/f > unlink d/f; stat h
what is not there: d d root 755 > unlink d/f; rmdir d/e
a directory as a file: d d root 777, d d/e root 777 > unlink d/e
a file as a directory: d d root 777, f d/f root 777 > rmdir d/f
a directory: d d owner:team 775, d d/e root 700 > rmdir d/e
a directory of root's: d d root 755, d d/e owner 777 > rmdir d/e
a directory of a sticky one: d d root 1777, d d/e owner:team 777 > rmdir d/e
a full directory: d d root 777, d d/e root 777, f d/e/f root 644 > rmdir d/e
a full directory of root's: d d root 755, d d/e root 777, f d/e/f root 644 > rmdir d/e
a symbolic link: d d root 1777, s d/l x owner > unlink d/l
""",
    "rename": """
in root's directory: d d root 755, f d/f owner 666 > rename d/f d/g
in everybody's: d d root 777, f d/f root 600 > rename d/f d/g
out of root's directory: d d root 755, d e root 777, f d/f owner 666 > rename d/f e/f
into root's directory: d d root 777, d e root 755, f d/f owner 666 > rename d/f e/f
out of the group's: d d owner:team 775, d e owner:team 775, f d/f root 600 > rename d/f e/f
over another: d d root 777, f d/f owner 644, f d/g root 600 > rename d/f d/g; read d/g
in a sticky directory: d d root 1777, f d/f owner 666 > rename d/f d/g
out of a sticky directory: d d root 1777, d e root 777, f d/f owner 666 > rename d/f e/f
into a sticky directory: d d root 1777, d e root 777, f e/f owner 666 > rename e/f d/f
over root's in a sticky directory: d d root 1777, f d/g root 666, f f owner 666, d e root 777, \
f e/f root 666 > rename e/f d/g
over the owner's in a sticky directory: d d root 1777, f d/g owner 666, d e root 777, \
f e/f root 666 > rename e/f d/g
onto itself: d d root 777, f d/f owner 644, h d/h d/f > rename d/f d/h; list d
a directory: d d root 777, d d/e root 755 > rename d/e d/g
a directory to another, that may not be written: d d root 777, d e root 777, d d/m root 755 \
> rename d/m e/m
a directory to another, that its owner may write: d d root 777, d e root 777, d d/m owner:team 755 \
> rename d/m e/m
a directory to another, that its owner may not write: d d root 777, d e root 777, \
d d/m owner:team 577 > rename d/m e/m
a directory of a sticky one to another: d d root 1777, d e root 777, d d/m owner:team 777 \
> rename d/m e/m
a directory over an empty one: d d root 777, d d/e root 755, d d/g root 700 > rename d/e d/g; list d
a directory over an empty one elsewhere: d d root 777, d d/e owner:team 775, d g root 777, \
d g/e root 700 > rename d/e g/e
a directory over a full one: d d root 777, d d/e root 755, d d/g root 777, f d/g/f root 644 \
> rename d/e d/g
a directory over a file: d d root 777, d d/e root 777, f d/f root 666 > rename d/e d/f
a file over a directory: d d root 777, d d/e root 777, f d/f root 666 > rename d/f d/e
a directory into itself: d d root 777, d d/e root 777 > rename d/e d/e/e
what is not there: d d root 777, d e root 755 > rename d/f d/g; rename e/f e/g
a symbolic link: d d root 1777, s d/l x owner, d e root 777 > rename d/l e/l
""",
    "link": """
the owner's: d d root 777, f f owner:team 600 > link f d/h; stat f
what one may write: d d root 777, f f root:team 664 > link f d/h; stat f
what all may write: d d root 777, f f root 666 > link f d/h
what one may read: d d root 777, f f root 644 > link f d/h
into root's directory: d d root 755, f f owner:team 666 > link f d/h
over another: d d root 777, f f root 666, f d/h root 666 > link f d/h
a directory: d d root 777, d e root 777 > link e d/h
a symbolic link: d d root 777, s l x owner > link l d/h
out of where one may not search: d d root 777, d e root 700, f e/f root 666 > link e/f d/h
""",
    "chmod": """
the owner's: f f owner:team 640 > chmod f 600
root's: f f root 666 > chmod f 777
of the group's: f f root:team 660 > chmod f 600
a directory of root's: d d root 777 > chmod d 700
a directory: d d owner:team 755 > chmod d 700; chmod d 1777
in root's directory: d d root 755, f d/f owner 644 > chmod d/f 600
in another's directory: d d root 700, f d/f owner 644 > chmod d/f 600
the same mode: f f owner 644 > chmod f 644
sticky: f f owner 644 > chmod f 1644
set-user-id: f f owner:team 755 > chmod f 4755
set-group-id: f f owner:team 755 > chmod f 2755
set-group-id of an alien group: f f owner:alien 755 > chmod f 2755
a setgid directory: d d owner:team 755 > chmod d 2755
a setgid directory of an alien group: d d owner:alien 755 > chmod d 2755
a setuid directory: d d owner:team 755 > chmod d 4755
no setgid directory any more: d d owner:team 2755 > chmod d 755
what was setgid, of an alien group: d d owner:alien 2755 > chmod d 2700
by a link: f f owner 644, s l f root > chmod l 600
""",
    "chown": """
to root: f f owner:team 644 > chown f root
to another: f f owner:team 644 > chown f member
root's to oneself: f f root 666 > chown f owner; chown f member; chown f nobody
to the same: f f owner:team 644 > chown f owner
to a group of the owner's: f f owner:team 644 > chown f :club
to an alien group: f f owner:team 644 > chown f :alien
to the same group: f f owner:alien 644 > chown f :alien
the group of root's: f f root:team 664 > chown f :team; chown f :nobody
both, to a group of the owner's: f f owner:team 644 > chown f owner:club
both, to another: f f owner:team 644 > chown f member:club
to nothing else: f f owner:team 644 > chown f :
a directory: d d owner:team 755 > chown d :club; chown d member
a setgid directory: d d owner:team 2755 > chown d :club
a setgid directory to an alien group: d d owner:team 2755 > chown d :alien
a set-user-id program: f f owner:team 755 > root: chmod f 4755; chown f :club
a set-group-id program: f f owner:team 755 > root: chmod f 2755; chown f :club
a symbolic link: f f root 644, s l f owner > lchown l :club; lchown l member
by a link: f f owner:team 644, s l f root > chown l :club
""",
    "truncate": """
the owner's: f f owner:team 644 > truncate f 1
of the group's: f f owner:team 664 > truncate f 1
what its owner may not write: f f owner:team 444 > truncate f 1
longer: f f owner:team 666 > truncate f 100
by a descriptor: f f owner:team 664 > ftruncate f 2
by a descriptor, to what it is: f f owner:team 664 > ftruncate f 3
to what it is: f f owner:team 664 > truncate f 3
when it is opened: f f owner:team 664 > trunc f
when it is opened, again: f f owner:team 664 > root: trunc f; root: old f; trunc f
a directory: d d root 777 > truncate d 0
a set-user-id program: f f owner:team 777 > root: chmod f 4777; truncate f 1
""",
    "utime": """
now: f f owner:team 644 > utime f now
now, of the group's: f f owner:team 664 > utime f now
now, what its owner may not write: f f owner:team 444 > utime f now
to a time: f f owner:team 644 > utime f set
to a time, of the group's: f f owner:team 664 > utime f set
to a time, of everybody's: f f root 666 > utime f set
one of both now: f f owner:team 644 > utime f one
one of both now, of the group's: f f owner:team 664 > utime f one
of a directory: d d owner:team 775 > utime d now
of a directory, to a time: d d owner:team 775 > utime d set
of a symbolic link, to a time: s l x owner > lutime l
""",
    "write": """
the owner's: f f owner:team 644 > write f text; read f
of the group's: f f owner:team 664 > write f text
all but the group: f f owner:team 606 > write f text
without reading: f f owner:team 622 > write f text; read f
at the end: f f owner:team 664 > append f more
in a directory one may not search: d d owner:team 700, f d/f root 666 > write d/f text
a set-user-id program: f f owner:team 777 > root: chmod f 4777; write f text
a set-group-id program: f f owner:team 777 > root: chmod f 2777; write f text
""",
    "run": """
all may: p p owner:team 755 > run p
and not read: p p owner:team 711 > run p; read p
the group may: p p owner:team 750 > run p
all but the group may: p p owner:team 705 > run p
nobody may: p p owner:team 644 > run p
where one may not search: d d owner:team 700, p d/p root 755 > run d/p
""",
    "open": """
the owner writes on when he may not: f f owner:team 666 > open f w; root: chmod f 000; put text; \
close
the owner reads on when he may not: f f owner:team 666 > open f r; root: chmod f 000; get; close
others write on when they may not: f f root:team 666 > open f w; root: chmod f 600; put text; \
sync; close
others read on when they may not: f f root:team 666 > open f r; root: chmod f 600; get; close
after it is another's: f f owner:team 666 > open f w; root: chown f nobody; put text; close
in a directory that may not be searched any more: d d root 755, f d/f root 666 > open d/f w; \
root: chmod d 700; put text; close
removed: d d root 777, f d/f owner:team 666 > open d/f r; unlink d/f; links; get; list d
removed, with its directory: d d root 777, d d/e root 777, f d/e/f root 666 > open d/e/f r; \
unlink d/e/f; rmdir d/e
replaced: d d root 777, f d/f owner 666, f d/g root 666 > open d/f r; rename d/g d/f; get; list d
""",
    "seen": """
a mode that root takes away: f f root 644 > read f; root: chmod f 600; read f; access f
a mode that root gives: f f root 600 > read f; root: chmod f 644; read f; access f
a directory that root closes: d d root 755, f d/f root 644 > read d/f; list d; root: chmod d 700; \
stat d/f; read d/f; list d; create d/g 644
a directory that root opens: d d root 700, f d/f root 644 > stat d/f; root: chmod d 777; stat d/f; \
create d/g 644
an owner that root changes: f f root 600 > read f; root: chown f owner; read f
a group that root changes: f f root 640 > read f; root: chown f :team; read f
a name that root makes: d d root 755 > stat d/f; root: create d/f 644; stat d/f
a name that root removes: d d root 755, f d/f root 644 > stat d/f; root: unlink d/f; stat d/f
a sticky bit that root sets: d d root 777, f d/f root 666 > root: chmod d 1777; unlink d/f
""",
    "groups": """
the last of many: f f root:team 640 > read f
a directory of the last of many: d d root:team 770 > create d/f 644
""",
    "more": """
an attribute of the user's: f f owner:team 666 > setxattr f
space ahead: f f owner:team 666 > fallocate f
two names exchanged: d d root 777, f d/f owner 644, f d/g root 644 > exchange d/f d/g
a file without a name: d d root 777 > tmpfile d
""",
}

OLD, SET = 1_000_000_000, 1_200_000_000
_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _NOW, _OMIT = -100, (1 << 30) - 1, (1 << 30) - 2


class Acts:
    """What a user may be made to do, by its name in the cases."""

    def __init__(self) -> None:
        self._held = -1

    def read(self, name: str) -> object:
        return _using(name, os.O_RDONLY, lambda fd: os.read(fd, 3).decode("latin-1"))

    def write(self, name: str, text: str) -> None:
        _using(name, os.O_WRONLY, lambda fd: os.write(fd, text.encode()))

    def append(self, name: str, text: str) -> None:
        _using(name, os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, text.encode()))

    def access(self, name: str) -> str:
        kinds = {"r": os.R_OK, "w": os.W_OK, "x": os.X_OK}
        return "".join(k for k, how in kinds.items() if os.access(name, how, effective_ids=True))

    def list(self, name: str) -> str:
        return " ".join(sorted(_plain(each) for each in os.listdir(name)))

    def stat(self, name: str) -> str:
        found = os.stat(name)
        return f"{stat.filemode(found.st_mode)} {found.st_nlink}"

    def readlink(self, name: str) -> str:
        return os.readlink(name)

    def create(self, name: str, mode: str) -> None:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, int(mode, 8)))

    def creat(self, name: str, mode: str) -> None:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT, int(mode, 8)))

    def create_write(self, name: str, mode: str, text: str) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, int(mode, 8))
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def create_long(self, directory: str) -> None:
        self.create(f"{directory}/{'n' * 256}", "644")

    def trunc(self, name: str) -> None:
        os.close(os.open(name, os.O_WRONLY | os.O_TRUNC))

    def mkdir(self, name: str, mode: str) -> None:
        os.mkdir(name, int(mode, 8))

    def symlink(self, target: str, name: str) -> None:
        os.symlink(target, name)

    def mkfifo(self, name: str) -> None:
        os.mkfifo(name, 0o644)

    def mknod(self, name: str) -> None:
        os.mknod(name, stat.S_IFCHR | 0o600, os.makedev(1, 3))

    def socket(self, name: str) -> None:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)

    def unlink(self, name: str) -> None:
        os.unlink(name)

    def rmdir(self, name: str) -> None:
        os.rmdir(name)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def exchange(self, one: str, other: str) -> None:
        _checked(_libc.renameat2(_AT_FDCWD, one.encode(), _AT_FDCWD, other.encode(), 2))

    def link(self, old: str, new: str) -> None:
        os.link(old, new, follow_symlinks=False)

    def chmod(self, name: str, mode: str) -> None:
        os.chmod(name, int(mode, 8))

    def chown(self, name: str, owner: str) -> None:
        os.chown(name, *_owner(owner))

    def lchown(self, name: str, owner: str) -> None:
        os.chown(name, *_owner(owner), follow_symlinks=False)

    def truncate(self, name: str, size: str) -> None:
        os.truncate(name, int(size))

    def ftruncate(self, name: str, size: str) -> None:
        _using(name, os.O_WRONLY, lambda fd: os.ftruncate(fd, int(size)))

    def utime(self, name: str, how: str) -> None:
        if how == "now":
            os.utime(name)
        elif how == "set":
            os.utime(name, (SET, SET))
        else:  # the second one alone
            times = (ctypes.c_long * 4)(0, _OMIT, 0, _NOW)
            _checked(_libc.utimensat(_AT_FDCWD, name.encode(), times, 0))

    def lutime(self, name: str) -> None:
        os.utime(name, (SET, SET), follow_symlinks=False)

    def old(self, name: str) -> None:
        os.utime(name, (OLD, OLD))

    def run(self, name: str) -> int:
        return os.waitpid(os.posix_spawn(name, [name], {}), 0)[1]

    def open(self, name: str, how: str) -> None:
        self._held = os.open(name, os.O_RDONLY if how == "r" else os.O_WRONLY)

    def put(self, text: str) -> None:
        os.write(self._held, text.encode())

    def get(self) -> str:
        return os.read(self._held, 100).decode()

    def sync(self) -> None:
        os.fsync(self._held)

    def links(self) -> int:
        return os.fstat(self._held).st_nlink

    def close(self) -> None:
        fd, self._held = self._held, -1
        if fd >= 0:
            os.close(fd)

    def setxattr(self, name: str) -> None:
        os.setxattr(name, "user.key", b"value")

    def fallocate(self, name: str) -> None:
        _using(name, os.O_WRONLY, lambda fd: _checked(_libc.fallocate(fd, 0, 0, 4096)))

    def tmpfile(self, directory: str) -> None:
        os.close(os.open(directory, os.O_WRONLY | os.O_TMPFILE, 0o600))


def cases(subject: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """The name of each, what there is before, and the acts."""
    for line in CASES[subject].strip().splitlines():
        name, body = line.split(": ", 1)
        setup, acts = body.split(" > ")
        yield f"{subject}: {name}", setup.split(", "), acts.split("; ")


def planned(directory: str) -> Iterator[tuple[str, str, str, list[str], list[str]]]:
    """Each case for each user, with a place of its own; the place comes first, then those."""
    for subject in CASES:
        users = (*USERS, "many") if subject == "groups" else USERS
        for number, (name, setup, acts) in enumerate(cases(subject)):
            for user in users:
                yield f"{directory}/{subject}-{number}-{user}", name, user, setup, acts


def make(directory: str, program: str = "/bin/true") -> None:
    """Make what there is before, in a directory of its own; all times but one are OLD.

    `program`: what is run there.
    """
    os.umask(0)
    os.mkdir(directory, 0o755)
    for place, _, _, setup, _ in planned(directory):
        os.mkdir(place, 0o755)
        for each in setup:
            _make(program, place, *each.split())
        for name in _names(place):
            os.utime(name, (OLD, OLD), follow_symlinks=False)


def run(directory: str) -> dict[str, dict[str, list[object]]]:
    """By case and user: the outcomes of the acts, and what the files are like afterwards."""
    os.umask(0)
    time.sleep(0.1)  # since all was made; it is more than the clocks of files may be coarse
    found: dict[str, dict[str, list[object]]] = {}
    for place, name, user, _, acts in planned(directory):
        os.chdir(place)
        before = {name: os.lstat(name).st_ctime_ns for name in _names(".")}
        doing = Acts()
        outcomes = [_outcome(doing, user, act) for act in acts]
        state = {_plain(each): _state(each, before, acts) for each in _names(".")}
        doing.close()
        found.setdefault(name, {})[user] = [outcomes, state]
    return found


def _make(program: str, place: str, kind: str, name: str, *rest: str) -> None:
    path = f"{place}/{name}"
    if kind == "h":
        os.link(f"{place}/{rest[0]}", path)
        return
    if kind == "s":
        os.symlink(rest[0], path)
        os.chown(path, *_owner(rest[1]), follow_symlinks=False)
        return
    if kind == "d":
        os.mkdir(path)
    elif kind == "p":
        shutil.copyfile(program, path)
    else:
        with open(path, "w") as file:
            file.write("abc")
    os.chown(path, *_owner(rest[0]))
    os.chmod(path, int(rest[1], 8))


def _outcome(doing: Acts, user: str, act: str) -> object:
    if act.startswith("root: "):
        user, act = "root", act.removeprefix("root: ")
    verb, *arguments = act.split()
    try:
        with _being(user):
            return getattr(doing, verb.replace("-", "_"))(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


@contextmanager
def _being(user: str) -> Iterator[None]:
    os.setgroups(GROUPS[user])
    os.setegid(IDS[user])
    os.seteuid(IDS[user])
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def _names(directory: str) -> list[str]:
    names = [directory]
    for each in sorted(os.scandir(directory), key=lambda entry: entry.name):
        names += _names(each.path) if each.is_dir(follow_symlinks=False) else [each.path]
    return names


def _plain(name: str) -> str:
    """A name; one that the NFS client made up without what is random in it."""
    head, made, _ = name.partition(".nfs")
    return head + made


def _state(name: str, before: dict[str, int], acts: list[str]) -> dict[str, object]:
    found = os.lstat(name)
    state: dict[str, object] = {
        "mode": stat.filemode(found.st_mode),
        "owner": f"{found.st_uid}:{found.st_gid}",
        "links": found.st_nlink,
        "modified": _time(found.st_mtime),
    }
    if name in before:
        state["changed"] = found.st_ctime_ns != before[name]
    if stat.S_ISREG(found.st_mode):
        state["size"] = found.st_size
        if state["modified"] == "new" and found.st_size < 100:
            with open(name) as file:
                state["content"] = file.read()
    if stat.S_ISLNK(found.st_mode):
        state["target"] = os.readlink(name)
    if any("utime" in act for act in acts) and not stat.S_ISDIR(found.st_mode):
        state["accessed"] = _time(found.st_atime)  # else it is as the mount has it
    return state


def _time(seconds: float) -> str:
    return {OLD: "old", SET: "set"}.get(int(seconds), "new")


def _owner(text: str) -> tuple[int, int]:
    user, colon, group = text.partition(":")
    uid = IDS[user] if user else -1
    if colon:
        return uid, IDS[group] if group else -1
    return uid, -1


def _using(name: str, flags: int, work: Callable[[int], object]) -> object:
    fd = os.open(name, flags)
    try:
        return work(fd)
    finally:
        os.close(fd)


def _checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2])
    else:
        json.dump(run(sys.argv[2]), sys.stdout)
