"""Packing: one snapshot, with its whole chain, into one file for another store.

What goes in is the head: its manifest, its device state and every layer. The snapshots below it
are not in it as snapshots, only as the layers that the head needs. So one pack is one snapshot,
and unpacking it is one rename; the same snapshot gives the same bytes, whatever else the store
holds; and no device state leaves the store that was not asked for. Who wants an ancestor as well
packs that too: its layers are not stored twice where both are unpacked.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from ratoon import files
from ratoon.errors import AlreadyExists, Corrupt, InvalidInput
from ratoon.store.memory.pageset import plain_content
from ratoon.store.pack.memory_check import verify_memory
from ratoon.store.pack.packfile import CHUNK, Contents, PackedFile, PackWriter, file_names
from ratoon.store.snapshot.manifest import encode
from ratoon.store.snapshot.progress import ByteProgress, Meter, unheard
from ratoon.store.snapshot.snapshot import MEMORY, Snapshot
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import check_sizes


@dataclass(frozen=True)
class Packed:
    """A pack that was made: `size` is that of the file, `content` that of all in it, in bytes."""

    path: Path
    size: int
    content: int


def pack(
    store: Store, tag: str, out: Path, *, force: bool = False, progress: ByteProgress = unheard
) -> Packed:
    """Write snapshot `tag` and its chain to the new file `out`; `force` replaces one.

    Everything is checked against its digest on the way: Corrupt names the snapshot and the file or
    page that is damaged. NotFound; AlreadyExists; InvalidInput: `out` is no place for a file.
    A failure leaves `out` as it was; a kill may leave a temporary file beside it. Memory layers
    are read twice, as their digests come before them.
    """
    snapshot = store.get(tag)
    _check_out(out, force)
    with snapshot.noticing_deletion():
        check_sizes(snapshot)
        layers = snapshot.manifest.layers
        memory = sum(layer.memory.size for layer in layers)
        content = memory + sum(layer.disk.size for layer in layers) + snapshot.manifest.vmstate.size
        meter = Meter(content + memory, progress)
        contents = _contents(snapshot, meter)
        with _replacing(out, force) as file:
            _write(PackWriter(file), snapshot, contents, meter)
    return Packed(out, out.stat().st_size, sum(file.size for file in contents.files))


def _contents(snapshot: Snapshot, meter: Meter) -> Contents:
    """What the pack will hold. Reads the memory layers and checks them."""
    manifest = snapshot.manifest
    raw = encode(manifest)
    digests = [
        (len(raw), blake3(raw).hexdigest()),
        (len(_manifest_digest(raw)), blake3(_manifest_digest(raw)).hexdigest()),
        (manifest.vmstate.size, manifest.vmstate.digest),
    ]
    labels = [
        f"snapshot {layer.tag}, file {snapshot.memory_path(number)}"
        for number, layer in enumerate(manifest.layers)
    ]
    memory = verify_memory(snapshot, labels, meter)
    for layer, digest in zip(manifest.layers, memory, strict=True):
        digests.append((layer.memory.size, digest))
        digests.append((layer.disk.size, layer.disk.digest))
    named = zip(file_names(snapshot.depth), digests, strict=True)
    packed = tuple(PackedFile(name=name, size=size, digest=value) for name, (size, value) in named)
    return Contents(tag=manifest.tag, files=packed)


def _manifest_digest(raw: bytes) -> bytes:
    return blake3(raw).hexdigest().encode() + b"\n"


def _write(writer: PackWriter, snapshot: Snapshot, contents: Contents, meter: Meter) -> None:
    writer.contents(contents)
    manifest, manifest_digest, *others = contents.files
    raw = encode(snapshot.manifest)
    for file, data in ((manifest, raw), (manifest_digest, _manifest_digest(raw))):
        writer.begin(file.name, file.size)
        writer.write(data)
        writer.end(file.size)
    for file in others:
        path = snapshot.path / file.name
        label = f"snapshot {_owner(snapshot, file.name)}, file {path}"
        writer.begin(file.name, file.size)
        hasher, left = blake3(), file.size
        for piece in _pieces(path, label):
            data = piece[:left]
            hasher.update(data)
            writer.write(data)
            left -= len(data)
            meter.add(len(data))
        if hasher.hexdigest() != file.digest:
            raise Corrupt(f"{label}: its content does not match its digest; it was damaged")
        writer.end(file.size)
    writer.finish()


def _pieces(path: Path, label: str) -> Iterator[bytes]:
    """The bytes of a file; a memory layer's are those of its plain form, however it lies there."""
    if path.name == MEMORY:
        yield from plain_content(path, label=label, piece=CHUNK)
        return
    with path.open("rb") as source:
        while data := source.read(CHUNK):
            yield data


def _owner(snapshot: Snapshot, name: str) -> str:
    """The tag of the snapshot that added the file `name`."""
    _, *layer = name.split("/")
    return snapshot.manifest.layers[int(layer[0]) if layer else snapshot.depth].tag


def _check_out(out: Path, force: bool) -> None:
    if not out.parent.is_dir():
        raise InvalidInput(f"{out}: there is no directory {out.parent}")
    try:
        mode = out.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise InvalidInput(f"{out}: there is something else than a file; choose another name")
    if not force:
        raise AlreadyExists(f"{out} exists already; choose another name, or replace it (--force)")


@contextmanager
def _replacing(out: Path, force: bool) -> Iterator[BinaryIO]:
    """A file that becomes `out`, durably, when the block ends; gone if it fails.

    Nobody else may read it: it holds a guest's memory.
    """
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check_out(out, force)  # nobody else has made one meanwhile
        temporary.rename(out)
        files.fsync_path(out.parent)
    finally:
        temporary.unlink(missing_ok=True)
