"""What is told of the starts that are kept of images that were run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class StartInfo:
    """A start that was kept; where its document is damaged, little is known of it.

    `key` is the digest of `document`, which has all that it depends on. `layer_bytes`: what its
    snapshot adds to the one below. `unusable`: why no run can use it, null if one can.
    """

    key: str
    tier: Literal[1, 2] | None
    image: str | None
    command: list[str]
    snapshot_tag: str
    pid: int | None
    created_at_unix: float | None
    used_at_unix: float
    layer_bytes: int | None
    unusable: str | None
    stages_ms: dict[str, float]
    document: dict[str, Any] | None


@dataclass(frozen=True)
class DifferenceInfo:
    """A field of the two documents, and what it is in each; null: there is none."""

    #: With dots where it is one of another.
    field: str
    one: Any
    other: Any


@dataclass(frozen=True)
class Explanation:
    """In which fields two starts, by their keys, differ."""

    one: str
    other: str
    differences: list[DifferenceInfo]


@dataclass(frozen=True)
class PrunedStart:
    key: str
    snapshot_tag: str
    why: str
