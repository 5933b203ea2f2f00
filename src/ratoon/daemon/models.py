"""What goes over the wire as JSON: requests and answers, as OpenAPI shows them.

Requests are strict about types, and what they do not know they ignore.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ratoon.guest.files import FileType
from ratoon.sandbox.base import DISK_BYTES, MIB, RAM_BYTES
from ratoon.sandbox.options import Seconds

Port = Annotated[int, Field(ge=1, le=65535)]
#: How long something may be waited for, in seconds.
Timeout = Annotated[float, Field(gt=0, le=86400)]
#: Text that goes to a program in the guest, which ends at a NUL.
Word = Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=1 << 20)]


#: At most 64 short pairs; they are written down with the sandbox.
Metadata = Annotated[
    dict[
        Annotated[str, Field(min_length=1, max_length=256)], Annotated[str, Field(max_length=4096)]
    ],
    Field(max_length=64),
]
#: How many sandboxes at once.
Many = Annotated[int, Field(ge=1, le=1000)]


class Request(BaseModel):
    """A body that a client sends."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Answer(BaseModel):
    """A body that the daemon sends."""

    model_config = ConfigDict(frozen=True)


class ErrorAnswer(Answer):
    """What went wrong, for a person; `kind` is its class in `ratoon.errors`, for a program."""

    error: str
    kind: str


class Health(Answer):
    ok: bool


class Version(Answer):
    version: str
    api: Literal["v1"] = "v1"


# Snapshots ----------------------------------------------------------------------------------------


class SnapshotInfo(Answer):
    """A snapshot, also one that is being written. What is not known is left out.

    `pause_ms`: for how long the sandbox that it was branched from stood still. `diff_…`: of a diff,
    how long its making took, and the size of its memory.
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
    warning: str | None = None
    #: Why it cannot be forked.
    error: str | None = None


class SnapshotDetail(Answer):
    """All about one snapshot; sizes in bytes. `ancestors` is root first."""

    tag: str
    dir: str
    created_at_unix: int
    memory_logical_bytes: int
    memory_physical_bytes: int
    vmstate_bytes: int
    parent_tag: str | None = None
    parent_content_hash: str | None = None
    chain_depth: int
    ancestors: list[str]
    dependents: list[str]


class SnapshotRequest(Request):
    """`image` is booted cold, with so much RAM, so many virtual CPUs and a disk of that size."""

    tag: str
    image: str
    ram_mib: Annotated[int, Field(ge=128, le=1 << 20)] = RAM_BYTES // MIB
    vcpus: Annotated[int, Field(ge=1, le=64)] = 1
    disk_mib: Annotated[int, Field(ge=256, le=1 << 24)] = DISK_BYTES // MIB


class CompactRequest(Request):
    to: str


# Sandboxes ----------------------------------------------------------------------------------------


class PublishRequest(Request):
    """`guest_port` within the guest; `host_port` of the host's loopback, null: one that is free."""

    guest_port: Port
    host_port: Port | None = None


class PublishedPort(Answer):
    guest_port: int
    host_port: int


class LimitsOfSandbox(Request):
    """What a sandbox may use of its host; null: no limit. See `ratoon.host.limits.Limits`."""

    memory_mib: Annotated[int, Field(gt=0, le=1 << 24)] | None = None
    cpus: Annotated[float, Field(gt=0, le=1 << 16)] | None = None
    pids: Annotated[int, Field(gt=0, le=1 << 20)] | None = None
    disk_mib: Annotated[int, Field(gt=0, le=1 << 24)] | None = None


class ForkOptions(Request):
    """What new sandboxes get besides their snapshot.

    `network`: `none`, `outbound`, or `allow:CIDR:PORT,…`; null: what the snapshot says.
    `ttl_seconds`: killed so long after its fork; `idle_seconds`: in standby after so long without
    use, and awake when it is used. `spare`: a machine is kept started for its next reset.
    `publish`: ports to publish; a `host_port` can be that of one sandbox only.
    """

    network: str | None = None
    limits: LimitsOfSandbox = LimitsOfSandbox()
    ttl_seconds: Seconds | None = None
    idle_seconds: Seconds | None = None
    spare: bool = False
    metadata: Metadata = {}
    publish: Annotated[list[PublishRequest], Field(max_length=64)] = []


