"""What a guest's kernel says to the server of its volumes, by hand; no virtual machine."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ratoon.machine.volumes.callers import Caller, prepare_thread
from ratoon.machine.volumes.export import Export
from ratoon.machine.volumes.nfs import ONCE, PROGRAM, VERSION, Nfs
from ratoon.machine.volumes.rpc import Dispatcher, Records
from ratoon.machine.volumes.xdr import Reader, Writer

KEY = b"k" * 32
PROCEDURES = (
    *("null", "getattr", "setattr", "lookup", "access", "readlink", "read", "write", "create"),
    *("mkdir", "symlink", "mknod", "remove", "rmdir", "rename", "link", "readdir"),
    *("readdirplus", "fsstat", "fsinfo", "pathconf", "commit"),
)
OK, PERM, NOENT, ACCES, EXIST, ROFS, STALE, BADHANDLE = 0, 1, 2, 13, 17, 30, 70, 10001
#: No attribute is to be set.
NOTHING = bytes(24)
#: A thread as the server's, which takes on the rights of callers.
_SERVER = ThreadPoolExecutor(1, "volumes", prepare_thread)


class Guest:
    """Calls procedures as root, or as whoever it is told to be."""

    def __init__(self, *exports: Export) -> None:
        self.exports = exports
        self.dispatcher = Dispatcher(
            PROGRAM, VERSION, Nfs({export.id: export for export in exports}), ONCE
        )
        self.caller = Caller(0, 0)
        self.xid = 0

    def answer(self, record: bytes) -> bytes:
        return _SERVER.submit(self.dispatcher.answer, record).result()

    def record(self, procedure: str, arguments: bytes) -> bytes:
        """A call, as a record without its mark."""
        self.xid += 1
        groups = self.caller.groups
        who = self.caller.uid, self.caller.gid, len(groups), *groups
        credentials = Writer().u32(0).opaque(b"guest").u32(*who).done()
        return (
            Writer()
            .u32(self.xid, 0, 2, PROGRAM, VERSION, PROCEDURES.index(procedure))
            .u32(1)
            .opaque(credentials)
            .u32(0, 0)
            .raw(arguments)
            .done()
        )

    def call(self, procedure: str, arguments: Writer) -> tuple[int, Reader]:
        """The status of the answer, and what comes after it."""
        return answered(self.answer(self.record(procedure, arguments.done())))

    def status(self, procedure: str, arguments: Writer) -> int:
        return self.call(procedure, arguments)[0]

    def lookup(self, directory: bytes, name: bytes) -> bytes:
        status, results = self.call("lookup", Writer().opaque(directory).opaque(name))
        assert status == OK
        return bytes(results.opaque(64))

    def read(self, handle: bytes, offset: int = 0, count: int = 4096) -> bytes:
        status, results = self.call("read", Writer().opaque(handle).u64(offset).u32(count))
        assert status == OK
        results.fixed(4 + 84 + 8)
        return bytes(results.opaque(1 << 20))

    def write(self, handle: bytes, data: bytes, offset: int = 0, stable: int = 2) -> int:
        arguments = Writer().opaque(handle).u64(offset).u32(len(data), stable).opaque(data)
        return self.status("write", arguments)

    def names(self, directory: bytes, room: int = 4096) -> list[bytes]:
        """All names in a directory, as many calls as it takes."""
        found, cookie, last = [], 0, False
        while not last:
            arguments = Writer().opaque(directory).u64(cookie).raw(bytes(8)).u32(room)
            status, results = self.call("readdir", arguments)
            assert status == OK
            results.fixed(4 + 84 + 8)
            while results.boolean():
                results.u64()
                found.append(bytes(results.opaque(255)))
                cookie = results.u64()
            last = results.boolean()
        return found


def answered(reply: bytes) -> tuple[int, Reader]:
    (record,) = Records().feed(reply)
    reader = Reader(record)
    reader.u32()
    assert (reader.u32(), reader.u32()) == (1, 0)
    reader.fixed(8)
    assert reader.u32() == 0, "the call was not understood"
    return reader.u32(), reader


def tree(directory: Path) -> dict[str, object]:
    """All that is below a directory, and what it is."""
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        content: object = None
        if stat.S_ISLNK(mode):
            content = path.readlink()
        elif stat.S_ISREG(mode):
            content = path.read_bytes()
        found[str(path.relative_to(directory))] = mode, path.lstat().st_uid, content
    return found
