"""What a daemon tells: frozen, with the names and units of the HTTP API."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from ratoon.client.volumes import Volume

T = TypeVar("T")


def read(kind: type[T], answer: dict[str, Any]) -> T:
    """An answer as a dataclass; fields that it does not have are a newer daemon's."""
    return kind(**{each.name: answer[each.name] for each in fields(kind) if each.name in answer})  # type: ignore[arg-type]


# The daemon ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolInfo:
    """Machines that wait, started, to become sandboxes of a snapshot; `private_bytes` in all."""

    tag: str
    wanted: int
    ready: int
    private_bytes: int


@dataclass(frozen=True)
class Event:
    """Something that happened to `sandbox`, or to `snapshot`; a branch is of both.

    `progress`: `reason` says how far the making of `snapshot` is. `overflow`: more happened than
    could be told.
    """

    kind: str
    sandbox: str | None
    snapshot: str | None
    reason: str | None
    at_unix: float


# Sandboxes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublishedPort:
    """Port `host_port` of the loopback of the daemon's host leads to `guest_port` in the guest."""

    guest_port: int
    host_port: int


@dataclass(frozen=True)
class Limits:
    """What a sandbox may use of its host; None: no limit."""

    memory_mib: int | None = None
    cpus: float | None = None
    pids: int | None = None
    disk_mib: int | None = None


@dataclass(frozen=True)
class SandboxInfo:
    """A sandbox. `pid` is that of its machine, and None where it has none.

    `snapshot_tag`: what it was forked from; `stands_on`: its last branch, or the same.
    `idle_for_seconds`: for how long nobody has used it. `fork_ms`: how long its fork took until
    its agent had answered, `stages_ms` the stages of that. `spare`: a machine is kept started for
    its next reset.
    """

    id: str
    snapshot_tag: str
    state: Literal["running", "standby", "dead", "killed"]
    created_at_unix: int
    pid: int | None
    stands_on: str
    accelerator: Literal["tcg", "kvm"]
    network: str
    limits: Limits
    ttl_seconds: float | None
    idle_seconds: float | None
    idle_for_seconds: float
    spare: bool
    volumes: list[Volume]
    metadata: dict[str, str]
    ports: list[PublishedPort]
    has_branched: bool
    branch_count: int
    last_branch_memory_path: str | None
    fork_ms: float
    stages_ms: dict[str, float]


def sandbox_info(answer: dict[str, Any]) -> SandboxInfo:
    ports = [read(PublishedPort, each) for each in answer["ports"]]
    volumes = [read(Volume, each) for each in answer["volumes"]]
    limits = read(Limits, answer["limits"])
    return read(SandboxInfo, {**answer, "limits": limits, "ports": ports, "volumes": volumes})


# Images that were run -----------------------------------------------------------------------------


@dataclass(frozen=True)
class RunInfo:
    """How an image was run. `pid` is its command's in the guest, None if it was not started.

    `argv` is all of it, with the image's entrypoint. `tier`: what was there to fork from: 2, the
    command as it was up; 1, the image as it was booted; 0, nothing. `missed` says why no more.
    """

    argv: list[str]
    pid: int | None
    tier: Literal[0, 1, 2]
    missed: list[str]
    stages_ms: dict[str, float]


# In a sandbox -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """What a command wrote: to stdout, or to a terminal, or to stderr."""

    stream: Literal["stdout", "stderr"]
    data: bytes


@dataclass(frozen=True)
class CommandResult:
    """How a command ended.

    `exit_code` is a shell's: 124 timed out, 126 not executable, 127 not found, 128 + n killed by
    signal n. `reason` says so in words where it is not the command's own. `truncated`: it wrote
    more than is kept.
    """

    exit_code: int
    stdout_bytes: bytes = field(default=b"", repr=False)
    stderr_bytes: bytes = field(default=b"", repr=False)
    timed_out: bool = False
    reason: str | None = None
    truncated: bool = False

    @property
    def stdout(self) -> str:
        """As text; bytes that are not UTF-8 are replaced."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        return self.stderr_bytes.decode(errors="replace")


@dataclass(frozen=True)
class ProcessInfo:
    """A process that was started from outside. `started_at` is in seconds, by the guest's clock.

    `attached`: somebody listens. `exit_code` is None while it runs.
    """

    pid: int
    argv: list[str]
    user: str
    started_at: float
    background: bool
    terminal: bool
    attached: bool
    exit_code: int | None


@dataclass(frozen=True)
class EvalResult:
    """How code ended.

    `result` is the `repr` of the last statement, where that is an expression whose value is not
    None. `error` is the traceback, or what else went wrong. `exit_code`: 0, 1 for an exception, 124
    timed out. `state_lost`: the interpreter is gone with all that was in it, and the next call
    starts a new one.
    """

    result: str | None
    error: str | None
    exit_code: int
    stdout: str
    stderr: str
    timed_out: bool = False
    state_lost: bool = False
    truncated: bool = False
