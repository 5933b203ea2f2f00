"""Flattened disks: many layers of a chain as one, in the directory of images.

Each layer that QEMU opens costs a start some two milliseconds and a descriptor. So the layers above
the base become one file, ROOT.qcow2, named after the disk root of the chain up to there. It lies on
the base as they do: forks of all heads go on sharing the base's page cache, and it stays small.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ratoon import files
from ratoon.errors import Corrupt
from ratoon.store.disk.flatten import merge
from ratoon.store.disk.qcow2 import file_digest
from ratoon.store.memory.cache import DISK, ImageCache, OpenImage
from ratoon.store.snapshot.manifest import Manifest
from ratoon.store.snapshot.snapshot import Snapshot


@dataclass(frozen=True)
class Covering:
    """A flattened disk, held open, and how many of a chain's lowest layers it has, with the base's.

    `root` is that of those layers.
    """

    image: OpenImage
    root: str
    covered: int


class FlatDisks(ImageCache):
    """The flattened disks of a store. All methods block."""

    def __init__(self, directory: Path, budget: int | None = None) -> None:
        """`budget`: bytes that all images may take; None for what `image_budget` says."""
        super().__init__(directory, DISK, budget)

    def find(self, root: str) -> Path | None:
        """The flattened disk of `root`, or None where there is none, or not the one stamped."""
        image = self._open(root)
        if image is None:
            return None
        image.close()
        return image.path

    def nearest(self, manifest: Manifest) -> Covering | None:
        """The flattened disk that has the most of a chain's layers; it counts as used now."""
        roots = manifest.disk_roots
        for covered in range(len(roots), 2, -1):  # one layer above the base is flat as it is
            root = roots[covered - 1]
            if image := self._open(root):
                self._used(root)
                return Covering(image, root, covered)
        return None

    def make(self, source: Snapshot, room: Path) -> Path:
        """The flattened disk of `source`, made if it is not there; its layers are read and checked.

        `room` is an empty directory for links, so that `source` may be deleted meanwhile. Corrupt
        names the layer's snapshot and the file; NotFound: it was deleted before. HostError: no
        `qemu-img`. A failure leaves nothing behind.
        """
        root = source.manifest.disk_root

        def write(temporary: Path) -> str:
            layers = _links(source, room)
            covering = self.nearest(source.manifest)
            if covering is None:
                merge(layers[:1], layers[1:], temporary)
            else:
                with covering.image as image:
                    below = room / "covered"
                    files.copy_sparse(Path(f"/proc/self/fd/{image.fd}"), below)
                merge(layers[:1], [below, *layers[covering.covered :]], temporary)
            return file_digest(temporary)

        return self._make_once(root, lambda: self.find(root), write)

    def digest(self, root: str) -> str | None:
        """The BLAKE3 (hex) of a flattened disk as it was made; None if that is not known."""
        with suppress(FileNotFoundError):
            return self._stamp_file(root).read_text().partition("\n")[2] or None
        return None


def _links(source: Snapshot, room: Path) -> Sequence[Path]:
    """The disk layers of `source` under other names, each read against its digest, base first.

    Not the base: it is in no flattened disk.
    """
    links = []
    for number, layer in enumerate(source.manifest.layers):
        path, link = source.disk_path(number), room / f"{number}.qcow2"
        label = f"snapshot {layer.tag}, file {path}"
        with source.noticing_deletion():
            try:
                files.link_or_copy(path, link)
            except FileNotFoundError:
                raise Corrupt(f"{label}: missing") from None
        if number and file_digest(link) != layer.disk.digest:
            raise Corrupt(f"{label}: its content does not match its digest; it was damaged")
        links.append(link)
    return links
