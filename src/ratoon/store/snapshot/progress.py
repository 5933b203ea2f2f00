"""Progress of work that is counted in bytes."""

from __future__ import annotations

from collections.abc import Callable

#: Told how many bytes of how many are done.
ByteProgress = Callable[[int, int], None]


def unheard(done: int, total: int) -> None:
    """The ByteProgress of those who want to hear nothing."""


class Meter:
    """Adds up what is done of `total` bytes, and tells it."""

    def __init__(self, total: int, progress: ByteProgress) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total)
