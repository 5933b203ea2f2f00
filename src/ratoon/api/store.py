"""What is told of the store as a whole: what everything takes, and what is damaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DiskUsage:
    """In bytes: `own` is what would become free if this alone were deleted, `shared` the rest."""

    own_bytes: int
    shared_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class StoreUsage:
    """What everything takes on the disk; `images` are by memory root or disk root.

    `volumes` are the named ones, by name.
    """

    total_bytes: int
    snapshots: dict[str, DiskUsage]
    images: dict[str, DiskUsage]
    sandboxes: dict[str, DiskUsage]
    volumes: dict[str, DiskUsage]
    other: DiskUsage


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, and what to do about it."""

    severity: Literal["damage", "minor", "note"]
    kind: str
    snapshot: str | None
    file: str
    page: int | None
    what: str
    way_out: str


@dataclass(frozen=True)
class CheckReport:
    """`sound`: there is nothing but notes. `in_use`: held by somebody, and so not judged."""

    sound: bool
    findings: list[Finding]
    snapshots: int
    images: int
    bytes_read: int
    in_use: list[str]
