"""A sandbox: forked from a snapshot, running or in standby, and what can be done in it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ratoon.api.answers import (
    LOOPBACK,
    CommandEnd,
    EventKind,
    ListedState,
    MainCommand,
    PublishedPort,
)
from ratoon.api.defaults import STOP_SECONDS
from ratoon.concurrency import in_thread, uncancelled
from ratoon.engine.sandbox.deaths import sandbox_death_as_error
from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.events import Events
from ratoon.engine.sandbox.incarnation import Incarnation
from ratoon.engine.sandbox.memory_images import MappedMemory
from ratoon.engine.sandbox.mounts import Mounts
from ratoon.engine.sandbox.options import STOP_SIGNAL, SandboxOptions, signal_number
from ratoon.engine.sandbox.record import Record, forget_record, record_of, write_record
from ratoon.engine.sandbox.spare import Spare
from ratoon.engine.sandbox.stages import Stages
from ratoon.engine.sandbox.start import PreparedMachine
from ratoon.engine.sandbox.sweep import kill_strays
from ratoon.errors import Conflict, GuestError, Incompatible, MachineDied, RatoonError
from ratoon.machine.guest import commands
from ratoon.machine.guest.channel import Channel, GuestStream
from ratoon.machine.guest.commands import ExecResult
from ratoon.machine.guest.evaluation import EvalResult, Listener, evaluate
from ratoon.machine.guest.files import GuestFiles
from ratoon.machine.network.policy import NONE, NetworkPolicy
from ratoon.machine.network.ports import HeldPort, Ports
from ratoon.machine.vmm.driver import Machine
from ratoon.store.snapshot.snapshot import Snapshot

log = logging.getLogger(__name__)

State = Literal[ListedState, "killed"]


@dataclass(frozen=True)
class Owner:
    """What a sandbox has of whoever looks after it."""

    #: Where it is told what happens to it.
    events: Events
    #: Resumes it, where it wakes when it is used.
    wake: Callable[[Sandbox], Awaitable[object]]
    #: Called once it has been killed.
    on_killed: Callable[[Sandbox], Awaitable[object]]
    #: Starts a machine of it on a snapshot, as a spare.
    prepare: Callable[[Sandbox, Snapshot], Coroutine[Any, Any, PreparedMachine]]


class Sandbox:
    """Comes from `Engine.fork`; leaving its `async with` block kills it.

    Whatever reaches into the guest raises MachineDied, with the end of the machine's log, once its
    process is gone, and Conflict while it is in standby, unless it wakes when it is used.
    """

    def __init__(
        self,
        directory: SandboxDirectory,
        incarnation: Incarnation | None,
        record: Record,
        owner: Owner,
        *,
        parent: Snapshot,
        origin: Snapshot | None,
        mounts: Mounts,
        stages: Stages | None = None,
        lost: RatoonError | None = None,
        kept: bool = False,
    ) -> None:
        self._directory = directory
        self._incarnation = incarnation
        #: What is written down of it; its run, its ports and whether it wakes are added then.
        self.record = record
        self._owner = owner
        #: What the sandbox stands on: the snapshot it was forked from, its last branch, or itself
        #: as it was when it last went to standby; and what a reset goes back to: see `standing`.
        self.parent, self.origin = parent, origin
        #: Its volumes, which it holds until its end.
        self.mounts = mounts
        #: The stages of the fork, in milliseconds, and all of it until the agent had answered.
        self.stages = dict(stages.ms) if stages else {}
        self.fork_ms = stages.total_ms if stages else 0.0
        #: Why it is of no use, as was found out by whoever took it over: MachineDied, or
        #: Incompatible, where its QEMU is too old; it is left as it is then, until it is killed.
        self.lost = lost
        #: Whether it is written down, so that it can be taken over by another process.
        self.kept = kept
        #: Held by whoever changes what the sandbox stands on.
        self.changing = asyncio.Lock()
        #: It is in standby, or on the way there, for as long as nobody uses it.
        self.wakes = record.wakes
        #: Why its volumes may lack what its guest had written when it last lost its machine.
        self.unsynced: str | None = None
        #: A machine that is being started, or waits, for its next reset.
        self.spare = Spare(self.id)
        #: Its files, as its processes see them.
        self.files = GuestFiles(self)
        #: Its ports that are published on the host.
        self._ports = Ports(self.dial)
        self._ending: asyncio.Task[None] | None = None
        #: Its command is asked to end, and what that leaves behind; the sandbox ends then.
        self.stopping = False
        self._listen(before=record.command)
        self._users = 0
        self._last_used = time.monotonic()
        for port in () if lost else record.ports:
            try:
                self._ports.publish(port.guest_port, port.host_port, port.address)
            except RatoonError as error:  # somebody else has it by now
                log.warning("sandbox %s: %s", self.id, error)

    @property
    def id(self) -> str:
        return self._directory.id

    @property
    def directory(self) -> SandboxDirectory:
        return self._directory

    @property
    def machine_id(self) -> str:
        """The guest's: the same for as long as the sandbox lives."""
        return self.record.machine_id

    @property
    def options(self) -> SandboxOptions:
        return self.record.options

    @options.setter
    def options(self, options: SandboxOptions) -> None:
        self.record = self.record.model_copy(update={"options": options})

    @property
    def events(self) -> Events:
        """Where it is told what happens to it."""
        return self._owner.events

    @property
    def snapshot_tag(self) -> str:
        """The published snapshot that it stands on: its last branch, or what it was forked from."""
        return self.parent.manifest.reference.tag

    @property
    def standing(self) -> tuple[Snapshot, ...]:
        """What it stands on, and what a reset goes back to."""
        return (self.parent, *([self.origin] if self.origin else ()))

    @property
    def network(self) -> NetworkPolicy:
        """What its guest may reach."""
        return self.options.network or NONE

    @property
    def state(self) -> State:
        if self._ending:
            return "killed"
        if isinstance(self.lost, Incompatible):
            return "outdated"
        if self.lost or (self._incarnation and self._incarnation.machine.has_died):
            return "dead"
        return "running" if self._incarnation else "standby"

    @property
    def command(self) -> MainCommand | None:
        """The command that it was made for, as was last heard of it."""
        return self._incarnation.channel.command if self._incarnation else self.record.command

    @property
    def has_ended(self) -> bool:
        """Whether that command has."""
        return self.command is not None and self.command.ended is not None

    @property
    def stop_signal(self) -> str:
        """What asks that command to end."""
        wanted = self.options.stop_signal or self.parent.manifest.guest.config.stop_signal
        try:
            signal_number(wanted or STOP_SIGNAL)
        except ValueError:  # its image's is none: Docker takes the usual one then, too
            return STOP_SIGNAL
        return wanted or STOP_SIGNAL

    # The machine, while there is one --------------------------------------------------------------

    @property
    def incarnation(self) -> Incarnation:
        """Its present run. Conflict: it is in standby, or killed; `lost`, if it is."""
        if self._ending:
            raise Conflict(f"sandbox {self.id} was killed")
        if self.lost:
            raise self.lost
        if self._incarnation is None:
            raise Conflict(f"sandbox {self.id} is in standby; resume it first")
        return self._incarnation

    @property
    def machine(self) -> Machine:
        return self.incarnation.machine

    @property
    def channel(self) -> Channel:
        return self.incarnation.channel

    @property
    def memory(self) -> MappedMemory:
        return self.incarnation.memory

    @property
    def pid(self) -> int:
        return self.machine.pid

    def become(self, incarnation: Incarnation | None) -> Incarnation | None:
        """Go on as `incarnation`, or in standby; the one before, to be ended.

        OSError: that cannot be written down, as it must be beforehand; nothing has changed.
        """
        command = self.command
        if self.kept:
            self._write_down(incarnation)
        before, self._incarnation = self._incarnation, incarnation
        if before:
            before.channel.on_command = None
        self.record = self.record.model_copy(update={"command": command})
        self._listen(before=command)
        self.unsynced = None
        self.wakes = self.wakes and incarnation is None
        self._last_used = time.monotonic()
        what: EventKind = "standby" if incarnation is None else "reset" if before else "resumed"
        self.events.tell(what, sandbox=self.id, reason="it idled" if self.wakes else None)
        return before

    def stock_spare(self) -> None:
        """Have a machine started for its next reset, if it is to have one and has none."""
        if self.options.spare and self.state == "running" and self.origin:
            self.spare.stock(partial(self._owner.prepare, self, self.origin))

    async def retire(self, run: Incarnation, *, now: bool = False) -> None:
        """End a machine of it; where its volumes could not be synced before, that is told."""
        self._tell_unsynced(await run.end(now=now))

    def _tell_unsynced(self, problem: str | None) -> None:
        self.unsynced = problem
        if self.unsynced:
            log.warning("sandbox %s: its volumes may lack data: %s", self.id, self.unsynced)
            self.events.tell("unsynced", sandbox=self.id, reason=self.unsynced)

    def note_branch(self, memory: Path) -> None:
        """Another snapshot was made of it, whose memory is at `memory`."""
        done = {"branch_count": self.record.branch_count + 1, "last_branch_memory": memory}
        self.record = self.record.model_copy(update=done)
        self.persist()

    def keep(self) -> None:
        """Have it outlive this process. OSError: that cannot be written down."""
        self._write_down(self._incarnation)
        self.kept = True

    def persist(self) -> None:
        """Write down what has changed, if it is to outlive this process."""
        if self.kept:
            try:
                self._write_down(self._incarnation)
            except OSError as error:  # whoever takes it over finds out what matters
                log.warning("sandbox %s was not written down: %s", self.id, error)

    def _write_down(self, run: Incarnation | None) -> None:
        with suppress(ProcessLookupError):  # it is dead: the record before says enough
            now = {
                "run": record_of(run, self.parent, self._directory.path) if run else None,
                "wakes": self.wakes and run is None,
                "command": self.command,
                "ports": self.ports,
            }
            write_record(self._directory.path, self.record.model_copy(update=now))

    def _listen(self, *, before: MainCommand | None) -> None:
        """Hear how its command is; what was known `before` is no news."""
        if self._incarnation:
            channel = self._incarnation.channel
            channel.on_command = self._hear
            if channel.command not in (None, before):
                self._hear(channel.command)

    def _hear(self, command: MainCommand) -> None:
        if (end := command.ended) is not None:
            self.events.tell("exited", sandbox=self.id, reason=end.reason, exit_code=end.exit_code)

    # Use ------------------------------------------------------------------------------------------

    @property
    def idle_seconds(self) -> float:
        """For how long it was not used, as far as is known; 0 while somebody does."""
        return 0.0 if self._users else time.monotonic() - self._last_used

    @property
    def is_idle(self) -> bool:
        """Whether it runs though nobody has used it for as long as its options say."""
        limit = self.options.idle_seconds
        return limit is not None and self.idle_seconds >= limit and self.state == "running"

    async def look(self) -> None:
        """See whether it is in use though nobody calls it, where its options have that count."""
        within, counts = self.options.idle_seconds, self.options.idle_counts
        if within is None or counts == "calls" or self._users or self.state != "running":
            return
        activity = self.incarnation.activity
        if counts == "commands":
            used = await activity.runs_commands(within)
        else:
            used = await activity.uses_something(within, online=self.network != NONE)
        if used:
            self._last_used = time.monotonic()

    @contextmanager
    def using(self) -> Iterator[None]:
        """It is not idle in the block; nor is it woken."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._last_used = time.monotonic()

    @asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """It is not idle in the block, and was woken before, if it wakes."""
        with self.using():
            if self.wakes:
                await self._owner.wake(self)
            yield

    @asynccontextmanager
    async def in_use(self) -> AsyncIterator[Channel]:
        """The channel to its agent; while it is used the sandbox is not idle.

        Where the agent cannot be reached because the machine is gone, or the guest stands still,
        the error says that.
        """
        async with self.awake():
            incarnation = self.incarnation
            try:
                async with sandbox_death_as_error(self.id, incarnation.machine):
                    yield incarnation.channel
            except (GuestError, MachineDied) as error:
                became = self._what_became_of(incarnation)
                if became is None or (isinstance(error, GuestError) and error.kind):
                    raise
                raise Conflict(f"sandbox {self.id} {became} while it was being used") from None

    def _what_became_of(self, incarnation: Incarnation) -> str | None:
        """Why it cannot be reached any more, if somebody has wished so."""
        if self._ending:
            return None if incarnation.machine.cause_of_death else "was killed"
        if self._incarnation is incarnation:
            return None
        return "was reset" if self._incarnation else "went to standby"

    async def request(self, op: str, *, timeout: float, **fields: Any) -> dict[str, Any]:
        """See `guest.channel.Agent`; a sandbox is one."""
        async with self.in_use() as channel:
            return await channel.request(op, timeout=timeout, **fields)

    @asynccontextmanager
    async def open(self, op: str, **fields: Any) -> AsyncIterator[GuestStream]:
        """See `guest.channel.Agent`; a sandbox is one."""
        async with self.in_use() as channel, channel.open(op, **fields) as stream:
            yield stream

    async def exec(
        self,
        argv: list[str],
        *,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: bytes = b"",
        timeout: float | None = None,
    ) -> ExecResult:
        """Run `argv` in the sandbox and wait for it; see `ExecResult` for how it may end.

        `timeout` is in seconds; a command that takes longer is killed with its process group.
        Commands that are watched as they run, lists of processes and the like: `guest.commands`,
        to which a sandbox is an agent.
        """
        return await commands.exec(
            self,
            argv,
            env=env,
            cwd=cwd,
            user=user,
            stdin=stdin,
            timeout=timeout,
        )

    async def eval(
        self,
        code: str,
        *,
        timeout: float | None = None,
        on_stdout: Listener | None = None,
        on_stderr: Listener | None = None,
    ) -> EvalResult:
        """Run Python `code` in the sandbox's interpreter, which keeps its state; see `evaluate`."""
        return await evaluate(self, code, timeout=timeout, on_stdout=on_stdout, on_stderr=on_stderr)

    def dial(self, port: int) -> AbstractAsyncContextManager[GuestStream]:
        """A TCP connection to `port` of the guest's own loopback; nothing is published."""
        return commands.dial(self, port)

    @property
    def ports(self) -> tuple[PublishedPort, ...]:
        """Its ports that are published on the host."""
        return self._ports.published

    def publish(
        self, guest_port: int | HeldPort, host_port: int = 0, address: str = LOOPBACK
    ) -> PublishedPort:
        """Have a port of the host lead to one in the guest; see `Ports.publish`."""
        port = self._ports.publish(guest_port, host_port, address)
        self.persist()
        return port

    async def unpublish(self, port: PublishedPort) -> None:
        """Close a published port and its connections. NotFound."""
        await self._ports.unpublish(port)
        self.persist()

    # The end --------------------------------------------------------------------------------------

    async def wait(self, seconds: float | None = None) -> MainCommand:
        """Its command, once that has ended; the sandbox is not used by that.

        After `seconds`, and if this engine ends, it is as it is then. 137: it was killed with the
        sandbox. Conflict: it has none. MachineDied.
        """
        now = asyncio.get_running_loop().time
        deadline = None if seconds is None else now() + seconds
        with self.events.listen() as listener:
            while True:
                command = self.command
                if command is None:
                    raise Conflict(
                        f"sandbox {self.id} has no command that it was made for: `ratoon run` "
                        "starts one, and a reset may lead to where there was none"
                    )
                if command.ended:
                    return command
                if self._ending:
                    return replace(command, ended=CommandEnd(137, f"sandbox {self.id} was killed"))
                if self.state in ("dead", "outdated"):
                    await self.request("hello", timeout=commands.TIMEOUT)  # which raises why
                try:
                    async with asyncio.timeout_at(deadline):
                        if await listener.next() is None:
                            return command
                except TimeoutError:
                    return command

    async def stop(self, seconds: float = STOP_SECONDS) -> CommandEnd | None:
        """End the sandbox as `kill` does, after its command, which is asked by its stop signal.

        It has so many seconds for that, with what it leaves behind. How it ended; None: it was
        killed with the sandbox, or there was none. In standby a sandbox is killed as it is, unless
        it wakes when it is used.
        """
        if self.command and seconds and (self.state == "running" or self.wakes):
            self.stopping = True
            try:
                async with self.awake():  # if that fails, it is left as it is
                    await self._ask_to_end(seconds)
            finally:
                self.stopping = False
        ended = self.command.ended if self.command else None
        await self.kill()
        return ended

    async def _ask_to_end(self, seconds: float) -> None:
        wish = {"signal": signal_number(self.stop_signal), "seconds": seconds}
        try:
            await self.request("stop", timeout=seconds + commands.TIMEOUT, **wish)
        except RatoonError as error:  # it ends in any case
            log.warning("sandbox %s was not stopped, but killed: %s", self.id, error)

    async def kill(self, *, now: bool = False) -> None:
        """End the sandbox and remove all it had; safe to repeat.

        Its volumes are synced before, unless `now`; `unsynced` says what went wrong with that.
        Once begun it is not interrupted: a cancellation takes effect at its end.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(now=now))
        await uncancelled(self._ending)

    async def _end(self, *, now: bool) -> None:
        self.kept = False
        forget_record(self._directory.path)  # whoever comes upon the rest removes it
        await self._ports.close()
        if ended := self._incarnation:
            await self.retire(ended, now=now)
        async with self.changing:  # a branch that has begun publishes, or fails, at once
            if self._incarnation and self._incarnation is not ended:  # of a reset, or a resume
                await self.retire(self._incarnation, now=now)
            await self.spare.drop()
            if self.lost:
                await in_thread(kill_strays, self._directory.path)
            await self._directory.delete()
        self.mounts.let_go()
        await self._owner.on_killed(self)
        self.events.tell("killed", sandbox=self.id)

    async def let_go(self) -> None:
        """Leave it as it is, for another process to take over; this one does no more with it."""
        async with self.changing:
            await self._ports.close()
            await self.spare.drop()
            if self._incarnation:
                self._tell_unsynced(await self._incarnation.sync())
                await self._incarnation.let_go()
            self.mounts.let_go()
            self._directory.let_go()

    async def __aenter__(self) -> Sandbox:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()
