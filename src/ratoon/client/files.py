"""How requests and answers speak of files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ratoon.client.answers import read
from ratoon.errors import InvalidInput

#: A path in a guest.
GuestPath = str | bytes | os.PathLike[str]
#: Called with the bytes that have been carried so far.
OnBytes = Callable[[int], object]


@dataclass(frozen=True)
class FileInfo:
    """A file in a guest. `mode` is its permission bits, `target` what a symbolic link says."""

    path: str
    type: Literal[
        "file", "directory", "symlink", "fifo", "socket", "character device", "block device"
    ]
    size_bytes: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    target: str | None


@dataclass(frozen=True)
class FileEvent:
    """Something happened to `path`.

    renamed: it was `old_path` before. overflow: more happened below `path` than could be told; look
    for yourself. What was moved in from elsewhere counts as created, what was moved away as
    removed.
    """

    kind: Literal["created", "modified", "removed", "renamed", "overflow"]
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


def guest_path(path: GuestPath) -> str:
    """As a query has it; InvalidInput if no file can be called so."""
    raw = os.fspath(path)
    text = raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else raw
    if not text or "\0" in text:
        raise InvalidInput(f"{text!r} cannot be a path in a guest")
    return text


def octal(mode: int | None) -> str | None:
    return None if mode is None else f"{mode:03o}"


def file_info(answer: dict[str, Any]) -> FileInfo:
    return read(FileInfo, {**answer, "mode": int(answer["mode"], 8)})
