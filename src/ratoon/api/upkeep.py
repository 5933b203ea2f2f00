"""What is told of pruning and of compressing; sizes are in bytes of the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PruneVerdict:
    """What a rule says of a snapshot, and why; `lineage` is the tag of its base.

    `frees_bytes`: what its deletion frees, after those that are listed before it. `error`: why it
    was not deleted all the same.
    """

    tag: str
    lineage: str
    created_at_unix: int
    keep: bool
    reason: str
    frees_bytes: int
    deleted: bool
    error: str | None


@dataclass(frozen=True)
class PruneBudget:
    """What the snapshots of a lineage hold; `excess_bytes`: more than they may, and why is kept."""

    lineage: str
    bytes_before: int
    bytes_after: int
    excess_bytes: int


@dataclass(frozen=True)
class PruneReport:
    """`freed_bytes`: what becomes free by the plan. A dry run deletes nothing."""

    dry_run: bool
    #: What goes, in that order, then what is kept.
    snapshots: list[PruneVerdict]
    lineages: list[PruneBudget]
    freed_bytes: int


@dataclass(frozen=True)
class CompressedLayer:
    """What became of the layer that snapshot `tag` added, and what its files take on the disk.

    `kept`: it would not have been worth it. `names`: how many names of it were replaced.
    """

    tag: str
    #: failed: it is as it was, and `error` says why.
    outcome: Literal["compressed", "plain", "kept", "failed"]
    bytes_before: int
    bytes_after: int
    names: int
    error: str | None


@dataclass(frozen=True)
class CompressReport:
    """The layers that had not the form already."""

    dry_run: bool
    layers: list[CompressedLayer]
