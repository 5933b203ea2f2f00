"""How long each stage of a fork or a branch took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

#: The stages of a branch in which its sandbox stands still.
STANDING_STILL = ("pause", "state", "scan", "copy", "disk", "resume")


def sum_ms(stages: Mapping[str, float], names: Iterable[str]) -> float | None:
    """The milliseconds of some stages, if any of them is known."""
    found = [stages[name] for name in names if name in stages]
    return round(sum(found), 3) if found else None


class Stages:
    """Milliseconds by stage, in the order in which the stages ran; a stage may run in parts."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = (time.perf_counter() - start) * 1e3
            self.ms[name] = round(self.ms.get(name, 0.0) + elapsed, 3)

    @property
    def total_ms(self) -> float:
        """Milliseconds since this object was made, what lies between stages included."""
        return round((time.perf_counter() - self._began) * 1e3, 3)
