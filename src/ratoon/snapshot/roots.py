"""What the images of a store are named after: the roots of its snapshots' memory and disks."""

from __future__ import annotations

from ratoon.disk.qcow2 import disk_roots
from ratoon.snapshot.manifest import Manifest
from ratoon.snapshot.snapshot import Snapshot
from ratoon.snapshot.store import Store


def roots_of(manifest: Manifest) -> list[str]:
    """The disk roots of all beginnings of a chain: that of the base first, its own last."""
    return disk_roots([layer.disk.digest for layer in manifest.layers])


def image_roots(store: Store) -> set[str]:
    """The memory roots of all snapshots, and the disk roots of all beginnings of their chains.

    A flattened disk of a beginning is of use to the whole chain.
    """
    manifests = [each.manifest for each in store.list() if isinstance(each, Snapshot)]
    memory = {manifest.memory_root for manifest in manifests}
    return memory.union(*map(roots_of, manifests))
