"""The manifest: what a snapshot is, as immutable data, and its one encoding.

A manifest lists every layer of its chain with its digests, so a snapshot directory explains itself.
Its own integrity rests on `manifest.b3`, the digest of the manifest's raw bytes.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, Self

from blake3 import blake3
from pydantic import Field, ValidationError, model_validator
from pydantic_core import from_json

from ratoon.documents import Document
from ratoon.errors import ChainMismatch, Corrupt, Incompatible, InvalidInput
from ratoon.store.disk.qcow2 import disk_root, disk_roots
from ratoon.store.snapshot.image_config import ImageConfig
from ratoon.validation import first_error

#: 2: the device state is compressed.
FORMAT: Final = 2

_TAG = r"^[A-Za-z0-9_-]{1,64}$"

Tag = Annotated[str, Field(pattern=_TAG)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SnapshotId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Milliseconds = Annotated[float, Field(ge=0)]


class FileRef(Document):
    """A file by its BLAKE3 `digest` and `size` in bytes."""

    digest: Digest
    size: Count


class MemoryFile(Document):
    """A memory layer: `entries` pages, of which `stored` have data, in a file of `size` bytes.

    `index_digest` covers the page numbers and the pages' digests, and so, through them, the data.
    """

    index_digest: Digest
    entries: Count
    stored: Count
    size: Count


class ParentRef(Document):
    """The snapshot that a diff was made on."""

    tag: Tag
    id: SnapshotId
    memory_root: Digest


class LayerRef(Document):
    """What one snapshot of the chain added; `memory_root` is that of the chain up to here.

    An `anonymous` one was never published: it comes from a sandbox that was in standby, or that was
    forked while it ran, and is called like the sandbox. It is a layer, but nobody's parent.
    """

    tag: Tag
    id: SnapshotId
    memory_root: Digest
    memory: MemoryFile
    disk: FileRef
    anonymous: bool = False


#: Of QEMU, whose device states are of use: the first that maps a file which it may only read.
OLDEST_QEMU = (8, 2)


class MachineConfig(Document):
    """The machine that the device state belongs to; a fork must be given the same one.

    `ram_bytes` is a multiple of 4096; `disk_bytes` is the disk's virtual size.
    """

    ram_bytes: Annotated[int, Field(gt=0, lt=1 << 63, multiple_of=4096)]
    vcpus: Annotated[int, Field(ge=1, lt=1 << 16)]
    machine: Literal["microvm"] = "microvm"
    cpu: str
    accelerator: Literal["tcg", "kvm"]
    qemu_version: str
    tsc_khz: Count
    kernel_digest: Digest
    initramfs_digest: Digest
    disk_bytes: Annotated[int, Field(gt=0, lt=1 << 63)]
    devices: Annotated[tuple[str, ...], Field(fail_fast=True)]

    @property
    def is_outdated(self) -> bool:
        """Whether its QEMU is one that no Ratoon of today runs."""
        return qemu_series(self.qemu_version) < OLDEST_QEMU


def qemu_series(version: str) -> tuple[int, int]:
    """Of QEMU's version `10.0.2`, (10, 0): device states fit within it. (0, 0): it is none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


class GuestInfo(Document):
    """What runs in it: the image it was built from, and the agent's protocol version.

    `digest` says which image that was exactly; None: it was built from files.
    """

    image: str
    agent_version: int
    digest: str | None = None
    config: ImageConfig = ImageConfig()


class Manifest(Document):
    """One snapshot. `layers` is base first, its own last; `stages` says what took how long.

    `id` is this snapshot's identity: unlike the tag, it is never used again. A manifest that
    contradicts itself cannot be made (ValidationError; ChainMismatch where roots differ).
    """

    format: Literal[2] = FORMAT
    tag: Tag
    id: SnapshotId
    created_at_unix: Annotated[float, Field(ge=0, lt=1 << 48)]
    parent: ParentRef | None
    memory_root: Digest
    disk_root: Digest
    machine: MachineConfig
    vmstate: FileRef
    layers: Annotated[tuple[LayerRef, ...], Field(min_length=1, fail_fast=True)]
    guest: GuestInfo
    #: What its forks may reach unless they are given something else: see `network.policy`.
    network: str = "none"
    stages: dict[str, Milliseconds]
    warning: str | None = None
    branched_from: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        own = self.layers[-1]
        if (own.tag, own.id, own.memory_root) != (self.tag, self.id, self.memory_root):
            raise ValueError("the last layer is not the snapshot's own")
        if len({layer.id for layer in self.layers}) < len(self.layers):
            raise ValueError("a layer comes twice, so the chain would be a cycle")
        if disk_root([layer.disk.digest for layer in self.layers]) != self.disk_root:
            raise ValueError("the disk root is not that of the disk layers")
        if self.parent is None:
            if len(self.layers) > 1:
                raise ValueError("it has layers below its own, but no parent")
            if own.anonymous:
                raise ValueError("its own layer is anonymous, and there is none below")
            return self
        if len(self.layers) == 1:
            raise ValueError("it has a parent, but no layer below its own")
        if not self.ancestors:
            raise ValueError("it has a parent, but all layers below its own are anonymous")
        below = self.ancestors[-1]
        if self.parent.memory_root != below.memory_root:
            raise ChainMismatch(self.tag, self.parent.memory_root, below.memory_root)
        if (self.parent.tag, self.parent.id) != (below.tag, below.id):
            raise ValueError("the layer below its own is not its parent's")
        return self

    @property
    def ancestors(self) -> tuple[LayerRef, ...]:
        """The layers below its own that were published as snapshots, base first."""
        return tuple(layer for layer in self.layers[:-1] if not layer.anonymous)

    @property
    def disk_roots(self) -> list[str]:
        """The disk roots of all beginnings of the chain: that of the base first, its own last."""
        return disk_roots([layer.disk.digest for layer in self.layers])

    @property
    def reference(self) -> ParentRef:
        """What a snapshot that is made on this one calls its parent.

        Where this one's own layer is anonymous, that is the last published one below it.
        """
        last = (*self.ancestors, self.layers[-1])[-2 if self.layers[-1].anonymous else -1]
        return ParentRef(tag=last.tag, id=last.id, memory_root=last.memory_root)


def check_tag(tag: str) -> None:
    """InvalidInput unless `tag` may name a snapshot. To be asked before any path is built."""
    if not re.fullmatch(_TAG, tag):
        raise InvalidInput(f"bad tag {tag!r}: use 1 to 64 letters, digits, '_' and '-'")


def encode(manifest: Manifest) -> bytes:
    """The manifest as indented JSON, its keys always in the same order."""
    return manifest.model_dump_json(indent=2).encode() + b"\n"


def decode(raw: bytes, digest: str, *, label: str) -> Manifest:
    """The manifest in `raw`, whose BLAKE3 must be `digest` (hex). `label` names the file.

    Corrupt: the digest differs, or the content makes no sense. Incompatible: another format.
    ChainMismatch: its parent's memory root is not that of the layers below.
    """
    if blake3(raw).hexdigest() != digest:
        raise Corrupt(f"{label}: its content does not match its digest; it was damaged or edited")
    try:
        document = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise Corrupt(f"{label}: not JSON: {error}") from error
    found = document.get("format") if isinstance(document, dict) else None
    if type(found) is not int:
        raise Corrupt(f"{label}: not a manifest: it names no format")
    if found != FORMAT:
        raise Incompatible(
            f"{label}: format {found}, but this Ratoon reads format {FORMAT}; use the Ratoon that "
            "made it, or make it again"
        )
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        raise Corrupt(f"{label}: {first_error(error)}") from error
