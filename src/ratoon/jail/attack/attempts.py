"""What an attempt is, and what it may say: allowed, with what it got, or refused, and how."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import Any


class Denied(Exception):
    """The attempt did not get what it wanted; the text says how it was refused."""


class Attempt:
    """One thing to try: `run` returns how it was allowed, or raises Denied or OSError."""

    def __init__(self, group: str, name: str, run: Callable[[], str | None], sticky: bool) -> None:
        self.group = group
        self.name = name
        self.run = run
        self.sticky = sticky


ATTEMPTS: list[Attempt] = []


def register(group: str, name: str, run: Callable[[], str | None], sticky: bool = False) -> None:
    """Add an attempt; a sticky one changes its process for good (it runs last without fork)."""
    assert all(known.name != name for known in ATTEMPTS), name
    ATTEMPTS.append(Attempt(group, name, run, sticky))


def attempt(group: str, name: str, sticky: bool = False) -> Callable[..., Any]:
    def decorate(run: Callable[[], str | None]) -> Callable[[], str | None]:
        register(group, name, run, sticky)
        return run

    return decorate


def error_name(number: int | None) -> str:
    return errno.errorcode.get(number or 0, f"errno {number}")


def reason_of(error: BaseException) -> str:
    if isinstance(error, Denied):
        return str(error)
    if isinstance(error, TimeoutError) and error.errno is None:
        return "timed out"
    if isinstance(error, OSError):
        return error_name(error.errno)
    return f"fault in the stand-in: {type(error).__name__}: {error}"


def try_each(items: Iterable[Any], one: Callable[[Any], str | None]) -> str:
    """Try `one` on every item: allowed if any of them was, with which; else the reasons counted."""
    allowed: list[str] = []
    refused: dict[str, int] = {}
    for item in items:
        try:
            detail = one(item)
        except (Denied, OSError, ValueError, OverflowError) as error:
            reason = reason_of(error)
            refused[reason] = refused.get(reason, 0) + 1
        else:
            allowed.append(f"{item}: {detail}" if detail else str(item))
    if allowed:
        more = f" and {len(allowed) - 5} more" if len(allowed) > 5 else ""
        return "; ".join(allowed[:5]) + more
    if not refused:
        raise Denied("not tried: nothing of this kind was named")
    raise Denied(", ".join(f"{reason} x{count}" for reason, count in refused.items()))


def past_permission(call: Callable[[], Any], *later: int) -> str:
    """Make a call whose errors `later` come only after the permission check was passed."""
    try:
        call()
    except OSError as error:
        if error.errno in later:
            return f"{error_name(error.errno)}, which comes after the permission check"
        raise
    return "it succeeded"
