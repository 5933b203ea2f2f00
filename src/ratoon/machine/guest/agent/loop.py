"""What the agent waits for: descriptors, points in time, and the ends of its children."""

from __future__ import annotations

import heapq
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` itself would cost start-up time
    from collections.abc import Callable
    from typing import Protocol

    class Watcher(Protocol):
        """The loop, as those see it who have it watch for them."""

        def watch(self, fd: int, handler: Callable[[], None], events: int = ...) -> None: ...
        def unwatch(self, fd: int) -> None: ...
        def after(self, seconds: float, callback: Callable[[], None]) -> Timer: ...


#: Seconds that are waited at most before looking again: epoll takes no more than 24 days.
PATIENCE = 1_000_000.0


class Timer:
    """A callback to come; `cancel` takes it back."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """One thread, one epoll. What goes wrong in a handler ends that handler: process 1 goes on."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._timers_made = 0
        #: Whom to tell the status, as of `waitpid`, once a child has ended.
        self._children: dict[int, Callable[[int], None]] = {}
        self._wakeup, child_exited = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(child_exited, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.watch(self._wakeup, self._reap)

    def watch(self, fd: int, handler: Callable[[], None], events: int = select.EPOLLIN) -> None:
        """Call `handler` whenever `fd` is ready; once for each `fd`."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """Before `fd` is closed, and only where it is watched."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(callback)
        self._timers_made += 1
        when = time.monotonic() + max(0.0, seconds)  # not a number: at once
        heapq.heappush(self._timers, (when, self._timers_made, timer))
        return timer

    def on_exit(self, pid: int, callback: Callable[[int], None]) -> None:
        """Call once with the status of the child `pid`; to be asked before the loop goes on."""
        self._children[pid] = callback

    def turn(self, *, wait: bool) -> None:
        """Deal with what is ready; `wait`: until something is."""
        for fd, _ in self._epoll.poll(self._patience() if wait else 0):
            handler = self._handlers.get(fd)
            if handler is None:
                continue
            try:
                handler()
            except Exception as error:
                report(error)
                if self._handlers.get(fd) is handler:
                    self.unwatch(fd)
        while self._timers and self._timers[0][0] <= time.monotonic():
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                call(callback)

    def _patience(self) -> float:
        timers = self._timers
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        return min(max(0.0, timers[0][0] - time.monotonic()), PATIENCE) if timers else -1

    def _reap(self) -> None:
        os.read(self._wakeup, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            told = self._children.pop(pid, None)
            if told is not None:
                call(told, status)


def call(function: Callable[..., object], *arguments: object) -> None:
    """Whatever goes wrong in it: process 1 goes on, and the console has a word on it."""
    try:
        function(*arguments)
    except Exception as error:
        report(error)


def report(error: BaseException) -> None:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "?"
    print(f"ratoon: {where}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
