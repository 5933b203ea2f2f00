"""One test for both libraries: the one without asyncio, as if it had it.

What waits runs in a thread, so that a daemon in this process can answer meanwhile.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

SYNC, AIO = "ratoon.client.sync.", "ratoon.client.aio."


class Libraries:
    """The names of one library: `AsyncClient` and `AsyncSandbox`, or what stands for them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __getattr__(self, name: str) -> Any:
        for module in ("client", "sandbox"):
            if found := getattr(import_module(AIO + module), name, None):
                return found if self.kind == "asyncio" else InThread(_sync_of(found))
        raise AttributeError(name)


class InThread:
    """An object, or a class, of the library that waits, used as its twin is."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.thing, name)
        if not callable(value):
            return _wrapped(value)
        if not inspect.iscoroutinefunction(getattr(_twin(self.thing), name)):
            return lambda *arguments, **named: _wrapped(value(*_bare(arguments), **_bare(named)))

        async def call(*arguments: Any, **named: Any) -> Any:
            return _wrapped(await asyncio.to_thread(value, *_bare(arguments), **_bare(named)))

        return call

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _wrapped(self.thing(*arguments, **named))

    async def __aenter__(self) -> Any:
        return _wrapped(await asyncio.to_thread(self.thing.__enter__))

    async def __aexit__(self, *error: Any) -> Any:
        return await asyncio.to_thread(self.thing.__exit__, *error)

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for each in _Steps(iter(self.thing)):
            yield each


class _Steps:
    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator

    def __aiter__(self) -> _Steps:
        return self

    async def __anext__(self) -> Any:
        end = object()
        found = await asyncio.to_thread(next, self._iterator, end)
        if found is end:
            raise StopAsyncIteration
        return found


def _wrapped(value: Any) -> Any:
    if isinstance(value, list):
        return [_wrapped(each) for each in value]
    if isinstance(value, Iterator):
        return _Steps(value)
    ours = type(value).__module__.startswith(SYNC)
    return InThread(value) if ours or isinstance(value, AbstractContextManager) else value


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _bare(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_bare(each) for each in value)
    return value.thing if isinstance(value, InThread) else value


def _twin(thing: Any) -> Any:
    kind = thing if isinstance(thing, type) else type(thing)
    if not kind.__module__.startswith(SYNC):
        return thing
    return getattr(import_module(kind.__module__.replace(SYNC, AIO)), f"Async{kind.__name__}")


def _sync_of(found: Any) -> Any:
    module = import_module(found.__module__.replace(AIO, SYNC))
    return getattr(module, found.__name__.removeprefix("Async"))
