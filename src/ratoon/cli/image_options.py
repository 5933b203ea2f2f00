"""The options of `ratoon run` that are for images alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratoon.cli.options import seconds
from ratoon.errors import InvalidInput

if TYPE_CHECKING:
    from ratoon.client.runs import RunOptions

_CHECKS = ("--health", "--health-cmd", "--health-log")


@dataclass(frozen=True)
class ImageWish:
    """Those that were given, by the library's names, and as they were written.

    `waits`: there is a health check.
    """

    options: RunOptions
    written: tuple[str, ...]
    waits: bool


def image_options(
    health: Annotated[
        str | None,
        typer.Option(metavar="URL", help="It is up when http://:PORT/PATH in it answers well."),
    ] = None,
    health_cmd: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="It is up when this, by sh -c in it, exits with 0."),
    ] = None,
    health_log: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="It is up when this is in a line that it writes."),
    ] = None,
    health_interval: Annotated[
        float | None,
        typer.Option(
            parser=seconds, metavar="TIME", help="Between two health checks; 0.2s if not said."
        ),
    ] = None,
    health_timeout: Annotated[
        float | None,
        typer.Option(parser=seconds, metavar="TIME", help="For one health check; 30s if not said."),
    ] = None,
    health_within: Annotated[
        float | None,
        typer.Option(parser=seconds, metavar="TIME", help="Until it must be up; 600s if not said."),
    ] = None,
    mem_size_mib: Annotated[
        int | None, typer.Option(help="An image's RAM in MiB; 512 if not said.")
    ] = None,
    vcpus: Annotated[
        int | None, typer.Option(help="An image's virtual CPUs; 1 if not said.")
    ] = None,
    disk_size_mib: Annotated[
        int | None, typer.Option(help="An image's disk in MiB; 8192 if not said.")
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Use nothing kept of an image, and keep nothing.")
    ] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Look an image up again; make anew what was kept.")
    ] = False,
) -> ImageWish:
    """Those that were given. InvalidInput: some of them would be of no effect."""
    given = {
        "--health": ("health", health),
        "--health-cmd": ("health_cmd", health_cmd),
        "--health-log": ("health_log", health_log),
        "--health-interval": ("health_interval", health_interval),
        "--health-timeout": ("health_timeout", health_timeout),
        "--health-within": ("health_within", health_within),
        "--mem-size-mib": ("ram_mib", mem_size_mib),
        "--vcpus": ("vcpus", vcpus),
        "--disk-size-mib": ("disk_size_mib", disk_size_mib),
        "--no-cache": ("cache", False if no_cache else None),
        "--refresh": ("refresh", True if refresh else None),
    }
    for option in _CHECKS:
        if given[option][1] == "":
            raise InvalidInput(
                f"{option} is empty: a health check that is not there cannot be passed"
            )
    written = {option: each for option, each in given.items() if each[1] is not None}
    waits = any(option in written for option in _CHECKS)
    if not waits and (idle := [option for option in written if option.startswith("--health-")]):
        raise InvalidInput(
            f"{', '.join(idle)}: there is no health check; give one of {', '.join(_CHECKS)}"
        )
    options: Any = dict(written.values())
    return ImageWish(options, (*written,), waits=waits)