class ForkRequest(ForkOptions):
    """`memory_limit_mib` is `limits.memory_mib`, as clients of another runtime know it.

    The flags are theirs too, and change nothing.
    """

    snapshot_tag: str
    n: Many = 1
    memory_limit_mib: Annotated[int, Field(gt=0, le=1 << 24)] | None = None
    per_child_netns: bool = False
    prewarm: bool | None = None
    live_fork: bool = False
    hugepages: bool = False


class ForkSandboxRequest(ForkOptions):
    """Options that are not given are those of the sandbox."""

    n: Many = 1


class OptionsRequest(Request):
    """What is given is changed; null takes it away. `ttl_seconds` counts from the fork."""

    ttl_seconds: Seconds | None = None
    idle_seconds: Seconds | None = None
    metadata: Metadata = {}


class SandboxInfo(Answer):
    """A sandbox. `pid` is that of its machine, and null where it has none.

    `snapshot_tag`: what it was forked from; `stands_on`: its last branch, or the same.
    `idle_for_seconds`: for how long nobody has used it. `stages_ms` are those of its fork,
    `fork_ms` is all of it until its agent had answered; a daemon that took it over knows neither.
    """

    id: str
    snapshot_tag: str
    netns: str | None
    guest_addr: str | None
    created_at_unix: int
    pid: int | None
    memory_limit_mib: int | None
    has_branched: bool
    last_branch_memory_path: str | None
    branch_count: int
    state: Literal["running", "standby", "dead", "killed"]
    stands_on: str
    accelerator: Literal["tcg", "kvm"]
    network: str
    limits: LimitsOfSandbox
    ttl_seconds: float | None
    idle_seconds: float | None
    idle_for_seconds: float
    spare: bool
    metadata: dict[str, str]
    ports: list[PublishedPort]
    fork_ms: float
    stages_ms: dict[str, float]


class Changed(Answer):
    """A sandbox after a change, and how long the stages of that took, in milliseconds."""

    sandbox: SandboxInfo
    stages_ms: dict[str, float]


class Failures(Answer):
    """What the sandboxes of the last burst that did not start died of."""

    snapshot_tag: str | None
    errors: list[ErrorAnswer]


class Pong(Answer):
    """`pid` is the agent's, in the guest."""

    pong: Literal[True] = True
    pid: int
    agent_lang: Literal["python"] = "python"
    protocol: int


# Commands -----------------------------------------------------------------------------------------


class ExecRequest(Request):
    """`args` is the program and its arguments; no shell takes part.

    `user`: NAME or UID, also with `:GROUP`.
    """

    args: Annotated[list[Word], Field(min_length=1)]
    timeout_secs: Timeout = 30
    env: dict[Word, Word] | None = None
    cwd: Word | None = None
    user: Word | None = None
    stdin: str = ""


class TerminalSize(Request):
    rows: Annotated[int, Field(ge=1, le=65535)]
    columns: Annotated[int, Field(ge=1, le=65535)]


class ExecOpening(Request):
    """What is said first on `exec/stream`: a program to start, or a pid to attach to.

    `user`: NAME or UID, also with `:GROUP`. A program in the `background` goes on when the client
    leaves. Without a `timeout`, in seconds, it may take for ever.
    """

    argv: list[Word] = []
    env: dict[Word, Word] | None = None
    cwd: Word | None = None
    user: Word | None = None
    timeout: Timeout | None = None
    pty: TerminalSize | None = None
    stdin: bool = False
    background: bool = False
    attach: int | None = None

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        if bool(self.argv) == (self.attach is not None):
            raise ValueError("give argv, to start a program, or attach, the pid of one")
        return self


class ExecSaying(Request):
    """What may be said later: no more input, another size, a signal."""

    eof: bool = False
    resize: TerminalSize | None = None
    signal: Annotated[int, Field(ge=1, le=64)] | None = None


class SignalRequest(Request):
    signal: Annotated[int, Field(ge=1, le=64)]


class EvalOpening(Request):
    """What is said first on `eval/stream`."""

    code: Annotated[str, Field(max_length=1 << 21)]
    timeout: Timeout | None = None


class ProcessInfo(Answer):
    """A process that was started from outside. `started_at` is in seconds, by the guest's clock.

    `attached`: somebody listens. `exit_code` is null while it runs.
    """

    pid: int
    argv: list[str]
    user: str
    started_at: float
    background: bool
    terminal: bool
    attached: bool
    exit_code: int | None


