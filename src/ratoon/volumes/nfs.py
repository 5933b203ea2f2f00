"""NFS, version 3 (RFC 1813), over the volumes of one guest.

Handles say which volume is meant. A handle of a volume that the guest has not, such as a fork's of
its source, is stale: whatever is asked gets a definite answer, and nothing waits.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from blake3 import blake3

from ratoon.volumes.export import Caller, Changes, Export
from ratoon.volumes.handles import ID_BYTES, MAC_BYTES, MAX_BYTES, ForeignHandle
from ratoon.volumes.rpc import Call
from ratoon.volumes.xdr import Garbage, Reader, Writer

PROGRAM, VERSION = 100003, 3
#: Bytes that one READ or WRITE carries at most, and what a list of names may take.
TRANSFER = 256 * 1024
LISTING = 64 * 1024
_LONGEST_LINK = 4096

_NAMES = (
    *("null", "getattr", "setattr", "lookup", "access", "readlink", "read", "write", "create"),
    *("mkdir", "symlink", "mknod", "remove", "rmdir", "rename", "link", "readdir"),
    *("readdirplus", "fsstat", "fsinfo", "pathconf", "commit"),
)
#: What is not the same when it is done twice.
ONCE = frozenset(
    _NAMES.index(name)
    for name in ("setattr", "create", "mkdir", "symlink", "remove", "rmdir", "rename", "link")
)

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
_UNCHECKED, _GUARDED, _EXCLUSIVE = 0, 1, 2
_UNSTABLE = 0
_FILE_SYNC = 2


class _Failed(Exception):
    """A status that is not OK."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Nfs:
    """Answers calls. `exports` are the guest's volumes, by id."""

    def __init__(self, exports: Mapping[bytes, Export]) -> None:
        self._exports = exports
        #: The same until the host is started anew, and its page cache with it.
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        self._verifier = blake3(boot).digest(8)

    def __call__(self, call: Call) -> bytes:
        if not 0 <= call.procedure < len(_NAMES):
            raise LookupError(call.procedure)
        answer: Callable[[Reader, Caller], Writer] = getattr(self, f"_{_NAMES[call.procedure]}")
        return answer(call.arguments, call.caller).done()

    def _null(self, arguments: Reader, caller: Caller) -> Writer:
        return Writer()

    # Of one file ----------------------------------------------------------------------------------

    def _getattr(self, arguments: Reader, caller: Caller) -> Writer:
        handle = _handle(arguments)
        try:
            export = self._export(handle)
            with export.at(handle) as fd:
                return _attributes(Writer().u32(OK), export, os.fstat(fd))
        except (OSError, ForeignHandle, _Failed) as error:
            return Writer().u32(_status(error))

    def _setattr(self, arguments: Reader, caller: Caller) -> Writer:
        handle = _handle(arguments)
        changes = _changes(arguments)
        guard = (arguments.u32(), arguments.u32()) if arguments.boolean() else None

        def work(export: Export, fd: int) -> Writer:
            export.require_writable()
            if guard is not None and guard != divmod(os.fstat(fd).st_ctime_ns, 10**9):
                raise _Failed(NOT_SYNC)
            export.change(fd, changes)
            return Writer()

        return self._changing(handle, work)

    def _access(self, arguments: Reader, caller: Caller) -> Writer:
        handle, wanted = _handle(arguments), arguments.u32()
        return self._reading(
            handle, lambda export, fd: Writer().u32(export.allowed(fd, caller, wanted))
        )

    def _readlink(self, arguments: Reader, caller: Caller) -> Writer:
        handle = _handle(arguments)
        return self._reading(handle, lambda export, fd: Writer().opaque(export.link_text(fd)))

    def _read(self, arguments: Reader, caller: Caller) -> Writer:
        handle, offset, count = _handle(arguments), arguments.u64(), arguments.u32()

        def work(export: Export, fd: int) -> Writer:
            data, last = export.read(fd, offset, min(count, TRANSFER))
            return Writer().u32(len(data), last).opaque(data)

        return self._reading(handle, work)

    def _write(self, arguments: Reader, caller: Caller) -> Writer:
        handle, offset = _handle(arguments), arguments.u64()
        count, stable = arguments.u32(), arguments.u32()
        data = arguments.opaque(TRANSFER)
        if count != len(data) or stable > _FILE_SYNC:
            raise Garbage("not what it says it is")

        def work(export: Export, fd: int) -> Writer:
            export.require_writable()
            export.write(fd, offset, data, sync=stable != _UNSTABLE)
            how = _UNSTABLE if stable == _UNSTABLE else _FILE_SYNC
            return Writer().u32(len(data), how).raw(self._verifier)

        return self._changing(handle, work)

    def _commit(self, arguments: Reader, caller: Caller) -> Writer:
        handle = _handle(arguments)
        arguments.u64()
        arguments.u32()

        def work(export: Export, fd: int) -> Writer:
            if not export.read_only:
                export.sync(fd)
            return Writer().raw(self._verifier)

        return self._changing(handle, work)

    # Of names -------------------------------------------------------------------------------------

    def _lookup(self, arguments: Reader, caller: Caller) -> Writer:
        handle, name = _handle(arguments), _name(arguments)

        def work(export: Export, directory: int) -> Writer:
            if name == b".":
                return _found(Writer(), export, directory)
            with export.child(directory, name) as fd:
                return _found(Writer(), export, fd)

        # Here alone what was asked for comes before the directory it was asked of.
        return self._reading(handle, work, first=True)

    def _create(self, arguments: Reader, caller: Caller) -> Writer:
        handle, name, how = _handle(arguments), _name(arguments), arguments.u32()
        if how > _EXCLUSIVE:
            raise Garbage("no way of making a file")
        changes = _changes(arguments) if how != _EXCLUSIVE else _marks(arguments)

        def work(export: Export, directory: int) -> Writer:
            export.require_writable()
            try:
                export.create(directory, name, changes, caller)
            except FileExistsError:
                with export.child(directory, name) as fd:
                    known = os.fstat(fd)
                    mine = changes.atime, changes.mtime
                    again = how == _EXCLUSIVE and mine == (known.st_atime_ns, known.st_mtime_ns)
                    if not stat.S_ISREG(known.st_mode) or not (how == _UNCHECKED or again):
                        raise
                    if how == _UNCHECKED and changes.size is not None:
                        export.change(fd, Changes(size=changes.size))
            return _new(export, directory, name)

        return self._changing(handle, work)

    def _mkdir(self, arguments: Reader, caller: Caller) -> Writer:
        handle, name, changes = _handle(arguments), _name(arguments), _changes(arguments)

        def work(export: Export, directory: int) -> Writer:
            export.require_writable()
            export.make_directory(directory, name, changes, caller)
            return _new(export, directory, name)

        return self._changing(handle, work)

    def _symlink(self, arguments: Reader, caller: Caller) -> Writer:
        handle, name, changes = _handle(arguments), _name(arguments), _changes(arguments)
        text = bytes(arguments.opaque(_LONGEST_LINK))

        def work(export: Export, directory: int) -> Writer:
            export.require_writable()
            export.make_link(directory, name, text, changes, caller)
            return _new(export, directory, name)

        return self._changing(handle, work)

    def _mknod(self, arguments: Reader, caller: Caller) -> Writer:
        """Neither devices nor pipes nor sockets."""
        handle = _handle(arguments)

        def work(export: Export, directory: int) -> Writer:
            raise PermissionError(errno.EPERM, "no special files")

        return self._changing(handle, work)

    def _remove(self, arguments: Reader, caller: Caller) -> Writer:
        handle, name = _handle(arguments), _name(arguments)

        def work(export: Export, directory: int) -> Writer:
            export.require_writable()
            export.remove(directory, name)
            return Writer()

        return self._changing(handle, work)

    def _rmdir(self, arguments: Reader, caller: Caller) -> Writer:
        handle, name = _handle(arguments), _name(arguments)

        def work(export: Export, directory: int) -> Writer:
            export.require_writable()
            export.remove_directory(directory, name)
            return Writer()

        return self._changing(handle, work)

    def _rename(self, arguments: Reader, caller: Caller) -> Writer:
        source, old = _handle(arguments), _name(arguments)
        target, new = _handle(arguments), _name(arguments)
        status, before, after = OK, b"", b""
        export = None
        try:
            export = self._export(source)
            with export.at(source) as one, export.at(target) as other:
                befores = os.fstat(one), os.fstat(other)
                try:
                    export.require_writable()
                    export.rename(one, old, other, new)
                except OSError as error:
                    status = _status(error)
                before = _wcc(Writer(), export, befores[0], os.fstat(one)).done()
                after = _wcc(Writer(), export, befores[1], os.fstat(other)).done()
        except (OSError, ForeignHandle, _Failed) as error:
            before = after = _NO_WCC
            status = _status(error)
        return Writer().u32(status).raw(before).raw(after)

    def _link(self, arguments: Reader, caller: Caller) -> Writer:
        handle, target, name = _handle(arguments), _handle(arguments), _name(arguments)
        try:
            export = self._export(handle)
            with export.at(handle) as fd, export.at(target) as directory:
                before, status = os.fstat(directory), OK
                try:
                    export.require_writable()
                    export.add_name(fd, directory, name)
                except OSError as error:
                    status = _status(error)
                writer = _optional(Writer().u32(status), export, os.fstat(fd))
                return _wcc(writer, export, before, os.fstat(directory))
        except (OSError, ForeignHandle, _Failed) as error:
            return Writer().u32(_status(error), 0).raw(_NO_WCC)

    # Of directories -------------------------------------------------------------------------------

    def _readdir(self, arguments: Reader, caller: Caller) -> Writer:
        handle, cookie = _handle(arguments), arguments.u64()
        arguments.fixed(8)
        room = min(arguments.u32(), LISTING)
        return self._reading(handle, lambda export, fd: _listing(export, fd, cookie, room, False))

    def _readdirplus(self, arguments: Reader, caller: Caller) -> Writer:
        handle, cookie = _handle(arguments), arguments.u64()
        arguments.fixed(8)
        arguments.u32()
        room = min(arguments.u32(), LISTING)
        return self._reading(handle, lambda export, fd: _listing(export, fd, cookie, room, True))

    # Of the file system ---------------------------------------------------------------------------

    def _fsstat(self, arguments: Reader, caller: Caller) -> Writer:
        def work(export: Export, fd: int) -> Writer:
            space = export.space()
            size = space.f_frsize
            return (
                Writer()
                .u64(space.f_blocks * size, space.f_bfree * size, space.f_bavail * size)
                .u64(space.f_files, space.f_ffree, space.f_favail)
                .u32(0)
            )

        return self._reading(_handle(arguments), work)

    def _fsinfo(self, arguments: Reader, caller: Caller) -> Writer:
        def work(export: Export, fd: int) -> Writer:
            transfer = (TRANSFER, TRANSFER, 4096)
            # Links of both kinds, the same limits everywhere, and times can be set.
            return Writer().u32(*transfer, *transfer, LISTING).u64((1 << 63) - 1).u32(0, 1, 0x1B)

        return self._reading(_handle(arguments), work)

    def _pathconf(self, arguments: Reader, caller: Caller) -> Writer:
        return self._reading(
            _handle(arguments), lambda export, fd: Writer().u32(32000, 255, 1, 1, 0, 1)
        )

    # What all have in common ----------------------------------------------------------------------

    def _export(self, handle: bytes) -> Export:
        export = self._exports.get(handle[:ID_BYTES])
        if export is None:
            raise _Failed(STALE)
        return export

    def _reading(
        self, handle: bytes, work: Callable[[Export, int], Writer], *, first: bool = False
    ) -> Writer:
        """The status, what the file is like, and the work's results; these come `first` if so."""
        try:
            export = self._export(handle)
            with export.at(handle) as fd:
                try:
                    results = work(export, fd)
                except (OSError, _Failed) as error:
                    return _optional(Writer().u32(_status(error)), export, os.fstat(fd))
                seen = _optional(Writer(), export, os.fstat(fd)).done()
                head = Writer().u32(OK)
                if first:
                    return head.raw(results.done()).raw(seen)
                return head.raw(seen).raw(results.done())
        except (OSError, ForeignHandle, _Failed) as error:
            return Writer().u32(_status(error), 0)

    def _changing(self, handle: bytes, work: Callable[[Export, int], Writer]) -> Writer:
        """The status, what the file was like before and after, and the work's results.

        Of what was made in a directory, the results come first.
        """
        try:
            export = self._export(handle)
            with export.at(handle) as fd:
                before = os.fstat(fd)
                try:
                    results = work(export, fd)
                except (OSError, _Failed) as error:
                    head = Writer().u32(_status(error))
                    return _wcc(head, export, before, os.fstat(fd))
                wcc = _wcc(Writer(), export, before, os.fstat(fd)).done()
                made = stat.S_ISDIR(before.st_mode)
                pieces = (results.done(), wcc) if made else (wcc, results.done())
                return Writer().u32(OK).raw(pieces[0]).raw(pieces[1])
        except (OSError, ForeignHandle, _Failed) as error:
            return Writer().u32(_status(error)).raw(_NO_WCC)


