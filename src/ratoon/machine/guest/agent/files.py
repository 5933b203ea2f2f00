"""Files in the sandbox: what is done with them in one step, and listings.

A path is text in messages; bytes that are no UTF-8 are in it as Python has them (surrogateescape).
A relative path is relative to `/`, where commands start too.
"""

from __future__ import annotations

import errno
import json
import os
import stat

from ..shared import wire
from ..shared.directories import remove_tree
from .libc import rename_to_nothing
from .stream import Stream, operation
from .users import look_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from .processes import HasProcesses
    from .stream import Request

    Owner = tuple[int, int]

#: Output is gathered up to so many bytes; more is a long pause for others.
GATHERED = 16 * 1024
TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


class FileStream(Stream):
    """A request about files; what the system says no to is refused by the name of its errno."""

    agent: HasProcesses
    path = b""

    def owner(self, request: Request) -> Owner | None:
        """Whose what is made is to be: the `user`'s, or who runs commands; None: root's."""
        name = request.get("user") or self.agent.processes.defaults.user
        if not name:
            return None
        user = look_up(name)
        return user.uid, user.gid

    def named(self, request: Request, field: str = "path") -> bytes:
        """The absolute path in a field of the request, for the messages too."""
        self.path = os.path.join(b"/", request[field].encode("utf-8", "surrogateescape"))
        return self.path

    def fail(self, error: Exception) -> None:
        if not isinstance(error, OSError) or error.errno is None:
            super().fail(error)
            return
        names = [error.filename or self.path, *([error.filename2] if error.filename2 else [])]
        where = " to ".join(text(name) for name in names)
        self.refuse(f"{where}: {error.strerror}", errno.errorcode.get(error.errno, ""))

    def say(self, data: bytes) -> Generator[None, None, None]:
        """Send output of any length, as there is room for it."""
        while data:
            while not self.room:
                yield
            piece = data[: self.room]
            self.send(wire.STDOUT, piece)
            data = data[len(piece) :]


def text(path: bytes | str) -> str:
    return path if isinstance(path, str) else path.decode("utf-8", "surrogateescape")


def describe(path: bytes, status: os.stat_result) -> dict[str, Any]:
    """What the host is told of a file."""
    kind = stat.S_IFMT(status.st_mode)
    return {
        "path": text(path),
        "type": TYPES[kind],
        "size": status.st_size,
        "mode": stat.S_IMODE(status.st_mode),
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime_ns": status.st_mtime_ns,
        "target": text(os.readlink(path)) if kind == stat.S_IFLNK else None,
    }


def make_parents(path: bytes, owner: Owner | None) -> None:
    """Make the directories above `path` that are not there, however many those are."""
    missing = []
    directory = os.path.dirname(path) or b"/"
    while not os.path.isdir(directory):
        missing.append(directory)
        directory = os.path.dirname(directory)
    for directory in reversed(missing):
        try:
            os.mkdir(directory)
            if owner is not None:
                os.chown(directory, *owner)
        except FileExistsError:  # of something else, unless a name comes twice: a//b, a/./b
            if not os.path.isdir(directory):
                raise


@operation("files.stat")
class Stat(FileStream):
    def start(self, request: Request) -> None:
        path = self.named(request)
        self.reply(**describe(path, os.stat(path, follow_symlinks=request["follow"])))


@operation("files.list")
class List(FileStream):
    """A line of JSON for each thing in a directory, and in those below it, `depth` of them deep."""

    def start(self, request: Request) -> None:
        path = self.named(request)
        self.work(self._list(path, os.listdir(path), request["depth"]))

    def _list(self, root: bytes, names: list[bytes], depth: int) -> Generator[None, None, None]:
        gathered = bytearray()
        to_do = [(root, sorted(names, reverse=True))]
        while to_do:
            directory, left = to_do[-1]
            if not left:
                to_do.pop()
                continue
            path = os.path.join(directory, left.pop())
            try:
                status = os.lstat(path)
                gathered += json.dumps(describe(path, status)).encode() + b"\n"
                if stat.S_ISDIR(status.st_mode) and len(to_do) < depth:
                    to_do.append((path, sorted(os.listdir(path), reverse=True)))
            except (FileNotFoundError, NotADirectoryError):
                pass  # it is gone again
            if len(gathered) >= GATHERED:
                yield from self.say(bytes(gathered))
                gathered.clear()
                yield
        yield from self.say(bytes(gathered))
        self.reply()


@operation("files.mkdir")
class MakeDirectory(FileStream):
    def start(self, request: Request) -> None:
        path, owner = self.named(request), self.owner(request)
        if request["parents"]:
            make_parents(path.rstrip(b"/"), owner)
        try:
            os.mkdir(path)
        except FileExistsError:
            if not request["exist_ok"] or not os.path.isdir(path):
                raise
        else:
            if owner is not None:
                os.chown(path, *owner)
            if request["mode"] is not None:
                os.chmod(path, request["mode"])
        self.reply()


@operation("files.remove")
class Remove(FileStream):
    """A file, a link, or an empty directory; with `recursive`, one that is not empty too."""

    def start(self, request: Request) -> None:
        path = self.named(request).rstrip(b"/")
        if os.path.basename(path) in (b"", b".", b".."):  # as rm does
            raise OSError(errno.EINVAL, "its own name is needed to remove it")
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
        elif request["recursive"]:
            self.work(self._remove(path))
            return
        else:
            os.rmdir(path)
        self.reply()

    def _remove(self, path: bytes) -> Generator[None, None, None]:
        yield from remove_tree(path)
        self.reply()


@operation("files.rename")
class Rename(FileStream):
    def start(self, request: Request) -> None:
        target = self.named(request, "to")
        source = self.named(request)
        if request["replace"]:
            os.rename(source, target)
        else:
            rename_to_nothing(source, target)
        self.reply()


@operation("files.change")
class Change(FileStream):
    """Permissions, owner, modification time: those that are given. Links are followed."""

    def start(self, request: Request) -> None:
        path = self.named(request)
        uid, gid = request["uid"], request["gid"]
        if uid is not None or gid is not None:
            os.chown(path, -1 if uid is None else uid, -1 if gid is None else gid)
        if request["mode"] is not None:
            os.chmod(path, request["mode"])  # after chown, which clears setuid
        if request["mtime_ns"] is not None:
            os.utime(path, ns=(os.stat(path).st_atime_ns, request["mtime_ns"]))
        self.reply()


@operation("files.symlink")
class MakeSymlink(FileStream):
    def start(self, request: Request) -> None:
        path, owner = self.named(request), self.owner(request)
        os.symlink(request["target"].encode("utf-8", "surrogateescape"), path)
        if owner is not None:
            os.lchown(path, *owner)
        self.reply()
