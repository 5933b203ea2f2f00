"""What is done in another way than with asyncio. Written by hand, as its counterpart is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

Lock = threading.Lock

#: What a user gives to be told.
Listener = Callable[[T], object]


def tell(listener: Listener[T], what: T) -> None:
    listener(what)


def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """The result of something that blocks: here it may."""
    return function(*arguments)


def run_alongside(main: Callable[[], T], other: Callable[[], None], stop: Callable[[], None]) -> T:
    """The result of `main`; if `other`, in a thread, fails first, its error.

    Neither runs on afterwards: `stop` makes both of them fail soon.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            other()
        except BaseException as error:
            failures.append(error)
            stop()

    thread = threading.Thread(target=run, name="ratoon-alongside", daemon=True)
    thread.start()
    try:
        return main()
    except Exception:
        if failures:
            raise failures[0] from None
        raise
    finally:
        if thread.is_alive():
            stop()
        thread.join()
