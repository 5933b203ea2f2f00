# Made from ../aio/snapshots.py by scripts/make_sync.py: change it there.
"""The snapshots of a daemon."""

from __future__ import annotations

from ratoon.client.answers import (
    Differences,
    LineageNode,
    SnapshotDetail,
    SnapshotInfo,
    differences,
    read,
)
from ratoon.client.sync.connection import Connection, segment

SnapshotInfos = list[SnapshotInfo]
Lineage = list[LineageNode]


class Snapshots:
    """All snapshots of a store: `client.snapshots`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(self) -> SnapshotInfos:
        """All of them, those that are being written and those that failed included."""
        found = self._connection.ask("GET", "/v1/snapshots")
        return [read(SnapshotInfo, each) for each in found]

    def get(self, tag: str) -> SnapshotInfo:
        """One of them; NotFound. Corrupt: it is damaged."""
        return read(SnapshotInfo, self._connection.ask("GET", _path(tag)))

    def info(self, tag: str) -> SnapshotDetail:
        """All about one; NotFound. Corrupt: it is damaged."""
        return read(SnapshotDetail, self._connection.ask("GET", f"{_path(tag)}/info"))

    def from_image(
        self,
        image: str,
        tag: str,
        *,
        ram_mib: int | None = None,
        vcpus: int | None = None,
        disk_mib: int | None = None,
    ) -> SnapshotInfo:
        """Boot `image` (`debian`) cold and publish it as the base snapshot `tag`.

        The first time an image is used it is built, which takes minutes. AlreadyExists.
        """
        sizes = {"ram_mib": ram_mib, "vcpus": vcpus, "disk_mib": disk_mib}
        given = {name: size for name, size in sizes.items() if size is not None}
        body = {"image": image, "tag": tag, **given}
        return read(SnapshotInfo, self._connection.ask("POST", "/v1/snapshots", body=body))

    def compact(self, tag: str, to: str) -> SnapshotInfo:
        """Publish `to`, equal to `tag`, but standing on no other. NotFound, AlreadyExists."""
        answer = self._connection.ask("POST", f"{_path(tag)}/compact", body={"to": to})
        return read(SnapshotInfo, answer)

    def delete(self, tag: str, *, cascade: bool = False, force: bool = False) -> None:
        """Delete one. Sandboxes are not affected.

        HasDependents: others were made from it; `cascade` deletes them too, leaves first, `force`
        deletes it alone, and what was made from it stays whole. NotFound; InFlight.
        """
        query = {"cascade": cascade, "force": force}
        self._connection.ask("DELETE", _path(tag), query=query)

    def lineage(self) -> Lineage:
        """All snapshots, each followed by those that were made on it."""
        found = self._connection.ask("GET", "/v1/lineage")
        return [read(LineageNode, each) for each in found]

    def diff(self, tag: str, other: str) -> Differences:
        """What differs from one to another: pages, bytes of the disk, files on it."""
        path = f"{_path(tag)}/diff/{segment(other)}"
        return differences(self._connection.ask("GET", path))


def _path(tag: str) -> str:
    return f"/v1/snapshots/{segment(tag)}"
