"""How a file of a volume is found again by the handle that the kernel gave of it.

Who has CAP_DAC_READ_SEARCH on the whole host asks the kernel, and remembers nothing. Root of a user
namespace has not, but is told the handle of whatever file he sees. So he looks where the file was
last, and through the whole volume if it is not there any more. What has the handle is the file.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import NamedTuple, Protocol

from ratoon import syscalls

#: Of a kernel's handle: its type, then its bytes.
_KIND = struct.Struct("=i")
#: Of both; more are not to be had where there is room for no more.
MAX_BYTES = 40
#: Files whose places are remembered, which takes some 100 MB. Of a larger volume the rest are
#: looked for each time.
MOST_PLACES = 1 << 19
_PATH = os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW
#: Said of a name that is not there, or not to be reached.
_ASTRAY = (FileNotFoundError, NotADirectoryError, PermissionError)


class _Seen(NamedTuple):
    """A file's handle, its name, and the directory that it is in; None: the volume's own."""

    file: bytes
    name: bytes
    directory: _Seen | None


class Finder(Protocol):
    """Finds the files of one volume."""

    def open(self, file: bytes) -> int:
        """An O_PATH descriptor of what has this handle. OSError: ESTALE if nothing has."""

    def seen(self, directory: int, name: bytes) -> None:
        """Something has this name there now. OSError: it is gone again."""


def finder_of(root: int) -> Finder:
    """The one for a volume whose directory is open as `root`. OSError: it has no handles."""
    finder = ByHandle(root)
    try:
        os.close(finder.open(kernel_handle(root)))
    except PermissionError:
        return ByPlace(root)
    return finder


def kernel_handle(fd: int, name: bytes = b"") -> bytes:
    """The handle of an open file, or of what has this name in a directory; its type comes first.

    OSError: its file system has none that fit (EOPNOTSUPP).
    """
    try:
        kind, handle = syscalls.file_handle(fd, MAX_BYTES - _KIND.size, name)
    except OSError as error:
        if error.errno != errno.EOVERFLOW:
            raise
        what = "file handles of this file system are too long"
        raise OSError(errno.EOPNOTSUPP, what) from None
    return _KIND.pack(kind) + handle


class ByHandle:
    """The kernel finds them."""

    def __init__(self, root: int) -> None:
        self._root = root

    def open(self, file: bytes) -> int:
        (kind,) = _KIND.unpack_from(file)
        return syscalls.open_handle(self._root, kind, file[_KIND.size :], _PATH)

    def seen(self, directory: int, name: bytes) -> None:
        pass


class ByPlace:
    """Remembers in which directory, and by which name, each was seen last.

    A directory that was renamed is one place that has changed, whatever is in it. Nothing is lost
    with a process: the next one looks through the volume once, and knows all places.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._own = kernel_handle(root)
        self._device = os.fstat(root).st_dev
        #: By handle: the handle of the directory, a slash, and the name.
        self._places: dict[bytes, bytes] = {}
        #: For a moment, two machines of one sandbox have its volumes.
        self._lock = threading.Lock()

    def open(self, file: bytes) -> int:
        fd = self._at_its_place(file)
        if fd is None:
            self._look_for(file)
            fd = self._at_its_place(file)
        if fd is None:
            raise OSError(errno.ESTALE, "it is not in the volume any more")
        return fd

    def seen(self, directory: int, name: bytes) -> None:
        self._note(kernel_handle(directory, name), kernel_handle(directory), name)

    def _note(self, file: bytes, directory: bytes, name: bytes) -> None:
        with self._lock:
            self._places.pop(file, None)  # so that the oldest come first
            self._places[file] = directory + b"/" + name
            if len(self._places) > MOST_PLACES:
                for old in [*islice(self._places, MOST_PLACES // 2)]:
                    del self._places[old]

    def _at_its_place(self, file: bytes) -> int | None:
        """What has this handle where it was last; None: nothing that is known."""
        names: list[bytes] = []
        above = file
        while above != self._own:
            place = self._places.get(above)
            # Two that were each moved into the other lead nowhere.
            if place is None or len(names) > len(self._places):
                return None
            above, _, name = place.rpartition(b"/")
            names.append(name)
        fd = self._reach(names[::-1])
        # A handle is of one file system alone, and another may be mounted there.
        if fd is None or (os.fstat(fd).st_dev == self._device and kernel_handle(fd) == file):
            return fd
        os.close(fd)
        return None

    def _reach(self, names: Sequence[bytes]) -> int | None:
        """A descriptor of what these names lead to, one in the other; None: of nothing."""
        fd = os.dup(self._root)
        for name in names:
            try:
                below = os.open(name, _PATH, dir_fd=fd)
            except _ASTRAY:
                return None
            finally:
                os.close(fd)
            fd = below
        return fd

    def _look_for(self, wanted: bytes) -> None:
        """Note where everything in the volume is, and last the way to the one that is wanted."""
        found: _Seen | None = None
        waiting: deque[_Seen | None] = deque([None])
        while waiting:
            for each, is_directory in self._contents(waiting.popleft()):
                self._note_seen(each)
                if each.file == wanted:
                    found = each
                if is_directory:
                    waiting.append(each)
        while found is not None:
            self._note_seen(found)
            found = found.directory

    def _note_seen(self, each: _Seen) -> None:
        directory = self._own if each.directory is None else each.directory.file
        self._note(each.file, directory, each.name)

    def _contents(self, directory: _Seen | None) -> Iterator[tuple[_Seen, bool]]:
        """What is in a directory that may be read, and whether each is one."""
        names, above = [], directory
        while above is not None:
            names.append(above.name)
            above = above.directory
        fd = self._reach(names[::-1])
        if fd is None:
            return
        try:
            if os.fstat(fd).st_dev != self._device:
                return
            listed = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
        except _ASTRAY:
            return
        finally:
            os.close(fd)
        try:
            with os.scandir(listed) as entries:
                for entry in entries:
                    with suppress(OSError):  # it is gone
                        name = os.fsencode(entry.name)
                        file = kernel_handle(listed, name)
                        yield _Seen(file, name, directory), entry.is_dir(follow_symlinks=False)
        finally:
            os.close(listed)
