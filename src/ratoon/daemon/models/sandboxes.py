"""Sandboxes, their options and ports, and workspaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ratoon.api.answers import IdleCounts
from ratoon.api.defaults import STOP_SECONDS
from ratoon.daemon.models.common import ErrorAnswer, Many, Metadata, Port, Request, Timeout, Word
from ratoon.engine.sandbox.options import Seconds


class PublishRequest(Request):
    """`guest_port` within the guest; `host_port` of the host, null: one that is free.

    There is no other `protocol`. `address`: an address of the host, in digits; null: its loopback.
    """

    guest_port: Port
    host_port: Port | None = None
    address: Annotated[str, Field(max_length=64)] | None = None
    protocol: Literal["tcp"] = "tcp"


class LimitsOfSandbox(Request):
    """What a sandbox may use of its host; null: no limit."""

    memory_mib: Annotated[int, Field(gt=0, le=1 << 24)] | None = None
    cpus: Annotated[float, Field(gt=0, le=1 << 16)] | None = None
    pids: Annotated[int, Field(gt=0, le=1 << 20)] | None = None
    disk_mib: Annotated[int, Field(gt=0, le=1 << 24)] | None = None


class VolumeOfSandbox(Request):
    """A directory of the daemon's host, or a named volume, that is mounted at `target`.

    `source`: a directory's real path, or a volume's name, which is made where there is none.
    """

    source: Annotated[str, Field(min_length=1, max_length=4096)]
    target: Annotated[str, Field(min_length=1, max_length=4096)]
    read_only: bool = False


class ForkOptions(Request):
    """What new sandboxes get besides their snapshot.

    `network`: `none`, `outbound`, or `allow:CIDR:PORT,…`; null: what the snapshot says.
    `ttl_seconds`: killed so long after its fork; `idle_seconds`: in standby after so long without
    use, and awake when it is used. `idle_counts`: what is use besides calls: `activity`, what the
    guest uses of the processor and the network itself; `commands`, any that runs; or `calls`,
    nothing. `spare`: a machine is kept started for its next reset. `auto_remove`: killed once the
    command has ended that it was made for; `stop_signal`: what asks that to end (`SIGINT`, `INT` or
    `2`); null: what its image says, or SIGTERM. `env`, `user` (NAME or UID, also with `:GROUP`) and
    `workdir`, which is made: what commands have that do not say otherwise, besides and in place of
    what the snapshot or the image says.
    """

    network: str | None = None
    limits: LimitsOfSandbox = LimitsOfSandbox()
    ttl_seconds: Seconds | None = None
    idle_seconds: Seconds | None = None
    idle_counts: IdleCounts = "activity"
    spare: bool = False
    auto_remove: bool = False
    stop_signal: Annotated[str, Field(max_length=32)] | None = None
    env: dict[Word, Word] = Field(default_factory=dict)
    user: Word | None = None
    workdir: Word | None = None
    volumes: list[VolumeOfSandbox] = Field(default_factory=list, max_length=32)
    metadata: Metadata = Field(default_factory=dict)


class ManyForks(ForkOptions):
    """`n` sandboxes at once; `publish`: ports of each. A `host_port` can be of one alone."""

    n: Many = 1
    publish: list[PublishRequest] = Field(default_factory=list, max_length=64)


class ForkRequest(ManyForks):
    """Of a snapshot."""

    snapshot_tag: str


class ForkSandboxRequest(ManyForks):
    """Options that are not given are those of the sandbox."""


class OptionsRequest(Request):
    """What is given is changed; null takes it away. `ttl_seconds` counts from the fork."""

    ttl_seconds: Seconds | None = None
    idle_seconds: Seconds | None = None
    idle_counts: IdleCounts = "activity"
    metadata: Metadata = Field(default_factory=dict)


class WaitRequest(Request):
    """`timeout_secs`: answer after so long in any case; null: once it has ended."""

    timeout_secs: Timeout | None = None


class StopRequest(Request):
    """`timeout_secs`: what its command gets to end in; 0: nothing."""

    timeout_secs: Annotated[float, Field(ge=0, le=1800)] = STOP_SECONDS


class WorkspaceRequest(ForkOptions):
    """A name, and what its sandbox is forked from. The options hold for those after it, too."""

    name: str
    snapshot_tag: str


class SuspendRequest(Request):
    """`diff`: store what changed, not all of it."""

    diff: bool = False


@dataclass(frozen=True)
class Failures:
    """What the sandboxes of the last burst that did not start died of."""

    snapshot_tag: str | None
    errors: list[ErrorAnswer]
