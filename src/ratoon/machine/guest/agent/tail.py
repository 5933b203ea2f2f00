"""The end of what a process has written, for who comes later."""

from __future__ import annotations

from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

#: Bytes kept of each process's output, and what keeping one piece of it costs beside them.
LIMIT = 64 * 1024
PIECE_COST = 128
#: A piece is not extended beyond this.
SMALL = 1024


class Tail:
    """The last pieces of an output, of LIMIT bytes in all and one piece more."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[int, bytes]] = deque()
        self._cost = 0

    def add(self, kind: int, data: bytes) -> None:
        pieces = self._pieces
        if pieces and pieces[-1][0] == kind and len(pieces[-1][1]) + len(data) <= SMALL:
            pieces[-1] = kind, pieces[-1][1] + data
            self._cost += len(data)
        else:
            pieces.append((kind, data))
            self._cost += len(data) + PIECE_COST
        while (left := self._cost - len(pieces[0][1]) - PIECE_COST) >= LIMIT:
            pieces.popleft()
            self._cost = left

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        return iter(self._pieces)
