"""One run of a program in a cell: it is given files, waited for, and heard.

What it read was made by somebody who may have broken into it by that: what it says is bounded, and
what it was lent comes back as it was, but for the content.
"""

from __future__ import annotations

import fcntl
import os
import resource
import stat
import subprocess
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ratoon.errors import ProgramFailed
from ratoon.jail.cell import Cell, Inmate
from ratoon.jail.steps import FILES
from ratoon.units import MIB

#: Bytes that it may write to its standard output, and to the other.
MOST_SAID = 256 * MIB


class Errand:
    """A `with` block; in it the files are named first, and then the program is run, once.

    OSError: a file cannot be opened. LostName: one was removed before it could be given.
    """

    def __init__(
        self, cell: Cell, program: str, longest: int, environment: Mapping[str, str] | None = None
    ) -> None:
        """`program` is a path in the cell; no file gets longer than `longest` bytes by it."""
        self._cell = cell
        self._program = program
        self._longest = longest
        self._environment = environment or {}
        self._mounts: dict[str, int] = {}
        self._lent: dict[str, int] = {}
        self._held = ExitStack()

    def __enter__(self) -> Errand:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def reads(self, path: Path) -> str:
        """The name there of a file that others may share, to be read.

        All users may read it from now on, so it has to lie in a directory that keeps them out.
        """
        fd = self._open(path, os.O_RDONLY)
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if not mode & stat.S_IROTH:
            os.fchmod(fd, mode | 0o444)
        return self._name(self._mounts, fd)

    def writes(self, path: Path) -> str:
        """That of a file that nobody else has now, to be written: its own until the block ends."""
        fd = self._open(path, os.O_RDWR)
        self._held.callback(_take_back, fd, os.fstat(fd))
        return self._name(self._lent, fd)

    def run(
        self,
        *words: str,
        feed: Callable[[int], object] = lambda fd: None,
        good: Container[int] = (0,),
        with_errors: bool = False,
    ) -> bytes:
        """Run it with these arguments, and return what it wrote to its standard output.

        `with_errors`: and after that what it wrote to the other, for those that fail with status 0.
        `feed` writes its standard input to a descriptor; it may end without having read all of it.
        Whatever goes wrong, it runs no longer. ProgramFailed: its status is not among `good`.
        """
        with _listening() as output, _listening() as errors:
            status = self._status(words, feed, output, errors)
            said, complained = _heard(output), _heard(errors)
            if status in good:
                return said + complained if with_errors else said
            raise ProgramFailed.of(Path(self._program).name, status, said + complained)

    def _status(
        self, words: Sequence[str], feed: Callable[[int], object], output: int, errors: int
    ) -> int:
        read, write = os.pipe()
        with os.fdopen(write, "wb", buffering=0) as pipe:
            with os.fdopen(read, "rb"):
                process = self._start(words, read, output, errors)
            try:
                with suppress(BrokenPipeError):
                    feed(write)
                pipe.close()
                return process.wait()
            finally:
                process.kill()
                process.wait()

    def _start(
        self, words: Sequence[str], read: int, output: int, errors: int
    ) -> subprocess.Popen[bytes]:
        return self._cell.start(
            Inmate(
                [self._program, *words],
                input=read,
                output=output,
                errors=errors,
                mounts=self._mounts,
                lent=self._lent,
                limits={resource.RLIMIT_FSIZE: self._longest},
                environment=self._environment,
                survives=False,
            )
        )

    def _open(self, path: Path, access: int) -> int:
        fd = os.open(path, access | os.O_CLOEXEC)
        self._held.callback(os.close, fd)
        return fd

    def _name(self, files: dict[str, int], fd: int) -> str:
        place = f"{FILES}/{len(self._mounts) + len(self._lent)}"
        files[place] = fd
        return f"/{place}"


def _take_back(fd: int, was: os.stat_result) -> None:
    os.fchown(fd, was.st_uid, was.st_gid)
    os.fchmod(fd, stat.S_IMODE(was.st_mode))


@contextmanager
def _listening() -> Iterator[int]:
    """A file in memory that does not get longer than MOST_SAID, whoever writes to it."""
    fd = os.memfd_create("said", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, MOST_SAID)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        yield fd
    finally:
        os.close(fd)


def _heard(fd: int) -> bytes:
    """What was written: whoever did left the position at its end."""
    return os.pread(fd, os.lseek(fd, 0, os.SEEK_CUR), 0)
