"""What all routes share: the engine, what was chosen, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from ratoon.daemon.limits import Slots
from ratoon.daemon.metrics import Metrics
from ratoon.daemon.settings import Settings
from ratoon.daemon.workspace import Workspaces
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.startup.runner import Runner
from ratoon.errors import RatoonError


class Daemon:
    """One engine, as it is offered over HTTP."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics(engine)
        self.branches = Slots(settings.branch_cap, "branches")
        self.runner = Runner(engine)
        self.workspaces = Workspaces(engine, self.branches)
        #: Checks read the whole store.
        self.checks = Slots(1, "checks of the store")
        #: Of the last fork that did not start all its sandboxes: of which snapshot, and the errors.
        self.failures: tuple[str | None, Sequence[RatoonError]] = None, ()


async def _daemon(connection: HTTPConnection) -> Daemon:
    daemon = connection.app.state.daemon
    assert isinstance(daemon, Daemon)
    return daemon


TheDaemon = Annotated[Daemon, Depends(_daemon)]
