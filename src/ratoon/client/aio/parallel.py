"""What is done in another way without asyncio. `ratoon.client.sync` has a module of its own for it.

It, `wire` and `conversations` are the only ones: all others become those of `ratoon.client.sync`
word by word.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ratoon.concurrency import beside as run_beside
from ratoon.concurrency import to_the_end

T = TypeVar("T")

Lock = asyncio.Lock

#: What a user gives to be told; if what it returns can be awaited, it is.
Listener = Callable[[T], object]


async def tell(listener: Listener[T], what: T) -> None:
    answer = listener(what)
    if inspect.isawaitable(answer):
        await answer


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """The result of something that blocks. A cancellation waits for it."""
    return await to_the_end(asyncio.to_thread(function, *arguments))


async def beside(
    main: Callable[[], Coroutine[Any, Any, T]],
    other: Callable[[], Coroutine[Any, Any, None]],
    stop: Callable[[], Coroutine[Any, Any, None]],
) -> T:
    """The result of `main`; if `other` fails first, its error. Neither runs on afterwards.

    `stop` makes both of them fail soon, where they cannot be cancelled.
    """
    return await run_beside(main(), other())
