"""What is told of snapshots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SnapshotInfo:
    """A snapshot, also one that is being written. What is not known is left out.

    `pause_ms`: for how long the sandbox that it was branched from stood still. `diff_…`: of a diff,
    how long its making took, and the size of its memory. `pages` and `layer_bytes`: of its own
    layer of memory. `stages_ms`: how long each stage of its making took.
    """

    tag: str
    #: On the daemon's host.
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
    cpu: str | None = None
    pages: int | None = None
    layer_bytes: int | None = None
    stages_ms: dict[str, float] | None = None
    warning: str | None = None
    #: Why it cannot be forked.
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class SnapshotDetail:
    """All about one snapshot; sizes in bytes. `ancestors` is root first."""

    tag: str
    dir: str
    created_at_unix: int
    memory_logical_bytes: int
    memory_physical_bytes: int
    vmstate_bytes: int
    parent_tag: str | None = None
    #: `blake3:` and the parent's memory root.
    parent_content_hash: str | None = None
    chain_depth: int
    ancestors: list[str]
    dependents: list[str]


@dataclass(frozen=True)
class LineageNode:
    """A snapshot's place in the forest: `level` counts from its root, `depth` the layers below."""

    tag: str
    level: int
    #: These two are in the store.
    parent: str | None
    children: list[str]
    #: Null: it is damaged.
    depth: int | None
    created_at_unix: int | None
    #: Why it is a root though it was made from another, or what is damaged.
    note: str | None


@dataclass(frozen=True)
class ChangedFile:
    path: str
    #: Is different of it, such as `content` or `mode`.
    what: list[str]


@dataclass(frozen=True)
class FileDifferences:
    added: list[str]
    removed: list[str]
    changed: list[ChangedFile]


@dataclass(frozen=True)
class Differences:
    """What differs between two snapshots. Pages are of 4096 bytes.

    `files` is null where the disks differ but cannot be read as file systems; `no_files` says why.
    """

    ram_pages: int
    changed_pages: int
    disk_bytes: int
    changed_disk_bytes: int
    files: FileDifferences | None
    no_files: str | None


@dataclass(frozen=True)
class Unpacked:
    """What came of a pack: of the bytes of its layers, those written and those that were here."""

    snapshot: SnapshotInfo
    stored_bytes: int
    shared_bytes: int
