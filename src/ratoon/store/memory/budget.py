"""The byte budget of the images: how much they may take, and which go first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ratoon.units import size_from_env

VARIABLE = "RATOON_IMAGE_BUDGET"


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

    What RATOON_IMAGE_BUDGET says, else a quarter of the file system. InvalidInput: that is no size.
    """
    if (size := size_from_env(VARIABLE)) is not None:
        return size
    status = os.statvfs(directory)
    return status.f_blocks * status.f_frsize // 4


def evictable(images: Sequence[CachedImage], *, keep: str) -> list[CachedImage]:
    """The images whose removal gains space, least recently used first; the root `keep` stays."""
    candidates = (image for image in images if image.allocated_bytes and image.root != keep)
    return sorted(candidates, key=lambda image: image.last_used_ns)
