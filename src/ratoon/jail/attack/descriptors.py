"""Misuse of the descriptors that it holds."""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
import socket
import stat
import struct
from collections.abc import Callable

from ratoon.jail.attack.around import for_pids, fresh, writable_places
from ratoon.jail.attack.attempts import Denied, attempt, register, try_each
from ratoon.jail.attack.calls import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    MIB,
    address,
    buffer,
    call,
    close_later,
    filled,
    map_raw,
)
from ratoon.jail.attack.targets import T


def on_descriptors(what: str, one: Callable[[int], str | None], *kinds: str) -> None:
    """Register `one` for the read-only layers, the writable files, or other kinds it holds."""
    chosen: dict[str, Callable[[], list[int]]] = {
        "layers": lambda: T.layers,
        "overlay, console and log": lambda: T.writable,
        "console and log": lambda: T.traces,
        "overlay": lambda: T.overlay,
        "sockets": lambda: list(T.sockets.values()),
    }
    for kind in kinds or ("layers", "overlay, console and log"):
        fds = chosen[kind]
        register("files", f"{what}: {kind}", lambda fds=fds: try_each(fds(), one))  # type: ignore[misc]


def reopen_writable(fd: int) -> str:
    return try_each(
        [f"/proc/self/fd/{fd}", f"/dev/fd/{fd}"],
        lambda path: close_later(os.open(path, os.O_RDWR | os.O_NONBLOCK)),
    )


def change_mode(fd: int) -> None:
    os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode))


def change_owner(fd: int) -> str:
    now = os.fstat(fd)
    os.fchown(fd, now.st_uid, now.st_gid)
    return "fchown to the present owner was accepted"


def change_xattr(fd: int) -> None:
    os.setxattr(fd, b"user.standin", b"1")
    os.removexattr(fd, b"user.standin")


def change_times(fd: int) -> None:
    now = os.fstat(fd)
    os.utime(fd, ns=(now.st_atime_ns, now.st_mtime_ns))


def drop_append(fd: int) -> str:
    before = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not before & os.O_APPEND:
        raise Denied("not tried: it is not open for appending")
    fcntl.fcntl(fd, fcntl.F_SETFL, before & ~os.O_APPEND)
    after = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, before)
    if after & os.O_APPEND:
        raise Denied("O_APPEND stayed")
    return "O_APPEND went; what was written may be rewritten"


def not_append_only(fd: int) -> str:
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
        raise Denied("open for appending only")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise Denied("not a regular file")
    return "earlier lines can be overwritten in place"


def change_flags(fd: int) -> str:
    before = struct.unpack("i", fcntl.ioctl(fd, 0x80086601, b"\0" * 4))[0]
    fcntl.ioctl(fd, 0x40086602, struct.pack("i", before ^ 0x40))  # the "no dump" flag
    fcntl.ioctl(fd, 0x40086602, struct.pack("i", before))
    return "inode flags were changed and changed back"


def change_project(fd: int) -> str:
    attributes = bytearray(fcntl.ioctl(fd, 0x801C581F, b"\0" * 28))
    before = bytes(attributes)
    project = struct.unpack_from("=I", attributes, 12)[0]
    struct.pack_into("=I", attributes, 12, project + 1)
    fcntl.ioctl(fd, 0x401C5820, bytes(attributes))
    fcntl.ioctl(fd, 0x401C5820, before)
    return "the quota project was changed and changed back"


def same_length(fd: int) -> str:
    os.ftruncate(fd, os.fstat(fd).st_size)
    return "ftruncate (to the present length) was accepted"


def punch_hole(fd: int) -> str:
    end = os.fstat(fd).st_size + MIB
    call("fallocate", fd, 3, end, 4096)
    return "a hole (beyond the end) was punched"


def link_back(fd: int) -> str:
    def one(place: str) -> str:
        path = fresh(place)
        try:
            call("linkat", fd, b"", AT_FDCWD, os.fsencode(path), AT_EMPTY_PATH)
        except OSError:
            source = f"/proc/self/fd/{fd}".encode()
            call("linkat", AT_FDCWD, source, AT_FDCWD, os.fsencode(path), 0x400)
        os.unlink(path)
        return "linked and unlinked"

    return try_each(writable_places(), one)


def by_handle(fd: int) -> str:
    handle = buffer(struct.pack("=Ii", 128, 0) + b"\0" * 128)
    mount = buffer(4)
    call("name_to_handle_at", fd, b"", handle, mount, AT_EMPTY_PATH)
    return close_later(call("open_by_handle_at", fd, handle, os.O_RDWR | os.O_NONBLOCK))


def root_by_handle(fd: int) -> str:
    """The guess behind `shocker`: handles of the root directory of usual file systems."""
    guesses = [struct.pack("=IiII", 8, 1, inode, 0) for inode in (2, 128, 64, 96, 256, 1)]
    guesses.append(struct.pack("=IiQI", 12, 0x81, 128, 0))
    flags = os.O_RDONLY | os.O_DIRECTORY

    def one(guess: bytes) -> str:
        return close_later(call("open_by_handle_at", fd, buffer(guess), flags))

    return try_each(guesses, one)


def take_lease(fd: int) -> str:
    def one(kind: int) -> str:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return "a lease, which holds up others that open it"

    return try_each([fcntl.F_WRLCK, fcntl.F_RDLCK], one)


def lock_whole(fd: int) -> str:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(fd, fcntl.LOCK_UN)
    return "an exclusive flock"


