"""What may be chosen about a daemon."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ratoon.units import MIB


@dataclass(frozen=True)
class Settings:
    """`token`: what requests must bear, if any."""

    token: str | None = None
    #: Branches under way at a time; more are refused.
    branch_cap: int = 4
    #: Bytes of a request's body, where it is not a file that is passed on piece by piece.
    max_body_bytes: int = 8 * MIB
    #: Seconds until a request must have begun its answer.
    request_seconds: float = 3600.0
    #: Where the kernels and disks lie that a base may be made of.
    image_roots: tuple[Path, ...] = ()
    #: Where the directories lie that requests over TCP may have as volumes.
    volume_roots: tuple[Path, ...] = ()
    #: Where requests are written down, if anywhere.
    audit_log: Path | None = None
