"""A sandbox: a running machine forked from a snapshot, its channel, and its directory."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ratoon import files
from ratoon.errors import Conflict
from ratoon.guest.channel import Channel, ExecResult
from ratoon.sandbox.deaths import blamed
from ratoon.sandbox.heads import MappedMemory
from ratoon.snapshot.snapshot import Snapshot, link_snapshot
from ratoon.vmm.driver import Machine

#: Seconds the agent may take for a rebirth; a loaded host under emulation is slow.
REBIRTH_TIMEOUT = 60.0

STATE = "state.json"
LOG = "log"
PARENT = "parent"


class SandboxDirectory:
    """`sandboxes/ID`: made for one sandbox, held by its flock, removed with it.

    It has hard links to every layer that the sandbox stands on, so the snapshot it was forked from
    may be deleted at any time.
    """

    def __init__(self, path: Path, lock: int, runtime: Path) -> None:
        self.path = path
        self.runtime = runtime / path.name
        self._lock = lock
        self._overlays = 0

    @classmethod
    def create(cls, sandboxes: Path, store_lock: Path, runtime: Path) -> SandboxDirectory:
        """Draw an id, reserve it by `mkdir`, and hold the directory."""
        with files.locked(store_lock, shared=True):
            while True:
                path = sandboxes / f"sb-{int(time.time()):x}-{secrets.token_hex(2)}"
                with suppress(FileExistsError):
                    path.mkdir(mode=0o700)
                    break
            lock = files.try_lock_directory(path)
            assert lock is not None, "a sweep would need the store's lock"
        return cls(path, lock, runtime)

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def log(self) -> Path:
        return self.path / LOG

    def next_overlay(self) -> Path:
        """A name for the next overlay. The first is disk.qcow2; a frozen one keeps its name."""
        number = f"-{self._overlays}" if self._overlays else ""
        self._overlays += 1
        return self.path / f"disk{number}.qcow2"

    def stand_on(self, snapshot: Snapshot) -> Snapshot:
        """Hard-link all of `snapshot`, in place of what the sandbox stood on before."""
        new = self.path / f"{PARENT}.new"
        shutil.rmtree(new, ignore_errors=True)
        link_snapshot(snapshot, new)
        shutil.rmtree(self.path / PARENT, ignore_errors=True)
        new.rename(self.path / PARENT)
        return Snapshot(self.path / PARENT, snapshot.manifest)

    def write_state(self, **state: Any) -> None:
        """Record what whoever finds this directory must know; read by `sweep`."""
        (self.path / STATE).write_text(json.dumps(state, indent=2) + "\n")

    def remove(self) -> None:
        """Delete the directory and the machine's sockets, and let it go."""
        shutil.rmtree(self.runtime, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


class Sandbox:
    """A running sandbox. Comes from `Engine.fork`; leaving its `async with` block kills it.

    Every method raises MachineDied, with the end of the machine's log, once its process is gone.
    """

    def __init__(
        self,
        directory: SandboxDirectory,
        machine: Machine,
        channel: Channel,
        memory: MappedMemory,
        parent: Snapshot | None,
    ) -> None:
        self._directory = directory
        self.machine = machine
        self.channel = channel
        self.memory = memory
        #: What the sandbox stands on: the snapshot it was forked from, or its last branch.
        self.parent = parent
        #: The stages of the fork, in milliseconds, and all of it until the agent had answered.
        self.stages: dict[str, float] = {}
        self.fork_ms = 0.0
        self.created_at_unix = time.time()
        self.overlay = directory.path / "disk.qcow2"
        #: The overlay below it that is in no layer yet, between a branch's switch and its end.
        self.frozen: Path | None = None
        #: Held by whoever changes what the sandbox stands on.
        self.changing = asyncio.Lock()
        #: Called once it has been killed.
        self.on_killed: Callable[[Sandbox], None] = lambda sandbox: None
        self._killed = False

    @property
    def id(self) -> str:
        return self._directory.id

    @property
    def pid(self) -> int:
        return self.machine.pid

    @property
    def directory(self) -> SandboxDirectory:
        return self._directory

    @property
    def snapshot_tag(self) -> str | None:
        return self.parent.manifest.tag if self.parent else None

    async def exec(
        self,
        argv: list[str],
        *,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
        stdin: bytes = b"",
        timeout: float | None = None,
    ) -> ExecResult:
        """Run `argv` in the sandbox and wait for it; see `ExecResult` for how it may end.

        `timeout` is in seconds; a command that takes longer is killed with its process group.
        """
        async with self.explained():
            return await self.channel.exec(argv, env=env, cwd=cwd, stdin=stdin, timeout=timeout)

    async def rebirth(self) -> None:
        """Begin a fresh session with the agent and make the guest an individual of its own.

        It gets entropy, the time, and names; only then do the sandbox's processes run.
        """
        async with self.explained():
            self.channel.begin()
            await self.channel.rebirth(self.id, timeout=REBIRTH_TIMEOUT)

    @asynccontextmanager
    async def explained(self) -> AsyncIterator[None]:
        """Where the agent cannot be reached because the machine died, say that."""
        if self._killed:
            raise Conflict(f"sandbox {self.id} was killed")
        async with blamed(self.machine, f"sandbox {self.id} died (process {self.pid})"):
            yield

    async def kill(self) -> None:
        """End the sandbox and remove all it had; safe to repeat."""
        if self._killed:
            return
        self._killed = True
        self.channel.close()
        await self.machine.kill()
        async with self.changing:  # a branch that has begun publishes, or fails, at once
            self._directory.remove()
        self.on_killed(self)

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.kill()
