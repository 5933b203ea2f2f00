"""How far something is, in one line of a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

#: Seconds between two looks that are shown.
_PERIOD = 0.1


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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._width:
            self._draw("")
            sys.stderr.write("\r")
