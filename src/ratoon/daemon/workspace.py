"""Workspaces: a name for a sandbox that outlives it, as the snapshot it was last suspended to.

A record is written before what it announces, and read with that in mind: what a crash has cut short
is finished when the workspace is next used.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

from pydantic import ValidationError

from ratoon.api.http_only import WorkspaceInfo, WorkspaceStatus
from ratoon.daemon.limits import Slots
from ratoon.documents import Document
from ratoon.engine.sandbox.branch import Mode
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import AlreadyExists, Corrupt, InvalidInput, NotFound
from ratoon.store.snapshot.manifest import check_tag

#: In the metadata of a workspace's sandbox, and of no fork of that.
MARK = "ratoon.workspace"


class Record(Document):
    """What is written down of a workspace, `workspaces/NAME.json`."""

    id: str
    name: str
    source_tag: str
    created_at_unix: int
    options: SandboxOptions
    last_active_unix: int
    #: The sandbox, which may be gone; None: it is suspended.
    sandbox: str | None = None
    #: What it was last suspended to.
    state_tag: str | None = None
    #: What it is being suspended to.
    next_tag: str | None = None


class Workspaces:
    """All workspaces of a store. One daemon at a time has them."""

    def __init__(self, engine: Engine, branches: Slots) -> None:
        self._engine = engine
        self._branches = branches
        self._directory = engine.store.home / "workspaces"
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def create(self, name: str, tag: str, options: SandboxOptions) -> WorkspaceInfo:
        """A workspace with a sandbox forked from snapshot `tag`. AlreadyExists; as a fork."""
        check_tag(name)
        async with self._changing(name):
            if self._path(name).exists():
                raise AlreadyExists(f"workspace {name} exists already")
            marked = {**options.metadata, MARK: name}
            now = int(time.time())
            record = Record(
                id=f"ws-{now:x}-{secrets.token_hex(2)}",
                name=name,
                source_tag=tag,
                created_at_unix=now,
                options=options.model_copy(update={"metadata": marked}),
                last_active_unix=now,
            )
            return await self._start(record, tag)

    async def suspend(self, name: str, mode: Mode) -> WorkspaceInfo:
        """Branch its sandbox, and end it. InvalidInput: it is not running; as a branch."""
        async with self._changing(name):
            record = await self._settled(name)
            sandbox = self._live(record)
            if sandbox is None or self._status(record) != "running":
                raise InvalidInput(f"workspace {name} is {self._status(record)}, not running")
            if sandbox.state == "standby":
                await self._engine.resume(sandbox)
            tag = f"{record.id}-{int(time.time()):x}-{secrets.token_hex(2)}"
            with self._branches.take():
                record = self._write(record, next_tag=tag)
                await self._engine.branch(sandbox, tag, mode)
            info = self._info(await self._finish(record))
            return replace(info, unsynced=sandbox.unsynced)

    async def resume(self, name: str) -> WorkspaceInfo:
        """Fork what it was suspended to. InvalidInput: it is running; as a fork."""
        async with self._changing(name):
            record = await self._settled(name)
            if self._status(record) == "running":
                raise InvalidInput(f"workspace {name} is running")
            await self._end_sandboxes(name)
            return await self._start(record, record.state_tag or record.source_tag)

    async def delete(self, name: str) -> str | None:
        """Remove it, its sandbox and the snapshot it was suspended to.

        Why its volumes may lack what its guest had written, if they may.
        """
        async with self._changing(name):
            record = await self._settled(name)
            sandbox = self._live(record)
            await self._end_sandboxes(name)
            self._path(name).unlink()
            await self._forget(record.state_tag)
        return sandbox.unsynced if sandbox else None

    async def get(self, name: str) -> WorkspaceInfo:
        async with self._changing(name):
            return self._info(await self._settled(name))

    async def list(self) -> list[WorkspaceInfo]:
        """All of them, by name."""
        names = sorted(path.stem for path in self._directory.glob("*.json"))
        found = []
        for name in names:
            with suppress(NotFound):  # deleted meanwhile
                found.append(await self.get(name))
        return found

    def snapshots(self) -> Mapping[str, str]:
        """The snapshots that workspaces need, by tag, and in words which. Corrupt: a record is.

        That is what they resume from, and what they were made from.
        """
        needed = {}
        for path in sorted(self._directory.glob("*.json")):
            with suppress(NotFound):  # deleted meanwhile
                record = self._read(path.stem)
                for tag in filter(None, (record.source_tag, record.state_tag, record.next_tag)):
                    needed[tag] = f"workspace {record.name}"
        return needed

    def _changing(self, name: str) -> asyncio.Lock:
        """Held by whoever works on this one."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    async def _start(self, record: Record, tag: str) -> WorkspaceInfo:
        sandbox = await self._engine.fork_one(tag, record.options)
        try:
            return self._info(
                self._write(record, sandbox=sandbox.id, last_active_unix=int(time.time()))
            )
        except BaseException:
            await sandbox.kill()
            raise

    async def _settled(self, name: str) -> Record:
        """Its record, once what was begun is finished, or found not to have happened. NotFound."""
        record = self._read(name)
        return await self._finish(record) if record.next_tag else record

    async def _finish(self, record: Record) -> Record:
        """If the snapshot that it is suspended to is there, let go of all else."""
        assert record.next_tag
        if not (self._engine.store.snapshots / record.next_tag).exists():
            return self._write(record, next_tag=None)
        if sandbox := self._live(record):
            await sandbox.kill()
        before = record.state_tag
        record = self._write(
            record,
            sandbox=None,
            state_tag=record.next_tag,
            next_tag=None,
            last_active_unix=int(time.time()),
        )
        await self._forget(before)
        return record

    async def _end_sandboxes(self, name: str) -> None:
        """Kill its sandbox, a dead one too, and what a resume that was cut short has left."""
        for sandbox in self._engine.sandboxes:
            if sandbox.options.metadata.get(MARK) == name:
                await sandbox.kill()

    async def _forget(self, tag: str | None) -> None:
        if tag:
            with suppress(NotFound):
                await self._engine.delete(tag, force=True)

    def _live(self, record: Record) -> Sandbox | None:
        if record.sandbox is None:
            return None
        try:
            return self._engine.get(record.sandbox)
        except NotFound:
            return None

    def _status(self, record: Record) -> WorkspaceStatus:
        sandbox = self._live(record)
        if sandbox and sandbox.state in ("running", "standby"):
            return "running"
        return "suspended" if record.sandbox is None else "stale"

    def _info(self, record: Record) -> WorkspaceInfo:
        sandbox = self._live(record)
        idle = sandbox.idle_seconds if sandbox else time.time() - record.last_active_unix
        return WorkspaceInfo(
            id=record.id,
            name=record.name,
            source_snapshot_tag=record.source_tag,
            current_state_tag=record.state_tag,
            status=self._status(record),
            live_sandbox_id=sandbox.id if sandbox else None,
            created_at_unix=record.created_at_unix,
            last_active_unix=int(time.time() - idle),
        )

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _read(self, name: str) -> Record:
        try:
            check_tag(name)
            return Record.load(self._path(name))
        except (InvalidInput, FileNotFoundError):
            raise NotFound(f"no workspace {name!r}") from None
        except ValidationError:
            raise Corrupt(f"workspace {name}: {self._path(name)} makes no sense") from None

    def _write(self, record: Record, **changes: object) -> Record:
        record = record.model_copy(update=changes)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        record.save(self._path(record.name))
        return record
