"""Lineage: the whole store as a forest, each snapshot below the one it was made from."""

from __future__ import annotations

from dataclasses import dataclass

from ratoon.snapshot.descent import children_by_parent
from ratoon.snapshot.snapshot import Snapshot
from ratoon.snapshot.store import Store


@dataclass(frozen=True)
class Node:
    """A snapshot's place in the forest.

    `level` counts from its root, `depth` the layers below its own (None: damaged). `parent` and
    `children` are tags in the store; `note` says why it is a root though it was made from another,
    or what is damaged. `created_at_unix` is in seconds.
    """

    tag: str
    level: int
    parent: str | None
    children: tuple[str, ...]
    depth: int | None
    created_at_unix: int | None
    note: str | None


def lineage(store: Store) -> tuple[Node, ...]:
    """All snapshots, each followed by those below it; roots and siblings by tag.

    One whose parent is gone or damaged is a root with a note: it is whole all the same.
    """
    entries = store.list()
    damaged = {entry.tag for entry in entries if not isinstance(entry, Snapshot)}
    manifests = {
        entry.manifest.id: entry.manifest for entry in entries if isinstance(entry, Snapshot)
    }
    children = children_by_parent(manifests.values())
    nodes: list[Node] = []
    for entry in entries:
        if not isinstance(entry, Snapshot):
            nodes.append(Node(entry.tag, 0, None, (), None, None, f"damaged: {entry.error}"))
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
                Node(
                    tag=manifest.tag,
                    level=level,
                    parent=parent.tag if parent and level else None,
                    children=tuple(child.tag for child in below),
                    depth=len(manifest.layers) - 1,
                    created_at_unix=int(manifest.created_at_unix),
                    note=note,
                )
            )
            pending += [(child, level + 1) for child in reversed(below)]
    return tuple(nodes)
