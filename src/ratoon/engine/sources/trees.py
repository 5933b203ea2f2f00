"""Root file systems as they are: a tarball, or a directory of this host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blake3 import blake3

from ratoon import files
from ratoon.artifacts import Progress, build_once
from ratoon.engine.sources.directory import Directory, walk
from ratoon.engine.sources.disk import FILE_SYSTEM, make_disk
from ratoon.engine.sources.furnish import TEXTS
from ratoon.engine.sources.host_files import held
from ratoon.engine.sources.image import Image
from ratoon.engine.sources.layers import Layers
from ratoon.engine.sources.remembered import recall, remember
from ratoon.errors import Conflict, InvalidInput
from ratoon.store.snapshot.image_config import ImageConfig


@dataclass(frozen=True)
class Tree:
    """What is called `tar:PATH` or `dir:PATH`; it has no configuration."""

    kind: Literal["tar", "dir"]
    path: Path

    @classmethod
    def parse(cls, reference: str) -> Tree | None:
        """None: the reference is to an image of another kind. InvalidInput: it names no path."""
        kind, colon, rest = reference.partition(":")
        if not colon or kind not in ("tar", "dir"):
            return None
        if not rest:
            raise InvalidInput(f"{reference} names no path")
        return cls("tar" if kind == "tar" else "dir", Path(rest).absolute())

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.path}"

    def resolve(self, *, refresh: bool, roots: Sequence[Path] | None, progress: Progress) -> Image:
        """See `resolve.resolve`. Of a directory, names, sizes and times are its identity."""
        with self._held(roots) as path:
            if self.kind == "dir":
                return self._image(_identity(path))
            stamp = str(files.Stamp.of(path, with_ctime=True))
            found = None if refresh else recall(self.name, stamp)
            if found is None:
                progress(f"reading {self.name}")
                found = self._image(_digest(path))
                remember(found, stamp)
            return found

    def root_disk(
        self, image: Image, disk_bytes: int, roots: Sequence[Path] | None, progress: Progress
    ) -> Path:
        """See `resolve.root_disk`. Conflict: it is not what it was when it was resolved."""
        inputs = {
            "format": 4,
            "tree": image.digest,
            "disk_bytes": disk_bytes,
            "file_system": FILE_SYSTEM,
            "texts": TEXTS,
        }

        def build(room: Path) -> None:
            progress(f"copying {self.name}")
            with self._held(roots) as path:
                try:
                    self._make(path, room, disk_bytes)
                finally:  # a change explains any failure
                    if (_digest if self.kind == "tar" else _identity)(path) != image.digest:
                        raise Conflict(f"{self.name} was changed while it was read; try again")

        return build_once("root-images", inputs, build, progress) / "disk.qcow2"

    def _make(self, path: Path, room: Path, disk_bytes: int) -> None:
        if self.kind == "tar":
            layers = Layers(self.name, disk_bytes)
            layers.add(path, str(self.path), whiteouts=False)
            make_disk(room, disk_bytes, self.name, layers.tree, layers.contents)
        else:
            directory = Directory(path)
            make_disk(room, disk_bytes, self.name, directory.tree, directory.contents)

    @contextmanager
    def _held(self, roots: Sequence[Path] | None) -> Iterator[Path]:
        with held(self.path, roots, directory=self.kind == "dir") as path:
            yield path

    def _image(self, digest: str) -> Image:
        return Image(self.name, digest, ImageConfig())


def _digest(path: Path) -> str:
    return f"blake3:{blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()}"


def _identity(root: Path) -> str:
    """Of all that is below `root`, on its file system: a change of anything changes it."""
    found = blake3()
    for path, _, _, status in walk(root):
        told = (
            path,
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_rdev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
        found.update(repr(told).encode())
    return f"blake3:{found.hexdigest()}"
