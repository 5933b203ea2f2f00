"""How NFS, version 3, writes what is asked and answered: statuses, handles, attributes."""

from __future__ import annotations

import errno
import os
import stat

from ratoon.machine.volumes.export import Changes, Export
from ratoon.machine.volumes.handles import ID_BYTES, MAC_BYTES, MAX_BYTES, ForeignHandle
from ratoon.machine.volumes.xdr import Garbage, Reader, Writer

OK, STALE, SERVERFAULT, BADHANDLE, NOT_SYNC, TOOSMALL = 0, 70, 10006, 10001, 10002, 10005
_IO = 5
#: Most of nfsstat3 are Linux's own numbers.
_SAME = frozenset(
    {
        *(errno.EPERM, errno.ENOENT, errno.EIO, errno.ENXIO, errno.EACCES, errno.EEXIST),
        *(errno.EXDEV, errno.ENODEV, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EFBIG),
        *(errno.ENOSPC, errno.EROFS, errno.EMLINK),
    }
)
_STATUS = {
    errno.ENAMETOOLONG: 63,
    errno.ENOTEMPTY: 66,
    errno.EDQUOT: 69,
    errno.ESTALE: STALE,
    errno.ELOOP: errno.EACCES,
    errno.ETXTBSY: errno.EACCES,
    errno.EOPNOTSUPP: 10004,
}
_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFBLK: 3,
    stat.S_IFCHR: 4,
    stat.S_IFLNK: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFIFO: 7,
}
UNCHECKED, GUARDED, EXCLUSIVE = 0, 1, 2
UNSTABLE = 0
FILE_SYNC = 2


class Failed(Exception):
    """A status that is not OK."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


NO_WCC = bytes(8)


def status_of(error: Exception) -> int:
    if isinstance(error, Failed):
        return error.status
    if isinstance(error, ForeignHandle):
        return BADHANDLE
    number = error.errno if isinstance(error, OSError) else None
    if number in _SAME:
        assert number is not None
        return number
    return _STATUS.get(number or 0, _IO)


# Arguments ----------------------------------------------------------------------------------------


def handle(arguments: Reader) -> bytes:
    handle = bytes(arguments.opaque(MAX_BYTES))
    kernel = len(handle) - ID_BYTES - MAC_BYTES
    # Too short to be one: no volume has it.
    return handle if kernel == 0 or kernel > 4 else bytes(ID_BYTES)


def name_of(arguments: Reader) -> bytes:
    """As it was sent; whoever uses it checks it."""
    return bytes(arguments.opaque(4096))


def changes(arguments: Reader) -> Changes:
    mode = arguments.u32() if arguments.boolean() else None
    uid = arguments.u32() if arguments.boolean() else None
    gid = arguments.u32() if arguments.boolean() else None
    size = arguments.u64() if arguments.boolean() else None
    return Changes(mode, uid, gid, size, _time(arguments), _time(arguments))


def _time(arguments: Reader) -> int | None:
    how = arguments.u32()
    if how > 2:
        raise Garbage("no way of setting a time")
    if how == 2:
        return arguments.u32() * 10**9 + min(arguments.u32(), 10**9 - 1)
    return -1 if how else None


def marks(arguments: Reader) -> Changes:
    """Of an exclusive creation: the file is known by its times if the call comes again."""
    marks = bytes(arguments.fixed(8))
    atime, mtime = (int.from_bytes(each, "big") & 0x7FFFFFFF for each in (marks[:4], marks[4:]))
    return Changes(atime=atime * 10**9, mtime=mtime * 10**9)


# Results ------------------------------------------------------------------------------------------


def attributes(writer: Writer, export: Export, found: os.stat_result) -> Writer:
    kind = _TYPES.get(stat.S_IFMT(found.st_mode), 1)
    writer.u32(kind, found.st_mode & 0o7777, found.st_nlink, found.st_uid, found.st_gid)
    writer.u64(found.st_size, found.st_blocks * 512).u32(0, 0)
    writer.raw(export.id).u64(found.st_ino)
    for when in (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns):
        _write_time(writer, when)
    return writer


def _write_time(writer: Writer, nanoseconds: int) -> None:
    seconds, rest = divmod(nanoseconds, 10**9)
    writer.u32(seconds & 0xFFFFFFFF, rest)


def optional(writer: Writer, export: Export, found: os.stat_result) -> Writer:
    return attributes(writer.u32(1), export, found)


def wcc(writer: Writer, export: Export, before: os.stat_result, after: os.stat_result) -> Writer:
    writer.u32(1).u64(before.st_size)
    _write_time(writer, before.st_mtime_ns)
    _write_time(writer, before.st_ctime_ns)
    return optional(writer, export, after)


def found(writer: Writer, export: Export, fd: int) -> Writer:
    """A handle, and what it is of."""
    return optional(writer.opaque(export.handles.of(fd)), export, os.fstat(fd))


def new(export: Export, directory: int, name: bytes) -> Writer:
    with export.child(directory, name) as fd:
        handle = export.handles.of(fd)
        return optional(Writer().u32(1).opaque(handle), export, os.fstat(fd))


def listing(export: Export, fd: int, cookie: int, room: int, plus: bool) -> Writer:
    """As many entries as there is room for, in bytes."""
    writer, last, room = Writer().raw(bytes(8)), True, room - 128
    for entry in export.entries(fd, cookie):
        item = Writer().u32(1).u64(entry.inode).opaque(entry.name).u64(entry.cookie)
        if plus:
            try:
                if entry.name in (b".", b".."):
                    raise FileNotFoundError
                with export.child(fd, entry.name) as child:
                    seen = optional(Writer(), export, os.fstat(child))
                    item.raw(seen.u32(1).opaque(export.handles.of(child)).done())
            except OSError:  # gone meanwhile, or not to be reached
                item.u32(0, 0)
        if writer.length + item.length > room:
            last = False
            if writer.length == 8:
                raise Failed(TOOSMALL)
            break
        writer.raw(item.done())
    return writer.u32(0, last)
