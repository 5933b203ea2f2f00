"""Unpacking: a pack from anywhere becomes a snapshot of this store, or nothing does.

All of it is written to a staging directory and checked there: the names, order and sizes that its
own manifest asks for, every byte and page against its digest, the chain by its memory roots, disks
for headers that name other files. That makes a pack sound, not harmless: it holds a guest's memory
and a device state that QEMU will parse, so unpack only what comes from somebody you trust.

The digests protect from damage, not from malice: who made the pack made the digests too. What is
checked against malice is whatever would reach beyond the guest: names, sizes, RAM, disk headers.
"""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

from ratoon import files
from ratoon.errors import (
    AlreadyExists,
    Corrupt,
    HostError,
    Incompatible,
    InvalidInput,
    NotFound,
)
from ratoon.files import Stamp
from ratoon.store.disk import qcow2
from ratoon.store.memory.compressed import plain_size
from ratoon.store.memory.pageset import plain_content
from ratoon.store.pack.memory_check import verify_memory
from ratoon.store.pack.packfile import (
    CHUNK,
    CONTENTS,
    MAX_MANIFEST,
    Contents,
    PackedFile,
    PackReader,
    file_names,
    layer_names,
)
from ratoon.store.snapshot.manifest import Manifest, check_tag, decode
from ratoon.store.snapshot.progress import ByteProgress, Meter, unheard
from ratoon.store.snapshot.snapshot import (
    ANCESTRY,
    MANIFEST,
    MANIFEST_DIGEST,
    MEMORY,
    VERIFIED,
    Snapshot,
)
from ratoon.store.snapshot.staging import Staging
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import Stamps, dump_stamps

_ZEROS = bytes(CHUNK)

#: A fork reads the device state into memory; QEMU's are some hundred KiB.
_MAX_VMSTATE = 64 << 20
#: The RAM that a manifest claims costs nothing to write, but to prove and to fork its chain takes
#: all its pages' digests, 1/128 of it. So it may be this many times what the host has.
_MAX_RAM_OF_HOST = 4


@dataclass(frozen=True)
class Unpacked:
    """A snapshot from a pack; of the bytes of its layers, those written and those linked."""

    snapshot: Snapshot
    stored: int
    shared: int


def unpack(
    store: Store,
    file: Path,
    tag: str | None = None,
    *,
    force: bool = False,
    progress: ByteProgress = unheard,
) -> Unpacked:
    """Make the snapshot in the pack `file` one of this store, under its own tag or as `tag`.

    Layers that the store has already are linked, once they have been read and found to be sound.
    Under another tag than in the pack it is another snapshot: it gets an id of its own, so what
    was made from the original does not count as made from it. `force` replaces the snapshot of the
    tag, in one instant, once all is verified; what was made from that one stays whole.

    Corrupt, Incompatible, InvalidInput: the pack is not sound, or not for this Ratoon or host.
    AlreadyExists, InFlight: its tag, or its id under another tag. HostError: no room. NotFound: no
    such file. A failure leaves the store as it was; a kill may leave staging litter that the next
    start removes.
    """
    if tag is not None:
        check_tag(tag)
    label = f"pack {file}"
    with _opened(file, label) as stream:
        reader = PackReader(stream, label)
        contents = reader.contents()
        with store.stage(tag or contents.tag, replace=force) as staging:
            manifest = _named(_read_manifest(reader, contents, label), staging.tag)
            _check_identity(store, manifest)
            unpacked = _receive(store, staging, manifest, reader, contents, label, progress)
            if force:
                staging.replace(manifest, store.lock)
            else:
                staging.publish(manifest)
    return unpacked


