"""Images that are run, and the starts that are kept of that."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ratoon.daemon.models.common import Answer, Request, Word
from ratoon.daemon.models.sandboxes import ForkOptions, PublishRequest, SandboxInfo
from ratoon.sandbox.base import DISK_BYTES, RAM_BYTES
from ratoon.sandbox.options import Seconds
from ratoon.startup.spec import Health
from ratoon.units import MIB


class RunRequest(ForkOptions):
    """`command` takes the place of the image's own, after its entrypoint; `env` is added to its.

    With `health` the answer comes once the command has passed that, and what there is then is kept
    for the next equal request. Without, the command is only started, or, if `start` is false, left
    to the client. `cache` false: nothing that was kept is used, and nothing is kept. `refresh`: the
    image is looked up again, and what was kept of this is made anew. `network` null is `none`.
    """

    image: Annotated[Word, Field(min_length=1, max_length=4096)]
    command: list[Word] = Field(default_factory=list, max_length=4096)
    env: dict[Word, Word] = Field(default_factory=dict)
    user: Word | None = None
    workdir: Word | None = None
    ram_mib: Annotated[int, Field(ge=128, le=1 << 20)] = RAM_BYTES // MIB
    vcpus: Annotated[int, Field(ge=1, le=64)] = 1
    disk_mib: Annotated[int, Field(ge=256, le=1 << 24)] = DISK_BYTES // MIB
    health: Annotated[Health, Field(discriminator="kind")] | None = None
    publish: list[PublishRequest] = Field(default_factory=list, max_length=64)
    start: bool = True
    cache: bool = True
    refresh: bool = False


class RunInfo(Answer):
    """A sandbox in which an image's command runs. `pid` is its in the guest, if it was started.

    `argv` is all of it, with the image's entrypoint. `tier`: what was there to fork from: 2, the
    command as it was up; 1, the image as it was booted; 0, nothing. `missed` says why no more.
    `stages_ms`: how long each stage took.
    """

    sandbox: SandboxInfo
    argv: list[str]
    pid: int | None
    tier: Literal[0, 1, 2]
    missed: list[str]
    stages_ms: dict[str, float]


class StartInfo(Answer):
    """A start that was kept; where its document is damaged, little is known of it.

    `key` is the digest of `document`, which has all that it depends on. `layer_bytes`: what its
    snapshot adds to the one below. `unusable`: why no run can use it, null if one can.
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


class DifferenceInfo(Answer):
    """A field of the two documents, and what it is in each; null: there is none."""

    field: str
    one: Any
    other: Any


class Explanation(Answer):
    """In which fields two starts, by their keys, differ."""

    one: str
    other: str
    differences: list[DifferenceInfo]


class PruneRequest(Request):
    """Besides what no run can use: what was not used for so long, or `everything`.

    `dry_run`: tell what would go.
    """

    older_than_seconds: Seconds | None = None
    everything: bool = False
    dry_run: bool = False


class PrunedStart(Answer):
    key: str
    snapshot_tag: str
    why: str
