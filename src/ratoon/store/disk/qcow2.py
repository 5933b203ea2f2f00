"""Disk layers as qcow2 files: empty overlays, digests, and a header that can be trusted.

One qcow2 inode is reached under many names, so no header carries the path of a backing file: the
graph is given to QEMU with `-blockdev`. A disk from elsewhere whose header names a backing or a
data file would make QEMU open any file of the host; `check_header` refuses it.

The format: docs/interop/qcow2.txt in QEMU's source.
"""

from __future__ import annotations

import stat
import struct
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from ratoon import files
from ratoon.errors import Corrupt, InvalidInput
from ratoon.store.disk.tools import tool

_MAGIC = b"QFI\xfb"
#: version, backing file offset, cluster bits, virtual size, encryption, L1 entries and offset,
#: refcount table offset and clusters.
_V2 = struct.Struct(">4xIQ4xIQIIQQI12x")
#: incompatible features, refcount order, header length.
_V3_REST = struct.Struct(">Q16xII")
_EXTENSION = struct.Struct(">II")
_CLUSTER_BITS = range(9, 22)
_MAX_L1_BYTES = 32 << 20
_LONGEST_EMPTY = 2 * _MAX_L1_BYTES
_MAX_REFCOUNT_TABLE_BYTES = 8 << 20

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_END, _DATA_FILE_NAME, _CRYPTO = 0, 0x44415441, 0x0537BE77

_REMEDY = "make a plain copy with qemu-img convert -O qcow2"


@dataclass(frozen=True)
class Qcow2Header:
    """What a sound header says. `virtual_size` is in bytes."""

    version: int
    virtual_size: int
    cluster_bits: int


