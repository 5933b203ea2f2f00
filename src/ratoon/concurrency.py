"""Waiting for one thing while watching another, and for what must not be left half done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


async def run_alongside(main: Coroutine[Any, Any, T], other: Coroutine[Any, Any, object]) -> T:
    """The result of `main`; if `other` fails first, its error. Neither runs on afterwards."""
    tasks = asyncio.ensure_future(main), asyncio.ensure_future(other)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            await tasks[1]
        return await tasks[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def uncancelled(work: Coroutine[Any, Any, T] | asyncio.Task[T]) -> T:
    """The result of `work`, which is not interrupted: a cancellation takes effect once it ends.

    Its result, or its error, is lost then.
    """
    task = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # looked at: nobody else will
    raise cancellation


async def in_thread(function: Callable[P, T], /, *arguments: P.args, **named: P.kwargs) -> T:
    """The result of something that blocks. A cancellation waits for it, and takes effect then."""
    return await uncancelled(asyncio.to_thread(function, *arguments, **named))
