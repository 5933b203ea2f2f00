"""What keeps a store small: pruning snapshots, and compressing their memory layers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ratoon.compression import LEVEL
from ratoon.daemon.models.common import Answer, Request
from ratoon.memory.compressed import LEVELS

Amount = Annotated[int, Field(ge=0, lt=1 << 63)]
Seconds = Annotated[float, Field(ge=0)]
Names = Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=1000)]


class PruneRequest(Request):
    """What is to be kept of each lineage, a base and all that descends from it.

    One of the first three has to be there. `keep`: tags, or patterns of tags. `lineage`: that of
    this tag alone.
    """

    keep_last: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    keep_within_seconds: Seconds | None = None
    max_bytes: Amount | None = None
    keep: Names = Field(default_factory=list)
    lineage: str | None = None
    dry_run: bool = False


class PruneVerdict(Answer):
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


class PruneBudget(Answer):
    """What the snapshots of a lineage hold; `excess_bytes`: more than they may, and why is kept."""

    lineage: str
    bytes_before: int
    bytes_after: int
    excess_bytes: int


class PruneReport(Answer):
    """`freed_bytes`: what becomes free by the plan. A dry run deletes nothing."""

    dry_run: bool
    snapshots: list[PruneVerdict]
    lineages: list[PruneBudget]
    freed_bytes: int


class CompressRequest(Request):
    """The memory layers in the chains of `tags`, or of all, older than so many seconds.

    `level` is zstd's. `undo`: have them plain again.
    """

    tags: Names = Field(default_factory=list)
    older_than_seconds: Seconds | None = None
    level: Annotated[int, Field(ge=LEVELS[0], le=LEVELS[-1])] = LEVEL
    undo: bool = False
    dry_run: bool = False


class CompressedLayer(Answer):
    """What became of the layer that snapshot `tag` added, and what its files take on the disk.

    `kept`: it would not have been worth it. `names`: how many names of it were replaced.
    """

    tag: str
    outcome: Literal["compressed", "plain", "kept", "failed"]
    bytes_before: int
    bytes_after: int
    names: int
    error: str | None


class CompressReport(Answer):
    """The layers that had not the form already."""

    dry_run: bool
    layers: list[CompressedLayer]
