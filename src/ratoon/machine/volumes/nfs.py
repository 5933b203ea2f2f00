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

from ratoon.machine.volumes import formats
from ratoon.machine.volumes.callers import Caller, acting_as
from ratoon.machine.volumes.export import Changes, Export
from ratoon.machine.volumes.handles import ID_BYTES, ForeignHandle
from ratoon.machine.volumes.rpc import Call, NoProcedure
from ratoon.machine.volumes.xdr import Garbage, Reader, Writer

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


class Nfs:
    """Answers calls. `exports` are the guest's volumes, by id."""

    def __init__(self, exports: Mapping[bytes, Export]) -> None:
        self._exports = exports
        #: The same until the host is started anew, and its page cache with it.
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        self._verifier = blake3(boot).digest(8)

    def __call__(self, call: Call) -> bytes:
        if not 0 <= call.procedure < len(_NAMES):
            raise NoProcedure
        answer: Callable[[Reader, Caller], Writer] = getattr(self, f"_{_NAMES[call.procedure]}")
        return answer(call.arguments, call.caller).done()

    def _null(self, arguments: Reader, caller: Caller) -> Writer:
        return Writer()

    # Of one file ----------------------------------------------------------------------------------

    def _getattr(self, arguments: Reader, caller: Caller) -> Writer:
        handle = formats.handle(arguments)
        try:
            export = self._export(handle)
            with export.at(handle) as fd:
                return formats.attributes(Writer().u32(formats.OK), export, os.fstat(fd))
        except (OSError, ForeignHandle, formats.Failed) as error:
            return Writer().u32(formats.status_of(error))

    def _setattr(self, arguments: Reader, caller: Caller) -> Writer:
        handle = formats.handle(arguments)
        changes = formats.changes(arguments)
        guard = (arguments.u32(), arguments.u32()) if arguments.boolean() else None

        def work(export: Export, fd: int) -> Writer:
            export.require_writable()
            if guard is not None and guard != divmod(os.fstat(fd).st_ctime_ns, 10**9):
                raise formats.Failed(formats.NOT_SYNC)
            export.change(fd, changes)
            return Writer()

        return self._changing(handle, caller, work)

    def _access(self, arguments: Reader, caller: Caller) -> Writer:
        handle, wanted = formats.handle(arguments), arguments.u32()
        return self._reading(
            handle, caller, lambda export, fd: Writer().u32(export.allowed(fd, caller, wanted))
        )

    def _readlink(self, arguments: Reader, caller: Caller) -> Writer:
        handle = formats.handle(arguments)
        return self._reading(
            handle, caller, lambda export, fd: Writer().opaque(export.link_text(fd))
        )

    def _read(self, arguments: Reader, caller: Caller) -> Writer:
        handle, offset, count = formats.handle(arguments), arguments.u64(), arguments.u32()

        def work(export: Export, fd: int) -> Writer:
            data, last = export.read(fd, offset, min(count, TRANSFER))
            return Writer().u32(len(data), last).opaque(data)

        return self._reading(handle, caller, work)

    def _write(self, arguments: Reader, caller: Caller) -> Writer:
        handle, offset = formats.handle(arguments), arguments.u64()
        count, stable = arguments.u32(), arguments.u32()
        data = arguments.opaque(TRANSFER)
        if count != len(data) or stable > formats.FILE_SYNC:
            raise Garbage("not what it says it is")

        def work(export: Export, fd: int) -> Writer:
            export.require_writable()
            export.write(fd, offset, data, sync=stable != formats.UNSTABLE)
            how = formats.UNSTABLE if stable == formats.UNSTABLE else formats.FILE_SYNC
            return Writer().u32(len(data), how).raw(self._verifier)

        return self._changing(handle, caller, work)

    def _commit(self, arguments: Reader, caller: Caller) -> Writer:
        handle = formats.handle(arguments)
        arguments.u64()
        arguments.u32()

        def work(export: Export, fd: int) -> Writer:
            if not export.read_only:
                export.sync(fd)
            return Writer().raw(self._verifier)

        return self._changing(handle, caller, work)

    # Of names -------------------------------------------------------------------------------------

    def _lookup(self, arguments: Reader, caller: Caller) -> Writer:
        handle, name = formats.handle(arguments), formats.name_of(arguments)

        def work(export: Export, directory: int) -> Writer:
            if name == b".":
                return formats.found(Writer(), export, directory)
            with export.child(directory, name) as fd:
                return formats.found(Writer(), export, fd)

        # Here alone what was asked for comes before the directory it was asked of.
        return self._reading(handle, caller, work, first=True)

    def _create(self, arguments: Reader, caller: Caller) -> Writer:
        handle, name = formats.handle(arguments), formats.name_of(arguments)
        how = arguments.u32()
        if how > formats.EXCLUSIVE:
            raise Garbage("no way of making a file")
        changes = (
            formats.changes(arguments) if how != formats.EXCLUSIVE else formats.marks(arguments)
        )

        def work(export: Export, directory: int) -> Writer:
            export.require_writable()
            try:
                export.create(directory, name, changes)
            except FileExistsError:
                with export.child(directory, name) as fd:
                    known = os.fstat(fd)
                    mine = changes.atime, changes.mtime
                    again = how == formats.EXCLUSIVE and mine == (
                        known.st_atime_ns,
                        known.st_mtime_ns,
                    )
                    if not stat.S_ISREG(known.st_mode) or not (how == formats.UNCHECKED or again):
                        raise
                    if how == formats.UNCHECKED and changes.size is not None:
                        export.change(fd, Changes(size=changes.size))
            return formats.new(export, directory, name)

        return self._changing(handle, caller, work)

    def _mkdir(self, arguments: Reader, caller: Caller) -> Writer:
        handle, name, changes = (
            formats.handle(arguments),
            formats.name_of(arguments),
            formats.changes(arguments),
        )

        def work(export: Export, directory: int) -> Writer:
            export.require_writable()
            export.make_directory(directory, name, changes)
            return formats.new(export, directory, name)

        return self._changing(handle, caller, work)

    def _symlink(self, arguments: Reader, caller: Caller) -> Writer:
        handle, name, changes = (
            formats.handle(arguments),
            formats.name_of(arguments),
            formats.changes(arguments),
        )
        text = bytes(arguments.opaque(_LONGEST_LINK))

        def work(export: Export, directory: int) -> Writer:
            export.require_writable()
            export.make_link(directory, name, text, changes)
            return formats.new(export, directory, name)

        return self._changing(handle, caller, work)

    def _mknod(self, arguments: Reader, caller: Caller) -> Writer:
        """Neither devices nor pipes nor sockets."""
        handle = formats.handle(arguments)

        def work(export: Export, directory: int) -> Writer:
            raise PermissionError(errno.EPERM, "no special files")

        return self._changing(handle, caller, work)

    def _remove(self, arguments: Reader, caller: Caller) -> Writer:
        handle, name = formats.handle(arguments), formats.name_of(arguments)

        def work(export: Export, directory: int) -> Writer:
            export.require_writable()
            export.remove(directory, name)
            return Writer()

        return self._changing(handle, caller, work)

    def _rmdir(self, arguments: Reader, caller: Caller) -> Writer:
        handle, name = formats.handle(arguments), formats.name_of(arguments)

        def work(export: Export, directory: int) -> Writer:
            export.require_writable()
            export.remove_directory(directory, name)
            return Writer()

        return self._changing(handle, caller, work)

    def _rename(self, arguments: Reader, caller: Caller) -> Writer:
        source, old = formats.handle(arguments), formats.name_of(arguments)
        target, new = formats.handle(arguments), formats.name_of(arguments)
        status, before, after = formats.OK, b"", b""
        export = None
        try:
            export = self._export(source)
            with export.at(source) as one, export.at(target) as other, acting_as(caller):
                befores = os.fstat(one), os.fstat(other)
                try:
                    export.require_writable()
                    export.rename(one, old, other, new)
                except OSError as error:
                    status = formats.status_of(error)
                before = formats.wcc(Writer(), export, befores[0], os.fstat(one)).done()
                after = formats.wcc(Writer(), export, befores[1], os.fstat(other)).done()
        except (OSError, ForeignHandle, formats.Failed) as error:
            before = after = formats.NO_WCC
            status = formats.status_of(error)
        return Writer().u32(status).raw(before).raw(after)

    def _link(self, arguments: Reader, caller: Caller) -> Writer:
        handle, target, name = (
            formats.handle(arguments),
            formats.handle(arguments),
            formats.name_of(arguments),
        )
        try:
            export = self._export(handle)
            with export.at(handle) as fd, export.at(target) as directory, acting_as(caller):
                before, status = os.fstat(directory), formats.OK
                try:
                    export.require_writable()
                    export.add_name(fd, directory, name)
                except OSError as error:
                    status = formats.status_of(error)
                writer = formats.optional(Writer().u32(status), export, os.fstat(fd))
                return formats.wcc(writer, export, before, os.fstat(directory))
        except (OSError, ForeignHandle, formats.Failed) as error:
            return Writer().u32(formats.status_of(error), 0).raw(formats.NO_WCC)

    # Of directories -------------------------------------------------------------------------------

    def _readdir(self, arguments: Reader, caller: Caller) -> Writer:
        handle, cookie = formats.handle(arguments), arguments.u64()
        arguments.fixed(8)
        room = min(arguments.u32(), LISTING)
        return self._reading(
            handle, caller, lambda export, fd: formats.listing(export, fd, cookie, room, False)
        )

    def _readdirplus(self, arguments: Reader, caller: Caller) -> Writer:
        handle, cookie = formats.handle(arguments), arguments.u64()
        arguments.fixed(8)
        arguments.u32()
        room = min(arguments.u32(), LISTING)
        return self._reading(
            handle, caller, lambda export, fd: formats.listing(export, fd, cookie, room, True)
        )

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

        return self._reading(formats.handle(arguments), caller, work)

    def _fsinfo(self, arguments: Reader, caller: Caller) -> Writer:
        def work(export: Export, fd: int) -> Writer:
            transfer = (TRANSFER, TRANSFER, 4096)
            # Links of both kinds, the same limits everywhere, and times can be set.
            return Writer().u32(*transfer, *transfer, LISTING).u64((1 << 63) - 1).u32(0, 1, 0x1B)

        return self._reading(formats.handle(arguments), caller, work)

    def _pathconf(self, arguments: Reader, caller: Caller) -> Writer:
        return self._reading(
            formats.handle(arguments),
            caller,
            lambda export, fd: Writer().u32(32000, 255, 1, 1, 0, 1),
        )

    # What all have in common ----------------------------------------------------------------------

    def _export(self, handle: bytes) -> Export:
        export = self._exports.get(handle[:ID_BYTES])
        if export is None:
            raise formats.Failed(formats.STALE)
        return export

    def _reading(
        self,
        handle: bytes,
        caller: Caller,
        work: Callable[[Export, int], Writer],
        *,
        first: bool = False,
    ) -> Writer:
        """The status, what the file is like, and the work's results; these come `first` if so."""
        try:
            export = self._export(handle)
            with export.at(handle) as fd, acting_as(caller):
                try:
                    results = work(export, fd)
                except (OSError, formats.Failed) as error:
                    return formats.optional(
                        Writer().u32(formats.status_of(error)), export, os.fstat(fd)
                    )
                seen = formats.optional(Writer(), export, os.fstat(fd)).done()
                head = Writer().u32(formats.OK)
                if first:
                    return head.raw(results.done()).raw(seen)
                return head.raw(seen).raw(results.done())
        except (OSError, ForeignHandle, formats.Failed) as error:
            return Writer().u32(formats.status_of(error), 0)

    def _changing(
        self, handle: bytes, caller: Caller, work: Callable[[Export, int], Writer]
    ) -> Writer:
        """The status, what the file was like before and after, and the work's results.

        Of what was made in a directory, the results come first.
        """
        try:
            export = self._export(handle)
            with export.at(handle) as fd, acting_as(caller):
                before = os.fstat(fd)
                try:
                    results = work(export, fd)
                except (OSError, formats.Failed) as error:
                    head = Writer().u32(formats.status_of(error))
                    return formats.wcc(head, export, before, os.fstat(fd))
                wcc = formats.wcc(Writer(), export, before, os.fstat(fd)).done()
                made = stat.S_ISDIR(before.st_mode)
                pieces = (results.done(), wcc) if made else (wcc, results.done())
                return Writer().u32(formats.OK).raw(pieces[0]).raw(pieces[1])
        except (OSError, ForeignHandle, formats.Failed) as error:
            return Writer().u32(formats.status_of(error)).raw(formats.NO_WCC)
