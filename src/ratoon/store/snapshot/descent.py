"""Who descends from whom, as manifests tell it; reads no file.

A parent is recorded by its id, which no other snapshot ever has, so a tag that was used again has
none of its predecessor's children.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ratoon.store.snapshot.manifest import Manifest

#: The manifests made directly on a snapshot, by that snapshot's id, each list sorted by tag.
Children = Mapping[str, Sequence[Manifest]]


def children_by_parent(manifests: Iterable[Manifest]) -> Children:
    """Group the manifests that have a parent by the parent's id, whether it still exists or not."""
    children: defaultdict[str, list[Manifest]] = defaultdict(list)
    for manifest in sorted(manifests, key=lambda manifest: manifest.tag):
        if manifest.parent:
            children[manifest.parent.id].append(manifest)
    return children


def leaves_first(tops: Iterable[Manifest], manifests: Iterable[Manifest]) -> tuple[Manifest, ...]:
    """`tops` and all that descend from them among `manifests`, each after all of its own."""
    children = children_by_parent(manifests)
    found: dict[str, Manifest] = {}  # parents before their children; a forged circle ends
    pending = [*tops]
    while pending:
        manifest = pending.pop()
        if manifest.id not in found:
            found[manifest.id] = manifest
            pending += children.get(manifest.id, ())
    return tuple(reversed(found.values()))
