"""What is there for clients of forkd 0.5, whose published API is answered too, and for nobody else.

It is promised to them, so it stays. All else is with what it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from ratoon.api import answers
from ratoon.daemon.models import sandboxes, snapshots
from ratoon.daemon.models.sandboxes import LimitsOfSandbox, VolumeOfSandbox
from ratoon.daemon.models.snapshots import Mode
from ratoon.errors import AlreadyExists, InFlight, InvalidInput, RatoonError

# Requests -----------------------------------------------------------------------------------------


class ForkRequest(sandboxes.ForkRequest):
    """`memory_limit_mib` is `limits.memory_mib`, as clients of another runtime know it.

    The flags are theirs too, and change nothing.
    """

    memory_limit_mib: Annotated[int, Field(gt=0, le=1 << 24)] | None = None
    per_child_netns: bool = False
    prewarm: bool | None = None
    live_fork: bool = False
    hugepages: bool = False


class SnapshotRequest(snapshots.SnapshotRequest):
    """What is booted cold: an `image`, or a `kernel` and a `rootfs` (raw, with ext4), files of the
    host where the daemon lets them lie.

    An image is `debian[:SUITE][+PACKAGE…]`, a name in a registry, or of the daemon's host, where it
    lets them lie, `oci:DIRECTORY[:REF]`, `oci-archive:FILE`, `docker-archive:FILE`, `tar:FILE` or
    `dir:DIRECTORY`. It is remembered what a name was found to be, until `refresh`.

    It gets so much RAM, so many virtual CPUs and, of an image, a disk of that size. `network`: what
    forks may reach unless they are given something else. The rest is there for clients of another
    runtime, and changes nothing: every fork may write, and the boot is awaited until it is done.
    """

    rw: bool = False
    tap: Any = None
    boot_wait_secs: Annotated[int, Field(ge=0, le=60)] = 10


class BranchRequest(snapshots.BranchRequest):
    """`mode` says what is stored; `diff`, `live` and `measure_diff` are its older form.

    `full` (default): all of it, of depth 0. `diff`: what changed since `parent_tag`. `live`: as
    `diff`; without `wait` the answer comes when the sandbox runs again. `measure_diff`: full, and
    what the difference would have taken.
    """

    diff: bool = False
    live: bool = False
    measure_diff: bool = False


def mode_of(body: BranchRequest) -> Mode:
    """The mode that a request says, in either form. InvalidInput: in both, or it makes no sense."""
    older = [name for name in ("diff", "live", "measure_diff") if getattr(body, name)]
    if body.mode and (body.diff or body.live):
        raise InvalidInput(f"mode {body.mode} and {older[0]}: give one of them")
    if body.mode not in (None, "full") and body.measure_diff:
        raise InvalidInput(f"measure_diff is of a full branch, not of mode {body.mode}")
    if len(older) > 1:
        raise InvalidInput(f"{' and '.join(older)}: give one of them")
    mode: Mode = body.mode or ("diff" if body.diff else "live" if body.live else "full")
    if not body.wait and mode != "live":
        raise InvalidInput(f"a {mode} branch cannot be left to itself: wait=false is for live ones")
    return mode


# Answers ------------------------------------------------------------------------------------------

#: Why a base cannot be made, and what is a 400 then, not the 409 that it is elsewhere.
TAKEN: tuple[type[RatoonError], ...] = (AlreadyExists, InFlight)


@dataclass(frozen=True)
class SandboxInfo(answers.SandboxInfo):
    """A sandbox. `pid` is that of its machine, and null where it has none.

    `status` is for people: its `state`, and how its command ended. `command`: what it was made for,
    if that was said; with `auto_remove` the sandbox ends when that does, and `stop_signal` is what
    asks it to end.
    `snapshot_tag`: what it was forked from; `stands_on`: its last branch, or the same.
    `idle_for_seconds`: for how long it was not in use, as `idle_counts` has it; `wakes`: it is in
    standby for that, until it is used. `stages_ms` are those of its fork, `fork_ms` is all of it
    until its agent had answered; a daemon that took it over knows neither.
    """

    # The same fields, in the classes that a request has: OpenAPI has one of each.
    limits: LimitsOfSandbox  # type: ignore[assignment]
    volumes: list[VolumeOfSandbox]  # type: ignore[assignment]
    netns: str | None
    guest_addr: str | None
    memory_limit_mib: int | None


@dataclass(frozen=True)
class Changed(answers.Changed):
    """A sandbox after a change, and how long the stages of that took, in milliseconds.

    `unsynced`: why its volumes may lack what its guest had written before; null: they do not.
    """

    sandbox: SandboxInfo


@dataclass(frozen=True)
class RunInfo(answers.RunInfo):
    """A sandbox in which an image's command runs. `pid` is its in the guest, if it was started.

    `argv` is all of it, with the image's entrypoint. `tier`: what was there to fork from: 2, the
    command as it was up; 1, the image as it was booted; 0, nothing. `missed` says why no more.
    `stages_ms`: how long each stage took.
    """

    sandbox: SandboxInfo
