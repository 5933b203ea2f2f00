"""A snapshot's chain of memory layers, as its manifest vouches for them."""

from __future__ import annotations

from ratoon.store.memory.chain import Link
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import read_index
from ratoon.store.snapshot.snapshot import Snapshot


def ram_pages(snapshot: Snapshot) -> int:
    """The RAM of its machine, in pages of 4096 bytes."""
    return snapshot.manifest.machine.ram_bytes // PAGE_SIZE


def read_links(snapshot: Snapshot) -> list[Link]:
    """The chain of `snapshot`, base first. Corrupt: a layer's index is not what it should be."""
    links = []
    for number, layer in enumerate(snapshot.manifest.layers):
        path = snapshot.memory_path(number)
        # Not the path: a sandbox's twin, where forks read it, is gone when the message is read.
        name = path.relative_to(snapshot.path)
        label = f"snapshot {layer.tag}, file {name} in snapshot {snapshot.manifest.tag}"
        index = read_index(path, label=label, expected_digest=layer.memory.index_digest)
        links.append(Link(layer.tag, path, index, layer.memory_root))
    return links
