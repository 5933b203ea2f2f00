"""What all routes share: the engine, what was chosen, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from ratoon.daemon.metrics import Metrics
from ratoon.daemon.settings import Settings
from ratoon.errors import Overloaded, RatoonError
from ratoon.sandbox.engine import Engine


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


class Daemon:
    """One engine, as it is offered over HTTP."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics(engine)
        self.branches = Slots(settings.branch_cap, "branches")
        #: Checks read the whole store.
        self.checks = Slots(1, "checks of the store")
        #: Of the last fork that did not start all its sandboxes: of which snapshot, and the errors.
        self.failures: tuple[str | None, Sequence[RatoonError]] = None, ()


async def _daemon(connection: HTTPConnection) -> Daemon:
    daemon = connection.app.state.daemon
    assert isinstance(daemon, Daemon)
    return daemon


TheDaemon = Annotated[Daemon, Depends(_daemon)]
