"""What an image may be run with, and how a request says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ratoon.client.options import Options, request_for
from ratoon.client.output import command_of
from ratoon.errors import InvalidInput


class RunOptions(Options, total=False):
    """How an image is run, besides what its sandbox gets; all of it may be left out.

    An `entrypoint` (a program, or a list of it and its arguments; empty: none) takes the place of
    the image's, and then the image's own command is left out. The command is process 1, as in a
    container; with `init` Ratoon's agent is, which reaps orphans. `ram_mib`, `vcpus`,
    `disk_size_mib`: the guest's. `cpu`: as for `from_image`.

    `health`: `http://:PORT/PATH`, which the guest must answer with a status below 400.
    `health_cmd`: what must exit with 0 there: text by `sh -c`, or a list. `health_log`: a regular
    expression (of Rust's `regex`) that a line of the command's output must match in part. One of
    them, tried each `health_interval` seconds, for `health_timeout` at a time, and for
    `health_within` in all.

    `start`: False leaves the command to you. `cache`: False uses nothing that was kept, and keeps
    nothing. `refresh`: look the image up again, and make anew what was kept of this run.
    """

    entrypoint: str | Sequence[str] | None
    init: bool
    ram_mib: int | None
    vcpus: int | None
    disk_size_mib: int | None
    cpu: str | None
    health: str | None
    health_cmd: str | Sequence[str] | None
    health_log: str | None
    health_interval: float | None
    health_timeout: float | None
    health_within: float | None
    start: bool
    cache: bool
    refresh: bool


_NAMES = {
    **{name: name for name in ("init", "ram_mib", "vcpus", "cpu")},
    **{name: name for name in ("start", "cache", "refresh")},
    "disk_size_mib": "disk_mib",
}
_PATIENCE = {
    "health_interval": "interval_seconds",
    "health_timeout": "timeout_seconds",
    "health_within": "within_seconds",
}


def run_request(
    image: str, command: str | Sequence[str] | None, options: RunOptions
) -> dict[str, Any]:
    """The fields of a request to run an image. InvalidInput: more than one health check."""
    if unknown := options.keys() - RunOptions.__annotations__.keys():
        raise TypeError(f"runs have no option {', '.join(sorted(unknown))}")
    of_sandbox: Any = {name: options[name] for name in options if name in Options.__annotations__}  # type: ignore[literal-required]
    given = {name: value for name, value in options.items() if value is not None}
    body = {"image": image, **request_for(of_sandbox)}
    body |= {wire: given[name] for name, wire in _NAMES.items() if name in given}
    if command:
        body["command"] = command_of(command)[0]
    if (entrypoint := options.get("entrypoint")) is not None:
        whole = [entrypoint] if isinstance(entrypoint, str) else entrypoint
        body["entrypoint"] = [word for word in whole if word]
    if health := _health(options):
        patience = {wire: given[name] for name, wire in _PATIENCE.items() if name in given}
        body["health"] = {**health, **patience}
    return body


def _health(options: RunOptions) -> dict[str, Any] | None:
    checks: list[dict[str, Any]] = []
    if url := options.get("health"):
        checks.append({"kind": "http", "url": url})
    if command := options.get("health_cmd"):
        checks.append({"kind": "command", "argv": command_of(command)[0]})
    if pattern := options.get("health_log"):
        checks.append({"kind": "log", "pattern": pattern})
    if len(checks) > 1:
        raise InvalidInput("more than one health check: give one of a URL, a command, a pattern")
    return checks[0] if checks else None
