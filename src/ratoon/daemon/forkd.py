"""What is there for clients of forkd 0.5, whose published API is answered too, and for nobody else.

It is promised to them, so it stays; what else there is, the rest of the daemon has.
"""

from __future__ import annotations

from dataclasses import dataclass

from ratoon.api import answers
from ratoon.daemon.models.sandboxes import LimitsOfSandbox, VolumeOfSandbox


@dataclass(frozen=True)
class SandboxInfo(answers.SandboxInfo):
    """A sandbox. `pid` is that of its machine, and null where it has none.

    `snapshot_tag`: what it was forked from; `stands_on`: its last branch, or the same.
    `idle_for_seconds`: for how long nobody has used it. `stages_ms` are those of its fork,
    `fork_ms` is all of it until its agent had answered; a daemon that took it over knows neither.
    """

    # The same fields, in the classes that a request has: OpenAPI has one of each.
    limits: LimitsOfSandbox  # type: ignore[assignment]
    volumes: list[VolumeOfSandbox]  # type: ignore[assignment]
    netns: str | None
    guest_addr: str | None
    memory_limit_mib: int | None


@dataclass(frozen=True)
class Changed(answers.Changed):
    """A sandbox after a change, and how long the stages of that took, in milliseconds."""

    sandbox: SandboxInfo


@dataclass(frozen=True)
class RunInfo(answers.RunInfo):
    """A sandbox in which an image's command runs. `pid` is its in the guest, if it was started.

    `argv` is all of it, with the image's entrypoint. `tier`: what was there to fork from: 2, the
    command as it was up; 1, the image as it was booted; 0, nothing. `missed` says why no more.
    `stages_ms`: how long each stage took.
    """

    sandbox: SandboxInfo