_NO_WCC = bytes(8)


def _status(error: Exception) -> int:
    if isinstance(error, _Failed):
        return error.status
    if isinstance(error, ForeignHandle):
        return BADHANDLE
    number = error.errno if isinstance(error, OSError) else None
    if number in _SAME:
        assert number is not None
        return number
    return _STATUS.get(number or 0, _IO)


# Arguments ----------------------------------------------------------------------------------------


def _handle(arguments: Reader) -> bytes:
    handle = bytes(arguments.opaque(MAX_BYTES))
    kernel = len(handle) - ID_BYTES - MAC_BYTES
    # Too short to be one: no volume has it.
    return handle if kernel == 0 or kernel > 4 else bytes(ID_BYTES)


def _name(arguments: Reader) -> bytes:
    """As it was sent; whoever uses it checks it."""
    return bytes(arguments.opaque(4096))


def _changes(arguments: Reader) -> Changes:
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


def _marks(arguments: Reader) -> Changes:
    """Of an exclusive creation: the file is known by its times if the call comes again."""
    marks = bytes(arguments.fixed(8))
    atime, mtime = (int.from_bytes(each, "big") & 0x7FFFFFFF for each in (marks[:4], marks[4:]))
    return Changes(atime=atime * 10**9, mtime=mtime * 10**9)


