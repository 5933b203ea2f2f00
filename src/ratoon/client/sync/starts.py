# Made from ../aio/starts.py by scripts/make_sync.py: change it there.
"""The starts that a daemon keeps of images that were run."""

from __future__ import annotations

from ratoon.api.answers import read
from ratoon.api.starts import Explanation, PrunedStart, StartInfo
from ratoon.client.sync.connection import Connection

StartInfos = list[StartInfo]
PrunedStarts = list[PrunedStart]


class Starts:
    """What is kept, so that an equal run starts from it: `client.starts`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(self) -> StartInfos:
        """All of them, the last made first."""
        return read(StartInfos, self._connection.ask("GET", "/v1/cache"))

    def explain(self, one: str, other: str | None = None) -> Explanation:
        """In which fields one differs from another, or from the one that is most like it.

        Each is named by the first digits of its key, or by its snapshot's tag. NotFound; Conflict:
        several begin so.
        """
        query = {"one": one, "other": other}
        answer = self._connection.ask("GET", "/v1/cache/explain", query=query)
        return read(Explanation, answer)

    def prune(
        self,
        *,
        older_than: float | None = None,
        everything: bool = False,
        dry_run: bool = False,
    ) -> PrunedStarts:
        """Remove what no run can use, and what was not used for so many seconds, or all of them.

        Those that went, or, of a `dry_run`, would go. Sandboxes are not affected.
        """
        body = {"older_than_seconds": older_than, "everything": everything, "dry_run": dry_run}
        gone = self._connection.ask("POST", "/v1/cache/prune", body=body)
        return read(PrunedStarts, gone)
