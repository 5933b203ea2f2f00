"""Compacting: a chain's head into an equal snapshot that stands on nothing, or on fewer layers.

Same memory, device state and disk content; one memory layer and one disk layer in the place of
many. They are read against their digests on the way, so what was damaged is found here and not
copied.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from ratoon.artifacts import Progress, silent
from ratoon.errors import Corrupt, InvalidInput
from ratoon.store.disk.flatten import flatten, merge
from ratoon.store.disk.qcow2 import disk_root, file_digest
from ratoon.store.memory.merge import write_merged
from ratoon.store.snapshot.links import ram_pages, read_links
from ratoon.store.snapshot.manifest import FileRef, LayerRef, Manifest, MemoryFile, check_tag
from ratoon.store.snapshot.snapshot import (
    DISK,
    MEMORY,
    VMSTATE,
    Snapshot,
    link_snapshot,
    read_vmstate,
)
from ratoon.store.snapshot.staging import Staging
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import verify_disks


def compact(store: Store, tag: str, to: str, progress: Progress = silent) -> Snapshot:
    """Publish `to`, of depth 0 and otherwise equal to snapshot `tag`, which stays as it is; blocks.

    Equal: same memory root, machine and device state, and the guest sees the same disk. Needs room
    for a second copy of what the head holds, and a few MiB of memory beside the page digests.

    InvalidInput: not a tag, or the same one. NotFound. AlreadyExists, InFlight: `to` is taken.
    Corrupt, ChainMismatch: `tag` is damaged; names the layer and the page or file. HostError: no
    `qemu-img`. A failure leaves the store as it was.
    """
    check_tag(tag)
    check_tag(to)
    if tag == to:
        raise InvalidInput(f"compact {tag} into another tag: a snapshot is never changed")
    source = store.get(tag)
    with store.stage(to) as staging, store.scratch() as room:
        # Of its own, so that `tag` may be deleted meanwhile.
        twin = link_snapshot(source, room / "twin")
        return publish_flat(twin, staging, f"compact:{tag}", {}, progress)


def publish_flat(
    source: Snapshot,
    staging: Staging,
    branched_from: str,
    stages: Mapping[str, float],
    progress: Progress = silent,
) -> Snapshot:
    """Publish what is equal to `source`, of depth 0, from `staging`; blocks. Errors: see `compact`.

    Nobody may delete `source` meanwhile; `branched_from` says in the new manifest what it was, and
    `stages` how long what took.
    """
    return _publish(source, staging, 0, branched_from, stages, progress)


def anonymous_layers(manifest: Manifest) -> int:
    """How many of the topmost layers are anonymous."""
    return next(n for n, layer in enumerate(reversed(manifest.layers)) if not layer.anonymous)


def publish_condensed(source: Snapshot, staging: Staging) -> Snapshot:
    """Publish what is equal to `source`, with its topmost anonymous layers as one; blocks.

    Errors: see `compact`.
    """
    manifest = source.manifest
    kept = len(manifest.layers) - anonymous_layers(manifest)
    return _publish(source, staging, kept, manifest.branched_from, manifest.stages, silent)


def _publish(
    source: Snapshot,
    staging: Staging,
    kept: int,
    branched_from: str | None,
    stages: Mapping[str, float],
    progress: Progress,
) -> Snapshot:
    """Publish what is equal to `source`, the layers above the lowest `kept` as one."""
    tag = source.manifest.tag
    progress(f"checking the disk of {tag}")
    verify_disks(source)
    read_vmstate(source)
    memory_root, memory = _merge_memory(source, kept, staging.path / MEMORY, progress)
    progress(f"flattening {source.depth + 1 - kept} disk layers")
    disk = _merge_disk(source, kept, staging.path / DISK)
    shutil.copyfile(source.vmstate_path, staging.path / VMSTATE)
    if kept:
        staging.adopt_ancestry(source, kept)
    progress(f"publishing {staging.tag}")
    own = LayerRef(
        tag=staging.tag,
        id=uuid.uuid4().hex,
        memory_root=memory_root,
        memory=memory,
        disk=disk,
        anonymous=kept > 0,
    )
    layers = (*source.manifest.layers[:kept], own)
    manifest = Manifest(
        tag=own.tag,
        id=own.id,
        created_at_unix=time.time(),
        parent=source.manifest.parent if kept else None,
        memory_root=memory_root,
        disk_root=disk_root([layer.disk.digest for layer in layers]),
        machine=source.manifest.machine,
        vmstate=source.manifest.vmstate,
        layers=layers,
        guest=source.manifest.guest,
        network=source.manifest.network,
        stages=dict(stages),
        warning=source.manifest.warning,
        branched_from=branched_from,
    )
    return staging.publish(manifest)


def _merge_memory(
    source: Snapshot, kept: int, path: Path, progress: Progress
) -> tuple[str, MemoryFile]:
    links = read_links(source)
    index = write_merged(path, links, ram_pages(source), progress, kept=kept)
    memory = MemoryFile(
        index_digest=index.index_digest,
        entries=len(index.numbers),
        stored=index.stored,
        size=path.stat().st_size,
    )
    return links[-1].root, memory


def _merge_disk(source: Snapshot, kept: int, path: Path) -> FileRef:
    layers = [source.disk_path(number) for number in range(source.depth + 1)]
    header = merge(layers[:kept], layers[kept:], path) if kept else flatten(layers, path)
    expected = source.manifest.machine.disk_bytes
    if header.virtual_size != expected:
        raise Corrupt(
            f"snapshot {source.manifest.tag}: its disk has {header.virtual_size} bytes, "
            f"but its manifest says {expected}"
        )
    return FileRef(digest=file_digest(path), size=path.stat().st_size)
