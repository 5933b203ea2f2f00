"""How values are shown to people, and how far something is, without what draws tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from ratoon.cli.app import complain

if TYPE_CHECKING:
    from ratoon.client.aio.client import AsyncSandbox

#: Seconds between two looks that are shown.
_PERIOD = 0.1


def age(seconds: float) -> str:
    """A time that has passed, in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def printable(text: str | None) -> str:
    """Text that came from elsewhere, without what a terminal would obey."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text or ""
    )


def print_fields(fields: Mapping[str, Any]) -> None:
    """A line for each; those within others have both names."""
    lines = dict(_flat("", fields))
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    inner = value
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        inner = dict(enumerate(value, 1))
    if isinstance(inner, Mapping) and inner:
        for key, each in inner.items():
            yield from _flat(f"{name}.{key}" if name else key, each)
    else:
        yield name, _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return printable(", ".join(map(str, value))) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None or value == {} else printable(str(value))


def tell_unsynced(sandbox: AsyncSandbox) -> None:
    """Say so, if what a guest had written may not be in its volumes."""
    if sandbox.unsynced:
        complain(f"{sandbox.id}: its volumes may lack data: {printable(sandbox.unsynced)}")


class Meter:
    """Shows the last thing it was told; within its block, and on a terminal alone."""

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty()
        self._width = 0
        self._at = 0.0

    def show(self, text: str) -> None:
        now = time.monotonic()
        if self._shows and now - self._at >= _PERIOD:
            self._at = now
            self._draw(text)

    def _draw(self, text: str) -> None:
        sys.stderr.write(f"\r{text:{self._width}}")
        sys.stderr.flush()
        self._width = len(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            self._draw("")
            sys.stderr.write("\r")