# Results ------------------------------------------------------------------------------------------


def _attributes(writer: Writer, export: Export, found: os.stat_result) -> Writer:
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


def _optional(writer: Writer, export: Export, found: os.stat_result) -> Writer:
    return _attributes(writer.u32(1), export, found)


def _wcc(writer: Writer, export: Export, before: os.stat_result, after: os.stat_result) -> Writer:
    writer.u32(1).u64(before.st_size)
    _write_time(writer, before.st_mtime_ns)
    _write_time(writer, before.st_ctime_ns)
    return _optional(writer, export, after)


def _found(writer: Writer, export: Export, fd: int) -> Writer:
    """A handle, and what it is of."""
    return _optional(writer.opaque(export.handles.of(fd)), export, os.fstat(fd))


def _new(export: Export, directory: int, name: bytes) -> Writer:
    with export.child(directory, name) as fd:
        handle = export.handles.of(fd)
        return _optional(Writer().u32(1).opaque(handle), export, os.fstat(fd))


def _listing(export: Export, fd: int, cookie: int, room: int, plus: bool) -> Writer:
    """As many entries as there is room for, in bytes."""
    writer, last, room = Writer().raw(bytes(8)), True, room - 128
    for entry in export.entries(fd, cookie):
        item = Writer().u32(1).u64(entry.inode).opaque(entry.name).u64(entry.cookie)
        if plus:
            try:
                if entry.name in (b".", b".."):
                    raise FileNotFoundError
                with export.child(fd, entry.name) as child:
                    seen = _optional(Writer(), export, os.fstat(child))
                    item.raw(seen.u32(1).opaque(export.handles.of(child)).done())
            except OSError:  # gone meanwhile, or not to be reached
                item.u32(0, 0)
        if writer.length + item.length > room:
            last = False
            if writer.length == 8:
                raise _Failed(TOOSMALL)
            break
        writer.raw(item.done())
    return writer.u32(0, last)
