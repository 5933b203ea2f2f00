"""Named volumes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ratoon.daemon.models.common import Answer, Request


class CreateVolume(Request):
    """`name`: up to 64 lower-case letters, digits, `-`, `_` and `.`."""

    name: Annotated[str, Field(min_length=1, max_length=64)]


class VolumeInfo(Answer):
    """`bytes` is what its files take on the disk, `path` where they are on the daemon's host."""

    name: str
    path: str
    bytes: int
    created_at_unix: float
