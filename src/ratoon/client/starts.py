"""What a daemon tells of the starts that it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ratoon.client.answers import read


@dataclass(frozen=True)
class StartInfo:
    """A start that is kept. `key` is the digest of `document`, which has all it depends on.

    `layer_bytes`: what its snapshot adds to the one below. `unusable`: why no run can use it; of a
    damaged one, little else is known.
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
class StartDifference:
    """A field, with dots where it is one of another, and what two starts have there."""

    field: str
    one: Any
    other: Any


@dataclass(frozen=True)
class Explanation:
    """What two starts, by their keys, do not have in common."""

    one: str
    other: str
    differences: list[StartDifference]


@dataclass(frozen=True)
class PrunedStart:
    key: str
    snapshot_tag: str
    why: str


def explanation(answer: dict[str, Any]) -> Explanation:
    found = [read(StartDifference, each) for each in answer["differences"]]
    return read(Explanation, {**answer, "differences": found})
