"""How an answer is read, and what there is to be told of sandboxes and what runs in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")

#: In the metadata of a field: what makes its value of what is in the JSON.
READ = "ratoon.read"


def read(kind: type[T], answer: Any) -> T:
    """What was answered, as a `kind`: a dataclass, or a list or dict of them.

    Fields that it does not have are a newer daemon's. Those that are not there have their defaults.
    """
    return cast("T", _read(kind, answer))


def _read(kind: Any, answer: Any) -> Any:
    if isinstance(kind, type) and is_dataclass(kind):
        readers = _readers(kind)
        return kind(**{name: of(answer[name]) for name, of in readers.items() if name in answer})
    of, arguments = get_origin(kind), get_args(kind)
    if of is list and isinstance(answer, list):
        return [_read(arguments[0], each) for each in answer]
    if of is dict and isinstance(answer, dict):
        return {name: _read(arguments[1], each) for name, each in answer.items()}
    if of in (Union, UnionType) and answer is not None:
        return _read(arguments[0], answer)
    return answer


@cache
def _readers(kind: Any) -> dict[str, Callable[[Any], Any]]:
    """What reads each field."""
    types = get_type_hints(kind)
    return {
        each.name: each.metadata.get(READ) or partial(_read, types[each.name])
        for each in fields(kind)
    }


# The daemon ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoolInfo:
    """Machines that wait, started, to become sandboxes of a snapshot; `private_bytes` in all."""

    tag: str
    wanted: int
    ready: int
    private_bytes: int


@dataclass(frozen=True)
class VolumeInfo:
    """`bytes` is what its files take on the disk, `path` where they are on the daemon's host."""

    name: str
    path: str
    bytes: int
    created_at_unix: float


EventKind = Literal[
    "created",
    "killed",
    "died",
    "unsynced",
    "standby",
    "resumed",
    "reset",
    "exited",
    "branched",
    "snapshot_ready",
    "snapshot_failed",
    "snapshot_deleted",
    "progress",
    "overflow",
]


@dataclass(frozen=True)
class Event:
    """Something that happened to `sandbox`, or to `snapshot`; a branch is of both.

    exited: its command has ended, with `exit_code`, and `reason` says why if it was not its own.
    unsynced: what its guest had written may not be in its volumes, and `reason` says why.
    progress: `reason` says how far the making of `snapshot` is. overflow: more happened than could
    be told, as the listener did not look.
    """

    kind: EventKind
    sandbox: str | None
    snapshot: str | None
    reason: str | None
    at_unix: float
    exit_code: int | None = None


# Sandboxes ----------------------------------------------------------------------------------------


#: Where ports are published, unless another address is asked for.
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class PublishedPort:
    """A port of the daemon's host that leads to one in the guest.

    `address` is the host's. With 127.0.0.1 it is ::1 as well, where that has the port to give.
    """

    guest_port: int
    host_port: int
    address: str = LOOPBACK


@dataclass(frozen=True)
class Limits:
    """What a sandbox may use of its host; null: no limit."""

    memory_mib: int | None = None
    cpus: float | None = None
    pids: int | None = None
    disk_mib: int | None = None


@dataclass(frozen=True)
class Volume:
    """A directory of the daemon's host, or a named volume, that is mounted at `target`."""

    source: str
    target: str
    read_only: bool = False


#: What keeps a sandbox from going to standby, besides calls: any command that runs; what the guest
#: itself uses of the processor and the network; nothing.
IdleCounts = Literal["commands", "activity", "calls"]
#: `outdated`: it runs or stands by with a QEMU that this Ratoon does not speak to.
ListedState = Literal["running", "standby", "dead", "outdated"]


@dataclass(frozen=True)
class CommandEnd:
    """How a command ended: `exit_code` is a shell's, 128 + n if it was killed by signal n.

    `reason` is there where that was not its own doing.
    """

    exit_code: int
    reason: str | None = None


@dataclass(frozen=True)
class MainCommand:
    """The command that a sandbox was made for; `ended` is null while it runs."""

    pid: int
    ended: CommandEnd | None = None


@dataclass(frozen=True)
class Stopped:
    """How a sandbox was stopped. `ended`: its command, by itself; null: it had to be killed.

    It is null as well where none ran. `unsynced`: why its volumes may lack what was written.
    """

    ended: CommandEnd | None
    unsynced: str | None = None


@dataclass(frozen=True)
class SandboxInfo:
    """A sandbox. `pid` is that of its machine, and null where it has none.

    `status` is for people: its `state`, and how its command ended. `command`: what it was made for,
    if that was said; with `auto_remove` the sandbox ends when that does, and `stop_signal` is what
    asks it to end.
    `snapshot_tag`: what it was forked from; `stands_on`: its last branch, or the same.
    `idle_for_seconds`: for how long it was not in use, as `idle_counts` has it; `wakes`: it is in
    standby for that, until it is used. `stages_ms` are those of its fork, `fork_ms` is all of it
    until its agent had answered; a daemon that took it over knows neither.
    `spare`: a machine is kept started for its next reset. `layers`: which of what confines its
    process hold, as read off it; null where several sandboxes are answered, or it has none.
    """

    id: str
    snapshot_tag: str
    state: Literal[ListedState, "killed"]
    status: str
    command: MainCommand | None
    created_at_unix: int
    pid: int | None
    stands_on: str
    accelerator: Literal["tcg", "kvm"]
    cpu: str
    network: str
    limits: Limits
    ttl_seconds: float | None
    idle_seconds: float | None
    idle_counts: IdleCounts
    idle_for_seconds: float
    wakes: bool
    spare: bool
    auto_remove: bool
    stop_signal: str
    volumes: list[Volume]
    metadata: dict[str, str]
    ports: list[PublishedPort]
    has_branched: bool
    branch_count: int
    last_branch_memory_path: str | None
    fork_ms: float
    stages_ms: dict[str, float]
    layers: dict[str, bool] | None


@dataclass(frozen=True)
class Changed:
    """A sandbox after a change, and how long the stages of that took, in milliseconds.

    `unsynced`: why its volumes may lack what its guest had written before; null: they do not.
    """

    sandbox: SandboxInfo
    stages_ms: dict[str, float]
    unsynced: str | None = None


@dataclass(frozen=True)
class RunInfo:
    """How an image was run. `pid` is its command's in the guest, null if it was not started.

    `argv` is all of it, with the image's entrypoint. `tier`: what was there to fork from: 2, the
    command as it was up; 1, the image as it was booted; 0, nothing. `missed` says why no more.
    `stages_ms`: how long each stage took.
    """

    argv: list[str]
    pid: int | None
    tier: Literal[0, 1, 2]
    missed: list[str]
    stages_ms: dict[str, float]


# In a sandbox -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessInfo:
    """A process that was started from outside. `started_at` is in seconds, by the guest's clock.

    `attached`: somebody listens. `exit_code` is null while it runs.
    """

    pid: int
    #: The beginning of its command line.
    argv: list[str]
    #: As it was asked for.
    user: str
    started_at: float
    #: It goes on when whoever listens leaves.
    background: bool
    terminal: bool
    attached: bool
    exit_code: int | None


@dataclass(frozen=True)
class EvalResult:
    """How code ended.

    `result` is the `repr` of the last statement, where that is an expression whose value is not
    None; `error` the traceback, or what else went wrong. `exit_code`: 0, 1 for an exception, 124
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
