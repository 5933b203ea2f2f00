"""What a daemon tells of snapshots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ratoon.client.answers import read


@dataclass(frozen=True)
class SnapshotInfo:
    """A snapshot, also one that is being written. What is not known is None.

    `dir` is on the daemon's host. `pause_ms`: for how long the sandbox that it was branched from
    stood still. `diff_…`: of a diff, how long its making took, and the size of its memory in bytes.
    `pages` and `layer_bytes`: of its own layer of memory. `stages_ms`: how long each stage of its
    making took. `error`: why it cannot be forked.
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
    error: str | None = None


@dataclass(frozen=True)
class SnapshotDetail:
    """All about one snapshot; sizes in bytes. `ancestors` is root first."""

    tag: str
    dir: str
    created_at_unix: int
    memory_logical_bytes: int
    memory_physical_bytes: int
    vmstate_bytes: int
    chain_depth: int
    ancestors: list[str]
    dependents: list[str]
    parent_tag: str | None = None
    parent_content_hash: str | None = None


@dataclass(frozen=True)
class LineageNode:
    """A snapshot's place in the forest: `level` counts from its root, `depth` the layers below."""

    tag: str
    level: int
    parent: str | None
    children: list[str]
    depth: int | None
    created_at_unix: int | None
    note: str | None


@dataclass(frozen=True)
class ChangedFile:
    """`what` is different of it, such as `content` or `mode`."""

    path: str
    what: list[str]


@dataclass(frozen=True)
class FileDifferences:
    added: list[str]
    removed: list[str]
    changed: list[ChangedFile]


@dataclass(frozen=True)
class Differences:
    """What differs between two snapshots. Pages are of 4096 bytes.

    `files` is None where the disks differ but cannot be read as file systems; `no_files` says why.
    """

    ram_pages: int
    changed_pages: int
    disk_bytes: int
    changed_disk_bytes: int
    files: FileDifferences | None
    no_files: str | None


def differences(answer: dict[str, Any]) -> Differences:
    found = answer["files"]
    if found is not None:
        changed = [read(ChangedFile, each) for each in found["changed"]]
        found = read(FileDifferences, {**found, "changed": changed})
    return read(Differences, {**answer, "files": found})
