"""Snapshots, and what they are made from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ratoon.daemon.models.common import Request
from ratoon.sandbox.base import DISK_BYTES, RAM_BYTES
from ratoon.units import MIB


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
