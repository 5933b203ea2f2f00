"""Writing what was captured as a snapshot: hashed, without what did not change, and published."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from ratoon.engine.sandbox.capture import Capture
from ratoon.engine.sandbox.memory_images import MemoryImages
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.engine.sandbox.stages import Stages
from ratoon.machine.network.policy import NetworkPolicy
from ratoon.store.disk.qcow2 import disk_root, file_digest
from ratoon.store.memory.chain import overlay
from ratoon.store.memory.digests import changed_pieces, memory_root, zero_array
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.writing import writing_page_set
from ratoon.store.snapshot.manifest import (
    FileRef,
    GuestInfo,
    LayerRef,
    MachineConfig,
    Manifest,
    MemoryFile,
)
from ratoon.store.snapshot.snapshot import DISK, MEMORY, VMSTATE, Snapshot, packed_vmstate
from ratoon.store.snapshot.staging import Staging


@dataclass(frozen=True)
class Provenance:
    """Whose state a layer is, as the manifest tells it.

    `branched_from`: the sandbox. `warning`: what went wrong as its processes were stopped.
    `anonymous`: see `LayerRef`.
    """

    machine: MachineConfig
    guest: GuestInfo
    network: NetworkPolicy
    branched_from: str
    warning: str | None = None
    anonymous: bool = False


def provenance_of(sandbox: Sandbox) -> Provenance:
    """Of a sandbox's present state, if nothing goes wrong as it is stopped."""
    manifest = sandbox.parent.manifest
    return Provenance(manifest.machine, manifest.guest, sandbox.network, sandbox.id)


def publish_layer(
    staging: Staging,
    memory_images: MemoryImages,
    parent: Snapshot | None,
    captured: Capture,
    disk: Path,
    provenance: Provenance,
    stages: Stages,
) -> Snapshot:
    """Publish what was captured as a diff on `parent`, or a base where there is none; blocks.

    `disk` is the frozen overlay, and gets a second name. What the parent has in its memory
    already is dropped.
    """
    with stages("pack"):
        ram_pages = provenance.machine.ram_bytes // PAGE_SIZE
        below = memory_images.array(parent) if parent else zero_array(ram_pages)
        changed = changed_pieces(captured.numbers, captured.pages, below)
        path = staging.path / MEMORY
        with writing_page_set(path, ram_pages, changed) as index:
            array = overlay(below, index)
            root = memory_root(array)
            state = packed_vmstate(captured.state)
            (staging.path / VMSTATE).write_bytes(state)
            os.link(disk, staging.path / DISK)
            if parent:
                staging.adopt_ancestry(parent)
    with stages("digest"):
        own = LayerRef(
            tag=staging.tag,
            id=uuid.uuid4().hex,
            memory_root=root,
            memory=MemoryFile(
                index_digest=index.index_digest,
                entries=len(index.numbers),
                stored=index.stored,
                size=path.stat().st_size,
            ),
            disk=FileRef(digest=file_digest(disk), size=disk.stat().st_size),
            anonymous=provenance.anonymous,
        )
        layers = (*(parent.manifest.layers if parent else ()), own)
        vmstate = FileRef(digest=blake3(state).hexdigest(), size=len(state))
        manifest = Manifest(
            tag=own.tag,
            id=own.id,
            created_at_unix=time.time(),
            parent=parent.manifest.reference if parent else None,
            memory_root=root,
            disk_root=disk_root([layer.disk.digest for layer in layers]),
            machine=provenance.machine,
            vmstate=vmstate,
            layers=layers,
            guest=provenance.guest,
            network=str(provenance.network),
            stages=dict(stages.ms),
            warning=provenance.warning,
            branched_from=provenance.branched_from,
        )
    with stages("publish"):
        snapshot = staging.publish(manifest)
    memory_images.remember(root, array)
    return snapshot