def lock_range(fd: int) -> str:
    def one(pair: tuple[str, int, int]) -> str:
        lock = struct.pack("=hhxxxxqqixxxx", pair[2], 0, 0, 0, 0)
        fcntl.fcntl(fd, pair[1], lock)
        fcntl.fcntl(fd, pair[1], struct.pack("=hhxxxxqqixxxx", fcntl.F_UNLCK, 0, 0, 0, 0))
        return "granted"

    kinds = [("write lock", 37, fcntl.F_WRLCK), ("read lock", 37, fcntl.F_RDLCK)]
    kinds.append(("posix write lock", fcntl.F_SETLK, fcntl.F_WRLCK))
    return try_each(kinds, one)


on_descriptors("reopen for writing through /proc/self/fd", reopen_writable, "layers")
on_descriptors("reopen through /proc/self/fd without O_APPEND", reopen_writable, "console and log")
on_descriptors("change the mode", change_mode)
on_descriptors("change the owner", change_owner)
on_descriptors("set an extended attribute", change_xattr)
on_descriptors("change the times", change_times)
on_descriptors("change inode flags", change_flags)
on_descriptors("change the quota project", change_project)
on_descriptors("drop O_APPEND with fcntl", drop_append, "console and log")
on_descriptors("overwrite earlier output", not_append_only, "console and log")
on_descriptors("truncate", same_length, "layers", "console and log")
on_descriptors("punch a hole", punch_hole, "layers", "console and log")
on_descriptors("make a name for a descriptor (linkat)", link_back)
on_descriptors("open again by file handle", by_handle)
on_descriptors("open the root of the file system by a guessed handle", root_by_handle)
on_descriptors("take a lease", take_lease)
on_descriptors("take an exclusive flock", lock_whole, "layers")
on_descriptors("take record locks", lock_range, "layers")


def start_of(fd: int) -> bytes:
    data = os.pread(fd, 16, 0)
    if not data:
        raise Denied("not tried: it is empty")
    return data


def write_same(fd: int) -> str:
    data = start_of(fd)
    return f"{os.pwrite(fd, data, 0)} bytes"


def map_shared_writable(fd: int) -> str:
    map_raw(fd, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED)
    return "mapped"


def make_mapping_writable(fd: int) -> str:
    where = map_raw(fd, mmap.PROT_READ, mmap.MAP_SHARED)
    call("mprotect", where, 4096, mmap.PROT_READ | mmap.PROT_WRITE)
    return "mprotect made it writable"


def splice_into(fd: int) -> str:
    data = start_of(fd)
    reader, writer = os.pipe()
    os.write(writer, data)
    return f"{os.splice(reader, fd, len(data), offset_dst=0)} bytes"


def copy_range_into(fd: int) -> str:
    data = start_of(fd)
    return f"{os.copy_file_range(filled(data), fd, len(data), 0, 0)} bytes"


def sendfile_into(fd: int) -> str:
    data = start_of(fd)
    before = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        os.lseek(fd, 0, os.SEEK_SET)
        return f"{os.sendfile(fd, filled(data), 0, len(data))} bytes"
    finally:
        os.lseek(fd, before, os.SEEK_SET)


def clone_into(fd: int) -> str:
    fcntl.ioctl(fd, 0x40049409, fd)  # onto itself: only the permission would show
    return "FICLONE was accepted"


def spliced_pages(fd: int) -> str:
    """Pages of a layer in a pipe must not be writable through vmsplice with the gift flag."""
    reader, writer = os.pipe()
    os.splice(fd, writer, 16, offset_src=0)
    page = buffer(4096)
    vector = buffer(struct.pack("=QQ", address(page), 16))
    call("vmsplice", reader, vector, 1, 0)
    before = os.pread(fd, 16, 0)
    page.raw = b"\xff" * 4096
    if os.pread(fd, 16, 0) != before:
        return "the page of the layer itself was changed"
    raise Denied("a copy only")


for _what, _one in (
    ("write", write_same),
    ("map shared and writable", map_shared_writable),
    ("map shared, then mprotect to writable", make_mapping_writable),
    ("splice into", splice_into),
    ("copy_file_range into", copy_range_into),
    ("sendfile into", sendfile_into),
    ("clone blocks into (FICLONE)", clone_into),
    ("get at cached pages with splice and vmsplice", spliced_pages),
):
    on_descriptors(_what, _one, "layers")


@attempt("files", "have the kernel signal others about a descriptor (F_SETOWN, SIGIO)")
def _() -> str:
    mine, theirs = socket.socketpair()

    def one(pid: int) -> str:
        fcntl.fcntl(mine, fcntl.F_SETOWN, pid)
        fcntl.fcntl(mine, 10, signal.SIGURG)  # F_SETSIG; ignored by default
        os.kill(pid, 0)  # the same rule decides when the signal is sent
        fcntl.fcntl(mine, fcntl.F_SETFL, os.O_NONBLOCK | fcntl.FASYNC)
        theirs.send(b"x")
        return "SIGURG was sent"

    return for_pids(one)


@attempt("files", "watch host paths with inotify")
def _() -> str:
    fd = call("inotify_init1", 0)
    paths = T.host_paths + [os.path.dirname(path) for path in T.host_paths if path.count("/") > 1]
    return try_each(paths, lambda p: str(call("inotify_add_watch", fd, os.fsencode(p), 0xFFF)))
