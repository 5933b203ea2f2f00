"""Snapshots, and what they are made from."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from ratoon.api.defaults import DISK_MIB, RAM_MIB
from ratoon.daemon.models.common import Request, Word

Mode = Literal["full", "diff", "live"]


class SnapshotRequest(Request):
    """What is booted cold: an `image`, or a `kernel` and a `rootfs`. `forkd` says more of it.

    `cpu`: a model that all hosts of a fleet have, such as `x86-64-v3`; null: this host's own.
    """

    tag: str
    image: str | None = None
    kernel: str | None = None
    rootfs: str | None = None
    ram_mib: Annotated[int, Field(ge=128, le=1 << 20)] = RAM_MIB
    vcpus: Annotated[int, Field(ge=1, le=64)] = 1
    disk_mib: Annotated[int, Field(ge=256, le=1 << 24)] = DISK_MIB
    cpu: Word | None = None
    network: str = "none"
    refresh: bool = False

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
    """`mode` says what is stored. `forkd` says more of it."""

    tag: str | None = None
    mode: Mode | None = None
    wait: bool = True
    parent_tag: str | None = None
