"""What a daemon tells of pruning and of compressing; sizes are in bytes of the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ratoon.client.answers import read


@dataclass(frozen=True)
class PruneVerdict:
    """What was planned for a snapshot, and why; `lineage` is the tag of its base.

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
    """What the snapshots of a lineage hold, and afterwards; `excess_bytes`: above what they may."""

    lineage: str
    bytes_before: int
    bytes_after: int
    excess_bytes: int


@dataclass(frozen=True)
class PruneReport:
    """`snapshots`: what goes, in that order, then what is kept. A dry run deletes nothing."""

    dry_run: bool
    snapshots: list[PruneVerdict]
    lineages: list[PruneBudget]
    freed_bytes: int


@dataclass(frozen=True)
class CompressedLayer:
    """What became of the memory layer that snapshot `tag` added.

    `kept`: it would not have been worth it. `failed`: it is as it was; `error` says why. `names`:
    how many names of it were replaced.
    """

    tag: str
    outcome: Literal["compressed", "plain", "kept", "failed"]
    bytes_before: int
    bytes_after: int
    names: int
    error: str | None


@dataclass(frozen=True)
class CompressReport:
    """The layers that had not the form already. A dry run changes nothing."""

    dry_run: bool
    layers: list[CompressedLayer]


def prune_report(answer: dict[str, Any]) -> PruneReport:
    snapshots = [read(PruneVerdict, each) for each in answer["snapshots"]]
    lineages = [read(PruneBudget, each) for each in answer["lineages"]]
    return read(PruneReport, {**answer, "snapshots": snapshots, "lineages": lineages})


def compress_report(answer: dict[str, Any]) -> CompressReport:
    layers = [read(CompressedLayer, each) for each in answer["layers"]]
    return read(CompressReport, {**answer, "layers": layers})
