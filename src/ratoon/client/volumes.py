"""Volumes, as the daemon tells of them, and as a person writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ratoon.errors import InvalidInput


@dataclass(frozen=True)
class Volume:
    """A directory of the daemon's host, or a named volume, that is mounted at `target`."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class VolumeInfo:
    """A named volume. `bytes` is what its files take on the disk, `path` where they are."""

    name: str
    path: str
    bytes: int
    created_at_unix: float


def volume_request(text: str) -> dict[str, Any]:
    """`SOURCE:TARGET` or `SOURCE:TARGET:ro` as a request has it; InvalidInput."""
    source, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    if not source or not target or mode not in ("", "ro", "rw"):
        raise InvalidInput(f"{text!r}: write SOURCE:TARGET or SOURCE:TARGET:ro")
    return {"source": source, "target": target, "read_only": mode == "ro"}
