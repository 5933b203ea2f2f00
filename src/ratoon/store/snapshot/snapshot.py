"""A snapshot directory: complete by itself, wherever it lies.

::

    manifest.json        identity, parent, roots, machine, layers, guest, timings
    manifest.b3          digest of the manifest's raw bytes
    verified.json        which disk layers were verified as they are now: a cache
    memory.bin           its own memory layer
    vmstate              its device state, compressed
    disk.qcow2           its own disk layer
    ancestry/0/…         the layers below (hard links), base first

One lies in the store under its tag; each sandbox holds a twin of the one it was forked from, so
deleting the tag takes nothing away from it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from ratoon import files
from ratoon.compression import LEVEL, decompressed, zstd
from ratoon.errors import Corrupt, NotFound
from ratoon.store.snapshot.manifest import Manifest, decode

MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.b3"
VERIFIED = "verified.json"
MEMORY = "memory.bin"
VMSTATE = "vmstate"
DISK = "disk.qcow2"
ANCESTRY = "ancestry"
#: Bytes that no device state has; one of QEMU has some 200 KB.
MAX_VMSTATE = 64 << 20


@dataclass(frozen=True)
class Snapshot:
    """A snapshot directory and what its manifest says. Layers count from 0, the base."""

    path: Path
    manifest: Manifest

    @property
    def depth(self) -> int:
        """The number of layers below its own."""
        return len(self.manifest.layers) - 1

    @property
    def vmstate_path(self) -> Path:
        return self.path / VMSTATE

    def memory_path(self, layer: int) -> Path:
        return self._layer_directory(layer) / MEMORY

    def disk_path(self, layer: int) -> Path:
        return self._layer_directory(layer) / DISK

    @contextmanager
    def noticing_deletion(self) -> Iterator[None]:
        """What fails in the block because the snapshot was deleted meanwhile is NotFound."""
        try:
            yield
        except (Corrupt, FileNotFoundError) as error:
            if self.path.exists():
                raise
            raise NotFound(f"snapshot {self.manifest.tag} was deleted meanwhile") from error

    def _layer_directory(self, layer: int) -> Path:
        if not 0 <= layer <= self.depth:
            raise IndexError(f"snapshot {self.manifest.tag} has no layer {layer}")
        return self.path if layer == self.depth else self.path / ANCESTRY / str(layer)


def load_snapshot(path: Path) -> Snapshot:
    """The snapshot in the directory `path`; reads its manifest and no layer.

    Corrupt: the manifest or its digest is missing or damaged. Incompatible: another format.
    """
    label = f"snapshot {path.name}, file {path}/"
    digest = _read(path / MANIFEST_DIGEST, label + MANIFEST_DIGEST)
    if not re.fullmatch(rb"[0-9a-f]{64}\n", digest):
        raise Corrupt(f"{label}{MANIFEST_DIGEST}: not a digest; it was damaged or edited")
    raw = _read(path / MANIFEST, label + MANIFEST)
    return Snapshot(path, decode(raw, digest.decode().strip(), label=label + MANIFEST))


def packed_vmstate(state: bytes) -> bytes:
    """What the file `vmstate` holds of a device state, which is mostly zeros."""
    return zstd.compress(state, LEVEL)


def read_vmstate(snapshot: Snapshot) -> bytes:
    """The device state, verified. Corrupt: missing, or not what the manifest's digest says."""
    label = f"snapshot {snapshot.manifest.tag}, file {snapshot.vmstate_path}"
    raw = _read(snapshot.vmstate_path, label)
    if blake3(raw).hexdigest() != snapshot.manifest.vmstate.digest:
        raise Corrupt(f"{label}: its content does not match its digest; it was damaged")
    return decompressed(raw, MAX_VMSTATE, label)


def link_snapshot(source: Snapshot, target: Path) -> Snapshot:
    """Make the new directory `target` a complete twin of `source`, by hard links.

    If this fails, `target` is gone again. FileExistsError: it was there before. Corrupt: a file of
    `source` is missing. NotFound: it was deleted meanwhile.
    """
    target.mkdir(mode=0o700)
    try:
        for name in (MANIFEST, MANIFEST_DIGEST, VMSTATE, MEMORY, DISK):
            link_file(source, source.path / name, target / name)
        with suppress(FileNotFoundError):  # a cache, and replaced whole: never written through
            files.link_or_copy(source.path / VERIFIED, target / VERIFIED)
        if source.depth:
            (target / ANCESTRY).mkdir(mode=0o700)
        for layer in range(source.depth):
            link_layer(source, layer, target / ANCESTRY / str(layer))
    except BaseException:
        shutil.rmtree(target)
        raise
    return replace(source, path=target)


def link_layer(source: Snapshot, layer: int, directory: Path) -> None:
    """Make `directory` and hard-link the memory and the disk file of one layer into it."""
    directory.mkdir(mode=0o700)
    found = source.memory_path(layer).parent
    for name in (MEMORY, DISK):
        link_file(source, found / name, directory / name)


def link_file(source: Snapshot, path: Path, target: Path) -> None:
    """Hard-link one file of `source`. Corrupt: `source` lacks it. NotFound: all of it is gone."""
    with source.noticing_deletion():
        try:
            files.link_or_copy(path, target)
        except FileNotFoundError as error:
            raise Corrupt(f"snapshot {source.manifest.tag}, file {path}: missing") from error


def _read(path: Path, label: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise Corrupt(f"{label}: missing") from error
