"""The content of files and of trees, to the host and from it, beside everything else.

What comes from the host gets its name when it is whole. A transfer that ends before that, in
whatever way, leaves nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque

from ..shared import tar
from ..shared.new_file import NewFile, write_all
from ..shared.packing import CHUNK, Packer
from ..shared.unpacking import Unpacker, check_replaceable
from .files import FileStream, make_parents, text
from .loop import report
from .stream import Stream, operation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from ..shared.packing import LeftOut
    from .files import Owner
    from .stream import Request

NEW_FILE_MODE = 0o644


@operation("files.read")
class Read(FileStream):
    """A regular file from `offset` on, `length` bytes of it or all."""

    _fd: int | None = None

    def start(self, request: Request) -> None:
        path = self.named(request)
        # What is none might block; asked twice, because opening it may do something too.
        _require_regular(os.stat(path))
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        _require_regular(os.fstat(self._fd))
        os.lseek(self._fd, request["offset"], os.SEEK_SET)
        self.work(self._read(self._fd, request["length"]))

    def _read(self, fd: int, length: int | None) -> Generator[None, None, None]:
        while data := os.read(fd, CHUNK if length is None else min(CHUNK, length)):
            if length is not None:
                length -= len(data)
            yield from self.say(data)
            yield
        self.reply()

    def on_end(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


@operation("files.pack")
class Pack(FileStream):
    """A file or a tree as an archive."""

    def start(self, request: Request) -> None:
        self.work(self._pack(Packer(self.named(request), owners=request["owners"])))

    def _pack(self, packer: Packer) -> Generator[None, None, None]:
        chunks = packer.chunks()
        try:
            for chunk in chunks:
                yield from self.say(chunk)
                yield
        finally:
            chunks.close()
        self.reply(**_summary(packer.entries, packer.left_out))


class Receiver(FileStream):
    """Takes the host's input piece by piece, and then makes something of it."""

    def __init__(self, agent: Any, number: int) -> None:
        super().__init__(agent, number)
        self._queue: deque[bytes] = deque()
        self._all_is_here = False
        self._at_work = False

    def take(self, data: bytes) -> Generator[None, None, None]:
        raise NotImplementedError

    def finish(self) -> None:
        """All has been taken; it is for this to reply."""
        raise NotImplementedError

    def undo(self) -> Generator[None, None, None]:
        """Remove what was made, with pauses; to be gone on with where it stopped."""
        raise NotImplementedError

    def on_input(self, data: bytes) -> None:
        self._queue.append(data)
        self._go_on()

    def on_input_end(self) -> None:
        self._all_is_here = True
        self._go_on()

    def _go_on(self) -> None:
        if not self._at_work:
            self._at_work = True
            self.work(self._consume())

    def _consume(self) -> Generator[None, None, None]:
        try:
            while self._queue:
                data = self._queue.popleft()
                yield from self.take(data)
                self.taken(len(data))
                yield
            if self._all_is_here:
                self.finish()
        except (OSError, tar.TarError):
            for _ in self.undo():
                yield
            raise
        self._at_work = False


@operation("files.write")
class Write(Receiver):
    """A file's new content.

    `how`: "replace", under a temporary name until it is whole, permissions and owner of the old one
    kept; "in-place", for what must stay the same file; "append".
    """

    _directory: int | None = None
    _file: NewFile | None = None
    _fd: int | None = None

    def start(self, request: Request) -> None:
        # Like any program that opens it for writing, through a link.
        path, owner = os.path.realpath(self.named(request)), self.owner(request)
        if request["parents"]:
            make_parents(path, owner)
        self._mode, uid, gid = request["mode"], request["uid"], request["gid"]
        self._owner = (-1 if uid is None else uid, -1 if gid is None else gid)
        self._new_owner = owner or (0, 0)
        self._size = 0
        if request["how"] == "replace":
            self._replace(path)
            return
        how = {"append": os.O_APPEND, "in-place": os.O_TRUNC}[request["how"]]
        flags = how | os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:  # who might create it gets EACCES for another's file in /tmp (fs.protected_regular)
            self._fd = os.open(path, flags)
        except FileNotFoundError:
            self._fd = os.open(path, flags | os.O_CREAT, NEW_FILE_MODE)
            self._fall_back(self._new_owner)

    def _replace(self, path: bytes) -> None:
        check_replaceable(path)
        directory, name = os.path.split(path)
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            old = os.stat(name, dir_fd=self._directory)
        except FileNotFoundError:
            self._fall_back(self._new_owner)
        else:
            self._fall_back((old.st_uid, old.st_gid))
            if self._mode is None:
                self._mode = stat.S_IMODE(old.st_mode)
        self._file = NewFile(self._directory, name)

    def _fall_back(self, owner: Owner) -> None:
        """It is to be the `owner`'s, as far as the request does not say."""
        uid, gid = self._owner
        self._owner = (owner[0] if uid < 0 else uid, owner[1] if gid < 0 else gid)

    def take(self, data: bytes) -> Generator[None, None, None]:
        self._size += len(data)
        if self._file is not None:
            self._file.write(data)
        elif self._fd is not None:
            write_all(self._fd, data)
        yield from ()

    def finish(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.publish(NEW_FILE_MODE if self._mode is None else self._mode, self._owner)
        elif self._fd is not None:
            os.fchown(self._fd, *self._owner)
            if self._mode is not None:
                os.fchmod(self._fd, self._mode)
        self.reply(size=self._size)

    def undo(self) -> Generator[None, None, None]:
        if self._file is not None:
            file, self._file = self._file, None
            file.discard()
        yield from ()

    def on_end(self) -> None:
        for _ in self.undo():
            pass
        for fd in (self._directory, self._fd):
            if fd is not None:
                os.close(fd)


@operation("files.unpack")
class Unpack(Receiver):
    """A file or a tree out of an archive."""

    _unpacker: Unpacker | None = None

    def start(self, request: Request) -> None:
        path, owner = os.path.realpath(self.named(request)), self.owner(request)
        if request["parents"]:
            make_parents(path, owner)
        how = {name: request[name] for name in ("merge", "owners", "into")}
        self._unpacker = Unpacker(path, owner=owner, **how)
        self._closing = self._unpacker.close()

    def take(self, data: bytes) -> Generator[None, None, None]:
        assert self._unpacker is not None
        return self._unpacker.feed(data)

    def finish(self) -> None:
        assert self._unpacker is not None
        self._unpacker.finish()
        self.reply(**_summary(self._unpacker.entries, self._unpacker.left_out))

    def fail(self, error: Exception) -> None:
        if isinstance(error, tar.TarError):
            self.refuse(
                f"{text(self.path)}: not an archive that can be unpacked: {error}", "archive"
            )
        else:
            super().fail(error)

    def undo(self) -> Generator[None, None, None]:
        return self._closing

    def on_end(self) -> None:
        if self._unpacker is not None:
            errand = Errand(self.agent, self.number)
            errand.work(self._closing)


class Errand(Stream):
    """Work that goes on although nobody waits for it any more."""

    def fail(self, error: Exception) -> None:
        report(error)
        self.agent.forget(self)


def _require_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")


def _summary(entries: int, left_out: LeftOut) -> dict[str, Any]:
    return {"entries": entries, "left_out": left_out.listed, "left_out_count": left_out.count}
