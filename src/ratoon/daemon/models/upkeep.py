"""What keeps a store small: pruning snapshots, and compressing their memory layers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ratoon.compression import LEVEL
from ratoon.daemon.models.common import Request
from ratoon.store.memory.compressed import LEVELS

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


class CompressRequest(Request):
    """The memory layers in the chains of `tags`, or of all, older than so many seconds.

    `level` is zstd's. `undo`: have them plain again.
    """

    tags: Names = Field(default_factory=list)
    older_than_seconds: Seconds | None = None
    level: Annotated[int, Field(ge=LEVELS[0], le=LEVELS[-1])] = LEVEL
    undo: bool = False
    dry_run: bool = False
