"""The store as a whole, and the pool."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ratoon.daemon.models.common import Answer, Request


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
    """What everything takes on the disk; `images` are by memory root or disk root.

    `volumes` are the named ones, by name.
    """

    total_bytes: int
    snapshots: dict[str, DiskUsage]
    images: dict[str, DiskUsage]
    sandboxes: dict[str, DiskUsage]
    volumes: dict[str, DiskUsage]
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
