"""Trees on this host, wherever they come from: its errors, and archives that must not be let in."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from ratoon.errors import AlreadyExists, Conflict, HostError, NotFound, UnsafeArchive
from ratoon.files import describe
from ratoon.machine.guest.shared.tar import TarError


def exhaust(steps: Generator[None, None, None]) -> None:
    """Take all of the steps at once, in a thread that may."""
    for _ in steps:
        pass


@contextmanager
def refused(path: str | bytes | os.PathLike[str]) -> Iterator[None]:
    """UnsafeArchive, where what a guest sent for `path` is none that may be let in."""
    try:
        yield
    except TarError as error:
        raise UnsafeArchive(
            f"what the guest sent for {os.fsdecode(path)} must not be unpacked here: {error}; "
            "nothing of it was kept"
        ) from None


@contextmanager
def local_errors() -> Iterator[None]:
    """Explain what the host's file system said."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, bytes):
            error.filename = os.fsdecode(error.filename)
        message = describe(error)
        if isinstance(error, FileNotFoundError):
            raise NotFound(f"on this host: {message}") from error
        if isinstance(error, FileExistsError):
            raise AlreadyExists(
                f"on this host: {message}; choose another place, or ask to merge"
            ) from error
        if isinstance(error, (IsADirectoryError, NotADirectoryError)):
            raise Conflict(f"on this host: {message}") from error
        raise HostError(f"on this host: {message}") from error
