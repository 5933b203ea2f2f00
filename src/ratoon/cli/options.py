"""What options say, and the options that all verbs have that fork."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ratoon.client.options import Options

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_MIB = {"": 1, "m": 1, "g": 1024, "t": 1024 * 1024}
_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def seconds(text: str) -> float:
    """`90`, `90s`, `1.5m`, `2h` or `1d`."""
    return _scaled(text, _SECONDS, "write seconds, or 90s, 15m, 2h, 1d")


def mebibytes(text: str) -> int:
    """`512`, `512m`, `2g`."""
    return round(_scaled(text, _MIB, "write MiB, or 512m, 2g"))


def byte_count(text: str) -> int:
    """`4096`, `64k`, `512m`, `2g`: bytes."""
    return round(_scaled(text, _BYTES, "write bytes, or 64k, 512m, 2g"))


def published(text: str) -> tuple[int, int | None]:
    """`HOST:GUEST` or `GUEST`, as the guest's port and the host's."""
    host, colon, guest = text.rpartition(":")
    if not guest.isdecimal() or (colon and not host.isdecimal()):
        raise typer.BadParameter(
            f"{text!r}: write HOSTPORT:GUESTPORT, or GUESTPORT for any of the host's"
        )
    for port in (host, guest) if colon else (guest,):
        if not 1 <= int(port) <= 65535:
            raise typer.BadParameter(f"{text!r}: {port} is no port: they are 1 to 65535")
    return int(guest), int(host) if colon else None


def pair(text: str) -> tuple[str, str]:
    """`NAME=VALUE`."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{text!r}: write NAME=VALUE")
    return name, value


def volume(text: str) -> str:
    """`SOURCE:TARGET[:ro]`; a SOURCE with a slash is a directory here, by its real path then."""
    source, colon, rest = text.partition(":")
    return (str(Path(source).resolve()) if "/" in source else source) + colon + rest


def variable(text: str) -> tuple[str, str]:
    """`NAME=VALUE`, or `NAME` for what it is here."""
    return pair(text) if "=" in text else (text, os.environ.get(text, ""))


def _scaled(text: str, units: dict[str, int], way_out: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]?)", text.strip().lower())
    if not match or match[2] not in units:
        raise typer.BadParameter(f"{text!r}: {way_out}")
    return float(match[1]) * units[match[2]]


Env = Annotated[
    list[Any] | None,
    typer.Option(
        "--env", "-e", parser=variable, metavar="NAME[=VALUE]", help="Set it for the command."
    ),
]
Workdir = Annotated[str | None, typer.Option("--workdir", "-w", help="Where the command starts.")]
User = Annotated[
    str | None, typer.Option("--user", "-u", metavar="NAME|UID[:GROUP]", help="Who runs it.")
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout-secs", parser=seconds, metavar="SECONDS", help="What it may take."),
]
Network = Annotated[
    str | None,
    typer.Option(help="none, outbound or allow:CIDR:PORT,…; by default as its snapshot says."),
]
Memory = Annotated[
    int | None,
    typer.Option(parser=mebibytes, metavar="SIZE", help="What it may take of the host's memory."),
]
Cpus = Annotated[float | None, typer.Option(help="How many of the host's processors it may use.")]
Pids = Annotated[int | None, typer.Option(help="How many threads its machine may have.")]
Disk = Annotated[
    int | None,
    typer.Option(parser=mebibytes, metavar="SIZE", help="What its disk may take of the host's."),
]
Ttl = Annotated[
    float | None,
    typer.Option(parser=seconds, metavar="TIME", help="Kill it so long after its fork."),
]
Idle = Annotated[
    float | None,
    typer.Option(parser=seconds, metavar="TIME", help="To standby after so long without use."),
]
Publish = Annotated[
    list[Any] | None,
    typer.Option(
        "--publish", "-p", parser=published, metavar="[HOST:]GUEST", help="Publish a port."
    ),
]
Volumes = Annotated[
    list[Any] | None,
    typer.Option(
        "--volume",
        "-v",
        parser=volume,
        metavar="SOURCE:TARGET[:ro]",
        help="Mount a directory of this host, or a named volume.",
    ),
]
Label = Annotated[
    list[Any] | None,
    typer.Option(
        "--label", "-l", parser=pair, metavar="NAME=VALUE", help="Metadata to find it by."
    ),
]


def fork_options(
    network: Network = None,
    memory: Memory = None,
    cpus: Cpus = None,
    pids: Pids = None,
    disk: Disk = None,
    ttl: Ttl = None,
    idle: Idle = None,
    publish: Publish = None,
    volumes: Volumes = None,
    label: Label = None,
) -> Options:
    """Those that were given, as the library knows them."""
    given = {
        "network": network,
        "memory_mib": memory,
        "cpus": cpus,
        "pids": pids,
        "disk_mib": disk,
        "timeout": ttl,
        "idle": idle,
        "publish": dict(publish or []) or None,
        "volumes": volumes or None,
        "metadata": dict(label or []) or None,
    }
    options: Any = {name: value for name, value in given.items() if value is not None}
    return options  # type: ignore[no-any-return]