def _receive(
    store: Store,
    staging: Staging,
    manifest: Manifest,
    reader: PackReader,
    contents: Contents,
    label: str,
    progress: ByteProgress,
) -> Unpacked:
    """Write and check all files below the manifest; the snapshot that they are to be."""
    _, _, vmstate, *layers = contents.files
    depth = len(manifest.layers) - 1
    existing = _existing_layers(store, manifest, layers)
    new = sum(file.size for file in layers if file.name not in existing)
    free = shutil.disk_usage(staging.path).free
    if new > free:
        raise HostError(
            f"{label}: needs {new} bytes, but {store.home} has {free} free; delete snapshots first"
        )
    total = vmstate.size + sum(file.size for file in layers)
    meter = Meter(total + sum(layer.memory.size for layer in manifest.layers), progress)
    if depth:
        (staging.path / ANCESTRY).mkdir(mode=0o700)
    for layer in range(depth):
        (staging.path / ANCESTRY / str(layer)).mkdir(mode=0o700)
    _write(staging.path / vmstate.name, vmstate, reader, label, meter)
    stamps: Stamps = {}
    disks = {disk for _, disk in layer_names(depth)}
    shared = 0
    for file in layers:
        path = staging.path / file.name
        if _link(existing.get(file.name, ()), path, file):
            shared += file.size
            _compare(file, reader, label, meter)
        else:
            _write(path, file, reader, label, meter)
        if file.name in disks:
            qcow2.check_header(path, label=f"{label}, {file.name}")
            stamps[file.name] = Stamp.of(path, with_ctime=False)
    reader.finish()
    labels = [f"{label}, {memory}" for memory, _ in layer_names(depth)]
    verify_memory(Snapshot(staging.path, manifest), labels, meter)
    (staging.path / VERIFIED).write_bytes(dump_stamps(stamps))
    final = Snapshot(store.snapshots / staging.tag, manifest)
    return Unpacked(final, total - vmstate.size - shared, shared)


def _read_manifest(reader: PackReader, contents: Contents, label: str) -> Manifest:
    """The manifest, from the next two members; it agrees with `contents` and suits this host.

    Corrupt, ChainMismatch, Incompatible.
    """
    manifest_file, digest_file = contents.files[:2]
    raw = _read_small(reader, manifest_file, MAX_MANIFEST, label)
    digest = _read_small(reader, digest_file, 65, label)
    if digest != manifest_file.digest.encode() + b"\n":
        raise Corrupt(f"{label}: {MANIFEST_DIGEST} is not the digest of {MANIFEST}")
    manifest = decode(raw, manifest_file.digest, label=f"{label}, {MANIFEST}")
    _check_agreement(manifest, contents, label)
    _check_machine(manifest, label)
    return manifest


def _read_small(reader: PackReader, file: PackedFile, limit: int, label: str) -> bytes:
    if file.size > limit:
        raise Corrupt(f"{label}: {file.name} has {file.size} bytes, more than it may")
    raw = b"".join(reader.body(file))
    if blake3(raw).hexdigest() != file.digest:
        raise _wrong_digest(label, file)
    return raw


def _check_agreement(manifest: Manifest, contents: Contents, label: str) -> None:
    """Both documents must speak of the same files. Memory's index digest is not a whole file's."""
    names = file_names(len(manifest.layers) - 1)
    if manifest.tag != contents.tag or [file.name for file in contents.files] != names:
        raise Corrupt(f"{label}: {CONTENTS} is for another snapshot than {MANIFEST}")
    packed = {file.name: file for file in contents.files}
    _, _, vmstate, *_ = contents.files
    same = [(vmstate, manifest.vmstate.size, manifest.vmstate.digest)]
    for layer, (memory, disk) in zip(
        manifest.layers, layer_names(len(manifest.layers) - 1), strict=True
    ):
        same.append((packed[memory], layer.memory.size, packed[memory].digest))
        same.append((packed[disk], layer.disk.size, layer.disk.digest))
    for file, size, digest in same:
        if (file.size, file.digest) != (size, digest):
            raise Corrupt(f"{label}: {CONTENTS} and {MANIFEST} disagree about {file.name}")


def _check_machine(manifest: Manifest, label: str) -> None:
    if manifest.vmstate.size > _MAX_VMSTATE:
        raise Corrupt(f"{label}: {manifest.vmstate.size} bytes of device state are too much")
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if manifest.machine.ram_bytes > _MAX_RAM_OF_HOST * host:
        raise Incompatible(
            f"{label}: its machine has {manifest.machine.ram_bytes} bytes of RAM, too much for "
            f"this host, which has {host}"
        )


