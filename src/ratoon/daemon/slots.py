"""How many may be at something at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ratoon.errors import Overloaded


class Slots:
    """So many may be at something at a time."""

    def __init__(self, cap: int, what: str) -> None:
        self.cap = cap
        self.taken = 0
        self._what = what

    @contextmanager
    def take(self) -> Iterator[None]:
        """Overloaded if all are taken."""
        if self.taken >= self.cap:
            raise Overloaded(
                f"{self._what} under way: {self.taken}, and no more than {self.cap} may be; "
                "try again later"
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
