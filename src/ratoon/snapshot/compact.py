"""Compacting: a chain's head into an equal snapshot that stands on nothing.

Same memory, device state and disk content; one memory layer and one disk layer. Both are read
against their digests on the way, so what was damaged is found here and not copied.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from ratoon.artifacts import Progress, silent
from ratoon.disk.flatten import flatten
from ratoon.disk.qcow2 import disk_root, file_digest
from ratoon.errors import Corrupt, InvalidInput
from ratoon.memory.merge import write_merged
from ratoon.snapshot.links import ram_pages, read_links
from ratoon.snapshot.manifest import FileRef, LayerRef, Manifest, MemoryFile, check_tag
from ratoon.snapshot.scratch import scratch
from ratoon.snapshot.snapshot import DISK, MEMORY, VMSTATE, Snapshot, link_snapshot, read_vmstate
from ratoon.snapshot.staging import Staging
from ratoon.snapshot.store import Store
from ratoon.snapshot.verify import verify_disks


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
    with store.stage(to) as staging, scratch(store) as room:
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
    tag = source.manifest.tag
    progress(f"checking the disk of {tag}")
    verify_disks(source)
    state = read_vmstate(source)
    memory_root, memory = _merge_memory(source, staging.path / MEMORY, progress)
    progress(f"flattening {source.depth + 1} disk layers")
    disk = _flatten_disk(source, staging.path / DISK)
    (staging.path / VMSTATE).write_bytes(state)
    progress(f"publishing {staging.tag}")
    identity = uuid.uuid4().hex
    own = LayerRef(tag=staging.tag, id=identity, memory_root=memory_root, memory=memory, disk=disk)
    manifest = Manifest(
        tag=staging.tag,
        id=identity,
        created_at_unix=time.time(),
        parent=None,
        memory_root=memory_root,
        disk_root=disk_root([disk.digest]),
        machine=source.manifest.machine,
        vmstate=source.manifest.vmstate,
        layers=(own,),
        guest=source.manifest.guest,
        network=source.manifest.network,
        stages=dict(stages),
        warning=source.manifest.warning,
        branched_from=branched_from,
    )
    return staging.publish(manifest)


def _merge_memory(source: Snapshot, path: Path, progress: Progress) -> tuple[str, MemoryFile]:
    links = read_links(source)
    index = write_merged(path, links, ram_pages(source), progress)
    memory = MemoryFile(
        index_digest=index.index_digest,
        entries=len(index.numbers),
        stored=index.stored,
        size=path.stat().st_size,
    )
    return links[-1].root, memory


def _flatten_disk(source: Snapshot, path: Path) -> FileRef:
    layers = [source.disk_path(number) for number in range(source.depth + 1)]
    header = flatten(layers, path)
    expected = source.manifest.machine.disk_bytes
    if header.virtual_size != expected:
        raise Corrupt(
            f"snapshot {source.manifest.tag}: its disk has {header.virtual_size} bytes, "
            f"but its manifest says {expected}"
        )
    return FileRef(digest=file_digest(path), size=path.stat().st_size)