def _named(manifest: Manifest, tag: str) -> Manifest:
    """The manifest under the tag `tag`; if that is another, with another id."""
    if tag == manifest.tag:
        return manifest
    names = {"tag": tag, "id": uuid.uuid4().hex}
    own = manifest.layers[-1].model_copy(update=names)
    return manifest.model_copy(update={**names, "layers": (*manifest.layers[:-1], own)})


def _check_identity(store: Store, manifest: Manifest) -> None:
    """An id stands for one snapshot: who descends from whom is told by it."""
    tag, identity = manifest.tag, manifest.id
    found = store.find(lambda each: each.manifest.id == identity and each.manifest.tag != tag)
    if found:
        raise AlreadyExists(
            f"snapshot {tag} is here already, as {found.manifest.tag}; "
            "for a second one choose another tag (--tag)"
        )


def _existing_layers(
    store: Store, manifest: Manifest, layers: list[PackedFile]
) -> dict[str, list[Path]]:
    """For each file of a layer, the files of the store's snapshots that say they are the same."""
    known: defaultdict[tuple[str, int], list[Path]] = defaultdict(list)
    for entry in store.list():
        if isinstance(entry, Snapshot):
            for number, layer in enumerate(entry.manifest.layers):
                memory, disk = layer.memory, layer.disk
                known[memory.index_digest, memory.size].append(entry.memory_path(number))
                known[disk.digest, disk.size].append(entry.disk_path(number))
    wanted = [
        key
        for layer in manifest.layers
        for key in (
            (layer.memory.index_digest, layer.memory.size),
            (layer.disk.digest, layer.disk.size),
        )
    ]
    return {file.name: known[key] for file, key in zip(layers, wanted, strict=True) if key in known}


def _link(candidates: list[Path] | tuple[()], path: Path, file: PackedFile) -> bool:
    """Link the first candidate that is what it should be; its name says the least about that."""
    seen: set[tuple[int, int]] = set()
    for candidate in candidates:
        try:
            st = candidate.stat()
            if (st.st_dev, st.st_ino) in seen:
                continue
            seen.add((st.st_dev, st.st_ino))
            if _is_content(candidate, st.st_size, file):
                files.link_or_copy(candidate, path)
                return True
        except FileNotFoundError:  # deleted meanwhile
            continue
    return False


def _is_content(path: Path, size: int, file: PackedFile) -> bool:
    """Whether a file of the store has the content of a member, if only compressed."""
    if path.name != MEMORY or size == file.size:
        return size == file.size and qcow2.file_digest(path) == file.digest
    label = str(path)
    try:
        if plain_size(path, label=label) != file.size:
            return False
        hasher = blake3()
        for data in plain_content(path, label=label, piece=CHUNK):
            hasher.update(data)
    except (Corrupt, Incompatible):
        return False
    return hasher.hexdigest() == file.digest


def _write(path: Path, file: PackedFile, reader: PackReader, label: str, meter: Meter) -> None:
    """Write a member to the new file `path`, zeros as holes."""
    hasher = blake3()
    with path.open("xb") as out:
        for data in reader.body(file):
            hasher.update(data)
            meter.add(len(data))
            if data == _ZEROS:
                out.seek(len(data), os.SEEK_CUR)
            else:
                out.write(data)
        out.truncate(file.size)
        os.fchmod(out.fileno(), 0o444)
    if hasher.hexdigest() != file.digest:
        raise _wrong_digest(label, file)


def _compare(file: PackedFile, reader: PackReader, label: str, meter: Meter) -> None:
    """Read a member that is here already; what is not needed must be sound as well."""
    hasher = blake3()
    for data in reader.body(file):
        hasher.update(data)
        meter.add(len(data))
    if hasher.hexdigest() != file.digest:
        raise _wrong_digest(label, file)


@contextmanager
def _opened(file: Path, label: str) -> Iterator[BinaryIO]:
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"no file {file}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidInput(f"{label}: not a regular file")
    with os.fdopen(fd, "rb") as stream:
        yield stream


def _wrong_digest(label: str, file: PackedFile) -> Corrupt:
    return Corrupt(f"{label}: the content of {file.name} does not match its digest")
