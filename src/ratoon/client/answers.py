"""What a daemon tells: frozen, with the names and units of the HTTP API."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from ratoon.client.volumes import Volume

T = TypeVar("T")


def read(kind: type[T], answer: dict[str, Any]) -> T:
    """An answer as a dataclass; fields that it does not have are a newer daemon's."""
    return kind(**{each.name: answer[each.name] for each in fields(kind) if each.name in answer})  # type: ignore[arg-type]


# Snapshots ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SnapshotInfo:
    """A snapshot, also one that is being written. What is not known is None.

    `dir` is on the daemon's host. `pause_ms`: for how long the sandbox that it was branched from
    stood still. `diff_…`: of a diff, how long its making took, and the size of its memory in bytes.
    `pages` and `layer_bytes`: of its own layer of memory. `stages_ms`: how long each stage of its
    making took. `error`: why it cannot be forked.
    """

    tag: str
    dir: str
    created_at_unix: int
    status: Literal["writing", "ready", "failed"]
    bootable: bool
    branched_from: str | None = None
    parent_tag: str | None = None
    pause_ms: float | None = None
    diff_ms: float | None = None
    diff_physical_bytes: int | None = None
    diff_logical_bytes: int | None = None
    chain_depth: int | None = None
    memory_root: str | None = None
    ram_bytes: int | None = None
    accelerator: Literal["tcg", "kvm"] | None = None
    pages: int | None = None
    layer_bytes: int | None = None
    stages_ms: dict[str, float] | None = None
    warning: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class SnapshotDetail:
    """All about one snapshot; sizes in bytes. `ancestors` is root first."""

    tag: str
    dir: str
    created_at_unix: int
    memory_logical_bytes: int
    memory_physical_bytes: int
    vmstate_bytes: int
    chain_depth: int
    ancestors: list[str]
    dependents: list[str]
    parent_tag: str | None = None
    parent_content_hash: str | None = None


@dataclass(frozen=True)
class LineageNode:
    """A snapshot's place in the forest: `level` counts from its root, `depth` the layers below."""

    tag: str
    level: int
    parent: str | None
    children: list[str]
    depth: int | None
    created_at_unix: int | None
    note: str | None


@dataclass(frozen=True)
class ChangedFile:
    """`what` is different of it, such as `content` or `mode`."""

    path: str
    what: list[str]


@dataclass(frozen=True)
class FileDifferences:
    added: list[str]
    removed: list[str]
    changed: list[ChangedFile]


@dataclass(frozen=True)
class Differences:
    """What differs between two snapshots. Pages are of 4096 bytes.

    `files` is None where the disks differ but cannot be read as file systems; `no_files` says why.
    """

    ram_pages: int
    changed_pages: int
    disk_bytes: int
    changed_disk_bytes: int
    files: FileDifferences | None
    no_files: str | None


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


def differences(answer: dict[str, Any]) -> Differences:
    found = answer["files"]
    if found is not None:
        changed = [read(ChangedFile, each) for each in found["changed"]]
        found = read(FileDifferences, {**found, "changed": changed})
    return read(Differences, {**answer, "files": found})


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


@dataclass(frozen=True)
class StartInfo:
    """A start that is kept. `key` is the digest of `document`, which has all it depends on.

    `layer_bytes`: what its snapshot adds to the one below. `unusable`: why no run can use it; of a
    damaged one, little else is known.
    """

    key: str
    tier: Literal[1, 2] | None
    image: str | None
    command: list[str]
    snapshot_tag: str
    pid: int | None
    created_at_unix: float | None
    used_at_unix: float
    layer_bytes: int | None
    unusable: str | None
    stages_ms: dict[str, float]
    document: dict[str, Any] | None


@dataclass(frozen=True)
class StartDifference:
    """A field, with dots where it is one of another, and what two starts have there."""

    field: str
    one: Any
    other: Any


@dataclass(frozen=True)
class Explanation:
    """What two starts, by their keys, do not have in common."""

    one: str
    other: str
    differences: list[StartDifference]


@dataclass(frozen=True)
class PrunedStart:
    key: str
    snapshot_tag: str
    why: str


def explanation(answer: dict[str, Any]) -> Explanation:
    found = [read(StartDifference, each) for each in answer["differences"]]
    return read(Explanation, {**answer, "differences": found})


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


# Files --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileInfo:
    """A file in a guest. `mode` is its permission bits, `target` what a symbolic link says."""

    path: str
    type: Literal[
        "file", "directory", "symlink", "fifo", "socket", "character device", "block device"
    ]
    size_bytes: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    target: str | None


@dataclass(frozen=True)
class FileEvent:
    """Something happened to `path`.

    renamed: it was `old_path` before. overflow: more happened below `path` than could be told; look
    for yourself. What was moved in from elsewhere counts as created, what was moved away as
    removed.
    """

    kind: Literal["created", "modified", "removed", "renamed", "overflow"]
    path: str
    is_directory: bool
    old_path: str | None = None


@dataclass(frozen=True)
class Transfer:
    """What a transfer carried: files, directories and links, and bytes of the archive they made.

    `left_out` says of each thing that it did not carry why; the first thousand of them.
    """

    entries: int
    size_bytes: int
    left_out: list[str]
    left_out_count: int
