"""What is told of files in a guest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ratoon.api.answers import READ

FileType = Literal[
    "file", "directory", "symlink", "fifo", "socket", "character device", "block device"
]

FileEventKind = Literal["created", "modified", "removed", "renamed", "overflow"]


@dataclass(frozen=True)
class FileInfo:
    """A file in a guest. `mode` is its permission bits, `target` what a link says."""

    path: str
    type: FileType
    size_bytes: int
    #: In octal, in JSON.
    mode: int = field(metadata={READ: lambda text: int(text, 8)})
    uid: int
    gid: int
    mtime_ns: int
    target: str | None


@dataclass(frozen=True)
class FileEvent:
    """Something happened to `path`.

    renamed: it was `old_path` before. overflow: more happened below `path` than could be told; look
    for yourself. modified: its content; a run of writes may count as one. What was moved in from
    elsewhere counts as created, what was moved away as removed.
    """

    kind: FileEventKind
    path: str
    is_directory: bool
    old_path: str | None = None


@dataclass(frozen=True)
class Transfer:
    """What a transfer carried: files, directories and links, and bytes of the archive they made.

    `left_out` says of each thing that it did not carry why; the first thousand of them.
    """

    entries: int
    size_bytes: int
    left_out: list[str]
    left_out_count: int
