"""The options of verbs: what they say, those that several have, and the fields they end up in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratoon.api.answers import IdleCounts
from ratoon.api.defaults import DISK_MIB, RAM_MIB
from ratoon.errors import InvalidInput
from ratoon.units import MIB, parse_duration, parse_size

if TYPE_CHECKING:
    from ratoon.client.options import Options, Place
    from ratoon.client.runs import RunOptions


def seconds(text: str) -> float:
    """`90`, `90s`, `1.5m`, `2h` or `1d`."""
    with _said_of_the_option():
        return parse_duration(text)


def mebibytes(text: str) -> int:
    """`512`, `512m`, `2g`."""
    with _said_of_the_option():
        return round(parse_size(text, unit=MIB) / MIB)


def byte_count(text: str) -> int:
    """`4096`, `64k`, `512m`, `2g`: bytes."""
    with _said_of_the_option():
        return parse_size(text)


def published(text: str) -> tuple[int, Place]:
    """`[[ADDRESS:]HOST:]GUEST`: the guest's port and the host's, with its address if there is one.

    `ADDRESS::GUEST`: any port of that address.
    """
    ports, _, protocol = text.partition("/")
    if protocol not in ("", "tcp"):
        raise typer.BadParameter(f"{text!r}: TCP ports can be published, {protocol} ones cannot")
    *before, guest = re.split(r":(?![^[]*\])", ports)  # an IPv6 address is in [ ]
    match before:
        case [] | [_]:
            address, host = None, before[0] if before else None
        case [address, host] if address:
            address, host = address.strip("[]"), host or None
        case _:
            address, host = None, ""
    if not all(port is None or port.isdecimal() for port in (host, guest)):
        raise typer.BadParameter(
            f"{text!r}: write HOSTPORT:GUESTPORT, or GUESTPORT for any of the host's; and for "
            "another address than its loopback ADDRESS:HOSTPORT:GUESTPORT, IPv6 ones in [ ]"
        )
    for port in (host, guest):
        if port is not None and not 1 <= int(port) <= 65535:
            raise typer.BadParameter(f"{text!r}: {port} is no port: they are 1 to 65535")
    number = None if host is None else int(host)
    return int(guest), number if address is None else (address, number)


def _places(wanted: Iterable[tuple[int, Place]]) -> dict[int, list[Place]] | None:
    """What each port of a guest is published as."""
    places: dict[int, list[Place]] = {}
    for guest, place in wanted:
        places.setdefault(guest, []).append(place)
    return places or None


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


@contextmanager
def _said_of_the_option() -> Iterator[None]:
    """What is no size and no time, said of the option that it was given for."""
    try:
        yield
    except InvalidInput as error:
        raise typer.BadParameter(str(error)) from None


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
Counts = Annotated[
    IdleCounts | None,
    typer.Option(
        "--idle-counts",
        help="What is use besides calls: any command, or what it does itself, or nothing.",
    ),
]
Cpu = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="A processor that all hosts of a fleet have, such as x86-64-v3; else this host's own.",
    ),
]
Publish = Annotated[
    list[Any] | None,
    typer.Option(
        "--publish",
        "-p",
        parser=published,
        metavar="[[ADDRESS:]HOST:]GUEST",
        help="Publish a TCP port, on the loopback or ADDRESS.",
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
Remove = Annotated[
    bool, typer.Option("--rm", help="Kill it once the command has ended that it was made for.")
]
StopSignal = Annotated[
    str | None,
    typer.Option(metavar="SIGNAL", help="What `stop` ends its command with; else SIGTERM."),
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
    idle_counts: Counts = None,
    publish: Publish = None,
    volumes: Volumes = None,
    rm: Remove = False,
    stop_signal: StopSignal = None,
    env: Env = None,
    workdir: Workdir = None,
    user: User = None,
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
        "idle_counts": idle_counts,
        "publish": _places(publish or []),
        "volumes": volumes or None,
        "auto_remove": rm or None,
        "stop_signal": stop_signal,
        "env": dict(env or []) or None,
        "workdir": workdir,
        "user": user,
        "metadata": dict(label or []) or None,
    }
    options: Any = {name: value for name, value in given.items() if value is not None}
    return options  # type: ignore[no-any-return]


_CHECKS = ("--health", "--health-cmd", "--health-log")


@dataclass(frozen=True)
class ImageOptions:
    """Those that were given, by the library's names, and as they were written.

    `waits`: there is a health check.
    """

    options: RunOptions
    written: tuple[str, ...]
    waits: bool


def image_options(
    entrypoint: Annotated[
        str | None,
        typer.Option(
            metavar="PROGRAM", help="In place of an image's entrypoint and command; empty: none."
        ),
    ] = None,
    init: Annotated[
        bool,
        typer.Option(
            "--init", help="An image's command is not process 1: an init is, as Docker's."
        ),
    ] = False,
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
        int | None, typer.Option(help=f"An image's RAM in MiB; {RAM_MIB} if not said.")
    ] = None,
    vcpus: Annotated[
        int | None, typer.Option(help="An image's virtual CPUs; 1 if not said.")
    ] = None,
    disk_size_mib: Annotated[
        int | None, typer.Option(help=f"An image's disk in MiB; {DISK_MIB} if not said.")
    ] = None,
    cpu: Cpu = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Use nothing kept of an image, and keep nothing.")
    ] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Look an image up again; make anew what was kept.")
    ] = False,
) -> ImageOptions:
    """Those that were given. InvalidInput: some of them would be of no effect."""
    given = {
        "--entrypoint": ("entrypoint", entrypoint),
        "--init": ("init", True if init else None),
        "--health": ("health", health),
        "--health-cmd": ("health_cmd", health_cmd),
        "--health-log": ("health_log", health_log),
        "--health-interval": ("health_interval", health_interval),
        "--health-timeout": ("health_timeout", health_timeout),
        "--health-within": ("health_within", health_within),
        "--mem-size-mib": ("ram_mib", mem_size_mib),
        "--vcpus": ("vcpus", vcpus),
        "--disk-size-mib": ("disk_size_mib", disk_size_mib),
        "--cpu": ("cpu", cpu),
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
    return ImageOptions(options, (*written,), waits=waits)


_PATIENCE = ("interval", "timeout", "within")
#: The option of a field, and of all that is in it.
_OPTIONS = {
    "image": "IMAGE",
    "command": "COMMAND",
    "entrypoint": "--entrypoint",
    "init": "--init",
    "env": "--env",
    "user": "--user",
    "workdir": "--workdir",
    "cwd": "--workdir",
    "timeout": "--timeout-secs",
    "ram_mib": "--mem-size-mib",
    "vcpus": "--vcpus",
    "disk_mib": "--disk-size-mib",
    "cpu": "--cpu",
    "health.http": "--health",
    "health.command": "--health-cmd",
    "health.log": "--health-log",
    **{
        f"health.{kind}.{name}_seconds": f"--health-{name}"
        for kind in ("http", "command", "log")
        for name in _PATIENCE
    },
    "limits.memory_mib": "--memory",
    "limits.cpus": "--cpus",
    "limits.pids": "--pids",
    "limits.disk_mib": "--disk",
    "memory_bytes": "--memory",
    "cpus": "--cpus",
    "pids": "--pids",
    "disk_bytes": "--disk",
    "ttl_seconds": "--ttl",
    "idle_seconds": "--idle",
    "idle_counts": "--idle-counts",
    "stop_signal": "--stop-signal",
    "publish": "--publish",
    "volumes": "--volume",
    "source": "--volume",
    "target": "--volume",
    "metadata": "--label",
}
#: Where each of several complaints begins.
_FIELD = re.compile(r"(?:^|(?<=; ))(?:body\.)?([a-z_]+(?:\.[^.:; ]+)*)(?=: )")


def as_options(text: str) -> str:
    """The same about options; fields that no option is for stay."""
    return _FIELD.sub(_option, text)


def _option(match: re.Match[str]) -> str:
    parts = match[1].split(".")
    for end in range(len(parts), 0, -1):
        if option := _OPTIONS.get(".".join(parts[:end])):
            return option
    return match[0]
