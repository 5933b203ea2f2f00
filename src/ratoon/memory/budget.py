"""The byte budget of the images: how much they may take, and which go first."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ratoon.errors import InvalidInput

VARIABLE = "RATOON_IMAGE_BUDGET"

_SIZE = re.compile(r"(\d+) ?(?:([KMGT])(?:i?B)?|B)?", re.IGNORECASE)
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True)
class CachedImage:
    """An image as the budget sees it."""

    root: str
    #: What it takes on the disk: holes are free, an extent that is shared counts in full.
    allocated_bytes: int
    #: When a fork last mapped it; 0 if it is not one that a fork could map.
    last_used_ns: int


def image_budget(directory: Path) -> int:
    """Bytes that the images in `directory` may take together.

    RATOON_IMAGE_BUDGET (bytes, or with K, M, G or T for powers of 1024), else a quarter of the file
    system. InvalidInput: the variable is not a size.
    """
    if text := os.environ.get(VARIABLE):
        try:
            return parse_size(text)
        except InvalidInput as error:
            raise InvalidInput(f"{VARIABLE}: {error}") from None
    status = os.statvfs(directory)
    return status.f_blocks * status.f_frsize // 4


def parse_size(text: str) -> int:
    """Bytes from `1048576`, `1024K`, `1M`, `1MiB`. InvalidInput."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidInput(f"{text!r} is not a size; write bytes, or a number with K, M, G or T")
    return int(match[1]) << _SHIFTS[(match[2] or "").upper()]


def evictable(images: Sequence[CachedImage], *, keep: str) -> list[CachedImage]:
    """The images whose removal gains space, least recently used first; the root `keep` stays."""
    candidates = (image for image in images if image.allocated_bytes and image.root != keep)
    return sorted(candidates, key=lambda image: image.last_used_ns)
