"""ONC RPC (RFC 5531) as NFS over TCP uses it: records, calls, and answers.

All of it was written by a guest: a record is bounded, and what is no call closes the connection.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from blake3 import blake3

from ratoon.machine.volumes.callers import NOBODY, Caller
from ratoon.machine.volumes.xdr import Garbage, Reader, Writer

log = logging.getLogger(__name__)

#: A write's data, and room for what is around it.
MAX_RECORD = 1024 * 1024 + 4096
MAX_FRAGMENTS = 64
#: Answers that are kept for a call that is sent again because its connection was lost.
REMEMBERED = 128

_LAST_FRAGMENT = 1 << 31
_CALL, _REPLY = 0, 1
_VERSION = 2
_AUTH_NONE, _AUTH_SYS = 0, 1
#: accept_stat.
SUCCESS, PROG_UNAVAIL, PROG_MISMATCH, PROC_UNAVAIL, GARBAGE_ARGS, SYSTEM_ERR = range(6)


class Records:
    """Cuts a connection's bytes into records. Garbage: it is none."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._record = bytearray()
        self._fragments = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The records that are whole now."""
        self._buffer += data
        found = []
        while len(self._buffer) >= 4:
            mark = int.from_bytes(self._buffer[:4], "big")
            length = mark & ~_LAST_FRAGMENT
            self._fragments += 1
            if len(self._record) + length > MAX_RECORD or self._fragments > MAX_FRAGMENTS:
                raise Garbage("a record that is too long")
            if len(self._buffer) < 4 + length:
                self._fragments -= 1
                break
            self._record += memoryview(self._buffer)[4 : 4 + length]
            del self._buffer[: 4 + length]
            if mark & _LAST_FRAGMENT:
                found.append(bytes(self._record))
                self._record.clear()
                self._fragments = 0
        return found


@dataclass(frozen=True)
class Call:
    """What a program is asked to do: its procedure, for whom, and the arguments."""

    procedure: int
    caller: Caller
    arguments: Reader


class NoProcedure(Exception):
    """The program has none of that number."""


#: Answers a call with the results. Garbage: the arguments are none. NoProcedure.
Program = Callable[[Call], bytes]


class Dispatcher:
    """Answers the calls of one guest for one program."""

    def __init__(
        self, number: int, version: int, program: Program, once: frozenset[int] = frozenset()
    ) -> None:
        """`once`: procedures that must not be done again when a call is repeated."""
        self._number = number
        self._version = version
        self._program = program
        self._once = once
        self._answers: OrderedDict[bytes, bytes] = OrderedDict()

    def answer(self, record: bytes) -> bytes:
        """The record that answers one. Garbage: it is no call."""
        reader = Reader(record)
        xid = reader.u32()
        if reader.u32() != _CALL:
            raise Garbage("no call")
        if reader.u32() != _VERSION:
            return _framed(Writer().u32(xid, _REPLY, 1, 0, _VERSION, _VERSION).done())
        program, version, procedure = reader.u32(), reader.u32(), reader.u32()
        caller = _caller(reader)
        if program != self._number:
            return _accepted(xid, PROG_UNAVAIL)
        if version != self._version:
            return _accepted(xid, PROG_MISMATCH, Writer().u32(self._version, self._version).done())
        digest = blake3(record).digest()
        if procedure in self._once and (known := self._answers.get(digest)):
            return known
        try:
            results = self._program(Call(procedure, caller, reader))
        except Garbage:
            return _accepted(xid, GARBAGE_ARGS)
        except NoProcedure:
            return _accepted(xid, PROC_UNAVAIL)
        except Exception:
            log.exception("a call for procedure %d failed", procedure)
            return _accepted(xid, SYSTEM_ERR)
        reply = _accepted(xid, SUCCESS, results)
        if procedure in self._once:
            self._answers[digest] = reply
            if len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)
        return reply


def _caller(reader: Reader) -> Caller:
    """Who calls; the verifier is read as well, and says nothing."""
    flavor, body = reader.u32(), Reader(reader.opaque(400))
    caller = NOBODY
    if flavor == _AUTH_SYS:
        body.u32()
        body.opaque(255)
        uid, gid, count = body.u32(), body.u32(), body.u32()
        if count > 16:
            raise Garbage("too many groups")
        caller = Caller(uid, gid, tuple(body.u32() for _ in range(count)))
    reader.u32()
    reader.opaque(400)
    return caller


def _accepted(xid: int, status: int, results: bytes = b"") -> bytes:
    return _framed(Writer().u32(xid, _REPLY, 0, _AUTH_NONE, 0, status).raw(results).done())


def _framed(message: bytes) -> bytes:
    return (len(message) | _LAST_FRAGMENT).to_bytes(4, "big") + message
