"""Moving about in a tree of directories by descriptors, never by paths.

So no symbolic link is ever followed, whoever may put one there meanwhile, and no path is too long.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Cursor:
    """A place in the tree below a directory. Holds one descriptor, however deep it is."""

    def __init__(self, root: int) -> None:
        """`root` is the directory's descriptor; closed by the cursor."""
        self.fd = root
        #: The names on the way here from the root.
        self.names: list[bytes] = []
        self._identities: list[tuple[int, int]] = []

    @classmethod
    def at(cls, name: bytes, directory: int | None = None) -> Cursor:
        """At the directory `name` in the open `directory` (None: the working directory)."""
        return cls(os.open(name, _DIRECTORY, dir_fd=directory))

    def enter(self, name: bytes) -> None:
        """Go down; NotADirectoryError if `name` is a link or no directory."""
        below = os.open(name, _DIRECTORY, dir_fd=self.fd)
        self._identities.append(_identity(self.fd))
        self.names.append(name)
        os.close(self.fd)
        self.fd = below

    def leave(self) -> int:
        """Go up; gives the descriptor of the directory that was left, for the caller to close."""
        above = os.open(b"..", _DIRECTORY, dir_fd=self.fd)
        if _identity(above) != self._identities[-1]:
            os.close(above)
            raise OSError(errno.ESTALE, "the directory was moved meanwhile")
        self._identities.pop()
        self.names.pop()
        left, self.fd = self.fd, above
        return left

    def path(self, name: bytes) -> bytes:
        """How `name` here is called from the root."""
        return b"/".join((*self.names, name))

    def close(self) -> None:
        os.close(self.fd)


def names_in(directory: int) -> list[bytes]:
    """What an open directory holds, in order."""
    return sorted(os.fsencode(name) for name in os.listdir(directory))


def remove_tree(name: bytes, directory: int | None = None) -> Iterator[None]:
    """Remove the directory `name` and all in it; pauses after each step."""
    cursor = Cursor.at(name, directory)
    try:
        left = [names_in(cursor.fd)]
        while left:
            if left[-1]:
                _remove_or_enter(left[-1].pop(), cursor, left)
            else:
                left.pop()
                if left:
                    emptied = cursor.names[-1]
                    os.close(cursor.leave())
                    os.rmdir(emptied, dir_fd=cursor.fd)
            yield
    except OSError as error:
        if error.filename is not None:
            error.filename = os.path.join(name, cursor.path(error.filename))
        raise
    finally:
        cursor.close()
    os.rmdir(name, dir_fd=directory)


def _remove_or_enter(entry: bytes, cursor: Cursor, left: list[list[bytes]]) -> None:
    try:
        os.unlink(entry, dir_fd=cursor.fd)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        cursor.enter(entry)
        left.append(names_in(cursor.fd))


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
