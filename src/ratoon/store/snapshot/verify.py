"""Trust in files that were verified before, for the price of a `stat` each.

A disk layer is read against its digest once; its stamp goes into `verified.json`. That file is a
cache outside the manifest: where it is missing, stale or garbage, the layers are read again.
"""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ratoon import files
from ratoon.errors import Corrupt
from ratoon.files import Stamp
from ratoon.store.disk import qcow2
from ratoon.store.memory.compressed import plain_size
from ratoon.store.snapshot.snapshot import VERIFIED, Snapshot

log = logging.getLogger(__name__)

#: The stamps of verified files, by their names relative to the snapshot directory.
Stamps = dict[str, Stamp]

_STAMPS = TypeAdapter(Stamps)


def verify_disks(snapshot: Snapshot, covered: int = 0) -> None:
    """Check every disk layer: by its stamp if it is unchanged, else by reading and hashing it.

    Not those between the base and the lowest `covered`, which a flattened disk stands for. Corrupt
    names the layer's snapshot and the file: it is missing, or not of the size or content that the
    manifest says.
    """
    known = read_stamps(snapshot.path)
    stamps = dict(known)
    for index, layer in enumerate(snapshot.manifest.layers):
        if 0 < index < covered:
            continue
        path = snapshot.disk_path(index)
        stamp = _stamp(path, layer.tag, layer.disk.size)
        name = str(path.relative_to(snapshot.path))
        if known.get(name) == stamp:
            continue
        log.info("reading disk layer %s of snapshot %s", name, snapshot.manifest.tag)
        label = f"snapshot {layer.tag}, file {path}"
        if qcow2.file_digest(path) != layer.disk.digest:
            raise Corrupt(f"{label}: its content does not match its digest; it was damaged")
        qcow2.check_header(path, label=label)
        stamps[name] = stamp  # taken before reading: a change meanwhile shows next time
    if stamps != known:
        files.write_durable(snapshot.path / VERIFIED, dump_stamps(stamps))


def check_sizes(snapshot: Snapshot) -> None:
    """Check that every file of the snapshot is there and of the size that the manifest says.

    That of a memory layer is the plain one's, however it lies there. Corrupt names the layer's
    snapshot and the file.
    """
    manifest = snapshot.manifest
    _stamp(snapshot.vmstate_path, manifest.tag, manifest.vmstate.size)
    for index, layer in enumerate(manifest.layers):
        _check_memory_size(snapshot.memory_path(index), layer.tag, layer.memory.size)
        _stamp(snapshot.disk_path(index), layer.tag, layer.disk.size)


def read_stamps(directory: Path) -> Stamps:
    """The stamps recorded in a snapshot directory; none if there are none that make sense."""
    try:
        return _STAMPS.validate_json((directory / VERIFIED).read_bytes())
    except (FileNotFoundError, ValidationError):
        return {}


def dump_stamps(stamps: Stamps) -> bytes:
    """The content of `verified.json`."""
    return _STAMPS.dump_json(stamps, indent=2)


def _check_memory_size(path: Path, tag: str, size: int) -> None:
    label = f"snapshot {tag}, file {path}"
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise Corrupt(f"{label}: missing") from error
    if found != size and (found := plain_size(path, label=label)) != size:
        raise Corrupt(f"{label}: {found} bytes, but the manifest says {size}")


def _stamp(path: Path, tag: str, size: int) -> Stamp:
    try:
        stamp = Stamp.of(path, with_ctime=False)
    except FileNotFoundError as error:
        raise Corrupt(f"snapshot {tag}, file {path}: missing") from error
    if stamp.size != size:
        raise Corrupt(
            f"snapshot {tag}, file {path}: {stamp.size} bytes, but the manifest says {size}"
        )
    return stamp
