"""A file that gets its name once it is whole."""

from __future__ import annotations

import os

#: What is not whole yet is called so, beside the place where it will be, and something random.
TEMPORARY = b".ratoon-"


def temporary_name() -> bytes:
    return TEMPORARY + os.urandom(8).hex().encode()


class NewFile:
    """Written under a temporary name; `publish` gives it its own and replaces what has it.

    Until then nothing of it is to be seen there, and `discard` leaves nothing at all. Errors name
    no file: only the caller knows its path, and the temporary name says nothing to anybody.
    """

    def __init__(self, directory: int, name: bytes) -> None:
        """`directory` is an open directory; it stays open, and the caller's."""
        self._directory = directory
        self._name = name
        self._temporary = temporary_name()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd = os.open(self._temporary, flags, 0o600, dir_fd=directory)
        except OSError as error:
            raise _nameless(error) from None

    def write(self, data: bytes | memoryview) -> None:
        write_all(self._fd, data)

    def publish(
        self, mode: int, owner: tuple[int, int] | None = None, mtime_ns: int | None = None
    ) -> None:
        """Finish it: permissions, (uid, gid), modification time; then its name."""
        try:
            if owner is not None:
                os.fchown(self._fd, *owner)
            os.fchmod(self._fd, mode)  # after fchown, which clears setuid
            if mtime_ns is not None:
                os.utime(self._fd, ns=(mtime_ns, mtime_ns))
            os.rename(
                self._temporary,
                self._name,
                src_dir_fd=self._directory,
                dst_dir_fd=self._directory,
            )
        except OSError as error:
            self.discard()
            raise _nameless(error) from None
        os.close(self._fd)

    def discard(self) -> None:
        os.close(self._fd)
        unlink_if_there(self._temporary, self._directory)


def _nameless(error: OSError) -> OSError:
    return OSError(error.errno, error.strerror)


def unlink_if_there(name: bytes, directory: int) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Less than all is written where a limit or the disk's end is near; the rest tells why."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