def check_header(path: Path, *, label: str) -> Qcow2Header:
    """Read the qcow2 header of `path` and refuse a disk that is damaged or names another file.

    `label` names the disk in messages. Corrupt: truncated, or fields that contradict each other or
    the file's size. InvalidInput: not a qcow2 file, or one with a backing file, an external data
    file, encryption or features that Ratoon does not allow. A missing file: FileNotFoundError.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise InvalidInput(f"{label}: not a regular file")
    with path.open("rb") as file:
        head = file.read(1 << _CLUSTER_BITS[-1])
    return _parse(head, info.st_size, label)


def _parse(head: bytes, file_size: int, label: str) -> Qcow2Header:
    """The header in `head`, the first cluster (or more) of a file of `file_size` bytes."""
    if not head.startswith(_MAGIC):
        raise InvalidInput(f"{label}: not a qcow2 file")
    version, backing_offset, cluster_bits, virtual_size, encryption, *tables = _unpack(
        _V2, head, 0, label
    )
    features, refcount_order, header_length = 0, 4, _V2.size
    if version == 3:
        features, refcount_order, header_length = _unpack(_V3_REST, head, _V2.size, label)
    elif version != 2:
        raise InvalidInput(f"{label}: qcow2 version {version}, but only 2 and 3 are known")

    if backing_offset:
        raise InvalidInput(f"{label}: its header names a backing file; {_REMEDY}")
    if encryption:
        raise InvalidInput(f"{label}: it is encrypted; {_REMEDY}")
    _check_features(features, label)
    if cluster_bits not in _CLUSTER_BITS:
        raise _corrupt(label, f"clusters of 2^{cluster_bits} bytes")
    cluster = 1 << cluster_bits
    if version == 3 and (header_length % 8 or not 104 <= header_length <= cluster):
        raise _corrupt(label, f"a header of {header_length} bytes")
    if refcount_order > 6:
        raise _corrupt(label, f"refcounts of 2^{refcount_order} bits")
    for kind in _extension_types(head[:cluster], header_length, label):
        if kind == _DATA_FILE_NAME:
            raise InvalidInput(f"{label}: its header names an external data file; {_REMEDY}")
        if kind == _CRYPTO:
            raise InvalidInput(f"{label}: it is encrypted; {_REMEDY}")

    l1_entries, l1_offset, refcount_offset, refcount_clusters = tables
    entry_size = 16 if features & _EXTENDED_L2 else 8
    reach = l1_entries * (cluster // entry_size) * cluster
    if not 0 < virtual_size <= reach or l1_entries * 8 > _MAX_L1_BYTES:
        raise _corrupt(label, f"{virtual_size} bytes of disk with {l1_entries} L1 entries")
    if not 0 < refcount_clusters * cluster <= _MAX_REFCOUNT_TABLE_BYTES:
        raise _corrupt(label, f"a refcount table of {refcount_clusters} clusters")
    for name, offset, size in (
        ("L1", l1_offset, l1_entries * 8),
        ("refcount", refcount_offset, refcount_clusters * cluster),
    ):
        if not offset or offset % cluster:
            raise _corrupt(label, f"its {name} table lies at byte {offset}")
        if offset + size > file_size:
            raise _corrupt(label, f"truncated: its {name} table ends past the end of the file")
    return Qcow2Header(version, virtual_size, cluster_bits)


def _unpack(fields: struct.Struct, head: bytes, offset: int, label: str) -> tuple[int, ...]:
    if offset + fields.size > len(head):
        raise _corrupt(label, "truncated within its header")
    return fields.unpack_from(head, offset)


def _check_features(features: int, label: str) -> None:
    if features & _DATA_FILE:
        raise InvalidInput(f"{label}: its header names an external data file; {_REMEDY}")
    if features & _CORRUPT:
        raise _corrupt(label, "QEMU marked it as corrupt")
    if features & _DIRTY:
        raise InvalidInput(f"{label}: it was not closed cleanly; run qemu-img check -r all on it")
    if unknown := features & ~(_COMPRESSION | _EXTENDED_L2):
        raise InvalidInput(f"{label}: unknown qcow2 features {unknown:#x}")


def _extension_types(cluster: bytes, offset: int, label: str) -> Iterator[int]:
    """The types of the header extensions, which fill the first cluster from `offset` on."""
    while offset + _EXTENSION.size <= len(cluster):
        kind, length = _EXTENSION.unpack_from(cluster, offset)
        if kind == _END:
            return
        yield kind
        offset += _EXTENSION.size + (length + 7) // 8 * 8
        if offset > len(cluster):
            raise _corrupt(label, f"header extension {kind:#x} is {length} bytes long")


def _corrupt(label: str, reason: str) -> Corrupt:
    return Corrupt(f"{label}: damaged qcow2 header: {reason}")


class OverlayTemplates:
    """Makes empty overlays by copying one that `qemu-img` made, once per virtual size.

    The templates live in `directory`, which must exist. Safe to share between processes.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def create(self, path: Path, virtual_size: int) -> None:
        """Make `path` an empty qcow2 of `virtual_size` bytes, with no backing file in its header.

        FileExistsError: `path` is there. InvalidInput: not a positive multiple of 512 bytes.
        HostError: `as `tools.tool`; `qemu-img` refused.
        """
        if virtual_size <= 0 or virtual_size % 512:
            raise InvalidInput(f"disk size {virtual_size}: not a positive multiple of 512 bytes")
        template = self._directory.absolute() / f"overlay-{virtual_size}.qcow2"
        if not template.exists():
            _publish_template(template, virtual_size)
        files.copy_sparse(template, path)


def _publish_template(template: Path, virtual_size: int) -> None:
    """Two at once do no harm: each renames a finished file into place."""
    temporary = template.with_name(f".{template.name}.{threading.get_native_id()}.tmp")
    temporary.unlink(missing_ok=True)
    with files.new_file(temporary), tool("qemu-img", _LONGEST_EMPTY) as qemu_img:
        words = "create", "-q", "-f", "qcow2", "-o", "compat=v3", qemu_img.writes(temporary)
        qemu_img.run(*words, str(virtual_size))
    with files.removed_on_error(temporary):
        # Nearly all of it is zeros, and each sandbox and each snapshot has a copy.
        subprocess.run(
            ["fallocate", "--dig-holes", temporary], stderr=subprocess.DEVNULL, check=False
        )
        files.fsync_path(temporary)
        temporary.rename(template)
    files.fsync_path(template.parent)


def file_digest(path: Path) -> str:
    """BLAKE3 (hex) of a whole file, mapped and hashed on every core.

    For files that nobody changes: one that is truncated meanwhile ends the process (SIGBUS).
    """
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def disk_root(digests: Sequence[str]) -> str:
    """BLAKE3 (hex) over the digests (hex) of a disk's layers, base first."""
    return blake3(b"".join(map(bytes.fromhex, digests))).hexdigest()


def disk_roots(digests: Sequence[str]) -> list[str]:
    """The disk roots of all beginnings of a chain, from its base alone to all of it."""
    hasher, roots = blake3(), []
    for digest in digests:
        hasher.update(bytes.fromhex(digest))
        roots.append(hasher.hexdigest())
    return roots
