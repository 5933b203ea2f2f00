"""Fields of requests, in what a daemon says is wrong with one, as the options they come from."""

from __future__ import annotations

import re

_PATIENCE = ("interval", "timeout", "within")
#: The option of a field, and of all that is in it.
_OPTIONS = {
    "image": "IMAGE",
    "command": "COMMAND",
    "env": "--env",
    "user": "--user",
    "workdir": "--workdir",
    "cwd": "--workdir",
    "timeout": "--timeout-secs",
    "ram_mib": "--mem-size-mib",
    "vcpus": "--vcpus",
    "disk_mib": "--disk-size-mib",
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
