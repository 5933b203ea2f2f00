"""Snapshots, and what they are made from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ratoon.daemon.models.common import Answer, Request
from ratoon.sandbox.base import DISK_BYTES, RAM_BYTES
from ratoon.units import MIB


class SnapshotInfo(Answer):
    """A snapshot, also one that is being written. What is not known is left out.

    `pause_ms`: for how long the sandbox that it was branched from stood still. `diff_…`: of a diff,
    how long its making took, and the size of its memory. `pages` and `layer_bytes`: of its own
    layer of memory. `stages_ms`: how long each stage of its making took.
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


class Unpacked(Answer):
    """What came of a pack: of the bytes of its layers, those written and those that were here."""

    snapshot: SnapshotInfo
    stored_bytes: int
    shared_bytes: int


class SnapshotRequest(Request):
    """What is booted cold: an `image`, or a `kernel` and a `rootfs` (raw, with ext4), files of the
    host where the daemon lets them lie.

    An image is `debian[:SUITE][+PACKAGE…]`, a name in a registry, or of the daemon's host, where it
    lets them lie, `oci:DIRECTORY[:REF]`, `oci-archive:FILE`, `docker-archive:FILE`, `tar:FILE` or
    `dir:DIRECTORY`. It is remembered what a name was found to be, until `refresh`.

    It gets so much RAM, so many virtual CPUs and, of an image, a disk of that size. `network`: what
    forks may reach unless they are given something else. The rest is there for clients of another
    runtime, and changes nothing: every fork may write, and the boot is awaited until it is done.
    """

    tag: str
    image: str | None = None
    kernel: str | None = None
    rootfs: str | None = None
    ram_mib: Annotated[int, Field(ge=128, le=1 << 20)] = RAM_BYTES // MIB
    vcpus: Annotated[int, Field(ge=1, le=64)] = 1
    disk_mib: Annotated[int, Field(ge=256, le=1 << 24)] = DISK_BYTES // MIB
    network: str = "none"
    refresh: bool = False
    rw: bool = False
    tap: Any = None
    boot_wait_secs: Annotated[int, Field(ge=0, le=60)] = 10

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.image is None and (self.kernel is None or self.rootfs is None):
            raise PydanticCustomError("missing", "image is missing, or kernel and rootfs")
        if self.image is not None and (self.kernel is not None or self.rootfs is not None):
            raise ValueError("give an image, or a kernel and a rootfs, not both")
        return self


class CompactRequest(Request):
    to: str


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
