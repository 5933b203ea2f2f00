"""What the daemon writes down, a JSON object in each line: its log, and that of who asked for what.

The second has a line for each request below /v1, and what came of it. It is opened for each line,
so it may be moved away at any time. It names paths, never what was sent: commands and content may
be secret.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ratoon import files
from ratoon.daemon.metrics import Metrics

log = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """What is logged, as JSON; `error` is a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "at_unix": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def log_as_json(level: int) -> None:
    """Have all that this process logs go to stderr so."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)


class AuditLog:
    """A file that is only ever added to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, **fields: object) -> None:
        """Add a line. If that fails, the log of the daemon says so: what was done is done."""
        line = json.dumps(fields).encode() + b"\n"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            fd = os.open(self._path, flags, 0o600)
            try:
                os.write(fd, line)
            finally:
                os.close(fd)
        except OSError as error:
            log.error("the audit log lacks a line: %s", files.describe(error))


class Watch:
    """Sees every request come and go."""

    def __init__(self, app: ASGIApp, metrics: Metrics, audit: AuditLog | None) -> None:
        self._app = app
        self._metrics = metrics
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        status = 500
        began, clock = time.time(), time.perf_counter()

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
            elif message["type"] == "websocket.accept":
                status = 101
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            seconds = time.perf_counter() - clock
            method = scope.get("method", "WEBSOCKET")
            self._count(scope, method, status, seconds)
            if self._audit and scope["path"].startswith("/v1/"):
                self._audit.add(
                    at_unix=round(began, 3),
                    who=_who(scope),
                    what=f"{method} {scope['path']}",
                    status=status,
                    seconds=round(seconds, 6),
                )

    def _count(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")  # never what a client has made up
        known = method if route != "none" else "any"
        self._metrics.requests.labels(known, route, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)


def _who(scope: Scope) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else "local"
