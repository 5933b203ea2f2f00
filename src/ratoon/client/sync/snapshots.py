# Made from ../aio/snapshots.py by scripts/make_sync.py: change it there.
"""The snapshots of a daemon."""

from __future__ import annotations

from collections.abc import Sequence

from ratoon.api.answers import read
from ratoon.api.snapshots import Differences, LineageNode, SnapshotDetail, SnapshotInfo
from ratoon.api.upkeep import CompressReport, PruneReport
from ratoon.client.sync.connection import Connection, segment

SnapshotInfos = list[SnapshotInfo]
Lineage = list[LineageNode]


class Snapshots:
    """All snapshots of a store: `client.snapshots`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(self) -> SnapshotInfos:
        """All of them, those that are being written and those that failed included."""
        return read(SnapshotInfos, self._connection.ask("GET", "/v1/snapshots"))

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
        cpu: str | None = None,
        refresh: bool = False,
    ) -> SnapshotInfo:
        """Boot `image` cold and publish it as the base snapshot `tag`.

        It is `debian[:SUITE][+PACKAGE…]`, a name in a registry such as `python:3.12-slim`, or of
        the daemon's host `oci:…`, `oci-archive:…`, `docker-archive:…`, `tar:…` or `dir:…`. The
        first time it is fetched or built, which may take minutes; `refresh`: do so again.
        `cpu`: a model that all hosts have on which it shall be forked, `x86-64-v2` to `x86-64-v4`
        or one of QEMU's; else the daemon's host's own. AlreadyExists; NotFound; Incompatible: that
        host lacks some of it.
        """
        hardware = {"ram_mib": ram_mib, "vcpus": vcpus, "disk_mib": disk_mib, "cpu": cpu}
        given = {name: each for name, each in hardware.items() if each is not None}
        body = {"image": image, "tag": tag, "refresh": refresh, **given}
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

    def prune(
        self,
        *,
        keep_last: int | None = None,
        keep_within: float | None = None,
        max_bytes: int | None = None,
        keep: Sequence[str] = (),
        lineage: str | None = None,
        dry_run: bool = False,
    ) -> PruneReport:
        """Delete what no rule keeps of each lineage, a base and all that descends from it.

        Kept are the `keep_last` newest, what was made within `keep_within` seconds, what `keep`
        names (tags or patterns), what sandboxes and workspaces need, and what any of those was made
        from. With `max_bytes` the rest goes only until a lineage holds no more than that, the
        oldest first, and its newest snapshot stays. `lineage`: that of this tag alone.
        """
        body = {
            "keep_last": keep_last,
            "keep_within_seconds": keep_within,
            "max_bytes": max_bytes,
            "keep": [*keep],
            "lineage": lineage,
            "dry_run": dry_run,
        }
        return read(PruneReport, self._connection.ask("POST", "/v1/prune", body=body))

    def compress(
        self,
        *tags: str,
        older_than: float | None = None,
        level: int | None = None,
        undo: bool = False,
        dry_run: bool = False,
    ) -> CompressReport:
        """Compress the memory layers in the chains of `tags`, or of all snapshots; all works on.

        `older_than`: of those alone that were made so many seconds ago, or earlier. `level` is
        zstd's, from 1 to 19. `undo`: have them plain again.
        """
        body: dict[str, object] = {
            "tags": [*tags],
            "older_than_seconds": older_than,
            "undo": undo,
            "dry_run": dry_run,
        }
        if level is not None:
            body["level"] = level
        answer = self._connection.ask("POST", "/v1/compress", body=body)
        return read(CompressReport, answer)

    def lineage(self) -> Lineage:
        """All snapshots, each followed by those that were made on it."""
        return read(Lineage, self._connection.ask("GET", "/v1/lineage"))

    def diff(self, tag: str, other: str) -> Differences:
        """What differs from one to another: pages, bytes of the disk, files on it."""
        path = f"{_path(tag)}/diff/{segment(other)}"
        return read(Differences, self._connection.ask("GET", path))


def _path(tag: str) -> str:
    return f"/v1/snapshots/{segment(tag)}"
