"""What is done in another way without asyncio. `ratoon.client.sync` has a module of its own for it.

It, `transport` and `conversations` are the only ones: all others become those of
`ratoon.client.sync` word by word.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ratoon import concurrency
from ratoon.concurrency import in_thread

__all__ = ["Listener", "Lock", "in_thread", "run_alongside", "tell"]

T = TypeVar("T")

Lock = asyncio.Lock

#: What a user gives to be told; if what it returns can be awaited, it is.
Listener = Callable[[T], object]


async def tell(listener: Listener[T], what: T) -> None:
    answer = listener(what)
    if inspect.isawaitable(answer):
        await answer


async def run_alongside(
    main: Callable[[], Coroutine[Any, Any, T]],
    other: Callable[[], Coroutine[Any, Any, None]],
    stop: Callable[[], Coroutine[Any, Any, None]],
) -> T:
    """The result of `main`; if `other` fails first, its error. Neither runs on afterwards.

    `stop` makes both of them fail soon, where they cannot be cancelled.
    """
    return await concurrency.run_alongside(main(), other())
