"""From what the user calls an image to the image, and to a disk with its root file system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ratoon.artifacts import Progress, silent
from ratoon.engine.sources.debian import Debian
from ratoon.engine.sources.image import Image
from ratoon.engine.sources.oci import OciImage
from ratoon.engine.sources.trees import Tree


def resolve(
    reference: str,
    *,
    refresh: bool = False,
    roots: Sequence[Path] | None = None,
    progress: Progress = silent,
) -> Image:
    """The image of a reference: what it is exactly, and its configuration; blocks.

    What was found once is remembered, until `refresh`: a tag stays what it was, a Debian is not
    built of newer packages. `roots`: the directories of this host that images may lie below; None:
    anywhere.
    InvalidInput: it can be no image. NotFound: there is none. Corrupt: it is not what its digests
    say. HostError: it cannot be fetched.
    """
    return _source(reference).resolve(refresh=refresh, roots=roots, progress=progress)


def root_disk(
    image: Image,
    disk_bytes: int,
    progress: Progress = silent,
    *,
    roots: Sequence[Path] | None = None,
) -> Path:
    """A qcow2 file with ext4 of `disk_bytes`, from the cache, or made now; blocks.

    InvalidInput: the image does not fit on it. HostError: it cannot be made here.
    """
    return _source(image.name).root_disk(image, disk_bytes, roots, progress)


def _source(reference: str) -> Debian | OciImage | Tree:
    on_host = OciImage.on_host(reference) or Tree.parse(reference)
    return on_host or Debian.parse(reference) or OciImage.in_registry(reference)
