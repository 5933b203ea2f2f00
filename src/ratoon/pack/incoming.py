"""What a pack must prove before it is let in: its documents agree, and this host can have it.

The digests protect from damage, not from malice: who made the pack made the digests too. What is
checked against malice is whatever would reach beyond the guest: names, sizes, RAM, disk headers.
"""

from __future__ import annotations

import os

from blake3 import blake3

from ratoon.errors import Corrupt, Incompatible
from ratoon.pack.packfile import (
    CONTENTS,
    MAX_MANIFEST,
    Contents,
    PackedFile,
    PackReader,
    file_names,
    layer_names,
)
from ratoon.snapshot.manifest import Manifest, decode
from ratoon.snapshot.snapshot import MANIFEST, MANIFEST_DIGEST

#: A fork reads the device state into memory; QEMU's are some hundred KiB.
MAX_VMSTATE = 64 << 20
#: The RAM that a manifest claims costs nothing to write, but to prove and to fork its chain takes
#: all its pages' digests, 1/128 of it. So it may be this many times what the host has.
MAX_RAM_OF_HOST = 4


def read_manifest(reader: PackReader, contents: Contents, label: str) -> Manifest:
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


def wrong_digest(label: str, file: PackedFile) -> Corrupt:
    return Corrupt(f"{label}: the content of {file.name} does not match its digest")


def _read_small(reader: PackReader, file: PackedFile, limit: int, label: str) -> bytes:
    if file.size > limit:
        raise Corrupt(f"{label}: {file.name} has {file.size} bytes, more than it may")
    raw = b"".join(reader.body(file))
    if blake3(raw).hexdigest() != file.digest:
        raise wrong_digest(label, file)
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
    if manifest.vmstate.size > MAX_VMSTATE:
        raise Corrupt(f"{label}: {manifest.vmstate.size} bytes of device state are too much")
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if manifest.machine.ram_bytes > MAX_RAM_OF_HOST * host:
        raise Incompatible(
            f"{label}: its machine has {manifest.machine.ram_bytes} bytes of RAM, too much for "
            f"this host, which has {host}"
        )
