"""Files in a guest."""

from __future__ import annotations

from ratoon.daemon.models.common import Answer
from ratoon.guest.files import FileType


class FileInfo(Answer):
    """A file in a guest. `mode` is its permission bits in octal, `target` what a link says."""

    path: str
    type: FileType
    size_bytes: int
    mode: str
    uid: int
    gid: int
    mtime_ns: int
    target: str | None


class Written(Answer):
    """`size_bytes`: of what was sent."""

    size_bytes: int


class Extracted(Answer):
    """Of an archive: the things in it, its bytes, and what was left out of it, and why."""

    entries: int
    size_bytes: int
    left_out: list[str]
    left_out_count: int
