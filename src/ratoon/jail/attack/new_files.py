"""Making files, and changing its own program and its image."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import stat
import sys
from collections.abc import Callable
from typing import Any

from ratoon.jail.attack.around import fresh, opens, writable_places
from ratoon.jail.attack.attempts import attempt, past_permission, reason_of, register, try_each
from ratoon.jail.attack.calls import close_later
from ratoon.jail.attack.targets import T, as_list


def making(name: str, make: Callable[[str], Any], remove: Callable[[str], None]) -> None:
    def one(place: str) -> str:
        path = fresh(place)
        make(path)
        try:
            remove(path)
        except OSError as error:
            return f"made, and then could not be removed: {reason_of(error)}"
        return "made and removed"

    register("files", name, lambda: try_each(writable_places(), one))


def make_file(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)


making("create a file anywhere", make_file, os.unlink)
making("create a directory anywhere", os.mkdir, os.rmdir)
making("create a symbolic link anywhere", lambda p: os.symlink("/etc/shadow", p), os.unlink)
making("create a named pipe anywhere", os.mkfifo, os.unlink)
making("create a socket file anywhere", make_socket, os.unlink)
making(
    "create a device node for memory",
    lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 1)),
    os.unlink,
)
making(
    "create a device node for a disk",
    lambda path: os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(8, 0)),
    os.unlink,
)


@attempt("files", "create a nameless file anywhere (O_TMPFILE)")
def _() -> str:
    return try_each(
        writable_places(),
        lambda place: close_later(os.open(place, os.O_TMPFILE | os.O_RDWR, 0o600)),
    )


@attempt("files", "make hard links beside its program and libraries")
def _() -> str:
    def one(path: str) -> str:
        target = fresh(os.path.dirname(path))
        os.link(path, target)
        os.unlink(target)
        return "a hard link could be made beside it"

    return try_each(program_files(), one)


def program_files() -> list[str]:
    files = [sys.executable, os.path.realpath(sys.executable), os.__file__, socket.__file__]
    libraries = ("libc.so.6", "libm.so.6", "libz.so.1", "libffi.so.8", "libpthread.so.0")
    folders = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib")
    files += [f"{folder}/{library}" for folder in folders for library in libraries]
    files += ["/lib64/ld-linux-x86-64.so.2", os.path.abspath(sys.argv[0])]
    files += [file for file in (getattr(m, "__file__", "") for m in (mmap, ctypes)) if file]
    return [path for path in dict.fromkeys(files) if path and os.path.exists(path)]


@attempt("files", "open its program and libraries for writing")
def _() -> str:
    def one(path: str) -> str:
        return past_permission(lambda: opens(path, os.O_WRONLY), errno.ETXTBSY)

    return try_each(program_files(), one)


@attempt("files", "change the mode of its program and libraries")
def _() -> str:
    def one(path: str) -> str:
        os.chmod(path, stat.S_IMODE(os.stat(path).st_mode))
        return "chmod to the present mode was accepted"

    return try_each(program_files(), one)


@attempt("files", "write its program through /proc/self/exe")
def _() -> str:
    return past_permission(lambda: opens("/proc/self/exe", os.O_WRONLY), errno.ETXTBSY)


@attempt("files", "open the memory image for writing")
def _() -> str:
    return try_each(as_list(T.memory), lambda path: opens(path, os.O_RDWR))


@attempt("files", "change the length, mode or owner of the memory image by its path")
def _() -> str:
    def one(path: str) -> str:
        now = os.stat(path)
        changes: dict[str, Callable[[], None]] = {
            "truncate": lambda: os.truncate(path, now.st_size),
            "chmod": lambda: os.chmod(path, stat.S_IMODE(now.st_mode)),
            "chown": lambda: os.chown(path, now.st_uid, now.st_gid),
        }
        return try_each(changes, lambda change: changes[change]())

    return try_each(as_list(T.memory), one)