class ExecAnswer(Answer):
    """How a command ended.

    `exit_code` is a shell's: 124 timed out, 126 not executable, 127 not found, 128 + n killed by
    signal n. `reason` says so in words where it is not the command's own; that is in `stderr` too.
    Output that is not UTF-8 has replacement characters; what is beyond the limit is `truncated`.
    """

    stdout: str
    stderr: str
    exit_code: int
    timed_out: bool
    truncated: bool
    reason: str | None


class EvalRequest(Request):
    """Python for the sandbox's warm interpreter, which keeps its state from call to call."""

    code: Annotated[str, Field(max_length=1 << 21)]
    timeout_secs: Timeout = 30


class EvalAnswer(Answer):
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
    timed_out: bool
    state_lost: bool
    truncated: bool


# Files --------------------------------------------------------------------------------------------


class FileInfo(Answer):
    """A file in a guest. `mode` is its permission bits in octal, `target` what a link says."""

    path: str
    type: FileType
    size_bytes: int
    mode: str
    uid: int
    gid: int
    mtime_ns: int
    target: str | None


class Written(Answer):
    """`size_bytes`: of what was sent."""

    size_bytes: int


class Extracted(Answer):
    """Of an archive: the things in it, its bytes, and what was left out of it, and why."""

    entries: int
    size_bytes: int
    left_out: list[str]
    left_out_count: int


# The store ----------------------------------------------------------------------------------------


class LineageNode(Answer):
    """A snapshot's place in the forest: `level` counts from its root, `depth` the layers below."""

    tag: str
    level: int
    parent: str | None
    children: list[str]
    depth: int | None
    created_at_unix: int | None
    note: str | None


class ChangedFile(Answer):
    path: str
    what: list[str]


class FileDifferences(Answer):
    added: list[str]
    removed: list[str]
    changed: list[ChangedFile]


class Differences(Answer):
    """What differs between two snapshots. Pages are of 4096 bytes.

    `files` is null where the disks differ but cannot be read as file systems; `no_files` says why.
    """

    ram_pages: int
    changed_pages: int
    disk_bytes: int
    changed_disk_bytes: int
    files: FileDifferences | None
    no_files: str | None


class DiskUsage(Answer):
    """In bytes: `own` is what would become free if this alone were deleted, `shared` the rest."""

    own_bytes: int
    shared_bytes: int
    total_bytes: int


class StoreUsage(Answer):
    """What everything takes on the disk; `images` are by memory root."""

    total_bytes: int
    snapshots: dict[str, DiskUsage]
    images: dict[str, DiskUsage]
    sandboxes: dict[str, DiskUsage]
    other: DiskUsage


class CheckRequest(Request):
    """`read_data`: compare all data with its digests; `subset`, `n/t`: part n of t of it."""

    read_data: bool = False
    subset: str | None = None


class Finding(Answer):
    """Something that is not as it should be, and what to do about it."""

    severity: Literal["damage", "minor", "note"]
    kind: str
    snapshot: str | None
    file: str
    page: int | None
    what: str
    way_out: str


class CheckReport(Answer):
    """`sound`: there is nothing but notes. `in_use`: held by somebody, and so not judged."""

    sound: bool
    findings: list[Finding]
    snapshots: int
    images: int
    bytes_read: int
    in_use: list[str]


class PoolInfo(Answer):
    """Machines that wait, started, to become sandboxes of a snapshot; `private_bytes` in all."""

    tag: str
    wanted: int
    ready: int
    private_bytes: int


class PoolRequest(Request):
    """How many machines shall wait; 0: none."""

    size: Annotated[int, Field(ge=0, le=1000)]


# Branches -----------------------------------------------------------------------------------------


class BranchRequest(Request):
    """`mode` says what is stored; `diff`, `live` and `measure_diff` are its older form.

    `full` (default): all of it, of depth 0. `diff`: what changed since `parent_tag`. `live`: as
    `diff`; without `wait` the answer comes when the sandbox runs again. `measure_diff`: full, and
    what the difference would have taken.
    """

    tag: str | None = None
    mode: Literal["full", "diff", "live"] | None = None
    diff: bool = False
    live: bool = False
    measure_diff: bool = False
    wait: bool = True
    parent_tag: str | None = None
