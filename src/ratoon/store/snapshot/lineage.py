"""Lineage: the whole store as a forest, each snapshot below the one it was made from."""

from __future__ import annotations

from ratoon.api.snapshots import LineageNode
from ratoon.store.snapshot.descent import children_by_parent
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store


def lineage(store: Store) -> tuple[LineageNode, ...]:
    """All snapshots, each followed by those below it; roots and siblings by tag.

    One whose parent is gone or damaged is a root with a note: it is whole all the same.
    """
    entries = store.list()
    damaged = {entry.tag for entry in entries if not isinstance(entry, Snapshot)}
    manifests = {
        entry.manifest.id: entry.manifest for entry in entries if isinstance(entry, Snapshot)
    }
    children = children_by_parent(manifests.values())
    nodes: list[LineageNode] = []
    for entry in entries:
        if not isinstance(entry, Snapshot):
            nodes.append(LineageNode(entry.tag, 0, None, [], None, None, f"damaged: {entry.error}"))
            continue
        root = entry.manifest
        if root.parent and root.parent.id in manifests:
            continue
        pending = [(root, 0)]
        while pending:
            manifest, level = pending.pop()
            below = children.get(manifest.id, ())
            parent, note = manifest.parent, None
            if parent and not level:
                state = "damaged" if parent.tag in damaged else "gone"
                note = f"its parent {parent.tag} is {state}"
            nodes.append(
                LineageNode(
                    tag=manifest.tag,
                    level=level,
                    parent=parent.tag if parent and level else None,
                    children=[child.tag for child in below],
                    depth=len(manifest.layers) - 1,
                    created_at_unix=int(manifest.created_at_unix),
                    note=note,
                )
            )
            pending += [(child, level + 1) for child in reversed(below)]
    return tuple(nodes)
