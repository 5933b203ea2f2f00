"""Bytes on their way into a descriptor that does not always take them."""

from __future__ import annotations

import os
import select
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Watcher


class Sink:
    """What is queued for a non-blocking descriptor, which nobody else watches.

    `taken` is told how many bytes are through, or dropped because nobody reads them. `finish` is
    called once, when no more is to be written; it lets go of the descriptor.
    """

    def __init__(
        self, loop: Watcher, fd: int, taken: Callable[[int], None], finish: Callable[[], None]
    ) -> None:
        self.queued = 0
        self.closed = False
        #: An errno: why what was written is not taken any more.
        self.problem = 0
        self._loop = loop
        self._fd = fd
        self._taken = taken
        self._finish = finish
        self._queue: deque[bytes] = deque()
        self._ending = False
        self._watched = False

    def write(self, data: bytes) -> None:
        if self.closed or self._ending:
            self._taken(len(data))
            return
        self._queue.append(data)
        self.queued += len(data)
        if not self._watched:  # else it is full
            self._pump()

    def end(self) -> None:
        """Finish after what is queued."""
        self._ending = True
        if not self._queue:
            self.close()

    def close(self) -> None:
        """Finish now; what is queued is dropped."""
        if self.closed:
            return
        self.closed = True
        self._unwatch()
        self._finish()
        if self._queue:
            self._queue.clear()
            self._pass(self.queued)

    def _pump(self) -> None:
        """Write what is taken at once, and go on when more is."""
        while self._queue:
            data = self._queue[0]
            try:
                written = os.write(self._fd, data)
            except BlockingIOError:
                if not self._watched:
                    self._watched = True
                    self._loop.watch(self._fd, self._pump, select.EPOLLOUT)
                return
            except OSError as error:  # nobody reads
                self.problem = error.errno or 0
                self.close()
                return
            if written < len(data):
                self._queue[0] = data[written:]
            else:
                self._queue.popleft()
            self._pass(written)
        self._unwatch()
        if self._ending:
            self.close()

    def _pass(self, count: int) -> None:
        self.queued -= count
        self._taken(count)

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._loop.unwatch(self._fd)
