"""From what the user calls an image to the image, and to a disk with its root file system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ratoon.artifacts import Progress, silent
from ratoon.errors import NotFound
from ratoon.sources.debian import Debian
from ratoon.sources.image import Image


def resolve(
    reference: str,
    *,
    refresh: bool = False,
    roots: Sequence[Path] | None = None,
    progress: Progress = silent,
) -> Image:
    """The image of a reference: what it is exactly, and its configuration; blocks.

    What was found once is remembered, until `refresh`. `roots`: directories of this host that
    images may be taken from; None: all.
    InvalidInput: it can be no image. NotFound: there is none. HostError: it cannot be looked up.
    """
    return _source(reference).resolve()


def root_disk(image: Image, disk_bytes: int, progress: Progress = silent) -> Path:
    """A qcow2 file with ext4 of `disk_bytes`, from the cache, or made now; blocks."""
    return _source(image.name).root_disk(disk_bytes, progress)


def _source(reference: str) -> Debian:
    if debian := Debian.parse(reference):
        return debian
    raise NotFound(f"no image {reference}; there is: debian")
