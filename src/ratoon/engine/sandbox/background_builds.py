"""Images in the making: in the background, one task a root, however many ask."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundBuilds(Generic[T]):
    """What is made in the background at present, by root."""

    def __init__(self, remove: Callable[..., object]) -> None:
        """`remove` takes roots, and removes what was made of them; it blocks."""
        self._remove = remove
        self._tasks: dict[str, asyncio.Task[T]] = {}
        #: Roots of which what is made is to go at once.
        self._unwanted: set[str] = set()

    def begin(self, root: str, make: Callable[[], Awaitable[T]]) -> asyncio.Task[T]:
        """The task that makes it; nobody needs to wait for that, or to hear of its failure."""
        self._unwanted.discard(root)
        if root not in self._tasks:
            self._tasks[root] = task = asyncio.create_task(self._make(root, make))
            task.add_done_callback(lambda done: self._done(root, done))
        return self._tasks[root]

    async def remove(self, *roots: str) -> None:
        """Remove what there is of `roots`. What is being made is not waited for: it goes after."""
        # One that is done may not have been told to `_done` yet.
        under_way = {root for root, task in self._tasks.items() if not task.done()}
        made = [root for root in roots if root not in under_way]
        self._unwanted.update(under_way & set(roots))
        if made:
            await asyncio.to_thread(self._remove, *made)

    async def settle(self) -> None:
        """Wait until nothing is being made."""
        while self._tasks:
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _make(self, root: str, make: Callable[[], Awaitable[T]]) -> T:
        try:
            return await make()
        finally:
            if root in self._unwanted:
                self._unwanted.discard(root)
                await asyncio.to_thread(self._remove, root)

    def _done(self, root: str, done: asyncio.Task[T]) -> None:
        del self._tasks[root]
        if not done.cancelled():
            done.exception()  # somebody has to look at it
